"""The live profile of a storm: first touches over all nodes that boot an image now, told to each other. Soft state. [pure]

A node calls again and again with what it touched since its last call, and is told what others touched meanwhile. The
`cursor` is how far into the common order it has been told; it holds the number of the storm too, so that a node that comes
from another one, or after a restart of the server, is told all that is known.

As bytes, little-endian:

    request  16s node, u64 cursor, u32 count, count × u32 indices
    answer   u64 cursor, u32 next_ms, u32 count, count × u32 indices
"""

import struct
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from vmthunder.errors import Usage
from vmthunder.ids import NODE_ID_BYTES, Buffer, ImageId, NodeId
from vmthunder.profile.profile import MAX_ENTRIES

FORGET_S: Final = 60.0
"""An image that nobody calls for, and a node that does not call, is forgotten after that."""
SOONEST_S: Final = 0.1
LATEST_S: Final = 5.0
CALLS_PER_S: Final = 400
"""That all nodes of one image make together, at most: a fifth of a core."""
MAX_IMAGES: Final = 64
MAX_NODES: Final = 100_000

_REQUEST: Final = struct.Struct(f"<{NODE_ID_BYTES}sQI")
_ANSWER: Final = struct.Struct("<QII")
MAX_LIVE_BYTES: Final = _REQUEST.size + 4 * MAX_ENTRIES


class BadLiveMessage(Usage):
    """A request or an answer makes no sense."""


class LiveCall(NamedTuple):
    """What a node says: what it touched since its last call."""

    node: NodeId
    cursor: int
    """Of the last answer; 0 at first."""
    touched: Sequence[int]
    """Indices of slices, in the order of their first touch."""

    def encode(self) -> bytes:
        return _REQUEST.pack(self.node, self.cursor, len(self.touched)) + _pack(self.touched)

    @classmethod
    def decode(cls, data: Buffer) -> "LiveCall":
        """Raises BadLiveMessage."""
        if len(data) < _REQUEST.size:
            raise BadLiveMessage("a call is cut short")
        node, cursor, count = _REQUEST.unpack_from(data)
        return cls(NodeId(node), cursor, _unpack(data, _REQUEST.size, count))


class LiveAnswer(NamedTuple):
    """What a node is told."""

    cursor: int
    """For the next call."""
    others: Sequence[int]
    """Indices that other nodes touched and this one did not, in the order of the first touch."""
    next_s: float
    """When to call again."""

    def encode(self) -> bytes:
        return _ANSWER.pack(self.cursor, round(self.next_s * 1000), len(self.others)) + _pack(self.others)

    @classmethod
    def decode(cls, data: Buffer) -> "LiveAnswer":
        """Raises BadLiveMessage."""
        if len(data) < _ANSWER.size:
            raise BadLiveMessage("an answer is cut short")
        cursor, next_ms, count = _ANSWER.unpack_from(data)
        return cls(cursor, _unpack(data, _ANSWER.size, count), next_ms / 1000)


@dataclass
class _Storm:
    """One image that is booted now."""

    number: int
    """Tells its cursors from those of other storms."""
    order: list[int] = field(default_factory=list)
    """Indices by first touch, whoever it was; each once."""
    known: set[int] = field(default_factory=set)
    """The same, to look up."""
    callers: OrderedDict[NodeId, float] = field(default_factory=OrderedDict)
    """Node → time of its last call; who called longest ago comes first. Never empty between calls."""


class Live:
    """All storms that one server knows. One owner; no threads."""

    def __init__(self, number: int) -> None:
        """`number` is a random one below 2³²: after a restart cursors are to be others than before."""
        self._number = number
        self._storms: OrderedDict[ImageId, _Storm] = OrderedDict()  # the one called longest ago comes first

    def call(self, image_id: ImageId, call: LiveCall, now: float) -> LiveAnswer:
        """Take what a node touched, tell what others did. Indices must have been checked against the image."""
        storm = self._storm(image_id, now)
        _called(storm.callers, call.node, now)
        number, told = divmod(call.cursor, 1 << 32)
        if number != storm.number or told > len(storm.order):
            told = 0
        # The node is told everything up to here, now: what it touched itself needs to be left out of one answer only.
        mine = set(call.touched)
        others = [index for index in storm.order[told:] if index not in mine]
        for index in call.touched:
            if index not in storm.known and len(storm.order) < MAX_ENTRIES:
                storm.known.add(index)
                storm.order.append(index)
        next_s = min(max(SOONEST_S, len(storm.callers) / CALLS_PER_S), LATEST_S)
        return LiveAnswer(storm.number << 32 | len(storm.order), others, next_s)

    def _storm(self, image_id: ImageId, now: float) -> _Storm:
        """The storm of an image, after those that are over, or too many, were forgotten."""
        for old, storm in list(self._storms.items()):
            if next(reversed(storm.callers.values())) >= now - FORGET_S:
                break
            del self._storms[old]
        found = self._storms.get(image_id)
        if found is None:
            if len(self._storms) == MAX_IMAGES:
                self._storms.popitem(last=False)
            self._number = (self._number + 1) % (1 << 32)
            found = self._storms[image_id] = _Storm(self._number)
        self._storms.move_to_end(image_id)
        return found


def _called(callers: OrderedDict[NodeId, float], node: NodeId, now: float) -> None:
    callers[node] = now
    callers.move_to_end(node)
    while next(iter(callers.values())) < now - FORGET_S or len(callers) > MAX_NODES:
        callers.popitem(last=False)


def _pack(indices: Iterable[int]) -> bytes:
    numbers = tuple(indices)
    return struct.pack(f"<{len(numbers)}I", *numbers)


def _unpack(data: Buffer, at: int, count: int) -> tuple[int, ...]:
    if count > MAX_ENTRIES or len(data) != at + 4 * count:
        raise BadLiveMessage(f"{len(data)} bytes are no {count} indices")
    return struct.unpack_from(f"<{count}I", data, at)
