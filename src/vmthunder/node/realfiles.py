"""The real directory beneath a mount of ours, reached through a descriptor that was opened before the mount hid it.

Owns its files' nodes and what is open of them. A node's number says which inode it is, so that a worker needs no memory
of names to go on after another one; handles and backing ids are on disk before the kernel is answered, as in
`MountState`. The kernel reads and writes files itself (passthrough) where it can.

Flat: regular files only; whatever else lies in the directory is not shown. Belongs to the event loop; system calls that
may wait for a disk are made by threads of its own, each on a descriptor of its own.
"""

import asyncio
import errno
import json
import os
import stat
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from vmthunder.fuse import libc
from vmthunder.fuse.protocol import Attr, DirEntry, Entry, Opened, Statfs
from vmthunder.fuse.writing import NOW, Change
from vmthunder.ids import Buffer
from vmthunder.node.imagefs import Backing

FIRST = 1 << 62
"""Numbers of nodes begin here; below are images."""
THREADS = 4
_NOW_VALID_S = 0.0
"""Sizes change while the kernel writes past us."""

_T = TypeVar("_T")


@dataclass(slots=True)
class _Held:
    """A file that is open."""

    handles: set[int] = field(default_factory=set)
    backing_id: int | None = None
    """The kernel's, while the file is open in passthrough; one for all opens of it."""
    descriptor: int | None = None
    """Ours, for a file that has lost its name; None after another worker's death."""


