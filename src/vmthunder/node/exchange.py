"""HTTP/1.1 as far as other machines need it of an agent: one signed order and one answer of JSON per connection.

    GET /challenge                                         {"nonce": HEX}: good for the next request on this connection
    …   Authorization: VMThunder MAC DIGEST                the order; HEX of `ClusterKey.order_mac`, and of its body's BLAKE3

An order that is heard again, changed or sent on to another node is refused: its nonce belongs to one connection, and the MAC
is over the node, the nonce, method, path and body. The head is checked before any of the body is taken.

h11 over asyncio's streams: an HTTP server library costs each worker 17 MiB and each takeover 0.15 s, while guests wait.
Nobody is listened to longer than REQUEST_S, or beyond MAX_HEAD_BYTES and MAX_BODY_BYTES. An answer is one JSON value, or
lines of JSON that are sent as things happen. Belongs to the event loop.
"""

import asyncio
import contextlib
import hmac
import json
import logging
import math
import re
import secrets
import time
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any, Final

import h11

from vmthunder.errors import Usage, VMThunderError
from vmthunder.ids import digest
from vmthunder.swarm.key import NONCE_BYTES

log = logging.getLogger(__name__)

MAX_HEAD_BYTES: Final = 16 << 10
MAX_BODY_BYTES: Final = 1 << 20
MAX_CONNECTIONS: Final = 256
REQUEST_S: Final = 10.0
SAY_AGAIN_S: Final = 60.0
CHALLENGE: Final = "/challenge"
_SIGNED = re.compile(rb"VMThunder ([0-9a-f]{64}) ([0-9a-f]{64})")
_READ_BYTES: Final = 64 << 10

_STATUS: Final = {2: HTTPStatus.BAD_REQUEST, 3: HTTPStatus.NOT_FOUND, 7: HTTPStatus.FORBIDDEN, 8: HTTPStatus.CONFLICT}
"""By exit code; what is not here is a failure of ours."""


Mac = Callable[[bytes, str, str, bytes], bytes]
"""Nonce, method, path and digest of the body → what an order must carry."""


