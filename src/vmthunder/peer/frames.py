"""The frames of the peer protocol: values ↔ bytes. [pure]

Owns the byte layouts (docs/wire.md) and the limits that hold whatever was said before. What may be said when is
`vmthunder.peer.wire`. No state.
"""

import struct
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import ClassVar, Final, NamedTuple, TypeAlias

from vmthunder.errors import Failure
from vmthunder.ids import DIGEST_BYTES, NODE_ID_BYTES, ChunkId, ImageId, NodeId

VERSION: Final = 1
NONCE_BYTES: Final = 32
MAX_BATCH: Final = 256
"""Chunks that one GET or HAVE may name."""
MAX_CHUNK_BYTES: Final = 4 << 20
MAX_TEXT_BYTES: Final = 200

_MAGIC: Final = b"VMTPEER\n"
_HEAD = struct.Struct("<IBBHI")  # bytes of the body, kind, zero, zero, request
_HELLO = struct.Struct("<8sHHI16s32s")  # magic, oldest and newest version, features, node id, nonce
_GET = struct.Struct("<32sIHBBH")  # image id, epoch, stripe, hops, priority, count; then chunk ids
_BUSY = struct.Struct("<16sI")  # hint, milliseconds
_HAVE = struct.Struct("<32sH")  # image id, count; then chunk ids
_GOODBYE = struct.Struct("<H")  # reason; then text
_NO_HINT: Final = bytes(NODE_ID_BYTES)

HEAD_BYTES: Final = _HEAD.size
HELLO_BYTES: Final = _HELLO.size


class ProtocolError(Failure):
    """The protocol was broken; the connection is of no more use."""


class LocalProtocolError(ProtocolError):
    """By us: a bug. Nothing was sent and nothing has changed."""


class Reason(IntEnum):
    """Why a side says goodbye. Others may come: a receiver takes an unknown one for LEAVING."""

    LEAVING = 0
    IDLE = 1
    WRONG_KEY = 2
    VERSION = 3
    BROKEN = 4
    """The other side broke the protocol."""
    LIED = 5
    """The other side sent bytes that are not the chunk they were sent for."""
    CROWDED = 6


class RemoteProtocolError(ProtocolError):
    """By the other side. `reason` is what to tell it before the connection is closed."""

    reason: ClassVar[Reason] = Reason.BROKEN


class WrongKey(RemoteProtocolError):
    """The other side does not know the cluster key."""

    exit_code = 7
    reason = Reason.WRONG_KEY


class WrongVersion(RemoteProtocolError):
    """The two sides have no version in common."""

    reason = Reason.VERSION


class Priority(IntEnum):
    """Whether a guest waits for it."""

    DEMAND = 0
    BACKGROUND = 1


class Kind(IntEnum):
    """What a frame is."""

    HELLO = 1
    PROOF = 2
    GET = 3
    CHUNK = 4
    NOT_HERE = 5
    BUSY = 6
    CANCEL = 7
    CANCELLED = 8
    HAVE = 9
    HELD = 10
    PING = 11
    PONG = 12
    GOODBYE = 13
    HURRY = 14


class Hello(NamedTuple):
    """Who is there, and which versions it speaks. `body` is what the proofs sign."""

    oldest: int
    newest: int
    node: NodeId
    body: bytes


class Proof(NamedTuple):
    """Keyed digest of both hellos."""

    mac: bytes


class Route(NamedTuple):
    """What the chunks of one GET have in common."""

    swarm: ImageId
    epoch: int
    """Of the sender's view of the swarm."""
    stripe: int
    hops: int
    """Nodes that the request has passed through; whoever sees too many does not pass it on."""
    priority: Priority


class Get(NamedTuple):
    """Chunks are asked for. Chunk i is request `request` + i; each is owed exactly one answer."""

    request: int
    route: Route
    chunk_ids: list[ChunkId]


class NotHere(NamedTuple):
    """Answer: the chunk cannot be had here; `hint` may have it."""

    request: int
    hint: NodeId | None


