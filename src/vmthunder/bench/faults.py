"""`bench faults`: what guests notice while parts of a cluster die, lie, hang or lose each other.

Each row is one fault on a new cluster, under load: nodes read one image at a stated pace, all in the same order, and hold every
byte against the source. Nothing that happens may be more than time to them. Agents bring nothing ahead, so that each read is
one that waits for its chunk.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from pathlib import Path
from statistics import median
from typing import IO, Any, Final, NamedTuple, TypeAlias

from vmthunder.bench.compared import READ_BYTES
from vmthunder.bench.fleet import SERVER_PORT, Server, serving
from vmthunder.bench.hostile import How
from vmthunder.bench.machine import facts
from vmthunder.bench.node import Node, publish, starting_node
from vmthunder.bench.processes import Process, cpu_s
from vmthunder.bench.rows import rounded
from vmthunder.errors import Failure, Usage
from vmthunder.lab.cluster import Cluster
from vmthunder.lab.shaping import Rate


class Fault(StrEnum):
    """What goes wrong."""

    NONE = "none"
    WORKERS = "workers killed"
    AGENTS = "agents killed"
    TRACKER = "tracker away"
    ORIGIN = "origin away"
    PARTED = "half cut off"
    LIES = "a peer lies"
    SILENT = "a peer is silent"
    SLOW = "a peer is slow"
    RESETS = "a peer resets"
    GARBAGE = "a peer sends garbage"
    OVERSIZED = "a peer sends 4 GiB"


_HOSTILE: Final = {
    Fault.LIES: How.LIES,
    Fault.SILENT: How.SILENT,
    Fault.SLOW: How.SLOW,
    Fault.RESETS: How.RESETS,
    Fault.GARBAGE: How.GARBAGE,
    Fault.OVERSIZED: How.OVERSIZED,
}
READS_S: Final = 50
"""Of each node: 3.3 MB/s, what a busy boot reads."""
SLOW_SHARE: Final = 1 / 20
"""Of its link that the slow peer uses."""
_KILLED_SHARE = 0.1
_IDLE_SHARE = 0.25
_GRACE_S = 2.0
"""Reads that begin so long after an event may still be late because of it."""
_TRACKER_PORT = SERVER_PORT + 1
_IMAGE = "sample"
_LATE_S = 300.0
_SETTLED_S = 1.0
_IDLE_S = 3.0
_SEED = 7

Say = Callable[[str], None]
Read: TypeAlias = Sequence[float]
"""Of one reader: when it asked, and when it was answered."""


class Event(NamedTuple):
    """Something was away from `begin_s` to `end_s`; what is killed and comes back by itself, for no time."""

    begin_s: float
    end_s: float
    hit: Collection[int] = ()
    """Numbers of the readers whose own node it was."""


@dataclass(frozen=True)
class Load:
    """What is run beside each fault."""

    nodes: int
    rate: Rate
    seconds: float
    away_s: float
    """How long tracker, origin and half of the nodes are away."""

    def __post_init__(self) -> None:
        if self.nodes < 3:
            raise Usage("faults need 3 nodes or more: one that is hit, and two that go on")
        if not 0 < self.away_s <= self.seconds / 2:
            raise Usage("what is away must be back for as long again; choose more --seconds or a shorter --away")

    @property
    def size_bytes(self) -> int:
        return max(16, int(self.seconds * READS_S)) * READ_BYTES


@dataclass
class _Scene:
    """A cluster under load."""

    load: Load
    cluster: Cluster
    origin: Server
    tracker: Server
    readers: list[Node]
    idle: list[Node]
    """Members of the swarm that nobody reads on."""
    events: list[Event] = field(default_factory=list)


def bench_faults(faults: Iterable[Fault], load: Load, directory: Path | None, say: Say) -> dict[str, Any]:
    """Run the benchmark; returns `rows` and `machine`.

    Raises:
        NotPermitted (not root), Failure.
    """
    rows = []
    with tempfile.TemporaryDirectory(prefix="vmthunder-bench-", dir=directory) as work_name:
        work = Path(work_name)
        raw, origin = work / "disk.raw", work / "origin"
        raw.write_bytes(random.Random(1).randbytes(load.size_bytes))
        publish(raw, _IMAGE, origin, f"--chunk-size={READ_BYTES}")
        for fault in faults:
            with tempfile.TemporaryDirectory(dir=work) as scratch:
                row = _measure(fault, load, raw, origin, Path(scratch))
            rows.append(row)
            say(f"{fault}: {row['read_errors']} errors, {row['wrong_reads']} wrong, slowest read {row['max_s']:.2f} s")
    machine = facts() | {"nodes": load.nodes, "rate": load.rate.text, "seconds": load.seconds, "away_s": load.away_s}
    return {"rows": rows, "machine": machine}


def _measure(fault: Fault, load: Load, raw: Path, root: Path, work: Path) -> dict[str, Any]:
    cluster = Cluster.create(f"faults{os.getpid()}", load.nodes, load.rate)
    try:
        with ExitStack() as stack:
            origin = stack.enter_context(serving(cluster, root, work, "--no-p2p"))
            tracker = stack.enter_context(serving(cluster, root, work, port=_TRACKER_PORT))
            hosts = cluster.nodes
            bad = None
            if fault in _HOSTILE:
                # The first that comes forwards to the others for good.
                bad = stack.enter_context(_hostile(_HOSTILE[fault], cluster, tracker.url, root, work, load))
                hosts = hosts[1:]
            options = (f"--cluster-key={work / 'cluster.key'}", f"--tracker={tracker.url}", "--no-prefetch")
            nodes = [
                stack.enter_context(
                    starting_node(origin.url, work / host.name, 2 * load.size_bytes, *options, host=host)
                )
                for host in hosts
            ]
            for node in nodes:
                node.wait()
            idle = max(1, int(load.nodes * _IDLE_SHARE)) if fault is Fault.AGENTS else 0
            scene = _Scene(load, cluster, origin, tracker, nodes[idle:], nodes[:idle])
            for node in scene.idle:
                _join(node)
            before = cluster.origin.counters().sent_bytes
            reports = _read(scene, raw, _PLAYS.get(fault, _nothing))
            sent = cluster.origin.counters().sent_bytes - before
            statuses = [node.client.status() for node in nodes]
            row = _row(fault, scene, reports, statuses, sent, bad)
            return row | {"idle_core_share": _idle_core_share(nodes)} if fault is Fault.NONE else row
    finally:
        cluster.remove()


@contextmanager
def _hostile(how: How, cluster: Cluster, tracker: str, root: Path, work: Path, load: Load) -> Iterator[str]:
    """A hostile peer on the first node; gives its id."""
    log = work / "hostile.log"
    places = (tracker, str(work / "cluster.key"), str(root), _IMAGE)
    argv = (sys.executable, "-m", "vmthunder.bench.hostile", how, *places, str(load.rate.bytes_s * SLOW_SHARE))
    process = cluster.nodes[0].run(partial(Process, "hostile peer", argv, log))
    try:
        process.wait_until(lambda: "joined " in log.read_text(), _LATE_S)
        yield log.read_text().split()[-1]
    finally:
        process.stop()


def _idle_core_share(nodes: Sequence[Node]) -> float:
    """Of a core that an agent uses whose image is open and that nobody reads on, on average."""
    pids = [node.process.pid for node in nodes]
    time.sleep(_SETTLED_S)
    before_s, begin_s = cpu_s(pids), time.monotonic()
    time.sleep(_IDLE_S)
    return rounded((cpu_s(pids) - before_s) / (time.monotonic() - begin_s) / len(nodes))


def _join(node: Node) -> None:
    """Bring an idle node into the swarm by one read. In a child: what reads a mount must be killable."""
    path = node.client.resolve(_IMAGE)["path"]
    subprocess.run(["head", "--bytes=4096", path], stdout=subprocess.DEVNULL, timeout=_LATE_S, check=True)


def _read(scene: _Scene, raw: Path, play: "Callable[[_Scene], None]") -> list[dict[str, Any]]:
    """All readers' reports, with the fault played while they read."""
    readers: list[subprocess.Popen[str]] = []
    try:
        for node in scene.readers:
            path = node.client.resolve(_IMAGE)["path"]
            argv = [sys.executable, "-m", "vmthunder.bench.compared", path, str(raw), str(scene.load.seconds)]
            readers.append(subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        for reader in readers:
            if _stream(reader.stdout).readline() != "ready\n":
                raise Failure("a reader could not begin")
        for reader in readers:
            _stream(reader.stdin).write("go\n")
            _stream(reader.stdin).flush()
        play(scene)
        return [json.loads(reader.communicate(timeout=_LATE_S)[0]) for reader in readers]
    except subprocess.TimeoutExpired:
        raise Failure(f"a read was not answered within {_LATE_S:.0f} s of the fault") from None
    finally:
        for reader in readers:
            reader.kill()
            reader.wait()


def _stream(pipe: "IO[str] | None") -> "IO[str]":
    assert pipe is not None
    return pipe


# Faults


def _nothing(scene: _Scene) -> None:
    """Whoever is hostile is so from the start."""


def _kill_workers(scene: _Scene) -> None:
    count = max(1, round(_KILLED_SHARE * len(scene.readers)))
    rng = random.Random(_SEED)

    def kill() -> Collection[int]:
        hit = rng.sample(range(len(scene.readers)), count)
        for number in hit:
            scene.readers[number].wait()  # it may have been hit just now
            os.kill(scene.readers[number].client.status()["pid"], signal.SIGKILL)
        return hit

    _every_second(scene, kill)


def _kill_agents(scene: _Scene) -> None:
    rng = random.Random(_SEED)

    def kill() -> Collection[int]:
        node = rng.choice(scene.idle)
        node.kill_and_start()
        node.wait()
        _join(node)
        return ()

    _every_second(scene, kill)


def _every_second(scene: _Scene, kill: Callable[[], Collection[int]]) -> None:
    """`kill` says which readers' nodes were hit."""
    now_s = time.monotonic()
    end_s = now_s + scene.load.seconds - 0.5
    while now_s + 1 < end_s:
        time.sleep(max(0.0, now_s + 1 - time.monotonic()))
        now_s = time.monotonic()
        scene.events.append(Event(now_s, now_s, kill()))


def _away(scene: _Scene, begin: Callable[[], None], end: Callable[[], None]) -> None:
    """Away in the middle: before and after there is as much of the load."""
    time.sleep((scene.load.seconds - scene.load.away_s) / 2)
    begin_s = time.monotonic()
    begin()
    time.sleep(scene.load.away_s)
    end()
    scene.events.append(Event(begin_s, time.monotonic()))


def _without_tracker(scene: _Scene) -> None:
    _away(scene, scene.tracker.process.kill, scene.tracker.start)


def _without_origin(scene: _Scene) -> None:
    _away(scene, scene.origin.process.kill, scene.origin.start)


def _part(scene: _Scene) -> None:
    hosts = scene.cluster.nodes
    _away(scene, lambda: scene.cluster.part(hosts[len(hosts) // 2 :]), scene.cluster.heal)


_PLAYS: Final = {
    Fault.WORKERS: _kill_workers,
    Fault.AGENTS: _kill_agents,
    Fault.TRACKER: _without_tracker,
    Fault.ORIGIN: _without_origin,
    Fault.PARTED: _part,
}


# Figures


def _row(
    fault: Fault,
    scene: _Scene,
    reports: Sequence[dict[str, Any]],
    statuses: Sequence[dict[str, Any]],
    sent_bytes: int,
    bad: str | None,
) -> dict[str, Any]:
    took = sorted(end_s - begin_s for report in reports for begin_s, end_s in report["reads"])
    held_up, own = stalls(scene.events, [report["reads"] for report in reports])
    first = next((report["first"] for report in reports if report["first"]), None)
    row: dict[str, Any] = {
        "name": fault.value,
        "reads": len(took),
        "read_errors": sum(report["errors"] for report in reports),
        "wrong_reads": sum(report["wrong"] for report in reports),
        "first_failure": first,
        "median_s": rounded(median(took)),
        "p99_s": rounded(quantile(took, 0.99)),
        "max_s": rounded(took[-1]),
        "events": len(scene.events),
        "stall_p99_s": rounded(quantile(held_up, 0.99)) if held_up else None,
        "stall_max_s": rounded(held_up[-1]) if held_up else None,
        "own_stall_max_s": rounded(own[-1]) if own else None,
        "origin_over_unique": rounded(sent_bytes / scene.load.size_bytes),
    }
    peers = [status["swarm"]["peers"] for status in statuses]
    row["nodes_that_ban_it"] = sum(bad in each["banned"] for each in peers)
    row["nodes_that_leave_it_alone"] = sum(bad in each["left_alone"] for each in peers)
    row["honest_nodes_left_alone"] = len({node for each in peers for node in each["left_alone"]} - {bad})
    row["honest_nodes_banned"] = len({node for each in peers for node in each["banned"]} - {bad})
    return row


def stalls(events: Sequence[Event], readers: Sequence[Sequence[Read]]) -> tuple[list[float], list[float]]:
    """What each event cost each reader, in ascending order: those on other nodes, and those whose own node it was."""
    others: list[float] = []
    own: list[float] = []
    for number, reads in enumerate(readers):
        mine = [event for event in events if number in event.hit]
        own += (stall_s(event, reads) for event in mine)
        # A read that waits for its own node says nothing of what else happens meanwhile.
        rest = [read for read in reads if not any(_may_be_late(read, event) for event in mine)]
        others += (stall_s(event, rest) for event in events if number not in event.hit)
    return sorted(others), sorted(own)


def _may_be_late(read: Read, event: Event) -> bool:
    begin_s, end_s = read
    return begin_s < event.end_s + _GRACE_S and end_s > event.end_s


def stall_s(event: Event, reads: Iterable[Read]) -> float:
    """How long the slowest read that an event may have held up took, counted from the end of the event."""
    return max((read[1] - max(read[0], event.end_s) for read in reads if _may_be_late(read, event)), default=0.0)


def quantile(ordered: Sequence[float], share: float) -> float:
    """Of values in ascending order."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
