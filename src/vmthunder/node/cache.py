"""The chunk cache of a node: encoded chunks in `segments`, found through `eviction`, written down in `journal`.

Owns the directory and its accounting of bytes. Decides nothing about fetching, and never shows bytes that it did not
verify.

Nothing is synced: a chunk is named by the digest of its content and every load checks it. A chunk is written before its
record, and a hole is made after the record that says so. Whatever a kill or a power failure leaves is the chunk, or is
noticed, dropped and costs a fetch. A restart, clean or not, keeps the order of the queues.

Threads: every method may be called from any thread. `_lock` is held over bookkeeping only. `_commit_lock` is held over a
whole commit, with its I/O, and by nothing that a reader waits for.
"""

import errno
import fcntl
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TypeAlias

from vmthunder.errors import Conflict, Failure, MissingTool, NoSpace, NotPermitted, VMThunderError
from vmthunder.ids import Buffer, ChunkId
from vmthunder.image.chunk import verify
from vmthunder.node.eviction import Kept, S3Fifo
from vmthunder.node.journal import Journal, Kind, Record
from vmthunder.node.segments import UNIT_BYTES, Extent, Segments

logger = logging.getLogger(__name__)

LOCK_TIMEOUT_S = 5.0
"""A worker that is killed gives up its lock a moment after its successor was started."""
QUIET_S = 10.0
"""A disk that stored everything for so long is well again: a nearly full one still takes a small chunk now and then."""
_HOLES_AGAIN = 1024
"""A kill may come between a record and its hole: so many are made once more at the next start."""

Encoded: TypeAlias = tuple[ChunkId, Buffer]
"""A chunk's id and its encoded bytes."""


class _Scratch(threading.local):
    """Where this thread reads files: no allocation per load, so no heap that is torn to pieces by odd sizes."""

    buffer = memoryview(b"")

    def view(self, size_bytes: int) -> memoryview:
        if len(self.buffer) < size_bytes:
            self.buffer = memoryview(bytearray(max(size_bytes, 64 << 10)))
        return self.buffer[:size_bytes]


