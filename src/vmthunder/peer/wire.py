"""A conversation between two peers: who it is, what may be said when, which answer belongs to which request. [pure]

Owns the handshake, the pairing of requests and answers, and the buffers that bytes are received into. Holds no socket,
clock or randomness: whoever owns the connection puts received bytes into `buffer()`, tells `received()` how many, acts
on the events it returns, and sends what the other methods return. Not thread-safe; one owner.

Bodies of chunks are received straight into a buffer of their own, and only if they were asked for and have exactly the
length that the manifest gives: nothing that the other side says can make us take memory that we did not offer.
"""

import hmac
from collections.abc import Sequence
from enum import Enum, auto
from typing import Final, NamedTuple, TypeAlias

from blake3 import blake3

from vmthunder.ids import DIGEST_BYTES, NODE_ID_BYTES, ChunkId, ImageId, NodeId
from vmthunder.peer import frames
from vmthunder.peer.frames import (
    HEAD_BYTES,
    MAX_BATCH,
    MAX_CHUNK_BYTES,
    NONCE_BYTES,
    VERSION,
    Busy,
    Cancel,
    Cancelled,
    Frame,
    Get,
    Goodbye,
    Have,
    Hello,
    Hurry,
    Kind,
    LocalProtocolError,
    NotHere,
    Ping,
    Pong,
    Proof,
    Reason,
    RemoteProtocolError,
    Route,
    WrongKey,
    WrongVersion,
)
from vmthunder.peer.key import KEY_BYTES

MAX_REQUESTS: Final = 1024  # chunks that each side may have asked for and not been answered
MAX_QUESTIONS: Final = 64  # the same for HAVE and PING

_SMALL_BYTES: Final = 16 << 10
assert frames.MAX_BODY_BYTES + HEAD_BYTES <= _SMALL_BYTES


class Role(Enum):
    """Which end of the connection this is. The two sign different words, so a proof cannot be sent back as one."""

    DIALER = b"dialer\0\0"
    LISTENER = b"listener"


class Reply(NamedTuple):
    """Not an event but an instruction: send this."""

    data: bytes


class Opened(NamedTuple):
    """The other side has the key, and this id."""

    node: NodeId


class Chunk(NamedTuple):
    """A chunk that we asked for. Its length is right; whether its bytes are is for the receiver to check."""

    request: int
    data: memoryview


class Held(NamedTuple):
    """Which of the chunks that we asked about the other side holds, in the order of asking."""

    request: int
    held: list[bool]


Event: TypeAlias = Reply | Opened | Chunk | Get | NotHere | Busy | Cancel | Hurry | Have | Held | Pong | Goodbye


class _State(Enum):
    HELLO = auto()
    PROOF = auto()
    OPEN = auto()
    CLOSED = auto()


