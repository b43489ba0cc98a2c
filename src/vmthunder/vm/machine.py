"""Records of virtual machines: one directory each, made with `mkdir` (which is the lock on the name).

    STATE/vms/NAME/vm.json       this record, replaced atomically
                  overlay.qcow2  (QEMU) or overlay.cow (user-mode Linux): everything the guest ever wrote
                  seed.iso       cloud-init NoCloud
                  console.log    everything the guest said
                  driver.log     what QEMU or user-mode Linux itself said
                  *.sock, *.fifo monitor, console, guest agent

No state in memory; safe for any number of processes.
"""

import errno
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vmthunder.errors import Conflict, CorruptFile, Failure, NoSpace, NotFound, NotPermitted, Usage
from vmthunder.vm.process import ProcessIdentity, end_processes

CONSOLE_LOG = "console.log"
CONSOLE_SOCKET = "console.sock"
CONSOLE_FIFO = "console.fifo"
DRIVER_LOG = "driver.log"
MONITOR_SOCKET = "qmp.sock"
AGENT_SOCKET = "agent.sock"
SEED = "seed.iso"
RECORD = "vm.json"

_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]{0,62}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Machine:
    """What is known of one virtual machine."""

    name: str
    image: str
    image_id: str
    driver: str
    accel: str
    memory_bytes: int
    cpus: int
    created_at: str
    """ISO 8601, UTC."""
    pid: int
    """Of QEMU or user-mode Linux."""
    start_ticks: int
    """See ProcessIdentity."""
    ports: dict[int, int] = field(default_factory=dict)
    """TCP port in the guest → port on 127.0.0.1."""

    @property
    def running(self) -> bool:
        return ProcessIdentity(self.pid, self.start_ticks).is_alive()

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "running": self.running}


class Machines:
    """All machines under one state directory."""

    def __init__(self, state_dir: Path) -> None:
        # Resolved, because processes are found again by this very path.
        self.state_dir = state_dir.resolve()
        self._root = self.state_dir / "vms"

    def directory(self, name: str) -> Path:
        return self._root / checked_name(name)

    def create(self, name: str | None, image: str) -> tuple[str, Path]:
        """Make the directory of a new machine; without a name, the first free of IMAGE-1, IMAGE-2, ….

        Raises:
            Conflict: the name is taken.
            NotPermitted, NoSpace: from the state directory.
        """
        wanted = [name] if name else (f"{image[:50].replace('_', '-')}-{number}" for number in range(1, 1 << 20))
        for candidate in wanted:
            directory = self.directory(candidate)
            with file_errors(directory):
                self._root.mkdir(parents=True, exist_ok=True, mode=0o700)
                try:
                    directory.mkdir(mode=0o700)
                except FileExistsError:
                    continue
            return candidate, directory
        raise Conflict(f"vm {name} exists; choose another --name, or `vmthunder destroy {name}` first")

    def save(self, machine: Machine) -> None:
        directory = self.directory(machine.name)
        with file_errors(directory):
            draft = directory / f"{RECORD}.draft"
            draft.write_text(json.dumps(asdict(machine), indent=1) + "\n")
            draft.replace(directory / RECORD)

    def load(self, name: str) -> Machine:
        """Raises NotFound, CorruptFile."""
        path = self.directory(name) / RECORD
        try:
            fields = json.loads(path.read_text())
            fields["ports"] = {int(guest): int(host) for guest, host in fields["ports"].items()}
            return Machine(**fields)
        except FileNotFoundError:
            if path.parent.is_dir():
                raise CorruptFile(f"vm {name} was never started completely; `vmthunder destroy {name}`") from None
            raise NotFound(f"there is no vm {name}; `vmthunder ps` lists them") from None
        except PermissionError:
            raise NotPermitted(f"{path} is not readable; VMs of this host belong to root") from None
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise CorruptFile(f"{path} is damaged ({error}); `vmthunder destroy {name}` removes this vm") from None

    def names(self) -> list[str]:
        try:
            return sorted(entry.name for entry in os.scandir(self._root) if _NAME.fullmatch(entry.name))
        except FileNotFoundError:
            return []
        except PermissionError:
            raise NotPermitted(f"{self._root} is not readable; VMs of this host belong to root") from None

    def all(self) -> list[Machine]:
        """All machines whose record can be read."""
        found = []
        for name in self.names():
            try:
                found.append(self.load(name))
            except (NotFound, CorruptFile):
                continue  # destroyed just now, or half made: `names` has it, `destroy` removes it
        return found

    def destroy(self, name: str) -> None:
        """End the machine's processes and remove everything of it, whatever state its record is in.

        Raises:
            NotFound: there is no such machine.
            NotPermitted, Failure: its processes cannot be ended; nothing is removed then.
        """
        directory = self.directory(name)
        if not directory.is_dir():
            raise NotFound(f"there is no vm {name}; `vmthunder ps` lists them")
        end_processes(directory)
        with file_errors(directory):
            # Renamed first: killed half-way through, this leaves no machine that looks whole.
            doomed = self._root / f".{name}.destroyed"
            shutil.rmtree(doomed, ignore_errors=True)
            directory.rename(doomed)
            shutil.rmtree(doomed)


def checked_name(name: str) -> str:
    """A name that is also a host name. Raises Usage."""
    if not _NAME.fullmatch(name):
        raise Usage(f"{name[:80]!r} is no name for a vm; use up to 63 ASCII letters, digits, '-', '.'")
    return name


def connect(directory: Path, name: str) -> socket.socket:
    """Connect to one of the machine's unix sockets, however long its path is. Raises OSError."""
    return _at(directory, name, socket.socket.connect)


def listen(directory: Path, name: str) -> socket.socket:
    """A listening unix socket for a child to inherit: nobody ever has to wait until the child has made it."""
    listener = _at(directory, name, socket.socket.bind)
    listener.listen(1)
    return listener


def _at(directory: Path, name: str, operation: Any) -> socket.socket:
    # sun_path holds 107 bytes, a state directory may be longer; /proc/self/fd/N is short for any directory.
    handle = os.open(directory, os.O_PATH | os.O_DIRECTORY)
    try:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            operation(sock, f"/proc/self/fd/{handle}/{name}")
        except BaseException:
            sock.close()
            raise
        return sock
    finally:
        os.close(handle)


def last_lines(path: Path, count: int = 8, limit_bytes: int = 8192) -> list[str]:
    """The end of a log, printable, or a kernel's panic rather than the trace after it; nothing if there is no log."""
    try:
        with path.open("rb") as log:
            log.seek(max(0, path.stat().st_size - limit_bytes))
            text = log.read().decode(errors="replace")
    except OSError:
        return []
    lines = ("".join(c for c in _ANSI.sub("", line) if c.isprintable()).strip() for line in text.splitlines())
    said = [line for line in lines if line]
    panic = next((number for number, line in enumerate(said) if "Kernel panic" in line), len(said) - count)
    return said[max(0, panic) :][:count]


@contextmanager
def file_errors(path: Path) -> Iterator[None]:
    """Errors of the machine's files as ours: NoSpace, NotPermitted, Failure."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace(f"no space left for {path}") from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise NotPermitted(f"{path}: {error.strerror}; run as root, or choose another --state-dir") from None
        raise Failure(f"{path}: {error.strerror}") from None
