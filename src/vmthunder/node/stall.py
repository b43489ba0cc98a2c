"""How long guests of this node were held up by us: time in which at least one of their reads waited. [pure]"""

from collections.abc import Callable
from types import TracebackType


class Stall:
    """A clock that runs while somebody is inside: `with stall: …`. One owner; no threads."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock` gives seconds."""
        self._clock = clock
        self._waiting = 0
        self._since_s = 0.0
        self._past_s = 0.0

    def __enter__(self) -> None:
        if not self._waiting:
            self._since_s = self._clock()
        self._waiting += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._waiting -= 1
        if not self._waiting:
            self._past_s += self._clock() - self._since_s

    @property
    def total_s(self) -> float:
        """Seconds until now."""
        return self._past_s + (self._clock() - self._since_s if self._waiting else 0.0)
