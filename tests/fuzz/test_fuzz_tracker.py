"""Whatever an agent or a tracker sends: a message, or BadMessage. No other exception."""

import json
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmthunder.ids import ImageId, NodeId
from vmthunder.swarm.tracker import Tracker
from vmthunder.swarm.view import (
    BadMessage,
    Delta,
    Join,
    Joined,
    Leave,
    Left,
    Member,
    Poll,
    Roster,
    Snapshot,
    Version,
    decode_join,
    decode_leave,
    decode_poll,
    decode_update,
    decode_updates,
    encode_join,
    encode_leave,
    encode_poll,
    encode_updates,
)

NODES = st.binary(min_size=16, max_size=16).map(NodeId)
IMAGES = st.binary(min_size=32, max_size=32).map(ImageId)
MEMBERS = st.builds(
    Member,
    NODES,
    st.sampled_from(["", "r1", "rack ü"]),
    st.sampled_from(["10.0.0.1", "node-1.lan"]),
    st.integers(1, 65535),
)
VERSIONS = st.builds(Version, st.integers(0, (1 << 63) - 1), st.integers(0, (1 << 32) - 1))
SNAPSHOTS = st.builds(
    lambda version, members: Snapshot(version, 2, 3, tuple(members)),
    VERSIONS,
    st.lists(MEMBERS, max_size=5, unique_by=lambda member: member.node),
)
CHANGES = st.one_of(st.builds(Joined, MEMBERS), st.builds(Left, NODES))
DELTAS = st.builds(
    lambda version, changes: Delta(version, version.epoch // 2, tuple(changes)), VERSIONS, st.lists(CHANGES, max_size=5)
)
JOINS = st.builds(Join, IMAGES, MEMBERS, st.none() | SNAPSHOTS)
POLLS = st.builds(Poll, NODES, st.dictionaries(IMAGES, VERSIONS, max_size=3))
IDS = ["00" * 16, "11" * 32]
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=70), st.sampled_from(IDS)),
    lambda inner: st.lists(inner, max_size=5)
    | st.dictionaries(
        st.sampled_from(
            ["swarm", "member", "view", "node", "versions", "term", "epoch", "since", "changes", "members", "stripes",
             "fanout", "joined", "left", "11" * 32]
        ),
        inner,
        max_size=6,
    ),
    max_leaves=20,
)  # fmt: skip
DECODERS: list[Callable[[bytes], object]] = [
    decode_join,
    decode_leave,
    decode_poll,
    decode_updates,
    lambda text: decode_update(json.loads(text)),
]


@given(JOINS)
def test_an_announcement_survives_the_network(join: Join) -> None:
    assert decode_join(json.dumps(encode_join(join)).encode()) == join


@given(POLLS)
def test_a_poll_survives_the_network(poll: Poll) -> None:
    assert decode_poll(json.dumps(encode_poll(poll)).encode()) == poll


@given(st.builds(Leave, IMAGES, NODES))
def test_a_good_bye_survives_the_network(leave: Leave) -> None:
    assert decode_leave(json.dumps(encode_leave(leave)).encode()) == leave


@given(st.dictionaries(IMAGES, st.none() | SNAPSHOTS | DELTAS, max_size=3))
def test_an_answer_survives_the_network(updates: dict[ImageId, Snapshot | Delta | None]) -> None:
    assert decode_updates(json.dumps(encode_updates(updates.items())).encode()) == updates


@pytest.mark.parametrize("decode", DECODERS[:4])
@given(text=st.binary(max_size=300))
def test_noise_is_refused(decode: Callable[[bytes], object], text: bytes) -> None:
    try:
        decode(text)
    except BadMessage:
        pass


@pytest.mark.parametrize("decode", DECODERS)
@given(value=JSON)
def test_json_of_any_shape_is_taken_or_refused(decode: Callable[[bytes], object], value: object) -> None:
    try:
        decode(json.dumps(value).encode())
    except BadMessage:
        pass


@pytest.mark.parametrize("text", [b"[" * 100_000, b'{"a":' * 100_000, b"9" * 10_000, b"\xff\xfe", b"NaN"])
@pytest.mark.parametrize("decode", DECODERS[:4])
def test_json_that_breaks_decoders_is_refused(decode: Callable[[bytes], object], text: bytes) -> None:
    with pytest.raises(BadMessage):
        decode(text)


@given(JOINS, POLLS)
def test_a_tracker_survives_every_message_that_was_taken(join: Join, poll: Poll) -> None:
    tracker = Tracker(1, stripes=2, fanout=3)
    tracker.join(join, 0, 0)
    view = tracker.views()[join.swarm]
    tracker.poll(poll, 1, 0)
    tracker.poll(poll._replace(node=join.member.node), 2, 0)
    tracker.tick(1)
    tracker.tick(1000)
    assert Roster().update(view)


@given(DELTAS)
def test_changes_that_do_not_fit_are_not_followed(delta: Delta) -> None:
    roster = Roster(2, 3)
    assert roster.update(delta) == (delta.version.term == 0 and delta.since == 0)
