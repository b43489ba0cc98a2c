"""What a node gives its peers: the interface between a link and whoever has the chunks. [pure]"""

from collections.abc import Awaitable, Sequence
from typing import NamedTuple, Protocol, TypeAlias

from vmthunder.ids import Buffer, ChunkId, ImageId, NodeId
from vmthunder.peer.frames import Route


class Absent(NamedTuple):
    """Answer: not here, and `hint` may have it."""

    hint: NodeId | None = None


class TooBusy(NamedTuple):
    """Answer: not now; ask `hint`."""

    retry_after_s: float
    hint: NodeId | None = None


Answer: TypeAlias = Buffer | Absent | TooBusy


class Answerer(Protocol):
    """What a link asks for what its peer wants."""

    def answer(self, peer: NodeId, chunk_id: ChunkId, route: Route) -> Answer | Awaitable[Answer]:
        """The chunk's checked bytes. At once when it is at hand; an awaitable is cancelled when the peer cancels."""

    def held(self, swarm: ImageId, chunk_ids: Sequence[ChunkId]) -> list[bool]:
        """Which of these are here."""
