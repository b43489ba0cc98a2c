"""The short way to bytes of a pack at an http:// origin: one round trip on the event loop's own thread.

The object store's client hands each request to threads of its own and back; on a busy host those two hand-overs cost as
much as all the rest of a miss. Here the loop writes the request and receives the body where it stays. Only the plain case
is known: 206 with exactly the bytes that were asked for. Whatever else happens (a redirect, an error, a connection that was
closed as idle) is left to `Origin.read_pack`, which asks again and knows what to say of it.

Owns connections, each used by one request at a time. Belongs to one event loop.
"""

import asyncio
import os
from typing import Final
from urllib.parse import urlsplit

from vmthunder.errors import OriginUnavailable
from vmthunder.ids import Buffer, PackId
from vmthunder.origin.origin import Origin, pack_key

CONNECT_S: Final = 5.0
ANSWER_S: Final = 30.0
"""From the first byte of a request to the last one of its answer."""
MAX_HEAD_BYTES: Final = 16 << 10
MAX_IDLE: Final = 16
"""Connections that are kept for the next request."""
_PROXIES: Final = {"http_proxy", "all_proxy"}


class _NotPlain(Exception):
    """The answer is none that we understand."""


class RangeReader:
    """Implements `vmthunder.node.source.Packs`."""

    def __init__(self, origin: Origin, token: str | None) -> None:
        """Requests carry `token`."""
        self._origin = origin
        parts = urlsplit(origin.url)
        self._direct = parts.scheme == "http" and not _PROXIES & {name.lower() for name in os.environ}
        self._address = parts.hostname or "", parts.port or 80
        self._prefix = parts.path.rstrip("/")
        host = parts.netloc.rpartition("@")[2]
        self._headers = f"Host: {host}\r\n" + (f"Authorization: Bearer {token}\r\n" if token else "")
        self._idle: list[_Connection] = []

    def close(self) -> None:
        """Hang up. Requests that are under way end as if the server had."""
        while self._idle:
            self._idle.pop().abort()

    async def read_pack(self, pack: PackId, offset: int, length_bytes: int) -> Buffer:
        """As `Origin.read_pack`."""
        if self._direct:
            try:
                async with asyncio.timeout(ANSWER_S):
                    return await self._ask(pack, offset, length_bytes)
            except TimeoutError:
                raise OriginUnavailable(f"origin {self._origin.url} did not answer in time") from None
            except (OSError, _NotPlain):
                pass
        return await self._origin.read_pack(pack, offset, length_bytes)

    async def _ask(self, pack: PackId, offset: int, length_bytes: int) -> Buffer:
        connection = await self._connection()
        try:
            head = (
                f"GET {self._prefix}/{pack_key(pack)} HTTP/1.1\r\n{self._headers}"
                f"Range: bytes={offset}-{offset + length_bytes - 1}\r\n\r\n"
            )
            body = await connection.ask(head.encode("ascii"), length_bytes)
        except BaseException:
            connection.abort()  # what it still sends is no answer to anybody
            raise
        if connection.reusable and len(self._idle) < MAX_IDLE:
            self._idle.append(connection)
        else:
            connection.abort()
        return body

    async def _connection(self) -> "_Connection":
        while self._idle:
            connection = self._idle.pop()
            if connection.open:
                return connection
        async with asyncio.timeout(CONNECT_S):
            loop = asyncio.get_running_loop()
            return (await loop.create_connection(lambda: _Connection(loop), *self._address))[1]


class _Connection(asyncio.BufferedProtocol):
    """One connection. The body is received into the memory that is handed out."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.reusable = False
        """Whether another request may follow. Set by an answer."""
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._head = bytearray(MAX_HEAD_BYTES)
        self._head_bytes = 0
        self._body = memoryview(b"")
        self._body_bytes = 0
        self._in_body = False
        self._answer: asyncio.Future[memoryview] | None = None

    @property
    def open(self) -> bool:
        """Whether the server has not hung up, as far as is known."""
        return self._transport is not None

    async def ask(self, request: bytes, length_bytes: int) -> memoryview:
        """The body of a 206 of that length. Raises OSError, _NotPlain."""
        assert self._transport is not None
        self._head_bytes = self._body_bytes = 0
        self._in_body = self.reusable = False
        self._body = memoryview(bytearray(length_bytes))
        self._answer = self._loop.create_future()
        self._transport.write(request)
        return await self._answer

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._fail(exc or ConnectionResetError("the server hung up"))

    def get_buffer(self, sizehint: int) -> memoryview | bytearray:
        del sizehint
        if self._in_body and self._body_bytes < len(self._body):
            return self._body[self._body_bytes :]
        return memoryview(self._head)[self._head_bytes :]

    def buffer_updated(self, nbytes: int) -> None:
        if self._answer is None or self._answer.done():
            self.reusable = False
            self.abort()  # nobody asked for that
        elif self._in_body:
            self._body_bytes += nbytes
            self._whole()
        else:
            self._head_bytes += nbytes
            end = self._head.find(b"\r\n\r\n", 0, self._head_bytes)
            if end >= 0:
                self._begin_body(end)
            elif self._head_bytes == MAX_HEAD_BYTES:
                self._fail(_NotPlain())

    def _begin_body(self, end: int) -> None:
        status, _, rest = bytes(self._head[:end]).partition(b"\r\n")
        # Field names in any case, values with blanks around them (RFC 9112, section 5).
        lines = (line.partition(b":") for line in rest.split(b"\r\n"))
        fields = {name.lower(): value.strip() for name, _, value in lines}
        early = self._head_bytes - end - 4
        if (
            not status.startswith(b"HTTP/1.1 206")
            or fields.get(b"content-length") != b"%d" % len(self._body)
            or b"transfer-encoding" in fields
            or early > len(self._body)
        ):
            self._fail(_NotPlain())
            return
        self.reusable = fields.get(b"connection", b"").lower() != b"close"
        self._body[:early] = self._head[end + 4 : self._head_bytes]
        self._body_bytes = early
        self._in_body = True
        self._whole()

    def _whole(self) -> None:
        if self._body_bytes == len(self._body) and self._answer is not None:
            self._answer.set_result(self._body)

    def _fail(self, error: Exception) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)
