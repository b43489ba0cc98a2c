"""Start a keeper from an ordinary process and learn whether its mount serves. Blocking."""

import os
import select
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from vmthunder.errors import Failure


def keeper_command(mountpoint: Path, ready_fd: int, worker_argv: Sequence[str], *, writable: bool = False) -> list[str]:
    """The keeper as a program. It writes a byte to `ready_fd`, and closes it, when the first worker is ready."""
    mode = "rw" if writable else "ro"
    return [sys.executable, "-m", "vmthunder.fuse.keeper", str(mountpoint), mode, str(ready_fd), *worker_argv]


def spawn_keeper(
    mountpoint: Path,
    worker_argv: Sequence[str],
    *,
    log: Path,
    ready_timeout_s: float,
    environ: Mapping[str, str] = os.environ,
    pass_fds: Sequence[int] = (),
    writable: bool = False,
) -> subprocess.Popen[bytes]:
    """Start keeper and worker; return as soon as the worker answers requests.

    They are a session of their own, append to `log`, and inherit `pass_fds`.

    Raises:
        Failure: the first worker could not start. Its line is the last one of the log, its exit code the worker's.
    """
    ready_fd, keeper_ready_fd = os.pipe()
    try:
        with log.open("ab") as output:
            logged_bytes = output.tell()
            keeper = subprocess.Popen(
                keeper_command(mountpoint, keeper_ready_fd, worker_argv, writable=writable),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(keeper_ready_fd, *pass_fds),
                env=dict(environ),
                start_new_session=True,
            )
    finally:
        os.close(keeper_ready_fd)
    try:
        readable, _, _ = select.select([ready_fd], [], [], ready_timeout_s)
        if readable and os.read(ready_fd, 1):
            return keeper
    finally:
        os.close(ready_fd)
    if not readable:
        keeper.terminate()
        raise Failure(f"the agent did not serve {mountpoint} within {ready_timeout_s:.0f} s; see {log}")
    exit_code = keeper.wait()
    raise _failure(exit_code, log, logged_bytes)


def _failure(exit_code: int, log: Path, logged_bytes: int) -> Failure:
    lines = log.read_bytes()[logged_bytes:].decode(errors="replace").splitlines()
    last = next((line for line in reversed(lines) if line.strip()), f"the agent ended with status {exit_code}")
    failure = Failure(last.removeprefix("vmthunder: "))
    failure.exit_code = exit_code if exit_code > 0 else Failure.exit_code
    return failure
