"""What a node's counters say of a span of time, across the deaths of the worker that counts; and spreads. [pure]"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

COUNTERS: Final = ("bytes_from_origin", "bytes_from_peers", "bytes_from_cache", "stalled_s")


class Ledger:
    """The growth of a node's counters since the first look at them."""

    def __init__(self) -> None:
        self._pid: int | None = None
        self._base = dict.fromkeys(COUNTERS, 0.0)
        self._last = dict.fromkeys(COUNTERS, 0.0)

    def look(self, counters: Mapping[str, Any]) -> None:
        """Take note of what a node says now: its worker's `pid`, and COUNTERS."""
        now = {key: counters[key] for key in COUNTERS}
        if self._pid is None:
            self._base = now
        elif self._pid != counters["pid"]:
            # A new worker counts from nothing.
            self._base = {key: self._base[key] - self._last[key] for key in COUNTERS}
        self._pid, self._last = counters["pid"], now

    def grown(self, counter: str) -> float:
        """By how much, as far as anybody has looked."""
        return self._last[counter] - self._base[counter]


def spread(values_s: Sequence[float]) -> dict[str, float] | None:
    """min, median, p99 (nearest rank) and max; None of nothing."""
    if not values_s:
        return None
    ordered = sorted(values_s)

    def rank(share: float) -> float:
        return ordered[math.ceil(share * len(ordered)) - 1]

    return {"min": ordered[0], "median": rank(0.5), "p99": rank(0.99), "max": ordered[-1]}
