"""Starts an agent: checks what an operator may have got wrong, then becomes the keeper or leaves one in the background.

Runs in the command's process; knows nothing of what a worker does. A worker that cannot start ends with the exit code
of its error after a last line that says why; the keeper ends with the same code, and so does this command.
"""

import os
import sys
from pathlib import Path
from typing import Any, NoReturn

from vmthunder.errors import Conflict, Failure, MissingTool, NotPermitted, Usage
from vmthunder.fuse import mounts
from vmthunder.fuse.spawn import keeper_command, spawn_keeper
from vmthunder.node import ownership
from vmthunder.node.control import AgentClient
from vmthunder.node.settings import AgentSettings

START_S = 60.0
_FUSE_DEVICE = Path("/dev/fuse")


def run(settings: AgentSettings) -> NoReturn:
    """Become the keeper of a new agent, in the foreground: no process stands between it and who supervises it."""
    os.set_inheritable(_take_place(settings), True)
    nobody = os.open(os.devnull, os.O_WRONLY)  # Waits for the mount to serve.
    os.set_inheritable(nobody, True)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, keeper_command(settings.mount, nobody, _worker_command(settings)))


def run_detached(settings: AgentSettings) -> dict[str, Any]:
    """Start an agent in the background; returns its status once the mount serves.

    Raises:
        VMThunderError: it could not start, with the worker's or the keeper's own line and exit code.
    """
    lock = _take_place(settings)
    try:
        keeper = spawn_keeper(
            settings.mount,
            _worker_command(settings),
            log=settings.log_file,
            ready_timeout_s=START_S,
            pass_fds=(lock,),
        )
    finally:
        os.close(lock)
    keeper.returncode = 0  # It is nobody's child from now on, and Popen need not wonder.
    return AgentClient(settings.socket).status()


def _worker_command(settings: AgentSettings) -> list[str]:
    return [sys.executable, "-m", "vmthunder.node.worker", settings.to_json()]


def _take_place(settings: AgentSettings) -> int:
    """Make the directories, lock them and clear the mount point; returns the lock's descriptor."""
    if os.geteuid() != 0:
        raise NotPermitted("an agent mounts a file system; run `vmthunder agent` as root")
    if not _FUSE_DEVICE.exists():
        raise MissingTool(f"{_FUSE_DEVICE} is not there; load the kernel's fuse module with `modprobe fuse`")
    _make_directory(settings.run_dir, "--run-dir")
    _make_directory(settings.state_dir, "--state-dir")
    lock = ownership.take(settings.run_dir)
    try:
        # What an agent that died left: its socket looks like a live one, its mount answers ENOTCONN.
        settings.socket.unlink(missing_ok=True)
        mounts.clear_stale(str(settings.mount))
        if mounts.find_mount(str(settings.mount)):
            raise Conflict(f"something is already mounted at {settings.mount}; unmount it, or choose another --mount")
        _make_directory(settings.mount, "--mount")
    except BaseException:
        os.close(lock)
        raise
    return lock


def _make_directory(path: Path, option: str) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise Usage(f"{path} is not writable; choose another {option}")
    except (FileExistsError, NotADirectoryError):
        raise Usage(f"{path} is not a directory; choose another {option}") from None
    except OSError as error:
        raise Failure(f"{path} cannot be made ({error.strerror}); choose another {option}") from None
