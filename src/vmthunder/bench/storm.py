"""`bench storm`: N nodes with nothing on them boot one image at the same moment, over links of a stated rate.

Each row is a way to have the disk, and each round measures all rows one after the other on new nodes: the file systems
mounted anew, chunk caches empty. The row without a profile comes before the one with it, which has learned from it alone.
"""

import asyncio
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Final

from vmthunder.bench.boots import Guests, Ready, Replayed
from vmthunder.bench.fleet import fleet, serving
from vmthunder.bench.machine import facts
from vmthunder.bench.node import publish
from vmthunder.bench.reader import warm
from vmthunder.bench.rows import Figures, Round, medians, ratio, rounded
from vmthunder.bench.touched import Touch, first_touches, least_stall_s
from vmthunder.errors import Failure
from vmthunder.ids import ImageId, image_name
from vmthunder.image.manifest import Manifest
from vmthunder.lab.cluster import Cluster
from vmthunder.lab.shaping import Rate
from vmthunder.lab.trace import plan, read_csv
from vmthunder.origin.origin import Origin
from vmthunder.vm.backing import BackingImage

LOCAL: Final = "local file"
FIRST: Final = "first storm, no profile"
EVERYTHING: Final = "everything"
NO_PREFETCH: Final = "no prefetch"
NO_P2P: Final = "no p2p"
NEITHER: Final = "neither"

AGENT_OPTIONS: Final[dict[str, tuple[str, ...]]] = {
    FIRST: (),
    EVERYTHING: (),
    NO_PREFETCH: ("--no-prefetch",),
    NO_P2P: ("--no-p2p",),
    NEITHER: ("--no-prefetch", "--no-p2p"),
}
"""Row → what its agents are told, in the order of measurement."""

