"""The tracker's state machine: events and a clock in, answers out."""

import time

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from vmthunder.errors import Usage
from vmthunder.ids import ImageId, NodeId
from vmthunder.swarm import tracker as tracker_module
from vmthunder.swarm.tracker import GRACE_S, LEASE_S, SETTLE_S, Tracker
from vmthunder.swarm.view import Delta, Join, Joined, Leave, Left, Member, Poll, Roster, Snapshot, Version

SWARM, OTHER = ImageId(b"s" * 32), ImageId(b"o" * 32)


def node(number: int) -> NodeId:
    return NodeId(number.to_bytes(16, "big"))


def member(number: int, rack: str = "", port: int = 7000) -> Member:
    return Member(node(number), rack, f"10.0.0.{number % 250}", port)


def join(number: int, swarm: ImageId = SWARM, view: Snapshot | None = None) -> Join:
    return Join(swarm, member(number), view)


def poll(number: int, version: Version, swarm: ImageId = SWARM) -> Poll:
    return Poll(node(number), {swarm: version})


JOINING = -1
"""The waiter of all joins that a test does not look at."""


def seat(tracker: Tracker, announcement: Join, now: float) -> Snapshot:
    """Join, and what there is to be told of it already."""
    tracker.join(announcement, JOINING, now)
    return tracker.views()[announcement.swarm]


def polls(tracker: Tracker, now: float) -> list[tracker_module.Wake]:
    """Let time pass; the polls that are answered."""
    return [wake for wake in tracker.tick(now) if wake.waiter != JOINING]


def nodes_in(tracker: Tracker, swarm: ImageId = SWARM) -> list[NodeId]:
    return [found.node for found in tracker.views()[swarm].members]


def test_all_who_join_while_a_swarm_settles_are_told_one_and_the_same_view() -> None:
    tracker = Tracker(1)
    for number in range(20):
        assert tracker.join(join(number), number, number / 1000) is None
    assert tracker.tick(SETTLE_S / 2) == []
    wakes = tracker.tick(SETTLE_S)
    assert [wake.waiter for wake in wakes] == list(range(20))
    views = [view for wake in wakes for _, view in wake.updates]
    assert views == [tracker.views()[SWARM]] * 20
    assert tracker.tick(1) == []


def test_who_announces_itself_again_is_told_at_once() -> None:
    tracker = Tracker(1)
    view = seat(tracker, join(1), 0)
    tracker.tick(SETTLE_S)
    assert tracker.join(join(1), 7, 1) == view


def test_who_leaves_while_the_swarm_settles_is_not_kept_waiting() -> None:
    tracker = Tracker(1)
    assert tracker.join(join(1), 7, 0) is None
    tracker.leave(Leave(SWARM, node(1)), 0)
    assert tracker.tick(0) == [(7, [(SWARM, None)])]


def test_who_hangs_up_while_the_swarm_settles_has_a_moment_to_come_back() -> None:
    tracker = Tracker(1)
    assert tracker.join(join(1), 7, 0) is None
    tracker.hung_up(7, 0.01)
    assert tracker.tick(SETTLE_S) == []
    tracker.tick(0.01 + GRACE_S)
    assert tracker.views() == {}


@pytest.mark.parametrize("shape", [(0, 2), (16, 16), (257, 300)])
def test_a_shape_that_makes_no_trees_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(Usage):
        Tracker(1, stripes=shape[0], fanout=shape[1])


def test_160_nodes_that_join_in_one_second_all_have_parents_in_it() -> None:
    tracker = Tracker(1)
    rosters = {}
    for number in range(160):
        now = number / 160
        rosters[number] = Roster()
        rosters[number].update(seat(tracker, join(number), now))
        assert tracker.poll(poll(number, rosters[number].version), number, now) is None
        for wake in polls(tracker, now):
            update(rosters, wake, tracker, now)
    now = 1 + SETTLE_S
    told = polls(tracker, now)
    for wake in told:
        update(rosters, wake, tracker, now)
    views = [roster.snapshot() for roster in rosters.values()]
    assert len(views[0].members) == 160
    assert all(view == views[0] for view in views)


def update(rosters: dict[int, Roster], wake: tracker_module.Wake, tracker: Tracker, now: float) -> None:
    """What a node does when its poll is answered: follow, and poll again."""
    ((_, change),) = wake.updates
    assert change is not None
    roster = rosters[wake.waiter]
    assert roster.update(change)
    assert tracker.poll(poll(wake.waiter, roster.version), wake.waiter, now) is None


