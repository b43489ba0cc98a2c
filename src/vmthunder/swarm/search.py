"""The search for one chunk: who is asked, when somebody else is, and when a source is taken for dead. [pure]

Events in, instructions out: whoever sends the questions (`node/swarmsource.py`, and the simulator) says what came of
them, and is told whom to ask. Time is an argument, of the clock that the `Ranking` is used with. One owner; no threads.
"""

from collections import deque
from collections.abc import Container, Sequence
from typing import Final, NamedTuple

from vmthunder.ids import NodeId
from vmthunder.swarm.rank import Ranking, Source

GIVE_UP_S: Final = 0.8
"""A source that has been silent for so long, and for `Ranking.silent_s`, is taken for dead. One that sends other chunks
meanwhile is not: each reader that turns away from a crowd makes the next one."""
GIVE_UP_TRIAL_S: Final = 0.2
"""The same for a source that failed when it was asked last: readers that try it again must not wait as long again."""
GIVE_UP_FORGOTTEN_S: Final = 5.0
"""The same for one that is not silent: it has forgotten the question if it takes so long, and twice as long as what is late."""
GIVE_UP_BACKGROUND_S: Final = 5.0
"""The same where nobody waits: an honest peer answers those first for whom somebody does."""
_ROUNDING_S: Final = 1e-6
"""Who waits for just as long as `patience_s` says must not be told to wait on for what was lost in rounding."""


class Ask(NamedTuple):
    """An instruction: ask this source too."""

    source: Source


class _Question(NamedTuple):
    at_s: float
    answers: int
    """That the source had given before."""


class Search:
    """Whom to ask for a chunk, who was asked, and since when."""

    __slots__ = ("_asked", "_background", "_began_background", "_latest", "_members", "_ranking", "_since", "_todo")

    def __init__(
        self,
        ranking: Ranking,
        ancestors: Sequence[NodeId],
        members: Container[NodeId | None],
        now: float,
        *,
        background: bool = False,
    ) -> None:
        """Only `members` may be hinted at. `background`: nobody waits, until `hurried`."""
        self._ranking = ranking
        self._members = members
        self._background = self._began_background = background
        self._todo = deque(ranking.rank(ancestors, (), now))
        self._asked: dict[Source, _Question] = {}  # everybody who was
        self._latest: Source = None
        self._since = now

    def ask_next(self, now: float) -> Ask | None:
        """The best source that was not asked; None if there is none."""
        while self._todo:
            source = self._todo.popleft()
            if source not in self._asked:
                self._asked[source] = _Question(now, self._ranking.answers(source))
                self._since = now
                self._latest = source
                return Ask(source)
        return None

    def patience_s(self, now: float) -> float | None:
        """How long to wait for an answer before `late`; None: for as long as it takes, there is nobody else."""
        if not self._todo:
            return None
        next_s = self._dead_at_s()
        late_s = self._since + self._ranking.hedge_after_s(self._latest)
        if not self._background and now < late_s - _ROUNDING_S:
            next_s = min(next_s, late_s)
        return max(0.0, next_s - now)

    def late(self, now: float, size_bytes: int) -> Ask | None:
        """No answer in time: the latest source is dead, or a second one is asked beside it if so many bytes may be.

        Never the origin: nodes that are late are late together, and each would take a copy that it sends only once.
        """
        if now >= self._dead_at_s() - _ROUNDING_S:
            self._ranking.failed(self._latest, now)
        elif self._background or self._todo[0] is None or not self._ranking.may_hedge(size_bytes):
            return None
        else:
            self._ranking.hedges += 1
        return self.ask_next(now)

    def hurried(self, now: float) -> None:
        """Somebody waits from now on: whoever was asked may take as long as for any demand read."""
        self._background = False
        self._since = now

    def delivered(self, source: Source, size_bytes: int, now: float) -> None:
        """It came from this source."""
        if not self._began_background:  # what may wait says nothing of how long a guest would
            asked = self._asked[source]
            others = max(0, self._ranking.answers(source) - asked.answers)
            self._ranking.delivered(source, size_bytes, now - asked.at_s, now, others)

    def failed(self, source: Source, now: float) -> None:
        """A source was lost."""
        self._ranking.failed(source, now)

    def refused(self, hint: NodeId | None, now: float) -> None:
        """A source has not got it, or is busy, and perhaps said who has."""
        if hint in self._members and self._ranking.usable(hint, now):
            self._todo.appendleft(hint)

    def _dead_at_s(self) -> float:
        """When the latest source is taken for dead, if it says nothing until then."""
        if self._background:
            return self._since + GIVE_UP_BACKGROUND_S
        least_s = GIVE_UP_TRIAL_S if self._ranking.on_trial(self._latest) else GIVE_UP_S
        silent_s = max(self._since, self._ranking.heard_s(self._latest)) + max(least_s, self._ranking.silent_s())
        forgotten_s = max(GIVE_UP_FORGOTTEN_S, 2 * self._ranking.hedge_after_s(self._latest))
        return min(silent_s, self._since + forgotten_s)
