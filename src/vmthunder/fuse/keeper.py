"""The keeper: holds the FUSE connection while workers come and go.

    python -m vmthunder.fuse.keeper MOUNTPOINT READY_FD WORKER ARGUMENT…

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
from typing import NamedTuple

from vmthunder.errors import Failure, MissingTool, VMThunderError
from vmthunder.fuse import libc, mounts
from vmthunder.fuse.handoff import VARIABLE, Cause, Handoff, Leave
from vmthunder.fuse.mounts import Mount
from vmthunder.fuse.negotiate import Negotiated, UnsupportedKernel, negotiate
from vmthunder.fuse.protocol import REQUEST_BUFFER_BYTES, decode_init, decode_request

_INIT_TIMEOUT_S = 10.0
_SHORT_LIFE_S = 1.0
_FIRST_PAUSE_S = 0.02
_LONGEST_PAUSE_S = 1.0
_LOOK_EVERY_S = 0.2
_IGNORED = (signal.SIGHUP, signal.SIGINT, signal.SIGPIPE)


class _Worker(NamedTuple):
    pid: int
    pidfd: int
    ready_fd: int


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
        self.worker: _Worker | None = None
        self.undead: set[int] = set()
        """Earlier workers of which a thread still hangs in the kernel."""
        self.stop_asked = False
        self.worker_oom_score_adj = _leave_to_the_last()

    def run(self) -> int:
        """Until a worker says stop, or the first one says why it cannot start. Returns our exit status.

        Raises:
            Failure: the first worker's program cannot be run.
        """
        cause, pause_s = Cause.START, 0.0
        while True:
            started_s = time.monotonic()
            try:
                worker = self._start_worker(cause)
            except OSError as error:
                if not self.was_ready:
                    raise Failure(f"cannot run {self.worker_argv[0]}: {error.strerror}") from error
                say(f"cannot run {self.worker_argv[0]} now: {error.strerror}")  # but perhaps in a moment
            else:
                status = self._wait(worker)
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
        if self.worker is not None:
            try:
                signal.pidfd_send_signal(self.worker.pidfd, signal.SIGTERM)
            except ProcessLookupError:
                pass  # it has just ended

    def _start_worker(self, cause: Cause) -> _Worker:
        ready_fd, worker_ready_fd = os.pipe()
        handoff = Handoff(
            self.fuse_fd, worker_ready_fd, os.getpid(), self.mounted, self.negotiated, cause, self.restarts
        )
        # One malloc arena: every further one would keep its own peak of decoded chunks.
        environ = {"MALLOC_ARENA_MAX": "1", **os.environ, VARIABLE: handoff.to_text()}
        try:
            os.set_inheritable(worker_ready_fd, True)
            pid = os.posix_spawnp(self.worker_argv[0], self.worker_argv, environ, setsigdef=_IGNORED)
        except OSError:
            os.close(ready_fd)
            raise
        finally:
            os.close(worker_ready_fd)
        self.worker = _Worker(pid, os.pidfd_open(pid), ready_fd)
        if self.worker_oom_score_adj is not None:
            with open(f"/proc/{pid}/oom_score_adj", "w", encoding="ascii") as setting:
                setting.write(self.worker_oom_score_adj)
        if self.stop_asked:
            self.ask_to_stop()  # it was asked before there was a worker to tell
        return self.worker

    def _wait(self, worker: _Worker) -> int:
        """Until `worker` is dead. Its exit status, or minus the signal that killed it."""
        poll = select.poll()
        poll.register(worker.pidfd, select.POLLIN)
        poll.register(worker.ready_fd, select.POLLIN)
        status = None
        while status is None:
            status = _status(worker.pid)  # first, so that all it ever said is in the pipe when that is looked at
            self.undead = {pid for pid in self.undead if os.waitpid(pid, os.WNOHANG)[0] == 0}
            for fd, _ in poll.poll(0 if status is not None else _LOOK_EVERY_S * 1000):
                if fd == worker.ready_fd:
                    poll.unregister(fd)
                    if os.read(fd, 1) and not self.was_ready:
                        self.was_ready = True
                        self._tell_starter()
        self.worker = None
        self.undead.add(worker.pid)
        os.close(worker.pidfd)
        os.close(worker.ready_fd)
        return status

    def _tell_starter(self) -> None:
        try:
            os.write(self.ready_fd, b"1")
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


def _leave_to_the_last() -> str | None:
    """Keep the out-of-memory killer away from us; what its setting was before, which is good for workers."""
    try:
        with open("/proc/self/oom_score_adj", "r+", encoding="ascii") as setting:
            before = setting.read().strip()
            setting.write("-1000")
    except OSError as error:
        say(f"cannot keep the out-of-memory killer away from the keeper: {error.strerror}")
        return None
    return before


def _handshake(fuse_fd: int, mounted: Mount) -> Negotiated:
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
        negotiated, reply, losses = negotiate(request, decode_init(message, len(message)))
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


def keep(mountpoint: str, ready_fd: int, worker_argv: list[str]) -> int:
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
    mounted = mounts.mount(fuse_fd, mountpoint)
    try:
        keeper = Keeper(fuse_fd, mounted, _handshake(fuse_fd, mounted), worker_argv, ready_fd)
        os.set_inheritable(fuse_fd, True)
        signal.signal(signal.SIGTERM, keeper.ask_to_stop)
        try:
            libc.mlockall(libc.MCL_CURRENT | libc.MCL_FUTURE)
        except OSError as error:
            say(f"cannot lock its memory: {error.strerror}")
        return keeper.run()
    finally:
        mounts.unmount(mounted)


def main(argv: list[str]) -> int:
    mountpoint, ready_fd, *worker_argv = argv
    try:
        return keep(mountpoint, int(ready_fd), worker_argv)
    except VMThunderError as error:
        say(str(error))
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
