"""What can go wrong, as an operator sees it: one line and an exit code. Imports nothing.

`str(error)` is the one line: what happened, to which thing, what to do. The command line prints it and exits with
`exit_code`; it prints tracebacks only for what is not in this file, which is a bug of ours.
"""


class VMThunderError(Exception):
    """Base of all errors that an operator can do something about."""

    exit_code = 1


class Failure(VMThunderError):
    """Something outside of us failed, and none of the closer classes fits."""


class Usage(VMThunderError):
    """An argument or a setting makes no sense."""

    exit_code = 2


class InvalidName(Usage):
    """A text that came from outside is not a name of ours."""


class NotFound(VMThunderError):
    """A thing that was named is not there."""

    exit_code = 3


class Corrupt(VMThunderError):
    """Bytes are not what their name or their format says."""

    exit_code = 4


class CorruptChunk(Corrupt):
    """Encoded bytes are not the chunk they are named for, or do not decode to one slice."""


class CorruptManifest(Corrupt):
    """Bytes are not the manifest they are named for, or a row of it makes no sense."""


class CorruptPack(Corrupt):
    """A pack's footer does not check out, or the pack is shorter than it must be."""


class CorruptFile(Corrupt):
    """Any other file that we read is damaged: a ref, a saved state, a disk image."""


class OriginUnavailable(VMThunderError):
    """The origin did not answer, or answered that it cannot now. Worth another try."""

    exit_code = 5


class NoSpace(VMThunderError):
    """A file system or an object store is full."""

    exit_code = 6


class NotPermitted(VMThunderError):
    """The operating system or the origin refuses: not root, wrong credentials, read-only."""

    exit_code = 7


class Conflict(VMThunderError):
    """Somebody else has it: a lock, a port, a directory, a name."""

    exit_code = 8


class MissingTool(VMThunderError):
    """A program or a feature of the kernel is not there."""

    exit_code = 9


class AgentUnavailable(VMThunderError):
    """No agent answers on the control socket."""

    exit_code = 10
