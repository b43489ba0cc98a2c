"""Views of a swarm: what the tracker tells and every member keeps. [pure]

A view is named by the tracker's *term* (a random number of each run of it) and the *epoch* (its counter of changes).
It goes over the network as JSON, whole (`Snapshot`) or as the changes since an earlier one (`Delta`). Replicas that
were told the same have equal topologies. What comes from outside goes through `decode_…`, which says what is wrong with
it or returns values that can be relied on.
"""

import json
import re
from collections.abc import Iterable
from typing import Any, Final, NamedTuple, TypeAlias

from vmthunder.errors import Usage
from vmthunder.ids import DIGEST_BYTES, NODE_ID_BYTES, ImageId, NodeId
from vmthunder.swarm.topology import DEFAULT_FANOUT, DEFAULT_STRIPES, Topology

CLUSTER: Final = ImageId(bytes(DIGEST_BYTES))
"""The swarm of all nodes that are up, whatever they read: no image has this id. Its members' ports take orders."""
MAX_MEMBERS: Final = 100_000
MAX_SWARMS: Final = 1024
"""That one node may be in."""
MAX_LABEL_CHARS: Final = 64
MAX_HOST_CHARS: Final = 253
MAX_EPOCH: Final = (1 << 32) - 1
MAX_TERM: Final = (1 << 63) - 1


_HOST = re.compile(r"[A-Za-z0-9_.:-]+", re.ASCII)


class BadMessage(Usage):
    """A message between agent and tracker makes no sense."""


class Member(NamedTuple):
    """A node in a swarm, and where its peers reach it."""

    node: NodeId
    rack: str
    host: str
    port: int


class Version(NamedTuple):
    """The name of a view."""

    term: int
    epoch: int


class Joined(NamedTuple):
    """A member came, or came back at another address."""

    member: Member


class Left(NamedTuple):
    """A member went."""

    node: NodeId


Change: TypeAlias = Joined | Left


class Snapshot(NamedTuple):
    """A whole view: members rack by rack, in the order of their seats."""

    version: Version
    stripes: int
    fanout: int
    members: tuple[Member, ...]


class Delta(NamedTuple):
    """What changed since the view of epoch `since` of the same term."""

    version: Version
    since: int
    changes: tuple[Change, ...]


Update: TypeAlias = Snapshot | Delta


class Join(NamedTuple):
    """A node announces itself; after the tracker was away, with the view that it went on with."""

    swarm: ImageId
    member: Member
    view: Snapshot | None


class Leave(NamedTuple):
    """A node uses an image no longer."""

    swarm: ImageId
    node: NodeId


class Poll(NamedTuple):
    """A node is alive, knows these views, and wants to hear of newer ones."""

    node: NodeId
    versions: dict[ImageId, Version]


class Roster:
    """A replica of one swarm's view. One owner; no threads."""

    def __init__(self, stripes: int = DEFAULT_STRIPES, fanout: int = DEFAULT_FANOUT) -> None:
        self.version = Version(0, 0)
        self.topology = Topology(stripes=stripes, fanout=fanout)
        self.members: dict[NodeId, Member] = {}

    def change(self, change: Change) -> None:
        """Follow one change. One that is known already changes nothing."""
        if isinstance(change, Left):
            if self.members.pop(change.node, None) is not None:
                self.topology.leave(change.node)
            return
        member = change.member
        known = self.members.get(member.node)
        if known is not None and known.rack != member.rack:
            self.topology.leave(member.node)
            known = None
        if known is None:
            self.topology.join(member.node, member.rack)
        self.members[member.node] = member

    def update(self, update: Update) -> bool:
        """Follow the tracker; False if the update does not fit, and a snapshot must be asked for."""
        if isinstance(update, Snapshot):
            self.topology = Topology(stripes=update.stripes, fanout=update.fanout)
            self.members = {}
            for member in update.members:
                self.change(Joined(member))
        elif self.version != (update.version.term, update.since):
            return False
        else:
            for change in update.changes:
                self.change(change)
        self.version = update.version
        return True

    def snapshot(self) -> Snapshot:
        """The whole view."""
        members = (self.members[node] for _, rack in self.topology.racks() for node in rack)
        return Snapshot(self.version, self.topology.stripes, self.topology.fanout, tuple(members))


# JSON


def encode_update(update: Update) -> dict[str, Any]:
    """As JSON."""
    if isinstance(update, Snapshot):
        return {
            "term": update.version.term,
            "epoch": update.version.epoch,
            "stripes": update.stripes,
            "fanout": update.fanout,
            "members": [_encode_member(member) for member in update.members],
        }
    return {
        "term": update.version.term,
        "epoch": update.version.epoch,
        "since": update.since,
        "changes": [
            {"joined": _encode_member(change.member)} if isinstance(change, Joined) else {"left": change.node.hex()}
            for change in update.changes
        ],
    }


def decode_update(value: object) -> Update:
    """A view, or changes, from the tracker. Raises BadMessage."""
    fields = _object(value, "an update")
    version = Version(_integer(fields, "term", 0, MAX_TERM), _integer(fields, "epoch", 0, MAX_EPOCH))
    if "since" not in fields:
        return _decode_snapshot(fields, version)
    since = _integer(fields, "since", 0, version.epoch)
    return Delta(version, since, tuple(map(_decode_change, _array(fields, "changes", 2 * MAX_MEMBERS))))


