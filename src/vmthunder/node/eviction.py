"""Which chunk leaves the cache next: S3-FIFO (Yang et al., SOSP 2023) fitted to images. Pure; not thread-safe.

Three queues. What is new passes through a *small* one (a tenth of the quota) and leaves from there unless it was used
again; what was, moves to *main*, where a use buys another round. A *ghost* queue remembers ids that left small: one
that comes back was wrongly let go and goes to main at once. So a scan of a whole image passes through a tenth of the
cache and takes nothing.

Two things differ from the paper:

* While main has room, what is new goes there at once: the chunks of the first boots were read once and nothing is
  gained by letting them go for a scan that came later.
* A use counts only when it is CORRELATED_USES uses of any chunk after the last one that counted. A reader that scans
  with O_DIRECT in 4 KiB steps uses each chunk 16 times in a row, several of them interleaved; that is one use.
"""

from collections import deque
from collections.abc import Iterator
from typing import Final, NamedTuple

from vmthunder.ids import ChunkId

CORRELATED_USES: Final = 1024
MAX_USES: Final = 3
SMALL_SHARE: Final = 10

# An entry is one integer (40 bytes of memory; an object with fields would be 160):
# bits 0-22 size in bytes, bits 23-24 uses, bit 25 in main, bits 26-59 the use clock when a use last counted, modulo its
# range; bits 60 and up the place.
_SIZE_MASK: Final = (1 << 23) - 1
_ONE_USE: Final = 1 << 23
_USES_MASK: Final = 3 << 23
_MAIN: Final = 1 << 25
_CLOCK_SHIFT: Final = 26
_CLOCK_MASK: Final = (1 << 34) - 1
_PLACE_SHIFT: Final = _CLOCK_SHIFT + 34
_ALL_BUT_CLOCK: Final = ~(_CLOCK_MASK << _CLOCK_SHIFT)


class Kept(NamedTuple):
    """A chunk that the cache holds, or held."""

    chunk_id: ChunkId
    place: int
    size_bytes: int


class Room(NamedTuple):
    """What must happen before a chunk may be written."""

    evicted: list[Kept]
    to_main: bool
    """Where the new chunk will go."""


