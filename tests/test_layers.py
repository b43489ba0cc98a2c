"""Imports go one way. Which room may see which is written here and nowhere else."""

import ast
from collections.abc import Iterator

import pytest

from conftest import repository

SOURCE = repository() / "src"
PACKAGE = SOURCE / "vmthunder"

BELOW: dict[str, set[str]] = {
    "errors": set(),
    "ids": {"errors"},
    "image": {"ids", "errors"},
    "fuse": {"ids", "errors"},
    "origin": {"image", "ids", "errors"},
    "serverclient": {"errors"},
    "serverhandlers": {"errors"},
    "profile": {"serverclient", "serverhandlers", "origin", "image", "ids", "errors"},
    "swarm": {"serverclient", "serverhandlers", "ids", "errors"},
    "peer": {"ids", "errors"},
    "sim": {"swarm", "ids", "errors"},
    "publishing": {"profile", "origin", "image", "ids", "errors"},
    "openstack": {"publishing", "origin", "image", "ids", "errors"},
    "node": {"profile", "peer", "swarm", "fuse", "origin", "image", "ids", "errors"},
    "vm": {"node", "ids", "errors"},
    "fleet": {"node", "swarm", "ids", "errors"},
    "lab": {"vm", "node", "ids", "errors"},
    "bench": {"lab", "vm", "node", "peer", "swarm", "publishing", "origin", "fuse", "image", "ids", "errors"},
    "cli": {
        "bench",
        "sim",
        "lab",
        "fleet",
        "vm",
        "node",
        "swarm",
        "openstack",
        "publishing",
        "profile",
        "origin",
        "fuse",
        "image",
        "ids",
        "errors",
    },
    "__main__": {"cli"},
    "__init__": set(),
}
"""Room → rooms that it may import. A room may import itself."""

PURE = {
    "ids",
    "errors",
    "image.chunk",
    "image.manifest",
    "image.pack",
    "fuse.protocol",
    "fuse.writing",
    "fuse.negotiate",
    "swarm.topology",
    "swarm.view",
    "swarm.tracker",
    "swarm.rank",
    "swarm.search",
    "swarm.activity",
    "peer.answer",
    "peer.frames",
    "peer.key",
    "peer.wire",
    "sim.run",
    "sim.scenario",
    "sim.views",
    "profile.profile",
    "profile.live",
    "profile.merge",
    "profile.summary",
    "lab.trace",
    "node.backoff",
    "node.eviction",
    "node.limits",
    "node.policy",
    "node.recorder",
    "node.window",
    "node.stall",
    "fleet.placement",
    "fleet.ledger",
}
"""Modules that decide and do no I/O: time, randomness and the world are arguments."""

IMPURE = {"os", "io", "socket", "time", "random", "asyncio", "threading", "subprocess", "tempfile", "shutil", "logging"}
MAY = {"image.chunk": {"threading"}, "sim.run": {"random"}}
"""Coders belong to a thread; nothing waits there. A simulation is given the seed of its chance."""

ONLY_CONTROL = {
    "vm": {"node.control", "node.status"},
    "fleet": {"node.control", "node.exchange", "swarm.client", "swarm.key", "swarm.view"},
}
"""Rooms that talk to another room through its front door only."""


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        yield name, ast.parse(path.read_text())


def imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide which room is meant"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(imported: str) -> str | None:
    """`node.cache` for `vmthunder.node.cache.ChunkCache`; None for what is not ours."""
    package, _, rest = imported.partition(".")
    if package != "vmthunder" or rest == "__version__":
        return None
    parts = rest.split(".")
    while parts and not (PACKAGE.joinpath(*parts).with_suffix(".py").exists() or PACKAGE.joinpath(*parts).is_dir()):
        parts.pop()
    return ".".join(parts)


@pytest.mark.parametrize(("name", "tree"), list(modules()), ids=lambda value: value if isinstance(value, str) else "")
def test_imports_go_down_only(name: str, tree: ast.Module) -> None:
    room = name.partition(".")[0]
    assert room in BELOW, f"{room} has no place in this table"
    for target in filter(None, map(ours, imports(tree))):
        target_room = target.partition(".")[0]
        assert target_room == room or target_room in BELOW[room], f"{name} imports {target}, which is not below it"
        if target_room != room and target_room in {r.partition(".")[0] for r in ONLY_CONTROL.get(room, ())}:
            assert target in ONLY_CONTROL[room], f"{name} reaches past the front door: {target}"


def test_pure_modules_do_no_input_or_output() -> None:
    found = dict(modules())
    for name in PURE:
        used = {imported.partition(".")[0] for imported in imports(found[name])} & (IMPURE - MAY.get(name, set()))
        assert not used, f"{name} is pure, but imports {sorted(used)}"


def test_pure_modules_import_pure_modules_only() -> None:
    for name, tree in modules():
        if name in PURE:
            others = set(filter(None, map(ours, imports(tree)))) - {"image", "fuse", "node", "lab"}
            assert others <= PURE, f"{name} is pure, but imports {sorted(others - PURE)}"


def test_rooms_have_telling_names() -> None:
    for name, _ in modules():
        last = name.rpartition(".")[2]
        assert last not in {"utils", "util", "common", "helpers", "misc"} and not last.endswith(("manager", "_new")), (
            name
        )
