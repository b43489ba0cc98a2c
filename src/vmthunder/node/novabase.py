"""Nova's `_base` as the kernel sees it: the real directory, and each published image under the name that Nova gives it.

A real file wins over an image. `<sha1 of a Glance id>` that has no real file is the published image, if there is one;
`NAME.raw` and `IMAGE-ID.raw` are images as in every mount of ours. Everything else, and every change, is the real
directory's. What Nova does to an image has a meaning here (compute's virt/libvirt/imagecache.py and imagebackend.py):

    utimens   this host wants it: it is kept, and completed in the background
    unlink    its local state goes; the name still resolves
    chown, chmod   by libvirt and Nova: accepted, without effect
    listing   shows what is kept, so that Nova's ageing reaches it, and nothing else

Belongs to the event loop.
"""

import errno
import os
import stat
from collections.abc import Awaitable, Sequence
from typing import Final

from vmthunder.fuse.protocol import Attr, DirEntry, Entry, Opened, Statfs
from vmthunder.fuse.writing import NOW, Change
from vmthunder.ids import Buffer, ImageId
from vmthunder.node.imagefs import SUFFIX, UNKNOWN_NUMBER, ImageFileSystem
from vmthunder.node.mountstate import ROOT, MountState
from vmthunder.node.novaimages import NovaImages, is_base_name
from vmthunder.node.realfiles import FIRST, RealFiles

MODE: Final = stat.S_IFREG | 0o644
ATTR_VALID_S: Final = 1.0
"""Of an image: its time changes when Nova touches it."""


class NovaBase:
    """Implements `vmthunder.fuse.writable.WritableFileSystem`."""

    def __init__(self, real: RealFiles, images: ImageFileSystem, nova: NovaImages, state: MountState) -> None:
        self._real = real
        self._images = images
        self._nova = nova
        self._state = state

    async def lookup(self, parent: int, name: bytes) -> Entry:
        text = _name(parent, name)
        found = self._real.lookup(text)
        if found is not None:
            return found
        if is_base_name(text):
            manifest = await self._nova.find(text)
            found = self._real.lookup(text)  # Nova may have begun to help itself during the await.
            if found is not None:
                return found
            if manifest is not None:
                return self._shown(self._images.entry(manifest))
        elif text.endswith(SUFFIX):
            return self._shown(await self._images.lookup(parent, name))
        raise OSError(errno.ENOENT, "neither a file nor an image")

    def forget(self, node: int, nlookup: int) -> None:
        if node < FIRST:
            self._images.forget(node, nlookup)
        else:
            self._real.forget(node)

    def getattr(self, node: int) -> tuple[Attr, float]:
        if node == ROOT:
            return self._root(), 0.0
        return self._attr(node) if node < FIRST else self._real.getattr(node)

    def open(self, node: int, flags: int) -> Awaitable[Opened]:
        if node >= FIRST:
            return self._real.open(node)
        image = self._image(node)
        if image is not None:
            self._nova.want(image)
        return self._images.open(node, flags)

    def read(self, node: int, fh: int, offset: int, size_bytes: int) -> Sequence[Buffer] | Awaitable[Sequence[Buffer]]:
        if node >= FIRST:
            return self._real.read(node, offset, size_bytes)
        return self._images.read(node, fh, offset, size_bytes)

    def release(self, node: int, fh: int) -> None:
        (self._images if node < FIRST else self._real).release(node, fh)

    def readdir(self, node: int) -> Sequence[DirEntry]:
        if node != ROOT:
            raise OSError(errno.ENOTDIR, "a file")
        entries = [DirEntry(ROOT, b".", stat.S_IFDIR), DirEntry(ROOT, b"..", stat.S_IFDIR), *self._real.entries()]
        real = {entry.name for entry in entries}
        kept = (os.fsencode(name) for name in self._nova.names())
        return [*entries, *(DirEntry(UNKNOWN_NUMBER, name, MODE) for name in kept if name not in real)]

    def statfs(self) -> Statfs:
        return self._real.statfs()

    def create(
        self, parent: int, name: bytes, flags: int, mode: int, owner: tuple[int, int], *, again: bool
    ) -> Awaitable[tuple[Entry, Opened]]:
        return self._real.create(_name(parent, name), flags, mode, owner, again=again)

    def write(self, node: int, fh: int, offset: int, data: bytes) -> Awaitable[int]:
        del fh
        return self._real.write(_real(node), offset, data)

    async def setattr(self, node: int, change: Change) -> tuple[Attr, float]:
        if node >= FIRST:
            return await self._real.setattr(node, change)
        if change.size_bytes is not None:
            raise OSError(errno.EROFS, "images are read-only")
        if node == ROOT:
            await self._real.set_root(change)
            return self._root(), 0.0
        image = self._image(node)
        if image is not None and change.mtime_ns is not None:
            self._nova.want(image, None if change.mtime_ns == NOW else change.mtime_ns)
        return self._attr(node)

    async def unlink(self, parent: int, name: bytes, *, again: bool) -> None:
        text = _name(parent, name)
        try:
            await self._real.unlink(text, again=False)
        except FileNotFoundError:
            if self._nova.drop(text, is_open=self._is_open) or again:
                return
            if is_base_name(text) and await self._nova.find(text) is not None:
                return  # An image without local state: nothing to give back.
            raise

    def rename(self, parent: int, name: bytes, new_parent: int, new_name: bytes, *, again: bool) -> Awaitable[None]:
        return self._real.rename(_name(parent, name), _name(new_parent, new_name), again=again)

    def fsync(self, node: int) -> Awaitable[None]:
        return self._real.fsync(_real(node))

    def fallocate(self, node: int, mode: int, offset: int, length_bytes: int) -> Awaitable[None]:
        return self._real.fallocate(_real(node), mode, offset, length_bytes)

    async def lseek(self, node: int, offset: int, whence: int) -> int:
        if node >= FIRST:
            return await self._real.lseek(node, offset, whence)
        return await self._images.lseek(node, offset, whence)

    def _image(self, node: int) -> ImageId | None:
        known = self._state.node(node)
        return None if known is None else known.image_id

    def _is_open(self, image: ImageId) -> bool:
        return self._state.open_times(image) > 0

    def _attr(self, node: int) -> tuple[Attr, float]:
        attr, _ = self._images.getattr(node)
        return self._dressed(attr), ATTR_VALID_S

    def _shown(self, entry: Entry) -> Entry:
        return entry._replace(attr=self._dressed(entry.attr), attr_valid_s=ATTR_VALID_S)

    def _dressed(self, attr: Attr) -> Attr:
        """An image as a file that Nova could have made here."""
        image, root = self._image(attr.node), self._real.root()
        mtime_s = 0 if image is None else self._nova.mtime_s(image)
        return attr._replace(mode=MODE, uid=root.st_uid, gid=root.st_gid, mtime_s=mtime_s)

    def _root(self) -> Attr:
        found = self._real.root()
        return Attr(ROOT, 0, found.st_mode, int(found.st_mtime), nlink=2, uid=found.st_uid, gid=found.st_gid)


def _name(parent: int, name: bytes) -> str:
    if parent != ROOT:
        raise OSError(errno.ENOTDIR, "a file")
    return os.fsdecode(name)


def _real(node: int) -> int:
    """A node that may be written."""
    if node < FIRST:
        raise OSError(errno.EROFS, "images are read-only")
    return node
