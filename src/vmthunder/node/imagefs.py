"""The file system that the kernel sees: names to images, our errors to errno, and nothing else.

The root holds every published image as `NAME.raw`, looked up at the origin when it is named, and as `IMAGE-ID.raw`,
whose bytes never change, which is what overlays name as their backing file. Listing shows the images that are open and
those that are materialized. Names are asked for at every lookup (no entry time-out; the catalogue remembers for a
second), so a republished or materialized image is seen by the next open, while whoever has the old one open keeps its
bytes.

Belongs to the event loop. What is promised to the kernel is in MountState before it is answered.
"""

import errno
import logging
import os
import stat
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from vmthunder.errors import InvalidName, NotFound, NotPermitted, OriginUnavailable, VMThunderError
from vmthunder.fuse.protocol import Attr, DirEntry, Entry, Opened, Statfs
from vmthunder.ids import Buffer, ImageId
from vmthunder.image.manifest import Manifest
from vmthunder.node.catalogue import Catalogue
from vmthunder.node.materialized import MaterializedImages
from vmthunder.node.mountstate import ROOT, MountState, Node

log = logging.getLogger(__name__)

SUFFIX = ".raw"
ATTR_VALID_S = 86400.0
"""Images do not change."""
_DIRECTORY_MODE = stat.S_IFDIR | 0o555
_FILE_MODE = stat.S_IFREG | 0o444

Slices = Sequence[Buffer]


class OpenFile(Protocol):
    """The bytes behind one node."""

    read_bytes: int
    """What was asked of us so far."""

    def read(self, offset: int, size_bytes: int, *, direct: bool) -> Slices | Awaitable[Slices]: ...
    def close(self) -> None: ...


class Swarms(Protocol):
    """The swarms that this node is in."""

    def use(self, image: ImageId) -> None: ...
    async def settled(self, image: ImageId) -> None: ...


class Backing(Protocol):
    """The kernel's side of passthrough; raises OSError."""

    def open_backing(self, fd: int) -> int: ...
    def close_backing(self, backing_id: int) -> None: ...