_IMAGE = "storm"
_CACHE_BYTES = 4 << 30
_LEARN_S = 60.0
"""A boot is over after some seconds of silence, and sent and stored a little later."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class _Storm:
    """What does not change from row to row."""

    disk: Path
    guests: Guests
    rate: Rate
    origin: Path
    image_id: ImageId
    touches: Sequence[Touch]
    """Of the trace; none of real guests."""

    def local(self) -> BackingImage:
        """The disk as a file of this machine."""
        return BackingImage(_IMAGE, "", self.disk, self.disk.stat().st_size)

    @property
    def touched_bytes(self) -> int:
        return sum(touch.encoded_bytes for touch in self.touches)


def bench_storm(
    disk: Path, guests: Guests, nodes: Sequence[int], rate: Rate, rounds: int, directory: Path | None, say: Say
) -> dict[str, Any]:
    """Run the benchmark for each number of nodes; returns `rows`, `delta_star_s` and `machine`.

    Raises:
        Usage, NotPermitted (not root), MissingTool, CorruptFile (the trace), Failure.
    """
    with tempfile.TemporaryDirectory(prefix="vmthunder-bench-", dir=directory) as work_name:
        work = Path(work_name)
        say("publishing the image")
        origin = work / "origin"
        publish(disk, _IMAGE, origin)
        warm(disk)
        manifest = asyncio.run(_manifest(origin))
        touches: list[Touch] = []
        if isinstance(guests, Replayed):
            with guests.trace.open() as lines:
                steps = plan(read_csv(lines, str(guests.trace)))
            touches = first_touches(steps, guests.think_scale, manifest)
        storm = _Storm(disk, guests, rate, origin, manifest.image_id, touches)
        rows = [row for count in nodes for row in _rows(storm, count, rounds, work, say)]
    machine: dict[str, Any] = facts() | {"rate": rate.text, "rounds": rounds, "virtual_bytes": manifest.virtual_bytes}
    if isinstance(guests, Replayed):
        machine |= {"think_scale": guests.think_scale, "touched_bytes": storm.touched_bytes}
    least_s = rounded(least_stall_s(touches, rate.bytes_s)) if touches else None
    return {"rows": rows, "delta_star_s": least_s, "machine": machine}


async def _manifest(root: Path) -> Manifest:
    origin = Origin.open(str(root))
    return await origin.manifest((await origin.ref(image_name(_IMAGE))).image_id)


def _rows(storm: _Storm, nodes: int, rounds: int, work: Path, say: Say) -> list[dict[str, Any]]:
    measured: list[Round] = []
    for number in range(rounds):
        figures: dict[str, Figures] = {}

        def done(name: str, found: Figures, figures: dict[str, Figures] = figures, number: int = number) -> None:
            figures[name] = found
            say(
                f"{nodes} nodes, round {number + 1} of {rounds}: {name}: "
                f"median {found['median_s']:.2f} s, last {found['max_s']:.2f} s"
            )

        done(LOCAL, _times(storm.guests.boot([storm.local] * nodes)))
        asyncio.run(_forget(storm))
        for name, options in AGENT_OPTIONS.items():
            with tempfile.TemporaryDirectory(dir=work) as scratch:
                done(name, _measure(storm, nodes, options, learn=name == FIRST, work=Path(scratch)))
        measured.append(figures)
    rows = []
    for name in (LOCAL, *AGENT_OPTIONS):
        row = {key: rounded(value, 4) for key, value in medians(measured, name).items()}
        for figure in ("median_s", "p99_s"):
            row[f"{figure.removesuffix('_s')}_over_local"] = rounded(ratio(measured, name, LOCAL, figure) or 0)
        rows.append({"name": name, "nodes": nodes, **row})
    return rows


async def _forget(storm: _Storm) -> None:
    """The image has never been booted."""
    origin = Origin.open(str(storm.origin))
    if storm.image_id in await origin.profiles():
        await origin.delete_profile(storm.image_id)


def _measure(storm: _Storm, nodes: int, options: Sequence[str], *, learn: bool, work: Path) -> dict[str, float]:
    cluster = Cluster.create(f"storm{os.getpid()}", nodes, storm.rate)
    try:
        with (
            serving(cluster, storm.origin, work) as url,
            fleet(cluster.nodes, url, work, _CACHE_BYTES, *options) as agents,
        ):
            boots = storm.guests.boot([partial(BackingImage.resolve, node.client, _IMAGE) for node in agents])
            statuses = [node.client.status() for node in agents]
            if learn:
                _wait_for_profile(storm)
        return _times(boots) | _figures(storm, statuses)
    finally:
        cluster.remove()


def _wait_for_profile(storm: _Storm) -> None:
    deadline_s = time.monotonic() + _LEARN_S
    while storm.image_id not in asyncio.run(Origin.open(str(storm.origin)).profiles()):
        if time.monotonic() > deadline_s:
            raise Failure(f"no profile was learned within {_LEARN_S:.0f} s of the first storm")
        time.sleep(0.2)


def _times(boots: Sequence[Ready]) -> dict[str, float]:
    ordered = sorted(boot.ready_s for boot in boots)
    return {
        "min_s": ordered[0],
        "median_s": median(ordered),
        "p99_s": ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))],
        "max_s": ordered[-1],
        "stall_s": median(boot.stall_s for boot in boots),
        "player_cpu_s": sum(boot.player_cpu_s for boot in boots),
    }


def _figures(storm: _Storm, statuses: Sequence[dict[str, Any]]) -> dict[str, float]:
    fetches = [status["fetch"] for status in statuses]
    found = {
        "bytes_from_origin": float(sum(each["bytes_from_origin"] for each in fetches)),
        "bytes_from_peers": float(sum(each["bytes_from_peers"] for each in fetches)),
        "bytes_from_cache": float(sum(each["bytes_from_cache"] for each in fetches)),
    }
    if not storm.touches:
        return found | {"stall_s": median(each["stalled_s"] for each in fetches)}
    found["origin_over_unique"] = found["bytes_from_origin"] / storm.touched_bytes
    brought = [each["bytes_fetched"] / storm.touched_bytes for each in fetches]
    found["prefetch_waste"] = max(0.0, median(brought) - 1)
    ahead = [status["prefetch"] for status in statuses if status["prefetch"]]
    if ahead:
        # What was pushed into the page cache is read without our knowledge: it is what was missed that agents know.
        missed = median(each["misses"] for each in ahead)
        found["prefetch_hit"] = max(0.0, 1 - missed / len(storm.touches))
    return found
