"""A session whose file system can be written to: the requests of `fuse.writing`, each taken apart and answered once.

Threading as in `fuse.session`. A request that an earlier worker had taken and not answered comes `again`: what it asks
for may have been done already, and must then not fail for that reason.
"""

import asyncio
from collections.abc import Awaitable
from typing import Protocol

from vmthunder.fuse import protocol, writing
from vmthunder.fuse.negotiate import Negotiated
from vmthunder.fuse.protocol import UNIQUE_RESEND, Attr, Entry, Opened, Request
from vmthunder.fuse.session import FileSystem, Session
from vmthunder.fuse.writing import Change, WriteOpcode


class WritableFileSystem(FileSystem, Protocol):
    """A file system that can be changed. Errors and threads as in `FileSystem`."""

    def create(
        self, parent: int, name: bytes, flags: int, mode: int, owner: tuple[int, int], *, again: bool
    ) -> Awaitable[tuple[Entry, Opened]]:
        """Make a regular file of `owner` (uid, gid), if it is not there, and open it. Counts one lookup."""

    def write(self, node: int, fh: int, offset: int, data: bytes) -> Awaitable[int]:
        """Returns how many bytes were written."""

    def setattr(self, node: int, change: Change) -> Awaitable[tuple[Attr, float]]: ...

    def unlink(self, parent: int, name: bytes, *, again: bool) -> Awaitable[None]: ...

    def rename(self, parent: int, name: bytes, new_parent: int, new_name: bytes, *, again: bool) -> Awaitable[None]: ...

    def fsync(self, node: int) -> Awaitable[None]: ...

    def fallocate(self, node: int, mode: int, offset: int, length_bytes: int) -> Awaitable[None]: ...

    def lseek(self, node: int, offset: int, whence: int) -> Awaitable[int]:
        """SEEK_DATA and SEEK_HOLE; the kernel does the others itself."""


class WritableSession(Session):
    """One worker's time at a writable connection."""

    def __init__(
        self, fuse_fd: int, negotiated: Negotiated, filesystem: WritableFileSystem, loop: asyncio.AbstractEventLoop
    ) -> None:
        super().__init__(fuse_fd, negotiated, filesystem, loop)
        self._writable = filesystem
        self._handlers |= {
            WriteOpcode.SETATTR: self._setattr,
            WriteOpcode.UNLINK: self._unlink,
            WriteOpcode.RENAME: self._rename,
            WriteOpcode.WRITE: self._write_data,
            WriteOpcode.FSYNC: self._fsync,
            WriteOpcode.CREATE: self._create,
            WriteOpcode.FALLOCATE: self._fallocate,
            WriteOpcode.LSEEK: self._lseek,
        }

    def _create(self, request: Request) -> None:
        flags, mode, _, _ = writing.CREATE_IN.unpack_from(self._buffer, protocol.IN_HEADER.size)
        (name,) = writing.decode_names(self._buffer, request.length_bytes, writing.CREATE_IN, 1)
        owner = request.uid, request.gid
        made = self._writable.create(request.node, name, flags, mode, owner, again=_again(request))
        self._later(request, made, lambda answer: [writing.encode_create(*answer)])

    def _write_data(self, request: Request) -> None:
        written = self._writable.write(request.node, *writing.decode_write(self._buffer, request.length_bytes))
        self._later(request, written, lambda size_bytes: [writing.encode_write(size_bytes)])

    def _setattr(self, request: Request) -> None:
        change = writing.decode_change(protocol.body(self._buffer, request.length_bytes, writing.SETATTR_IN))
        changed = self._writable.setattr(request.node, change)
        self._later(request, changed, lambda answer: [protocol.encode_attr(*answer)])

    def _unlink(self, request: Request) -> None:
        name = protocol.decode_name(self._buffer, request.length_bytes)
        self._later(request, self._writable.unlink(request.node, name, again=_again(request)), _nothing)

    def _rename(self, request: Request) -> None:
        (new_parent,) = writing.RENAME_IN.unpack_from(self._buffer, protocol.IN_HEADER.size)
        name, new_name = writing.decode_names(self._buffer, request.length_bytes, writing.RENAME_IN, 2)
        done = self._writable.rename(request.node, name, new_parent, new_name, again=_again(request))
        self._later(request, done, _nothing)

    def _fsync(self, request: Request) -> None:
        self._later(request, self._writable.fsync(request.node), _nothing)

    def _fallocate(self, request: Request) -> None:
        _, offset, length_bytes, mode, _ = protocol.body(self._buffer, request.length_bytes, writing.FALLOCATE_IN)
        self._later(request, self._writable.fallocate(request.node, mode, offset, length_bytes), _nothing)

    def _lseek(self, request: Request) -> None:
        _, offset, whence, _ = protocol.body(self._buffer, request.length_bytes, writing.LSEEK_IN)
        found = self._writable.lseek(request.node, offset, whence)
        self._later(request, found, lambda place: [writing.encode_lseek(place)])


def _again(request: Request) -> bool:
    return bool(request.unique & UNIQUE_RESEND)


def _nothing(_: None) -> list[bytes]:
    return []
