"""`bench read`: one image read in the ways that a host can offer it, by one and the same reader.

All ways hold the same data and stay up for the whole run; each round measures each of them once, so that drift of the
machine meets all alike. CPU time is that of the reader and of all processes behind the file.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Final

from vmthunder.bench.disk import empty_disk
from vmthunder.bench.machine import facts
from vmthunder.bench.namespaces import isolate
from vmthunder.bench.node import Node, compute_node, image_server, publish
from vmthunder.bench.processes import cpu_s, running
from vmthunder.bench.publish import realistic_disk
from vmthunder.bench.reader import RANDOM_BYTES, PageCache, random_reads, require_reader, sequential_read, warm
from vmthunder.bench.rows import Figures, Round, medians, ratio, rotated, rounded
from vmthunder.errors import Failure, Usage

LOCAL: Final = "local file"
COLD: Final = "ours cold"
CHUNKS: Final = "ours cached chunks"
PAGES: Final = "ours page cache"
MATERIALIZED: Final = "ours materialised"
NBDKIT: Final = "nbdkit + nbdfuse"
QEMU_NBD: Final = "qemu-nbd + nbdfuse"

MIN_SIZE_BYTES: Final = 16 << 20
_IMAGE = "sample"
_MIN_DISK_BYTES = 1 << 30
_START_S = 10.0
_RANDOM_READS = 16384
_RANDOM_WARM_S = 2.0
_WARM_PASSES = 4

Say = Callable[[str], None]


@dataclass(frozen=True)
class Target:
    """A file to read, and the processes behind it."""

    path: Path
    pids: tuple[int, ...] = ()
    node: Node | None = None


@dataclass(frozen=True)
class Way:
    """One row: how the image is offered."""

    cache: PageCache
    ready: Callable[[], AbstractContextManager[Target]]
    """Called for each measurement: a node that must be cold is a new one each time."""
    fetches: bool = False
    """Whether its chunks come from the origin; the others must not fetch any."""


def bench_read(size_bytes: int, rounds: int, directory: Path | None, say: Say) -> dict[str, Any]:
    """Run the benchmark; returns `rows`, `ratios` and `machine`. Moves the process into namespaces of its own.

    Needs about four times `size_bytes` of disk in `directory` and as much memory for page cache.

    Raises:
        Usage, NotPermitted (not root), MissingTool (no fio), NotFound (/usr holds less), Failure.
    """
    if rounds < 1 or size_bytes < MIN_SIZE_BYTES:
        raise Usage("at least one round and an image of at least 16 MiB are needed")
    require_reader()
    isolate()
    with empty_disk(directory, max(_MIN_DISK_BYTES, 8 * size_bytes), say) as work, ExitStack() as stack:
        ways = _ways(work, size_bytes, stack, say)
        measured: list[Round] = []
        for number in range(rounds):
            figures: dict[str, Figures] = {}
            for name in rotated(list(ways), number):
                say(f"round {number + 1} of {rounds}: {name}")
                figures[name] = _measure(name, ways[name], size_bytes)
            measured.append(figures)
    return _report(list(ways), measured, size_bytes)


def _ways(work: Path, size_bytes: int, stack: ExitStack, say: Say) -> dict[str, Way]:
    """Start all that is measured; `stack` ends it."""
    raw = work / "disk.raw"
    origin = work / "origin"
    say(f"writing {size_bytes >> 20} MiB of data")
    realistic_disk(raw, size_bytes)
    say("publishing it")
    publish(raw, _IMAGE, origin)
    url, server = stack.enter_context(image_server(origin))
    cache_bytes = 2 * size_bytes
    numbers = count()

    @contextmanager
    def cold() -> Iterator[Target]:
        with compute_node(url, work / f"cold-{next(numbers)}", cache_bytes) as node:
            yield _on(node, server.pid)

    say("filling a node's cache")
    cached = _on(stack.enter_context(compute_node(url, work / "cached", cache_bytes)))
    warm(cached.path)
    say("materialising the image on another node")
    other = stack.enter_context(compute_node(url, work / "materialised", cache_bytes))
    other.client.materialize(_IMAGE)
    materialised = _on(other)

    ways = {
        LOCAL: Way(PageCache.WARM, _standing(Target(raw))),
        COLD: Way(PageCache.DROPPED, cold, fetches=True),
        CHUNKS: Way(PageCache.DROPPED, _standing(cached)),
        PAGES: Way(PageCache.WARM, _standing(cached)),
        MATERIALIZED: Way(PageCache.WARM, _standing(materialised)),
    }
    for name, program, options in (
        (NBDKIT, "nbdkit", ("--foreground", "--readonly", "--unix={socket}", "file", "{raw}")),
        (
            QEMU_NBD,
            "qemu-nbd",
            ("--read-only", "--persistent", "--format=raw", "--shared=0", "--socket={socket}", "{raw}"),
        ),
    ):
        if shutil.which(program) is None or shutil.which("nbdfuse") is None:
            say(f"no row {name!r}: {program} or nbdfuse is not installed")
            continue
        target = stack.enter_context(_nbd_mount(program, options, raw, work / program))
        ways[name] = Way(PageCache.DROPPED, _standing(target))
    return ways


def _standing(target: Target) -> Callable[[], AbstractContextManager[Target]]:
    """What stays up from measurement to measurement."""
    return lambda: nullcontext(target)


def _on(node: Node, *server_pids: int) -> Target:
    """The image as a node shows it."""
    path = Path(node.client.resolve(_IMAGE)["path"])
    return Target(path, (node.process.pid, *server_pids), node)


@contextmanager
def _nbd_mount(program: str, options: Sequence[str], raw: Path, directory: Path) -> Iterator[Target]:
    """An NBD server on the raw file, and nbdfuse, which shows its export as a file."""
    directory.mkdir()
    file = directory / "nbd"
    with tempfile.TemporaryDirectory(prefix="vmthunder-") as run_dir:  # short enough for a unix socket's path
        socket = Path(run_dir, "nbd.sock")
        argv = [program, *(option.format(socket=socket, raw=raw) for option in options)]
        with running(program, argv, directory.with_suffix(".log")) as server:
            server.wait_until(socket.exists, _START_S)
            argv = ["nbdfuse", "--readonly", str(directory), f"nbd+unix:///?socket={socket}"]
            with running("nbdfuse", argv, directory.with_suffix(".nbdfuse.log")) as mount:
                mount.wait_until(file.exists, _START_S)
                yield Target(file, (server.pid, mount.pid))


def _measure(name: str, way: Way, size_bytes: int) -> Figures:
    count = min(_RANDOM_READS, size_bytes // RANDOM_BYTES // 4)
    with way.ready() as target:
        _prepare(way, target)
        before = _fetched(target)
        random = random_reads(target.path, way.cache, count, _RANDOM_WARM_S)
        _check(name, way, target, before)
    with way.ready() as target:
        _prepare(way, target)
        before = _fetched(target)
        used_s = cpu_s(target.pids)
        sequential = sequential_read(target.path, way.cache, _WARM_PASSES)
        used_s = cpu_s(target.pids) - used_s + sequential.reader_cpu_s
        _check(name, way, target, before)
    return {
        "rand4k_iops": random.ops_s,
        "seq_mb_s": sequential.mb_s,
        "cpu_s_per_gb": used_s / sequential.read_bytes * 1e9,
    }


def _prepare(way: Way, target: Target) -> None:
    if way.cache is PageCache.WARM:
        warm(target.path)


def _fetched(target: Target) -> int:
    return int(target.node.client.status()["fetch"]["bytes_fetched"]) if target.node else 0


def _check(name: str, way: Way, target: Target, before: int) -> None:
    """A row that did not measure what it is named for is worse than none."""
    fetched = _fetched(target) - before
    if target.node and way.fetches != bool(fetched):
        raise Failure(f"row {name!r} fetched {fetched} bytes from the origin, so it measured something else")


def _report(names: list[str], measured: list[Round], size_bytes: int) -> dict[str, Any]:
    pairs = [(PAGES, LOCAL), (MATERIALIZED, LOCAL), (CHUNKS, NBDKIT), (CHUNKS, QEMU_NBD), (COLD, NBDKIT)]
    ratios: dict[str, dict[str, float]] = {}
    for row, over in pairs:
        for figure in ("rand4k_iops", "seq_mb_s"):
            found = ratio(measured, row, over, figure)
            if found is not None:
                ratios.setdefault(f"{row} ÷ {over}", {})[figure] = rounded(found)
    rows = [
        {"name": name} | {figure: rounded(value) for figure, value in medians(measured, name).items()} for name in names
    ]
    return {"rows": rows, "ratios": ratios, "rounds": len(measured), "size_bytes": size_bytes, "machine": facts()}
