"""The live profile: who is told what in a storm."""

import random

from hypothesis import given
from hypothesis import strategies as st

from vmthunder.ids import ImageId, NodeId
from vmthunder.profile.live import CALLS_PER_S, FORGET_S, MAX_IMAGES, MAX_NODES, SOONEST_S, Live, LiveAnswer, LiveCall
from vmthunder.profile.profile import MAX_ENTRIES

IMAGE = ImageId(b"i" * 32)


def node(number: int) -> NodeId:
    return NodeId(number.to_bytes(16, "little"))


class Caller:
    """A node as it should behave."""

    def __init__(self, number: int) -> None:
        self.node = node(number)
        self.cursor = 0
        self.sent: list[int] = []
        self.told: list[int] = []

    def call(self, live: Live, touched: list[int], now: float = 0.0) -> LiveAnswer:
        answer = live.call(IMAGE, LiveCall(self.node, self.cursor, touched), now)
        self.cursor = answer.cursor
        self.sent += touched
        self.told += answer.others
        return answer


calls = st.lists(st.tuples(st.integers(0, 3), st.lists(st.integers(0, 15), unique=True, max_size=6)), max_size=30)


@given(calls)
def test_each_node_is_told_once_what_others_touched_first_and_in_that_order(steps: list[tuple[int, list[int]]]) -> None:
    live = Live(1)
    callers = [Caller(number) for number in range(4)]
    order: list[int] = []
    for number, touched in steps:
        callers[number].call(live, [index for index in touched if index not in callers[number].sent])
        order += [index for index in touched if index not in order]
    for caller in callers:
        caller.call(live, [])
        assert len(set(caller.told)) == len(caller.told)
        assert caller.told == [index for index in order if index in set(caller.told)]
        assert set(caller.told) | set(caller.sent) == set(order)


def test_a_node_is_not_told_what_it_touched_itself() -> None:
    live = Live(1)
    first, second = Caller(1), Caller(2)
    first.call(live, [1, 2, 3])
    second.call(live, [2, 9])
    assert second.told == [1, 3]
    first.call(live, [4])
    assert first.told == [9]


def test_after_a_restart_of_the_server_everything_is_told_again() -> None:
    caller, other = Caller(1), Caller(2)
    caller.call(Live(1), [1, 2, 3, 4])
    restarted = Live(2)
    other.call(restarted, list(range(10, 20)))
    assert list(caller.call(restarted, []).others) == list(range(10, 20))


def test_a_cursor_that_nobody_gave_out_is_a_first_call() -> None:
    live = Live(1)
    Caller(1).call(live, [1])
    for cursor in (2, 2 << 32 | 2, 2**64 - 1):
        assert list(live.call(IMAGE, LiveCall(node(2), cursor, []), 0).others) == [1]


def test_a_storm_is_forgotten_after_a_minute_of_silence() -> None:
    live = Live(1)
    Caller(1).call(live, [1, 2], now=0)
    late = Caller(2)
    late.call(live, [], now=FORGET_S)
    assert late.told == [1, 2]
    Caller(3).call(live, [], now=3 * FORGET_S)
    assert late.call(live, [], now=3 * FORGET_S + 1).others == []
    latest = Caller(4)
    latest.call(live, [7], now=3 * FORGET_S + 1)
    assert latest.told == []
    assert late.call(live, [8, 9], now=3 * FORGET_S + 1).others == [7]
    again = Caller(1)
    again.call(live, [], now=9 * FORGET_S)
    Caller(2).call(live, [1, 2, 3, 4], now=9 * FORGET_S)
    late.call(live, [], now=9 * FORGET_S)
    assert late.told[-4:] == [1, 2, 3, 4]  # its cursor is of the storm before


def test_the_more_nodes_call_the_more_seldom() -> None:
    live = Live(1)
    assert Caller(0).call(live, []).next_s == SOONEST_S
    for number in range(1, 1000):
        answer = Caller(number).call(live, [], now=number / 1000)
    assert answer.next_s == 1000 / CALLS_PER_S
    assert Caller(0).call(live, [], now=FORGET_S + 0.5).next_s < 600 / CALLS_PER_S  # half of them went


def test_what_is_kept_is_bounded() -> None:
    live = Live(1)
    rng = random.Random(1)
    for _ in range(5):
        live.call(IMAGE, LiveCall(node(1), 0, rng.sample(range(2**32), MAX_ENTRIES)), 0)
    assert len(live.call(IMAGE, LiveCall(node(2), 0, []), 0).others) == MAX_ENTRIES
    for number in range(MAX_IMAGES):
        live.call(ImageId(number.to_bytes(32, "little")), LiveCall(node(1), 0, [1]), 0)
    assert len(live._storms) == MAX_IMAGES
    assert live.call(IMAGE, LiveCall(node(3), 0, []), 0).others == []
    for number in range(MAX_NODES + 5):
        live.call(IMAGE, LiveCall(node(number), 0, []), 0)
    assert len(live._storms[IMAGE].callers) == MAX_NODES
