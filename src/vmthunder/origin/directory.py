"""Writes into a directory origin: whole or not at all, and on the disk before it is said to be.

obstore's own directory store renames too, but never calls fsync: after a power loss a ref could be there and its packs not.
"""

import asyncio
import os
import shutil
import tempfile
from pathlib import Path
from typing import Final

SCRATCH: Final = "tmp"
"""Below the origin's directory; what is left there belongs to a writer that died."""


async def put_durably(root: Path, key: str, data: bytes, *, only_new: bool) -> None:
    """Write an object. Raises OSError; FileExistsError if it is there with `only_new`."""
    await asyncio.to_thread(_put, root, key, data, only_new)


def remove_scratch(root: Path) -> None:
    """Remove what dead writers left. Call when there is no living one."""
    shutil.rmtree(root / SCRATCH, ignore_errors=True)


def _put(root: Path, key: str, data: bytes, only_new: bool) -> None:
    path = root / key
    new_directories = [
        parent for parent in path.parents if parent != root and root in parent.parents and not parent.exists()
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = root / SCRATCH
    scratch.mkdir(exist_ok=True)
    fd, name = tempfile.mkstemp(dir=scratch)
    temporary = Path(name)
    try:
        with os.fdopen(fd, "wb") as file:
            os.fchmod(fd, 0o644)
            file.write(data)
            file.flush()
            os.fsync(fd)
        if only_new:
            path.hardlink_to(temporary)
            temporary.unlink()
        else:
            temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    for directory in (path.parent, *(parent.parent for parent in new_directories)):
        _sync(directory)


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