def test_changes_of_one_moment_are_told_together() -> None:
    tracker = Tracker(1)
    version = seat(tracker, join(0), 0).version
    tracker.tick(SETTLE_S)
    assert tracker.poll(poll(0, version), 7, 1) is None
    for number in range(1, 50):
        seat(tracker, join(number), 1 + number / 1000)
        assert polls(tracker, 1 + number / 1000) == []
    assert tracker.due() == pytest.approx(1.001 + SETTLE_S)
    (wake,) = polls(tracker, 1.001 + SETTLE_S)
    assert wake.waiter == 7
    ((_, delta),) = wake.updates
    assert isinstance(delta, Delta)
    assert delta.since == version.epoch
    assert delta.changes == tuple(Joined(member(number)) for number in range(1, 50))


def test_a_poll_that_knows_less_is_answered_at_once() -> None:
    tracker = Tracker(1)
    version = seat(tracker, join(1), 0).version
    seat(tracker, join(2), 0)
    tracker.tick(1)
    answer = tracker.poll(poll(1, version), 7, 1)
    assert answer is not None
    assert isinstance(answer[0][1], Delta)


def test_who_knows_too_little_gets_a_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker_module, "MAX_CHANGES", 5)
    tracker = Tracker(1)
    version = seat(tracker, join(0), 0).version
    for number in range(1, 6):
        seat(tracker, join(number), 0)
    tracker.tick(1)
    before = tracker.poll(poll(0, version), 7, 1)
    assert before is not None
    assert isinstance(before[0][1], Delta)
    seat(tracker, join(6), 1)
    tracker.tick(2)
    after = tracker.poll(poll(0, version), 7, 2)
    assert after is not None
    assert isinstance(after[0][1], Snapshot)


def test_a_node_that_is_silent_for_a_lease_is_gone_and_the_others_hear_it() -> None:
    tracker = Tracker(1)
    seat(tracker, join(1), 0)
    version = seat(tracker, join(2), 0).version
    tracker.tick(1)
    assert tracker.poll(poll(2, version), 7, LEASE_S - 1) is None
    assert tracker.tick(LEASE_S - 0.1) == []
    tracker.tick(LEASE_S)
    (wake,) = polls(tracker, LEASE_S + SETTLE_S)
    ((_, delta),) = wake.updates
    assert isinstance(delta, Delta)
    assert delta.changes == (Left(node(1)),)


def test_a_node_whose_poll_breaks_off_has_a_moment_to_come_back() -> None:
    for comes_back in (True, False):
        tracker = Tracker(1)
        version = seat(tracker, join(1), 0).version
        tracker.poll(poll(1, version), 7, 0)
        tracker.hung_up(7, 1)
        tracker.tick(1 + GRACE_S / 2)
        if comes_back:
            tracker.poll(poll(1, version), 8, 1 + GRACE_S / 2)
        tracker.tick(1 + GRACE_S)
        assert (SWARM in tracker.views()) is comes_back


def test_a_node_whose_polls_often_break_off_costs_no_memory() -> None:
    tracker = Tracker(1)
    version = seat(tracker, join(1), 0).version
    for now in range(0, 5000, 5):
        tracker.poll(poll(1, version), 7, now)
        tracker.hung_up(7, now)
        tracker.poll(poll(1, version), 8, now + 1)
        tracker.tick(now + GRACE_S)
    assert len(tracker._expiries) < 100


def test_a_poll_that_was_given_up_in_good_order_shortens_no_lease() -> None:
    tracker = Tracker(1)
    version = seat(tracker, join(1), 0).version
    tracker.poll(poll(1, version), 7, 0)
    tracker.forget(7)
    tracker.hung_up(7, 1)
    tracker.tick(LEASE_S - 1)
    assert SWARM in tracker.views()


def test_a_newer_poll_of_a_node_releases_the_older_one() -> None:
    tracker = Tracker(1)
    version = seat(tracker, join(1), 0).version
    tracker.poll(poll(1, version), 7, 0)
    tracker.poll(poll(1, version), 8, 0)
    due = tracker.due()
    assert due is not None
    assert due < 0
    assert polls(tracker, 0) == [(7, [])]
    assert polls(tracker, SETTLE_S) == []  # its own coming is no news to it


def test_one_poll_covers_all_swarms_of_a_node() -> None:
    tracker = Tracker(1)
    versions = {swarm: seat(tracker, join(1, swarm), 0).version for swarm in (SWARM, OTHER)}
    tracker.tick(1)
    assert tracker.poll(Poll(node(1), versions), 7, 1) is None
    seat(tracker, join(2, OTHER), 1)
    (wake,) = polls(tracker, 2)
    assert [swarm for swarm, _ in wake.updates] == [OTHER]


def test_who_leaves_is_gone_and_the_last_one_takes_the_swarm_along() -> None:
    tracker = Tracker(1)
    seat(tracker, join(1), 0)
    seat(tracker, join(2), 0)
    tracker.leave(Leave(SWARM, node(1)), 1)
    assert nodes_in(tracker) == [node(2)]
    tracker.leave(Leave(SWARM, node(2)), 1)
    tracker.leave(Leave(SWARM, node(2)), 1)
    assert tracker.views() == {}
    tracker.tick(100)
    assert tracker.due() is None


