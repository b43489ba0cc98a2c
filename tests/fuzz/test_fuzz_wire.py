"""Whatever a peer sends: frames, or RemoteProtocolError. No other exception, no memory that was not offered."""

import struct

from hypothesis import given
from hypothesis import strategies as st

from peer_bytes import GOOD, open_conversation, put
from vmthunder.peer.frames import RemoteProtocolError
from vmthunder.peer.wire import Conversation, Role

ROOM_BYTES = 128 << 10


def survive(conversation: Conversation, data: bytes) -> None:
    try:
        put(conversation, data)
    except RemoteProtocolError:
        return
    assert len(conversation.buffer()) <= ROOM_BYTES


@given(st.binary(max_size=4096))
def test_bytes_from_a_stranger(data: bytes) -> None:
    survive(Conversation(Role.LISTENER, bytes(32), b"listener".ljust(16), bytes(32)), data)  # type: ignore[arg-type]


@given(st.binary(max_size=4096))
def test_bytes_from_a_peer(data: bytes) -> None:
    survive(open_conversation(), data)


@given(st.lists(st.sampled_from(GOOD), max_size=20), st.lists(st.tuples(st.integers(0, 2000), st.binary(max_size=9))))
def test_good_frames_with_bytes_changed(good: list[bytes], changes: list[tuple[int, bytes]]) -> None:
    data = bytearray(b"".join(good))
    for at, change in changes:
        data[at : at + len(change)] = change
    survive(open_conversation(), bytes(data))


@given(st.lists(st.tuples(st.integers(0, 15), st.integers(0, 3), st.binary(max_size=300)), max_size=20))
def test_well_formed_heads_around_anything(told: list[tuple[int, int, bytes]]) -> None:
    head = struct.Struct("<IBBHI")
    survive(open_conversation(), b"".join(head.pack(len(body), kind, 0, 0, at) + body for kind, at, body in told))
