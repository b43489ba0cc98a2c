"""The trees: what docs/swarm.md claims about them, for any swarm, any racks, any order of joins and leaves."""

import time
from collections import Counter
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmthunder.errors import Usage
from vmthunder.ids import NodeId
from vmthunder.swarm.topology import DEFAULT_FANOUT, DEFAULT_STRIPES, Topology

SHAPES = st.sampled_from([(1, 2), (1, 3), (2, 3), (3, 5), (4, 5), (4, 6), (16, 17)])
RACKS = st.sampled_from(["", "a", "b", "c", "d", "e", "f"])


def node(number: int) -> NodeId:
    return NodeId(number.to_bytes(16, "big"))


def swarm(count: int, stripes: int, fanout: int) -> Topology:
    return Topology([(node(number), "") for number in range(count)], stripes=stripes, fanout=fanout)


@st.composite
def topologies(draw: st.DrawFn, racks: st.SearchStrategy[str] = RACKS) -> Topology:
    """A swarm after joins and leaves in any order."""
    stripes, fanout = draw(SHAPES)
    topology = Topology(stripes=stripes, fanout=fanout)
    for number, rack in enumerate(draw(st.lists(racks, min_size=1, max_size=80))):
        topology.join(node(number), rack)
    for leaver in draw(st.lists(st.integers(0, 79), max_size=20)):
        if node(leaver) in topology and len(topology) > 1:
            topology.leave(node(leaver))
    return topology


def members(topology: Topology) -> list[NodeId]:
    return [member for _, rack in topology.racks() for member in rack]


def all_parents(topology: Topology) -> dict[tuple[NodeId, int], NodeId | None]:
    return {
        (member, stripe): parent
        for member in members(topology)
        for stripe, parent in enumerate(topology.parents(member))
    }


def moved(before: dict[tuple[NodeId, int], NodeId | None], topology: Topology) -> set[NodeId]:
    after = all_parents(topology)
    return {key[0] for key in before.keys() & after.keys() if before[key] != after[key]}


def children(topology: Topology) -> Counter[NodeId]:
    """How many chunks a member sends for every `stripes` chunks that it receives."""
    return Counter(parent for parent in all_parents(topology).values() if parent is not None)


@given(topologies())
def test_every_stripe_is_one_tree_whose_root_takes_it_from_the_origin(topology: Topology) -> None:
    for stripe in range(topology.stripes):
        roots = 0
        for member in members(topology):
            seen: set[NodeId | None] = set()
            at: NodeId | None = member
            while at is not None:
                assert at not in seen
                seen.add(at)
                at = topology.parent(at, stripe)
            roots += len(seen) == 1
        assert roots == 1


@given(topologies(), st.data())
def test_whoever_dies_the_others_still_reach_the_origin(topology: Topology, data: st.DataObject) -> None:
    everybody = members(topology)
    dead = data.draw(st.sets(st.sampled_from(everybody)))
    for member, stripe in product(set(everybody) - dead, range(topology.stripes)):
        seen = set()
        at: NodeId | None = member
        while at is not None:
            assert at not in seen
            seen.add(at)
            at = next((up for up in topology.ancestors(at, stripe) if up not in dead), None)


@given(topologies())
def test_ancestors_begin_with_the_parent_and_name_nobody_twice(topology: Topology) -> None:
    for member, stripe in product(members(topology), range(topology.stripes)):
        chain = topology.ancestors(member, stripe)
        assert (chain[0] if chain else None) == topology.parent(member, stripe)
        assert len({member, *chain}) == len(chain) + 1


@pytest.mark.parametrize("stripe", range(DEFAULT_STRIPES))
@pytest.mark.parametrize("place", [0, 1, 2])
def test_those_whose_forwarder_does_not_deliver_do_not_crowd_at_another(stripe: int, place: int) -> None:
    topology = swarm(64, DEFAULT_STRIPES, DEFAULT_FANOUT)
    slow = node(stripe + place * DEFAULT_STRIPES)
    leaves = [leaf for leaf in map(node, range(64)) if topology.parent(leaf, stripe) == slow]
    turn_to = Counter(next((up for up in topology.ancestors(leaf, stripe) if up != slow), None) for leaf in leaves)
    assert max(turn_to.values()) <= 6


@given(topologies(racks=st.just("")))
def test_a_member_forwards_in_one_stripe_only(topology: Topology) -> None:
    if len(topology) < topology.stripes:
        return
    forwards: dict[NodeId, set[int]] = {}
    for (_, stripe), parent in all_parents(topology).items():
        if parent is not None:
            forwards.setdefault(parent, set()).add(stripe)
    assert all(len(stripes) == 1 for stripes in forwards.values())


@pytest.mark.parametrize("count", [64, 80, 160, 257, 1000])
def test_nobody_sends_more_than_an_eighth_above_what_it_receives(count: int) -> None:
    if count >= DEFAULT_STRIPES**2 or count % DEFAULT_STRIPES == 0:
        assert max(children(swarm(count, DEFAULT_STRIPES, DEFAULT_FANOUT)).values()) <= DEFAULT_FANOUT + 1


