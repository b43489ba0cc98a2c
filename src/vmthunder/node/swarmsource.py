"""The swarm as a source: the parent of the chunk's stripe, whoever else may have it, and the origin as the last resort.

One chunk is asked of one source. A second source is asked beside it when the first is later than usual, within a budget of
extra bytes, and without regard to any budget when it seems to be dead. What a ranking learns is kept for all
swarms together: a slow node is slow whatever it is asked for. Belongs to the event loop.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, TypeAlias

from vmthunder.errors import OriginUnavailable, VMThunderError
from vmthunder.ids import Buffer, ImageId, NodeId
from vmthunder.image.manifest import ChunkRow, Manifest
from vmthunder.node.limits import RateLimit
from vmthunder.node.source import Delivery, OriginSource
from vmthunder.node.turns import Errand, pace
from vmthunder.peer.frames import Busy, LocalProtocolError, NotHere, Reason, Route
from vmthunder.peer.link import Link, LinkLost, Waiter
from vmthunder.peer.pool import Pool
from vmthunder.swarm.rank import Ranking, Source
from vmthunder.swarm.topology import stripe_of
from vmthunder.swarm.view import Roster

log = logging.getLogger(__name__)

GIVE_UP_S: Final = 0.8
"""A source that has not answered for so long, and twice as long as what is late, is taken for dead."""
GIVE_UP_BACKGROUND_S: Final = 5.0
"""The same where nobody waits: an honest peer answers those first for whom somebody does."""

Answer: TypeAlias = Buffer | NotHere | Busy


class SwarmSource:
    """Implements `vmthunder.node.source.ChunkSource`."""

    def __init__(
        self,
        node: NodeId,
        roster: Callable[[ImageId], Roster | None],
        pool: Pool,
        origin: OriginSource,
        download: RateLimit,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`roster` gives the last known view of the swarm of an image."""
        self.node: Final = node
        self.pool: Final = pool
        self.origin: Final = origin
        self.ranking: Final = Ranking()
        self.clock: Final = clock
        self.hedges = 0
        """Times that a second source was asked beside the first."""
        self._roster = roster
        self._download = download

    def runs(self, image: Manifest, rows: Iterable[ChunkRow]) -> list[list[ChunkRow]]:
        """Each chunk by itself, since neighbours come over different trees; alone, as the origin likes it."""
        if self._swarm(image) is None:
            return self.origin.runs(image, rows)
        return [[row] for row in rows]

    async def fetch(self, image: Manifest, run: Sequence[ChunkRow], errand: Errand) -> Sequence[Delivery]:
        """Raises OriginUnavailable: neither the origin nor any peer delivers."""
        await pace(self._download, sum(row.encoded_bytes for row in run), errand, self.clock)
        roster = self._swarm(image)
        if roster is None or len(run) > 1:
            return await self.origin.fetch(image, run, errand)
        return [await _Search(self, image, run[0], errand, roster).deliver()]

    def distrust(self, source: NodeId) -> None:
        """Never ask a node again."""
        log.error("peer sent wrong bytes and is not asked again: peer=%s", source.hex())
        self.ranking.lied(source)
        self.pool.drop(source, Reason.LIED)

    def _swarm(self, image: Manifest) -> Roster | None:
        """The view of a swarm that there is somebody else in."""
        roster = self._roster(image.image_id)
        if roster is None or self.node not in roster.topology or len(roster.topology) < 2:
            return None
        return roster


