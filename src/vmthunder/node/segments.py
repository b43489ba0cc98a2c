"""Where the bytes of the chunk cache lie: an endless row of units, cut into sparse files.

What is new goes to the end; what is let go becomes a hole. So a place is never used for two chunks, whatever a crash
leaves: a record that is out of date leads to zeros, not to another chunk. File N holds the units from N * SEGMENT_UNITS.

Threads: `read` may be called from any thread at any time. Everything else belongs to whoever holds the cache's commit
lock.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from vmthunder.errors import MissingTool
from vmthunder.fuse import libc
from vmthunder.ids import Buffer

UNIT_BYTES: Final = 4096
"""Holes are made of whole pages."""
SEGMENT_UNITS: Final = (16 << 30) // UNIT_BYTES
_PADDING: Final = memoryview(bytes(UNIT_BYTES))
_IOV_MAX: Final = 1024


class Extent(NamedTuple):
    """Bytes in a row."""

    place: int
    """Unit of its first byte."""
    size_bytes: int

    @property
    def end(self) -> int:
        """First unit after it."""
        return self.place + units(self.size_bytes)


def units(size_bytes: int) -> int:
    """How many units so many bytes take."""
    return -(-size_bytes // UNIT_BYTES)


class Segments:
    """The files in a directory."""

    def __init__(self, directory_fd: int) -> None:
        """Raises OSError; MissingTool: the file system cannot make holes."""
        self._directory_fd = directory_fd
        # Kept until `close`: a number that is closed while somebody reads could be that of another file by then.
        self._fds: dict[int, int] = {}
        self.tail = 0
        """Unit where the next chunk goes."""
        try:
            libc.punch_hole(self._fd(0), SEGMENT_UNITS * UNIT_BYTES, UNIT_BYTES)  # behind its end
        except OSError as error:
            raise MissingTool(f"its file system cannot make holes in files ({error.strerror})") from None

    def close(self) -> None:
        """Let go of the files."""
        for descriptor in self._fds.values():
            os.close(descriptor)

    def recover(self, live: Iterable[Extent], tail: int) -> None:
        """Go on at `tail`; remove what lies behind it, and files that nothing lives in."""
        self.tail = tail
        used = {extent.place // SEGMENT_UNITS for extent in live} | {tail // SEGMENT_UNITS}
        for number in self._numbers():
            if number not in used:
                os.unlink(_name(number), dir_fd=self._directory_fd)
        os.ftruncate(self._fd(tail // SEGMENT_UNITS), tail % SEGMENT_UNITS * UNIT_BYTES)

    def append(self, chunks: Sequence[Buffer]) -> list[Extent]:
        """Write chunks at the end, in one go as a rule. Raises OSError, and nothing has changed."""
        tail = self.tail
        extents = []
        for data in chunks:
            if tail % SEGMENT_UNITS + units(len(data)) > SEGMENT_UNITS:
                tail += SEGMENT_UNITS - tail % SEGMENT_UNITS
            extents.append(extent := Extent(tail, len(data)))
            tail = extent.end
        start = 0
        for end in range(1, len(chunks) + 1):
            if end == len(chunks) or extents[end].place != extents[end - 1].end or 2 * (end - start) >= _IOV_MAX - 1:
                self._write(extents[start].place, chunks[start:end])
                start = end
        self.tail = tail
        return extents

    def read(self, place: int, view: memoryview, flags: int = 0) -> int:
        """Fill `view` with the bytes from `place`, as preadv(2) does. Raises OSError."""
        offset = place % SEGMENT_UNITS * UNIT_BYTES
        return os.preadv(self._fd(place // SEGMENT_UNITS), (view,), offset, flags)

    def free(self, extents: Iterable[Extent]) -> None:
        """Make holes. Raises OSError."""
        for place, end in _joined(extents):
            offset = place % SEGMENT_UNITS * UNIT_BYTES
            libc.punch_hole(self._fd(place // SEGMENT_UNITS), offset, (end - place) * UNIT_BYTES)

    def _write(self, place: int, chunks: Sequence[Buffer]) -> None:
        parts: list[Buffer] = []
        for data in chunks:
            parts.append(data)
            if len(data) % UNIT_BYTES:
                parts.append(_PADDING[len(data) % UNIT_BYTES :])
        descriptor, offset = self._fd(place // SEGMENT_UNITS), place % SEGMENT_UNITS * UNIT_BYTES
        written = os.pwritev(descriptor, parts, offset)
        rest = sum(map(len, parts)) - written
        if rest:  # a disk that fills up takes a part first
            data = memoryview(b"".join(parts))[written:]
            while data:
                offset += written
                written = os.pwrite(descriptor, data, offset)
                data = data[written:]

    def _fd(self, number: int) -> int:
        descriptor = self._fds.get(number)
        if descriptor is None:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            opened = os.open(_name(number), flags, 0o600, dir_fd=self._directory_fd)
            descriptor = self._fds.setdefault(number, opened)
            if descriptor != opened:  # another thread was faster
                os.close(opened)
        return descriptor

    def _numbers(self) -> list[int]:
        with os.scandir(self._directory_fd) as entries:
            names = [entry.name for entry in entries]
        return [int(name) for name in names if name.isdecimal() and name == _name(int(name))]


def _name(number: int) -> str:
    return f"{number:08d}"


def _joined(extents: Iterable[Extent]) -> Iterator[tuple[int, int]]:
    """Extents that touch, as one; within a segment."""
    start = end = -1
    for extent in sorted(extents):
        if extent.place != end or extent.place % SEGMENT_UNITS == 0:
            if start >= 0:
                yield start, end
            start = extent.place
        end = extent.end
    if start >= 0:
        yield start, end
