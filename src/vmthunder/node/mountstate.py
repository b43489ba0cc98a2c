"""What one mount has promised to the kernel: node numbers, what is open, backing files. Outlives the worker.

The kernel names a file by the number that LOOKUP gave it, for as long as the connection lives; workers come and go
meanwhile. So every promise is on disk before the answer that makes it: a worker that is killed between the two has
promised what nobody heard, and its successor only knows more than it must, which costs a line in `ls`. Requests come
twice when a worker dies before it answers; so open files are a set and not a count: a RELEASE that comes twice must not
take back somebody else's OPEN.

The file lies in the run directory and means nothing to another mount. Belongs to the event loop.
"""

import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vmthunder.errors import CorruptFile
from vmthunder.ids import ImageId

ROOT = 1
"""Number of the root directory, given by the protocol."""
VERSION = 1


@dataclass(slots=True)
class Node:
    """A file that the kernel may name by its number."""

    number: int
    image_id: ImageId
    materialized: bool
    """An image has two nodes, one through us and one in passthrough: the kernel refuses to mix both on one inode."""
    size_bytes: int
    name: str | None
    """What people called it when it was last looked up; None if only its image id was known."""
    lookups: int = 0
    """LOOKUPs that were answered and not forgotten, or more."""
    handles: set[int] = field(default_factory=set)
    """File handles that are open, or more."""
    read_bytes: int = 0
    """What workers were asked for, those of files that are open now aside."""
    backing_id: int | None = None
    """What the kernel calls the local file while the node is open in passthrough; one for all opens of it."""


class MountState:
    """The nodes of one mount, and the file that keeps them."""

    def __init__(self, path: Path, *, now_s: float | None = None) -> None:
        """The state of a new mount, not yet on disk."""
        self._path = path
        self._nodes: dict[int, Node] = {}
        self._by_image: dict[tuple[ImageId, bool], Node] = {}
        self._next = ROOT + 1
        """The next number for a node or a handle; none is used twice."""
        self.mounted_at = time.time() if now_s is None else now_s
        """Wall clock, seconds."""

    @classmethod
    def load(cls, path: Path) -> "MountState":
        """Take over from the worker before.

        Raises:
            CorruptFile: the file is not there or makes no sense.
        """
        state = cls(path)
        try:
            saved = json.loads(path.read_bytes())
            if saved["version"] != VERSION:
                raise CorruptFile(f"{path} has version {saved['version']}, this program reads version {VERSION}")
            state._next = int(saved["next"])
            state.mounted_at = float(saved["mounted_at"])
            for fields in saved["nodes"]:
                fields["handles"] = set(fields["handles"])
                fields["image_id"] = ImageId(bytes.fromhex(fields["image_id"]))
                state._insert(Node(**fields))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CorruptFile(f"{path} does not tell what the kernel holds: {error!r}") from None
        return state

    def save(self) -> None:
        """Write the file; it appears whole or not at all."""
        saved = {
            "version": VERSION,
            "next": self._next,
            "mounted_at": self.mounted_at,
            "nodes": [_fields(node) for node in self._nodes.values()],
        }
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(saved))
        os.replace(temporary, self._path)  # noqa: PTH105 - on the path of every LOOKUP

    def node(self, number: int) -> Node | None:
        return self._nodes.get(number)

    def nodes(self) -> list[Node]:
        return list(self._nodes.values())

    def find(self, image_id: ImageId, *, materialized: bool) -> Node | None:
        return self._by_image.get((image_id, materialized))

    def open_times(self, image_id: ImageId) -> int:
        """How often an image is open, from a local copy or on demand."""
        return sum(len(node.handles) for node in self._nodes.values() if node.image_id == image_id)

    def look_up(self, image_id: ImageId, size_bytes: int, name: str | None, *, materialized: bool) -> Node:
        """Count one LOOKUP of an image's node, which is made if need be."""
        node = self.find(image_id, materialized=materialized)
        if node is None:
            node = Node(self._number(), image_id, materialized, size_bytes, name)
            self._insert(node)
        node.name = name or node.name
        node.lookups += 1
        self.save()
        return node

    def forget(self, node: Node, lookups: int) -> bool:
        """Take back LOOKUPs; True if that was the end of the node. Not saved: more than there are do no harm."""
        node.lookups = max(0, node.lookups - lookups)
        if node.lookups or node.handles:
            return False
        del self._nodes[node.number], self._by_image[node.image_id, node.materialized]
        return True

    def open(self, node: Node, backing_id: int | None) -> int:
        """A new handle on a node, in passthrough to `backing_id` if that is not None."""
        handle = self._number()
        node.handles.add(handle)
        node.backing_id = backing_id
        self.save()
        return handle

    def release(self, node: Node, handle: int) -> int | None:
        """Give a handle up; returns the backing id that nobody uses any more, if there is one, for closing.

        It is forgotten before it is closed: the other way round, a worker killed between the two would leave its
        successor with an id that the kernel may have given to another file.
        """
        node.handles.discard(handle)
        unused = None
        if not node.handles:
            unused, node.backing_id = node.backing_id, None
        self.save()
        return unused

    def _number(self) -> int:
        self._next += 1
        return self._next - 1

    def _insert(self, node: Node) -> None:
        self._nodes[node.number] = self._by_image[node.image_id, node.materialized] = node


def _fields(node: Node) -> dict[str, Any]:
    return asdict(node) | {"image_id": node.image_id.hex(), "handles": sorted(node.handles)}