class _Search:
    """One chunk: whom to ask, who was asked, and since when."""

    def __init__(self, source: SwarmSource, image: Manifest, row: ChunkRow, errand: Errand, roster: Roster) -> None:
        stripe = stripe_of(row.chunk_id, roster.topology.stripes)
        ancestors = roster.topology.ancestors(source.node, stripe)
        self._source = source
        self._ranking = source.ranking
        self._image = image
        self._row = row
        self._errand = errand
        self._began_background = errand.background
        self._members = roster.members
        self._route = Route(image.image_id, roster.version.epoch, stripe, errand.hops, errand.priority)
        self._sent: list[tuple[Link, Waiter]] = []
        self._todo = deque(self._ranking.rank(ancestors, (), source.clock()))
        self._tried: set[Source] = set()
        self._asked: dict[asyncio.Future[Answer], tuple[Source, float]] = {}
        self._latest: tuple[Source, float] = None, 0.0
        self._why = "there is no source"

    async def deliver(self) -> Delivery:
        hurried: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._errand.when_hurried(lambda: self._hurry(hurried))
        try:
            while True:
                if not self._asked and not self._ask_next():
                    raise OriginUnavailable(f"no source delivers: {self._why}")
                events: set[asyncio.Future[Any]] = {*self._asked, hurried}
                if hurried.done():
                    events.remove(hurried)
                done, _ = await asyncio.wait(events, timeout=self._patience_s(), return_when=asyncio.FIRST_COMPLETED)
                if not done:
                    self._consider_another()
                for future in self._asked.keys() & done:
                    delivery = self._hear(future)
                    if delivery is not None:
                        return delivery
        finally:
            # Whoever was asked in vain is told so, and need not send.
            for future in self._asked:
                future.cancel()

    def _hurry(self, hurried: "asyncio.Future[None]") -> None:
        """Somebody waits from now on: whoever was asked is told, and may take as long as for any demand read."""
        for link, waiter in self._sent:
            link.hurry(waiter)
        self._latest = self._latest[0], self._source.clock()
        if not hurried.done():
            hurried.set_result(None)

    def _ask_next(self) -> bool:
        """Ask the best source that was not asked; False if there is none."""
        while self._todo:
            source = self._todo.popleft()
            if source in self._tried:
                continue
            self._tried.add(source)
            self._latest = source, self._source.clock()
            self._asked[self._ask(source)] = self._latest
            return True
        return False

    def _ask(self, source: Source) -> "asyncio.Future[Answer]":
        link = None if source is None else self._source.pool.get(source)
        if link is not None:
            try:
                return self._send(link)  # type: ignore[return-value]
            except (LinkLost, LocalProtocolError) as error:
                # Gone in this moment, or as many requests are unanswered as may be.
                failed: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
                failed.set_exception(error)
                return failed
        return asyncio.ensure_future(self._ask_origin() if source is None else self._ask_new(source))

    async def _ask_origin(self) -> Answer:
        (delivery,) = await self._source.origin.fetch(self._image, [self._row], self._errand)
        return delivery.data

    async def _ask_new(self, node: NodeId) -> Answer:
        member = self._members.get(node)
        if member is None:
            raise LinkLost(f"node {node.hex()} has left the swarm")
        return await self._send(await self._source.pool.reach(member))

    def _send(self, link: Link) -> Waiter:
        """Raises LinkLost, LocalProtocolError."""
        route = self._route._replace(priority=self._errand.priority)
        (waiter,) = link.get(route, [(self._row.chunk_id, self._row.encoded_bytes)])
        if self._errand.background:
            self._sent.append((link, waiter))
        return waiter

    def _patience_s(self) -> float | None:
        """How long to wait for an answer before something else is considered."""
        if not self._todo:
            return None
        source, since_s = self._latest
        late_s = self._dead_s(source) if self._errand.background else self._ranking.hedge_after_s(source)
        waited_s = self._source.clock() - since_s
        return max(0.0, (late_s if waited_s < late_s else self._dead_s(source)) - waited_s)

    def _dead_s(self, source: Source) -> float:
        if self._errand.background:
            return GIVE_UP_BACKGROUND_S
        return max(GIVE_UP_S, 2 * self._ranking.hedge_after_s(source))

    def _consider_another(self) -> None:
        source, since_s = self._latest
        now_s = self._source.clock()
        if now_s - since_s >= self._dead_s(source):
            self._ranking.failed(source, now_s)
            self._ask_next()
        elif not self._errand.background and self._ranking.may_hedge(self._row.encoded_bytes):
            self._source.hedges += 1
            self._ask_next()

    def _hear(self, future: "asyncio.Future[Answer]") -> Delivery | None:
        source, since_s = self._asked.pop(future)
        now_s = self._source.clock()
        error = future.exception()
        if error is not None:
            if not isinstance(error, VMThunderError | OSError):
                raise error
            self._why = str(error)
            self._ranking.failed(source, now_s)
            return None
        answer = future.result()
        if not isinstance(answer, NotHere | Busy):
            if not self._began_background:  # what may wait says nothing of how long a guest would
                self._ranking.delivered(source, len(answer), now_s - since_s, now_s)
            return Delivery(answer, source)
        if isinstance(answer, Busy):
            self._ranking.busy(source, answer.retry_after_s, now_s)
        hint = answer.hint
        if hint in self._members and hint != self._source.node and self._ranking.usable(hint, now_s):
            self._todo.appendleft(hint)
        return None
