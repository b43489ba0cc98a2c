from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from vmthunder.ids import ChunkId
from vmthunder.node.eviction import _CLOCK_MASK, _MAIN, _SIZE_MASK, CORRELATED_USES, Kept, S3Fifo


def chunk(number: int) -> ChunkId:
    return ChunkId(number.to_bytes(32, "big"))


def store(queues: S3Fifo, numbers: range, size_bytes: int = 1) -> list[ChunkId]:
    """Store chunks that are not there; what had to go."""
    gone: list[ChunkId] = []
    for number in numbers:
        if chunk(number) in queues:
            queues.touch(chunk(number))
            continue
        room = queues.make_room(chunk(number), size_bytes)
        assert room is not None
        queues.add(chunk(number), size_bytes, number, to_main=room.to_main)
        gone += [kept.chunk_id for kept in room.evicted]
        assert all(chunk(kept.place) == kept.chunk_id for kept in room.evicted)
    return gone


def kept(queues: S3Fifo, numbers: range) -> int:
    return sum(chunk(number) in queues for number in numbers)


def bytes_in_small(queues: S3Fifo) -> int:
    return sum(entry & _SIZE_MASK for entry in queues._entries.values() if not entry & _MAIN)


def use_apart(queues: S3Fifo, numbers: range) -> None:
    """Use chunks long after whatever they were used for before."""
    for _ in range(CORRELATED_USES):
        queues.touch(chunk(1 << 200))
    for number in numbers:
        queues.touch(chunk(number))


BOOT = range(500)
SCAN = range(10_000, 20_000)


def test_a_scan_takes_nothing_from_a_boot_that_was_read_once_before_it() -> None:
    queues = S3Fifo(1000)
    store(queues, BOOT)
    store(queues, SCAN)
    assert kept(queues, BOOT) == len(BOOT)
    assert len(queues._ghost) <= len(queues)


def test_a_boot_that_comes_after_a_scan_and_again_outlives_the_next_scan() -> None:
    queues = S3Fifo(1000)
    store(queues, SCAN)
    store(queues, range(80))
    use_apart(queues, range(80))
    store(queues, range(30_000, 40_000))
    assert kept(queues, range(80)) == 80


def test_a_boot_larger_than_the_small_queue_is_taken_in_when_it_comes_back() -> None:
    queues = S3Fifo(1000)
    store(queues, SCAN)
    for _ in range(3):
        store(queues, BOOT)
    store(queues, range(30_000, 40_000))
    assert kept(queues, BOOT) >= 0.8 * len(BOOT)


def test_a_scan_in_small_steps_counts_as_one_use() -> None:
    queues = S3Fifo(1000)
    store(queues, BOOT)
    for number in SCAN:
        for _ in range(16):
            store(queues, range(number, number + 1))
    assert kept(queues, BOOT) == len(BOOT)


def test_what_is_never_used_again_makes_room_in_the_end() -> None:
    queues = S3Fifo(1000)
    store(queues, SCAN)
    for _ in range(4):
        store(queues, BOOT)
        use_apart(queues, BOOT)
    assert kept(queues, BOOT) > 0.9 * len(BOOT)


def test_what_never_fits_changes_nothing() -> None:
    queues = S3Fifo(1000)
    store(queues, BOOT)
    assert queues.make_room(chunk(10**6), 1001) is None
    assert S3Fifo(0).make_room(chunk(1), 1) is None
    assert kept(queues, BOOT) == len(BOOT)


def test_small_makes_room_where_main_has_nothing_left() -> None:
    queues = S3Fifo(100)
    store(queues, range(101))  # the first that went into small is a ghost now, and will be wanted in main
    for number in range(90):
        queues.remove(chunk(number))
    room = queues.make_room(chunk(90), 95)
    assert room is not None
    assert room.to_main
    assert len(room.evicted) >= 5


def test_a_chunk_that_was_dropped_from_small_and_came_back_to_main_has_one_place() -> None:
    queues = S3Fifo(100)
    store(queues, range(100))
    queues.remove(chunk(0))
    queues.remove(chunk(95))
    store(queues, range(95, 96))
    use_apart(queues, range(95, 96))
    store(queues, range(1000, 1100))
    assert chunk(95) in queues
    assert queues._small_bytes == bytes_in_small(queues)


def test_the_order_of_the_queues_is_told_and_each_chunk_once() -> None:
    queues = S3Fifo(100)
    store(queues, range(100))
    for number in (3, 95):
        queues.remove(chunk(number))
        store(queues, range(number, number + 1))
    told = list(queues.in_order())
    assert [kept.place for kept, in_main in told if in_main] == list(range(90))
    assert [kept.place for kept, in_main in told if not in_main] == list(range(90, 100))
    assert all((kept.place, kept.size_bytes) == queues.find(kept.chunk_id) for kept, _ in told)


def test_what_is_stored_takes_whole_units() -> None:
    queues = S3Fifo(1000, unit_bytes=100)
    store(queues, range(5), size_bytes=101)
    assert queues.used_bytes == 1000
    assert not queues.room_in_main(1)
    assert queues.make_room(chunk(9), 1001) is None


def test_the_use_clock_may_go_round() -> None:
    queues = S3Fifo(1000)
    queues._clock = _CLOCK_MASK - 10
    store(queues, range(100))
    use_apart(queues, range(100))
    assert [queues.find(chunk(number)) for number in range(100)] == [(number, 1) for number in range(100)]
    store(queues, SCAN)
    assert kept(queues, range(100)) == 100


class Machine(RuleBasedStateMachine):
    """Any sequence of calls against a plain dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.queues = S3Fifo(100)
        self.sizes: dict[ChunkId, int] = {}
        self.pinned: frozenset[ChunkId] = frozenset()

    @rule(numbers=st.frozensets(st.integers(0, 40), max_size=10))
    def pin(self, numbers: frozenset[int]) -> None:
        self.pinned = frozenset(map(chunk, numbers))
        self.queues.pin(self.pinned)

    @rule(number=st.integers(0, 40), size_bytes=st.integers(1, 120))
    def store(self, number: int, size_bytes: int) -> None:
        if chunk(number) in self.sizes:
            self.queues.touch(chunk(number))
            return
        room = self.queues.make_room(chunk(number), size_bytes)
        assert (room is None) == (size_bytes + sum(self.sizes.get(one, 0) for one in self.pinned) > 100)
        if room is not None:
            for gone in room.evicted:
                assert gone.chunk_id not in self.pinned
                assert self.sizes.pop(gone.chunk_id) == gone.size_bytes
            assert sum(self.sizes.values()) + size_bytes <= 100
            self.queues.add(chunk(number), size_bytes, number, to_main=room.to_main)
            self.sizes[chunk(number)] = size_bytes

    @rule(number=st.integers(0, 40))
    def remove(self, number: int) -> None:
        size_bytes = self.sizes.pop(chunk(number), None)
        kept = None if size_bytes is None else Kept(chunk(number), number, size_bytes)
        assert self.queues.remove(chunk(number)) == kept

    @rule(number=st.integers(0, 40))
    def use_apart(self, number: int) -> None:
        use_apart(self.queues, range(number, number + 1))

    @invariant()
    def counts_what_is_here(self) -> None:
        assert self.queues.used_bytes == sum(self.sizes.values())
        assert len(self.queues) == len(self.sizes)
        assert self.queues._small_bytes == bytes_in_small(self.queues)
        assert all(
            self.queues.find(chunk(number)) == (number, size)
            for number in range(41)
            if (size := self.sizes.get(chunk(number)))
        )


Machine.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
test_any_sequence_of_calls = Machine.TestCase
