"""One cell of a table: one method, so many nodes, all of them cold, one boot on each at the same moment.

Owns the cluster and the processes of the cell: what a method starts through it is counted, and ended with it.
"""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Final, Protocol

from vmthunder.bench.boots import Guests, Prepare, Ready
from vmthunder.bench.processes import Process, cpu_s, finish
from vmthunder.lab.cluster import Cluster, Host
from vmthunder.lab.shaping import Rate
from vmthunder.vm.backing import BackingImage

_START_S = 60.0


class Cell:
    """Hosts, scratch directories, and processes."""

    def __init__(self, cluster: Cluster, work: Path, stack: ExitStack) -> None:
        self.cluster: Final = cluster
        self.work: Final = work
        self.stack: Final = stack
        """Ends with the cell."""
        self.short: Final = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vmthunder-")))
        """For unix sockets, whose paths must be short."""
        self.pids: list[int] = []
        """Processes whose CPU time is the method's; add what is not started with `start`."""
        self._finished_cpu_s: list[float] = []

    @property
    def nodes(self) -> list[Host]:
        return self.cluster.nodes

    @property
    def origin(self) -> Host:
        return self.cluster.origin

    def directory(self, host: Host) -> Path:
        """The disk of a host, empty at first."""
        path = self.work / host.name
        path.mkdir(exist_ok=True)
        return path

    def start(self, host: Host, argv: Sequence[str], ready: Callable[[Process], bool]) -> Process:
        """A process on a host, until the cell ends; returns when `ready`. Raises Failure. Any thread."""
        log = Path(tempfile.mkstemp(prefix=f"{Path(argv[0]).name}-", suffix=".log", dir=self.work)[1])
        process = host.run(partial(Process, f"{Path(argv[0]).name} on {host.name}", argv, log))
        self.stack.callback(process.stop)
        self.pids.append(process.pid)
        process.wait_until(lambda: ready(process), _START_S)
        return process

    def finish(self, host: Host, argv: Sequence[str], timeout_s: float) -> None:
        """A process on a host, to its end. Raises Failure. Any thread."""
        log = Path(tempfile.mkstemp(prefix=f"{Path(argv[0]).name}-", suffix=".log", dir=self.work)[1])
        label = f"{Path(argv[0]).name} on {host.name}"
        self._finished_cpu_s.append(host.run(partial(finish, label, argv, log, timeout_s)))

    def cpu_s(self) -> float:
        """CPU seconds of the method so far, on all hosts."""
        return cpu_s(self.pids) + sum(self._finished_cpu_s)

    def stored_bytes(self) -> float:
        """What a node has on its disk, in the median."""
        return median(sum(_allocated(self.work / host.name)) for host in self.nodes)


@dataclass(frozen=True)
class Setup:
    """A method that waits for the boots to begin."""

    prepares: Sequence[Prepare]
    """One for each node."""
    figures: Callable[[], dict[str, float]] = dict
    """What only this method knows; asked when all guests are ready."""


class Method(Protocol):
    """A way to have the disk on the nodes."""

    @property
    def name(self) -> str: ...

    def absent(self) -> str | None:
        """Why this machine cannot do it; None if it can."""

    def publish(self, disk: Path, work: Path) -> None:
        """What an operator does once, before any node boots; not measured. `work` stays the same for all cells."""

    def set_up(self, cell: Cell) -> Setup:
        """Start what serves and what waits on the nodes. Raises Failure."""


def measure(method: Method, guests: Guests, nodes: int, rate: Rate, directory: Path) -> dict[str, float]:
    """Boot all at once, after `method.publish`. Raises Failure."""
    cluster = Cluster.create(f"bench{os.getpid()}", nodes, rate)
    try:
        with tempfile.TemporaryDirectory(dir=directory) as work, ExitStack() as stack:
            cell = Cell(cluster, Path(work), stack)
            setup = method.set_up(cell)
            sent_bytes, used_s = cluster.origin.counters().sent_bytes, cell.cpu_s()
            boots = guests.boot(setup.prepares)
            used_s = cell.cpu_s() - used_s
            sent_bytes = cluster.origin.counters().sent_bytes - sent_bytes
            found = {"origin_sent_bytes": float(sent_bytes), "cpu_s": used_s, "stored_bytes": cell.stored_bytes()}
            return _times(boots) | found | setup.figures()
    finally:
        cluster.remove()


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


def _allocated(directory: Path) -> Iterator[int]:
    """Bytes of each file below, on the file system of `directory` only."""
    if not directory.is_dir():
        return
    device = directory.stat().st_dev
    for entry in os.scandir(directory):
        try:
            found = entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            continue  # a scratch file that was renamed meanwhile
        if found.st_dev != device:
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _allocated(Path(entry.path))
        else:
            yield found.st_blocks * 512


def as_image(path: Path) -> BackingImage:
    """A file as what a guest boots from."""
    return BackingImage("guest", "", path, path.stat().st_size)
