"""Who takes which stripe from whom: interior-disjoint trees as a pure function of the members' seats. [pure]

Every chunk belongs to one of S stripes, and every stripe has a tree of its own over the swarm. In each tree another set
of members forwards, all others are leaves (SplitStream, Castro et al., SOSP 2003), so that every member forwards about
as much as it receives. docs/swarm.md has the picture and the proofs.

Seats. Members sit in rows of S, in the order in which they came. The member in column c *forwards* stripe c:

    row 0    seats 0 … S-1        rows form a heap: row a hangs below row (a-1) // d
    row 1    seats S … 2S-1

    a forwarder of the stripe    takes it from the stripe's forwarder in the row above its own in the heap;
    everybody else               takes it from the nearest earlier seat that forwards it, one of the S-1 seats before;
    a founder (of row 0)         came before some stripes had a forwarder: see `_above`.

A forwarder therefore has at most S-1 leaves, d forwarders and one founder below it. With `fanout` = S-1+d, what a
member sends is fanout/S of what it receives (and one founder); S = 1 with fanout 2 is the binary heap of 2014.

Racks apply the same function twice: racks sit in rows of racks, members in rows within their rack. For each stripe one
member of a rack, its *gateway*, takes the stripe from outside; the sending rack spreads its links to other racks over
its seats. So one copy of the image enters a rack, through all of its members together.

Joins append; a leave moves the last member of the rack into the free seat. All views that saw the same joins and leaves
in the same order are equal. No I/O, no clock, no threads.
"""

from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from vmthunder.errors import Usage
from vmthunder.ids import NodeId

DEFAULT_STRIPES: Final = 16
DEFAULT_FANOUT: Final = 17
MAX_STRIPES: Final = 256


class Seat(NamedTuple):
    """A place in the swarm: index of the rack, and of the member in its rack."""

    rack: int
    place: int


class _Rack:
    __slots__ = ("label", "members")

    def __init__(self, label: str) -> None:
        self.label = label
        self.members: list[NodeId] = []


