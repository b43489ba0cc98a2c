"""`bench rivals`: the same storm, by VMThunder and by what people use today.

One cell after the other, each with new nodes; a round does all cells of one number of nodes. What this machine cannot run
is reported with its reason, and so is a cell that failed.
"""

import asyncio
import importlib.metadata
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from vmthunder.bench.boots import Guests
from vmthunder.bench.cell import Method, measure
from vmthunder.bench.machine import facts, version
from vmthunder.bench.methods.copying import BitTorrent, HttpCopy
from vmthunder.bench.methods.local import LocalFile
from vmthunder.bench.methods.network_disk import CopyOnRead, Iscsi, Nbd
from vmthunder.bench.methods.vmthunder import Profile, VMThunder, image_manifest
from vmthunder.bench.rows import Round, medians, ratio, rounded
from vmthunder.bench.storm import bounds, times_text, touched
from vmthunder.errors import Failure
from vmthunder.lab.shaping import Rate

LOCAL: Final = LocalFile().name
FIRST: Final = "VMThunder, first storm"
OURS: Final = "VMThunder"
ORIGINAL: Final = "VMThunder as in 2014"

Say = Callable[[str], None]


def methods() -> list[Method]:
    """The columns, in the order of measurement: `OURS` has the profile that `FIRST` left."""
    return [
        LocalFile(),
        HttpCopy(),
        Nbd(),
        Iscsi(),
        BitTorrent(),
        CopyOnRead(),
        VMThunder(ORIGINAL, server_options=("--stripes=1", "--fanout=2"), agent_options=("--no-prefetch",)),
        VMThunder(FIRST, profile=Profile.NONE),
        VMThunder(OURS),
    ]


def bench_rivals(
    disk: Path,
    guests: Guests,
    nodes: Sequence[int],
    rate: Rate,
    rounds: int,
    only: Sequence[str],
    directory: Path | None,
    say: Say,
) -> dict[str, Any]:
    """Run the benchmark; returns `rows`, `absent`, `failed`, the bounds, `machine` and how it was run.

    `only` are names of methods to measure beside the local file; none: all.

    Raises:
        Usage, NotPermitted (not root), CorruptFile (the trace), Failure (publishing).
    """
    chosen = [method for method in methods() if not only or method.name in (LOCAL, *only)]
    reasons = {method.name: method.absent() for method in chosen}
    absent = [{"name": name, "reason": reason} for name, reason in reasons.items() if reason]
    ways = [method for method in chosen if not reasons[method.name]]
    for lost in absent:
        say(f"absent: {lost['name']}: {lost['reason']}")
    rows: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="vmthunder-bench-", dir=directory) as work_name:
        work = Path(work_name)
        work.chmod(0o755)
        # For the bounds, whichever methods were chosen.
        for way in (VMThunder(OURS), *ways):
            say(f"publishing: {way.name}")
            way.publish(disk, work)
        touches = touched(guests, asyncio.run(image_manifest(work / "origin")))
        for count in nodes:
            measured: list[Round] = []
            for number in range(rounds):
                figures: dict[str, dict[str, float]] = {}
                for way in ways:
                    say(f"{count} nodes, round {number + 1} of {rounds}: {way.name}")
                    try:
                        figures[way.name] = measure(way, guests, count, rate, work)
                    except Failure as error:
                        failed.append({"name": way.name, "nodes": count, "reason": " ".join(str(error).split())})
                        say(f"  failed: {failed[-1]['reason']}")
                    else:
                        say(f"  {times_text(figures[way.name])}")
                measured.append(figures)
            rows += [_row(way.name, count, measured) for way in ways if any(way.name in each for each in measured)]
    machine: dict[str, Any] = facts() | _versions() | {"rate": rate.text, "rounds": rounds, "disk": disk.parent.name}
    return {
        "rows": rows,
        "absent": absent,
        "failed": failed,
        **bounds(guests, touches, rate),
        "machine": machine,
        "commit": _commit(),
        "command": shlex.join(["vmthunder", *sys.argv[1:]]),
    }


def _row(name: str, nodes: int, measured: Sequence[Round]) -> dict[str, Any]:
    found = medians(measured, name)
    row: dict[str, Any] = {"name": name, "nodes": nodes, **{key: rounded(value, 4) for key, value in found.items()}}
    over = ratio(measured, name, LOCAL, "max_s")
    return row | {"last_over_local": rounded(over) if over else None}


def _versions() -> dict[str, str]:
    found = {program: version(program, option) for program, option in (("nginx", "-v"), ("tgtd", "-V"), ("curl", "-V"))}
    try:
        found["libtorrent"] = importlib.metadata.version("libtorrent")
    except importlib.metadata.PackageNotFoundError:
        pass  # it is among the absent
    return {program: said for program, said in found.items() if said}


def _commit() -> str | None:
    """Of the checkout that this runs from; None outside of one."""
    argv = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=10, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None
