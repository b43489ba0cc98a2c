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
from typing import Final, NamedTuple

from vmthunder.ids import ChunkId

CORRELATED_USES: Final = 1024
MAX_USES: Final = 3
SMALL_SHARE: Final = 10

# An entry is one integer (32 bytes of memory; an object with fields would be 130):
# bits 0-22 size in bytes, bits 23-24 uses, bit 25 in main, bits 26-59 the use clock when a use last counted.
_SIZE_MASK: Final = (1 << 23) - 1
_ONE_USE: Final = 1 << 23
_USES_MASK: Final = 3 << 23
_MAIN: Final = 1 << 25
_CLOCK_SHIFT: Final = 26
_BELOW_CLOCK: Final = (1 << _CLOCK_SHIFT) - 1


class Room(NamedTuple):
    """What must happen before a chunk may be written."""

    evicted: list[ChunkId]
    to_main: bool
    """Where the new chunk will go."""


class S3Fifo:
    """Ids and sizes of what a cache of `quota_bytes` holds. About 180 bytes of memory a chunk."""

    def __init__(self, quota_bytes: int) -> None:
        self.quota_bytes = quota_bytes
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

    def size_bytes(self, chunk_id: ChunkId) -> int | None:
        """Size of a chunk that is here."""
        entry = self._entries.get(chunk_id)
        return None if entry is None else entry & _SIZE_MASK

    def touch(self, chunk_id: ChunkId) -> None:
        """A chunk was used."""
        self._clock = clock = self._clock + 1
        entry = self._entries.get(chunk_id)
        if entry is not None and clock - (entry >> _CLOCK_SHIFT) >= CORRELATED_USES:
            uses = entry & _USES_MASK
            self._entries[chunk_id] = (clock << _CLOCK_SHIFT) | (entry & _BELOW_CLOCK) + (
                _ONE_USE if uses < MAX_USES * _ONE_USE else 0
            )

    def pin(self, chunk_ids: frozenset[ChunkId]) -> None:
        """These are never let go from now on, and no others."""
        self._pinned, self._pinned_bytes = chunk_ids, 0
        for chunk_id in chunk_ids:
            entry = self._entries.get(chunk_id)
            if entry is not None:
                self._pinned_bytes += entry & _SIZE_MASK
                if not entry & _MAIN:
                    self._promote(chunk_id, entry)

    def make_room(self, chunk_id: ChunkId, size_bytes: int) -> Room | None:
        """Let chunks go until `size_bytes` more fit. None, and nothing changes, where they never will."""
        if not 0 < size_bytes <= min(self.quota_bytes - self._pinned_bytes, _SIZE_MASK):
            return None
        to_main = chunk_id in self._pinned or chunk_id in self._ghost or self._main_has_room(size_bytes)
        room = Room([], to_main)
        small_limit = self._small_quota - (0 if room.to_main else size_bytes)
        while self.used_bytes + size_bytes > self.quota_bytes:
            if self._small_bytes > max(small_limit, 0) or self._small_bytes + self._pinned_bytes == self.used_bytes:
                self._advance_small(room.evicted)
            else:
                self._advance_main(room.evicted)
        return room

    def add(self, chunk_id: ChunkId, size_bytes: int, *, to_main: bool) -> None:
        """A chunk was stored. It must not be here yet."""
        self._clock += 1
        self._ghost.pop(chunk_id, None)
        self._entries[chunk_id] = (self._clock << _CLOCK_SHIFT) | (_MAIN if to_main else 0) | size_bytes
        self.used_bytes += size_bytes
        if chunk_id in self._pinned:
            self._pinned_bytes += size_bytes
        if to_main:
            self._main.append(chunk_id)
        else:
            self._small.append(chunk_id)
            self._small_bytes += size_bytes

    def remove(self, chunk_id: ChunkId) -> bool:
        """Forget a chunk. False where it was not here."""
        entry = self._entries.pop(chunk_id, None)
        if entry is None:
            return False
        self._account_for_leaving(entry)
        if chunk_id in self._pinned:
            self._pinned_bytes -= entry & _SIZE_MASK
        return True

    def _main_has_room(self, size_bytes: int) -> bool:
        return self.used_bytes - self._small_bytes + size_bytes <= self.quota_bytes - self._small_quota

    def _account_for_leaving(self, entry: int) -> None:
        self.used_bytes -= entry & _SIZE_MASK
        if not entry & _MAIN:
            self._small_bytes -= entry & _SIZE_MASK

    def _advance_small(self, evicted: list[ChunkId]) -> None:
        chunk_id = self._small.popleft()
        entry = self._entries.get(chunk_id)
        if entry is None or entry & _MAIN:
            return
        if entry & _USES_MASK:
            self._promote(chunk_id, entry & ~_USES_MASK)
            return
        self.remove(chunk_id)
        evicted.append(chunk_id)
        self._ghost[chunk_id] = None
        if len(self._ghost) > max(len(self._main), 1):
            del self._ghost[next(iter(self._ghost))]

    def _promote(self, chunk_id: ChunkId, entry: int) -> None:
        self._entries[chunk_id] = entry | _MAIN
        self._small_bytes -= entry & _SIZE_MASK
        self._main.append(chunk_id)

    def _advance_main(self, evicted: list[ChunkId]) -> None:
        chunk_id = self._main.popleft()
        entry = self._entries.get(chunk_id)
        if entry is None or not entry & _MAIN:
            return
        if chunk_id in self._pinned or entry & _USES_MASK:
            self._entries[chunk_id] = entry - (_ONE_USE if entry & _USES_MASK else 0)
            self._main.append(chunk_id)
            return
        self.remove(chunk_id)
        evicted.append(chunk_id)
