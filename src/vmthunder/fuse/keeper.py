"""The keeper: holds the FUSE connection while workers come and go.

    python -m vmthunder.fuse.keeper MOUNTPOINT ro|rw READY_FD WORKER ARGUMENT…

It mounts, answers INIT, starts the worker and waits. As long as one process holds the device open the mount lives, and
what guests ask for meanwhile waits in the kernel. The keeper reads no further request, takes no memory, imports next to
nothing: it has no reason to die. Should it be killed all the same, the worker goes on; it just has no successor.
Single-threaded.
"""

import os
import select
import signal
import sys
import time

from vmthunder.errors import Failure, MissingTool, VMThunderError
from vmthunder.fuse import libc, mounts
from vmthunder.fuse.handoff import READY, VARIABLE, Cause, Handoff, Leave
from vmthunder.fuse.mounts import Mount
from vmthunder.fuse.negotiate import Negotiated, UnsupportedKernel, negotiate
from vmthunder.fuse.protocol import REQUEST_BUFFER_BYTES, decode_init, decode_request

_INIT_TIMEOUT_S = 10.0
_SHORT_LIFE_S = 1.0
_FIRST_PAUSE_S = 0.02
_LONGEST_PAUSE_S = 1.0
_LOOK_EVERY_S = 0.2
_IGNORED = (signal.SIGHUP, signal.SIGINT, signal.SIGPIPE)


# One malloc arena: every further one would keep its own peak of decoded chunks. What sources sent stays out of the heap, where
# glibc would put it after the first of its size was freed: it would leave holes between decoded chunks.
_MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "16777216"}


class Keeper:
    """One connection and the succession of its workers."""

    def __init__(self, fuse_fd: int, mounted: Mount, negotiated: Negotiated, worker_argv: list[str], ready_fd: int):
        self.fuse_fd = fuse_fd
        self.mounted = mounted
        self.negotiated = negotiated
        self.worker_argv = worker_argv
        self.ready_fd = ready_fd
        self.was_ready = False
        self.restarts = 0
        self.worker_pid: int | None = None
        self.undead: set[int] = set()
        """Earlier workers that are not reaped: a thread of theirs may still hang in the kernel."""
        self.stop_asked = False
        self.worker_oom_score_adj = _swap("/proc/self/oom_score_adj", "-1000")
        # What can happen arrives as a byte in one pipe: the number of a signal, or a worker's READY.
        self.events, self.events_write = os.pipe2(os.O_NONBLOCK)
        signal.set_wakeup_fd(self.events_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, self.ask_to_stop)

    def run(self) -> int:
        """Until a worker says stop, or the first one says why it cannot start. Returns our exit status.

        Raises:
            Failure: the first worker's program cannot be run.
        """
        cause, pause_s = Cause.START, 0.0
        while True:
            started_s = time.monotonic()
            try:
                pid = self._start_worker(cause)
            except OSError as error:
                if not self.was_ready:
                    raise Failure(f"cannot run {self.worker_argv[0]}: {error.strerror}") from error
                say(f"cannot run {self.worker_argv[0]} now: {error.strerror}")  # but perhaps in a moment
            else:
                status = self._wait(pid)
                if status == Leave.STOP or (status > 0 and not self.was_ready):
                    return status
                cause = Cause.HANDOVER if status == Leave.HANDOVER else Cause.DEATH
                if cause is Cause.DEATH:
                    say(f"the worker ended with status {status}; starting another one")
                self.restarts += 1
            # One that had lived for a while is replaced at once; one that cannot live must not use up the machine.
            young = time.monotonic() - started_s < _SHORT_LIFE_S
            pause_s = min(max(2 * pause_s, _FIRST_PAUSE_S), _LONGEST_PAUSE_S) if young else 0.0
            until_s = time.monotonic() + pause_s
            while time.monotonic() < until_s and not self.stop_asked:
                time.sleep(0.01)
            if self.stop_asked:
                return Leave.STOP

    def ask_to_stop(self, *_: object) -> None:
        """SIGTERM: pass it on to the worker, which knows how to stop in order."""
        self.stop_asked = True
        if self.worker_pid is not None:
            os.kill(self.worker_pid, signal.SIGTERM)

    def _start_worker(self, cause: Cause) -> int:
        handoff = Handoff(
            self.fuse_fd, self.events_write, os.getpid(), self.mounted, self.negotiated, cause, self.restarts
        )
        environ = {**_MALLOC, **os.environ, VARIABLE: handoff.to_text()}
        for fd in (self.fuse_fd, self.events_write):
            os.set_inheritable(fd, True)
        pid = os.posix_spawnp(self.worker_argv[0], self.worker_argv, environ, setsigdef=_IGNORED)
        _swap(f"/proc/{pid}/oom_score_adj", self.worker_oom_score_adj)
        self.worker_pid = pid
        if self.stop_asked:
            self.ask_to_stop()  # it was asked before there was a worker to tell
        return pid

    def _wait(self, pid: int) -> int:
        """Until the worker is dead. Its exit status, or minus the signal that killed it."""
        while (status := _status(pid)) is None:
            self._hear(_LOOK_EVERY_S)
        self._hear(0)  # all it ever said is in the pipe by now
        self.worker_pid = None
        self.undead.add(pid)
        return status

    def _hear(self, patience_s: float) -> None:
        self.undead = {pid for pid in self.undead if os.waitpid(pid, os.WNOHANG)[0] == 0}
        if not select.select([self.events], [], [], patience_s)[0]:
            return
        if READY in os.read(self.events, 4096) and not self.was_ready:
            self.was_ready = True
            try:
                os.write(self.ready_fd, READY)
            except OSError:
                pass  # nobody waits any more
            os.close(self.ready_fd)


