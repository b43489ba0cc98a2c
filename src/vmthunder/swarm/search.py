"""The search for one chunk: who is asked, when somebody else is, and when a source is taken for dead. [pure]

Events in, instructions out: whoever sends the questions (`node/swarmsource.py`, and the simulator) says what came of
them, and is told whom to ask. Time is an argument, the clock of the `Ranking`. One owner; no threads.
"""

from collections import deque
from collections.abc import Container, Sequence
from typing import Final, NamedTuple

from vmthunder.ids import NodeId
from vmthunder.swarm.rank import Ranking, Source

GIVE_UP_S: Final = 0.8
"""A source that has not answered for so long, and twice as long as what is late, is taken for dead."""


class Ask(NamedTuple):
    """An instruction: ask this source too."""

    source: Source


class Search:
    """Whom to ask for a chunk, who was asked, and since when."""

    __slots__ = ("_asked", "_candidates", "_latest", "_ranking", "_size_bytes", "_todo")

    def __init__(
        self,
        ranking: Ranking,
        ancestors: Sequence[NodeId],
        candidates: Container[NodeId | None],
        size_bytes: int,
        now: float,
    ) -> None:
        """Begin with the parent. `candidates` are the members of the swarm, who may be hinted at."""
        self._ranking = ranking
        self._candidates = candidates
        self._size_bytes = size_bytes
        self._todo = deque(ranking.rank(ancestors, (), now))
        self._asked: dict[Source, float] = {}  # everybody who was, with the time
        self._latest: Source = None

    def ask_next(self, now: float) -> Ask | None:
        """The best source that was not asked; None if there is none."""
        while self._todo:
            source = self._todo.popleft()
            if source not in self._asked:
                self._asked[source] = now
                self._latest = source
                return Ask(source)
        return None

    def patience_s(self, now: float) -> float | None:
        """How long to wait for an answer before `late`; None: for as long as it takes, there is nobody else."""
        if not self._todo:
            return None
        late_s = self._ranking.hedge_after_s(self._latest)
        waited_s = now - self._asked[self._latest]
        return max(0.0, (late_s if waited_s < late_s else max(GIVE_UP_S, 2 * late_s)) - waited_s)

    def late(self, now: float) -> Ask | None:
        """No answer in time: the latest source is dead, or a second one is asked beside it if that is allowed."""
        late_s = self._ranking.hedge_after_s(self._latest)
        if now - self._asked[self._latest] >= max(GIVE_UP_S, 2 * late_s):
            self._ranking.failed(self._latest, now)
        elif not self._ranking.may_hedge(self._size_bytes):
            return None
        else:
            self._ranking.hedges += 1
        return self.ask_next(now)

    def delivered(self, source: Source, now: float) -> None:
        """It came from this source."""
        self._ranking.delivered(source, self._size_bytes, now - self._asked[source], now)

    def failed(self, source: Source, now: float) -> None:
        """A source was lost."""
        self._ranking.failed(source, now)

    def refused(self, hint: NodeId | None, now: float) -> None:
        """A source said that it has not got it, or is busy; and perhaps who has."""
        if hint in self._candidates and self._ranking.usable(hint, now):
            self._todo.appendleft(hint)
