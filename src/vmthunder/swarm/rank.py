"""Which source is asked next for a chunk, and when a second one is asked beside it. [pure]

Owns what this node has learned about its sources: how long they take, which are to be left alone for a while, which are
never to be asked again. Time is an argument (any clock that does not go back, in seconds). Knows nothing of links. No
threads; one owner.

A source is a node id, or None for the origin: always the last resort, never banned and never left alone.

A source that is crowded is not slow. Where the whole window of a reader waits for one source each answer takes long, but
the source sends one after another; who goes elsewhere makes the next crowd, in the end at the origin. So a source is judged by
its *turn*, the latency of an answer divided by the answers that it gave meanwhile. How long to wait for an answer is a
matter of latencies.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from itertools import chain
from typing import Final, TypeAlias

from vmthunder.ids import NodeId

Source: TypeAlias = NodeId | None

WINDOW: Final = 256
"""Answers that are remembered, of all sources together."""
ENOUGH: Final = 8
"""Answers that must be known before they count."""
HEDGE_SHARE: Final = 0.05
"""Of the bytes that were delivered, so many may be asked for a second time."""
HEDGE_BURST_BYTES: Final = 256 << 10
"""Saved up at most. Nothing is there from the start: nodes that boot together are slow together."""
HEDGE_LEAST_S: Final = 0.02
"""Less is the noise of a busy machine."""
HEDGE_UNKNOWN_S: Final = 0.5
"""Until something is known of any source."""
SLOW_FACTOR: Final = 5.0
"""A source whose median turn is so many times that of all is slow; an answer that takes so many medians is late."""
COOL_S: Final = 1.0
"""How long a source is left alone at first; twice as long each time, up to COOL_MOST_S."""
COOL_MOST_S: Final = 60.0
BUSY_MOST_S: Final = 5.0
"""A source cannot send us away for longer."""


class _Times:
    """Times in order of size."""

    __slots__ = ("_by_size",)

    def __init__(self) -> None:
        self._by_size: list[float] = []

    def __len__(self) -> int:
        return len(self._by_size)

    def add(self, time_s: float) -> None:
        insort(self._by_size, time_s)

    def remove(self, time_s: float) -> None:
        del self._by_size[bisect_left(self._by_size, time_s)]

    def quantile(self, share: float) -> float:
        return self._by_size[min(len(self._by_size) - 1, int(share * len(self._by_size)))]


class _Pace:
    """What is remembered of some answers: how long each took, and its turn."""

    __slots__ = ("latencies", "turns")

    def __init__(self) -> None:
        self.latencies = _Times()
        self.turns = _Times()

    def add(self, latency_s: float, turn_s: float) -> None:
        self.latencies.add(latency_s)
        self.turns.add(turn_s)

    def remove(self, latency_s: float, turn_s: float) -> None:
        self.latencies.remove(latency_s)
        self.turns.remove(turn_s)


class _Record:
    __slots__ = ("alone_until", "answers", "heard_s", "pace", "strikes")

    def __init__(self) -> None:
        self.answers = 0  # of all time
        self.heard_s = -float("inf")  # when the last one came
        self.pace = _Pace()
        self.alone_until = -float("inf")
        self.strikes = 0  # times in a row that it was left alone


class Ranking:
    """What is known about the sources of one swarm."""

    def __init__(self) -> None:
        self.hedges = 0
        """Times that a second source was asked beside the first."""
        self._records: dict[Source, _Record] = {}
        self._all = _Pace()
        # One window for all, so that every source is compared with what the others did at the same time. Were it the last
        # answers of each, one that was asked little after a burst would be judged by the burst, the others by the calm.
        self._window: deque[tuple[_Pace, float, float]] = deque()
        self._banned: set[NodeId] = set()
        self._hedge_bytes = 0.0

    @property
    def banned(self) -> frozenset[NodeId]:
        """Sources that sent a wrong byte; to be reported."""
        return frozenset(self._banned)

    @property
    def left_alone(self) -> dict[NodeId, int]:
        """Sources that failed, or were slow, when they were asked last → how many times in a row; to be reported."""
        return {
            source: record.strikes for source, record in self._records.items() if source is not None and record.strikes
        }

    def on_trial(self, source: Source) -> bool:
        """Whether a source failed, or was slow, and has not delivered enough since."""
        record = self._records.get(source)
        return record is not None and record.strikes > 0

    def usable(self, source: Source, now: float) -> bool:
        """Whether a source may be asked: neither banned nor to be left alone."""
        if source is None:
            return True
        record = self._records.get(source)
        return source not in self._banned and (record is None or record.alone_until <= now)

    def rank(self, ancestors: Sequence[NodeId], holders: Iterable[NodeId], now: float) -> list[Source]:
        """Whom to ask, in this order: ancestors from the parent up, other nodes known to hold the chunk, the origin."""
        found: dict[Source, None] = {}
        for source in chain(ancestors, holders, (None,)):
            if self.usable(source, now):
                found[source] = None
        return list(found)

    def hedge_after_s(self, source: Source) -> float:
        """How long to wait for a source before a second one is asked: its own p95, or what is slow for all."""
        record = self._records.get(source)
        waits = []
        if record is not None and len(record.pace.latencies) >= ENOUGH:
            waits.append(record.pace.latencies.quantile(0.95))
        if len(self._window) >= ENOUGH:
            waits.append(SLOW_FACTOR * self._all.latencies.quantile(0.5))
        return max(HEDGE_LEAST_S, min(waits, default=HEDGE_UNKNOWN_S))

    def may_hedge(self, size_bytes: int) -> bool:
        """Whether so many bytes may be asked for a second time; if so they are taken from what is allowed."""
        if self._hedge_bytes < size_bytes:
            return False
        self._hedge_bytes -= size_bytes
        return True

    def answers(self, source: Source) -> int:
        """Good chunks that a source has sent."""
        record = self._records.get(source)
        return 0 if record is None else record.answers

    def heard_s(self, source: Source) -> float:
        """When a source sent a good chunk last; long ago if never."""
        record = self._records.get(source)
        return -float("inf") if record is None else record.heard_s

    def silent_s(self) -> float:
        """How long a source that lives may say nothing to somebody who waits for it: twice what is slow for all."""
        return 2 * SLOW_FACTOR * self._all.turns.quantile(0.5) if len(self._window) >= ENOUGH else 2 * HEDGE_UNKNOWN_S

    def delivered(self, source: Source, size_bytes: int, latency_s: float, now: float, others: int = 0) -> None:
        """A source sent a good chunk, and `others` while this one was waited for. Who is slow is left alone for a while."""
        self._hedge_bytes = min(HEDGE_BURST_BYTES, self._hedge_bytes + HEDGE_SHARE * size_bytes)
        record = self._record(source)
        record.answers += 1
        record.heard_s = now
        turn_s = latency_s / (1 + others)
        self._remember(record.pace, latency_s, turn_s)
        if len(record.pace.turns) < ENOUGH:
            return
        # This answer too: nobody is slow on the strength of what a burst did to the ones before.
        slow_s = SLOW_FACTOR * self._all.turns.quantile(0.5)
        if source is not None and min(turn_s, record.pace.turns.quantile(0.5)) > slow_s:
            self._leave_alone(record, now)
        else:
            record.strikes = 0

    def failed(self, source: Source, now: float) -> None:
        """A source was lost, or silent for too long."""
        if source is not None:
            self._leave_alone(self._record(source), now)

    def busy(self, source: Source, retry_after_s: float, now: float) -> None:
        """A source has too much to do, and said until when."""
        if source is not None:
            record = self._record(source)
            record.alone_until = max(record.alone_until, now + min(retry_after_s, BUSY_MOST_S))

    def lied(self, source: NodeId) -> None:
        """A source sent a wrong byte: it is never asked again."""
        self._banned.add(source)
        self._records.pop(source, None)

    def retain(self, members: Collection[NodeId]) -> None:
        """Forget sources that are no longer in the swarm; who lied stays banned."""
        for source in [source for source in self._records if source is not None and source not in members]:
            del self._records[source]

    def _remember(self, pace: _Pace, latency_s: float, turn_s: float) -> None:
        if len(self._window) == WINDOW:
            whose, oldest_s, oldest_turn_s = self._window.popleft()
            whose.remove(oldest_s, oldest_turn_s)
            self._all.remove(oldest_s, oldest_turn_s)
        self._window.append((pace, latency_s, turn_s))
        pace.add(latency_s, turn_s)
        self._all.add(latency_s, turn_s)

    def _record(self, source: Source) -> _Record:
        record = self._records.get(source)
        if record is None:
            record = self._records[source] = _Record()
        return record

    def _leave_alone(self, record: _Record, now: float) -> None:
        if record.alone_until > now:
            return  # answers that were under way when it was left alone are no new strikes
        record.alone_until = now + min(COOL_MOST_S, COOL_S * 2.0**record.strikes)
        record.strikes = min(record.strikes + 1, 30)
        record.pace = _Pace()  # it is judged afresh when it is asked again
