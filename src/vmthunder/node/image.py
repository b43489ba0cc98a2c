"""What is behind a node that is open: an image on demand, or a local copy that the kernel does not read itself.

A read answers at once where it can (zeros, and what the fetcher has at hand), otherwise with an awaitable. Knows no
names and no FUSE. Belongs to the event loop; the local file is read in threads where its pages are not in memory.
"""

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from vmthunder.fuse.memory import ZEROS
from vmthunder.ids import Buffer
from vmthunder.image.manifest import ChunkRow, Manifest
from vmthunder.node.fetch import Fetcher
from vmthunder.node.stall import Stall

Push = Callable[[int, Buffer], None]
"""Told an offset and the bytes that belong there: what a read did not ask for of a chunk that it needed."""


class Watch(Protocol):
    """Is told which chunks are read for the first time."""

    seen: bytearray
    """By index: whether it was told of a chunk."""

    def touch(self, offset: int, end: int, *, direct: bool) -> None: ...


class OnDemandImage:
    """An image read chunk by chunk."""

    def __init__(
        self, manifest: Manifest, fetcher: Fetcher, push: Push, stall: Stall, watch: Watch | None = None
    ) -> None:
        self._manifest = manifest
        self._fetcher = fetcher
        self._push = push
        self._stall = stall
        self._watch = watch
        self._seen = watch.seen if watch else b""
        self.read_bytes = 0

    def close(self) -> None:
        """Nothing is held."""

    def read(self, offset: int, size_bytes: int, *, direct: bool) -> Sequence[Buffer] | Awaitable[Sequence[Buffer]]:
        """The bytes from `offset`, fewer at the end of the image. `direct`: the reader does not want the page cache."""
        manifest = self._manifest
        end = min(offset + size_bytes, manifest.virtual_bytes)
        if offset >= end:
            return ()
        self.read_bytes += end - offset
        chunk_bytes = manifest.chunk_bytes
        first, last = offset // chunk_bytes, (end - 1) // chunk_bytes
        if self._seen.find(0, first, last + 1) >= 0 and self._watch is not None:
            self._watch.touch(offset, end, direct=direct)
        rows = [manifest.row(index) for index in range(first, last + 1)]
        present = [row for row in rows if row is not None]
        slices = self._fetcher.read_now(manifest, present) if present else []
        if slices is None:
            return self._read_later(offset, end, rows, present, direct)
        return self._cut(offset, end, rows, slices, direct)

    async def _read_later(
        self, offset: int, end: int, rows: Sequence[ChunkRow | None], present: Sequence[ChunkRow], direct: bool
    ) -> Sequence[Buffer]:
        with self._stall:
            slices = await self._fetcher.read(self._manifest, present)
        return self._cut(offset, end, rows, slices, direct)

    def _cut(
        self, offset: int, end: int, rows: Sequence[ChunkRow | None], slices: Sequence[Buffer], direct: bool
    ) -> Sequence[Buffer]:
        """The range out of its slices, of which only the first and the last may stick out."""
        result: list[Buffer] = []
        left = iter(slices)
        chunk_bytes = self._manifest.chunk_bytes
        start = offset // chunk_bytes * chunk_bytes
        for row in rows:
            begin, finish = max(offset - start, 0), min(end - start, chunk_bytes)
            if row is None:
                result.extend(_zeros(finish - begin))
            else:
                data = next(left)
                if begin == 0 and finish == len(data):
                    result.append(data)
                else:
                    view = memoryview(data)
                    result.append(view[begin:finish])
                    if not direct:
                        self._push_rest(start, view, begin, finish)
            start += chunk_bytes
        return result

    def _push_rest(self, start: int, view: memoryview, begin: int, finish: int) -> None:
        if begin:
            self._push(start, view[:begin])
        if finish < len(view):
            self._push(start + finish, view[finish:])


class LocalImage:
    """A local copy that we read: where the kernel has no passthrough, or does not take this file."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.read_bytes = 0

    def close(self) -> None:
        os.close(self._descriptor)

    def read(self, offset: int, size_bytes: int, *, direct: bool) -> Sequence[Buffer] | Awaitable[Sequence[Buffer]]:
        del direct
        self.read_bytes += size_bytes
        buffer = bytearray(size_bytes)
        try:
            count = os.preadv(self._descriptor, (buffer,), offset, os.RWF_NOWAIT)
        except OSError as error:
            if error.errno not in {errno.EAGAIN, errno.EOPNOTSUPP}:
                raise
            count = -1
        if count == size_bytes or count == 0:
            return (memoryview(buffer)[:count],)
        return asyncio.to_thread(self._read_waiting, buffer, offset)

    def _read_waiting(self, buffer: bytearray, offset: int) -> Sequence[Buffer]:
        return (memoryview(buffer)[: os.preadv(self._descriptor, (buffer,), offset)],)


def _zeros(length_bytes: int) -> list[memoryview]:
    whole, rest = divmod(length_bytes, len(ZEROS))
    return [ZEROS] * whole + ([ZEROS[:rest]] if rest else [])
