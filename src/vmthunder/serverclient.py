"""HTTP to a `vmthunder server`, as far as a node needs it: one request at a time over one connection.

h11 over asyncio's streams: an HTTP client library costs each worker 17 MiB and each takeover 0.15 s, while guests wait.
A cancelled request closes the connection. Belongs to one event loop.
"""

import asyncio
from typing import Final
from urllib.parse import urlsplit

import h11

from vmthunder.errors import Failure, NotFound, NotPermitted, OriginUnavailable, Usage

CONNECT_S: Final = 5.0
MAX_ANSWER_BYTES: Final = 32 << 20
_READ_BYTES: Final = 64 << 10


class ServerUnavailable(OriginUnavailable):
    """The server did not answer, or not in time. Worth another try."""


class ServerClient:
    """A connection to a server, made when it is first needed."""

    def __init__(self, url: str, token: str | None = None) -> None:
        """A server at `http(s)://HOST[:PORT][/PREFIX]`. Raises Usage."""
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
            raise Usage(f"{url!r} is not a server; use the URL of a `vmthunder server`, such as http://images:8930")
        self.url: Final = url
        self._tls = parts.scheme == "https"
        self._host = parts.hostname
        self._port = port or (443 if self._tls else 80)
        self._prefix = parts.path.rstrip("/")
        self._headers = [("Host", parts.netloc.rpartition("@")[2]), ("Accept", "*/*")]
        if token is not None:
            self._headers.append(("Authorization", f"Bearer {token}"))
        self._protocol = h11.Connection(h11.CLIENT)
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def connect(self) -> str:
        """Connect, unless we are; our own address there. Raises ServerUnavailable."""
        if self._streams is None:
            self._protocol = h11.Connection(h11.CLIENT)
            try:
                async with asyncio.timeout(CONNECT_S):
                    self._streams = await asyncio.open_connection(self._host, self._port, ssl=self._tls or None)
            except (OSError, TimeoutError) as error:
                raise self._unavailable(error) from None
        address: str = self._streams[1].get_extra_info("sockname")[0]
        return address

    def close(self) -> None:
        """Hang up. The next request connects again."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None

    async def request(self, method: str, path: str, body: bytes = b"", *, timeout_s: float, missing: str) -> bytes:
        """The body of the answer. `missing` is what it means when the server does not know the path.

        Raises:
            ServerUnavailable: no answer, or the server cannot answer now.
            NotPermitted: it wants the cluster key.
            NotFound: `missing`.
            Failure: it does not take what we sent.
        """
        whole = False
        try:
            async with asyncio.timeout(timeout_s):
                await self.connect()
                status, answer = await self._exchange(method, path, body)
            whole = True
        except (OSError, TimeoutError, h11.ProtocolError) as error:
            raise self._unavailable(error) from None
        finally:
            # Whatever broke off in the middle, a cancellation too, leaves a connection that nobody can use.
            if not whole or self._protocol.our_state is not h11.DONE or self._protocol.their_state is not h11.DONE:
                self.close()
        if self._streams is not None:
            self._protocol.start_next_cycle()
        self._check(status, answer, missing)
        return answer

    async def _exchange(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        assert self._streams is not None
        reader, writer = self._streams
        headers = [*self._headers, ("Content-Length", str(len(body)))]
        request = h11.Request(method=method, target=self._prefix + path, headers=headers)
        for part in (request, h11.Data(data=body), h11.EndOfMessage()):
            writer.write(self._protocol.send(part) or b"")
        await writer.drain()
        status, answer = 0, bytearray()
        while True:
            event = self._protocol.next_event()
            if event is h11.NEED_DATA:
                self._protocol.receive_data(await reader.read(_READ_BYTES))
            elif isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                answer += event.data
                if len(answer) > MAX_ANSWER_BYTES:
                    raise h11.RemoteProtocolError("the answer is too long")
            elif isinstance(event, h11.EndOfMessage):
                return status, bytes(answer)

    def _check(self, status: int, answer: bytes, missing: str) -> None:
        if status == 200:
            return
        line = (answer.decode("utf-8", "replace").strip().splitlines() or [f"status {status}"])[0][:200]
        if status == 401:
            raise NotPermitted(f"{self.url} wants the cluster key of that server; give it with --cluster-key")
        if status in (404, 405, 501):
            raise NotFound(missing)
        if status >= 500:
            raise ServerUnavailable(f"server {self.url} cannot answer: {line}")
        raise Failure(f"server {self.url} does not take that: {line}")

    def _unavailable(self, error: Exception) -> ServerUnavailable:
        why = "no answer in time" if isinstance(error, TimeoutError) else str(error) or type(error).__name__
        return ServerUnavailable(f"server {self.url} does not answer: {why}")
