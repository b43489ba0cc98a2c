"""A worker with a file system in memory, for the tests of the keeper and the session. Runs as a process of its own.

Its one argument is a directory: `files/` is what it shows, `trace` is where it writes what it does. The suffixes
of a file's name say how it is served:

* `.direct`: past the page cache.
* `.waits`: reads are answered as soon as `open-gate` is there.
* `.native`: opened through its backing file.
* `.pushed`: as `.waits`, and a thread pushes the page into the page cache while its read is not answered.

SIGTERM is stop, SIGUSR1 handover, SIGUSR2 pushes the first 64 KiB of every file into the page cache.
"""

import asyncio
import errno
import os
import signal
import stat
import sys
import threading
from collections.abc import Awaitable, Sequence
from pathlib import Path

from vmthunder.fuse.handoff import Cause, Handoff, Leave
from vmthunder.fuse.memory import prepare_worker_memory
from vmthunder.fuse.protocol import ROOT_NODE, Attr, DirEntry, Entry, Opened, Statfs
from vmthunder.fuse.session import Session

FOREVER_S = 3600.0


class MemoryFiles:
    """Every regular file of a directory, by its position in the sorted list of names."""

    def __init__(self, directory: Path) -> None:
        self.gate = directory / "open-gate"
        self.trace = (directory / "trace").open("ab", buffering=0)
        self.paths = sorted((directory / "files").iterdir())
        self.names = {os.fsencode(path.name): node for node, path in enumerate(self.paths, 2)}
        self.contents = {node: path.read_bytes() for node, path in enumerate(self.paths, 2)}
        self.session: Session

    def attr(self, node: int) -> Attr:
        if node == ROOT_NODE:
            return Attr(node, 0, stat.S_IFDIR | 0o555, nlink=2)
        return Attr(node, len(self.contents[node]), stat.S_IFREG | 0o444)

    async def lookup(self, parent: int, name: bytes) -> Entry:
        node = self.names.get(name) if parent == ROOT_NODE else None
        if node is None:
            if name == b"bug":
                raise ZeroDivisionError("a bug in the file system")
            raise OSError(errno.ENOENT, "no such file")
        return Entry(node, self.attr(node), FOREVER_S, FOREVER_S)

    def forget(self, node: int, nlookup: int) -> None:
        self.trace.write(b"forget %d %d\n" % (node, nlookup))

    def getattr(self, node: int) -> tuple[Attr, float]:
        return self.attr(node), FOREVER_S

    async def open(self, node: int, flags: int) -> Opened:
        path = self.paths[node - 2]
        if ".native" in path.suffixes:
            with path.open("rb") as backing:
                return Opened(0, self.session.open_backing(backing.fileno()))
        return Opened(0, direct_io=".direct" in path.suffixes)

    def read(self, node: int, fh: int, offset: int, size_bytes: int) -> "Sequence[bytes] | Awaitable[Sequence[bytes]]":
        self.trace.write(b"size %d\n" % size_bytes)
        answer = [self.contents[node][offset : offset + size_bytes]]
        suffixes = self.paths[node - 2].suffixes
        if ".waits" in suffixes:
            return self.read_later(answer)
        if ".pushed" in suffixes:
            return self.read_after_push(node, offset, answer)
        return answer

    async def read_later(self, answer: list[bytes]) -> list[bytes]:
        self.trace.write(b"read waits\n")
        try:
            while not self.gate.exists():
                await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            self.trace.write(b"read cancelled\n")
            raise
        self.trace.write(b"read answered\n")
        return answer

    async def read_after_push(self, node: int, offset: int, answer: list[bytes]) -> list[bytes]:
        """The page is locked while its READ is unanswered: the thread hangs in the kernel until then."""
        threading.Thread(target=self.session.notify_store, args=(node, offset, answer), daemon=True).start()
        return await self.read_later(answer)

    def release(self, node: int, fh: int) -> None:
        self.trace.write(b"release %d\n" % node)

    def readdir(self, node: int) -> list[DirEntry]:
        return [DirEntry(node, name, stat.S_IFREG) for name, node in self.names.items()]

    def statfs(self) -> Statfs:
        return Statfs(blocks=1000, blocks_free=10)


async def serve(directory: Path, handoff: Handoff) -> Leave:
    files = MemoryFiles(directory)
    loop = asyncio.get_running_loop()
    session = files.session = Session(handoff.fuse_fd, handoff.negotiated, files, loop)
    leave: asyncio.Future[Leave] = loop.create_future()
    loop.add_signal_handler(signal.SIGTERM, leave.set_result, Leave.STOP)
    loop.add_signal_handler(signal.SIGUSR1, leave.set_result, Leave.HANDOVER)

    def push_all() -> None:
        for node, content in files.contents.items():
            session.notify_store(node, 0, [content[:4096], content[4096:65536]])
        files.trace.write(b"pushed\n")

    loop.add_signal_handler(signal.SIGUSR2, lambda: threading.Thread(target=push_all, daemon=True).start())
    files.trace.write(b"worker %d %s\n" % (os.getpid(), handoff.cause.encode()))  # signals are obeyed from here on
    session.start(resend=handoff.cause is Cause.DEATH)
    handoff.ready()
    gone = asyncio.create_task(session.closed.wait())
    await asyncio.wait([leave, gone], return_when=asyncio.FIRST_COMPLETED)
    how = leave.result() if leave.done() else Leave.STOP
    await session.drain(1.0)
    return how


def main() -> None:
    handoff = Handoff.from_environ()
    prepare_worker_memory()
    directory = Path(sys.argv[1])
    if (directory / "broken").exists():
        print("cannot work: the configuration is broken", file=sys.stderr)
        sys.exit(78)
    if (directory / "dies-young").exists() and handoff.cause is not Cause.START:
        (directory / "dies-young").unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    handoff.leave(asyncio.run(serve(directory, handoff)))


if __name__ == "__main__":
    main()
