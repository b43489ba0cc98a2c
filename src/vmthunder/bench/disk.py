"""An empty file system for the data of a benchmark, so that the history of the machine's own does not show in figures.

ext4 steps over every inode that was deleted within the last five minutes (`recently_deleted`, fs/ext4/ialloc.c): after a
test run, or one round of a benchmark, each new file costs 0.1–0.6 ms instead of 0.03, and a cold node makes a file per
chunk. The caller is in a mount namespace of its own (`namespaces.isolate`).
"""

import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vmthunder.fuse import libc

# The kernel fills the tables of inodes while they are used, and not in the background while we measure.
_FORMAT = ("mkfs.ext4", "-q", "-E", "nodiscard,lazy_itable_init=1,lazy_journal_init=1")
_MOUNT = ("mount", "-t", "ext4", "-o", "noinit_itable")


@contextmanager
def empty_disk(directory: Path | None, size_bytes: int, say: Callable[[str], None]) -> Iterator[Path]:
    """A directory for data, on a file system of its own in a sparse file in `directory`; removed at the end.

    Where there are no loop devices it lies on the machine's file system, and `say` is told.
    """
    with tempfile.TemporaryDirectory(prefix="vmthunder-bench-", dir=directory) as work:
        image = Path(work, "disk.img")
        mounted = Path(work, "disk")
        mounted.mkdir()
        try:
            with image.open("wb") as file:
                file.truncate(size_bytes)
            _run(*_FORMAT, str(image))
            device = _run("losetup", "--find", "--show", "--direct-io=on", str(image)).strip()
            try:
                _run(*_MOUNT, device, str(mounted))
            finally:
                # The kernel lets go of it with the mount, which nothing of ours outlives.
                _run("losetup", "--detach", device)
        except (OSError, subprocess.CalledProcessError) as error:
            say(f"no file system of its own ({error}): files deleted here lately make cold rows slower")
            yield mounted
            return
        finally:
            image.unlink(missing_ok=True)
        try:
            yield mounted
        finally:
            libc.umount2(str(mounted), libc.MNT_DETACH)


def _run(*command: str) -> str:
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True).stdout
