"""Answers peers: chunks that are here, and chunks that come by here.

A chunk that this node does not have yet is fetched from this node's own parent and passed on (pull-through); the flight is
the same that a reader of this node would wait for. What cannot be had here is said at once, so that the peer asks its next
source. Belongs to the event loop.
"""

import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from vmthunder.ids import Buffer, ChunkId, ImageId, NodeId
from vmthunder.image.manifest import Manifest
from vmthunder.node.cache import ChunkCache
from vmthunder.node.fetch import Fetcher
from vmthunder.node.limits import RateLimit
from vmthunder.node.turns import Errand, pace
from vmthunder.peer.answer import Absent, Answer, TooBusy
from vmthunder.peer.frames import Route

MAX_HOPS: Final = 32
"""More than any tree is deep; a request that has come so far goes round in a circle of views that differ."""
UPLOADS: Final = 512
"""Answers being made at a time, for all peers together."""
MAX_BACKLOG_S: Final = 1.0
"""Whoever would have to wait longer for the upload limit is sent away."""
RETRY_S: Final = 0.2


class Relay:
    """Implements `vmthunder.peer.link.Answerer`."""

    def __init__(
        self,
        fetcher: Fetcher,
        cache: ChunkCache,
        manifest: Callable[[ImageId], Awaitable[Manifest | None]],
        upload: RateLimit,
    ) -> None:
        """`manifest` gives that of an image whose swarm this node is in, None for others."""
        self.sent_bytes = 0
        self.refused = 0
        """Requests that were answered with 'not here' or 'busy'."""
        self._fetcher = fetcher
        self._cache = cache
        self._manifest = manifest
        self._upload = upload
        self._making = 0

    def answer(self, peer: NodeId, chunk_id: ChunkId, route: Route) -> Answer | Awaitable[Answer]:
        """The chunk, or whatever can be said instead."""
        del peer
        now_s = time.monotonic()
        if self._making >= UPLOADS or self._upload.backlog_s(now_s) > MAX_BACKLOG_S:
            self.refused += 1
            return TooBusy(max(RETRY_S, self._upload.backlog_s(now_s) - MAX_BACKLOG_S))
        data = self._fetcher.encoded_now(chunk_id)
        if data is None:
            return self._make(chunk_id, route)
        if self._upload.bytes_s:
            return self._later(data, Errand(route.hops, route.priority))
        self.sent_bytes += len(data)
        return data

    def held(self, swarm: ImageId, chunk_ids: Sequence[ChunkId]) -> list[bool]:
        """Which of these are here."""
        del swarm
        return [chunk_id in self._cache for chunk_id in chunk_ids]

    async def _later(self, data: Buffer, errand: Errand) -> Answer:
        self._making += 1
        try:
            await pace(self._upload, len(data), errand, time.monotonic)
        finally:
            self._making -= 1
        self.sent_bytes += len(data)
        return data

    async def _make(self, chunk_id: ChunkId, route: Route) -> Answer:
        self._making += 1
        try:
            image = await self._manifest(route.swarm)
            row = image.find(chunk_id) if image is not None else None
            if image is None or row is None or (route.hops >= MAX_HOPS and chunk_id not in self._cache):
                self.refused += 1
                return Absent()
            errand = Errand(route.hops + 1, route.priority)
            data = await self._fetcher.encoded(image, row, errand)
            await pace(self._upload, len(data), errand, time.monotonic)
        finally:
            self._making -= 1
        self.sent_bytes += len(data)
        return data
