"""The chunk cache of a node: one file per chunk, `chunks/HH/HEX`, whose content is the chunk's encoded bytes.

Owns the directory and its accounting of bytes. Decides nothing about fetching, and never shows bytes that it did not
verify.

A file is written under a temporary name and renamed, without fsync: its name is the digest of its content and every
load checks it. Whatever a kill or a power failure leaves is the chunk, or is noticed, dropped and costs a fetch. A
file's mode is its queue in `eviction` (read-only: main) and its modification time its place there, so a restart,
clean or not, keeps what was learned.

Threads: every method may be called from any thread. `_lock` is held over bookkeeping only. `_commit_lock` is held
over a whole commit, with its I/O: room is made before the write and counted as used after it, and nobody may take it
in between.
"""

import errno
import fcntl
import logging
import os
import stat
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from operator import itemgetter
from pathlib import Path

from vmthunder.errors import Conflict, Failure, NoSpace, NotPermitted, VMThunderError
from vmthunder.ids import Buffer, ChunkId, is_hex_digest
from vmthunder.image.chunk import MAX_CHUNK_BYTES, verify
from vmthunder.node.eviction import S3Fifo

logger = logging.getLogger(__name__)

_IN_MAIN = 0o400
_IN_SMALL = 0o600
LOCK_TIMEOUT_S = 5.0
"""A worker that is killed gives up its lock a moment after its successor was started."""
QUIET_S = 10.0
"""A disk that stored everything for so long is well again: a nearly full one still takes a small chunk now and then."""


class _Scratch(threading.local):
    """Where this thread reads files: no allocation per load, so no heap that is torn to pieces by odd sizes."""

    buffer = memoryview(b"")

    def view(self, size_bytes: int) -> memoryview:
        if len(self.buffer) < size_bytes:
            self.buffer = memoryview(bytearray(max(size_bytes, 64 << 10)))
        return self.buffer[:size_bytes]


