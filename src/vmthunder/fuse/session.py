"""Serves a file system over one FUSE connection.

Owns the reading of requests and the answering of each exactly once. What a name, a node or a byte is decides the
`FileSystem`; where the connection comes from, and what happens after this process, decides the keeper.

Everything runs on one event loop, with three exceptions that may block for as long as a read stays unanswered and so
belong to a thread of their own: `notify_store`, `notify_inval_inode`, `notify_inval_entry`. The kernel takes page locks
(or the directory's) for them that it also holds for a request: the thread that answers requests would wait for itself.

The device is never cloned (FUSE_DEV_IOC_CLONE): when a clone is closed, as by the death of a worker, the kernel fails
the requests that were read through it instead of keeping them for a resend.
"""

import asyncio
import errno
import fcntl
import logging
import os
import random
import signal
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar, cast

from vmthunder.fuse import protocol
from vmthunder.fuse.negotiate import Negotiated
from vmthunder.fuse.protocol import Attr, DirEntry, Entry, Opcode, Opened, ProtocolError, Request, Statfs
from vmthunder.ids import Buffer

logger = logging.getLogger(__name__)

_BATCH = 64
"""Requests answered in one turn of the loop; then others have theirs."""
_LOOK_EVERY_S = 0.5
_PF_EXITING = 4
_GONE = {errno.ENODEV, errno.ECONNABORTED}

_AT_HAND = (list, tuple)

_T = TypeVar("_T")


class FileSystem(Protocol):
    """A read-only file system. Called on the loop's thread only.

    `OSError` is what the caller of the system call sees. Any other exception is a bug: it is logged and becomes EIO.
    What is awaited may take for ever. It is cancelled when the process that asked is being killed.
    """

    def lookup(self, parent: int, name: bytes) -> Awaitable[Entry]:
        """What `name` is. Each answer with a node counts one lookup of it."""

    def forget(self, node: int, nlookup: int) -> None:
        """The kernel takes back `nlookup` lookups of `node`; at zero it will not name it again."""

    def getattr(self, node: int) -> tuple[Attr, float]:
        """Attributes, and for how many seconds the kernel may believe them."""

    def open(self, node: int, flags: int) -> Awaitable[Opened]: ...

    def read(self, node: int, fh: int, offset: int, size_bytes: int) -> Sequence[Buffer] | Awaitable[Sequence[Buffer]]:
        """Exactly `size_bytes`, or all up to the end of the file: what is missing the kernel takes for zeros.

        A list or tuple at once where the data is at hand. Of memory as `fuse.memory` demands.
        """

    def release(self, node: int, fh: int) -> None: ...

    def readdir(self, node: int) -> Sequence[DirEntry]: ...

    def statfs(self) -> Statfs: ...


