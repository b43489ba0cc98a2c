"""A rate limit as a queue of times: pure, time is an argument (seconds of any clock that does not go back)."""

from typing import Final

BURST_S: Final = 0.05
"""What was not used for so long may be used at once: enough that a timer which fires late costs no rate."""


class RateLimit:
    """Bytes per second; 0 is no limit."""

    def __init__(self, bytes_s: float) -> None:
        self.bytes_s: Final = bytes_s
        self._free_at_s = -float("inf")

    def reserve(self, size_bytes: int, now_s: float) -> float:
        """Take a place in the queue for `size_bytes`; returns how many seconds to wait before they may go."""
        if not self.bytes_s:
            return 0.0
        self._free_at_s = max(self._free_at_s, now_s - BURST_S) + size_bytes / self.bytes_s
        return max(0.0, self._free_at_s - now_s)

    def backlog_s(self, now_s: float) -> float:
        """How long the queue is."""
        return max(0.0, self._free_at_s - now_s)
