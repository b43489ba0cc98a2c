"""Chunks on their way into the chunk cache: what comes while a write goes on is written in one go after it.

Bounds what waits in memory for a slow disk. A thread of its own writes, since a disk may take long; each hand-over to it
costs as much as a chunk's digest, so a busy node hands over many chunks at a time. Belongs to the event loop.
"""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from vmthunder.node.cache import ChunkCache, Encoded

MAX_WAITING_BYTES: Final = 32 << 20
"""Encoded bytes in memory that wait for the disk."""


class Storer:
    """The queue and its thread."""

    def __init__(self, cache: ChunkCache) -> None:
        self._cache = cache
        self._thread = ThreadPoolExecutor(1, "store")
        self._writing = asyncio.Lock()
        self._todo: list[Encoded] = []
        self._waiting_bytes = 0
        self.room = asyncio.Event()
        """Set while no more than MAX_WAITING_BYTES wait: no more should be fetched otherwise."""
        self.room.set()

    async def close(self) -> None:
        """What is being written is written."""
        await asyncio.to_thread(self._thread.shutdown)

    async def store(self, chunks: Sequence[Encoded]) -> None:
        """Return when the chunks are in the cache, or cannot be. Whoever calls has verified them."""
        size_bytes = sum(len(data) for _, data in chunks)
        self._waiting_bytes += size_bytes
        if self._waiting_bytes > MAX_WAITING_BYTES:
            self.room.clear()
        self._todo.extend(chunks)
        try:
            async with self._writing:
                if self._todo:  # else somebody before us in the line took ours along
                    batch, self._todo = self._todo, []
                    await asyncio.get_running_loop().run_in_executor(self._thread, self._cache.commit, batch)
        finally:
            self._waiting_bytes -= size_bytes
            if self._waiting_bytes <= MAX_WAITING_BYTES:
                self.room.set()
