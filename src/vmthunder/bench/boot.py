"""`bench boot`: one real guest booted from its disk, local and through a node, cold and warm, near and far.

Every boot is the one of `vmthunder boot`, on an overlay of its own; only the file under the overlay differs. Cold means
a new agent with nothing on its disk. Booted one after the other, each way once per round.
"""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Final

from vmthunder.bench.disk import empty_disk
from vmthunder.bench.guest import GuestDisk, build_guest
from vmthunder.bench.link import Link
from vmthunder.bench.machine import facts
from vmthunder.bench.namespaces import isolate
from vmthunder.bench.node import Node, compute_node, image_server, publish
from vmthunder.bench.reader import warm
from vmthunder.bench.rows import Figures, Round, medians, ratio, rotated, rounded
from vmthunder.errors import Usage
from vmthunder.lab.shaping import Rate
from vmthunder.vm.backing import BackingImage
from vmthunder.vm.boot import boot
from vmthunder.vm.machine import Machines
from vmthunder.vm.ready import ConsolePattern
from vmthunder.vm.spec import Spec

LOCAL: Final = "local file"
COLD: Final = "cold"
WARM: Final = "warm"
LOOPBACK: Final = "loopback"

_IMAGE = "guest"
_CACHE_BYTES = 4 << 30
_DISK_BYTES = 16 << 30
_BOOT_TIMEOUT_S = 300.0

Say = Callable[[str], None]


@dataclass(frozen=True)
class Place:
    """What is under the overlay of one boot."""

    resolve: Callable[[], BackingImage]
    node: Node | None = None


Way = Callable[[], AbstractContextManager[Place]]
"""Makes the place of a boot: a node that must be cold is a new one each time."""


def bench_boot(
    guest: Path | None, rates: Sequence[Rate], chunk_sizes: Sequence[int], rounds: int, say: Say
) -> dict[str, Any]:
    """Run the benchmark; returns `rows` and `machine`. Moves the process into namespaces of its own.

    Raises:
        Usage, NotPermitted (not root), MissingTool (no QEMU), NotFound, CorruptFile (the guest), Failure.
    """
    if rounds < 1:
        raise Usage("at least one round is needed")
    say("the guest is built, unless it was before")
    disk = GuestDisk.load(guest or build_guest("lean"))  # before `isolate`: a build needs the network
    isolate()
    with empty_disk(None, _DISK_BYTES, say) as work, ExitStack() as stack:
        ways = _ways(work, disk, rates, chunk_sizes, stack, say)
        booter = _Booter(Machines(work / "machines"), disk)
        for name, way in ways.items():
            if not name.startswith(COLD):
                say(f"first boot, not counted: {name}")
                booter.boot(way)
        measured: list[Round] = []
        for number in range(rounds):
            figures: dict[str, Figures] = {}
            for name in rotated(list(ways), number):
                figures[name] = booter.boot(ways[name])
                say(f"round {number + 1} of {rounds}: {name}: ready after {figures[name]['ready_s']:.2f} s")
            measured.append(figures)
    return _report(list(ways), measured, disk)


def _ways(
    work: Path, disk: GuestDisk, rates: Sequence[Rate], chunk_sizes: Sequence[int], stack: ExitStack, say: Say
) -> dict[str, Way]:
    warm(disk.disk)
    local = disk.local()
    ways: dict[str, Way] = {LOCAL: _standing(Place(lambda: local))}
    numbers = count()
    for chunk_bytes in chunk_sizes:
        suffix = f", {chunk_bytes >> 10} KiB chunks" if len(chunk_sizes) > 1 else ""
        say(f"publishing the guest{suffix}")
        origin = work / f"origin-{chunk_bytes}"
        publish(disk.disk, _IMAGE, origin, f"--chunk-size={chunk_bytes}")
        for rate in (None, *rates):
            name = f"{COLD} {rate.text if rate else LOOPBACK}{suffix}"
            ways[name] = partial(_cold, origin, rate, work, numbers)
        url, _ = stack.enter_context(image_server(origin))
        node = stack.enter_context(compute_node(url, work / f"warm-{chunk_bytes}", _CACHE_BYTES))
        ways[WARM + suffix] = _standing(_on(node))
    return ways


@contextmanager
def _cold(origin: Path, rate: Rate | None, work: Path, numbers: Iterator[int]) -> Iterator[Place]:
    with (
        closing(Link(rate)) if rate else nullcontext() as link,
        image_server(origin, link) as (url, _),
        compute_node(url, work / f"cold-{next(numbers)}", _CACHE_BYTES) as node,
    ):
        yield _on(node)


def _on(node: Node) -> Place:
    return Place(partial(BackingImage.resolve, node.client, _IMAGE), node)


def _standing(place: Place) -> Way:
    return lambda: nullcontext(place)


@dataclass(frozen=True)
class _Booter:
    machines: Machines
    disk: GuestDisk

    def boot(self, way: Way) -> Figures:
        """Boot once, from the question which image it is to the guest's ready mark; leaves no machine."""
        spec = Spec(memory_bytes=self.disk.memory_bytes)
        with way() as place:
            before = _fetch_counters(place)
            began_s = time.monotonic()
            image = place.resolve()
            resolved_s = time.monotonic()
            report = asyncio.run(
                boot(
                    self.machines, None, image, spec, ConsolePattern(self.disk.ready_pattern), timeout_s=_BOOT_TIMEOUT_S
                )
            )
            self.machines.destroy(report.machine.name)
            after = _fetch_counters(place)
        return {
            "ready_s": resolved_s - began_s + report.phases.total_s,
            "bytes_read": report.bytes_read,
            "bytes_fetched": after["bytes_fetched"] - before["bytes_fetched"],
            "origin_requests": after["origin_requests"] - before["origin_requests"],
        }


def _fetch_counters(place: Place) -> dict[str, int]:
    if place.node is None:
        return {"bytes_fetched": 0, "origin_requests": 0}
    counters: dict[str, int] = place.node.client.status()["fetch"]
    return counters


def _report(names: list[str], measured: list[Round], disk: GuestDisk) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for name in names:
        row: dict[str, Any] = {"name": name, **medians(measured, name)}
        row["ready_s"] = rounded(row["ready_s"])
        row["over_local"] = rounded(ratio(measured, name, LOCAL, "ready_s") or 0)
        row["fetched_over_read"] = rounded(row["bytes_fetched"] / row["bytes_read"])
        row["rounds_s"] = [rounded(figures[name]["ready_s"]) for figures in measured]
        rows.append(row)
    guest = {"virtual_bytes": disk.disk.stat().st_size, "memory_bytes": disk.memory_bytes}
    return {"rows": rows, "rounds": len(measured), "guest": guest, "machine": facts()}
