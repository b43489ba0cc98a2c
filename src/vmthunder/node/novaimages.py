"""Which image a name in Nova's `_base` means, and which images this host keeps.

Nova names an image by the SHA-1 of its Glance id. Who publishes a Glance image gives it the name `nova-SHA1` once it has
passed the checks that Nova would have made; no other image can be reached that way.

An image that Nova has opened or touched is kept: `nova/SHA1` in the state directory holds its image id, and has the
time that Nova gave it. What is kept is found without the origin, is brought here whole in the background, and stays
when Glance forgets it, until Nova's own ageing removes it.

Belongs to the event loop.
"""

import asyncio
import contextlib
import logging
import os
import re
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from pathlib import Path

from vmthunder.errors import InvalidName, NotFound, VMThunderError
from vmthunder.ids import ImageId, image_id
from vmthunder.image.manifest import Manifest
from vmthunder.node.catalogue import Catalogue
from vmthunder.node.materialized import MaterializedImages

log = logging.getLogger(__name__)

ABSENT_S = 3.0
"""How long a name that could not be found is not looked for again: Nova asks several times in a row."""
_BASE_NAME = re.compile(r"[0-9a-f]{40}", re.ASCII)

Complete = Callable[[Manifest], Awaitable[None]]
"""Brings a whole image to this host."""


def is_base_name(name: str) -> bool:
    """Whether `name` is one that Nova gives to an image: 40 hexadecimal digits."""
    return _BASE_NAME.fullmatch(name) is not None


class NovaImages:
    """The images of one `_base`."""

    def __init__(
        self,
        directory: Path,
        catalogue: Catalogue,
        materialized: MaterializedImages,
        complete: Complete,
        *,
        complete_after_s: float,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._catalogue = catalogue
        self._materialized = materialized
        self._complete = complete
        self._complete_after_s = complete_after_s
        self._absent_until_s: dict[str, float] = {}
        self._names: defaultdict[ImageId, set[str]] = defaultdict(set)
        """Names under which an image was looked up, or is kept."""
        self._kept: dict[str, ImageId] = {}
        self._completing: dict[ImageId, asyncio.Task[None]] = {}
        self._turn = asyncio.Lock()
        """One image at a time, as nobody waits for it."""
        for path in directory.iterdir():
            with contextlib.suppress(InvalidName, ValueError):  # torn by a power loss: it is kept again when it is used
                self._kept[path.name] = image_id(path.read_text())
                self._names[self._kept[path.name]].add(path.name)

    def start(self) -> None:
        """Go on with what an earlier worker had not completed."""
        for image in set(self._kept.values()):
            self._complete_later(image)

    async def close(self) -> None:
        tasks = list(self._completing.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def find(self, name: str) -> Manifest | None:
        """The image that a name in `_base` means; None also where nobody can say in time, as Nova then helps itself."""
        if time.monotonic() < self._absent_until_s.get(name, 0.0):
            return None
        kept = self._kept.get(name)
        try:
            manifest = await self._catalogue.find(f"nova-{name}" if kept is None else kept.hex())
        except VMThunderError as error:
            if not isinstance(error, NotFound):
                log.warning("event=nova_lookup_failed name=%s reason=%s", name, error)
            now_s = time.monotonic()
            self._absent_until_s = {key: until for key, until in self._absent_until_s.items() if until > now_s}
            self._absent_until_s[name] = now_s + ABSENT_S
            return None
        self._names[manifest.image_id].add(name)
        return manifest

    def names(self) -> dict[str, ImageId]:
        """What is kept."""
        return dict(self._kept)

    def want(self, image: ImageId, mtime_ns: int | None = None) -> None:
        """Keep an image here, under each name that Nova knows it by, from a time on (None: now)."""
        for name in self._names[image]:
            path = self._directory / name
            if self._kept.get(name) != image:
                path.write_text(image.hex())
                self._kept[name] = image
            os.utime(path, None if mtime_ns is None else (mtime_ns / 1e9, mtime_ns / 1e9))
        self._complete_later(image)

    def mtime_s(self, image: ImageId) -> int:
        """When Nova last touched an image; 0 if it is not kept."""
        for name in self._names.get(image, ()):
            with contextlib.suppress(FileNotFoundError):
                return int((self._directory / name).stat().st_mtime)
        return 0

    def drop(self, name: str, *, is_open: Callable[[ImageId], bool]) -> bool:
        """Nova has removed it: give its space back. Whether it was kept."""
        image = self._kept.pop(name, None)
        if image is None:
            return False
        (self._directory / name).unlink(missing_ok=True)
        if image not in self._kept.values():
            task = self._completing.pop(image, None)
            if task is not None:
                task.cancel()
            if image in self._materialized and not is_open(image):
                self._materialized.remove(image)
        log.info("event=nova_dropped name=%s image=%s", name, image.hex())
        return True

    def _complete_later(self, image: ImageId) -> None:
        if image not in self._completing and image not in self._materialized:
            task = self._completing[image] = asyncio.create_task(self._bring(image), name=f"complete {image.hex()}")
            task.add_done_callback(lambda done: self._completed(image, done))

    def _completed(self, image: ImageId, task: "asyncio.Task[None]") -> None:
        if self._completing.get(image) is task:
            del self._completing[image]

    async def _bring(self, image: ImageId) -> None:
        await asyncio.sleep(self._complete_after_s)
        async with self._turn:
            try:
                await self._complete(await self._catalogue.manifest(image))
            except VMThunderError as error:
                # Nova touches every image in use each 40 minutes: that is when it is tried again.
                log.warning("event=not_completed image=%s reason=%s", image.hex(), error)
