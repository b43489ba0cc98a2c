"""The part of FUSE's protocol that a writable file system needs: layouts of requests and answers. Pure.

Facts as in `fuse.protocol`. Opcodes that are not here get ENOSYS, which the kernel turns into "does not support it".
"""

import enum
import struct
from typing import NamedTuple

from vmthunder.fuse.protocol import (
    IN_HEADER,
    Entry,
    Opened,
    ProtocolError,
    encode_entry,
    encode_open,
)


class WriteOpcode(enum.IntEnum):
    """Requests that change something, and LSEEK, which a file with holes answers."""

    SETATTR = 4
    UNLINK = 10
    RENAME = 12
    WRITE = 16
    FSYNC = 20
    CREATE = 35
    FALLOCATE = 43
    LSEEK = 46


class _Valid(enum.IntFlag):
    """Which fields of SETATTR_IN count (FATTR_*)."""

    MODE = 1 << 0
    UID = 1 << 1
    GID = 1 << 2
    SIZE = 1 << 3
    ATIME = 1 << 4
    MTIME = 1 << 5
    ATIME_NOW = 1 << 7
    MTIME_NOW = 1 << 8


NOW = -1
"""As a time: whatever the clock says when it is set."""

SETATTR_IN = struct.Struct("=I4xQQQQQQIIIIIIII")
# valid, fh size lock_owner atime mtime ctime, atimensec mtimensec ctimensec mode unused4 uid gid unused5
CREATE_IN = struct.Struct("=IIII")  # flags mode umask open_flags
WRITE_IN = struct.Struct("=QQII16x")  # fh offset size write_flags, and lock_owner flags padding
FSYNC_IN = struct.Struct("=QII")  # fh fsync_flags padding
FALLOCATE_IN = struct.Struct("=QQQII")  # fh offset length mode padding
LSEEK_IN = struct.Struct("=QQII")  # fh offset whence padding
RENAME_IN = struct.Struct("=Q")  # newdir
_WRITE_OUT = struct.Struct("=II")
_LSEEK_OUT = struct.Struct("=Q")


class Change(NamedTuple):
    """What a SETATTR wants changed; None leaves a thing as it is. Times in ns since the epoch, or NOW."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size_bytes: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None


def decode_change(fields: tuple[int, ...]) -> Change:
    """A SETATTR_IN, unpacked."""
    valid, _, size, _, atime, mtime, _, atime_ns, mtime_ns, _, mode, _, uid, gid, _ = fields

    def time(set_: _Valid, now: _Valid, seconds: int, nanoseconds: int) -> int | None:
        if not valid & set_:
            return None
        return NOW if valid & now else seconds * 10**9 + nanoseconds

    return Change(
        mode=mode & 0o7777 if valid & _Valid.MODE else None,
        uid=uid if valid & _Valid.UID else None,
        gid=gid if valid & _Valid.GID else None,
        size_bytes=size if valid & _Valid.SIZE else None,
        atime_ns=time(_Valid.ATIME, _Valid.ATIME_NOW, atime, atime_ns),
        mtime_ns=time(_Valid.MTIME, _Valid.MTIME_NOW, mtime, mtime_ns),
    )


def decode_names(
    message: bytes | bytearray | memoryview, length_bytes: int, layout: struct.Struct, count: int
) -> list[bytes]:
    """The `count` zero-terminated names behind the header and a structure. Raises ProtocolError."""
    names = bytes(message[IN_HEADER.size + layout.size : length_bytes]).split(b"\0")
    if len(names) != count + 1 or names.pop() or not all(names):
        raise ProtocolError(f"{count} names expected, {length_bytes - IN_HEADER.size - layout.size} bytes came")
    return names


def decode_write(message: bytes | bytearray | memoryview, length_bytes: int) -> tuple[int, int, bytes]:
    """Handle, offset and a copy of the data of a WRITE. Raises ProtocolError."""
    start = IN_HEADER.size + WRITE_IN.size
    if length_bytes < start:
        raise ProtocolError(f"a WRITE of {length_bytes} bytes")
    fh, offset, size_bytes, _ = WRITE_IN.unpack_from(message, IN_HEADER.size)
    if length_bytes != start + size_bytes:
        raise ProtocolError(f"a WRITE of {size_bytes} bytes came with {length_bytes - start}")
    return fh, offset, bytes(message[start:length_bytes])


def encode_create(entry: Entry, opened: Opened) -> bytes:
    """Answer to CREATE: that of a LOOKUP, and that of an OPEN."""
    return encode_entry(entry) + encode_open(opened)


def encode_write(size_bytes: int) -> bytes:
    """Answer to WRITE: how much was written."""
    return _WRITE_OUT.pack(size_bytes, 0)


def encode_lseek(offset: int) -> bytes:
    """Answer to LSEEK."""
    return _LSEEK_OUT.pack(offset)
