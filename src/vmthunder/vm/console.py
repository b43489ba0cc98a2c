"""A terminal attached to a guest's serial console, one at a time. Ctrl-] leaves. Blocking.

Both drivers write all that a guest says to its console log, so it is shown from there: what was said while nobody looked is
not lost. Only what is typed goes through the console's socket (QEMU) or FIFO (user-mode Linux).
"""

import fcntl
import os
import select
import sys
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vmthunder.errors import Conflict, Failure
from vmthunder.vm import machine
from vmthunder.vm.machine import Machine
from vmthunder.vm.spec import Driver

LEAVE = b"\x1d"
SHOWN_BYTES = 2048
"""How much of what was said before is shown first."""
POLL_MS = 50


def attach(vm: Machine, directory: Path, stdin_fd: int = 0, stdout_fd: int = 1) -> None:
    """Copy between the terminal and the console until Ctrl-], the end of the input, or the end of the guest.

    Raises:
        Conflict: another console is attached.
        Failure: the guest does not run.
    """
    with (directory / "console.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict(f"another console is attached to vm {vm.name}") from None
        with (directory / machine.CONSOLE_LOG).open("rb") as log, _keyboard(vm, directory) as keyboard, _raw(stdin_fd):
            log.seek(max(0, os.fstat(log.fileno()).st_size - SHOWN_BYTES))
            poll = select.poll()
            poll.register(stdin_fd, select.POLLIN)
            if vm.driver == Driver.QEMU:
                poll.register(keyboard, select.POLLIN)
            while True:
                running = vm.running  # before the log is read, so that the last words are seen
                while said := log.read(65536):
                    _write(stdout_fd, said)
                if not running:
                    return
                for fd, _ in poll.poll(POLL_MS):
                    data = os.read(fd, 65536)
                    if fd == keyboard:
                        continue  # what the log has too; left unread, QEMU would wait for us
                    try:
                        _write(keyboard, data.partition(LEAVE)[0])
                    except ConnectionError:
                        continue  # it ended just now, which the next turn sees
                    if not data or LEAVE in data:
                        return


@contextmanager
def _keyboard(vm: Machine, directory: Path) -> Iterator[int]:
    """A descriptor that takes what is typed."""
    try:
        if not vm.running:
            raise ConnectionError
        if vm.driver == Driver.QEMU:
            fd = machine.connect(directory, machine.CONSOLE_SOCKET).detach()
        else:
            # Without O_NONBLOCK this would wait for a reader.
            fd = os.open(directory / machine.CONSOLE_FIFO, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        raise Failure(f"vm {vm.name} does not run; `vmthunder destroy {vm.name}` removes it") from None
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _raw(fd: int) -> Iterator[None]:
    """Every key goes to the guest, Ctrl-C too."""
    if not os.isatty(fd):
        yield
        return
    before = termios.tcgetattr(fd)
    sys.stderr.write("Ctrl-] leaves this console\n")
    tty.setraw(fd)
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            select.select([], [fd], [])
