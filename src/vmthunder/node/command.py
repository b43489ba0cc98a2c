"""Commands of ours that the agent runs for others, each in a process of its own. Belongs to the event loop.

Neither the agent's death nor its handover ends them: what they print is lost then, what they do is not.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import IO, Any

from vmthunder.node.control import error_of


class Command:
    """`vmthunder ARGUMENTS`, started. Not a process of asyncio's, since those end with their loop."""

    def __init__(self, arguments: Sequence[str], files: Sequence[int] = ()) -> None:
        """It inherits the descriptors `files`."""
        self.output = asyncio.StreamReader()
        self.errors = asyncio.StreamReader()
        # Variables of ours are options of commands, and some are the worker's own.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("VMTHUNDER_")}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "vmthunder", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=files,
            env=environment,
            start_new_session=True,
        )

    async def listen(self) -> None:
        """Begin to read what it prints."""
        await _connect(self.output, self._process.stdout)
        await _connect(self.errors, self._process.stderr)

    def interrupt(self) -> None:
        self._process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        self._process.kill()

    async def result(self, printed: bytes, said: bytes) -> Any:
        """Wait for the end; the JSON on its output. Raises the VMThunderError that it ended with."""
        ended = asyncio.Event()
        pidfd = os.pidfd_open(self._process.pid)
        loop = asyncio.get_running_loop()
        try:
            loop.add_reader(pidfd, ended.set)
            await ended.wait()
        finally:
            loop.remove_reader(pidfd)
            os.close(pidfd)
        status = self._process.wait()
        if status:
            message = said.decode(errors="replace").strip().removeprefix("vmthunder: ")
            raise error_of(status, message or f"a command of this node ended with status {status}")
        return json.loads(printed)


async def _connect(stream: asyncio.StreamReader, pipe: IO[bytes] | None) -> None:
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stream), pipe)
