"""The tracker of a simulated swarm, and the views that its nodes have. [pure]

Runs the tracker's state machine and the roster that agents follow it with. Nodes that were told the same have equal
views, so they share one.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Final

from vmthunder.ids import DIGEST_BYTES, ImageId, NodeId
from vmthunder.sim.scenario import Shape
from vmthunder.swarm.tracker import LEASE_S, Tracker
from vmthunder.swarm.view import Join, Member, Poll, Roster, Snapshot, Update, Version

POLL_S: Final = LEASE_S / 3
"""How often a node that lives renews its poll."""
_IMAGE: Final = ImageId(b"\1" * DIGEST_BYTES)
_CHAIN: Final = 4
"""Whom a node of a chain knows before it."""


class View:
    """What a node knows of the swarm."""

    def __init__(self, roster: Roster, shape: Shape) -> None:
        self.roster: Final = roster
        self._shape: Final = shape
        self._ancestors: dict[tuple[NodeId, int], Sequence[NodeId]] = {}
        self._order: list[NodeId] = []
        self._places: dict[NodeId, int] = {}
        if shape is Shape.CHAIN:
            self._order = [member.node for member in roster.snapshot().members]
            self._places = {node: place for place, node in enumerate(self._order)}

    def ancestors(self, node: NodeId, stripe: int) -> Sequence[NodeId]:
        """Whom a node asks for a chunk of a stripe, in this order, before the origin."""
        key = node, stripe
        known = self._ancestors.get(key)
        if known is None:
            known = self._ancestors[key] = self._find(node, stripe)
        return known

    def _find(self, node: NodeId, stripe: int) -> Sequence[NodeId]:
        if self._shape is Shape.STAR or node not in self.roster.topology:
            return ()
        if self._shape is Shape.CHAIN:
            place = self._places[node]
            return self._order[max(0, place - _CHAIN) : place][::-1]
        return self.roster.topology.ancestors(node, stripe)


class Views:
    """Who knows what, and when. `told` is called with a node and its new view."""

    def __init__(self, shape: Shape, stripes: int, fanout: int, told: Callable[[NodeId, View], None]) -> None:
        self._shape = shape
        self._told = told
        self._tracker = Tracker(1, stripes=stripes, fanout=fanout)
        self._numbers = 0
        self._asked: dict[int, NodeId] = {}
        self._nodes: dict[NodeId, View | None] = {}
        self._views: dict[Version, View] = {}

    def join(self, node: NodeId, rack: str, now: float) -> None:
        """A node announces itself."""
        self._nodes[node] = None
        waiter = self._waiter(node)
        view = self._tracker.join(Join(_IMAGE, Member(node, rack, "node", 1), None), waiter, now)
        if view is not None:
            self._hear(node, view, now)
        self.tick(now)

    def vanish(self, node: NodeId) -> None:
        """A node is gone without a word: the tracker learns it when its lease is over."""
        del self._nodes[node]

    def renew(self, now: float) -> None:
        """All that live ask again."""
        for node, view in self._nodes.items():
            if view is not None:
                self._poll(node, view, now)
        self.tick(now)

    def due(self) -> float | None:
        """When `tick` has something to do."""
        return self._tracker.due()

    def tick(self, now: float) -> None:
        """Tell nodes what they have to hear."""
        for wake in self._tracker.tick(now):
            node = self._asked.pop(wake.waiter)
            if node in self._nodes:
                for _, update in wake.updates:
                    assert update is not None, "who lives renews its lease"
                    self._hear(node, update, now)

    def _hear(self, node: NodeId, update: Update, now: float) -> None:
        view = self._views.get(update.version)
        if view is None:
            roster = Roster()
            before = self._nodes[node]
            if not isinstance(update, Snapshot):
                assert before is not None
                roster.update(before.roster.snapshot())
            roster.update(update)
            view = self._views[update.version] = View(roster, self._shape)
            self._forget(update.version)
        self._nodes[node] = view
        self._told(node, view)
        self._poll(node, view, now)

    def _forget(self, newest: Version) -> None:
        """Views that nobody will be told of again."""
        for version in [version for version in self._views if version != newest]:
            del self._views[version]

    def _poll(self, node: NodeId, view: View, now: float) -> None:
        waiter = self._waiter(node)
        news: Iterable[tuple[ImageId, Update | None]] | None
        news = self._tracker.poll(Poll(node, {_IMAGE: view.roster.version}), waiter, now)
        for _, update in news or ():
            assert update is not None
            self._hear(node, update, now)

    def _waiter(self, node: NodeId) -> int:
        self._numbers += 1
        self._asked[self._numbers] = node
        return self._numbers
