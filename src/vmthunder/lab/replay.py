"""Plays a recorded boot against a file: same reads, same think times, same overlaps.

A few threads share one heap of reads that are due, under one lock; a thread that has read puts what waited for it on the
heap and goes on with what is due next, so a chain of single reads never changes threads.
"""

import heapq
import os
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmthunder.errors import Failure, NotFound, NotPermitted
from vmthunder.lab.trace import Step, think_times_s

THREADS: Final = 8
"""Guests had at most 4 reads under way at once."""


@dataclass(frozen=True)
class Replayed:
    """How a replay went."""

    total_s: float
    """From the begin to the completion of the last read: when the guest would have been ready."""
    stall_s: float
    """What it took longer than on a disk that answers at once."""
    latencies_s: tuple[float, ...]
    """Of each read, in the order of the trace."""
    read_bytes: int

    def latency_s(self, percent: float) -> float:
        """A percentile of the latencies."""
        ordered = sorted(self.latencies_s)
        return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))] if ordered else 0.0


class _Player:
    def __init__(self, fd: int, steps: Sequence[Step], think_scale: float) -> None:
        self._fd = fd
        self._steps = steps
        self._scale = think_scale
        self._waiting: dict[int, list[int]] = defaultdict(list)
        for number, step in enumerate(steps):
            self._waiting[step.after].append(number)
        self._changed = threading.Condition()
        self._due: list[tuple[float, int]] = []
        self._left = len(steps)
        self._failure: Exception | None = None
        self.latencies_s = [0.0] * len(steps)
        self.read_bytes = 0
        self.end_s = 0.0

    def play(self) -> float:
        """Replay all; returns the seconds it took."""
        begin_s = self.end_s = time.monotonic()
        self._release(-1, begin_s)
        threads = [threading.Thread(target=self._work, name="replay") for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._failure:
            raise self._failure
        return self.end_s - begin_s

    def _release(self, completed: int, now_s: float) -> None:
        for number in self._waiting.pop(completed, ()):
            heapq.heappush(self._due, (now_s + self._steps[number].think_s * self._scale, number))

    def _work(self) -> None:
        buffer = memoryview(bytearray(max((step.length_bytes for step in self._steps), default=0)))
        while (number := self._next()) is not None:
            step = self._steps[number]
            issue_s = time.monotonic()
            try:
                got = os.preadv(self._fd, [buffer[: step.length_bytes]], step.offset)
                if got != step.length_bytes:
                    raise Failure(
                        f"read of {step.length_bytes} bytes at {step.offset} gave {got}; is it the image traced?"
                    )
            except (OSError, Failure) as error:
                with self._changed:
                    self._failure = self._failure or error
                    self._changed.notify_all()
                return
            now_s = time.monotonic()
            with self._changed:
                self.latencies_s[number] = now_s - issue_s
                self.read_bytes += got
                self.end_s = max(self.end_s, now_s)
                self._left -= 1
                before = len(self._due)
                self._release(number, now_s)
                # This thread takes one of them itself.
                if self._left == 0:
                    self._changed.notify_all()
                else:
                    self._changed.notify(max(0, len(self._due) - before - 1))

    def _next(self) -> int | None:
        with self._changed:
            while self._left and not self._failure:
                if not self._due:
                    self._changed.wait()
                    continue
                wait_s = self._due[0][0] - time.monotonic()
                if wait_s <= 0:
                    number = heapq.heappop(self._due)[1]
                    if self._due:
                        self._changed.notify()
                    return number
                self._changed.wait(wait_s)
            return None


def replay(path: Path, steps: Sequence[Step], think_scale: float = 1.0) -> Replayed:
    """Replay `steps` against a file, with think times multiplied by `think_scale`.

    Raises:
        NotFound, NotPermitted: the file cannot be opened.
        Failure: it ends before a read of the trace does.
        OSError: a read failed.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise NotFound(f"no file {path} to replay against") from None
    except PermissionError:
        raise NotPermitted(f"{path} may not be read") from None
    try:
        # No advice to the kernel about read-ahead: QEMU gives none either.
        player = _Player(fd, steps, think_scale)
        total_s = player.play()
    finally:
        os.close(fd)
    stall_s = total_s - max(think_times_s(steps, think_scale), default=0.0)
    return Replayed(total_s, stall_s, tuple(player.latencies_s), player.read_bytes)
