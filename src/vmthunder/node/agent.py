"""Starts an agent: checks what an operator may have got wrong, then becomes the keeper or leaves one in the background.

Runs in the command's process; knows nothing of what a worker does. A worker that cannot start ends with the exit code
of its error after a last line that says why; the keeper ends with the same code, and so does this command.
"""

import dataclasses
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
    lock, settings = _take_place(settings)
    os.set_inheritable(lock, True)
    if settings.base_fd is not None:
        os.set_inheritable(settings.base_fd, True)
    nobody = os.open(os.devnull, os.O_WRONLY)  # Waits for the mount to serve.
    os.set_inheritable(nobody, True)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, keeper_command(settings.mount, nobody, _worker_command(settings), writable=settings.nova))


def run_detached(settings: AgentSettings) -> dict[str, Any]:
    """Start an agent in the background; returns its status once the mount serves.

    Raises:
        VMThunderError: it could not start, with the worker's or the keeper's own line and exit code.
    """
    lock, settings = _take_place(settings)
    inherited = tuple(fd for fd in (lock, settings.base_fd) if fd is not None)
    try:
        keeper = spawn_keeper(
            settings.mount,
            _worker_command(settings),
            log=settings.log_file,
            ready_timeout_s=START_S,
            pass_fds=inherited,
            writable=settings.nova,
        )
    finally:
        for fd in inherited:
            os.close(fd)
    keeper.returncode = 0  # It is nobody's child from now on, and Popen need not wonder.
    return AgentClient(settings.socket).status()


def _worker_command(settings: AgentSettings) -> list[str]:
    return [sys.executable, "-m", "vmthunder.node.worker", settings.to_json()]


def _take_place(settings: AgentSettings) -> tuple[int, AgentSettings]:
    """Make the directories, lock them and clear the mount point; returns the lock's descriptor and what to start with."""
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
        if settings.nova:
            settings = dataclasses.replace(settings, base_fd=_open_base(settings.mount))
        else:
            _make_directory(settings.mount, "--mount")
    except BaseException:
        os.close(lock)
        raise
    return lock, settings


def _open_base(base: Path) -> int:
    """Nova's directory, which is made as Nova would make it if it is not there. Call it before the mount hides it."""
    try:
        if not base.exists():
            base.mkdir(mode=0o755)
            owner = base.parent.stat()
            os.chown(base, owner.st_uid, owner.st_gid)
        return os.open(base, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise Failure(f"{base} cannot be used: {error.strerror}; name Nova's instances_path") from None


def _make_directory(path: Path, option: str) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise Usage(f"{path} is not writable; choose another {option}")
    except (FileExistsError, NotADirectoryError):
        raise Usage(f"{path} is not a directory; choose another {option}") from None
    except OSError as error:
        raise Failure(f"{path} cannot be made ({error.strerror}); choose another {option}") from None
