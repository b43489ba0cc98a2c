"""The journal of the chunk cache: which chunk lies where, as records that are only added at its end.

Layout, little-endian: 16 bytes of head (magic, version), then records of 48 bytes: u8 kind, 3 bytes zero, u32 size in
bytes, u64 place, the chunk's id. Not synced, not checksummed: a record that is torn or stale leads to bytes that do not
have the digest it names, and a chunk that no record names costs a fetch. The order of records is that of the queues.

Not thread-safe.
"""

import errno
import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import suppress
from enum import IntEnum
from typing import Final, NamedTuple

from vmthunder.ids import ChunkId
from vmthunder.image.chunk import MAX_CHUNK_BYTES
from vmthunder.node.segments import Extent

_HEAD: Final = struct.pack("<12sI", b"vmthunder-cc", 1)
_RECORD: Final = struct.Struct("<B3xIQ32s")
_NAME: Final = "journal"
_SLACK: Final = 4096
_MAX_PLACE: Final = 1 << 48


class Kind(IntEnum):
    """What happened."""

    SMALL = 1
    """Stored, in the small queue."""
    MAIN = 2
    """Stored, in the main queue."""
    GONE = 3


class Record(NamedTuple):
    """One event."""

    kind: Kind
    chunk_id: ChunkId
    extent: Extent


class Journal:
    """The file `journal` in a directory."""

    def __init__(self, directory_fd: int) -> None:
        """Raises OSError."""
        self._directory_fd = directory_fd
        self._fd = self._open(_NAME, 0)
        self.size_bytes = os.fstat(self._fd).st_size

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._fd)

    def read(self) -> Iterator[Record]:
        """All records, up to the first that is none. What follows that is cut off. Raises OSError."""
        data = os.pread(self._fd, self.size_bytes, 0)
        good_bytes = 0
        if data.startswith(_HEAD):
            good_bytes = len(_HEAD)
            whole = len(_HEAD) + (len(data) - len(_HEAD)) // _RECORD.size * _RECORD.size
            for number, size_bytes, place, chunk_id in _RECORD.iter_unpack(memoryview(data)[len(_HEAD) : whole]):
                kind = _KINDS.get(number)
                if kind is None or not 0 < size_bytes <= MAX_CHUNK_BYTES or place >= _MAX_PLACE:
                    break
                good_bytes += _RECORD.size
                yield Record(kind, ChunkId(chunk_id), Extent(place, size_bytes))
        self._cut(good_bytes)

    def append(self, records: Iterable[Record]) -> None:
        """Add records. Raises OSError, and nothing has changed."""
        data = _encode(records) if self.size_bytes else _HEAD + _encode(records)
        if not data:
            return
        try:
            if os.pwrite(self._fd, data, self.size_bytes) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._fd, self.size_bytes)
            raise
        self.size_bytes += len(data)

    def rewrite(self, records: Iterable[Record]) -> None:
        """Replace everything. Raises OSError, and nothing has changed."""
        fresh = f"{_NAME}.new"
        data = _HEAD + _encode(records)
        descriptor = self._open(fresh, os.O_TRUNC)
        try:
            if os.pwrite(descriptor, data, 0) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.rename(fresh, _NAME, src_dir_fd=self._directory_fd, dst_dir_fd=self._directory_fd)
        except OSError:
            os.close(descriptor)
            with suppress(OSError):
                os.unlink(fresh, dir_fd=self._directory_fd)
            raise
        os.close(self._fd)
        self._fd, self.size_bytes = descriptor, len(data)

    def wasteful(self, live: int) -> bool:
        """Whether most records are history."""
        return self.size_bytes > _RECORD.size * (_SLACK + 3 * live)

    def _cut(self, size_bytes: int) -> None:
        if size_bytes != self.size_bytes:
            os.ftruncate(self._fd, size_bytes)
            self.size_bytes = size_bytes

    def _open(self, name: str, flags: int) -> int:
        flags |= os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        return os.open(name, flags, 0o600, dir_fd=self._directory_fd)


_KINDS: Final = {kind.value: kind for kind in Kind}


def _encode(records: Iterable[Record]) -> bytes:
    return b"".join(_RECORD.pack(kind, extent.size_bytes, extent.place, chunk_id) for kind, chunk_id, extent in records)
