"""Bytes and conversations for tests of the peer protocol."""

from vmthunder.ids import ChunkId, ImageId, NodeId
from vmthunder.peer import frames
from vmthunder.peer.frames import Kind, Priority, Reason, Route
from vmthunder.peer.wire import Conversation, Event, Reply, Role

ROUTE = Route(ImageId(bytes(32)), 1, 2, 3, Priority.DEMAND)
CHUNKS = [ChunkId(bytes([number]) * 32) for number in range(4)]
GOOD = [
    frames.encode_get(1, ROUTE, CHUNKS),
    frames.encode_chunk_head(1, 100) + bytes(100),
    frames.encode_not_here(2, NodeId(b"n" * 16)),
    frames.encode_busy(3, 0.5, None),
    frames.encode(Kind.CANCEL, 1),
    frames.encode_have(9, ROUTE.swarm, CHUNKS),
    frames.encode(Kind.PING, 4),
    frames.encode(Kind.HELD, 5, b"\x05"),
    frames.encode(Kind.PONG, 6),
    frames.encode_goodbye(Reason.LEAVING, "bye"),
]
"""Frames that a peer may send to `open_conversation()`, each once."""


def put(conversation: Conversation, data: bytes, step: int = 1 << 30) -> list[Event]:
    """Let bytes arrive, at most `step` at a time."""
    events: list[Event] = []
    while data:
        room = conversation.buffer()
        count = min(len(room), len(data), step)
        room[:count] = data[:count]
        events += conversation.received(count)
        if events and isinstance(events[-1], frames.Goodbye):
            break
        data = data[count:]
    return events


def open_conversation() -> Conversation:
    """A conversation that waits for answers to requests 1 to 4, a HAVE of four chunks and a PING."""
    here = Conversation(Role.DIALER, bytes(32), NodeId(b"h" * 16), b"1" * 32)
    there = Conversation(Role.LISTENER, bytes(32), NodeId(b"t" * 16), b"2" * 32)
    put(there, here.hello())
    for event in put(here, there.hello()):
        assert isinstance(event, Reply)
        for answer in put(there, event.data):
            if isinstance(answer, Reply):
                put(here, answer.data)
    assert here.is_open
    here.get(ROUTE, [(chunk_id, 100) for chunk_id in CHUNKS])
    here.have(ROUTE.swarm, CHUNKS)
    here.ping()
    return here
