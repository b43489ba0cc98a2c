"""How many bytes may be on their way here that nobody waits for. [pure]

LEDBAT's idea (RFC 6817): what stands in a queue somewhere shows as delay above the least that was seen, so the window grows
while there is little of it and shrinks where there is more, long before anything is lost; whoever does wait finds the queues
short. The queue may be a link's, a disk's or a busy processor's. Begins as TCP does, doubling each round trip until the
first sign of a queue. Time is an argument, in seconds of any clock that does not go back.
"""

from collections import deque
from typing import Final

LEAST_BYTES: Final = 64 << 10
"""Two or three encoded chunks: one on the wire and the next behind it, so that a link is never idle between them."""
MOST_BYTES: Final = 8 << 20
"""10 Gbit/s for 6 ms."""
FIRST_BYTES: Final = 128 << 10
TARGET_S: Final = 0.01
"""Delay that we may add."""
STEP_BYTES: Final = 64 << 10
"""A full window's answers move the window by so much at most."""
FILTER: Final = 4
"""The least of so many samples counts: a machine that was busy for a moment is no queue."""
SMOOTH: Final = 16
"""The rate is a running mean of about so many answers."""
BASE_AGE_S: Final = 60.0
"""Routes and neighbours change: the least delay is that of the last one or two such spans."""


class Window:
    """One window for all background reads of a node. One owner."""

    def __init__(self) -> None:
        self.limit_bytes: int = FIRST_BYTES
        self._begin = True
        self._rate_bytes_s = 0.0
        self._recent: deque[float] = deque(maxlen=FILTER)
        self._base_s = (float("inf"), float("inf"))  # of the span before, of this one
        self._span_until_s = -float("inf")
        self._cut_at_s = -float("inf")

    @property
    def beside_bytes(self) -> int:
        """The same while somebody waits: what arrives within TARGET_S, so that it costs him no more than that."""
        return min(self.limit_bytes, int(self._rate_bytes_s * TARGET_S))

    def arrived(self, size_bytes: int, delay_s: float, in_flight_bytes: int, now_s: float) -> None:
        """Bytes are here, so long after they were asked for; `in_flight_bytes` were under way, these among them."""
        if now_s >= self._span_until_s:
            self._base_s = self._base_s[1], float("inf")
            self._span_until_s = now_s + BASE_AGE_S
        self._base_s = self._base_s[0], min(self._base_s[1], delay_s)
        self._recent.append(delay_s)
        # So much was under way for so long: what goes in must come out.
        self._rate_bytes_s += (in_flight_bytes / max(delay_s, 1e-4) - self._rate_bytes_s) / SMOOTH
        queue_s = min(self._recent) - min(self._base_s)
        if queue_s > TARGET_S / 2:
            self._begin = False
        if queue_s > 4 * TARGET_S and now_s - self._cut_at_s > delay_s:
            self._cut_at_s = now_s
            self._set(self.limit_bytes // 2)
            return
        change = size_bytes if self._begin else (1 - queue_s / TARGET_S) * STEP_BYTES * size_bytes / self.limit_bytes
        # A window that is not filled says nothing of what a larger one would do.
        if change < 0 or in_flight_bytes >= self.limit_bytes // 2:
            self._set(self.limit_bytes + int(max(change, -size_bytes / 2)))

    def _set(self, limit_bytes: int) -> None:
        self.limit_bytes = min(max(limit_bytes, LEAST_BYTES), MOST_BYTES)
