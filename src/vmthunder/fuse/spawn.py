"""Start a keeper from an ordinary process and learn whether its mount serves. Blocking."""

import os
import select
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from vmthunder.errors import Failure


def spawn_keeper(
    mountpoint: Path,
    worker_argv: Sequence[str],
    *,
    log: Path | None,
    ready_timeout_s: float,
    environ: Mapping[str, str] = os.environ,
    pass_fds: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start keeper and worker; return as soon as the worker answers requests.

    With a `log` they are a session of their own and append to that file; without, they stay in ours, write to our
    standard error, and end with our terminal (Ctrl-C reaches the worker). They inherit `pass_fds`.

    Raises:
        Failure: the first worker could not start. Its line is the last one of the log, its exit code the worker's.
    """
    ready_fd, keeper_ready_fd = os.pipe()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644) if log else None
    try:
        logged_bytes = os.fstat(output).st_size if output is not None else 0
        keeper = subprocess.Popen(
            [sys.executable, "-m", "vmthunder.fuse.keeper", str(mountpoint), str(keeper_ready_fd), *worker_argv],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=(keeper_ready_fd, *pass_fds),
            env=dict(environ),
            start_new_session=log is not None,
        )
    finally:
        os.close(keeper_ready_fd)
        if output is not None:
            os.close(output)
    try:
        readable, _, _ = select.select([ready_fd], [], [], ready_timeout_s)
        if readable and os.read(ready_fd, 1):
            return keeper
    finally:
        os.close(ready_fd)
    if not readable:
        keeper.terminate()
        raise Failure(f"the agent did not serve {mountpoint} within {ready_timeout_s:.0f} s; see {log or 'above'}")
    exit_code = keeper.wait()
    raise _failure(exit_code, log, logged_bytes)


def _failure(exit_code: int, log: Path | None, logged_bytes: int) -> Failure:
    lines = log.read_bytes()[logged_bytes:].decode(errors="replace").split("\n") if log else []
    last = next((line for line in reversed(lines) if line.strip()), f"the agent ended with status {exit_code}")
    failure = Failure(last.removeprefix("vmthunder: "))
    failure.exit_code = exit_code if exit_code > 0 else Failure.exit_code
    return failure
