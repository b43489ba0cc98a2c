"""Where chunks come from that this node does not have."""

from collections.abc import Iterable, Sequence
from typing import Protocol

from vmthunder.ids import Buffer, PackId
from vmthunder.image.manifest import ChunkRow

MAX_RUN_BYTES = 1 << 20
"""Encoded bytes of one request, but for a single chunk that is larger."""


class ChunkSource(Protocol):
    """Gives encoded chunks. Its word is not trusted: whoever asks verifies."""

    async def fetch(self, run: Sequence[ChunkRow]) -> Sequence[Buffer]:
        """The encoded bytes of chunks that `runs` put together, one buffer each, in their order.

        Ends in bounded time, and is safe to cancel.

        Raises:
            VMThunderError, OSError: it cannot, now; another try may do.
        """
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
    """The origin as a source: one ranged read of a pack for a run."""

    def __init__(self, origin: Packs) -> None:
        self._origin = origin

    async def fetch(self, run: Sequence[ChunkRow]) -> Sequence[Buffer]:
        first, last = run[0], run[-1]
        length_bytes = last.offset + last.encoded_bytes - first.offset
        data = memoryview(await self._origin.read_pack(first.pack, first.offset, length_bytes))
        return [data[row.offset - first.offset :][: row.encoded_bytes] for row in run]