class Session:
    """One worker's time at a connection: `start`, then `drain` and leave, or until `closed`."""

    def __init__(
        self, fuse_fd: int, negotiated: Negotiated, filesystem: FileSystem, loop: asyncio.AbstractEventLoop
    ) -> None:
        self.negotiated = negotiated
        self.closed = asyncio.Event()
        """Set when the connection is gone: unmounted or aborted."""
        self._fd = fuse_fd
        self._fs = filesystem
        self._loop = loop
        self._buffer = bytearray(b"\1" * negotiated.request_bytes)  # written, so in memory: see fuse.memory
        self._view = memoryview(self._buffer)
        self._waiting: dict[int, tuple[asyncio.Task[None], int]] = {}  # by unique: who answers, thread that asked
        self._look_again: asyncio.TimerHandle | None = None
        self._directories: dict[int, Sequence[DirEntry]] = {}  # by fh: what it held when it was opened
        # A directory handle of an earlier worker must not mean another directory here.
        self._next_directory = random.getrandbits(62)
        self._handlers: dict[int, Callable[[Request], None]] = {
            Opcode.LOOKUP: self._lookup,
            Opcode.FORGET: self._forget,
            Opcode.BATCH_FORGET: self._batch_forget,
            Opcode.GETATTR: self._getattr,
            Opcode.OPEN: self._open,
            Opcode.RELEASE: self._release,
            Opcode.OPENDIR: self._opendir,
            Opcode.READDIR: self._readdir,
            Opcode.RELEASEDIR: self._releasedir,
            Opcode.STATFS: self._statfs,
            Opcode.INTERRUPT: self._ignore,
            Opcode.DESTROY: lambda request: self._reply(request.unique),
        }

    @property
    def waiting(self) -> int:
        """Requests that were read and are not answered yet."""
        return len(self._waiting)

    def start(self, *, resend: bool = False) -> None:
        """Begin to answer; with `resend` first what an earlier worker had read and left unanswered.

        The resend comes before the first read: afterwards it would send again what we are working on ourselves.
        """
        if resend and self.negotiated.resend:
            os.write(self._fd, protocol.encode_resend())
        self._loop.add_reader(self._fd, self._on_readable)

    async def drain(self, patience_s: float) -> int:
        """Read no more requests, and answer those that were read. How many are left after `patience_s`.

        Those are dropped without an answer by `close`; the next worker gets them again if `negotiated.resend`. Where
        it does not, `start` once more instead of leaving.
        """
        self._loop.remove_reader(self._fd)
        if self._waiting:
            await asyncio.wait([task for task, _ in self._waiting.values()], timeout=patience_s)
        return len(self._waiting)

    async def close(self) -> None:
        """Read and answer nothing any more. Leaves the descriptor open: the connection is not ours to end."""
        self._loop.remove_reader(self._fd)
        if self._look_again is not None:
            self._look_again.cancel()
        tasks = [task for task, _ in self._waiting.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def notify_store(self, node: int, offset: int, buffers: Sequence[Buffer]) -> bool:
        """Put data into the page cache of `node`; whether the kernel knows it. Blocking; any thread but the loop's.

        Whole pages, except at the end of the file: the kernel marks only those as valid. Raises OSError.
        """
        head = protocol.encode_store(node, offset, protocol.total_bytes(buffers))
        return self._notify([head, *buffers])

    def notify_inval_inode(self, node: int) -> bool:
        """Drop what the kernel has cached of `node`; whether it knows it. Blocking; any thread but the loop's."""
        return self._notify([protocol.encode_inval_inode(node)])

    def notify_inval_entry(self, parent: int, name: bytes) -> bool:
        """Have `name` looked up anew; whether the kernel knew it. Blocking; any thread but the loop's."""
        return self._notify([protocol.encode_inval_entry(parent, name)])

    def open_backing(self, fd: int) -> int:
        """Register an open local file for `Opened.backing_id`. `fd` may be closed afterwards.

        The registration outlives this process. Raises OSError (EOPNOTSUPP, ENOTTY: no passthrough; ELOOP: the file is
        on a stacked file system).
        """
        return int(fcntl.ioctl(self._fd, protocol.BACKING_OPEN, bytearray(protocol.BACKING_MAP.pack(fd, 0, 0))))

    def close_backing(self, backing_id: int) -> None:
        """Drop a registration; files that are open through it stay so. Raises OSError."""
        fcntl.ioctl(self._fd, protocol.BACKING_CLOSE, bytearray(backing_id.to_bytes(4, "little")))

    # From here on: the loop's thread.

    def _on_readable(self) -> None:
        fd, buffers, unpack = self._fd, [self._buffer], protocol.READ_REQUEST.unpack_from
        for _ in range(_BATCH):
            try:
                read_bytes = os.readv(fd, buffers)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno == errno.ENOENT:
                    continue  # its process was killed while we read it
                if error.errno not in _GONE:
                    raise
                self._lost(error)
                return
            # Every request is taken apart as a READ first: nearly all are, and the others have room for it too.
            length_bytes, opcode, unique, node, fh, offset, size_bytes = unpack(self._buffer)
            try:
                if opcode != Opcode.READ:
                    self._dispatch(protocol.decode_request(self._buffer, read_bytes))
                    continue
                if length_bytes != read_bytes:
                    raise ProtocolError(f"a READ of {length_bytes} bytes came with {read_bytes}")
                answer = self._fs.read(node, fh, offset, size_bytes)
                if isinstance(answer, _AT_HAND):
                    self._reply(unique, answer)
                else:
                    request = protocol.decode_request(self._buffer, read_bytes)
                    self._later(request, cast("Awaitable[Sequence[Buffer]]", answer), lambda buffers: buffers)
            except OSError as error:
                self._error(unique, error.errno or errno.EIO)
            except Exception:
                logger.critical("bug: request %d of kind %d for node %d failed", unique, opcode, node, exc_info=True)
                self._error(unique, errno.EIO)

    def _dispatch(self, request: Request) -> None:
        handler = self._handlers.get(request.opcode)
        if handler is None:
            raise OSError(errno.ENOSYS, "not a request that this file system answers")
        handler(request)

    def _lookup(self, request: Request) -> None:
        name = protocol.decode_name(self._buffer, request.length_bytes)
        entry = self._fs.lookup(request.node, name)
        self._later(request, entry, lambda entry: [protocol.encode_entry(entry)])

    def _open(self, request: Request) -> None:
        flags, _ = protocol.body(self._buffer, request.length_bytes, protocol.OPEN_IN)
        opened = self._fs.open(request.node, flags)
        self._later(request, opened, lambda opened: [protocol.encode_open(opened)])

    def _getattr(self, request: Request) -> None:
        self._reply(request.unique, [protocol.encode_attr(*self._fs.getattr(request.node))])

    def _forget(self, request: Request) -> None:
        (nlookup,) = protocol.body(self._buffer, request.length_bytes, protocol.FORGET_IN)
        self._fs.forget(request.node, nlookup)

    def _batch_forget(self, request: Request) -> None:
        for node, nlookup in protocol.decode_batch_forget(self._buffer, request.length_bytes):
            self._fs.forget(node, nlookup)

    def _release(self, request: Request) -> None:
        fh, *_ = protocol.body(self._buffer, request.length_bytes, protocol.RELEASE_IN)
        self._fs.release(request.node, fh)
        self._reply(request.unique)

    def _opendir(self, request: Request) -> None:
        self._next_directory += 1
        self._directories[self._next_directory] = self._fs.readdir(request.node)
        self._reply(request.unique, [protocol.encode_open(Opened(self._next_directory))])

    def _readdir(self, request: Request) -> None:
        fh, start, size_bytes, *_ = protocol.body(self._buffer, request.length_bytes, protocol.READ_IN)
        entries = self._directories.get(fh)
        if entries is None:  # opened before this worker's time
            entries = self._directories[fh] = self._fs.readdir(request.node)
        self._reply(request.unique, [protocol.encode_entries(entries, start, size_bytes)])

    def _releasedir(self, request: Request) -> None:
        fh, *_ = protocol.body(self._buffer, request.length_bytes, protocol.RELEASE_IN)
        self._directories.pop(fh, None)
        self._reply(request.unique)

    def _statfs(self, request: Request) -> None:
        self._reply(request.unique, [protocol.encode_statfs(self._fs.statfs())])

    def _ignore(self, request: Request) -> None:
        """INTERRUPT wants no answer: see `_let_go_of_the_killed`."""

    def _let_go_of_the_killed(self) -> None:
        """Answer EINTR to those who are being killed while they wait: until then they cannot end.

        Only to those: local disks never fail a read with EINTR, so nobody expects it. INTERRUPT cannot tell, as the
        kernel sends one for the first signal of any kind, and none for direct reads. So we look from time to time.
        """
        for unique, (task, thread_id) in self._waiting.items():
            if _is_being_killed(thread_id):
                self._error(unique, errno.EINTR)
                task.cancel()
        self._look_again = self._loop.call_later(_LOOK_EVERY_S, self._let_go_of_the_killed) if self._waiting else None

    def _later(self, request: Request, answer: Awaitable[_T], encode: Callable[[_T], Sequence[Buffer]]) -> None:
        task = self._loop.create_task(self._serve(request, answer, encode))
        self._waiting[request.unique] = task, request.pid
        task.add_done_callback(lambda _: self._waiting.pop(request.unique))
        if self._look_again is None:
            self._look_again = self._loop.call_later(_LOOK_EVERY_S, self._let_go_of_the_killed)

    async def _serve(self, request: Request, answer: Awaitable[_T], encode: Callable[[_T], Sequence[Buffer]]) -> None:
        try:
            self._reply(request.unique, encode(await answer))
        except OSError as error:
            self._error(request.unique, error.errno or errno.EIO)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise  # answered already; or we leave, and the next worker gets the request again
            logger.critical("bug: what request %s waited for was cancelled", request)
            self._error(request.unique, errno.EIO)
        except Exception:
            logger.critical("bug: request %s failed", request, exc_info=True)
            self._error(request.unique, errno.EIO)

    def _reply(self, unique: int, buffers: Sequence[Buffer] = ()) -> None:
        self._write(unique, [protocol.encode_head(unique, protocol.total_bytes(buffers)), *buffers])

    def _error(self, unique: int, number: int) -> None:
        self._write(unique, [protocol.encode_error(unique, number)])

    def _write(self, unique: int, buffers: Sequence[Buffer]) -> None:
        try:
            os.writev(self._fd, buffers)
        except OSError as error:
            if error.errno in _GONE:
                self._lost(error)
            elif error.errno != errno.ENOENT:  # ENOENT: its process was killed, or it has been sent again
                logger.critical("bug: the kernel refuses our answer to request %d: %s", unique, error.strerror)

    def _notify(self, buffers: Sequence[Buffer]) -> bool:
        try:
            os.writev(self._fd, buffers)
        except FileNotFoundError:
            return False
        return True

    def _lost(self, error: OSError) -> None:
        self._loop.remove_reader(self._fd)
        if not self.closed.is_set():
            logger.info("the connection is gone: %s", error.strerror)
            self.closed.set()


def _is_being_killed(thread_id: int) -> bool:
    """Whether a thread is on its way out: SIGKILL pending, or past that (proc_pid_stat(5), `signal` and `flags`).

    The kernel turns every deadly signal into SIGKILL for each thread of the process. A thread that cannot be found says
    nothing: another one of its process may wait for what it asked for, or it lives in another pid namespace (0).
    """
    try:
        stat = Path(f"/proc/{thread_id}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return False
    fields = stat.rpartition(")")[2].split()
    return bool(int(fields[6]) & _PF_EXITING or int(fields[28]) & 1 << signal.SIGKILL - 1)
