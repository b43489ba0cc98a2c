"""Processes that a benchmark starts: their output goes to a log file, their CPU time is counted, and they are ended.

Owns no policy: what is started, and when it counts as ready, is the caller's business.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from vmthunder.errors import Failure

VMTHUNDER: Final = (sys.executable, "-m", "vmthunder")

_STOP_S = 15.0
_POLL_S = 0.01
_TICKS_S = os.sysconf("SC_CLK_TCK")


class Process:
    """A child process with a log file. `label` is what messages call it."""

    def __init__(self, label: str, argv: Sequence[str], log: Path) -> None:
        self.label: Final = label
        self.log: Final = log
        # Settings of the operator's own agent must not reach the one that is measured.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("VMTHUNDER_")}
        with log.open("wb") as output:
            self._popen = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C goes to the benchmark, which ends its processes in order
            )
        self.pid: Final = self._popen.pid

    def last_line(self) -> str:
        """The end of what it said, for an error message."""
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    def wait_until(self, ready: Callable[[], bool], timeout_s: float) -> None:
        """Poll `ready`. Raises Failure when the process ends or the time is over before."""
        deadline = time.monotonic() + timeout_s
        while not ready():
            code = self._popen.poll()
            if code is not None:
                raise Failure(f"{self.label} ended with status {code} before it was ready: {self.last_line()}")
            if time.monotonic() > deadline:
                raise Failure(f"{self.label} was not ready after {timeout_s:.0f} s: {self.last_line()}")
            time.sleep(_POLL_S)

    def wait(self, timeout_s: float) -> int:
        """Its exit status. Raises Failure when it runs longer."""
        try:
            return self._popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise Failure(f"{self.label} took longer than {timeout_s:.0f} s") from None

    def kill(self) -> None:
        """SIGKILL to it and to all that it started, at once."""
        os.killpg(self.pid, signal.SIGKILL)
        self._popen.wait()

    def reap(self, timeout_s: float) -> tuple[int, float]:
        """Its exit status, and the CPU seconds of it and of what it has waited for. Raises Failure when it runs longer."""
        killer = threading.Timer(timeout_s, self._popen.kill)
        killer.start()
        _, status, usage = os.wait4(self.pid, 0)
        killer.cancel()
        self._popen.returncode = os.waitstatus_to_exitcode(status)
        if self._popen.returncode == -signal.SIGKILL:
            raise Failure(f"{self.label} took longer than {timeout_s:.0f} s")
        return self._popen.returncode, usage.ru_utime + usage.ru_stime

    def stop(self) -> None:
        """End it and what it started: SIGTERM, and SIGKILL if that is not obeyed."""
        self._popen.terminate()
        try:
            self._popen.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            # Its session holds all its descendants, and its pid is ours until it is waited for.
            self.kill()


@contextmanager
def running(label: str, argv: Sequence[str], log: Path) -> Iterator[Process]:
    """A process for the length of a `with` block."""
    process = Process(label, argv, log)
    try:
        yield process
    finally:
        process.stop()


def finish(label: str, argv: Sequence[str], log: Path, timeout_s: float) -> float:
    """Run a program to its end; returns its CPU seconds. Raises Failure with its last line if it fails."""
    with running(label, argv, log) as process:
        code, used_s = process.reap(timeout_s)
    if code:
        raise Failure(f"{label} ended with status {code}: {process.last_line()}")
    return used_s


def cpu_s(pids: Iterable[int]) -> float:
    """CPU seconds, user and system, used so far by processes, their descendants, and those they have waited for."""
    return sum(map(_tree_ticks, pids)) / _TICKS_S


def _tree_ticks(pid: int) -> int:
    try:
        # proc(5): after the name, which may hold spaces, field 3 is the state; utime … cstime are fields 14–17.
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        children = [child for task in Path(f"/proc/{pid}/task").iterdir() for child in _children(task)]
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(map(int, fields[11:15])) + sum(map(_tree_ticks, children))


def _children(task: Path) -> list[int]:
    try:
        return [int(pid) for pid in (task / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []
