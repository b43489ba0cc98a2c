"""Many boots that begin at the same moment, replayed or real; when each was ready.

A boot has two halves: `prepare` gets the disk to the node, whatever that takes, and gives the image; then the guest reads it.
Both count. One thread per node waits; nothing is decided here.
"""

import asyncio
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from vmthunder.bench.guest import GuestDisk
from vmthunder.errors import Failure
from vmthunder.vm.backing import BackingImage
from vmthunder.vm.boot import boot
from vmthunder.vm.machine import Machines
from vmthunder.vm.ready import ConsolePattern
from vmthunder.vm.spec import Driver, Spec

BOOT_S: Final = 900.0


@dataclass(frozen=True)
class Ready:
    """One guest that became ready."""

    ready_s: float
    """From the moment at which all began."""
    stall_s: float
    """What it waited for its disk."""
    player_cpu_s: float = 0.0
    """CPU time of what plays the guest; of a real one, which is no tool of ours, 0."""


Prepare = Callable[[], BackingImage]
"""Runs on a thread of its own. Raises Failure."""


class Guests(Protocol):
    """What boots."""

    def boot(self, prepares: Sequence[Prepare]) -> list[Ready]:
        """Boot one for each at once; returns when the last is ready, in the order of `prepares`. Raises Failure."""


@dataclass(frozen=True)
class Replayed:
    """A recorded boot, with think times multiplied by `think_scale`."""

    trace: Path
    think_scale: float

    def boot(self, prepares: Sequence[Prepare]) -> list[Ready]:
        """As `Guests`."""
        with _players(len(prepares), self.trace, self.think_scale) as players:

            def one(number: int, begin_s: float) -> Ready:
                player = players[number]
                image = prepares[number]()
                said = _ask(player, f"{image.path}\n")
                return Ready(said["end_s"] - begin_s, said["stall_s"], said["cpu_s"])

            return _together(len(prepares), one)


@dataclass(frozen=True)
class Real:
    """Guests of a driver, each on an overlay of its own. How long they wait for their disk is not known of them."""

    guest: GuestDisk
    driver: Driver

    def boot(self, prepares: Sequence[Prepare]) -> list[Ready]:
        """As `Guests`."""
        spec = Spec(driver=self.driver, memory_bytes=self.guest.memory_bytes)
        ready = ConsolePattern(self.guest.ready_pattern)
        with tempfile.TemporaryDirectory(prefix="vmthunder-") as scratch:
            machines = [Machines(Path(scratch, str(number))) for number in range(len(prepares))]

            def one(number: int, begin_s: float) -> Ready:
                image = prepares[number]()
                report = asyncio.run(boot(machines[number], None, image, spec, ready, timeout_s=BOOT_S))
                ready_s = time.monotonic() - begin_s
                machines[number].destroy(report.machine.name)
                return Ready(ready_s, 0.0)

            return _together(len(prepares), one)


def _together(count: int, one: Callable[[int, float], Ready]) -> list[Ready]:
    """`one(number, begin_s)` for all at once, with one begin."""
    begins_s: list[float] = []
    barrier = threading.Barrier(count, lambda: begins_s.append(time.monotonic()))

    def run(number: int) -> Ready:
        barrier.wait()
        return one(number, begins_s[0])

    with ThreadPoolExecutor(count, "boot") as pool:
        return [boot.result() for boot in [pool.submit(run, number) for number in range(count)]]


@contextmanager
def _players(count: int, trace: Path, think_scale: float) -> "Iterator[list[subprocess.Popen[str]]]":
    argv = [sys.executable, "-m", "vmthunder.bench.replayer", str(trace), str(think_scale)]
    players = [
        subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
        )
        for _ in range(count)
    ]
    try:
        for player in players:
            assert player.stdout  # it is a pipe
            if player.stdout.readline() != "loaded\n":
                raise _failure(player.communicate()[1])
        yield players
    finally:
        for player in players:
            player.kill()
            player.communicate()


def _ask(player: "subprocess.Popen[str]", line: str) -> dict[str, float]:
    """Have one replay. Raises Failure."""
    try:
        said, complaint = player.communicate(line, BOOT_S)
    except subprocess.TimeoutExpired:
        raise Failure(f"a replay was not done after {BOOT_S:.0f} s") from None
    if player.returncode:
        raise _failure(complaint)
    answer: dict[str, float] = json.loads(said)
    return answer


def _failure(complaint: str) -> Failure:
    lines = complaint.strip().splitlines()
    return Failure(lines[-1] if lines else "a replayer ended without a word")
