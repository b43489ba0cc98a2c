"""The swarm as a source: the parent of the chunk's stripe, whoever else may have it, and the origin as the last resort.

One chunk is asked of one source. A second source is asked beside it when the first is later than usual, within a budget of
extra bytes, and without regard to any budget when it seems to be dead. What a ranking learns is kept for all
swarms together: a slow node is slow whatever it is asked for. Belongs to the event loop.
"""

import asyncio
import logging
import time
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
from vmthunder.swarm.search import Ask, Search
from vmthunder.swarm.view import Roster

log = logging.getLogger(__name__)

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
        return [await _Asking(self, image, run[0], errand, roster).deliver()]

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


class _Asking:
    """One chunk: the questions that are out."""

    def __init__(self, source: SwarmSource, image: Manifest, row: ChunkRow, errand: Errand, roster: Roster) -> None:
        # By the first row of the chunk: all nodes must agree on the stripe of one that is in the image several times.
        stripe = (image.number(row.chunk_id) or 0) % roster.topology.stripes
        ancestors = roster.topology.ancestors(source.node, stripe)
        self._source = source
        self._image = image
        self._row = row
        self._errand = errand
        self._members = roster.members
        self._route = Route(image.image_id, roster.version.epoch, stripe, errand.hops, errand.priority)
        self._sent: list[tuple[Link, Waiter]] = []
        self._search = Search(source.ranking, ancestors, roster.members, source.clock(), background=errand.background)
        self._asked: dict[asyncio.Future[Answer], Source] = {}
        self._why = "there is no source"

    async def deliver(self) -> Delivery:
        hurried: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._errand.when_hurried(lambda: self._hurry(hurried))
        try:
            while True:
                if not self._asked and not self._ask(self._search.ask_next(self._source.clock())):
                    raise OriginUnavailable(f"no source delivers: {self._why}")
                events: set[asyncio.Future[Any]] = {*self._asked, hurried}
                if hurried.done():
                    events.remove(hurried)
                patience_s = self._search.patience_s(self._source.clock())
                done, _ = await asyncio.wait(events, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
                if not done:
                    self._ask(self._search.late(self._source.clock(), self._row.encoded_bytes))
                for future in self._asked.keys() & done:
                    delivery = self._hear(future)
                    if delivery is not None:
                        return delivery
        finally:
            # Whoever was asked in vain is told so, and need not send.
            for future in self._asked:
                future.cancel()

    def _hurry(self, hurried: "asyncio.Future[None]") -> None:
        """Somebody waits from now on: whoever was asked is told."""
        for link, waiter in self._sent:
            link.hurry(waiter)
        self._search.hurried(self._source.clock())
        if not hurried.done():
            hurried.set_result(None)

    def _ask(self, ask: Ask | None) -> bool:
        if ask is not None:
            self._asked[self._question(ask.source)] = ask.source
        return ask is not None

    def _question(self, source: Source) -> "asyncio.Future[Answer]":
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

    def _hear(self, future: "asyncio.Future[Answer]") -> Delivery | None:
        source = self._asked.pop(future)
        now_s = self._source.clock()
        error = future.exception()
        if error is not None:
            if not isinstance(error, VMThunderError | OSError):
                raise error
            self._why = str(error)
            self._search.failed(source, now_s)
            return None
        answer = future.result()
        if not isinstance(answer, NotHere | Busy):
            self._search.delivered(source, len(answer), now_s)
            return Delivery(answer, source)
        if isinstance(answer, Busy):
            self._source.ranking.busy(source, answer.retry_after_s, now_s)
        self._search.refused(None if answer.hint == self._source.node else answer.hint, now_s)
        return None
