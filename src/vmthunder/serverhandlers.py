"""What the handlers of a `vmthunder server` share: bodies within limits, errors as a status and one line. Holds no state."""

from collections.abc import Awaitable, Callable
from typing import TypeAlias

from aiohttp import web

from vmthunder.errors import Conflict, Corrupt, NotFound, Usage, VMThunderError

Handler: TypeAlias = Callable[[web.Request], Awaitable[web.Response]]


async def body(request: web.Request, most_bytes: int) -> bytes:
    """The whole body. Raises HTTPRequestEntityTooLarge before more than that is taken."""
    data = bytearray()
    async for part in request.content.iter_any():
        data += part
        if len(data) > most_bytes:
            raise web.HTTPRequestEntityTooLarge(most_bytes, len(data), text=f"more than {most_bytes} bytes\n")
    return bytes(data)


def told_in_one_line(handler: Handler) -> Handler:
    """What is wrong with a request is told to who sent it: 400, 404, 409; what is wrong here: 503."""

    async def handle(request: web.Request) -> web.Response:
        try:
            return await handler(request)
        except (Usage, Corrupt) as error:
            raise web.HTTPBadRequest(text=f"{error}\n") from None
        except NotFound as error:
            raise web.HTTPNotFound(text=f"{error}\n") from None
        except Conflict as error:
            raise web.HTTPConflict(text=f"{error}\n") from None
        except VMThunderError as error:
            raise web.HTTPServiceUnavailable(text=f"{error}\n") from None

    return handle
