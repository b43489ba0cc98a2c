"""Chunks into packs, and packs to the origin. Owns the pack being filled and those on their way. One event loop.

A chunk is written once: not if a pack of the origin has it, nor if a pack of this run will. Which packs are made
depends only on the order of the chunks and on what the origin had.
"""

import asyncio
from collections import deque
from enum import Enum, auto
from typing import Final, NamedTuple

from vmthunder.ids import ChunkId, PackId
from vmthunder.image.chunk import Encoded
from vmthunder.image.pack import PackBuilder, PackEntry
from vmthunder.origin.index import KnownChunks
from vmthunder.origin.origin import Origin

PACK_BYTES: Final = 32 << 20
UPLOADS: Final = 2
"""Packs on their way at once; with the one that is being filled they are the memory this module takes."""

_NOT_YET: Final = PackId(b"")


class Occurrence(Enum):
    """Which one of a chunk's occurrences this is."""

    NEW = auto()
    """The first one ever: this run writes it."""
    OLD = auto()
    """The first one in this image; the origin had it."""
    REPEATED = auto()


class Place(NamedTuple):
    """Where a chunk is, or will be."""

    pack_number: int
    """In what `PackWriter.finish` returns."""
    offset: int
    occurrence: Occurrence


class _Filling:
    """A pack that is being filled."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.builder = PackBuilder()
        self.entries: list[PackEntry] = []


class PackWriter:
    """Finds each chunk a place, in an old pack or a new one."""

    def __init__(self, origin: Origin, known: KnownChunks) -> None:
        self._origin = origin
        self._known = known
        self._filling: _Filling | None = None
        self._packs: list[PackId] = []
        self._numbers: dict[PackId, int] = {}
        self._ours: set[int] = set()
        """Numbers of the packs of this run."""
        self._met: set[int] = set()
        """Chunks of earlier packs that occurred: pack number << 32 | offset, so that a large image fits into memory."""
        self._coming: dict[ChunkId, Place] = {}
        """Chunks of packs that are not at the origin yet; all others are in `known`."""
        self._uploads: deque[asyncio.Task[None]] = deque()
        self.stored_bytes = 0
        """Length of the packs of this run that are at the origin."""

    async def place(self, chunk: Encoded) -> Place:
        """The place of a chunk, which is added to a pack if it has none.

        Raises:
            NoSpace, NotPermitted, OriginUnavailable: from writing an earlier pack.
        """
        coming = self._coming.get(chunk.chunk_id)
        if coming is not None:
            return coming
        known = self._known.find(chunk.chunk_id)
        if known is not None:
            return self._known_place(known.pack, known.offset)
        if self._filling is not None and self._filling.builder.size_bytes + len(chunk.data) > PACK_BYTES:
            await self._ship(self._filling)
        if self._filling is None:
            self._filling = _Filling(len(self._packs))
            self._packs.append(_NOT_YET)
            self._ours.add(self._filling.number)
        offset = self._filling.builder.add(chunk.chunk_id, chunk.data)
        self._filling.entries.append(PackEntry(chunk.chunk_id, offset, len(chunk.data)))
        self._coming[chunk.chunk_id] = Place(self._filling.number, offset, Occurrence.REPEATED)
        return Place(self._filling.number, offset, Occurrence.NEW)

    async def finish(self) -> list[PackId]:
        """All packs that were named, by their numbers, once all of them are at the origin. Raises as `place` does."""
        if self._filling is not None:
            await self._ship(self._filling)
        while self._uploads:
            await self._uploads.popleft()
        return self._packs

    async def abandon(self) -> None:
        """Stop what is on its way. What has arrived stays: another run will find it, or gc will."""
        for upload in self._uploads:
            upload.cancel()
        await asyncio.gather(*self._uploads, return_exceptions=True)

    def _known_place(self, pack: PackId, offset: int) -> Place:
        number = self._numbers.get(pack)
        if number is None:
            number = self._numbers[pack] = len(self._packs)
            self._packs.append(pack)
        key = number << 32 | offset
        if number in self._ours or key in self._met:
            return Place(number, offset, Occurrence.REPEATED)
        self._met.add(key)
        return Place(number, offset, Occurrence.OLD)

    async def _ship(self, full: _Filling) -> None:
        if len(self._uploads) == UPLOADS:
            await self._uploads.popleft()
        self._filling = None
        self._uploads.append(asyncio.create_task(self._upload(full)))

    async def _upload(self, full: _Filling) -> None:
        pack, data = full.builder.finish()
        await self._origin.put_pack(pack, data)
        self._packs[full.number] = pack
        self._numbers[pack] = full.number
        self._known.add(pack, len(data), full.entries)
        # From here on `known` answers for them; there is no await between, so a chunk is never in neither.
        for entry in full.entries:
            del self._coming[entry.chunk_id]
        self.stored_bytes += len(data)