def say(line: str) -> None:
    """One line for the log. A log that is full or gone is no reason to die."""
    try:
        os.write(2, f"keeper: {line}\n".encode())
    except OSError:
        pass


def _status(pid: int) -> int | None:
    """How a child that was not reaped yet ended, as soon as its main thread has; None while that runs.

    waitpid and pidfds wait for all threads. One that was pushing into the page cache may not be able to die before
    the read that it waits for is answered, which only the next worker will do; so the main thread's death counts.
    """
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stat:
        fields = stat.read().rpartition(")")[2].split()
    if fields[0] != "Z":
        return None
    return os.waitstatus_to_exitcode(int(fields[49]))


def _swap(path: str, text: str) -> str:
    """Write a setting of the kernel; what it was before. One that is refused is said, and left as it is."""
    with open(path, encoding="ascii") as setting:
        before = setting.read().strip()
    try:
        with open(path, "w", encoding="ascii") as setting:
            setting.write(text)
    except OSError as error:
        say(f"cannot write {text} to {path}: {error.strerror}")
    return before


def _handshake(fuse_fd: int, mounted: Mount, writable: bool) -> Negotiated:
    """Answer INIT, the kernel's first request. Raises MissingTool for a kernel that is too old, Failure."""
    poll = select.poll()
    poll.register(fuse_fd, select.POLLIN)
    if not poll.poll(_INIT_TIMEOUT_S * 1000):
        raise Failure(
            f"the kernel mounted {mounted.mountpoint} but did not start to talk within {_INIT_TIMEOUT_S:.0f} s"
        )
    message = os.read(fuse_fd, REQUEST_BUFFER_BYTES)
    try:
        request = decode_request(message, len(message))
        negotiated, reply, losses = negotiate(request, decode_init(message, len(message)), writable=writable)
    except UnsupportedKernel as error:
        raise MissingTool(str(error)) from error
    os.write(fuse_fd, reply)
    for loss in losses:
        say(loss)
    try:
        mounts.set_readahead(mounted, negotiated.max_readahead_bytes)
    except OSError as error:
        say(f"the kernel reads ahead 128 KiB only: {error}")
    return negotiated


def keep(mountpoint: str, writable: bool, ready_fd: int, worker_argv: list[str]) -> int:
    """Mount, keep, unmount. Returns the exit status. Raises VMThunderError where it cannot begin."""
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    mountpoint = os.path.realpath(mountpoint)
    if mounts.clear_stale(mountpoint):
        say(f"removed the mount at {mountpoint} that a dead agent had left")
    try:
        # Non-blocking for good: the workers share this open file description.
        fuse_fd = os.open("/dev/fuse", os.O_RDWR | os.O_NONBLOCK)
    except OSError as error:
        raise MissingTool(f"cannot open /dev/fuse: {error.strerror}; load FUSE with `modprobe fuse`") from error
    mounted = mounts.mount(fuse_fd, mountpoint, writable=writable)
    try:
        keeper = Keeper(fuse_fd, mounted, _handshake(fuse_fd, mounted, writable), worker_argv, ready_fd)
        try:
            libc.mlockall(libc.MCL_CURRENT | libc.MCL_FUTURE)
        except OSError as error:
            say(f"cannot lock its memory: {error.strerror}")
        return keeper.run()
    finally:
        mounts.unmount(mounted)


def main(argv: list[str]) -> int:
    mountpoint, mode, ready_fd, *worker_argv = argv
    try:
        return keep(mountpoint, mode == "rw", int(ready_fd), worker_argv)
    except VMThunderError as error:
        say(str(error))
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
