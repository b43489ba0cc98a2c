"""Chunks that travel together, and the work that threads do for them.

`Flight` belongs to the event loop. The functions run on the threads of the fetcher's pools; they touch nothing but
their arguments and the chunk cache, which may be used from any thread, and leave the interpreter's lock to others
most of the time.
"""

import asyncio
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from vmthunder.errors import CorruptChunk
from vmthunder.ids import Buffer, ChunkId
from vmthunder.image.chunk import decode, verify
from vmthunder.image.manifest import ChunkRow, Manifest
from vmthunder.node.cache import ChunkCache
from vmthunder.node.decoded import Want
from vmthunder.node.source import Delivery
from vmthunder.node.turns import Errand

Outcome: TypeAlias = Buffer | CorruptChunk
"""A slice, or why there is none: the right bytes, which are not a chunk. No try can help: it was published so."""


@dataclass(slots=True, eq=False)
class Flight:
    """Chunks of one image that travel together."""

    image: Manifest
    rows: Sequence[ChunkRow]
    landed: "asyncio.Future[None]"
    since_s: float
    failures: int = 0
    """Tries in a row that gave nothing."""
    why: str = "under way"
    """What the last try failed of."""
    outcomes: Mapping[Want, Outcome] = field(default_factory=dict)
    """Of the chunks that arrived, once landed. The others must be looked for again."""
    encoded: Mapping[ChunkId, Buffer] = field(default_factory=dict)
    """What a source sent of them, verified: for peers that ask before it is stored."""
    errand: Errand = field(default_factory=Errand)

    def wants(self) -> list[Want]:
        return [want_of(self.image, row) for row in self.rows]


def want_of(image: Manifest, row: ChunkRow) -> Want:
    """What a reader of `image` wants of a row."""
    return row.chunk_id, image.slice_bytes(row.index)


def slice_of(outcome: Outcome) -> Buffer:
    """The slice. Raises CorruptChunk where there is none."""
    if isinstance(outcome, CorruptChunk):
        raise outcome
    return outcome


def load(cache: ChunkCache, image: Manifest, todo: deque[ChunkRow], *, wait: bool = True) -> dict[Want, Outcome]:
    """Chunks from the cache, decoded, without those that are not there after all.

    Several threads may take rows out of one `todo`, each the next one as it comes to it. Without `wait`, stops at the
    first chunk that must be waited for, and leaves it.
    """
    outcomes: dict[Want, Outcome] = {}
    while True:
        try:
            row = todo.popleft()
        except IndexError:
            return outcomes
        data = cache.load(row.chunk_id, wait=wait)
        if data is not None:
            want = want_of(image, row)
            outcomes[want] = _decoded(data, want)
        elif not wait:
            todo.appendleft(row)
            return outcomes


def unpack(image: Manifest, rows: Sequence[ChunkRow], deliveries: Sequence[Delivery]) -> dict[Want, Outcome]:
    """Chunks from a source, verified and decoded; those with wrong bytes are left out."""
    outcomes: dict[Want, Outcome] = {}
    for row, delivery in zip(rows, deliveries, strict=True):
        if verify(row.chunk_id, delivery.data):
            want = want_of(image, row)
            outcomes[want] = _decoded(delivery.data, want)
    return outcomes


def _decoded(data: Buffer, want: Want) -> Outcome:
    """The slice in memory of its own: a raw chunk is a view of a buffer that will be used again."""
    chunk_id, slice_bytes = want
    try:
        slice_ = decode(data, slice_bytes)
    except CorruptChunk as error:
        return CorruptChunk(f"chunk {chunk_id.hex()} was published broken: {error}")
    return bytes(slice_) if slice_ is data else slice_
