"""What a worker is given by the keeper that starts it, and how it tells the keeper what comes next.

It travels in one environment variable; the descriptors are inherited. A worker says `ready` once, and what shall happen
after it by the way it leaves: see `Leave`.
"""

import enum
import json
import os
import sys
from collections.abc import Mapping
from typing import NamedTuple, NoReturn

from vmthunder.errors import Usage
from vmthunder.fuse import mounts
from vmthunder.fuse.mounts import Mount
from vmthunder.fuse.negotiate import Negotiated

VARIABLE = "VMTHUNDER_HANDOFF"
READY = b"R"
"""What a worker tells the keeper, and the keeper who started it. Not the number of a signal (there are fewer)."""


class Leave(enum.IntEnum):
    """Exit status of a worker. Any other, after it was ready, is a death: the next worker asks for a resend."""

    STOP = 0
    """Unmount, and end the keeper too."""
    HANDOVER = 75
    """Start the next worker, from whatever code is installed now."""


class Cause(enum.StrEnum):
    """Why this worker was started."""

    START = "start"
    HANDOVER = "handover"
    DEATH = "death"


class Handoff(NamedTuple):
    """What the keeper gives a worker."""

    fuse_fd: int
    ready_fd: int
    keeper_pid: int
    mount: Mount
    negotiated: Negotiated
    cause: Cause
    restarts: int
    """Workers before this one."""

    def to_text(self) -> str:
        plain = self._asdict() | {"mount": self.mount._asdict(), "negotiated": self.negotiated._asdict()}
        return json.dumps(plain)

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] = os.environ) -> "Handoff":
        """Take over. Raises Usage where there is no keeper."""
        try:
            plain = json.loads(environ[VARIABLE])
        except KeyError:
            raise Usage("this is the agent's worker, which only its keeper starts; use `vmthunder agent`") from None
        handoff = cls(
            **plain
            | {
                "mount": Mount(**plain["mount"]),
                "negotiated": Negotiated(**plain["negotiated"]),
                "cause": Cause(plain["cause"]),
            }
        )
        os.set_inheritable(handoff.fuse_fd, False)
        os.set_inheritable(handoff.ready_fd, False)
        return handoff

    @property
    def keeper_lives(self) -> bool:
        return os.getppid() == self.keeper_pid

    def ready(self) -> None:
        """Say, once, that requests are answered from now on."""
        try:
            os.write(self.ready_fd, READY)
        except BrokenPipeError:
            pass  # the keeper is gone: nobody to tell, and the guests are still ours to serve
        os.close(self.ready_fd)

    def leave(self, how: Leave) -> NoReturn:
        """End this process at once. Call it with nothing left to answer.

        Not sys.exit: the interpreter waits for its threads, and one that pushes into the page cache may itself wait
        for a read that only the next worker will answer.
        """
        if how is Leave.STOP and not self.keeper_lives:
            mounts.unmount(self.mount)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(how)
