"""`bench storm`: N nodes with nothing on them boot one image at the same moment, over links of a stated rate.

Each row is a way to have the disk, and each round measures all rows one after the other on new nodes: file systems mounted
anew, chunk caches empty. The row without a profile comes before the one with it, which has learned from it alone.
"""

import asyncio
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from vmthunder.bench.boots import Guests, Replayed
from vmthunder.bench.cell import Method, measure
from vmthunder.bench.machine import facts
from vmthunder.bench.methods.local import LocalFile
from vmthunder.bench.methods.vmthunder import Profile, VMThunder, image_manifest
from vmthunder.bench.rows import Figures, Round, medians, ratio, rounded
from vmthunder.bench.touched import Touch, first_touches, least_stall_s
from vmthunder.image.manifest import Manifest
from vmthunder.lab.shaping import Rate
from vmthunder.lab.trace import plan, read_csv

LOCAL: Final = "local file"
FIRST: Final = "first storm, no profile"
EVERYTHING: Final = "everything"
NO_PREFETCH: Final = "no prefetch"
NO_P2P: Final = "no p2p"
NEITHER: Final = "neither"

Say = Callable[[str], None]


def methods() -> list[Method]:
    """The rows, in the order of measurement."""
    return [
        LocalFile(LOCAL),
        VMThunder(FIRST, profile=Profile.NONE),
        VMThunder(EVERYTHING),
        VMThunder(NO_PREFETCH, agent_options=("--no-prefetch",)),
        VMThunder(NO_P2P, agent_options=("--no-p2p",)),
        VMThunder(NEITHER, agent_options=("--no-prefetch", "--no-p2p")),
    ]


def bench_storm(
    disk: Path, guests: Guests, nodes: Sequence[int], rate: Rate, rounds: int, directory: Path | None, say: Say
) -> dict[str, Any]:
    """Run the benchmark for each number of nodes; returns `rows`, `delta_star_s` and `machine`.

    Raises:
        Usage, NotPermitted (not root), MissingTool, CorruptFile (the trace), Failure.
    """
    ways = methods()
    with tempfile.TemporaryDirectory(prefix="vmthunder-bench-", dir=directory) as work_name:
        work = Path(work_name)
        say("publishing the image")
        for way in ways:
            way.publish(disk, work)
        manifest = asyncio.run(image_manifest(work / "origin"))
        touches = touched(guests, manifest)
        rows: list[dict[str, Any]] = []
        for count in nodes:
            measured: list[Round] = []
            for number in range(rounds):
                figures: dict[str, Figures] = {}
                for way in ways:
                    found = measure(way, guests, count, rate, work)
                    figures[way.name] = found | _of_touches(found, touches)
                    say(f"{count} nodes, round {number + 1} of {rounds}: {way.name}: {times_text(found)}")
                measured.append(figures)
            rows += [_row(way.name, count, measured) for way in ways]
    machine: dict[str, Any] = facts() | {"rate": rate.text, "rounds": rounds, "virtual_bytes": manifest.virtual_bytes}
    return {"rows": rows, **bounds(guests, touches, rate), "machine": machine}


def times_text(found: Figures) -> str:
    """For progress."""
    return f"ready after {found['median_s']:.2f} s in the median, the last after {found['max_s']:.2f} s"


def touched(guests: Guests, manifest: Manifest) -> list[Touch]:
    """What the replayed boot touches first; nothing of real guests, whose reads nobody knows before."""
    if not isinstance(guests, Replayed):
        return []
    with guests.trace.open() as lines:
        steps = plan(read_csv(lines, str(guests.trace)))
    return first_touches(steps, guests.think_scale, manifest)


def bounds(guests: Guests, touches: Sequence[Touch], rate: Rate) -> dict[str, Any]:
    """What no method can do better, and the assumption behind it; empty values for real guests."""
    if not touches:
        return {"delta_star_s": None, "touched_bytes": None, "think_scale": None}
    return {
        "delta_star_s": rounded(least_stall_s(touches, rate.bytes_s)),
        "touched_bytes": sum(touch.encoded_bytes for touch in touches),
        "think_scale": guests.think_scale if isinstance(guests, Replayed) else None,
    }


def _of_touches(found: Figures, touches: Sequence[Touch]) -> dict[str, float]:
    touched_bytes = sum(touch.encoded_bytes for touch in touches)
    if not touched_bytes or "node_bytes" not in found:
        return {}
    figures = {
        "origin_over_unique": found["bytes_from_origin"] / touched_bytes,
        "prefetch_waste": max(0.0, found["node_bytes"] / touched_bytes - 1),
    }
    if "node_misses" in found:
        # What was pushed into the page cache is read without the agent's knowledge: what was missed, it knows.
        figures["prefetch_hit"] = max(0.0, 1 - found["node_misses"] / len(touches))
    return figures


def _row(name: str, nodes: int, measured: Sequence[Round]) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, "nodes": nodes}
    row |= {key: rounded(value, 4) for key, value in medians(measured, name).items()}
    row["median_over_local"] = rounded(ratio(measured, name, LOCAL, "median_s") or 0)
    row["p99_over_local"] = rounded(ratio(measured, name, LOCAL, "p99_s") or 0)
    return row
