"""Decoded chunks in memory, within a budget of bytes. Belongs to the event loop; no locks.

A guest that reads with O_DIRECT keeps nothing in the kernel's page cache and comes back for the next 4 KiB of a
chunk, and its neighbours come for the same chunk: what was decoded for one of them is here for the others. Least
recently used goes first: guests that boot together follow one another at some distance, and recency makes the whole
budget that distance.
"""

from collections import OrderedDict
from typing import TypeAlias

from vmthunder.ids import Buffer, ChunkId

Want: TypeAlias = tuple[ChunkId, int]
"""A chunk and the length of the slice it is wanted for.

One chunk id may name slices of different lengths in images of different chunk sizes: raw bytes for one may be a zstd
frame for the other."""


class DecodedChunks:
    """Least-recently-used map from wants to slices. Counts the slices' bytes, exactly."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self.hits = 0
        self._slices: OrderedDict[Want, Buffer] = OrderedDict()

    def __len__(self) -> int:
        return len(self._slices)

    def __contains__(self, want: Want) -> bool:
        return want in self._slices

    def __getitem__(self, want: Want) -> Buffer:
        """The slice, which is now the most recently used. KeyError where it is not here."""
        self._slices.move_to_end(want)
        self.hits += 1
        return self._slices[want]

    def put(self, want: Want, slice_: Buffer) -> None:
        """Keep a slice. One that is larger than the whole budget is not kept."""
        length = len(slice_)
        if length > self.budget_bytes or want in self._slices:
            return
        self.used_bytes += length
        while self.used_bytes > self.budget_bytes:
            self.used_bytes -= len(self._slices.popitem(last=False)[1])
        self._slices[want] = slice_