class _Refused(Exception):
    """Ends an exchange before its handler begins."""

    def __init__(self, status: HTTPStatus, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.status = status
        self.exit_code = exit_code


class Exchange:
    """One request, and its answer in the making."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.method = ""
        self.path = ""
        self.body = b""
        self._reader = reader
        self._writer = writer
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD_BYTES)

    async def receive(self, mac: Mac) -> None:
        """Read the order, and what comes before it. Raises _Refused, h11.RemoteProtocolError."""
        nonce = secrets.token_bytes(NONCE_BYTES)
        await self._request(mac, nonce)
        if self.path == CHALLENGE:
            try:
                await self.answer({"nonce": nonce.hex()}, last=False)
                self._http.start_next_cycle()
            except (
                h11.LocalProtocolError
            ):  # HTTP/1.0, `Connection: close`, CONNECT: theirs to ask, and no fault of ours
                raise ConnectionResetError("no order can follow the challenge on this connection") from None
            await self._request(mac, nonce)
            if self.path == CHALLENGE:
                raise _Refused(HTTPStatus.BAD_REQUEST, "the order is missing", 2)

    async def _request(self, mac: Mac, nonce: bytes) -> None:
        body_digest = digest(b"")
        body = bytearray()
        while True:
            event = self._http.next_event()
            if event is h11.NEED_DATA:
                if self._http.they_are_waiting_for_100_continue:
                    self._write(h11.InformationalResponse(status_code=100, headers=[]))
                self._http.receive_data(await self._reader.read(_READ_BYTES))
            elif isinstance(event, h11.Request):
                self.method, self.path = event.method.decode(), event.target.decode()
                if self.path != CHALLENGE:
                    body_digest = self._signed(event, mac, nonce)
            elif isinstance(event, h11.Data):
                body += event.data
                if len(body) > (0 if self.path == CHALLENGE else MAX_BODY_BYTES):
                    raise _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "the request is too long", 2)
            elif isinstance(event, h11.EndOfMessage):
                self.body = bytes(body)
                if digest(self.body) != body_digest:
                    raise _Refused(HTTPStatus.UNAUTHORIZED, "the order was changed on its way to this node", 7)
                return
            else:
                raise ConnectionResetError("hung up before the request was whole")

    def _signed(self, request: h11.Request, mac: Mac, nonce: bytes) -> bytes:
        """The digest of the body that was signed. Raises _Refused."""
        given = _SIGNED.fullmatch(dict(request.headers).get(b"authorization", b""))
        if given is None:
            raise _Refused(HTTPStatus.UNAUTHORIZED, "this node wants the cluster key; give it with --cluster-key", 7)
        signature, body_digest = (bytes.fromhex(part.decode()) for part in given.groups())
        if not hmac.compare_digest(signature, mac(nonce, self.method, self.path, body_digest)):
            raise _Refused(
                HTTPStatus.UNAUTHORIZED,
                "this node refuses the order: it is signed with another cluster key, for another node, or was sent before",
                7,
            )
        return body_digest

    async def answer(self, value: Any, status: int = HTTPStatus.OK, *, last: bool = True) -> None:
        """The whole answer; the last on this connection, as a rule."""
        body = json.dumps(value).encode() + b"\n"
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
        if last:
            headers.append(("Connection", "close"))
        self._write(h11.Response(status_code=status, headers=headers))
        self._write(h11.Data(data=body))
        await self.end()

    async def line(self, value: Any) -> None:
        """One line of an answer that goes on; the first begins it."""
        if self._http.our_state is h11.SEND_RESPONSE:
            headers = [("Content-Type", "application/x-ndjson"), ("Connection", "close")]
            self._write(h11.Response(status_code=HTTPStatus.OK, headers=headers))
        self._write(h11.Data(data=json.dumps(value).encode() + b"\n"))
        await self._writer.drain()

    async def fail(self, message: str, exit_code: int, status: int | None = None) -> None:
        """The error as the answer, or as the last line of one that has begun."""
        value = {"error": message, "exit_code": exit_code}
        if self._http.our_state is h11.SEND_BODY:
            await self.line(value)
            await self.end()
        elif self._http.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            await self.answer(value, status or _STATUS.get(exit_code, HTTPStatus.INTERNAL_SERVER_ERROR))

    async def end(self) -> None:
        """The answer is whole."""
        self._write(h11.EndOfMessage())
        await self._writer.drain()

    async def hung_up(self) -> None:
        """Wait until the other side is gone."""
        with contextlib.suppress(ConnectionError):
            while await self._reader.read(_READ_BYTES):
                pass  # nothing more is expected; whatever it is, it is no second request

    def _write(self, event: "h11.Event") -> None:
        self._writer.write(self._http.send(event) or b"")


class _Refusals:
    """Says who was refused, each address once a minute."""

    def __init__(self) -> None:
        self._said_s: dict[str, float] = {}

    def log(self, address: str) -> None:
        now_s = time.monotonic()
        if now_s - self._said_s.get(address, -math.inf) < SAY_AGAIN_S:
            return
        if len(self._said_s) >= MAX_CONNECTIONS:
            self._said_s.clear()
        self._said_s[address] = now_s
        log.warning("event=remote_refused address=%s reason=no or wrong cluster key", address)


Handler = Callable[[Exchange], Awaitable[None]]


async def serve(host: str, port: int, mac: Mac, handle: Handler) -> asyncio.Server:
    """Obey orders that are signed. Raises OSError: it cannot listen there."""
    connections = 0
    refusals = _Refusals()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        try:
            if connections <= 2 * MAX_CONNECTIONS:
                await _converse(Exchange(reader, writer), mac, handle, full=connections > MAX_CONNECTIONS)
        except (ConnectionError, TimeoutError, h11.ProtocolError) as error:
            log.debug("event=remote_connection_lost reason=%s", error)
        except _Refused as error:
            if error.status is HTTPStatus.UNAUTHORIZED:
                refusals.log(writer.get_extra_info("peername")[0])
        finally:
            connections -= 1
            writer.close()

    return await asyncio.start_server(connected, host, port)


async def _converse(exchange: Exchange, mac: Mac, handle: Handler, *, full: bool) -> None:
    try:
        async with asyncio.timeout(REQUEST_S):
            await exchange.receive(mac)
        if full:  # said when the request was read: the kernel throws an answer away that comes before
            raise _Refused(HTTPStatus.SERVICE_UNAVAILABLE, "this node has too many connections; try again later")
        await handle(exchange)
    except _Refused as error:
        await exchange.fail(str(error), error.exit_code, error.status)
        raise
    except h11.RemoteProtocolError as error:
        await exchange.fail("this is no HTTP request", 2, error.error_status_hint)
    except VMThunderError as error:
        await exchange.fail(str(error), error.exit_code)
    except (ConnectionError, TimeoutError):
        raise
    except Exception:
        # One of ours; but what somebody sends must not be able to end the worker.
        log.critical("event=remote_request_failed method=%s path=%s", exchange.method, exchange.path, exc_info=True)
        await exchange.fail("the agent failed to do that; its log says why", 1)


def json_object(body: bytes) -> dict[str, Any]:
    """A request's body. Raises Usage."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise Usage("the request is to be a JSON object")
    return value
