from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from vmthunder.fleet.ledger import Ledger, spread
from vmthunder.fleet.placement import free_names, place

LOADS = st.lists(st.integers(0, 50), min_size=1, max_size=30)


@given(LOADS, st.integers(0, 200))
def test_each_machine_goes_where_there_were_the_fewest(vms: list[int], wanted: int) -> None:
    now = list(vms)
    for node in place(vms, wanted):
        assert now[node] == min(now)
        now[node] += 1
    assert sum(now) == sum(vms) + wanted


@given(st.integers(1, 30), st.integers(0, 200))
def test_equal_nodes_differ_by_one_machine_at_most(nodes: int, wanted: int) -> None:
    counts = Counter(place([3] * nodes, wanted))
    assert max(counts.values(), default=0) - min(counts[node] for node in range(nodes)) <= 1


def test_equal_nodes_take_turns_and_the_same_question_has_the_same_answer() -> None:
    assert place([0, 0, 0], 5) == [0, 1, 2, 0, 1] == place([0, 0, 0], 5)
    assert place([], 5) == []


def test_names_that_are_taken_are_passed_over() -> None:
    assert free_names("my_image", {"my-image-1", "my-image-3"}, 3) == ["my-image-2", "my-image-4", "my-image-5"]


def counters(pid: int, origin: int) -> dict[str, float]:
    return {"pid": pid, "bytes_from_origin": origin, "bytes_from_peers": 0, "bytes_from_cache": 0, "stalled_s": 0}


def test_what_a_dead_worker_brought_in_still_counts() -> None:
    ledger = Ledger()
    for look in (counters(1, 100), counters(1, 130), counters(2, 5), counters(2, 7), counters(3, 1)):
        ledger.look(look)
    assert ledger.grown("bytes_from_origin") == 30 + 7 + 1


def test_nothing_has_grown_before_the_second_look() -> None:
    ledger = Ledger()
    assert ledger.grown("bytes_from_origin") == 0
    ledger.look(counters(1, 100))
    assert ledger.grown("bytes_from_origin") == 0


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=200))
def test_a_spread_names_values_that_occurred_in_order(values: list[float]) -> None:
    found = spread(values)
    assert found is not None
    assert set(found.values()) <= set(values)
    assert found["min"] <= found["median"] <= found["p99"] <= found["max"]
    assert sum(value <= found["p99"] for value in values) >= 0.99 * len(values)


def test_there_is_no_spread_of_nothing() -> None:
    assert spread([]) is None
