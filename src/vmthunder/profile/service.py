"""Profiles over HTTP: what nodes saw of boots is merged into the profiles at the server's origin.

    GET   /profiles/HEX         the encoded profile of image HEX; 404 while there is none
    POST  /profiles/HEX/boots   an encoded boot of it → nothing
    POST  /profiles/HEX/live    LiveCall → LiveAnswer

What makes no sense gets 400 and one line, an image that is not here 404. Owns the profiles that are merged and not yet
written, and the live profiles. Belongs to one event loop. A profile is read, merged and written under its image's lock.
"""

import asyncio
import contextlib
import logging
import random
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from aiohttp import web

from vmthunder.errors import VMThunderError
from vmthunder.ids import ImageId, image_id
from vmthunder.image.manifest import Manifest
from vmthunder.origin.origin import Origin
from vmthunder.profile import store
from vmthunder.profile.live import MAX_LIVE_BYTES, BadLiveMessage, Live, LiveCall
from vmthunder.profile.merge import merged
from vmthunder.profile.profile import MAX_ENCODED_BYTES, Boot, CorruptProfile, Profile
from vmthunder.serverhandlers import body, told_in_one_line

log = logging.getLogger(__name__)

WRITE_S: Final = 2.0
"""A merged profile is written so long after the first boot that is new in it."""
MERGES: Final = 32
"""Boots that are merged between two writes. The thousandth boot of a storm says nothing that these did not."""
MANIFESTS: Final = 16
"""That are kept, those that were asked for last."""


class _Image:
    """An image that boots are told of."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.manifest: Manifest | None = None
        self.unwritten: Profile | None = None
        self.merges = 0
        """Boots that are in `unwritten` and not at the origin."""
        self.writer: asyncio.Task[None] | None = None


class ProfileService:
    """Profiles of one origin."""

    def __init__(self, origin: Origin) -> None:
        self._origin = origin
        self._live = Live(random.SystemRandom().randrange(1 << 32))
        self._images: OrderedDict[ImageId, _Image] = OrderedDict()  # the one asked for longest ago comes first

    def attach(self, app: web.Application) -> None:
        """Answer below /profiles of an application."""
        app.router.add_get("/profiles/{image:[0-9a-f]{64}}", told_in_one_line(self._get))
        app.router.add_post("/profiles/{image:[0-9a-f]{64}}/boots", told_in_one_line(self._learn))
        app.router.add_post("/profiles/{image:[0-9a-f]{64}}/live", told_in_one_line(self._exchange))
        app.on_shutdown.append(self._shut_down)

    async def _get(self, request: web.Request) -> web.Response:
        image = _image_id(request)
        known = self._images.get(image)
        if known is not None and known.unwritten is not None:
            return _bytes(known.unwritten.encode())
        return _bytes(bytes(await self._origin.profile(image)))

    async def _learn(self, request: web.Request) -> web.Response:
        boot = Boot.decode(await body(request, MAX_ENCODED_BYTES), _image_id(request))
        image = self._image(boot.image_id)
        async with image.lock:
            manifest = await self._manifest(image, boot.image_id)
            indices = [touch.index for touch in boot.touches]
            _check_indices(indices, manifest)
            if image.merges < MERGES:
                profile = image.unwritten or await self._stored(boot.image_id)
                image.unwritten = merged(profile, boot, manifest)
                image.merges += 1
        if image.writer is None:
            image.writer = asyncio.create_task(self._write_later(image))
        return _bytes(b"")

    async def _exchange(self, request: web.Request) -> web.Response:
        call = LiveCall.decode(await body(request, MAX_LIVE_BYTES))
        name = _image_id(request)
        image = self._image(name)
        if image.manifest is None:
            async with image.lock:
                await self._manifest(image, name)
        assert image.manifest is not None
        _check_indices(call.touched, image.manifest)
        return _bytes(self._live.call(name, call, asyncio.get_running_loop().time()).encode())

    def _image(self, name: ImageId) -> _Image:
        image = self._images.setdefault(name, _Image())
        self._images.move_to_end(name)
        if len(self._images) > MANIFESTS:
            for old, idle in list(self._images.items()):
                if idle.writer is None and not idle.lock.locked() and len(self._images) > MANIFESTS:
                    del self._images[old]
        return image

    async def _manifest(self, image: _Image, name: ImageId) -> Manifest:
        """Under the image's lock: many ask in the first moment of a storm. Raises NotFound."""
        if image.manifest is None:
            image.manifest = await self._origin.manifest(name)
        return image.manifest

    async def _stored(self, name: ImageId) -> Profile | None:
        """What is at the origin. One that is damaged is learned anew: nothing in it can be trusted, and boots go on."""
        try:
            return await store.load(self._origin, name)
        except CorruptProfile as error:
            log.warning("event=profile_damaged image=%s reason=%s", name.hex(), error)
            return None

    async def _write_later(self, image: _Image) -> None:
        await asyncio.sleep(WRITE_S)
        await self._write(image)

    async def _write(self, image: _Image) -> None:
        """Once; what cannot be written stays in memory until the next boot has been told of."""
        async with image.lock:
            image.writer = None
            image.merges = 0
            if image.unwritten is None:
                return
            try:
                await store.save(self._origin, image.unwritten)
            except VMThunderError as error:
                log.warning("event=profile_not_written image=%s reason=%s", image.unwritten.image_id.hex(), error)
            else:
                # Not kept: somebody else may write there too (`profile reset`, `profile import`).
                image.unwritten = None

    async def _shut_down(self, _: web.Application) -> None:
        for image in list(self._images.values()):
            if image.writer is not None:
                image.writer.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await image.writer
            await self._write(image)


def _image_id(request: web.Request) -> ImageId:
    return image_id(request.match_info["image"])


def _check_indices(indices: Sequence[int], manifest: Manifest) -> None:
    if indices and max(indices) >= manifest.chunk_count:
        raise BadLiveMessage(f"an image of {manifest.chunk_count} chunks has no chunk {max(indices)}")


def _bytes(data: bytes) -> web.Response:
    return web.Response(body=data, content_type="application/octet-stream", headers={"Cache-Control": "no-store"})
