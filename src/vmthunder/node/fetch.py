"""The way of a chunk to whoever reads it: decoded already? in flight? in the chunk cache? from a source.

Owns the chunks in flight. One flight per chunk however many readers; a flight belongs to the fetcher, so a reader
that goes away leaves it alone. Every chunk is verified before it is shown or stored. An origin that is away, lacks a
pack or sends wrong bytes costs time only: the flight stays and tries again for ever.

Threads: everything here belongs to the event loop. Between two awaits it is alone; a chunk is entered in `_flights`
before the first of them and leaves when it is stored, so that whoever comes at any time finds it decoded, in flight
or in the cache.
"""

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from operator import attrgetter

from vmthunder.errors import CorruptChunk, OriginUnavailable, VMThunderError
from vmthunder.ids import Buffer, ChunkId, NodeId
from vmthunder.image.manifest import ChunkRow, Manifest
from vmthunder.node.backoff import delay_s
from vmthunder.node.cache import ChunkCache, Encoded
from vmthunder.node.decoded import DecodedChunks, Want
from vmthunder.node.flight import Flight, Outcome, load, slice_of, unpack, want_of
from vmthunder.node.source import ChunkSource, Delivery
from vmthunder.node.storer import Storer
from vmthunder.node.turns import Errand
from vmthunder.peer.frames import Priority

logger = logging.getLogger(__name__)

LOADERS = 4
"""Threads that load, verify and decode what must be waited for."""
ALONE_CHUNKS = 3
"""Chunks that the loop's thread decodes without its helper: waking another thread costs as much as decoding a chunk."""
SLOW_S = 1.0
"""A flight that is as old as this is shown as one that somebody waits for."""
_WRONG_BYTES = "the origin sends wrong bytes"


@dataclass(slots=True)
class FetchStats:
    """Counters, under the names that `vmthunder status` gives them."""

    chunks_fetched: int = 0
    bytes_fetched: int = 0
    """Encoded bytes from sources."""
    chunks_from_cache: int = 0
    bytes_from_cache: int = 0
    """Encoded bytes from the chunk cache."""
    chunks_decoded: int = 0
    bytes_from_origin: int = 0
    bytes_from_peers: int = 0
    hurried: int = 0
    """Background flights that a reader, here or on another node, began to wait for."""
    wrong_bytes: int = 0
    """Chunks from a source that were not what was asked for."""

    def count(self, delivery: Delivery) -> None:
        """Something arrived."""
        size_bytes = len(delivery.data)
        self.bytes_fetched += size_bytes
        if delivery.source is None:
            self.bytes_from_origin += size_bytes
        else:
            self.bytes_from_peers += size_bytes


