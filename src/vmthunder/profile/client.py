"""An agent's way to profiles: read at the origin, learned by the server. Belongs to one event loop; holds one connection.

Where images come from a bucket, a directory or a plain web server, profiles can be read and nothing can be learned.
"""

import asyncio
import logging
from collections.abc import Sequence
from typing import Final

from vmthunder.errors import NotFound
from vmthunder.ids import ImageId, NodeId
from vmthunder.origin.origin import Origin
from vmthunder.profile import store
from vmthunder.profile.live import LiveAnswer, LiveCall
from vmthunder.profile.profile import Boot, Profile
from vmthunder.serverclient import ServerClient

log = logging.getLogger(__name__)

BOOT_S: Final = 20.0
LIVE_S: Final = 5.0


class ProfileClient:
    """What an agent asks and tells about boots."""

    def __init__(self, origin: Origin, server_url: str | None, token: str | None = None) -> None:
        """`server_url` is that of a `vmthunder server`; None where there is none. Raises Usage."""
        self._origin = origin
        self._server = None if server_url is None else ServerClient(server_url, token)
        self._turn = asyncio.Lock()  # one request at a time
        self._said = False

    @property
    def learns(self) -> bool:
        """Whether there is a server that takes boots."""
        return self._server is not None

    async def profile(self, image_id: ImageId) -> Profile | None:
        """What is known of an image; None if nothing is. Indices may be beyond the image: compare them with its manifest.

        Raises:
            CorruptProfile: what the origin has is no profile of this image.
            OriginUnavailable, NotPermitted
        """
        return await store.load(self._origin, image_id)

    async def send_boot(self, boot: Boot) -> None:
        """Let a boot be learned; where there is no server, say so once.

        Raises:
            ServerUnavailable: worth another try.
            NotPermitted, NotFound (the server has no such image), Failure: it will not take it.
        """
        if self._server is None:
            if not self._said:
                log.info("event=boots_not_learned origin=%s reason=no server that takes them", self._origin.url)
            self._said = True
            return
        await self._post(self._server, boot.image_id, "boots", boot.encode(), BOOT_S)

    async def exchange_live(self, image_id: ImageId, node: NodeId, cursor: int, touched: Sequence[int]) -> LiveAnswer:
        """Tell what this node touched since its last call, hear what others did.

        `cursor` is that of the last answer, 0 at first. To be called again after `next_s`, as long as a boot is going on.

        Raises:
            NotFound: no server, or it has no such image: do not ask again.
            ServerUnavailable, NotPermitted, Failure
            BadLiveMessage: the answer makes no sense.
        """
        if self._server is None:
            raise NotFound("there is no server that knows of storms")
        call = LiveCall(node, cursor, touched)
        return LiveAnswer.decode(await self._post(self._server, image_id, "live", call.encode(), LIVE_S))

    def close(self) -> None:
        """Hang up."""
        if self._server is not None:
            self._server.close()

    async def _post(self, server: ServerClient, image_id: ImageId, what: str, body: bytes, timeout_s: float) -> bytes:
        missing = f"{server.url} does not learn profiles of image {image_id.hex()}"
        async with self._turn:
            return await server.request(
                "POST", f"/profiles/{image_id.hex()}/{what}", body, timeout_s=timeout_s, missing=missing
            )