class Busy(NamedTuple):
    """Answer: too much to do; ask again later, or ask `hint` now."""

    request: int
    retry_after_s: float
    hint: NodeId | None


class Cancel(NamedTuple):
    """An answer is no longer wanted, and is still owed."""

    request: int


class Cancelled(NamedTuple):
    """Answer: agreed, there will be none."""

    request: int


class Hurry(NamedTuple):
    """A guest waits now for what was asked for in the background."""

    request: int


class Have(NamedTuple):
    """Which of these chunks are held?"""

    request: int
    swarm: ImageId
    chunk_ids: list[ChunkId]


class Held(NamedTuple):
    """Answer: one bit per chunk, in the order of asking, lowest bit of the first byte first."""

    request: int
    bits: bytes


class Ping(NamedTuple):
    """Is anybody there?"""

    request: int


class Pong(NamedTuple):
    """Answer: yes."""

    request: int


class Goodbye(NamedTuple):
    """The connection is being closed. `text` is for a log line."""

    reason: Reason
    text: str


Frame: TypeAlias = (
    Hello | Proof | Get | NotHere | Busy | Cancel | Cancelled | Hurry | Have | Held | Ping | Pong | Goodbye
)
"""Everything but CHUNK, whose body never becomes a frame in memory."""


def decode_head(buffer: bytearray, start: int) -> tuple[int, Kind, int]:
    """Length of the body, kind and request of the frame that begins at `start`.

    Raises:
        RemoteProtocolError: no frame begins like this, or its length is not possible for its kind.
    """
    size, number, zero, more_zero, request = _HEAD.unpack_from(buffer, start)
    if zero or more_zero:
        raise RemoteProtocolError("peer sent a frame with a bad head")
    if number == Kind.CHUNK:
        return size, Kind.CHUNK, request
    if number not in _BODIES:
        raise RemoteProtocolError(f"peer sent a frame of unknown kind {number}")
    kind = Kind(number)
    shortest, longest, _ = _BODIES[kind]
    if not shortest <= size <= longest:
        raise RemoteProtocolError(f"peer sent {kind.name} with {size} bytes")
    return size, kind, request


def decode_body(kind: Kind, request: int, body: bytes) -> Frame:
    """The frame that `decode_head` announced. Raises RemoteProtocolError."""
    return _BODIES[kind][2](request, body)


def _hello(_request: int, body: bytes) -> Hello:
    magic, oldest, newest, _features, node, _nonce = _HELLO.unpack(body)
    if magic != _MAGIC:
        raise RemoteProtocolError("peer does not speak the peer protocol")
    if node == _NO_HINT:
        raise RemoteProtocolError("peer has no node id")
    return Hello(oldest, newest, NodeId(node), body)


def _get(request: int, body: bytes) -> Get:
    swarm, epoch, stripe, hops, priority, count = _GET.unpack_from(body)
    if priority > Priority.BACKGROUND:
        raise RemoteProtocolError(f"peer asked with unknown priority {priority}")
    if request + count > 1 << 32:
        raise RemoteProtocolError("peer numbered its requests beyond 32 bits")
    return Get(request, Route(ImageId(swarm), epoch, stripe, hops, Priority(priority)), _ids(body, _GET.size, count))


def _busy(request: int, body: bytes) -> Busy:
    hint, retry_after_ms = _BUSY.unpack(body)
    return Busy(request, retry_after_ms / 1000, _hint(hint))


def _have(request: int, body: bytes) -> Have:
    swarm, count = _HAVE.unpack_from(body)
    return Have(request, ImageId(swarm), _ids(body, _HAVE.size, count))


def _goodbye(_request: int, body: bytes) -> Goodbye:
    (reason,) = _GOODBYE.unpack_from(body)
    # Whatever was sent, it must not forge lines of a log or move a terminal's cursor.
    text = "".join(c if c.isprintable() else "?" for c in body[_GOODBYE.size :].decode("utf-8", "replace"))
    return Goodbye(Reason(reason) if reason in set(Reason) else Reason.LEAVING, text)


def _hint(node: bytes) -> NodeId | None:
    return None if node == _NO_HINT else NodeId(node)


