"""The tracker's state: who is in the swarm of which image. [pure]

A state machine of (event, now) → answers. Events are its methods; `now` is any clock that does not go back, in seconds.
It waits for nothing: who must wait is parked under a number that the caller chose, and later returned by `tick` with
what to answer. The caller calls `tick` when `due()` has come, and after every event. No threads.

Soft state only. After a restart every node's poll is answered with "unknown", it announces itself again, and the first
to do so brings the view that it went on with: so all keep their seats, and those that do not come back expire.

Changes are told together, `SETTLE_S` after the first that was not told, to those who come as to those who are there:
160 nodes that join at once make a few updates of many changes and not 160 of one, and nobody begins with a view in
which those are missing that came in the same moment.
"""

import heapq
from collections import deque
from itertools import islice
from typing import Final, NamedTuple

from vmthunder.errors import Conflict
from vmthunder.ids import ImageId, NodeId
from vmthunder.swarm.topology import DEFAULT_FANOUT, DEFAULT_STRIPES
from vmthunder.swarm.view import (
    MAX_MEMBERS,
    Change,
    Delta,
    Join,
    Joined,
    Leave,
    Left,
    Poll,
    Roster,
    Snapshot,
    Update,
    Version,
)

LEASE_S: Final = 45.0
"""A node that was not heard of for so long is gone. Polls are to be renewed at least three times in it."""
GRACE_S: Final = 3.0
"""What is left of the lease of a node whose poll broke off: it is restarting, or dead."""
SETTLE_S: Final = 0.1
MAX_CHANGES: Final = 4096
"""That are remembered per swarm. Who knows an older view gets a snapshot."""
_NOBODY: Final = NodeId(b"")


class Wake(NamedTuple):
    """An instruction: answer who is parked. No updates: a newer poll of the same node took its place."""

    waiter: int
    updates: list[tuple[ImageId, Update | None]]


class _Node:
    __slots__ = ("deadline", "looked_at", "polled", "swarms", "waiter")

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.looked_at = deadline  # time of its entry in `_expiries`; other entries are stale
        self.swarms: set[ImageId] = set()
        self.waiter: int | None = None
        self.polled: dict[ImageId, Version] = {}


class _Swarm:
    __slots__ = ("base", "changes", "joining", "roster", "snapshot", "tell_at")

    def __init__(self, roster: Roster) -> None:
        self.roster = roster
        self.base = roster.version.epoch  # deltas can begin here or later
        self.changes: deque[tuple[int, Change]] = deque()  # with the epoch that each led to
        self.snapshot: Snapshot | None = None  # of the present epoch, once it was asked for
        self.tell_at: float | None = None  # when who is parked hears of changes; None if all know all
        self.joining: list[int] = []  # waiters that hear the whole view then