class Conversation:
    """One connection, seen from one end."""

    def __init__(
        self, role: Role, key: bytes, node: NodeId, nonce: bytes, *, channel: bytes = bytes(DIGEST_BYTES)
    ) -> None:
        """`key` is from `cluster_key`, `node` is our id, `nonce` is 32 random bytes that were never used before.

        `channel` is signed too: with TLS below, what identifies the TLS connection goes there; zeros without.
        """
        wanted = (KEY_BYTES, NODE_ID_BYTES, NONCE_BYTES, DIGEST_BYTES)
        if tuple(map(len, (key, node, nonce, channel))) != wanted:
            raise LocalProtocolError("key, node id, nonce or channel of a peer connection has a wrong length")
        self.role = role
        self._key = key
        self._channel = channel
        self._node = node
        self._hello = frames.hello_body(node, nonce)
        self._their_hello: Hello | None = None
        self._state = _State.HELLO
        self._next_request = 1
        self._wanted: dict[int, int] = {}  # our requests for chunks → bytes to come
        self._cancelled: dict[int, int] = {}  # those that we no longer want; an answer is still on its way
        self._asked: dict[int, int] = {}  # our HAVEs → number of chunks
        self._pings: set[int] = set()
        self._owed: set[int] = set()  # their requests for chunks
        self._owed_held: dict[int, int] = {}  # their HAVEs → number of chunks
        self._small = bytearray(_SMALL_BYTES)
        self._small_view = memoryview(self._small)
        self._start = self._end = 0  # what of `_small` is received and not decoded
        self._body: bytearray | None = None  # the chunk that is being received, and room for the next head
        self._body_bytes = self._body_filled = self._body_request = 0

    @property
    def is_open(self) -> bool:
        """Whether requests can be sent."""
        return self._state is _State.OPEN

    @property
    def unanswered(self) -> int:
        """Requests of ours for chunks that have no answer yet, cancelled ones included."""
        return len(self._wanted) + len(self._cancelled)

    @property
    def owed(self) -> int:
        """Requests of the other side for chunks that we did not answer yet."""
        return len(self._owed)

    # Receiving

    def buffer(self) -> memoryview:
        """Where the next bytes from the other side go; never empty."""
        if self._body is not None:
            # With room for a head behind the body: of chunks back to back, each can be one read.
            return memoryview(self._body)[self._body_filled :]
        if self._start:
            self._small[: self._end - self._start] = self._small[self._start : self._end]
            self._end -= self._start
            self._start = 0
        return self._small_view[self._end :]

    def received(self, count: int) -> list[Event]:
        """What the `count` bytes that were put into `buffer()` say.

        Raises:
            RemoteProtocolError: this must not be said. The conversation is over; events of the same call are lost.
            LocalProtocolError: the conversation was over before.
        """
        if self._state is _State.CLOSED:
            raise LocalProtocolError("bytes were received after the end of a conversation")
        events: list[Event] = []
        try:
            if self._body is None:
                self._end += count
            else:
                self._body_filled += count
                if self._body_filled < self._body_bytes:
                    return events
                self._finish_body(self._body, events)
            while self._end - self._start >= HEAD_BYTES and self._decode(events):
                pass
        except RemoteProtocolError:
            self.close()
            raise
        return events

    def close(self) -> None:
        """Nothing more will be said. Idempotent."""
        self._state = _State.CLOSED
        self._body = None

    def _finish_body(self, body: bytearray, events: list[Event]) -> None:
        size, rest = self._body_bytes, self._body_filled - self._body_bytes
        self._small[:rest] = body[size : size + rest]
        self._start, self._end = 0, rest
        self._body = None
        self._deliver(self._body_request, memoryview(body)[:size], events)

    def _deliver(self, request: int, data: memoryview, events: list[Event]) -> None:
        if self._wanted.pop(request, None) is not None:
            events.append(Chunk(request, data.toreadonly()))
        else:
            del self._cancelled[request]

    def _decode(self, events: list[Event]) -> bool:
        """Decode one frame; False if that takes more bytes, or there is nothing more to hear."""
        size, kind, request = frames.decode_head(self._small, self._start)
        start = self._start + HEAD_BYTES
        if kind is Kind.CHUNK:
            return self._begin_body(request, size, start, events)
        if self._state is not _ONLY_IN.get(kind, _State.OPEN) and kind is not Kind.GOODBYE:
            raise RemoteProtocolError(f"peer sent {kind.name} at a wrong time")
        if self._end - start < size:
            return False
        self._start = start + size
        self._hear(frames.decode_body(kind, request, bytes(self._small_view[start : start + size])), events)
        return self._state is not _State.CLOSED

    def _begin_body(self, request: int, size: int, start: int, events: list[Event]) -> bool:
        expected = self._wanted.get(request) or self._cancelled.get(request)
        if self._state is not _State.OPEN or expected is None:
            raise RemoteProtocolError("peer sent a chunk that it was not asked for")
        if size != expected:
            raise RemoteProtocolError(f"peer sent a chunk of {size} bytes instead of {expected}")
        here = min(size, self._end - start)
        self._start = start + here
        if here == size:
            self._deliver(request, memoryview(bytes(self._small_view[start : start + size])), events)
            return True
        self._body = bytearray(size + HEAD_BYTES)
        self._body[:here] = self._small_view[start : start + here]
        self._body_bytes, self._body_filled, self._body_request = size, here, request
        return False

    def _hear(self, frame: Frame, events: list[Event]) -> None:
        match frame:
            case Get(request, _, chunk_ids):
                requests = range(request, request + len(chunk_ids))
                if not self._owed.isdisjoint(requests):
                    raise RemoteProtocolError("peer used the number of a request twice")
                if len(self._owed) + len(requests) > MAX_REQUESTS:
                    raise RemoteProtocolError(f"peer has more than {MAX_REQUESTS} requests unanswered")
                self._owed.update(requests)
                events.append(frame)
            case NotHere(request) | Busy(request):
                if self._cancelled.pop(request, None) is None:
                    if self._wanted.pop(request, None) is None:
                        raise RemoteProtocolError("peer answered a request that it was not sent")
                    events.append(frame)
            case Cancelled(request):
                if self._cancelled.pop(request, None) is None:
                    raise RemoteProtocolError("peer cancelled a request that it was not asked to cancel")
            case Cancel(request) | Hurry(request):
                if request in self._owed:  # otherwise it crossed with our answer
                    events.append(frame)
            case Have(request, _, chunk_ids):
                if request in self._owed_held or len(self._owed_held) >= MAX_QUESTIONS:
                    raise RemoteProtocolError("peer asks too often what is held here")
                self._owed_held[request] = len(chunk_ids)
                events.append(frame)
            case frames.Held(request, packed):
                count, bits = self._asked.pop(request, None), int.from_bytes(packed, "little")
                if count is None or len(packed) != (count + 7) // 8 or bits >> count:
                    raise RemoteProtocolError("peer said what it holds, but not what it was asked about")
                events.append(Held(request, [bool(bits >> at & 1) for at in range(count)]))
            case Ping(request):
                events.append(Reply(frames.encode(Kind.PONG, request)))
            case Pong(request):
                if request not in self._pings:
                    raise RemoteProtocolError("peer answered a ping that it was not sent")
                self._pings.remove(request)
                events.append(frame)
            case Hello():
                self._hear_hello(frame, events)
            case Proof(mac):
                self._hear_proof(mac, events)
            case Goodbye():
                events.append(frame)
                self.close()

    def _hear_hello(self, hello: Hello, events: list[Event]) -> None:
        if not hello.oldest <= VERSION <= hello.newest:
            theirs = f"{hello.oldest} to {hello.newest}"
            raise WrongVersion(
                f"peer speaks versions {theirs} of the peer protocol, and we speak {VERSION}; upgrade one"
            )
        if hello.node == self._node:
            raise RemoteProtocolError("peer has our own node id; no two nodes may share a state directory")
        self._their_hello = hello
        self._state = _State.PROOF
        if self.role is Role.DIALER:
            # Who dials proves first: a stranger that dials us gets nothing that was made with the key.
            events.append(Reply(frames.encode(Kind.PROOF, 0, self._proof(Role.DIALER, hello))))

    def _hear_proof(self, mac: bytes, events: list[Event]) -> None:
        hello = self._their_hello
        assert hello is not None
        theirs = Role.LISTENER if self.role is Role.DIALER else Role.DIALER
        if not hmac.compare_digest(mac, self._proof(theirs, hello)):
            raise WrongKey("peer has another cluster key; give all nodes the same key file")
        if self.role is Role.LISTENER:
            events.append(Reply(frames.encode(Kind.PROOF, 0, self._proof(Role.LISTENER, hello))))
        self._state = _State.OPEN
        events.append(Opened(hello.node))

    def _proof(self, role: Role, theirs: Hello) -> bytes:
        hellos = (self._hello, theirs.body) if self.role is Role.DIALER else (theirs.body, self._hello)
        return blake3(b"".join((role.value, self._channel, *hellos)), key=self._key).digest()

    # Sending

    def hello(self) -> bytes:
        """The first thing that each side sends."""
        return frames.encode(Kind.HELLO, 0, self._hello)

    def get(self, route: Route, chunks: Sequence[tuple[ChunkId, int]]) -> tuple[range, bytes]:
        """Ask for chunks, each given with its encoded length; returns the numbers of the requests and what to send.

        Raises:
            LocalProtocolError: not open, too many chunks at once, or more than MAX_REQUESTS unanswered.
        """
        count = len(chunks)
        if not 1 <= count <= MAX_BATCH or self.unanswered + count > MAX_REQUESTS:
            raise LocalProtocolError(f"{count} chunks cannot be asked for while {self.unanswered} are unanswered")
        if not all(0 < size <= MAX_CHUNK_BYTES for _, size in chunks):
            raise LocalProtocolError("a chunk that is empty or too large cannot be asked for")
        requests = self._number(count)
        self._wanted.update(zip(requests, (size for _, size in chunks), strict=True))
        return requests, frames.encode_get(requests.start, route, [chunk_id for chunk_id, _ in chunks])

    def cancel(self, request: int) -> bytes:
        """Give up a request: its answer will be no event. Returns what to send, nothing if it was answered already."""
        size = self._wanted.pop(request, None)
        if size is None or self._state is not _State.OPEN:
            return b""
        self._cancelled[request] = size
        return frames.encode(Kind.CANCEL, request)

    def hurry(self, request: int) -> bytes:
        """Let a request be one that a guest waits for. Returns what to send, nothing if it was answered already."""
        if request not in self._wanted or self._state is not _State.OPEN:
            return b""
        return frames.encode(Kind.HURRY, request)

    def chunk(self, request: int, size: int) -> bytes:
        """Answer with a chunk: what to send before its `size` bytes. Raises LocalProtocolError if no answer is owed."""
        self._answer(request)
        return frames.encode_chunk_head(request, size)

    def not_here(self, request: int, hint: NodeId | None = None) -> bytes:
        """Answer that the chunk cannot be had here, and who may have it."""
        self._answer(request)
        return frames.encode_not_here(request, hint)

    def busy(self, request: int, retry_after_s: float, hint: NodeId | None = None) -> bytes:
        """Answer that the chunk would take too long, when to ask again, and whom to ask now."""
        self._answer(request)
        return frames.encode_busy(request, retry_after_s, hint)

    def cancelled(self, request: int) -> bytes:
        """Answer that a cancelled request needs no chunk."""
        self._answer(request)
        return frames.encode(Kind.CANCELLED, request)

    def have(self, swarm: ImageId, chunk_ids: Sequence[ChunkId]) -> tuple[int, bytes]:
        """Ask which chunks the other side holds; returns the number of the request and what to send."""
        if not 1 <= len(chunk_ids) <= MAX_BATCH or len(self._asked) >= MAX_QUESTIONS:
            raise LocalProtocolError(f"{len(chunk_ids)} chunks cannot be asked about now")
        request = self._number(1).start
        self._asked[request] = len(chunk_ids)
        return request, frames.encode_have(request, swarm, chunk_ids)

    def held(self, request: int, held: Sequence[bool]) -> bytes:
        """Answer a HAVE."""
        if self._state is not _State.OPEN or self._owed_held.get(request) != len(held):
            raise LocalProtocolError(f"request {request} does not ask about {len(held)} chunks")
        del self._owed_held[request]
        bits = sum(1 << at for at, here in enumerate(held) if here)
        return frames.encode(Kind.HELD, request, bits.to_bytes((len(held) + 7) // 8, "little"))

    def ping(self) -> tuple[int, bytes]:
        """Ask whether the other side is alive; returns the number of the request and what to send."""
        if len(self._pings) >= MAX_QUESTIONS:
            raise LocalProtocolError("too many pings are unanswered")
        request = self._number(1).start
        self._pings.add(request)
        return request, frames.encode(Kind.PING, request)

    def goodbye(self, reason: Reason, text: str = "") -> bytes:
        """The last thing to send, also after an error."""
        self.close()
        return frames.encode_goodbye(reason, text)

    def _number(self, count: int) -> range:
        if self._state is not _State.OPEN:
            raise LocalProtocolError("nothing can be asked on a peer connection that is not open")
        if self._next_request + count > 1 << 32:
            self._next_request = 1
        first = self._next_request
        self._next_request += count
        return range(first, first + count)

    def _answer(self, request: int) -> None:
        if self._state is not _State.OPEN or request not in self._owed:
            raise LocalProtocolError(f"no answer to request {request} is owed")
        self._owed.remove(request)


_ONLY_IN: Final = {Kind.HELLO: _State.HELLO, Kind.PROOF: _State.PROOF}
