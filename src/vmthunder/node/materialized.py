"""Whole images as local sparse files: made from chunks, opened in passthrough, removed to give the space back.

A copy is `HEX.raw` in its directory once it is whole and on disk, and `HEX.part` before; the parts that a dead worker
left are removed at start, for the chunk cache makes starting again cheap. Slices without a chunk are holes.

Belongs to the event loop; files are written in threads.
"""

import asyncio
import contextlib
import errno
import itertools
import logging
import os
import shutil
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vmthunder.errors import Failure, InvalidName, NoSpace
from vmthunder.ids import Buffer, ImageId, image_id
from vmthunder.image.manifest import ChunkRow, Manifest

log = logging.getLogger(__name__)

BATCH_ROWS = 16
BATCHES = 4
"""Batches in flight: the origin answers one while the disk takes another."""
PROGRESS_S = 0.2

ReadRows = Callable[[Manifest, Sequence[ChunkRow]], Awaitable[Sequence[Buffer]]]
"""The decoded slices of some rows of an image."""
Progress = Callable[[int, int], Awaitable[None]]
"""Told the bytes that are done and the bytes of all."""


class _Copying:
    """One image on its way to the disk, however many wait for it."""

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        self.done_bytes = 0
        self.watchers = 0
        self.task: asyncio.Task[None]


class MaterializedImages:
    """The local copies of one agent."""

    def __init__(self, directory: Path, read: ReadRows) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._read = read
        self._whole: set[ImageId] = set()
        self._copying: dict[ImageId, _Copying] = {}
        self.made: Callable[[ImageId], None] = lambda _image: None
        """Told of each copy when it is whole."""
        for entry in directory.iterdir():
            if entry.suffix == ".part":
                entry.unlink()
            elif entry.suffix == ".raw":
                with contextlib.suppress(InvalidName):
                    self._whole.add(image_id(entry.stem))

    def __contains__(self, image: ImageId) -> bool:
        return image in self._whole

    def __iter__(self) -> Iterator[ImageId]:
        return iter(sorted(self._whole))

    def open(self, image: ImageId) -> int:
        """A descriptor of the local copy, for reading.

        Raises:
            FileNotFoundError: somebody else removed it; the image is on demand again.
        """
        try:
            return os.open(self._path(image), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            self._whole.discard(image)
            raise

    def virtual_bytes(self, image: ImageId) -> int:
        """Size of a local copy; 0 where somebody removed it."""
        try:
            return self._path(image).stat().st_size
        except FileNotFoundError:
            return 0

    async def make(self, manifest: Manifest, progress: Progress) -> None:
        """Return when the whole image is on disk. Who asks for an image on its way joins; when all have left, it ends.

        Raises:
            NoSpace: nothing is left behind.
        """
        image = manifest.image_id
        if image in self._whole:
            return
        copying = self._copying.get(image)
        if copying is None:
            copying = self._copying[image] = _Copying(
                min(manifest.row_count * manifest.chunk_bytes, manifest.virtual_bytes)
            )
            copying.task = asyncio.create_task(self._copy(manifest, copying), name=f"materialize {image.hex()}")
            # Should it fail when all who wait have just left, that is no crash of ours.
            copying.task.add_done_callback(lambda task: task.cancelled() or task.exception())
        copying.watchers += 1
        try:
            while not copying.task.done():
                await progress(copying.done_bytes, copying.total_bytes)
                await asyncio.wait({copying.task}, timeout=PROGRESS_S)
            copying.task.result()
            await progress(copying.total_bytes, copying.total_bytes)
        finally:
            copying.watchers -= 1
            if not copying.watchers:
                copying.task.cancel()

    def remove(self, image: ImageId) -> int:
        """Remove a copy that nobody has open; returns the bytes that this frees."""
        path = self._path(image)
        freed_bytes = path.stat().st_blocks * 512
        path.unlink()
        self._whole.discard(image)
        log.info("event=dematerialized image=%s freed_bytes=%d", image.hex(), freed_bytes)
        return freed_bytes

    def _path(self, image: ImageId) -> Path:
        return self._directory / f"{image.hex()}.raw"

    async def _copy(self, manifest: Manifest, copying: _Copying) -> None:
        image = manifest.image_id
        part = self._directory / f"{image.hex()}.part"
        rows = manifest.rows()

        async def copy_batches() -> None:
            # All copiers draw from one iterator; none is between two of its awaits while another draws.
            while batch := tuple(itertools.islice(rows, BATCH_ROWS)):
                slices = await self._read(manifest, batch)
                places = [row.index * manifest.chunk_bytes for row in batch]
                await asyncio.to_thread(_write, part, places, slices)
                copying.done_bytes += sum(map(len, slices))

        try:
            if shutil.disk_usage(self._directory).free < copying.total_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            with open(part, "wb", opener=_for_us_alone) as file:
                file.truncate(manifest.virtual_bytes)
            await _all(copy_batches() for _ in range(BATCHES))
            await asyncio.to_thread(_finish, part, self._path(image))
        except OSError as error:
            log.warning("event=materialize_failed image=%s reason=%s", image.hex(), error.strerror)
            if error.errno in {errno.ENOSPC, errno.EDQUOT}:
                raise NoSpace(
                    f"no space for {image.hex()} in {self._directory}: it needs {copying.total_bytes} bytes; "
                    "free some, or give the agent another --state-dir"
                ) from None
            raise Failure(f"{image.hex()} could not be written to {self._directory}: {error.strerror}") from None
        finally:
            del self._copying[image]
            part.unlink(missing_ok=True)
        self._whole.add(image)
        self.made(image)
        log.info("event=materialized image=%s bytes=%d", image.hex(), copying.done_bytes)


async def _all(jobs: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run jobs side by side; the first failure ends all of them and is raised as it is, not in a group."""
    tasks = [asyncio.ensure_future(job) for job in jobs]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


def _for_us_alone(path: str, flags: int) -> int:
    """Guests read a copy through the mount."""
    return os.open(path, flags, 0o600)


def _write(path: Path, places: Sequence[int], slices: Sequence[Buffer]) -> None:
    # Opened here and not by the job: a job that is cancelled must not close the file under a thread that writes.
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        for offset, data in _runs(places, slices):
            written = 0
            while written < len(data):
                written += os.pwrite(descriptor, memoryview(data)[written:], offset + written)
    finally:
        os.close(descriptor)


def _runs(places: Sequence[int], slices: Sequence[Buffer]) -> Iterator[tuple[int, bytes]]:
    """Slices that lie side by side, joined: the kernel caches a long write in large folios, which are read faster."""
    start = 0
    for end in range(1, len(places) + 1):
        if end == len(places) or places[end] != places[end - 1] + len(slices[end - 1]):
            yield places[start], b"".join(slices[start:end])
            start = end


def _finish(part: Path, path: Path) -> None:
    """Make the copy durable, then visible: after a power loss `HEX.raw` is whole or not there."""
    for target in (part, part.parent):
        descriptor = os.open(target, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if target is part:
            part.rename(path)
