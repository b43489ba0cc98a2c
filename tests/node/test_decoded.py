import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmthunder.ids import ChunkId
from vmthunder.node.decoded import DecodedChunks, Want


def want(number: int, slice_bytes: int = 10) -> Want:
    return ChunkId(number.to_bytes(32, "big")), slice_bytes


def test_the_least_recently_used_slice_leaves_first() -> None:
    decoded = DecodedChunks(30)
    for number in range(3):
        decoded.put(want(number), bytes(10))
    assert len(decoded[want(0)]) == 10
    decoded.put(want(3), bytes(10))
    assert [want(number) in decoded for number in range(4)] == [True, False, True, True]


def test_a_chunk_id_with_slices_of_two_lengths_is_two_slices() -> None:
    decoded = DecodedChunks(100)
    decoded.put(want(1, 10), b"a" * 10)
    decoded.put(want(1, 20), b"b" * 20)
    assert (decoded[want(1, 10)], decoded[want(1, 20)]) == (b"a" * 10, b"b" * 20)


def test_a_slice_larger_than_the_budget_is_not_kept_and_costs_nobody_a_place() -> None:
    decoded = DecodedChunks(30)
    decoded.put(want(1), bytes(10))
    decoded.put(want(2, 31), bytes(31))
    assert want(1) in decoded
    with pytest.raises(KeyError):
        decoded[want(2, 31)]


@given(st.integers(0, 200), st.lists(st.tuples(st.integers(0, 20), st.integers(1, 60))))
def test_bytes_are_counted_exactly_and_stay_within_the_budget(budget: int, puts: list[tuple[int, int]]) -> None:
    decoded = DecodedChunks(budget)
    for number, length in puts:
        decoded.put(want(number, length), bytes(length))
        kept = {w for n, size in puts if (w := want(n, size)) in decoded}
        assert decoded.used_bytes == sum(size for _, size in kept) <= budget
        assert len(decoded) == len(kept)
