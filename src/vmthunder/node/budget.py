"""How much of the host's memory prefetched chunks may take. Belongs to the event loop."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

LEAST_AVAILABLE: Final = 0.1
"""Of all memory: below that guests need it more."""
_LOOK_S: Final = 0.5


def memory_available() -> float:
    """The part of this host's memory that can be had without swapping; 0 to 1."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) / int(lines["MemTotal"].split()[0])


class PushBudget:
    """Bytes that may be pushed into the page cache for the images that are open."""

    def __init__(
        self,
        budget_bytes: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        available: Callable[[], float] = memory_available,
    ) -> None:
        self.used_bytes = 0
        self._budget_bytes = budget_bytes
        self._clock = clock
        self._available = available
        self._enough = True
        self._look_at_s = -float("inf")

    def take(self, size_bytes: int) -> bool:
        """Whether so many bytes more may be pushed; if so they are taken."""
        if self.used_bytes + size_bytes > self._budget_bytes:
            return False
        now_s = self._clock()
        if now_s >= self._look_at_s:
            self._look_at_s = now_s + _LOOK_S
            self._enough = self._available() >= LEAST_AVAILABLE
        if self._enough:
            self.used_bytes += size_bytes
        return self._enough

    def give_back(self, size_bytes: int) -> None:
        """The image was closed: its pages are the kernel's to drop."""
        self.used_bytes -= size_bytes