class Fetcher:
    """Slices of images, wherever their chunks are."""

    def __init__(
        self,
        source: ChunkSource,
        cache: ChunkCache,
        decoded: DecodedChunks,
        *,
        clock: Callable[[], float] = time.monotonic,
        rng: Callable[[], float] = random.random,
    ) -> None:
        """Needs a running event loop. `clock` gives seconds, `rng` numbers in [0, 1)."""
        self.stats = FetchStats()
        self.urgent = 0
        """Flights from a source that somebody waits for now."""
        self._source = source
        self._cache = cache
        self._decoded = decoded
        self._clock = clock
        self._rng = rng
        self._loop = asyncio.get_running_loop()
        self._helper = ThreadPoolExecutor(1, "decode")
        self._loaders = ThreadPoolExecutor(LOADERS, "load")
        self._storer = Storer(cache)
        self._flights: dict[Want, Flight] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._away_since_s: float | None = None
        self._answered = asyncio.Event()
        """Set and cleared when a source answers after failures: those who wait for their next try need not."""

    async def close(self) -> None:
        """End all flights; their readers are cancelled. Chunks that were being stored are stored."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for pool in (self._helper, self._loaders):
            await asyncio.to_thread(pool.shutdown)
        await self._storer.close()

    def read_now(self, image: Manifest, rows: Sequence[ChunkRow]) -> list[Buffer] | None:
        """The slices of `rows`, if nothing must be waited for; else None, and `read` has them.

        Chunks whose files are in the page cache are decoded here.

        Raises:
            CorruptChunk: what was published cannot be decoded.
        """
        wants = [want_of(image, row) for row in rows]
        missing = {want: row for want, row in zip(wants, rows, strict=True) if want not in self._decoded}
        if not missing:
            return [self._recall(want) for want in wants]
        if any(want in self._flights or want[0] not in self._cache for want in missing):
            return None
        outcomes = self._load_now(image, missing.values())
        slices = None
        if len(outcomes) == len(missing):  # asked before what was loaded may push it out
            slices = [slice_of(outcomes[want]) if want in outcomes else self._recall(want) for want in wants]
        self._loaded(image, missing.values(), outcomes)
        return slices

    async def read(self, image: Manifest, rows: Sequence[ChunkRow]) -> list[Buffer]:
        """The slices of `rows`, in their order, however long it takes.

        Raises:
            CorruptChunk: what was published cannot be decoded.
        """
        wants = [want_of(image, row) for row in rows]
        outcomes: dict[Want, Outcome] = {}
        while True:
            waiting: set[Flight] = set()
            missing: dict[Want, ChunkRow] = {}
            for want, row in zip(wants, rows, strict=True):
                if want in outcomes:
                    continue
                if want in self._decoded:
                    outcomes[want] = self._recall(want)
                elif (flight := self._flights.get(want)) is not None:
                    flight.errand.hurry()
                    waiting.add(flight)
                else:
                    missing[want] = row
            waiting.update(self._start(image, missing.values()))
            if not waiting:
                return [slice_of(outcomes[want]) for want in wants]
            # `wait` leaves the futures alone: a reader that is cancelled here must not cancel what others wait for.
            await asyncio.wait([flight.landed for flight in waiting])
            for flight in waiting:
                flight.landed.result()
                outcomes.update(flight.outcomes)

    def bring(self, image: Manifest, rows: Iterable[ChunkRow]) -> list[Flight]:
        """Flights that nobody waits for yet, for those of `rows` that are neither here nor in flight."""
        missing = {want_of(image, row): row for row in rows if not self.is_near(image, row)}
        return self._start(image, missing.values(), Errand(priority=Priority.BACKGROUND))

    def is_near(self, image: Manifest, row: ChunkRow) -> bool:
        """Whether a chunk is here already, or on its way."""
        want = want_of(image, row)
        return row.chunk_id in self._cache or want in self._decoded or want in self._flights

    def encoded_now(self, chunk_id: ChunkId) -> Buffer | None:
        """A chunk's encoded bytes for a peer, if nothing must be waited for."""
        data = self._cache.load(chunk_id, wait=False)
        # Of its own: what the cache gives is valid until the next load only.
        return None if data is None else bytes(data)

    async def encoded(self, image: Manifest, row: ChunkRow, errand: Errand) -> Buffer:
        """A chunk's encoded bytes for a peer: from the cache, or in the flight that brings it here, or in one more."""
        want = want_of(image, row)
        while True:
            flight = self._flights.get(want)
            if flight is None and row.chunk_id in self._cache:
                copy = await self._loop.run_in_executor(self._loaders, self._copy, row.chunk_id)
                if copy is not None:
                    return copy
                flight = self._flights.get(want)
            if flight is None:
                (flight,) = self._start(image, [row], errand)
            elif not errand.background:
                flight.errand.hurry()
            if not flight.landed.done():
                await asyncio.wait([flight.landed])
            flight.landed.result()
            data = flight.encoded.get(row.chunk_id)
            if data is not None:
                return data
            # It came out of the cache, or with wrong bytes: let it leave, and look again.
            await asyncio.sleep(0)

    def _copy(self, chunk_id: ChunkId) -> bytes | None:
        data = self._cache.load(chunk_id)
        return None if data is None else bytes(data)

    def waiting(self) -> list[dict[str, object]]:
        """Flights that take long, and why; the oldest first."""
        now_s = self._clock()
        return [
            {
                "image": flight.image.image_id.hex(),
                "chunk": flight.rows[0].index,
                "chunks": len(flight.rows),
                "since_s": round(now_s - flight.since_s, 3),
                "why": flight.why,
                "failures": flight.failures,
            }
            for flight in sorted(set(self._flights.values()), key=attrgetter("since_s"))
            if not flight.landed.done()
            and not flight.errand.background
            and (flight.failures or now_s - flight.since_s >= SLOW_S)
        ]

    def _load_now(self, image: Manifest, rows: Collection[ChunkRow]) -> dict[Want, Outcome]:
        """Chunks whose files are in the page cache, decoded by the loop's thread and its helper side by side.

        The loop stops for less than the time of one chunk until the helper is done, which costs less than a flight, and
        two threads that decode hand the interpreter's lock to each other less often than three.
        """
        todo = deque(rows)
        if len(todo) <= ALONE_CHUNKS:
            return load(self._cache, image, todo, wait=False)
        help_ = self._helper.submit(load, self._cache, image, todo, wait=False)
        outcomes = load(self._cache, image, todo, wait=False)
        if not help_.cancel():  # it has begun
            outcomes.update(help_.result())
        return outcomes

    def _recall(self, want: Want) -> Buffer:
        self._cache.touch(want[0])
        return self._decoded[want]

    def _start(self, image: Manifest, rows: Iterable[ChunkRow], errand: Errand | None = None) -> list[Flight]:
        """Flights for chunks that are neither decoded nor in flight, each on the nearest way and for such an errand."""
        errand = errand or Errand()
        here: list[ChunkRow] = []
        away: list[ChunkRow] = []
        for row in rows:
            (here if row.chunk_id in self._cache else away).append(row)
        flights: list[Flight] = []
        if here:
            flights.append(flight := self._enter(image, here))
            self._launch(flight, self._load(flight))
        for run in self._source.runs(image, away):
            flights.append(flight := self._enter(image, run, Errand(errand.hops, errand.priority)))
            self._launch(flight, self._fetch(flight))
        return flights

    def _enter(self, image: Manifest, rows: Sequence[ChunkRow], errand: Errand | None = None) -> Flight:
        flight = Flight(image, rows, self._loop.create_future(), self._clock(), errand=errand or Errand())
        self._flights.update(dict.fromkeys(flight.wants(), flight))
        return flight

    def _launch(self, flight: Flight, way: Coroutine[None, None, None]) -> None:
        task = self._loop.create_task(way)
        self._tasks.add(task)
        task.add_done_callback(lambda task: self._ended(flight, task))

    def _leave(self, flight: Flight) -> None:
        for want in flight.wants():
            if self._flights.get(want) is flight:
                del self._flights[want]

    def _land(self, flight: Flight, outcomes: Mapping[Want, Outcome]) -> None:
        """Show what arrived to whoever waits, and to those who come before the flight leaves."""
        flight.outcomes = outcomes
        flight.landed.set_result(None)

    def _remember(self, outcomes: Mapping[Want, Outcome]) -> None:
        self.stats.chunks_decoded += len(outcomes)
        for want, outcome in outcomes.items():
            if not isinstance(outcome, CorruptChunk):
                self._decoded.put(want, outcome)

    def _ended(self, flight: Flight, task: "asyncio.Task[None]") -> None:
        """The flight is over; tell whoever still waits if it went wrong."""
        self._tasks.discard(task)
        self._leave(flight)
        if task.cancelled():
            flight.landed.cancel()
        elif (error := task.exception()) is not None:
            logger.critical(
                "flight failed: image=%s chunk=%d",
                flight.image.image_id.hex(),
                flight.rows[0].index,
                exc_info=error,
            )
            if not flight.landed.done():
                flight.landed.set_exception(error)
                flight.landed.exception()  # marks it as seen: the last reader may have left

    async def _load(self, flight: Flight) -> None:
        """From the chunk cache, on several threads: a disk reads several files at a time.

        Readers look elsewhere for what turns out not to be there.
        """
        todo = deque(flight.rows)
        jobs = [
            self._loop.run_in_executor(self._loaders, load, self._cache, flight.image, todo)
            for _ in range(min(LOADERS, len(todo)))
        ]
        outcomes: dict[Want, Outcome] = {}
        for job in jobs:
            outcomes.update(await job)
        self._loaded(flight.image, flight.rows, outcomes)
        self._land(flight, outcomes)

    def _loaded(self, image: Manifest, rows: Iterable[ChunkRow], outcomes: Mapping[Want, Outcome]) -> None:
        for row in rows:
            if want_of(image, row) in outcomes:
                self.stats.chunks_from_cache += 1
                self.stats.bytes_from_cache += row.encoded_bytes
        self._remember(outcomes)

    async def _fetch(self, flight: Flight) -> None:
        """From the source: try until every chunk is here, and store them."""
        if flight.errand.background:
            flight.errand.when_hurried(lambda: self._hurried(flight))
        else:
            self._urge(flight)
        while True:
            if flight.failures:
                await self._pause(flight.failures)
            await self._storer.room.wait()
            asked_s = self._clock()
            try:
                deliveries = await self._source.fetch(flight.image, flight.rows, flight.errand)
            except (VMThunderError, OSError) as error:
                self._failed(flight, error)
                continue
            break
        self._recovered(asked_s)
        if len(deliveries) <= ALONE_CHUNKS:
            outcomes = unpack(flight.image, flight.rows, deliveries)
        else:
            outcomes = await self._loop.run_in_executor(self._loaders, unpack, flight.image, flight.rows, deliveries)
        right: list[Encoded] = []
        for row, delivery in zip(flight.rows, deliveries, strict=True):
            if want_of(flight.image, row) in outcomes:
                right.append((row.chunk_id, delivery.data))
            else:
                self._distrust(flight, row, delivery.source)
            self.stats.count(delivery)
        self.stats.chunks_fetched += len(right)
        flight.encoded = dict(right)
        self._remember(outcomes)
        self._land(flight, outcomes)
        await self._storer.store(right)

    def _hurried(self, flight: Flight) -> None:
        flight.since_s = self._clock()
        if not flight.landed.done():
            self.stats.hurried += 1
            self._urge(flight)

    def _urge(self, flight: Flight) -> None:
        self.urgent += 1
        flight.landed.add_done_callback(self._calm)

    def _calm(self, _landed: "asyncio.Future[None]") -> None:
        self.urgent -= 1

    async def _pause(self, failures: int) -> None:
        """Wait for the next try; shorter when somebody else got an answer after an outage."""
        try:
            async with asyncio.timeout(delay_s(failures, self._rng)):
                await self._answered.wait()
        except TimeoutError:
            pass

    def _distrust(self, flight: Flight, row: ChunkRow, source: NodeId | None) -> None:
        """Wrong bytes: the chunk goes on in a flight of its own and does not hold up the others."""
        self.stats.wrong_bytes += 1
        again = self._enter(flight.image, [row], flight.errand)
        again.since_s = flight.since_s
        if source is not None:
            # It is not asked again, so the next try need not wait.
            self._source.distrust(source)
        else:
            if flight.why != _WRONG_BYTES:
                logger.error("origin sent wrong bytes, asking again: %s", _place(flight.image, row))
            again.failures, again.why = flight.failures + 1, _WRONG_BYTES
        self._launch(again, self._fetch(again))

    def _failed(self, flight: Flight, error: Exception) -> None:
        flight.failures += 1
        why = str(error) or type(error).__name__
        if not isinstance(error, OriginUnavailable | OSError):
            if why != flight.why:
                logger.error("origin does not give a chunk: %s error=%s", _place(flight.image, flight.rows[0]), why)
        elif self._away_since_s is None:
            self._away_since_s = self._clock()
            logger.error("origin is away, reads wait for it: error=%s", why)
        flight.why = why

    def _recovered(self, asked_s: float) -> None:
        # What was asked before the outage may have been on its way when it began.
        if self._away_since_s is not None and asked_s >= self._away_since_s:
            logger.warning("origin is back: after_s=%.1f", self._clock() - self._away_since_s)
            self._away_since_s = None
            self._answered.set()
            self._answered.clear()


def _place(image: Manifest, row: ChunkRow) -> str:
    return f"image={image.image_id.hex()} chunk={row.index} pack={row.pack.hex()}"