class Topology:
    """The seats of a swarm's members and the trees that follow from them."""

    def __init__(
        self,
        members: Iterable[tuple[NodeId, str]] = (),
        *,
        stripes: int = DEFAULT_STRIPES,
        fanout: int = DEFAULT_FANOUT,
    ) -> None:
        """Seat `members`, pairs of node id and rack label, in their join order.

        `fanout` is the number of members that a forwarder sends its stripe to.

        Raises:
            Usage: stripes or fan-out make no tree.
        """
        if not 1 <= stripes <= MAX_STRIPES:
            raise Usage(f"{stripes} stripes are not possible; use 1 to {MAX_STRIPES}")
        if not stripes < fanout <= 2 * MAX_STRIPES:
            raise Usage(f"fan-out {fanout} is too small for {stripes} stripes; use {stripes + 1} or a little more")
        self.stripes = stripes
        self.fanout = fanout
        self._below = fanout - stripes + 1
        self._racks: list[_Rack] = []
        self._rack_index: dict[str, int] = {}
        self._seats: dict[NodeId, Seat] = {}
        for member, rack in members:
            self.join(member, rack)

    def __len__(self) -> int:
        return len(self._seats)

    def __contains__(self, member: object) -> bool:
        return member in self._seats

    def racks(self) -> Iterator[tuple[str, list[NodeId]]]:
        """Labels and members of the racks, in the order of their seats: all there is to know about a topology."""
        for rack in self._racks:
            yield rack.label, list(rack.members)

    def join(self, member: NodeId, rack: str = "") -> None:
        """Seat a member behind all others of its rack. Raises Usage if it is seated already."""
        if member in self._seats:
            raise Usage(f"node {member.hex()} is in the swarm already")
        index = self._rack_index.get(rack)
        if index is None:
            index = self._rack_index[rack] = len(self._racks)
            self._racks.append(_Rack(rack))
        members = self._racks[index].members
        self._seats[member] = Seat(index, len(members))
        members.append(member)

    def leave(self, member: NodeId) -> None:
        """Take a member out; the last of its rack moves into the free seat. Raises KeyError for a stranger."""
        index, place = self._seats.pop(member)
        members = self._racks[index].members
        last = members.pop()
        if last != member:
            members[place] = last
            self._seats[last] = Seat(index, place)
        if members:
            return
        del self._rack_index[self._racks[index].label]
        moved = self._racks.pop()
        if index < len(self._racks):
            self._racks[index] = moved
            self._rack_index[moved.label] = index
            for at, neighbour in enumerate(moved.members):
                self._seats[neighbour] = Seat(index, at)

    def parent(self, member: NodeId, stripe: int) -> NodeId | None:
        """Whom a member takes a stripe from; None is the origin. Raises KeyError for a stranger."""
        above = self._above_seat(self._seats[member], stripe)
        return None if above is None else self._racks[above.rack].members[above.place]

    def parents(self, member: NodeId) -> list[NodeId | None]:
        """Whom a member takes each stripe from, by stripe."""
        return [self.parent(member, stripe) for stripe in range(self.stripes)]

    def ancestors(self, member: NodeId, stripe: int) -> list[NodeId]:
        """Whom to ask for a chunk of a stripe, in this order; after the last of them, the origin.

        The stripe's parent, a leaf's *stand-in* for it, the parent's parent, and so on. A stand-in is another leaf, so that
        the many leaves of a slow or dead forwarder do not all turn to the next forwarder. The last one before each way out
        of a rack is the gateway's *deputy*: when a gateway is dead, its children turn to one of them instead of all to the
        outside. The deputy takes the stripe from the gateway itself, so nobody can be sent round in a circle.
        """
        own = seat = self._seats[member]
        chain: list[NodeId] = []
        while True:
            members = self._racks[seat.rack].members
            above = self._above(seat.place, stripe, len(members))
            place = seat.place
            while above is not None:
                place = above
                chain.append(members[place])
                above = self._above(place, stripe, len(members))
            deputy = (place + 1) % len(members)
            if seat == own and own.place not in (place, deputy):
                stand_in = self._stand_in(own.place, stripe, len(members))
                if stand_in is not None:
                    chain.insert(1, members[stand_in])
            if seat.place not in (place, deputy) and members[deputy] not in chain:
                chain.append(members[deputy])
            outside = self._outside(seat.rack, stripe)
            if outside is None:
                return chain
            chain.append(self._racks[outside.rack].members[outside.place])
            seat = outside

    def _stand_in(self, place: int, stripe: int, count: int) -> int | None:
        """The seat that a leaf turns to when who it takes `stripe` from does not deliver: in the row before, or in row 0, where
        all but the first founders take it from the gateway, along a binary tree below the deputy. Always nearer to the
        gateway in the order of seats; forwarders and the deputy have none, so nobody is sent round in a circle."""
        stripes = self.stripes
        if place >= stripes:
            return None if place % stripes == stripe else place - stripes
        root = stripe % count if count < stripes else stripe
        if count >= stripes and place < root:
            return None
        nth = (place - root) % count
        return (root + nth // 2) % count if nth > 1 else None

    def _above_seat(self, seat: Seat, stripe: int) -> Seat | None:
        above = self._above(seat.place, stripe, len(self._racks[seat.rack].members))
        return self._outside(seat.rack, stripe) if above is None else Seat(seat.rack, above)

    def _outside(self, rack: int, stripe: int) -> Seat | None:
        """Who sends a stripe to a rack's gateway; None is the origin."""
        above = self._above(rack, stripe, len(self._racks))
        if above is None:
            return None
        # The two terms deal a rack's links to different seats, both those to leaves and those to forwarding racks.
        seats = min(len(self._racks[above].members), self.stripes)
        return Seat(above, (rack + rack // self.stripes) % seats)

    def _above(self, place: int, stripe: int, count: int) -> int | None:
        """The seat that sends `stripe` to seat `place` of `count`; None if it comes from outside."""
        stripes = self.stripes
        if count < stripes:
            # Too few for a forwarder per stripe, and for interior-disjoint trees: each forwards its share.
            root = stripe % count
            return None if place == root else root
        row, column = divmod(place, stripes)
        if column == stripe:
            return stripe + stripes * ((row - 1) // self._below) if row else None
        if place > stripe:
            return place - (place - stripe) % stripes
        # A founder that sat here before the stripe had a forwarder. If they all stayed with the first forwarder it
        # would send twice its share, so each is handed down to a row of its own as rows appear.
        last_row = (count - 1 - stripe) // stripes
        return stripe + stripes * min(place + 1, last_row)