class S3Fifo:
    """Ids, sizes and places of what a cache of `quota_bytes` holds. About 190 bytes of memory a chunk."""

    def __init__(self, quota_bytes: int, unit_bytes: int = 1) -> None:
        """What is stored takes whole units of the quota."""
        self.quota_bytes = quota_bytes
        self._unit_bytes = unit_bytes
        self.used_bytes = 0
        self._small_quota = quota_bytes // SMALL_SHARE
        self._small_bytes = 0
        self._entries: dict[ChunkId, int] = {}
        # Ids that were removed stay in their queue until their turn comes.
        self._small: deque[ChunkId] = deque()
        self._main: deque[ChunkId] = deque()
        self._ghost: dict[ChunkId, None] = {}
        self._clock = 0
        self._pinned: frozenset[ChunkId] = frozenset()
        self._pinned_bytes = 0
        """Of those that are here; they are all in main, where they go round and round."""

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, chunk_id: ChunkId) -> bool:
        return chunk_id in self._entries

    def find(self, chunk_id: ChunkId) -> tuple[int, int] | None:
        """Place and size in bytes of a chunk that is here."""
        entry = self._entries.get(chunk_id)
        return None if entry is None else (entry >> _PLACE_SHIFT, entry & _SIZE_MASK)

    def touch(self, chunk_id: ChunkId) -> None:
        """A chunk was used."""
        self._clock = clock = (self._clock + 1) & _CLOCK_MASK
        entry = self._entries.get(chunk_id)
        if entry is not None and (clock - (entry >> _CLOCK_SHIFT)) & _CLOCK_MASK >= CORRELATED_USES:
            if entry & _USES_MASK < MAX_USES * _ONE_USE:
                entry += _ONE_USE
            self._entries[chunk_id] = entry & _ALL_BUT_CLOCK | clock << _CLOCK_SHIFT

    def room_in_main(self, size_bytes: int) -> bool:
        """Whether so many bytes, in whole units, go to main and nothing has to leave for them."""
        fits = self.used_bytes + size_bytes <= self.quota_bytes
        return fits and self.used_bytes - self._small_bytes + size_bytes <= self.quota_bytes - self._small_quota

    def pin(self, chunk_ids: frozenset[ChunkId]) -> None:
        """These are never let go from now on, and no others."""
        self._pinned, self._pinned_bytes = chunk_ids, 0
        for chunk_id in chunk_ids:
            entry = self._entries.get(chunk_id)
            if entry is not None:
                self._pinned_bytes += self.space_bytes(entry & _SIZE_MASK)
                if not entry & _MAIN:
                    self._promote(chunk_id, entry)

    def make_room(self, chunk_id: ChunkId, size_bytes: int) -> Room | None:
        """Let chunks go until `size_bytes` more fit. None, and nothing changes, where they never will."""
        space = self.space_bytes(size_bytes)
        if not 0 < size_bytes <= _SIZE_MASK or space > self.quota_bytes - self._pinned_bytes:
            return None
        main_has_room = self.used_bytes - self._small_bytes + space <= self.quota_bytes - self._small_quota
        room = Room([], chunk_id in self._pinned or chunk_id in self._ghost or main_has_room)
        small_limit = self._small_quota - (0 if room.to_main else space)
        while self.used_bytes + space > self.quota_bytes:
            if self._small_bytes > max(small_limit, 0) or self._small_bytes + self._pinned_bytes == self.used_bytes:
                self._advance_small(room.evicted)
            else:
                self._advance_main(room.evicted)
        return room

    def add(self, chunk_id: ChunkId, size_bytes: int, place: int, *, to_main: bool) -> None:
        """A chunk was stored. It must not be here yet."""
        self._clock = (self._clock + 1) & _CLOCK_MASK
        self._ghost.pop(chunk_id, None)
        main = _MAIN if to_main else 0
        self._entries[chunk_id] = place << _PLACE_SHIFT | self._clock << _CLOCK_SHIFT | main | size_bytes
        space = self.space_bytes(size_bytes)
        self.used_bytes += space
        if chunk_id in self._pinned:
            self._pinned_bytes += space
        if to_main:
            self._main.append(chunk_id)
        else:
            self._small.append(chunk_id)
            self._small_bytes += space

    def space_bytes(self, size_bytes: int) -> int:
        """What so many bytes take of the quota."""
        return -(-size_bytes // self._unit_bytes) * self._unit_bytes

    def remove(self, chunk_id: ChunkId) -> Kept | None:
        """Forget a chunk. None where it was not here."""
        entry = self._entries.pop(chunk_id, None)
        if entry is None:
            return None
        space = self.space_bytes(entry & _SIZE_MASK)
        self.used_bytes -= space
        if chunk_id in self._pinned:
            self._pinned_bytes -= space
        if not entry & _MAIN:
            self._small_bytes -= space
        return Kept(chunk_id, entry >> _PLACE_SHIFT, entry & _SIZE_MASK)

    def in_order(self) -> Iterator[tuple[Kept, bool]]:
        """What is here, each queue in the order in which it was filled, and whether it is in main. A copy of its own."""
        entries, queues = self._entries.copy(), ((list(self._main), _MAIN), (list(self._small), 0))
        return (
            (Kept(chunk_id, entry >> _PLACE_SHIFT, entry & _SIZE_MASK), bool(main))
            for queue, main in queues
            for chunk_id in queue
            # Popped: one that was removed and came back is in its queue twice.
            if (entry := entries.get(chunk_id, -1)) >= 0 and entry & _MAIN == main and entries.pop(chunk_id)
        )

    def _advance_small(self, evicted: list[Kept]) -> None:
        chunk_id = self._small.popleft()
        entry = self._entries.get(chunk_id)
        if entry is None or entry & _MAIN:
            return
        if entry & _USES_MASK:
            self._promote(chunk_id, entry & ~_USES_MASK)
            return
        self._evict(chunk_id, evicted)
        self._ghost[chunk_id] = None
        if len(self._ghost) > max(len(self._main), 1):
            del self._ghost[next(iter(self._ghost))]

    def _promote(self, chunk_id: ChunkId, entry: int) -> None:
        self._entries[chunk_id] = entry | _MAIN
        self._small_bytes -= self.space_bytes(entry & _SIZE_MASK)
        self._main.append(chunk_id)

    def _advance_main(self, evicted: list[Kept]) -> None:
        chunk_id = self._main.popleft()
        entry = self._entries.get(chunk_id)
        if entry is None or not entry & _MAIN:
            return
        if chunk_id in self._pinned or entry & _USES_MASK:
            self._entries[chunk_id] = entry - (_ONE_USE if entry & _USES_MASK else 0)
            self._main.append(chunk_id)
            return
        self._evict(chunk_id, evicted)

    def _evict(self, chunk_id: ChunkId, evicted: list[Kept]) -> None:
        kept = self.remove(chunk_id)
        assert kept is not None
        evicted.append(kept)
