"""Who may talk to the image server: those who have the cluster key. An aiohttp middleware. Belongs to one event loop."""

import hmac
import logging
import time
from typing import Final

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

log = logging.getLogger(__name__)

OPEN_PATH: Final = "/healthz"
REFUSED: Final = "this server wants the cluster key; give it with --cluster-key\n"

_SAY_AGAIN_S: Final = 60.0
_ADDRESSES: Final = 1024


def key_holders_only(token: str) -> Middleware:
    """Let through what carries the token, and questions whether we live; refuse the rest with 401.

    Before the request's body is read. Who is refused is logged, each address once a minute.
    """
    expected = f"Bearer {token}".encode()
    said: dict[str, float] = {}

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get("Authorization")
        if request.path == OPEN_PATH or (
            given is not None and hmac.compare_digest(given.encode("utf-8", "surrogateescape"), expected)
        ):
            return await handler(request)
        address, now = request.remote or "?", time.monotonic()
        if said.get(address, now) <= now:
            if len(said) >= _ADDRESSES:
                said.clear()
            said[address] = now + _SAY_AGAIN_S
            log.warning("event=refused address=%s reason=%s cluster key", address, "no" if given is None else "wrong")
        raise web.HTTPUnauthorized(text=REFUSED, headers={"WWW-Authenticate": "Bearer"})

    return check