def test_a_swarm_that_begins_again_is_not_taken_for_the_old_one() -> None:
    tracker = Tracker(1)
    old = seat(tracker, join(1), 0).version
    tracker.leave(Leave(SWARM, node(1)), 0)
    seat(tracker, join(2), 0)
    seat(tracker, join(1), 0)
    tracker.tick(1)
    answer = tracker.poll(poll(1, old), 7, 1)
    assert answer is not None
    assert isinstance(answer[0][1], Snapshot)


def test_after_a_restart_everybody_keeps_their_seat() -> None:
    before = Tracker(1)
    for number in range(40):
        seat(before, Join(SWARM, member(number, rack=str(number % 3)), None), 0)
    view = seat(before, Join(SWARM, member(0, rack="0"), None), 0)

    after = Tracker(2)
    assert after.poll(poll(5, view.version), 7, 0) == [(SWARM, None)]
    assert seat(after, Join(SWARM, member(5, rack="2"), view), 0).members == view.members
    # Those that it never heard of itself are members until their lease is over; who polls need not announce itself.
    answer = after.poll(poll(6, view.version), 8, 1)
    assert answer is not None
    assert isinstance(answer[0][1], Snapshot)
    after.tick(LEASE_S)
    assert nodes_in(after) == [node(6)]


def test_a_node_that_comes_back_at_another_address_keeps_its_seat() -> None:
    tracker = Tracker(1)
    for number in range(3):
        seat(tracker, join(number), 0)
    moved = member(1, port=7001)
    assert seat(tracker, Join(SWARM, moved, None), 1).members == (member(0), moved, member(2))


def test_a_thousand_idle_nodes_cost_next_to_nothing() -> None:
    tracker = Tracker(1)
    for number in range(1000):
        seat(tracker, join(number), 0)
    version = seat(tracker, join(0), 0).version
    tracker.tick(1)
    began = time.process_time()
    for now in range(1, 61):
        for number in range(now % 20, 1000, 20):  # each polls every 20 s
            tracker.forget(number)
            assert tracker.poll(poll(number, version), number, now) is None
        assert tracker.tick(now) == []
    assert time.process_time() - began < 6  # a tenth of a core


JOINS = 100
"""Waiters from here on are those of joins."""


class Replicas(RuleBasedStateMachine):
    """Nodes that join, leave, poll, die and lose the tracker: whoever polls has the tracker's view."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.rosters: dict[int, Roster] = {}

    @initialize()
    def start(self) -> None:
        self.term = 1
        self.tracker = Tracker(1, stripes=2, fanout=3)

    @rule(number=st.integers(0, 9), rack=st.sampled_from("ab"))
    def join(self, number: int, rack: str) -> None:
        known = self.rosters.setdefault(number, Roster(2, 3))
        view = known.snapshot() if known.members else None
        told = self.tracker.join(Join(SWARM, member(number, rack), view), number + JOINS, self.now)
        if told is not None:
            self.hear(number, [(SWARM, told)])

    @rule(number=st.integers(0, 9))
    def leave(self, number: int) -> None:
        self.tracker.leave(Leave(SWARM, node(number)), self.now)
        self.rosters.pop(number, None)

    @rule(number=st.integers(0, 9))
    def poll(self, number: int) -> None:
        if number in self.rosters:
            self.hear(number, self.tracker.poll(poll(number, self.rosters[number].version), number, self.now))

    def hear(self, number: int, updates: list[tuple[ImageId, tracker_module.Update | None]] | None) -> None:
        for _, update in updates or ():
            if update is None:
                self.join(number, "a")
            elif number in self.rosters:
                roster = self.rosters[number]
                if isinstance(update, Delta) and update.since != roster.version.epoch:
                    continue  # the answer to a join came first
                assert roster.update(update)
                assert node(number) in roster.members

    @rule(seconds=st.sampled_from([0.01, SETTLE_S, 1.0, 20.0, LEASE_S]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        for wake in self.tracker.tick(self.now):
            self.hear(wake.waiter % JOINS, wake.updates)

    @rule(number=st.integers(0, 9))
    def hang_up(self, number: int) -> None:
        self.tracker.hung_up(number, self.now)

    @rule()
    def restart(self) -> None:
        self.term += 1
        self.tracker = Tracker(self.term, stripes=2, fanout=3)

    @invariant()
    def who_knows_the_version_knows_the_view(self) -> None:
        newest = self.tracker.views().get(SWARM)
        for roster in self.rosters.values():
            if newest is not None and roster.version == newest.version:
                assert roster.snapshot() == newest


TestReplicas = Replicas.TestCase
TestReplicas.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
