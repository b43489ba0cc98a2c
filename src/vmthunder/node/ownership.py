"""One agent per run directory: a lock that lives as long as any process of the agent.

The launcher takes the lock and leaves it to the keeper, which leaves it to its workers; none of them looks at it. The
kernel gives it up when the last of them is gone, however that came. So the lock also tells a client of a silent socket
whether there is anybody to wait for.
"""

import fcntl
import os
from pathlib import Path

from vmthunder.errors import Conflict

_LOCK = "agent.lock"


def take(run_dir: Path) -> int:
    """Lock `run_dir`; the lock is held while the returned descriptor, or an inherited copy of it, is open.

    Raises:
        Conflict: an agent owns the directory.
    """
    descriptor = os.open(run_dir / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise Conflict(
            f"an agent already runs with run directory {run_dir}; stop it with `vmthunder agent --stop`, "
            "or choose other --run-dir, --state-dir and --mount for a second one"
        ) from None
    return descriptor


def is_taken(run_dir: Path) -> bool:
    """Whether an agent owns `run_dir` now."""
    try:
        descriptor = os.open(run_dir / _LOCK, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(descriptor)