@pytest.mark.parametrize("count", range(2, 100))
def test_nobody_ever_sends_twice_what_it_receives(count: int) -> None:
    assert max(children(swarm(count, DEFAULT_STRIPES, DEFAULT_FANOUT)).values()) < 2 * DEFAULT_STRIPES


def test_one_stripe_and_fan_out_two_is_the_binary_tree_of_2014() -> None:
    topology = swarm(1000, 1, 2)
    assert topology.parent(node(0), 0) is None
    assert all(topology.parent(node(at), 0) == node((at - 1) // 2) for at in range(1, 1000))


@pytest.mark.parametrize("count", [1, 16, 160, 1000, 10_000])
def test_the_way_to_the_origin_is_logarithmic(count: int) -> None:
    topology = swarm(count, DEFAULT_STRIPES, DEFAULT_FANOUT)
    last = [node(number) for number in range(max(0, count - 64), count)]
    rows = -(-count // DEFAULT_STRIPES)
    # A leaf, its stand-in, its way up the heap of rows, and the deputy.
    assert max(len(topology.ancestors(member, 3)) for member in last) <= rows.bit_length() + 2


@given(topologies(), RACKS)
def test_a_join_moves_founders_only(topology: Topology, rack: str) -> None:
    before = all_parents(topology)
    places = {member: (at, index) for index, (_, rack) in enumerate(topology.racks()) for at, member in enumerate(rack)}
    topology.join(node(1000), rack)
    stripes = topology.stripes
    founders = {member for member, (at, index) in places.items() if at < stripes or index < stripes}
    assert moved(before, topology) <= (founders if stripes > 1 else set())


@given(SHAPES, st.integers(0, 40))
def test_a_join_moves_nobody_once_the_founders_are_settled(shape: tuple[int, int], more: int) -> None:
    stripes, fanout = shape
    if stripes > 4:
        return
    topology = swarm(stripes * stripes + more, stripes, fanout)
    before = all_parents(topology)
    topology.join(node(1000))
    assert not moved(before, topology)


@given(topologies(racks=st.just("")), st.data())
def test_a_leave_moves_about_one_fan_out(topology: Topology, data: st.DataObject) -> None:
    before = all_parents(topology)
    topology.leave(data.draw(st.sampled_from(members(topology))))
    # Those below the free seat, who fills it, and founders that hung below that one.
    assert len(moved(before, topology)) <= topology.fanout + topology.stripes + 1


@given(topologies(), st.data())
def test_a_leave_that_leaves_its_rack_standing_moves_about_two_fan_outs(
    topology: Topology, data: st.DataObject
) -> None:
    before = all_parents(topology)
    leaver = data.draw(st.sampled_from(members(topology)))
    standing = len(list(topology.racks()))
    topology.leave(leaver)
    if len(list(topology.racks())) == standing:
        # The same within the rack, and the gateways of racks below.
        assert len(moved(before, topology)) <= 2 * (topology.fanout + topology.stripes + 1)


@given(topologies())
def test_one_copy_of_the_image_enters_a_rack(topology: Topology) -> None:
    inside = {member: label for label, rack in topology.racks() for member in rack}
    entering = Counter(
        (inside[member], stripe)
        for (member, stripe), parent in all_parents(topology).items()
        if parent is None or inside[parent] != inside[member]
    )
    assert set(entering.values()) == {1}
    assert len(entering) == topology.stripes * len(set(inside.values()))


@pytest.mark.parametrize("per_rack", [1, 2, 4, 8, 20, 40])
def test_racks_keep_the_load_within_one_and_a_half(per_rack: int) -> None:
    topology = Topology((node(number), str(number // per_rack)) for number in range(1000))
    assert max(children(topology).values()) <= 1.5 * DEFAULT_STRIPES


@given(topologies())
def test_a_copy_of_the_seats_gives_the_same_trees(topology: Topology) -> None:
    copy = Topology(
        ((member, label) for label, rack in topology.racks() for member in rack),
        stripes=topology.stripes,
        fanout=topology.fanout,
    )
    assert all_parents(copy) == all_parents(topology)


def test_ten_thousand_members_are_planned_in_well_under_a_second() -> None:
    began = time.perf_counter()
    topology = swarm(10_000, DEFAULT_STRIPES, DEFAULT_FANOUT)
    for number in range(0, 10_000, 10):
        topology.parents(node(number))
    assert time.perf_counter() - began < 0.5


@pytest.mark.parametrize(("stripes", "fanout"), [(0, 2), (1, 1), (4, 4), (257, 300), (16, 2)])
def test_a_shape_that_makes_no_tree_is_refused(stripes: int, fanout: int) -> None:
    with pytest.raises(Usage):
        Topology(stripes=stripes, fanout=fanout)


def test_a_node_cannot_sit_twice() -> None:
    topology = swarm(3, 1, 2)
    with pytest.raises(Usage):
        topology.join(node(1), "elsewhere")
    assert len(topology) == 3
