"""A disk image that is being published: where its data is, and the data itself, whatever the format.

Owns the open files of a source, and the storage daemon or the downloaded copy behind them. Never writes to a source.
`read_into` may be called from many threads at once; everything else belongs to one thread at a time.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from vmthunder.errors import Conflict, Failure, NotFound, NotPermitted, Usage, VMThunderError
from vmthunder.publishing.download import Fetch, Watch, downloaded
from vmthunder.publishing.formats import DiskFormat, fixed_vhd_bytes, parts, refuse_references, refuse_written, sniff
from vmthunder.publishing.qemu_export import Export, exported


class Source:
    """An open disk image that reads as the raw disk."""

    def __init__(
        self, label: str, fd: int, virtual_bytes: int, witnesses: "list[Witness]", export: Export | None = None
    ) -> None:
        """Use `open_source`."""
        self.label: Final = label
        self.virtual_bytes: Final = virtual_bytes
        self._fd = fd
        self._witnesses = witnesses
        self._export = export
        if virtual_bytes == 0:
            raise Usage(f"{label} is empty; there is nothing to publish")

    def extents(self, granule_bytes: int) -> Iterator[tuple[int, int]]:
        """Begin and end of each range that may hold data, in order, rounded to multiples of `granule_bytes`.

        What lies between them is a hole and need not be read. Block devices do not tell holes: they are one extent.
        """
        end = 0
        while end < self.virtual_bytes:
            try:
                data = os.lseek(self._fd, end, os.SEEK_DATA)
                hole = os.lseek(self._fd, data, os.SEEK_HOLE)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return  # nothing but a hole is left
                if error.errno != errno.EINVAL:
                    raise self._unreadable(error, end) from None
                data, hole = end, self.virtual_bytes  # a block device
            if data >= self.virtual_bytes:
                return  # the footer of a fixed-size VHD
            begin = data - data % granule_bytes
            end = min(hole + -hole % granule_bytes, self.virtual_bytes)
            yield begin, end

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` with the bytes from `offset` on.

        Raises:
            Failure: the source cannot be read, or ends before.
        """
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._fd, [buffer[done:]], offset + done)
            except OSError as error:
                raise self._unreadable(error, offset + done) from None
            if count == 0:
                raise Failure(
                    f"{self.label} became shorter while it was read; publish it again when nothing writes to it"
                )
            done += count

    def abort(self) -> None:
        """End reads that hang, where a daemon of ours is what they wait for; reads fail then. From any thread."""
        if self._export is not None:
            self._export.abort()

    def check_unchanged(self) -> None:
        """Raises Conflict if a file of the source was written, replaced or removed since it was opened."""
        for witness in self._witnesses:
            witness.check(self.label)

    def _unreadable(self, error: OSError, offset: int) -> VMThunderError:
        reason = self._export.failure() if self._export is not None else None
        return reason or Failure(f"{self.label} cannot be read at byte {offset}: {error.strerror}")


class Witness:
    """What a file looked like when it was opened."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = self._look()

    def _look(self) -> tuple[int, ...] | None:
        try:
            now = self._path.stat()
        except OSError:
            return None
        if stat.S_ISBLK(now.st_mode):
            return now.st_dev, now.st_ino, now.st_rdev
        return now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns

    def check(self, label: str) -> None:
        """Raises Conflict if it looks different now."""
        now = self._look()
        if now != self._seen:
            what = "vanished" if now is None else "changed"
            which = "it" if str(self._path) == label else str(self._path)
            raise Conflict(
                f"{label} is not published: {which} {what} while it was read; publish it when nothing writes to it"
            )


@contextlib.contextmanager
def open_source(
    text: str, asked: DiskFormat = DiskFormat.AUTO, watch: Watch | None = None, fetch: Fetch | None = None
) -> Iterator[Source]:
    """Open a path or an http(s) URL of a disk image, until the end of the `with`. Call it from the main thread.

    Args:
        text: what the operator wrote.
        asked: the format, or AUTO to look.
        watch: called with bytes done and bytes in all (None: unknown) while a URL is downloaded.
        fetch: brings what `text` names, if that is neither a path nor a URL.

    Raises:
        NotFound, NotPermitted, Usage, Conflict, CorruptFile, MissingTool, NoSpace, Failure
    """
    remote = fetch is not None or text.startswith(("http://", "https://"))
    if "://" in text and not remote:
        raise Usage(f"{text}: a source is a file, a block device or an http(s) URL")
    with contextlib.ExitStack() as cleanup:
        if remote:
            label = text
            fd = cleanup.enter_context(downloaded(text, watch, fetch))
            path = f"/proc/self/fd/{fd}"
        else:
            label = path = str(Path.cwd() / text)
            fd = _open(path)
            cleanup.callback(os.close, fd)
            refuse_written(fd, label)
        size_bytes = os.lseek(fd, 0, os.SEEK_END)
        disk = sniff(fd, size_bytes, label) if asked is DiskFormat.AUTO else asked
        plain_bytes = fixed_vhd_bytes(fd, size_bytes) if disk is DiskFormat.VHD else None
        if disk is DiskFormat.RAW or plain_bytes is not None:
            yield Source(label, fd, plain_bytes or size_bytes, [] if remote else [Witness(Path(path))])
            return
        if remote:
            refuse_references(fd, label)
        needs = (fd,) if remote else ()
        files = parts(path, disk, label, pass_fds=needs, alone=remote)
        witnesses = [] if remote else [Witness(file) for file in files]
        export = cleanup.enter_context(exported(path, disk, label, pass_fds=needs, alone=remote))
        yield Source(label, export.fd, os.lseek(export.fd, 0, os.SEEK_END), witnesses, export)


def _open(path: str) -> int:
    try:
        mode = Path(path).stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise Usage(f"{path} is neither a file nor a block device")
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise NotFound(f"{path} does not exist") from None
    except PermissionError:
        raise NotPermitted(f"{path} cannot be read: permission denied") from None
    except OSError as error:
        raise Failure(f"{path} cannot be opened: {error.strerror}") from None