class ChunkCache:
    """Chunk files within a quota of bytes.

    Raises:
        Conflict: another agent uses the directory.
        NotPermitted, NoSpace: it cannot be made.
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
        """Files that did not hold the chunk they are named for."""
        self.evicted = 0
        self.uncached = 0
        """Chunks that could not be stored."""
        self._queues = S3Fifo(quota_bytes)
        self._lock = threading.Lock()
        self._commit_lock = threading.Lock()
        self._clock = clock
        self._refused_since_s: float | None = None
        self._refused_last_s = 0.0
        self._scratch = _Scratch()
        try:
            (directory / "chunks").mkdir(parents=True, exist_ok=True)
            (directory / "chunks" / "tmp").mkdir(exist_ok=True)
            for prefix in range(256):
                (directory / "chunks" / f"{prefix:02x}").mkdir(exist_ok=True)
            self._lock_fd = _take(directory / "lock", lock_timeout_s)
        except OSError as error:
            raise _said(error, f"chunk cache {directory} cannot be used: {error.strerror}") from None
        self._fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def close(self) -> None:
        """Give up the directory. No method may be called any more."""
        os.close(self._fd)
        os.close(self._lock_fd)

    def recover(self) -> None:
        """Find out what is here, remove the litter of a crash. Call once, before anything else."""
        for entry in os.scandir(self.directory / "chunks" / "tmp"):
            self._unlink(f"chunks/tmp/{entry.name}")
        main: list[tuple[int, ChunkId, int]] = []
        small: list[tuple[int, ChunkId, int]] = []
        strangers: list[str] = []
        for prefix in (f"{number:02x}" for number in range(256)):
            for entry in os.scandir(self.directory / "chunks" / prefix):
                name, info = entry.name, entry.stat(follow_symlinks=False)
                if not (stat.S_ISREG(info.st_mode) and is_hex_digest(name) and name.startswith(prefix)):
                    strangers.append(entry.path)
                    continue
                chunk_id = ChunkId(bytes.fromhex(name))
                if not 0 < info.st_size <= MAX_CHUNK_BYTES:
                    self.corrupt += 1
                    self._unlink(_place(chunk_id))
                    continue
                queue = small if info.st_mode & stat.S_IWUSR else main
                queue.append((info.st_mtime_ns, chunk_id, info.st_size))
        if strangers:
            logger.warning("chunk cache: left alone what is not ours: count=%d first=%s", len(strangers), strangers[0])
        for queue in (main, small):
            queue.sort(key=itemgetter(0))  # in the order in which it was filled
            for _, chunk_id, size_bytes in queue:
                room = self._queues.make_room(chunk_id, size_bytes)
                if room is None:
                    self._unlink(_place(chunk_id))
                    continue
                for victim in room.evicted:
                    self._unlink(_place(victim))
                self._queues.add(chunk_id, size_bytes, to_main=room.to_main)

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

        With `wait` false, None also where the kernel would have to read from the disk. A file with wrong bytes is
        counted and removed.
        """
        size_bytes = self._queues.size_bytes(chunk_id)
        if size_bytes is None:
            return None
        try:
            # One byte more than there should be: a file that has grown is noticed too.
            data = self._read(chunk_id, size_bytes + 1, 0 if wait else os.RWF_NOWAIT)
        except FileNotFoundError:
            self._forget(chunk_id)
            return None
        except OSError as error:
            if not wait and error.errno in {errno.EAGAIN, errno.EOPNOTSUPP}:
                return None
            logger.warning("chunk cache: dropped what cannot be read: chunk=%s error=%s", chunk_id.hex(), error)
            self.drop(chunk_id)
            return None
        if len(data) == size_bytes and verify(chunk_id, data):
            self.touch(chunk_id)
            return data
        if not wait and len(data) < size_bytes:
            return None  # the rest is not in the page cache
        logger.warning("chunk cache: dropped a file with wrong bytes: chunk=%s", chunk_id.hex())
        self.corrupt += 1
        self.drop(chunk_id)
        return None

    def drop(self, chunk_id: ChunkId) -> None:
        """Remove a chunk."""
        self._forget(chunk_id)
        self._unlink(_place(chunk_id))

    def commit(self, chunk_id: ChunkId, data: Buffer) -> None:
        """Store a chunk's encoded bytes, which the caller has verified.

        A file system that refuses costs no more than the chunk: it stays uncached, the log says so once.
        """
        with self._commit_lock:
            if chunk_id in self._queues:
                return
            with self._lock:
                room = self._queues.make_room(chunk_id, len(data))
            if room is None:
                self.uncached += 1
                return
            for victim in room.evicted:
                self._unlink(_place(victim))
            self.evicted += len(room.evicted)
            try:
                self._write(chunk_id, data, _IN_MAIN if room.to_main else _IN_SMALL)
            except OSError as error:
                self._refused(error)
                return
            with self._lock:
                self._queues.add(chunk_id, len(data), to_main=room.to_main)
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

    def _read(self, chunk_id: ChunkId, size_bytes: int, flags: int) -> memoryview:
        descriptor = os.open(_place(chunk_id), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=self._fd)
        try:
            view = self._scratch.view(size_bytes)
            return view[: os.preadv(descriptor, (view,), 0, flags)]
        finally:
            os.close(descriptor)

    def _write(self, chunk_id: ChunkId, data: Buffer, mode: int) -> None:
        place = _place(chunk_id)
        temporary = f"chunks/tmp/{place[-64:]}"
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
            descriptor = os.open(temporary, flags, mode, dir_fd=self._fd)
            try:
                view = memoryview(data)
                while view:  # a disk that fills up takes a part first
                    view = view[os.write(descriptor, view) :]
                # The kernel's own stamp is as coarse as its timer: a hundred chunks of one tick would lose their order.
                now_ns = time.time_ns()
                os.utime(descriptor, ns=(now_ns, now_ns))
            finally:
                os.close(descriptor)
            os.rename(temporary, place, src_dir_fd=self._fd, dst_dir_fd=self._fd)
        except OSError:
            self._unlink(temporary)
            raise

    def _refused(self, error: OSError) -> None:
        self.uncached += 1
        self._refused_last_s = self._clock()
        if self._refused_since_s is None:
            self._refused_since_s = self._refused_last_s
            logger.error(
                "chunk cache: cannot store chunks, reads go on without: directory=%s error=%s", self.directory, error
            )

    def _forget(self, chunk_id: ChunkId) -> None:
        with self._lock:
            self._queues.remove(chunk_id)

    def _unlink(self, place: str) -> None:
        with suppress(OSError):  # not there, or stays and is found by the next recover
            os.unlink(place, dir_fd=self._fd)


def _place(chunk_id: ChunkId) -> str:
    name = chunk_id.hex()
    return f"chunks/{name[:2]}/{name}"


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
