"""Ranking of sources: examples with a clock of their own."""

import random

from hypothesis import given
from hypothesis import strategies as st

from vmthunder.ids import NodeId
from vmthunder.swarm.rank import (
    BUSY_MOST_S,
    COOL_MOST_S,
    COOL_S,
    ENOUGH,
    HEDGE_LEAST_S,
    HEDGE_SHARE,
    HEDGE_UNKNOWN_S,
    WINDOW,
    Ranking,
)

PARENT, GRANDPARENT, OTHER, LIAR = (NodeId(name * 16) for name in (b"p", b"g", b"o", b"l"))
CHUNK = 65536


def test_the_parent_is_asked_first_and_the_origin_last() -> None:
    assert Ranking().rank([PARENT, GRANDPARENT], [OTHER, PARENT], 0) == [PARENT, GRANDPARENT, OTHER, None]


def test_one_wrong_byte_is_enough_for_ever() -> None:
    ranking = Ranking()
    ranking.lied(LIAR)
    ranking.retain([])
    assert ranking.rank([LIAR, PARENT], [LIAR], 1e9) == [PARENT, None]
    assert ranking.banned == {LIAR}


def test_a_failed_source_is_left_alone_longer_each_time() -> None:
    ranking = Ranking()
    now, waits = 0.0, []
    for _ in range(9):
        ranking.failed(PARENT, now)
        began = now
        while not ranking.usable(PARENT, now):
            now += 0.5
        waits.append(now - began)
    assert waits[:3] == [COOL_S, 2 * COOL_S, 4 * COOL_S]
    assert waits[-1] == COOL_MOST_S


def test_failures_under_way_at_the_same_time_count_once() -> None:
    ranking = Ranking()
    for _ in range(10):
        ranking.failed(PARENT, 0)
    assert ranking.usable(PARENT, COOL_S)


def test_a_source_that_has_recovered_begins_anew() -> None:
    ranking = Ranking()
    ranking.failed(PARENT, 0)
    for _ in range(ENOUGH):
        ranking.delivered(PARENT, CHUNK, 0.01, 5)
    ranking.failed(PARENT, 10)
    assert ranking.usable(PARENT, 10 + COOL_S)


def test_a_busy_source_comes_back_when_it_said_and_not_much_later() -> None:
    ranking = Ranking()
    ranking.busy(PARENT, 0.5, 0)
    assert ranking.rank([PARENT, GRANDPARENT], [], 0.4) == [GRANDPARENT, None]
    assert ranking.usable(PARENT, 0.5)
    ranking.busy(PARENT, 1e9, 1)
    assert ranking.usable(PARENT, 1 + BUSY_MOST_S)


def test_the_origin_is_never_left_alone() -> None:
    ranking = Ranking()
    ranking.failed(None, 0)
    ranking.busy(None, 5, 0)
    assert ranking.rank([], [], 0) == [None]


def test_a_source_at_a_twentieth_of_the_rate_cools_down() -> None:
    ranking = Ranking()
    for _ in range(ENOUGH):
        for source in (GRANDPARENT, OTHER):
            ranking.delivered(source, CHUNK, 0.01, 0)
        ranking.delivered(PARENT, CHUNK, 0.2, 0)
    assert ranking.rank([PARENT, GRANDPARENT], [], 0) == [GRANDPARENT, None]


def test_a_source_that_is_crowded_is_not_slow() -> None:
    ranking = Ranking()
    for _ in range(10 * ENOUGH):
        for source in (GRANDPARENT, OTHER):
            ranking.delivered(source, CHUNK, 0.01, 0)
        ranking.delivered(PARENT, CHUNK, 0.4, 0, others=39)
        assert ranking.rank([PARENT, GRANDPARENT], [], 0) == [PARENT, GRANDPARENT, None]


def test_a_burst_that_delays_all_makes_nobody_slow() -> None:
    ranking = Ranking()
    for _ in range(30):
        for source in (PARENT, GRANDPARENT, OTHER):
            ranking.delivered(source, CHUNK, 0.06, 0)
    for number in range(60):  # calm again, and one of them is asked little
        for source in (GRANDPARENT, OTHER) if number % 8 else (PARENT, GRANDPARENT, OTHER):
            ranking.delivered(source, CHUNK, 0.005, 1)
            assert ranking.rank([PARENT, GRANDPARENT, OTHER], [], 1) == [PARENT, GRANDPARENT, OTHER, None]


def test_what_was_long_ago_is_forgotten() -> None:
    ranking = Ranking()
    for latency_s in (1.0, 0.01):
        for _ in range(WINDOW):
            ranking.delivered(PARENT, CHUNK, latency_s, 0)
    assert ranking.hedge_after_s(PARENT) <= HEDGE_LEAST_S


def test_sources_that_differ_a_little_are_all_kept() -> None:
    ranking = Ranking()
    for _ in range(100):
        for source, latency_s in ((PARENT, 0.03), (GRANDPARENT, 0.01), (OTHER, 0.02)):
            ranking.delivered(source, CHUNK, latency_s, 0)
    assert ranking.rank([PARENT, GRANDPARENT], [OTHER], 0) == [PARENT, GRANDPARENT, OTHER, None]


def test_a_second_source_is_asked_after_the_firsts_own_p95() -> None:
    ranking = Ranking()
    assert ranking.hedge_after_s(PARENT) == HEDGE_UNKNOWN_S
    for number in range(64):
        ranking.delivered(PARENT, CHUNK, 0.1 + number / 1000, 0)
    assert 0.155 <= ranking.hedge_after_s(PARENT) <= 0.164


def test_a_source_that_was_always_slow_does_not_set_its_own_deadline() -> None:
    ranking = Ranking()
    for _ in range(ENOUGH - 1):
        ranking.delivered(PARENT, CHUNK, 10.0, 0)
    for _ in range(64):
        ranking.delivered(GRANDPARENT, CHUNK, 0.1, 0)
    assert ranking.hedge_after_s(PARENT) <= 0.5


@given(st.integers(0, 2**32))
def test_a_healthy_swarm_pays_at_most_five_percent_for_hedging(seed: int) -> None:
    chance = random.Random(seed)
    ranking = Ranking()
    hedged = 0
    for now in range(2000):
        latency_s = chance.expovariate(20)
        if latency_s > ranking.hedge_after_s(PARENT) and ranking.may_hedge(CHUNK):
            hedged += 1
        ranking.delivered(PARENT, CHUNK, latency_s, now)
    assert hedged <= HEDGE_SHARE * 2000 + 8


def test_a_source_is_on_trial_from_its_failure_until_it_has_delivered_enough() -> None:
    ranking = Ranking()
    assert not ranking.on_trial(PARENT)
    ranking.failed(PARENT, 0)
    assert ranking.on_trial(PARENT)
    assert ranking.left_alone == {PARENT: 1}
    for _ in range(ENOUGH):
        assert ranking.on_trial(PARENT)
        ranking.delivered(PARENT, CHUNK, 0.01, 5)
    assert not ranking.on_trial(PARENT)
    assert ranking.left_alone == {}
