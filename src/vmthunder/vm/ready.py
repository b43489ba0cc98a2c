"""When a guest counts as ready. Each check waits for ever: the boot that runs it has the deadline."""

import asyncio
import re
from typing import Protocol

from vmthunder.errors import Usage
from vmthunder.vm import machine
from vmthunder.vm.spec import Guest

DEFAULT_PATTERN = r"login: |VMTHUNDER-READY|Cloud-init .* finished at"
POLL_S = 0.02
KEEP_BYTES = 4096
"""How much of the console before the newest output a match may reach back."""
PING_TIMEOUT_S = 1.0


class ReadyCheck(Protocol):
    """`str()` of it says what is waited for."""

    async def wait(self, guest: Guest) -> None:
        """Return when the guest is ready."""


class ConsolePattern:
    """A regular expression is found in what the guest wrote to its serial console."""

    def __init__(self, pattern: str = DEFAULT_PATTERN) -> None:
        """Raises Usage."""
        try:
            self._pattern = re.compile(pattern.encode(), re.MULTILINE)
        except re.error as error:
            raise Usage(f"ready pattern {pattern!r}: {error}") from None
        self._text = pattern

    def __str__(self) -> str:
        return f"{self._text!r} on its console"

    async def wait(self, guest: Guest) -> None:
        tail = b""
        path = guest.directory / machine.CONSOLE_LOG
        path.touch()  # the driver appends to it
        with path.open("rb") as log:
            while True:
                said = log.read()
                if said and self._pattern.search(tail + said):
                    return
                tail = (tail + said)[-KEEP_BYTES:]
                await asyncio.sleep(POLL_S)


class GuestAgent:
    """The QEMU guest agent answers a ping (qemu-ga, QAPI `guest-ping`)."""

    def __str__(self) -> str:
        return "an answer of its guest agent"

    async def wait(self, guest: Guest) -> None:
        reader, writer = await asyncio.open_connection(sock=machine.connect(guest.directory, machine.AGENT_SOCKET))
        try:
            while True:
                # What is written before the agent listens is lost or answered late; every answer is as good.
                writer.write(b'{"execute": "guest-ping"}\n')
                try:
                    async with asyncio.timeout(PING_TIMEOUT_S):
                        if b'"return"' in await reader.readline():
                            return
                except TimeoutError:
                    pass
                if reader.at_eof():
                    await asyncio.sleep(PING_TIMEOUT_S)  # QEMU ended: whoever watches its process says so
        finally:
            writer.close()


class TcpPort:
    """Something in the guest accepts connections on a TCP port."""

    def __init__(self, port: int) -> None:
        self.port = port

    def __str__(self) -> str:
        return f"a listener on its TCP port {self.port}"

    async def wait(self, guest: Guest) -> None:
        # Every try takes its time itself.
        while not await guest.accepts(self.port):
            pass
