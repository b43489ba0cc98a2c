"""Where chunks come from that this node does not have: the interface, and the origin as the one that has them all."""

from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple, Protocol

from vmthunder.ids import Buffer, NodeId, PackId
from vmthunder.image.manifest import ChunkRow, Manifest
from vmthunder.node.turns import Errand, Turns

MAX_RUN_BYTES: Final = 1 << 20
"""Encoded bytes of one request, but for a single chunk that is larger."""
MAX_REQUESTS: Final = 16
"""Requests of this node to the origin at a time."""
MAX_BACKGROUND: Final = 8
"""Of them, those that nobody waits for."""


class Delivery(NamedTuple):
    """Encoded bytes, as a source sent them: unchecked."""

    data: Buffer
    source: NodeId | None
    """None: the origin."""


class ChunkSource(Protocol):
    """Gives encoded chunks. Its word is not trusted: whoever asks verifies."""

    def runs(self, image: Manifest, rows: Iterable[ChunkRow]) -> list[list[ChunkRow]]:
        """Rows in groups to be fetched together."""
        ...

    async def fetch(self, image: Manifest, run: Sequence[ChunkRow], errand: Errand) -> Sequence[Delivery]:
        """The chunks of a group, in their order. Ends in bounded time, and is safe to cancel.

        Raises:
            VMThunderError, OSError: it cannot, now; another try may do.
        """
        ...

    def distrust(self, source: NodeId) -> None:
        """What a node delivered was not the chunk it was asked for."""
        ...


class Packs(Protocol):
    """What is needed of an origin."""

    async def read_pack(self, pack: PackId, offset: int, length_bytes: int) -> Buffer:
        """Exactly those bytes of a pack."""
        ...


def runs(rows: Iterable[ChunkRow]) -> list[list[ChunkRow]]:
    """Rows in groups that lie back to back in one pack: one request each.

    Gaps are not bridged: between two chunks that a guest asked for at once lies, as a rule, nothing, since chunks are
    packed in the order of the image; what lies there otherwise is not what it asked for.
    """
    result: list[list[ChunkRow]] = []
    run_bytes = 0
    for row in sorted(rows, key=lambda row: (row.pack, row.offset)):
        last = result[-1][-1] if result else None
        if (
            last is not None
            and last.pack == row.pack
            and last.offset + last.encoded_bytes == row.offset
            and run_bytes + row.encoded_bytes <= MAX_RUN_BYTES
        ):
            result[-1].append(row)
            run_bytes += row.encoded_bytes
        else:
            result.append([row])
            run_bytes = row.encoded_bytes
    return result


class OriginSource:
    """The origin as a source: one ranged read of a pack for a run, MAX_REQUESTS at a time."""

    def __init__(self, origin: Packs) -> None:
        self.requests = 0
        """Sent so far."""
        self._origin = origin
        self._turns = Turns(MAX_REQUESTS, MAX_BACKGROUND)

    def runs(self, image: Manifest, rows: Iterable[ChunkRow]) -> list[list[ChunkRow]]:
        del image
        return runs(rows)

    async def fetch(self, image: Manifest, run: Sequence[ChunkRow], errand: Errand) -> Sequence[Delivery]:
        del image
        first, last = run[0], run[-1]
        length_bytes = last.offset + last.encoded_bytes - first.offset
        async with self._turns.turn(errand):
            self.requests += 1
            data = memoryview(await self._origin.read_pack(first.pack, first.offset, length_bytes))
        return [Delivery(data[row.offset - first.offset :][: row.encoded_bytes], None) for row in run]

    def distrust(self, source: NodeId) -> None:
        """No node delivers here."""