class ChunkCache:
    """Chunks within a quota of bytes.

    Raises:
        Conflict: another agent uses the directory.
        NotPermitted, NoSpace: it cannot be made.
        MissingTool: its file system cannot make holes.
    """

    def __init__(
        self,
        directory: Path,
        quota_bytes: int,
        *,
        lock_timeout_s: float = LOCK_TIMEOUT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.directory = directory
        self.corrupt = 0
        """Places that did not hold the chunk that they should."""
        self.evicted = 0
        self.uncached = 0
        """Chunks that could not be stored."""
        self._queues = S3Fifo(quota_bytes, UNIT_BYTES)
        self._lock = threading.Lock()
        self._commit_lock = threading.Lock()
        self._dropped: deque[Kept] = deque()
        """Removed, but not from the disk: the next commit does that, as whoever drops may not wait."""
        self._clock = clock
        self._refused_since_s: float | None = None
        self._refused_last_s = 0.0
        self._scratch = _Scratch()
        self._close = ExitStack()
        try:
            (directory / "chunks").mkdir(parents=True, exist_ok=True)
            self._close.callback(os.close, _take(directory / "lock", lock_timeout_s))
            chunks_fd = os.open(directory / "chunks", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            self._close.callback(os.close, chunks_fd)
            self._journal = Journal(chunks_fd)
            self._segments = Segments(chunks_fd)
        except OSError as error:
            self._close.close()
            raise _said(error, f"chunk cache {directory} cannot be used: {error.strerror}") from None
        except MissingTool as error:
            self._close.close()
            raise MissingTool(
                f"chunk cache {directory} cannot be used: {error}; use ext4, XFS, Btrfs or tmpfs"
            ) from None

    def close(self) -> None:
        """Write down what was dropped, and give up the directory. No method may be called any more."""
        with self._commit_lock, suppress(OSError):
            self._let_go(())
        self._journal.close()
        self._segments.close()
        self._close.close()

    def recover(self) -> None:
        """Find out what is here, remove the litter of a crash. Call once, before anything else.

        Raises:
            NotPermitted, NoSpace, Failure: the directory cannot be used.
        """
        try:
            self._recover()
        except OSError as error:
            raise _said(error, f"chunk cache {self.directory} cannot be used: {error.strerror}") from None

    def _recover(self) -> None:
        live: dict[ChunkId, Record] = {}
        holes: deque[Extent] = deque(maxlen=_HOLES_AGAIN)
        tail = 0
        for record in self._journal.read():
            # Taken out first: a chunk that came back is now the newest in its queue.
            before = live.pop(record.chunk_id, None)
            if record.kind is not Kind.GONE:
                live[record.chunk_id] = record
                tail = max(tail, record.extent.end)
            elif before is not None:
                holes.append(before.extent)
        in_order = sorted(live.values(), key=lambda record: record.kind is Kind.SMALL)
        if self._queues.room_in_main(sum(self._queues.space_bytes(record.extent.size_bytes) for record in in_order)):
            for _, chunk_id, (place, size_bytes) in in_order:
                self._queues.add(chunk_id, size_bytes, place, to_main=True)
        else:
            self._readmit(in_order)
        self._segments.free(holes)
        self._segments.recover((record.extent for record in live.values()), tail)
        self._let_go(())
        self._compact()

    def _readmit(self, records: Iterable[Record]) -> None:
        """Take in what was here, as far as the quota goes: it may have been larger."""
        for _, chunk_id, (place, size_bytes) in records:
            room = self._queues.make_room(chunk_id, size_bytes)
            if room is None:
                self._dropped.append(Kept(chunk_id, place, size_bytes))
                continue
            self._dropped.extend(room.evicted)
            self._queues.add(chunk_id, size_bytes, place, to_main=room.to_main)

    def __contains__(self, chunk_id: ChunkId) -> bool:
        return chunk_id in self._queues

    @property
    def quota_bytes(self) -> int:
        return self._queues.quota_bytes

    def pin(self, chunk_ids: frozenset[ChunkId]) -> None:
        """Never let these go, and no others: those that are here, and those that come. Call before `recover`, too."""
        with self._lock:
            self._queues.pin(chunk_ids)

    def touch(self, chunk_id: ChunkId) -> None:
        """The chunk was used without a load."""
        with self._lock:
            self._queues.touch(chunk_id)

    def load(self, chunk_id: ChunkId, *, wait: bool = True) -> memoryview | None:
        """The chunk's encoded bytes, verified; None where it is not here. Valid until this thread's next load.

        With `wait` false, None also where the kernel would have to read from the disk. A place with wrong bytes is
        counted, and the chunk dropped.
        """
        found = self._queues.find(chunk_id)
        if found is None:
            return None
        place, size_bytes = found
        view = self._scratch.view(size_bytes)
        try:
            read_bytes = self._segments.read(place, view, 0 if wait else os.RWF_NOWAIT)
        except OSError as error:
            if not wait and error.errno in {errno.EAGAIN, errno.EOPNOTSUPP}:
                return None
            logger.warning("chunk cache: dropped what cannot be read: chunk=%s error=%s", chunk_id.hex(), error)
            self.drop(chunk_id)
            return None
        if read_bytes == size_bytes and verify(chunk_id, view):
            self.touch(chunk_id)
            return view
        if not wait and read_bytes < size_bytes:
            return None  # the rest is not in the page cache
        with self._lock:
            if self._queues.find(chunk_id) != found:
                return None  # let go while it was read
            self._drop(chunk_id)
        self.corrupt += 1
        logger.warning("chunk cache: dropped wrong bytes: chunk=%s", chunk_id.hex())
        return None

    def drop(self, chunk_id: ChunkId) -> None:
        """Remove a chunk."""
        with self._lock:
            self._drop(chunk_id)

    def commit(self, chunks: Sequence[Encoded]) -> None:
        """Store encoded chunks, which the caller has verified.

        A file system that refuses costs no more than the chunks: they stay uncached, the log says so once.
        """
        with self._commit_lock:
            with self._lock:
                # A chunk that was dropped is not among those that are here, and by now among those to be written down:
                # that record must come before the one that says where it is now.
                fresh = list({one[0]: one for one in chunks if one[0] not in self._queues}.values())
                together = self._queues.room_in_main(sum(self._queues.space_bytes(len(data)) for _, data in fresh))
            try:
                self._let_go(())
                if together:
                    self._store(fresh, to_main=True)
                else:
                    while fresh:
                        self._make_room_and_store(fresh[0])
                        del fresh[0]
                if self._journal.wasteful(len(self._queues)):
                    self._compact()
            except OSError as error:
                self._refused(error, len(fresh))
                return
            if self._refused_since_s is not None and self._clock() - self._refused_last_s >= QUIET_S:
                logger.warning("chunk cache: stores chunks again: after_s=%.1f", self._clock() - self._refused_since_s)
                self._refused_since_s = None

    def stats(self) -> dict[str, int]:
        """Counters, under the names that `vmthunder status` gives them."""
        return {
            "chunks": len(self._queues),
            "bytes": self._queues.used_bytes,
            "quota_bytes": self._queues.quota_bytes,
            "corrupt": self.corrupt,
            "evicted": self.evicted,
            "uncached": self.uncached,
        }

    def _make_room_and_store(self, chunk: Encoded) -> None:
        chunk_id, data = chunk
        with self._lock:
            room = self._queues.make_room(chunk_id, len(data))
        if room is None:
            self.uncached += 1
            return
        self.evicted += len(room.evicted)
        self._let_go(room.evicted)
        self._store([chunk], to_main=room.to_main)

    def _store(self, chunks: Sequence[Encoded], *, to_main: bool) -> None:
        extents = self._segments.append([data for _, data in chunks])
        kind = Kind.MAIN if to_main else Kind.SMALL
        stored = [(chunk_id, extent) for (chunk_id, _), extent in zip(chunks, extents, strict=True)]
        self._journal.append(Record(kind, chunk_id, extent) for chunk_id, extent in stored)
        with self._lock:
            for chunk_id, extent in stored:
                self._queues.add(chunk_id, extent.size_bytes, extent.place, to_main=to_main)

    def _let_go(self, evicted: Iterable[Kept]) -> None:
        """Take chunks from the disk that the queues have let go."""
        self._dropped.extend(evicted)
        gone = list(self._dropped)
        extents = [Extent(kept.place, kept.size_bytes) for kept in gone]
        self._journal.append(
            Record(Kind.GONE, kept.chunk_id, extent) for kept, extent in zip(gone, extents, strict=True)
        )
        for _ in gone:
            self._dropped.popleft()
        self._segments.free(extents)

    def _compact(self) -> None:
        """Rewrite the journal if most of it is history."""
        if self._journal.wasteful(len(self._queues)):
            with self._lock:
                kept = self._queues.in_order()
            self._journal.rewrite(
                Record(Kind.MAIN if in_main else Kind.SMALL, one.chunk_id, Extent(one.place, one.size_bytes))
                for one, in_main in kept
            )

    def _drop(self, chunk_id: ChunkId) -> None:
        kept = self._queues.remove(chunk_id)
        if kept is not None:
            self._dropped.append(kept)

    def _refused(self, error: OSError, chunks: int) -> None:
        self.uncached += chunks
        self._refused_last_s = self._clock()
        if self._refused_since_s is None:
            self._refused_since_s = self._refused_last_s
            logger.error(
                "chunk cache: cannot store chunks, reads go on without: directory=%s error=%s", self.directory, error
            )


def _take(path: Path, timeout_s: float) -> int:
    """Lock the directory for this process.

    A POSIX lock, not flock: it ends with the process although a thread of it that the kernel cannot end yet (one that
    pushes into a page cache) still has a copy of the descriptor.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            if time.monotonic() > deadline:
                os.close(descriptor)
                raise Conflict(f"another agent uses {path.parent}; give this one its own --state-dir") from None
            time.sleep(0.05)
        else:
            return descriptor


def _said(error: OSError, line: str) -> VMThunderError:
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return NoSpace(line)
    if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
        return NotPermitted(line)
    return Failure(line)