def _ids(body: bytes, start: int, count: int) -> list[ChunkId]:
    if not count or len(body) != start + count * DIGEST_BYTES:
        raise RemoteProtocolError(f"peer named {count} chunks in a frame of {len(body)} bytes")
    return [ChunkId(body[at : at + DIGEST_BYTES]) for at in range(start, len(body), DIGEST_BYTES)]


_MAX_IDS_BYTES: Final = MAX_BATCH * DIGEST_BYTES
_BODIES: Final[dict[int, tuple[int, int, Callable[[int, bytes], Frame]]]] = {
    # kind: least and most bytes of the body, decoder
    Kind.HELLO: (_HELLO.size, _HELLO.size, _hello),
    Kind.PROOF: (DIGEST_BYTES, DIGEST_BYTES, lambda _request, body: Proof(body)),
    Kind.GET: (_GET.size, _GET.size + _MAX_IDS_BYTES, _get),
    Kind.NOT_HERE: (NODE_ID_BYTES, NODE_ID_BYTES, lambda request, body: NotHere(request, _hint(body))),
    Kind.BUSY: (_BUSY.size, _BUSY.size, _busy),
    Kind.CANCEL: (0, 0, lambda request, _body: Cancel(request)),
    Kind.CANCELLED: (0, 0, lambda request, _body: Cancelled(request)),
    Kind.HAVE: (_HAVE.size, _HAVE.size + _MAX_IDS_BYTES, _have),
    Kind.HELD: (1, MAX_BATCH // 8, Held),
    Kind.PING: (0, 0, lambda request, _body: Ping(request)),
    Kind.PONG: (0, 0, lambda request, _body: Pong(request)),
    Kind.GOODBYE: (_GOODBYE.size, _GOODBYE.size + MAX_TEXT_BYTES, _goodbye),
    Kind.HURRY: (0, 0, lambda request, _body: Hurry(request)),
}
MAX_BODY_BYTES: Final = max(longest for _, longest, _ in _BODIES.values())
"""Of a frame that is not a CHUNK."""


def encode(kind: Kind, request: int = 0, body: bytes = b"") -> bytes:
    """A frame around a body."""
    return _HEAD.pack(len(body), kind, 0, 0, request) + body


def encode_chunk_head(request: int, size: int) -> bytes:
    """What comes before the `size` bytes of a chunk."""
    return _HEAD.pack(size, Kind.CHUNK, 0, 0, request)


def hello_body(node: NodeId, nonce: bytes) -> bytes:
    """Body of HELLO. No features are defined yet; the first will be TLS from here on."""
    return _HELLO.pack(_MAGIC, VERSION, VERSION, 0, node, nonce)


def encode_get(request: int, route: Route, chunk_ids: Sequence[ChunkId]) -> bytes:
    """A GET for `chunk_ids`."""
    head = _GET.pack(route.swarm, route.epoch, route.stripe, route.hops, route.priority, len(chunk_ids))
    return encode(Kind.GET, request, b"".join((head, *chunk_ids)))


def encode_not_here(request: int, hint: NodeId | None) -> bytes:
    """A NOT_HERE."""
    return encode(Kind.NOT_HERE, request, hint or _NO_HINT)


def encode_busy(request: int, retry_after_s: float, hint: NodeId | None) -> bytes:
    """A BUSY."""
    return encode(Kind.BUSY, request, _BUSY.pack(hint or _NO_HINT, min(int(retry_after_s * 1000), 0xFFFFFFFF)))


def encode_have(request: int, swarm: ImageId, chunk_ids: Sequence[ChunkId]) -> bytes:
    """A HAVE about `chunk_ids`."""
    return encode(Kind.HAVE, request, b"".join((_HAVE.pack(swarm, len(chunk_ids)), *chunk_ids)))


def encode_goodbye(reason: Reason, text: str = "") -> bytes:
    """A GOODBYE, its text cut to MAX_TEXT_BYTES."""
    return encode(Kind.GOODBYE, 0, _GOODBYE.pack(reason) + text.encode()[:MAX_TEXT_BYTES])