class RealFiles:
    """The regular files of one directory."""

    def __init__(self, directory_fd: int, state_path: Path, *, resume: bool) -> None:
        """With `resume` the kernel may hold files that an earlier worker opened."""
        self._directory = directory_fd
        self._state_path = state_path
        self._names: dict[int, str] = {}
        """By inode: what a file was called when it was last seen; checked before it is believed."""
        self._held: dict[int, _Held] = {}
        self._next = 1
        self._threads = ThreadPoolExecutor(THREADS, "real")
        self.backing: Backing | None = None
        """Set once there is a session, if the kernel has passthrough."""
        if resume:
            self._load()
        else:
            self._save()  # Another mount's must not be found here by our successor.

    def close(self) -> None:
        self._threads.shutdown(wait=False)

    def lookup(self, name: str) -> Entry | None:
        found = self._stat(name)
        return None if found is None else self._entry(name, found)

    def forget(self, node: int) -> None:
        self._names.pop(node - FIRST, None)

    def getattr(self, node: int) -> tuple[Attr, float]:
        descriptor = self._descriptor(node)
        try:
            return _attr(os.fstat(descriptor)), _NOW_VALID_S
        finally:
            os.close(descriptor)

    async def setattr(self, node: int, change: Change) -> tuple[Attr, float]:
        return _attr(await self._with(node, lambda descriptor: _change(descriptor, change))), _NOW_VALID_S

    async def open(self, node: int) -> Opened:
        return self._opened(node, self._descriptor(node))

    async def create(
        self, name: str, flags: int, mode: int, owner: tuple[int, int], *, again: bool
    ) -> tuple[Entry, Opened]:
        descriptor = await self._run(lambda: self._make(name, flags, mode, owner, again))
        entry = self._entry(name, os.fstat(descriptor))
        return entry, self._opened(entry.node, descriptor)

    def release(self, node: int, fh: int) -> None:
        held = self._held.get(node - FIRST)
        if held is None:
            return
        held.handles.discard(fh)
        if held.handles:
            self._save()
            return
        # Forgotten before it is closed, as in MountState.release.
        del self._held[node - FIRST]
        self._save()
        if held.backing_id is not None and self.backing is not None:
            self.backing.close_backing(held.backing_id)
        if held.descriptor is not None:
            os.close(held.descriptor)

    async def read(self, node: int, offset: int, size_bytes: int) -> Sequence[Buffer]:
        def pread(descriptor: int) -> Sequence[Buffer]:
            buffer = bytearray(size_bytes)
            return [memoryview(buffer)[: os.preadv(descriptor, (buffer,), offset)]]

        return await self._with(node, pread)

    async def write(self, node: int, offset: int, data: bytes) -> int:
        return await self._with(node, lambda descriptor: os.pwrite(descriptor, data, offset))

    async def fsync(self, node: int) -> None:
        await self._with(node, os.fsync)

    async def fallocate(self, node: int, mode: int, offset: int, length_bytes: int) -> None:
        await self._with(node, lambda descriptor: libc.fallocate(descriptor, mode, offset, length_bytes))

    async def lseek(self, node: int, offset: int, whence: int) -> int:
        return await self._with(node, lambda descriptor: os.lseek(descriptor, offset, whence))

    async def unlink(self, name: str, *, again: bool) -> None:
        """Raises FileNotFoundError: it is not there, and was not taken away by this request the time before."""
        try:
            await self._run(lambda: os.unlink(name, dir_fd=self._directory))
        except FileNotFoundError:
            if not again:
                raise

    async def rename(self, name: str, new_name: str, *, again: bool) -> None:
        try:
            await self._run(lambda: os.rename(name, new_name, src_dir_fd=self._directory, dst_dir_fd=self._directory))
        except FileNotFoundError:
            if not again or self._stat(new_name) is None:
                raise

    def entries(self) -> Iterator[DirEntry]:
        with os.scandir(self._directory) as found:
            for entry in found:
                if entry.is_file(follow_symlinks=False):
                    yield DirEntry(FIRST + entry.inode(), os.fsencode(entry.name), stat.S_IFREG)

    def root(self) -> os.stat_result:
        """Of the directory itself."""
        return os.fstat(self._directory)

    async def set_root(self, change: Change) -> None:
        await self._run(lambda: _change(self._directory, change))

    def statfs(self) -> Statfs:
        found = os.fstatvfs(self._directory)
        return Statfs(found.f_blocks, found.f_bavail, found.f_files, found.f_frsize, found.f_namemax)

    # Below: descriptors and what is written down.

    def _opened(self, node: int, descriptor: int) -> Opened:
        """Enter one more open; takes over the descriptor."""
        held = self._held.setdefault(node - FIRST, _Held())
        if self.backing is not None and not held.handles:
            with suppress(OSError):  # A file system that offers none, such as overlayfs: the data goes through us.
                held.backing_id = self.backing.open_backing(descriptor)
        if held.descriptor is None:
            held.descriptor = descriptor
        else:
            os.close(descriptor)
        handle, self._next = self._next, self._next + 1
        held.handles.add(handle)
        self._save()
        return Opened(handle, held.backing_id or 0, keep_cache=False)

    def _make(self, name: str, flags: int, mode: int, owner: tuple[int, int], again: bool) -> int:
        how = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            descriptor = os.open(name, how | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=self._directory)
        except FileExistsError:
            if flags & os.O_EXCL and not again:
                raise
            descriptor = os.open(name, how, dir_fd=self._directory)
            if flags & os.O_TRUNC:
                os.ftruncate(descriptor, 0)
            if not again:
                return descriptor
        os.fchown(descriptor, *owner)
        os.fchmod(descriptor, mode & 0o7777)
        return descriptor

    def _stat(self, name: str) -> os.stat_result | None:
        try:
            found = os.stat(name, dir_fd=self._directory, follow_symlinks=False)
        except FileNotFoundError:
            return None
        return found if stat.S_ISREG(found.st_mode) else None

    def _entry(self, name: str, found: os.stat_result) -> Entry:
        self._names[found.st_ino] = name
        return Entry(FIRST + found.st_ino, _attr(found), entry_valid_s=0, attr_valid_s=_NOW_VALID_S)

    def _descriptor(self, node: int) -> int:
        """A new descriptor of the file, by the one we hold or by its name. Raises ESTALE: it has neither."""
        inode = node - FIRST
        held = self._held.get(inode)
        if held is not None and held.descriptor is not None:
            return os.dup(held.descriptor)
        name = self._names.get(inode)
        found = self._stat(name) if name is not None else None
        if found is None or found.st_ino != inode:
            self._names = {entry.node - FIRST: os.fsdecode(entry.name) for entry in self.entries()}
            name = self._names.get(inode)
        if name is None:
            raise OSError(errno.ESTALE, "the file has lost its name")
        how = os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            return os.open(name, os.O_RDWR | how, dir_fd=self._directory)
        except OSError as error:
            if error.errno not in {errno.EROFS, errno.EACCES, errno.EPERM}:
                raise
            return os.open(name, os.O_RDONLY | how, dir_fd=self._directory)

    async def _with(self, node: int, call: Callable[[int], _T]) -> _T:
        descriptor = self._descriptor(node)

        def run() -> _T:
            try:
                return call(descriptor)
            finally:
                os.close(descriptor)

        return await self._run(run)

    def _run(self, call: Callable[[], _T]) -> Awaitable[_T]:
        return asyncio.get_running_loop().run_in_executor(self._threads, call)

    def _save(self) -> None:
        held = {inode: [sorted(file.handles), file.backing_id] for inode, file in self._held.items()}
        temporary = self._state_path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"next": self._next, "held": held}))
        temporary.replace(self._state_path)

    def _load(self) -> None:
        with suppress(FileNotFoundError):  # Nothing was ever opened.
            saved = json.loads(self._state_path.read_bytes())
            self._next = saved["next"]
            self._held = {
                int(inode): _Held(set(handles), backing_id) for inode, (handles, backing_id) in saved["held"].items()
            }


def _change(descriptor: int, change: Change) -> os.stat_result:
    if change.size_bytes is not None:
        os.ftruncate(descriptor, change.size_bytes)
    if change.uid is not None or change.gid is not None:
        keep = -1
        os.fchown(descriptor, keep if change.uid is None else change.uid, keep if change.gid is None else change.gid)
    if change.mode is not None:
        os.fchmod(descriptor, change.mode)
    if change.atime_ns is not None or change.mtime_ns is not None:
        before = os.fstat(descriptor)
        atime_ns = _time_ns(change.atime_ns, before.st_atime_ns)
        os.utime(descriptor, ns=(atime_ns, _time_ns(change.mtime_ns, before.st_mtime_ns)))
    return os.fstat(descriptor)


def _time_ns(wanted_ns: int | None, before_ns: int) -> int:
    if wanted_ns is None:
        return before_ns
    return time.time_ns() if wanted_ns == NOW else wanted_ns


def _attr(found: os.stat_result) -> Attr:
    mtime_s, mtime_ns = divmod(found.st_mtime_ns, 10**9)
    return Attr(
        FIRST + found.st_ino,
        found.st_size,
        found.st_mode,
        mtime_s,
        found.st_blocks * 512,
        found.st_nlink,
        found.st_uid,
        found.st_gid,
        mtime_ns,
    )
