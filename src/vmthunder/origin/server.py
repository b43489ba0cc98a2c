"""A directory origin over HTTP with ranges, so that a node needs only a URL.

    GET, HEAD  /refs/NAME  /manifests/HEX  /packs/HH/HEX     objects, with single ranges (RFC 9110, section 14)
    GET        /images.json                                  all refs
    GET        /healthz                                      "ok"

Everything else is not there; nothing outside the three directories can be named. Belongs to one event loop: what the page
cache has is read on it (RWF_NOWAIT), what the disk must bring is read by a thread.
"""

import asyncio
import errno
import os
import re
import stat
from pathlib import Path
from typing import Final

from aiohttp import web

from vmthunder.errors import Conflict, NotPermitted, Usage, VMThunderError
from vmthunder.origin.origin import IMAGES_KEY, Origin, encode_images

PART_BYTES: Final = 1 << 20
"""Of a long answer that is read and sent at a time."""

_OBJECT: Final = re.compile(
    r"/(refs/[A-Za-z0-9][A-Za-z0-9._-]{0,199}|manifests/[0-9a-f]{64}|packs/([0-9a-f]{2})/\2[0-9a-f]{62})", re.ASCII
)
_RANGE: Final = re.compile(r"bytes=(\d*)-(\d*)", re.ASCII)
_IMMUTABLE: Final = "public, max-age=31536000, immutable"


def make_app(root: Path) -> web.Application:
    """The web application of a directory origin. Raises NotFound: no such directory."""
    origin = Origin.open(str(root))
    objects = _Objects(root.resolve())

    async def images(_: web.Request) -> web.Response:
        try:
            return web.Response(body=encode_images(await origin.refs()), content_type="application/json")
        except VMThunderError as error:
            raise web.HTTPServiceUnavailable(text=f"{error}\n") from None

    async def health(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    app = web.Application()
    app.router.add_get(f"/{IMAGES_KEY}", images)
    app.router.add_get("/healthz", health)
    app.router.add_get("/{key:.*}", objects.answer)
    return app


async def serve(app: web.Application, host: str, port: int) -> tuple[web.AppRunner, str]:
    """Listen; returns the runner, to be cleaned up, and the URL with the real port.

    Raises:
        Conflict: the port is in use.
        NotPermitted: the port may not be used.
        Usage: no such address on this machine.
    """
    runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=1.0, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, host, port, backlog=1024)
    try:
        await site.start()
    except OSError as error:
        await runner.cleanup()
        if error.errno == errno.EADDRINUSE:
            raise Conflict(f"port {port} of {host} is in use; choose another with --listen") from None
        if error.errno == errno.EACCES:
            raise NotPermitted(f"port {port} of {host} needs root") from None
        raise Usage(f"cannot listen on {host}:{port}: {error.strerror or error}") from None
    real_port = runner.addresses[0][1]
    shown = f"[{host}]" if ":" in host else host
    return runner, f"http://{shown}:{real_port}"


class _Objects:
    """Answers with objects."""

    def __init__(self, root: Path) -> None:
        self._root = root

    async def answer(self, request: web.Request) -> web.StreamResponse:
        match = _OBJECT.fullmatch(request.rel_url.raw_path)
        if match is None:
            raise web.HTTPNotFound
        path = self._root / match[1]
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise web.HTTPNotFound from None
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO):
                raise web.HTTPNotFound from None
            raise web.HTTPServiceUnavailable(reason=error.strerror) from None
        try:
            # A link, of the object or of a directory above it, may lead anywhere; what we publish are files.
            if Path(f"/proc/self/fd/{fd}").readlink() != path:
                raise web.HTTPNotFound
            return await self._send(request, fd, match[1])
        finally:
            os.close(fd)

    async def _send(self, request: web.Request, fd: int, key: str) -> web.StreamResponse:
        status_of_file = os.fstat(fd)
        if not stat.S_ISREG(status_of_file.st_mode):
            raise web.HTTPNotFound
        size = status_of_file.st_size
        begin, end, status = _range(request.headers.get("Range"), size)
        headers = {
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
            "Cache-Control": "no-cache" if key.startswith("refs/") else _IMMUTABLE,
        }
        if status == web.HTTPPartialContent.status_code:
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{size}"
        length = end - begin
        if request.method == "HEAD":
            return web.Response(status=status, headers={**headers, "Content-Length": str(length)})
        if length <= PART_BYTES:
            return web.Response(status=status, headers=headers, body=await _read(fd, begin, length))
        response = web.StreamResponse(status=status, headers=headers)
        response.content_length = length
        await response.prepare(request)
        while begin < end:
            data = await _read(fd, begin, min(PART_BYTES, end - begin))
            await response.write(data)
            begin += len(data)
        return response


def _range(header: str | None, size: int) -> tuple[int, int, int]:
    """First byte, byte behind the last, and status of an answer. What is no single range is ignored, as it may be."""
    match = _RANGE.fullmatch(header) if header else None
    if match is None or match.groups() == ("", ""):
        return 0, size, web.HTTPOk.status_code
    first, last = match.groups()
    if first:
        begin, end = int(first), min(int(last) + 1, size) if last else size
        if last and int(last) < begin:
            return 0, size, web.HTTPOk.status_code
    else:
        begin, end = max(0, size - int(last)), size
    if begin >= end:
        raise web.HTTPRequestRangeNotSatisfiable(headers={"Content-Range": f"bytes */{size}"})
    return begin, end, web.HTTPPartialContent.status_code


async def _read(fd: int, offset: int, length: int) -> bytearray:
    """Exactly that range. Raises HTTPServiceUnavailable if the disk fails."""
    data = bytearray(length)
    view = memoryview(data)
    done = 0
    try:
        while done < length:
            try:
                got = os.preadv(fd, [view[done:]], offset + done, os.RWF_NOWAIT)
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP):
                    raise
                # Not in the page cache, or a file system that cannot tell.
                got = await asyncio.to_thread(os.preadv, fd, [view[done:]], offset + done)
            if got == 0:
                raise OSError(errno.EIO, "the object became shorter")
            done += got
    except OSError as error:
        raise web.HTTPServiceUnavailable(reason=error.strerror) from None
    return data
