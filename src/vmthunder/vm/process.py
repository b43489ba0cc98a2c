"""Processes of a virtual machine: started detached from us, found again later, ended for certain.

A machine's processes outlive the command that started them, so nothing here relies on being their parent. They carry
the machine's directory in their environment (`VMTHUNDER_MACHINE`): that is how `end_processes` finds all of them, even
if we were killed before the pid was written down, and never one that only happens to have got the pid. Blocking;
no state.
"""

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vmthunder.errors import Failure, MissingTool, NotPermitted

MARK = "VMTHUNDER_MACHINE"
END_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """A process for all times: pids are used again, but not with the same start time."""

    pid: int
    start_ticks: int
    """Clock ticks from the host's boot to the process's start (field 22 of /proc/PID/stat, proc(5))."""

    @classmethod
    def of(cls, pid: int) -> "ProcessIdentity":
        """Raises ProcessLookupError."""
        return cls(pid, int(_stat_fields(pid)[19]))

    def is_alive(self) -> bool:
        """Whether it runs; a zombie does not."""
        try:
            fields = _stat_fields(self.pid)
        except ProcessLookupError:
            return False
        return int(fields[19]) == self.start_ticks and fields[0] not in "ZX"


def _stat_fields(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third, `state`, on. The second, a name in brackets, may hold anything."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        raise ProcessLookupError(pid) from None


class Child:
    """A detached process as long as we are still its parent: only a parent learns how it ended."""

    def __init__(self, popen: "subprocess.Popen[bytes]") -> None:
        self._popen = popen
        self.identity = ProcessIdentity.of(popen.pid)

    async def ended(self) -> str:
        """Wait for the end; how it ended, as a phrase."""
        loop = asyncio.get_running_loop()
        done = asyncio.Event()
        pidfd = os.pidfd_open(self.identity.pid)
        try:
            loop.add_reader(pidfd, done.set)
            await done.wait()
        finally:
            loop.remove_reader(pidfd)
            os.close(pidfd)
        status = self._popen.wait()
        return f"exited with status {status}" if status >= 0 else f"was killed by {signal.Signals(-status).name}"

    def reap(self) -> None:
        """After the machine's processes were ended: leave no zombie."""
        self._popen.wait()

    def let_go(self) -> None:
        """From now on it is on its own."""
        # Popen's destructor warns about a child that still runs; that is what we want here.
        self._popen.returncode = 0


def start(
    command: Sequence[str],
    directory: Path,
    *,
    stdin_fd: int,
    output: str,
    pass_fds: Sequence[int] = (),
    environment: Mapping[str, str] | None = None,
) -> Child:
    """Start `command` in `directory`, in a session of its own, with both outputs appended to the file `output`.

    What it makes is its owner's alone: a guest's disk.

    Raises:
        MissingTool: there is no such program.
    """
    with (directory / output).open("ab") as log:
        try:
            popen = subprocess.Popen(
                command,
                cwd=directory,
                stdin=stdin_fd,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=pass_fds,
                start_new_session=True,
                umask=0o077,
                env={**os.environ, **(environment or {}), MARK: str(directory)},
            )
        except FileNotFoundError:
            raise MissingTool(f"{command[0]} is not installed; `make setup` installs what is missing") from None
    return Child(popen)


def processes(directory: Path) -> Iterator[int]:
    """Pids of all processes that belong to the machine in `directory`."""
    mark = f"{MARK}={directory}".encode()
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                environment = Path(entry.path, "environ").read_bytes()
            except OSError:
                continue  # it ended, or it is not ours to look at
            if mark in environment.split(b"\0"):
                yield int(entry.name)


def end_processes(directory: Path) -> None:
    """Kill everything that belongs to the machine in `directory` and wait until it is gone.

    Raises:
        NotPermitted: it runs as somebody else.
        Failure: a process hangs in the kernel.
    """
    deadline_s = time.monotonic() + END_TIMEOUT_S
    killed = set()
    while pids := list(processes(directory)):
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
            except ProcessLookupError:
                continue
            except PermissionError:
                raise NotPermitted(f"process {pid} of {directory} runs as another user; become that user") from None
        if time.monotonic() > deadline_s:
            raise Failure(
                f"process {pids[0]} of {directory} does not die; it waits in the kernel, see /proc/{pids[0]}/stack"
            )
        time.sleep(0.01)
    for pid in killed:
        try:
            os.waitpid(pid, 0)
        except ChildProcessError:
            pass  # started by another process, as nearly always