class Tracker:
    """Who is in the swarm of which image."""

    def __init__(self, term: int, *, stripes: int = DEFAULT_STRIPES, fanout: int = DEFAULT_FANOUT) -> None:
        """`term` is a random number from 1 to `view.MAX_TERM`: it tells one run of the tracker from the next.

        Raises:
            Usage: stripes or fan-out make no tree.
        """
        self._term = term
        Roster(stripes, fanout)
        self._shape = stripes, fanout
        self._epoch = 0
        self._nodes: dict[NodeId, _Node] = {}
        self._swarms: dict[ImageId, _Swarm] = {}
        self._waiters: dict[int, NodeId] = {}
        self._wakes: list[Wake] = []  # that do not wait for their swarm to settle
        self._expiries: list[tuple[float, NodeId]] = []  # heap, see `_Node.looked_at`

    def join(self, join: Join, waiter: int, now: float) -> Snapshot | None:
        """A node announces itself, the first time or again; it is seated at once.

        The whole view; None until the swarm has settled: then `tick` returns `waiter` with it.

        Raises:
            Conflict: the swarm is full.
        """
        swarm = self._swarms.get(join.swarm)
        if swarm is None:
            swarm = self._found(join, now)
        member = join.member
        if swarm.roster.members.get(member.node) != member:
            if len(swarm.roster.members) >= MAX_MEMBERS:
                raise Conflict(f"the swarm of image {join.swarm.hex()} has {MAX_MEMBERS} members, and no room for more")
            self._change(swarm, Joined(member), now)
        self._heard(member.node, now + LEASE_S).swarms.add(join.swarm)
        if swarm.tell_at is None:
            return self._snapshot(swarm)
        swarm.joining.append(waiter)
        self._waiters[waiter] = member.node
        return None

    def leave(self, leave: Leave, now: float) -> None:
        """A node uses an image no longer."""
        node = self._nodes.get(leave.node)
        if node is not None and leave.swarm in node.swarms:
            node.swarms.remove(leave.swarm)
            node.polled.pop(leave.swarm, None)
            self._remove(leave.swarm, leave.node, now)

    def poll(self, poll: Poll, waiter: int, now: float) -> list[tuple[ImageId, Update | None]] | None:
        """What a node has to hear, None if that is nothing yet: then `tick` returns `waiter` later.

        In place of an update, None says that the node is not known to be in that swarm and must announce itself.
        """
        node = self._nodes.get(poll.node)
        if node is None:
            return [(swarm, None) for swarm in poll.versions]
        self._heard(poll.node, now + LEASE_S)
        if node.waiter is not None:
            self._wakes.append(Wake(node.waiter, []))
            del self._waiters[node.waiter]
            node.waiter = None
        node.polled = poll.versions
        # Changes of this moment wait for those that come with them.
        settling = {
            swarm for swarm in poll.versions if (known := self._swarms.get(swarm)) and known.tell_at is not None
        }
        updates = self._updates(node, settling)
        if updates:
            return updates
        node.waiter = waiter
        self._waiters[waiter] = poll.node
        return None

    def forget(self, waiter: int) -> None:
        """A parked poll was given up in good order: its time was over."""
        self._release(waiter)

    def hung_up(self, waiter: int, now: float) -> None:
        """The connection of who is parked broke: unless the node is heard of again soon, it is gone."""
        node_id, node = self._release(waiter)
        if node is not None:
            self._heard(node_id, min(node.deadline, now + GRACE_S))

    def tick(self, now: float) -> list[Wake]:
        """Let time pass: expire nodes, and answer those who have something to hear."""
        while self._expiries and self._expiries[0][0] <= now:
            at, node_id = heapq.heappop(self._expiries)
            node = self._nodes.get(node_id)
            if node is None or node.looked_at != at:
                continue
            if node.deadline > now:
                self._look_at(node_id, node)
            else:
                self._expire(node_id, node, now)
        wakes, self._wakes = self._wakes, []
        for image, swarm in self._swarms.items():
            if swarm.tell_at is None or swarm.tell_at > now:
                continue
            swarm.tell_at = None
            for waiter in swarm.joining:
                if self._waiters.pop(waiter, None) is not None:
                    wakes.append(Wake(waiter, [(image, self._snapshot(swarm))]))
            swarm.joining.clear()
            for member in swarm.roster.members:
                node = self._nodes[member]
                if node.waiter is not None and (updates := self._updates(node, set())):
                    wakes.append(Wake(node.waiter, updates))
                    self._release(node.waiter)
        return wakes

    def due(self) -> float | None:
        """When `tick` has something to do, if no event comes before; None for never."""
        times = [swarm.tell_at for swarm in self._swarms.values() if swarm.tell_at is not None]
        times += [time for time, _ in self._expiries[:1]]
        return -float("inf") if self._wakes else min(times, default=None)

    def views(self) -> dict[ImageId, Snapshot]:
        """Who is where now, settled or not."""
        return {image: self._snapshot(swarm) for image, swarm in self._swarms.items()}

    def _found(self, join: Join, now: float) -> _Swarm:
        """Begin a swarm; with the seats that it had, if the tracker was away and a member remembers them."""
        roster = Roster(*self._shape)
        view = join.view
        if view is not None and (view.stripes, view.fanout) == self._shape:
            for member in view.members:
                roster.change(Joined(member))
                self._heard(member.node, now + LEASE_S).swarms.add(join.swarm)
        self._epoch += 1
        roster.version = Version(self._term, self._epoch)
        swarm = self._swarms[join.swarm] = _Swarm(roster)
        return swarm

    def _release(self, waiter: int) -> tuple[NodeId, _Node | None]:
        """Take who is parked out of it; the node, if there still is one."""
        node_id = self._waiters.pop(waiter, _NOBODY)
        node = self._nodes.get(node_id)
        if node is not None and node.waiter == waiter:
            node.waiter = None
        return node_id, node

    def _heard(self, node_id: NodeId, deadline: float) -> _Node:
        node = self._nodes.get(node_id)
        if node is None:
            node = self._nodes[node_id] = _Node(deadline)
            self._look_at(node_id, node)
        node.deadline = deadline
        if deadline < node.looked_at:
            self._look_at(node_id, node)
        return node

    def _look_at(self, node_id: NodeId, node: _Node) -> None:
        node.looked_at = node.deadline
        heapq.heappush(self._expiries, (node.deadline, node_id))

    def _expire(self, node_id: NodeId, node: _Node, now: float) -> None:
        if node.waiter is not None:
            self._wakes.append(Wake(node.waiter, [(swarm, None) for swarm in node.polled]))
            del self._waiters[node.waiter]
        del self._nodes[node_id]
        for swarm in node.swarms:
            self._remove(swarm, node_id, now)

    def _remove(self, image: ImageId, node_id: NodeId, now: float) -> None:
        swarm = self._swarms[image]
        self._change(swarm, Left(node_id), now)
        if not swarm.roster.members:
            for waiter in swarm.joining:  # who came and went while the swarm settled
                if self._waiters.pop(waiter, None) is not None:
                    self._wakes.append(Wake(waiter, [(image, None)]))
            del self._swarms[image]

    def _change(self, swarm: _Swarm, change: Change, now: float) -> None:
        self._epoch += 1
        swarm.roster.change(change)
        swarm.roster.version = Version(self._term, self._epoch)
        swarm.changes.append((self._epoch, change))
        if len(swarm.changes) > MAX_CHANGES:
            swarm.base = swarm.changes.popleft()[0]
        swarm.snapshot = None
        if swarm.tell_at is None:
            swarm.tell_at = now + SETTLE_S

    def _snapshot(self, swarm: _Swarm) -> Snapshot:
        if swarm.snapshot is None:
            swarm.snapshot = swarm.roster.snapshot()
        return swarm.snapshot

    def _updates(self, node: _Node, settling: set[ImageId]) -> list[tuple[ImageId, Update | None]]:
        """What a node does not know of the swarms that it asked about."""
        updates: list[tuple[ImageId, Update | None]] = []
        for image, version in node.polled.items():
            if image not in node.swarms:
                updates.append((image, None))
            elif image not in settling and version != self._swarms[image].roster.version:
                updates.append((image, self._update(self._swarms[image], version)))
        return updates

    def _update(self, swarm: _Swarm, known: Version) -> Update:
        if known.term != self._term or not swarm.base <= known.epoch <= swarm.roster.version.epoch:
            return self._snapshot(swarm)
        # Nearly everybody knows all but the last few: count from the end.
        unknown = 0
        for epoch, _ in reversed(swarm.changes):
            if epoch <= known.epoch:
                break
            unknown += 1
        changes = islice(swarm.changes, len(swarm.changes) - unknown, None)
        return Delta(swarm.roster.version, known.epoch, tuple(change for _, change in changes))
