"""A terminal attached to a guest's serial console, one at a time. Ctrl-] leaves. Blocking."""

import fcntl
import os
import select
import sys
import termios
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vmthunder.errors import Conflict, Failure
from vmthunder.vm import machine

LEAVE = b"\x1d"
SHOWN_BYTES = 2048
"""How much of what was said before is shown first."""
POLL_MS = 50


def attach(directory: Path, stdin_fd: int = 0, stdout_fd: int = 1) -> None:
    """Copy between the terminal and the console until Ctrl-], the end of the input, or the end of the guest.

    Raises:
        Conflict: another console is attached.
        Failure: the guest does not run.
    """
    with (directory / "console.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict(f"another console is attached to vm {directory.name}") from None
        with (
            (directory / machine.CONSOLE_LOG).open("rb") as log,
            _keyboard(directory) as (send, is_gone),
            _raw(stdin_fd),
        ):
            # Both drivers write all output to the log, so it is read there: nothing is lost between two consoles.
            log.seek(max(0, os.fstat(log.fileno()).st_size - SHOWN_BYTES))
            poll = select.poll()
            poll.register(stdin_fd, select.POLLIN)
            while True:
                while said := log.read(65536):
                    _write_all(stdout_fd, said)
                if is_gone():
                    return
                if poll.poll(POLL_MS):
                    typed = os.read(stdin_fd, 4096)
                    send(typed.partition(LEAVE)[0])
                    if not typed or LEAVE in typed:
                        return


@contextmanager
def _keyboard(directory: Path) -> Iterator[tuple[Callable[[bytes], None], Callable[[], bool]]]:
    """How to type into the guest, and how to learn that it is gone."""
    fifo = directory / machine.CONSOLE_FIFO
    if fifo.exists():
        try:
            # Without a reader this fails at once instead of waiting for one.
            keyboard = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            raise Failure(f"vm {directory.name} does not run") from None
        hung_up = select.poll()
        hung_up.register(keyboard, 0)  # POLLERR: the last reader went away
        try:
            yield lambda data: _write_all(keyboard, data), lambda: bool(hung_up.poll(0))
        finally:
            os.close(keyboard)
        return
    try:
        sock = machine.connect(directory, machine.CONSOLE_SOCKET)
    except OSError:
        raise Failure(f"vm {directory.name} does not run") from None

    def is_gone() -> bool:
        # QEMU sends here what it also writes to the log: read it away, or QEMU waits for us.
        while select.select([sock], [], [], 0)[0]:
            if not sock.recv(65536):
                return True
        return False

    with sock:
        yield sock.sendall, is_gone


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


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            select.select([], [fd], [])