def encode_join(join: Join) -> dict[str, Any]:
    """As JSON."""
    view = {} if join.view is None else {"view": encode_update(join.view)}
    return {"swarm": join.swarm.hex(), "member": _encode_member(join.member), **view}


def decode_join(text: bytes) -> Join:
    """An announcement from an agent. Raises BadMessage."""
    fields = _object(_json(text), "an announcement")
    view = None if fields.get("view") is None else decode_update(fields["view"])
    if isinstance(view, Delta):
        raise BadMessage("an announcement brings a whole view, not changes")
    return Join(_image(fields.get("swarm")), _decode_member(fields.get("member")), view)


def encode_leave(leave: Leave) -> dict[str, Any]:
    """As JSON."""
    return {"swarm": leave.swarm.hex(), "node": leave.node.hex()}


def decode_leave(text: bytes) -> Leave:
    """A good-bye from an agent. Raises BadMessage."""
    fields = _object(_json(text), "a good-bye")
    return Leave(_image(fields.get("swarm")), _node(fields.get("node")))


def encode_poll(poll: Poll) -> dict[str, Any]:
    """As JSON."""
    return {
        "node": poll.node.hex(),
        "versions": {swarm.hex(): list(version) for swarm, version in poll.versions.items()},
    }


def decode_poll(text: bytes) -> Poll:
    """A poll from an agent. Raises BadMessage."""
    fields = _object(_json(text), "a poll")
    versions = _object(fields.get("versions"), "versions")
    if len(versions) > MAX_SWARMS:
        raise BadMessage(f"a node can be in {MAX_SWARMS} swarms, not in {len(versions)}")
    known = {}
    for swarm, version in versions.items():
        if not isinstance(version, list) or len(version) != 2:
            raise BadMessage("a version is a term and an epoch")
        pair = {"term": version[0], "epoch": version[1]}
        known[_image(swarm)] = Version(_integer(pair, "term", 0, MAX_TERM), _integer(pair, "epoch", 0, MAX_EPOCH))
    return Poll(_node(fields.get("node")), known)


def encode_updates(updates: Iterable[tuple[ImageId, Update | None]]) -> dict[str, Any]:
    """The answer to a poll, as JSON; null for a swarm that the tracker does not know the node to be in."""
    return {swarm.hex(): None if update is None else encode_update(update) for swarm, update in updates}


def decode_updates(text: bytes) -> dict[ImageId, Update | None]:
    """The answer to a poll. Raises BadMessage."""
    fields = _object(_json(text), "an answer")
    return {_image(swarm): None if update is None else decode_update(update) for swarm, update in fields.items()}


def _decode_snapshot(fields: dict[str, Any], version: Version) -> Snapshot:
    members = tuple(map(_decode_member, _array(fields, "members", MAX_MEMBERS)))
    if len({member.node for member in members}) != len(members):
        raise BadMessage("a view names a node twice")
    snapshot = Snapshot(version, _integer(fields, "stripes", 1, 256), _integer(fields, "fanout", 1, 512), members)
    try:
        Topology(stripes=snapshot.stripes, fanout=snapshot.fanout)
    except Usage as error:
        raise BadMessage(str(error)) from error
    return snapshot


def _decode_change(value: object) -> Change:
    fields = _object(value, "a change")
    if set(fields) == {"joined"}:
        return Joined(_decode_member(fields["joined"]))
    if set(fields) == {"left"}:
        return Left(_node(fields["left"]))
    raise BadMessage("a change is either of joined and left")


def _encode_member(member: Member) -> list[str | int]:
    return [member.node.hex(), member.rack, member.host, member.port]


def _decode_member(value: object) -> Member:
    if not isinstance(value, list) or len(value) != 4:
        raise BadMessage("a member is a node id, a rack, a host and a port")
    node, rack, host, port = value
    if not isinstance(rack, str) or len(rack) > MAX_LABEL_CHARS or not rack.isprintable():
        raise BadMessage(f"a rack label is a text of at most {MAX_LABEL_CHARS} printable characters")
    if not isinstance(host, str) or len(host) > MAX_HOST_CHARS or not _HOST.fullmatch(host):
        raise BadMessage("a host is a name or an address")
    return Member(_node(node), rack, host, _integer({"port": port}, "port", 1, 65535))


def _json(text: bytes) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadMessage("a message is JSON, and this is not") from error


def _object(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadMessage(f"{what} is a JSON object")
    return value


def _array(fields: dict[str, Any], name: str, longest: int) -> list[Any]:
    value = fields.get(name)
    if not isinstance(value, list) or len(value) > longest:
        raise BadMessage(f"{name} is a JSON array of at most {longest}")
    return value


def _integer(fields: dict[str, Any], name: str, least: int, most: int) -> int:
    value = fields.get(name)
    if type(value) is not int or not least <= value <= most:
        raise BadMessage(f"{name} is an integer from {least} to {most}")
    return value


def _digest(value: object, size: int, what: str) -> bytes:
    try:
        if isinstance(value, str) and len(value) == 2 * size and value.isalnum():
            return bytes.fromhex(value)
    except ValueError:
        pass
    raise BadMessage(f"{what} is {2 * size} hexadecimal digits")


def _image(value: object) -> ImageId:
    return ImageId(_digest(value, DIGEST_BYTES, "an image id"))


def _node(value: object) -> NodeId:
    return NodeId(_digest(value, NODE_ID_BYTES, "a node id"))
