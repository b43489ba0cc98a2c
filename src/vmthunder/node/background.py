"""Brings chunks here that nobody waits for yet: as many at a time as disturb no guest, in the order that was asked for.

All that this node reads in the background (replayed boots, images placed ahead, whole images after a boot) goes through
one window. While a guest waits for a source, little is under way, on a slow link one chunk at a time. Belongs to the event
loop; flights belong to the fetcher, so whoever stops bringing leaves those alone that are under way.
"""

import asyncio
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import TypeAlias

from vmthunder.errors import CorruptChunk
from vmthunder.ids import Buffer
from vmthunder.image.manifest import ChunkRow, Manifest
from vmthunder.node.fetch import Fetcher
from vmthunder.node.flight import Flight, want_of
from vmthunder.node.limits import RateLimit
from vmthunder.node.window import Window

MAX_BATCH_BYTES = 256 << 10
"""Encoded bytes that are asked for together: a reader that meets one of them may have to wait for all."""

Arrived: TypeAlias = Callable[[ChunkRow, Buffer], None]
"""Told each chunk that was brought here, and its slice."""


class Background:
    """One for a node."""

    def __init__(self, fetcher: Fetcher, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.in_flight_bytes = 0
        self.chunks = 0
        """Brought here so far."""
        self.bytes = 0
        """Encoded."""
        self._fetcher = fetcher
        self._window = Window()
        self._clock = clock
        self._landed = asyncio.Event()

    @property
    def window_bytes(self) -> int:
        return self._window.limit_bytes

    async def bring(
        self, image: Manifest, rows: Iterable[ChunkRow], arrived: Arrived, limit: RateLimit | None = None
    ) -> None:
        """Bring those of `rows` that are neither here nor on their way; return when they are.

        `rows` is taken from as there is room, so it may grow meanwhile.
        """
        flights: set[Flight] = set()
        batch: list[ChunkRow] = []
        batch_bytes = 0
        for row in rows:
            if self._fetcher.is_near(image, row):
                await asyncio.sleep(0)  # a whole image may be here already: others want their turn
                continue
            batch.append(row)
            batch_bytes += row.encoded_bytes
            if batch_bytes >= min(self._room_bytes() // 4, MAX_BATCH_BYTES):
                await self._send(image, batch, batch_bytes, flights, arrived, limit)
                batch, batch_bytes = [], 0
        await self._send(image, batch, batch_bytes, flights, arrived, limit)
        while flights:
            await self._next_landing()

    async def _send(
        self,
        image: Manifest,
        batch: list[ChunkRow],
        batch_bytes: int,
        flights: set[Flight],
        arrived: Arrived,
        limit: RateLimit | None,
    ) -> None:
        if limit is not None:
            await asyncio.sleep(limit.reserve(batch_bytes, self._clock()))
        while self.in_flight_bytes and self.in_flight_bytes + batch_bytes > self._room_bytes():
            await self._next_landing()
        for flight in self._fetcher.bring(image, batch):
            flights.add(flight)
            size_bytes = sum(row.encoded_bytes for row in flight.rows)
            self.in_flight_bytes += size_bytes
            flight.landed.add_done_callback(
                partial(self._on_landed, flight, size_bytes, self._clock(), flights, arrived)
            )

    def _room_bytes(self) -> int:
        return self._window.beside_bytes if self._fetcher.urgent else self._window.limit_bytes

    async def _next_landing(self) -> None:
        self._landed.clear()
        await self._landed.wait()

    def _on_landed(
        self,
        flight: Flight,
        size_bytes: int,
        asked_s: float,
        flights: set[Flight],
        arrived: Arrived,
        landed: "asyncio.Future[None]",
    ) -> None:
        now_s = self._clock()
        if flight.errand.background and not flight.failures:  # else it says nothing of what others do to the queues
            self._window.arrived(size_bytes, now_s - asked_s, self.in_flight_bytes, now_s)
        self.in_flight_bytes -= size_bytes
        flights.discard(flight)
        self._landed.set()
        if landed.cancelled() or landed.exception() is not None:
            return
        for row in flight.rows:
            slice_ = flight.outcomes.get(want_of(flight.image, row))
            if slice_ is not None and not isinstance(slice_, CorruptChunk):
                self.chunks += 1
                self.bytes += row.encoded_bytes
                arrived(row, slice_)
