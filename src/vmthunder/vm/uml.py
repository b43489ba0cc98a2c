"""User-mode Linux: a real Linux kernel as an ordinary process, with the image file as its disk. Belongs to one loop.

It needs no emulator, boots in two seconds of CPU time, and keeps its own copy-on-write file. It is pinned to one CPU:
it is single-threaded, and passes each disk request to a process of its own and back.
"""

import fcntl
import os
import shlex
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vmthunder.errors import MissingTool
from vmthunder.vm import machine
from vmthunder.vm.backing import BackingImage
from vmthunder.vm.process import Child, start
from vmthunder.vm.spec import Guest, Spec

PROGRAMS = ("linux.uml", "linux")
OVERLAY = "overlay.cow"
DEFAULT_APPEND = "root=/dev/ubda1 rw quiet"
# Far more than the requests themselves, which its disk process reads from a pipe before the first block.
FIRST_READ_BYTES = 512


def command(name: str, image: Path, spec: Spec) -> list[str]:
    """The command line, run in the machine's directory. The console is file descriptors 0 and 1."""
    return [
        PROGRAMS[0], f"mem={spec.memory_bytes >> 20}M", f"umid={name}", "uml_dir=uml",
        f"ubd0={OVERLAY},{image}", f"ubd1r={machine.SEED}", "con=null", "ssl=null", "con0=fd:0,fd:1",
        *shlex.split(spec.append or DEFAULT_APPEND),
    ]  # fmt: skip


class UmlGuest(Guest):
    """A user-mode Linux and its helper processes."""

    accel = "uml"

    def __init__(self, directory: Path, child: Child) -> None:
        self.directory, self.child = directory, child

    @classmethod
    def start(cls, name: str, directory: Path, image: BackingImage, spec: Spec) -> "UmlGuest":
        """Raises MissingTool."""
        # COW headers hold the path, and commas would end it: a link has a short and plain name.
        link = directory / "image.raw"
        link.symlink_to(image.path)
        os.mkfifo(directory / machine.CONSOLE_FIFO, 0o600)
        # Opened for both, so that the guest never sees the end of its input when a console is left.
        keyboard = os.open(directory / machine.CONSOLE_FIFO, os.O_RDWR)
        argv = command(name, Path(link.name), spec)
        try:
            with _one_at_a_time():
                child = start(argv, directory, stdin_fd=keyboard, output=machine.CONSOLE_LOG)
                _pin(child.identity.pid)
        except MissingTool:
            raise MissingTool("user-mode Linux is not installed; `make setup` installs what is missing") from None
        finally:
            os.close(keyboard)
        return cls(directory, child)

    async def connected(self) -> dict[int, int]:
        return {}

    async def bytes_read(self) -> int:
        """What its disk process has read; counts reads of the overlay and of the seed too."""
        pid = self.child.identity.pid
        try:
            helpers = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            total = sum(_rchar(int(helper)) for helper in helpers)
        except OSError:
            return 0  # it has ended, which `Child.ended` reports
        return total if total > FIRST_READ_BYTES else 0

    async def accepts(self, port: int) -> bool:
        del port
        return False

    async def close(self) -> None:
        """Nothing is held."""


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """On this host: of guests that start in the same moment each must see where the others are pinned."""
    program = shutil.which(PROGRAMS[0])
    if program is None:
        raise MissingTool(f"{PROGRAMS[0]} is not installed")
    with Path(program).open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _pin(pid: int) -> None:
    """To the CPU with the fewest guests of this kind, whoever on this host has started them."""
    guests: Counter[int] = Counter()
    for entry in Path("/proc").glob("[1-9]*"):
        other = int(entry.name)
        try:
            # A guest's first process leads a session; the others are one for each process in the guest.
            if os.getsid(other) == other and (entry / "comm").read_text().rstrip() in PROGRAMS:
                cpus = os.sched_getaffinity(other)
                guests.update(cpus if len(cpus) == 1 else ())
        except OSError:
            continue  # it ended
    try:
        os.sched_setaffinity(pid, {min(sorted(os.sched_getaffinity(0)), key=guests.__getitem__)})
    except OSError:
        pass  # it has ended already, and whoever waits for it learns why; or the CPU is not ours: only slower


def _rchar(pid: int) -> int:
    """Bytes that a process has read by system calls so far (/proc/PID/io, proc(5))."""
    return int(Path(f"/proc/{pid}/io").read_text().split()[1])
