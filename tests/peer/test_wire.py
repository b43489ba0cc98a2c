"""The peer protocol without sockets: two conversations that hand each other bytes."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peer_bytes import put as feed
from vmthunder.ids import ChunkId, ImageId, NodeId
from vmthunder.peer import frames
from vmthunder.peer.frames import (
    HEAD_BYTES,
    MAX_BATCH,
    Busy,
    Cancel,
    Get,
    Goodbye,
    Have,
    Kind,
    LocalProtocolError,
    NotHere,
    Pong,
    Priority,
    Reason,
    RemoteProtocolError,
    Route,
    WrongKey,
    WrongVersion,
)
from vmthunder.peer.key import cluster_key
from vmthunder.peer.wire import MAX_REQUESTS, Chunk, Conversation, Held, Opened, Reply, Role

KEY = cluster_key(b"secret of this cluster")
ALICE, BOB, CAROL = (NodeId(name.ljust(16, b".")) for name in (b"alice", b"bob", b"carol"))
SWARM = ImageId(b"image".ljust(32, b"."))
ROUTE = Route(SWARM, epoch=7, stripe=3, hops=2, priority=Priority.BACKGROUND)


def chunk_id(number: int) -> ChunkId:
    return ChunkId(number.to_bytes(32, "big"))


def pair(key: bytes = KEY) -> tuple[Conversation, Conversation]:
    return Conversation(Role.DIALER, KEY, ALICE, b"a" * 32), Conversation(Role.LISTENER, key, BOB, b"b" * 32)


def opened() -> tuple[Conversation, Conversation]:
    alice, bob = pair()
    feed(bob, alice.hello())
    (proof,) = feed(alice, bob.hello())
    assert isinstance(proof, Reply)
    answer, opening = feed(bob, proof.data)
    assert isinstance(answer, Reply)
    assert opening == Opened(ALICE)
    assert feed(alice, answer.data) == [Opened(BOB)]
    assert alice.is_open
    assert bob.is_open
    return alice, bob


def test_two_sides_with_one_key_learn_each_others_id() -> None:
    opened()


def test_a_listener_with_another_key_refuses_the_dialer() -> None:
    alice, bob = pair(key=cluster_key(b"another secret"))
    feed(bob, alice.hello())
    (proof,) = feed(alice, bob.hello())
    assert isinstance(proof, Reply)
    with pytest.raises(WrongKey, match="another cluster key") as caught:
        feed(bob, proof.data)
    assert feed(alice, bob.goodbye(caught.value.reason, str(caught.value)))[0].reason is Reason.WRONG_KEY  # type: ignore[union-attr]


def test_a_stranger_that_sends_our_own_proof_back_is_refused() -> None:
    alice, _ = pair()
    mirror = Conversation(Role.LISTENER, bytes(32), BOB, b"b" * 32)
    (proof,) = feed(alice, mirror.hello())
    assert isinstance(proof, Reply)
    with pytest.raises(WrongKey):
        feed(alice, proof.data)


def test_a_listener_proves_nothing_to_whoever_did_not_prove_first() -> None:
    alice, bob = pair()
    assert feed(bob, alice.hello()) == []


def test_a_proof_is_of_no_use_in_another_connection() -> None:
    alice, bob = pair()
    feed(bob, alice.hello())
    (proof,) = feed(alice, bob.hello())
    assert isinstance(proof, Reply)
    again = Conversation(Role.LISTENER, KEY, BOB, b"c" * 32)
    feed(again, alice.hello())
    with pytest.raises(WrongKey):
        feed(again, proof.data)


def test_a_proof_is_bound_to_the_channel_below() -> None:
    alice = Conversation(Role.DIALER, KEY, ALICE, b"a" * 32, channel=b"1" * 32)
    bob = Conversation(Role.LISTENER, KEY, BOB, b"b" * 32, channel=b"2" * 32)
    feed(bob, alice.hello())
    (proof,) = feed(alice, bob.hello())
    assert isinstance(proof, Reply)
    with pytest.raises(WrongKey):
        feed(bob, proof.data)


def test_a_peer_of_another_version_is_told_which() -> None:
    alice, bob = pair()
    hello = bytearray(alice.hello())
    struct.pack_into("<HH", hello, HEAD_BYTES + 8, 2, 9)
    with pytest.raises(WrongVersion, match="2 to 9"):
        feed(bob, bytes(hello))


def test_a_newer_peer_that_still_speaks_our_version_is_welcome() -> None:
    alice, bob = pair()
    hello = bytearray(alice.hello())
    struct.pack_into("<HH", hello, HEAD_BYTES + 8, 1, 9)
    assert feed(bob, bytes(hello)) == []


@pytest.mark.parametrize(
    "noise",
    [
        b"GET / HTTP/1.1\r\nHost: node\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(40),
        b"\xff" * 64,
        frames.encode(Kind.PING, 1),
        frames.encode(Kind.HELLO, 0, b"x" * frames.HELLO_BYTES),
        frames.encode_chunk_head(1, 65536),
    ],
)
def test_whoever_does_not_begin_with_hello_is_refused(noise: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        feed(pair()[1], noise)


def test_a_node_that_reaches_itself_is_refused() -> None:
    alice, _ = pair()
    itself = Conversation(Role.LISTENER, KEY, ALICE, b"b" * 32)
    with pytest.raises(RemoteProtocolError, match="our own node id"):
        feed(itself, alice.hello())


@pytest.mark.parametrize("step", [1, 7, 1000, 1 << 30])
def test_a_batch_is_answered_in_any_order_however_the_bytes_arrive(step: int) -> None:
    alice, bob = opened()
    bodies = [bytes([number]) * size for number, size in enumerate((1, 11, 5000, 20_000, 70_000))]
    requests, data = alice.get(ROUTE, [(chunk_id(number), len(body)) for number, body in enumerate(bodies)])
    (get,) = feed(bob, data, step)
    assert get == Get(requests.start, ROUTE, [chunk_id(number) for number in range(5)])
    answers = b"".join(bob.chunk(requests[at], len(bodies[at])) + bodies[at] for at in (4, 0, 1, 3, 2))
    events = feed(alice, answers, step)
    assert [(event.request, bytes(event.data)) for event in events if isinstance(event, Chunk)] == [
        (requests[at], bodies[at]) for at in (4, 0, 1, 3, 2)
    ]
    assert alice.unanswered == bob.owed == 0


def test_the_bodies_of_chunks_back_to_back_are_received_in_place() -> None:
    alice, bob = opened()
    size = 65536
    requests, data = alice.get(ROUTE, [(chunk_id(number), size) for number in range(4)])
    feed(bob, data)
    stream = b"".join(bob.chunk(request, size) + bytes(size) for request in requests)
    reads = 0
    while stream:
        room = alice.buffer()
        count = min(len(room), len(stream))
        room[:count] = stream[:count]
        alice.received(count)
        stream = stream[count:]
        reads += 1
    assert reads == 5  # the first fills the small buffer, then one for each


def test_who_cannot_serve_says_so_and_names_another() -> None:
    alice, bob = opened()
    requests, data = alice.get(ROUTE, [(chunk_id(number), 100) for number in range(4)])
    feed(bob, data)
    answers = (
        bob.not_here(requests[0], CAROL) + bob.not_here(requests[1]) + bob.busy(requests[2], 0.25, CAROL)
        + bob.busy(requests[3], 1e9)
    )  # fmt: skip
    assert feed(alice, answers) == [
        NotHere(requests[0], CAROL),
        NotHere(requests[1], None),
        Busy(requests[2], 0.25, CAROL),
        Busy(requests[3], 4294967.295, None),
    ]


def test_a_cancelled_request_is_answered_once_and_nobody_hears_of_it() -> None:
    alice, bob = opened()
    requests, data = alice.get(ROUTE, [(chunk_id(number), 100_000) for number in range(3)])
    feed(bob, data)
    cancels = b"".join(map(alice.cancel, requests))
    assert alice.cancel(requests[0]) == b""
    assert alice.unanswered == 3
    crossing = bob.chunk(requests[0], 100_000) + bytes(100_000) + bob.not_here(requests[1])
    assert feed(bob, cancels) == [Cancel(requests[2])]
    assert feed(alice, crossing + bob.cancelled(requests[2])) == []
    assert alice.unanswered == 0


def test_a_request_cancelled_while_its_body_arrives_is_dropped() -> None:
    alice, bob = opened()
    requests, data = alice.get(ROUTE, [(chunk_id(1), 100_000)])
    feed(bob, data)
    stream = bob.chunk(requests[0], 100_000) + bytes(100_000)
    assert feed(alice, stream[:50_000]) == []
    alice.cancel(requests[0])
    assert feed(alice, stream[50_000:]) == []
    assert alice.unanswered == 0


def test_questions_about_what_is_held_are_answered_bit_by_bit() -> None:
    alice, bob = opened()
    held = [number % 3 == 0 for number in range(13)]
    request, data = alice.have(SWARM, [chunk_id(number) for number in range(13)])
    assert feed(bob, data) == [Have(request, SWARM, [chunk_id(number) for number in range(13)])]
    assert feed(alice, bob.held(request, held)) == [Held(request, held)]


@pytest.mark.parametrize("bits", [b"\x08", b"\x07\x00"])
def test_an_answer_about_more_than_was_asked_is_refused(bits: bytes) -> None:
    alice, _ = opened()
    request, _ = alice.have(SWARM, [chunk_id(number) for number in range(3)])
    with pytest.raises(RemoteProtocolError, match="not what it was asked"):
        feed(alice, frames.encode(Kind.HELD, request, bits))


def test_a_ping_is_answered_by_itself() -> None:
    alice, bob = opened()
    request, data = alice.ping()
    (pong,) = feed(bob, data)
    assert isinstance(pong, Reply)
    assert feed(alice, pong.data) == [Pong(request)]


def test_goodbye_ends_the_conversation_and_its_text_is_fit_for_a_log() -> None:
    alice, bob = opened()
    assert feed(alice, bob.goodbye(Reason.LEAVING, "so long\n\x1b[2J")) == [Goodbye(Reason.LEAVING, "so long??[2J")]
    assert not alice.is_open
    with pytest.raises(LocalProtocolError):
        alice.get(ROUTE, [(chunk_id(1), 1)])


def test_the_bytes_are_those_of_docs_wire() -> None:
    assert frames.encode_get(5, ROUTE, [chunk_id(1)]).hex() == (
        "4a000000 03 000000 05000000".replace(" ", "")
        + SWARM.hex()
        + "07000000 0300 02 01 0100".replace(" ", "")
        + chunk_id(1).hex()
    )
    assert frames.encode_chunk_head(6, 65536).hex() == "000001000400000006000000"
    assert frames.encode_busy(7, 0.25, CAROL).hex() == "140000000600000007000000" + CAROL.hex() + "fa000000"
    assert frames.encode_goodbye(Reason.LIED, "no").hex() == "040000000d0000000000000005006e6f"
    assert pair()[0].hello().hex() == (
        "40000000 01 000000 00000000 564d54504545520a 0100 0100 00000000".replace(" ", "") + ALICE.hex() + "61" * 32
    )


def test_the_handshake_is_that_of_docs_wire() -> None:
    alice, bob = pair()
    feed(bob, alice.hello())
    (proof,) = feed(alice, bob.hello())
    assert isinstance(proof, Reply)
    assert KEY.hex() == "8a9336ad06457978e140a9262564fa3d6b509c0645f294278486ace1e6d6e0eb"
    assert proof.data[HEAD_BYTES:].hex() == "b9b336a20a8ebd30ed3590640078a6d774aa096802e2c73ad4f998b0709f5154"


REFUSED = {
    "a chunk nobody asked for": lambda: frames.encode_chunk_head(99, 100),
    "a chunk of another length": lambda: frames.encode_chunk_head(1, 101),
    "a chunk that would fill the memory": lambda: frames.encode_chunk_head(1, 0xFFFFFFFF),
    "an answer to nothing": lambda: frames.encode_not_here(99, None),
    "a cancellation nobody asked for": lambda: frames.encode(Kind.CANCELLED, 1),
    "a second hello": lambda: frames.encode(Kind.HELLO, 0, frames.hello_body(BOB, bytes(32))),
    "a second proof": lambda: frames.encode(Kind.PROOF, 0, bytes(32)),
    "a pong to no ping": lambda: frames.encode(Kind.PONG, 1),
    "an answer about nothing": lambda: frames.encode(Kind.HELD, 1, b"\1"),
    "an unknown kind": lambda: struct.pack("<IBBHI", 0, 200, 0, 0, 0),
    "a head that is not zero where it must be": lambda: struct.pack("<IBBHI", 0, Kind.PING, 1, 0, 0),
    "a ping with a body": lambda: frames.encode(Kind.PING, 1, b"x"),
    "a GET without chunks": lambda: frames.encode_get(1, ROUTE, []),
    "a GET with too many chunks": lambda: frames.encode_get(1, ROUTE, [chunk_id(1)] * (MAX_BATCH + 1)),
    "a GET that says more than it holds": lambda: frames.encode_get(1, ROUTE, [chunk_id(1)] * 2)[:-32].replace(
        struct.pack("<I", 42 + 64), struct.pack("<I", 42 + 32), 1
    ),
    "a GET of unknown priority": lambda: frames.encode_get(1, ROUTE._replace(priority=7), [chunk_id(1)]),  # type: ignore[arg-type]
    "a GET numbered beyond 32 bits": lambda: frames.encode_get(0xFFFFFFFF, ROUTE, [chunk_id(1)] * 2),
    "one number twice": lambda: frames.encode_get(1, ROUTE, [chunk_id(1)]) * 2,
    "more requests than may be open": lambda: b"".join(
        frames.encode_get(first, ROUTE, [chunk_id(1)] * MAX_BATCH) for first in range(1, MAX_REQUESTS + 2, MAX_BATCH)
    ),
    "questions without end": lambda: b"".join(frames.encode_have(at, SWARM, [chunk_id(1)]) for at in range(100)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_must_not_be_said_ends_the_conversation(what: str) -> None:
    alice, _ = opened()
    alice.get(ROUTE, [(chunk_id(1), 100)])
    with pytest.raises(RemoteProtocolError):
        feed(alice, REFUSED[what]())
    assert not alice.is_open
    with pytest.raises(LocalProtocolError):
        feed(alice, frames.encode(Kind.PING, 1))


def test_an_oversized_length_is_refused_before_memory_is_taken() -> None:
    alice, _ = opened()
    alice.get(ROUTE, [(chunk_id(1), 100)])
    with pytest.raises(RemoteProtocolError, match="instead of 100"):
        feed(alice, frames.encode_chunk_head(1, 1 << 31))
    assert len(alice.buffer()) <= 16 << 10


def test_our_own_mistakes_change_nothing() -> None:
    alice, bob = opened()
    mistakes = [
        lambda: alice.get(ROUTE, []),
        lambda: alice.get(ROUTE, [(chunk_id(1), 1)] * (MAX_BATCH + 1)),
        lambda: alice.get(ROUTE, [(chunk_id(1), 0)]),
        lambda: alice.get(ROUTE, [(chunk_id(1), 5 << 20)]),
        lambda: alice.chunk(1, 100),
        lambda: alice.not_here(1),
        lambda: alice.held(1, [True]),
        lambda: alice.have(SWARM, []),
    ]
    for mistake in mistakes:
        with pytest.raises(LocalProtocolError):
            mistake()
    for _ in range(MAX_REQUESTS // MAX_BATCH):
        alice.get(ROUTE, [(chunk_id(1), 1)] * MAX_BATCH)
    with pytest.raises(LocalProtocolError):
        alice.get(ROUTE, [(chunk_id(1), 1)])
    assert bob.owed == 0


WAYS = st.sampled_from(["chunk", "not here", "busy", "cancelled"])


@given(st.lists(st.tuples(st.integers(1, 60_000), WAYS), max_size=12), st.integers(1, 30_000))
def test_every_request_gets_exactly_one_answer(script: list[tuple[int, str]], step: int) -> None:
    alice, bob = opened()
    stream = b""
    expected = []
    for number, (size, way) in enumerate(script):
        (request,), data = alice.get(ROUTE, [(chunk_id(number), size)])
        feed(bob, data, step)
        if way == "cancelled":
            feed(bob, alice.cancel(request), step)
            stream += bob.cancelled(request)
            continue
        expected.append(request)
        if way == "chunk":
            stream += bob.chunk(request, size) + bytes(size)
        else:
            stream += bob.not_here(request) if way == "not here" else bob.busy(request, 1)
    events = feed(alice, stream, step)
    assert [event.request for event in events if isinstance(event, Chunk | NotHere | Busy)] == expected
    assert alice.unanswered == bob.owed == 0