class ImageFileSystem:
    """Implements `vmthunder.fuse.session.FileSystem`."""

    def __init__(
        self,
        catalogue: Catalogue,
        materialized: MaterializedImages,
        state: MountState,
        open_image: Callable[[Node, Manifest], OpenFile],
        open_local: Callable[[int], OpenFile],
        swarms: Swarms | None = None,
        opened: Callable[[Node, bool], None] = lambda _node, _direct: None,
    ) -> None:
        """`opened` is told of each open on demand, and of the first read of what was open before this worker: the node, and
        whether the reader does without the page cache."""
        self._catalogue = catalogue
        self._materialized = materialized
        self._state = state
        self._open_image = open_image
        self._open_local = open_local
        self._swarms = swarms
        self._opened = opened
        self._files: dict[int, OpenFile] = {}
        self.backing: Backing | None = None
        """Set once there is a session, if the kernel has passthrough."""
        materialized.made = self._made

    async def lookup(self, parent: int, name: bytes) -> Entry:
        if parent != ROOT or not name.endswith(SUFFIX.encode()):
            raise OSError(errno.ENOENT, "no such image")
        try:
            manifest = await self._catalogue.find(os.fsdecode(name).removesuffix(SUFFIX))
        except (NotFound, InvalidName):
            raise OSError(errno.ENOENT, "no such image") from None
        except VMThunderError as error:
            log.warning("event=lookup_failed name=%s reason=%s", os.fsdecode(name), error)
            raise OSError(_errno(error), str(error)) from None
        return self.entry(manifest)

    def entry(self, manifest: Manifest) -> Entry:
        """Count one lookup of an image."""
        image = manifest.image_id
        node = self._state.look_up(
            image, manifest.virtual_bytes, self._catalogue.name_of(image), materialized=image in self._materialized
        )
        return Entry(node.number, _file_attr(node), entry_valid_s=0, attr_valid_s=ATTR_VALID_S)

    def forget(self, node: int, nlookup: int) -> None:
        known = self._state.node(node)
        if known is not None and self._state.forget(known, nlookup):
            self._close(known)

    def getattr(self, node: int) -> tuple[Attr, float]:
        attr = Attr(ROOT, 0, _DIRECTORY_MODE, nlink=2) if node == ROOT else _file_attr(self._node(node))
        return attr, ATTR_VALID_S

    async def open(self, node: int, flags: int) -> Opened:
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise OSError(errno.EROFS, "images are read-only")
        known = self._node(node)
        backing_id = known.backing_id
        # A file that is open through us must not be opened in passthrough beside that: the kernel answers EIO.
        if known.materialized and not known.handles:
            backing_id = self._open_backing(known)
        handle = self._state.open(known, backing_id)
        if not known.materialized:
            self._use(
                known, direct=bool(flags & os.O_DIRECT)
            )  # before the first read, which would rather not wait for it
        # The kernel brings the handle back with each READ: what a worker must know of it, it finds in the handle.
        return Opened(handle << 1 | bool(flags & os.O_DIRECT), backing_id or 0)

    def _open_backing(self, node: Node) -> int | None:
        """A backing id; None where this kernel or the file system below does not offer it: then we read."""
        if self.backing is None:
            return None
        try:
            descriptor = self._materialized.open(node.image_id)
        except FileNotFoundError:
            # The kernel looks the name up once more, and finds the image on demand.
            raise OSError(errno.ESTALE, "no longer materialized") from None
        try:
            return self.backing.open_backing(descriptor)
        except OSError as error:
            log.warning("event=no_passthrough image=%s reason=%s", node.image_id.hex(), error.strerror)
            return None
        finally:
            os.close(descriptor)

    def read(self, node: int, fh: int, offset: int, size_bytes: int) -> Slices | Awaitable[Slices]:
        file = self._files.get(node)
        if file is None:
            return self._read_first(node, fh, offset, size_bytes)
        return file.read(offset, size_bytes, direct=bool(fh & 1))

    async def _read_first(self, node: int, fh: int, offset: int, size_bytes: int) -> Slices:
        known = self._node(node)
        if known.materialized or known.image_id in self._materialized:
            try:
                file = self._open_local(self._materialized.open(known.image_id))
            except FileNotFoundError:
                # Removed by hand under an open file. The origin has the same bytes.
                file = await self._on_demand(known, fh)
        else:
            file = await self._on_demand(known, fh)
        # Somebody may have come first during the await.
        if self._files.setdefault(node, file) is not file:
            file.close()
            file = self._files[node]
        slices = file.read(offset, size_bytes, direct=bool(fh & 1))
        return await slices if isinstance(slices, Awaitable) else slices

    async def _on_demand(self, node: Node, fh: int) -> OpenFile:
        # Also after a worker's death: its successor must be in the swarm before it asks everything of the origin.
        self._use(node, direct=bool(fh & 1))
        if self._swarms is not None:
            await self._swarms.settled(node.image_id)
        return self._open_image(node, await self._catalogue.manifest(node.image_id))

    def _use(self, node: Node, *, direct: bool) -> None:
        if self._swarms is not None:
            self._swarms.use(node.image_id)
        self._opened(node, direct)

    async def lseek(self, node: int, offset: int, whence: int) -> int:
        """SEEK_DATA and SEEK_HOLE: slices without a chunk are holes, so that who copies an image need not read them."""
        known = self._node(node)
        if not 0 <= offset < known.size_bytes:
            raise OSError(errno.ENXIO, "behind the end")
        manifest = await self._catalogue.manifest(known.image_id)
        wanted = whence == os.SEEK_DATA
        for index in range(offset // manifest.chunk_bytes, manifest.chunk_count):
            if (manifest.row(index) is not None) == wanted:
                return max(offset, index * manifest.chunk_bytes)
        if wanted:
            raise OSError(errno.ENXIO, "no data from here on")
        return known.size_bytes

    def read_bytes(self, node: Node) -> int:
        """Bytes that we were asked for; what the kernel had in its page cache is not among them."""
        file = self._files.get(node.number)
        return node.read_bytes + (file.read_bytes if file else 0)

    def release(self, node: int, fh: int) -> None:
        known = self._state.node(node)
        if known is None:
            return
        if known.handles == {fh >> 1}:
            self._close(known)
        unused = self._state.release(known, fh >> 1)
        if unused is not None and self.backing is not None:
            self.backing.close_backing(unused)

    def _made(self, image: ImageId) -> None:
        """A local copy is whole: who has the image open on demand reads from it, too, so that the origin may forget it."""
        node = self._state.find(image, materialized=False)
        if node is not None:
            self._close(node)

    def _close(self, node: Node) -> None:
        """Give its manifest or its descriptor back; the next read, if there is one, looks for what is behind it anew."""
        file = self._files.pop(node.number, None)
        if file is not None:
            node.read_bytes += file.read_bytes
            file.close()

    def readdir(self, node: int) -> Sequence[DirEntry]:
        if node != ROOT:
            raise OSError(errno.ENOTDIR, "an image is a file")
        images = {known.image_id: known.number for known in self._state.nodes() if known.handles}
        images.update((image, images.get(image, 0)) for image in self._materialized)
        entries = [DirEntry(ROOT, b".", _DIRECTORY_MODE), DirEntry(ROOT, b"..", _DIRECTORY_MODE)]
        for image, number in images.items():
            name = self._catalogue.name_of(image) or image.hex()
            entries.append(DirEntry(number or UNKNOWN_NUMBER, os.fsencode(name + SUFFIX), _FILE_MODE))
        return entries

    def statfs(self) -> Statfs:
        return Statfs(files=len(self._state.nodes()))

    def _node(self, number: int) -> Node:
        known = self._state.node(number)
        if known is None:
            # Cannot be, unless somebody removed the mount state: the kernel names only what it was told.
            log.critical("event=unknown_node node=%d", number)
            raise OSError(errno.ESTALE, "unknown node")
        return known


UNKNOWN_NUMBER = (1 << 32) - 1
"""Inode number in listings of what was not looked up yet; as in libfuse."""


def _errno(error: VMThunderError) -> int:
    """What open(2) says when an image cannot be looked up."""
    if isinstance(error, OriginUnavailable):
        return errno.ETIMEDOUT
    return errno.EACCES if isinstance(error, NotPermitted) else errno.EIO


def _file_attr(node: Node) -> Attr:
    return Attr(node.number, node.size_bytes, _FILE_MODE, allocated_bytes=node.size_bytes)
