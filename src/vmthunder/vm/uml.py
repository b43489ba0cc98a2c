"""User-mode Linux: a real Linux kernel as an ordinary process, with the image file as its disk. Belongs to one loop.

It needs no emulator, boots in two seconds of CPU time, and keeps its own copy-on-write file. It is pinned to one CPU:
it is single-threaded, and passes each disk request to a process of its own and back.
"""

import os
import shlex
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
    def start(cls, name: str, directory: Path, image: BackingImage, spec: Spec, cpu: int) -> "UmlGuest":
        """Raises MissingTool."""
        # COW headers hold the path, and commas would end it: a link has a short and plain name.
        link = directory / "image.raw"
        link.symlink_to(image.path)
        os.mkfifo(directory / machine.CONSOLE_FIFO, 0o600)
        # Opened for both, so that the guest never sees the end of its input when a console is left.
        keyboard = os.open(directory / machine.CONSOLE_FIFO, os.O_RDWR)
        try:
            child = start(
                command(name, Path(link.name), spec), directory, stdin_fd=keyboard, output=machine.CONSOLE_LOG
            )
        except MissingTool:
            raise MissingTool("user-mode Linux is not installed; `make setup` installs what is missing") from None
        finally:
            os.close(keyboard)
        try:
            os.sched_setaffinity(child.identity.pid, {cpu})
        except OSError:
            pass  # it has ended already, and whoever waits for it learns why; or the CPU is not ours: only slower
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


def _rchar(pid: int) -> int:
    """Bytes that a process has read by system calls so far (/proc/PID/io, proc(5))."""
    return int(Path(f"/proc/{pid}/io").read_text().split()[1])
