"""Glance's images at an origin: each under `glance-ID` for people, and under `nova-SHA1` for compute nodes.

The second name comes last, and only to what has passed the checks of `safety`: no other image is found in a `_base`.
Belongs to the main thread, which waits for everything it starts.
"""

import asyncio
import hashlib
import logging
import os
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple

from vmthunder.errors import CorruptFile, NotFound, Usage, VMThunderError
from vmthunder.ids import ImageName, image_name
from vmthunder.openstack.glance import Glance, GlanceImage
from vmthunder.openstack.safety import check_contents
from vmthunder.origin.origin import Origin
from vmthunder.publishing.download import Watch
from vmthunder.publishing.formats import DiskFormat
from vmthunder.publishing.publish import Published, publish
from vmthunder.publishing.source import Source, open_source

log = logging.getLogger(__name__)

PREFIX: Final = "glance-"


def own_name(image: str) -> ImageName:
    """What a Glance image is called at an origin."""
    return image_name(PREFIX + image)


def nova_name(image: str) -> ImageName:
    """What a compute node looks for when Nova opens it (virt/libvirt/imagecache.py, get_cache_fname)."""
    return image_name(f"nova-{hashlib.sha1(image.encode()).hexdigest()}")


def publish_image(glance: Glance, image: GlanceImage, origin: Origin, watch: Watch | None = None) -> Published:
    """Download, check and publish one image.

    Raises:
        Usage: it is left to Nova.
        CorruptFile: it is not what it claims to be, or not safe.
        VMThunderError: as `Glance.download` and `publish`.
    """
    label = f"glance:{image.id}"
    if image.left_to_nova is not None:
        raise Usage(f"{label} is left to Nova: {image.left_to_nova}")

    def fetch(_: str, fd: int, watch: Watch | None) -> None:
        glance.download(image, fd, watch)
        place = 0

        def read(size_bytes: int) -> bytes:
            nonlocal place
            data = os.pread(fd, size_bytes, place)
            place += len(data)
            return data

        check_contents(read, image.disk_format, label)

    disk = DiskFormat(image.disk_format)
    with open_source(label, disk, watch, fetch) as source:
        if disk is not DiskFormat.RAW:
            # What Nova will see is the disk inside: it must not look like another image again.
            check_contents(_Sequential(source), "raw", f"the disk in {label}")
        return asyncio.run(_publish(source, image.id, origin, watch))


async def _publish(source: Source, image: str, origin: Origin, watch: Watch | None) -> Published:
    published = await publish(source, own_name(image), origin, watch=watch)
    await origin.put_ref(replace(await origin.ref(own_name(image)), name=nova_name(image)))
    return published


class _Sequential:
    """The bytes of a source, one after the other."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._place = 0

    def __call__(self, size_bytes: int) -> bytes:
        buffer = bytearray(min(size_bytes, self._source.virtual_bytes - self._place))
        if buffer:
            self._source.read_into(memoryview(buffer), self._place)
        self._place += len(buffer)
        return bytes(buffer)


class Plan(NamedTuple):
    """What a pass has to do."""

    publish: list[GlanceImage]
    drop: list[str]
    """Ids that Glance has not had for the whole grace time."""


@dataclass
class Follower:
    """What is remembered between passes over the list."""

    grace_s: float
    gone_since_s: dict[str, float] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)
    """Not asked for again: an active image never changes."""

    def plan(self, listed: Iterable[GlanceImage], published: Collection[str], now_s: float) -> Plan:
        """Pure but for what is remembered. `published`: ids at the origin."""
        images = {image.id: image for image in listed}
        gone = set(published) - images.keys()
        self.gone_since_s = {image: self.gone_since_s.get(image, now_s) for image in gone}
        self.refused &= images.keys()
        wanted = [
            image
            for image in images.values()
            if image.left_to_nova is None and image.id not in published and image.id not in self.refused
        ]
        return Plan(wanted, [image for image, since_s in self.gone_since_s.items() if now_s - since_s >= self.grace_s])


def follow(glance: Glance, origin: Origin, follower: Follower) -> Plan:
    """One pass: publish what is new, drop what is gone. What fails is tried again in the next, unless it is refused.

    Raises:
        VMThunderError: the list or the origin cannot be read.
    """
    plan = follower.plan(glance.images(), asyncio.run(_published(origin)), time.monotonic())
    for image in plan.publish:
        try:
            published = publish_image(glance, image, origin)
            log.info(
                "event=glance_published image=%s name=%s stored_bytes=%d s=%.1f",
                image.id, image.name, published.stored_bytes, published.elapsed_s,
            )  # fmt: skip
        except CorruptFile as error:
            follower.refused.add(image.id)
            log.warning("event=glance_refused image=%s reason=%s", image.id, error)
        except VMThunderError as error:
            log.warning("event=glance_failed image=%s reason=%s", image.id, error)
    for gone in plan.drop:
        if _is_gone(glance, gone):
            asyncio.run(_drop(origin, gone))
            log.info("event=glance_dropped image=%s", gone)
    return plan


def _is_gone(glance: Glance, image: str) -> bool:
    """Asked once more, by id: a list that is short for another reason must cost nobody an image."""
    try:
        glance.image(image)
    except NotFound:
        return True
    return False


async def _published(origin: Origin) -> set[str]:
    """Ids whose both names are there: who was killed between the two begins again."""
    names = {ref.name for ref in await origin.refs()}
    ids = {name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX)}
    return {image for image in ids if nova_name(image) in names}


async def _drop(origin: Origin, image: str) -> None:
    for name in (nova_name(image), own_name(image)):
        await origin.remove_ref(name)
