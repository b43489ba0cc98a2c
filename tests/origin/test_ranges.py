"""Bytes of packs over the loop's own connections, from servers that behave and servers that do not."""

import asyncio
import contextlib
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from vmthunder.errors import CorruptPack, NotFound, OriginUnavailable
from vmthunder.ids import PackId, digest
from vmthunder.origin import ranges
from vmthunder.origin.origin import Origin, pack_key
from vmthunder.origin.ranges import RangeReader
from vmthunder.origin.server import make_app, serve

DATA = os.urandom(300_000)
PACK = PackId(digest(DATA))
TIMEOUT_S = 20.0

pytestmark = pytest.mark.asyncio


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine's way into the world is, the servers here are on loopback."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


class Server:
    """Sends DATA in the way that `manner` names; counts connections and the requests of each."""

    def __init__(self, manner: str) -> None:
        self.manner = manner
        self.requests: list[int] = []
        self.talks: list[asyncio.Task[Any]] = []
        self.held = asyncio.Event()
        self.release = asyncio.Event()

    async def converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.talks.append(task)
        number = len(self.requests)
        self.requests.append(0)
        # Cancelled at the end, where the object store's client keeps its connections open.
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                self.requests[number] += 1
                await self.answer(head, writer)
                if self.manner == "hangs up when idle":
                    break
        writer.close()

    async def answer(self, head: str, writer: asyncio.StreamWriter) -> None:
        found = re.search(r"range: bytes=(\d+)-(\d+)", head, re.IGNORECASE)
        assert found, head
        first, last = int(found[1]), int(found[2])
        body = DATA[first : last + 1]
        start = f"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {first}-{last}/{len(DATA)}\r\n"
        match self.manner:
            case "elsewhere" if not head.startswith("GET /elsewhere/"):
                writer.write(f"HTTP/1.1 307 There\r\nLocation: /elsewhere/{pack_key(PACK)}\r\n".encode())
                writer.write(b"Content-Length: 0\r\n\r\n")
            case "in dribbles":
                for byte in f"{start}CONTENT-LENGTH:\t {len(body)}  \r\n\r\n".encode():
                    writer.write(bytes([byte]))
                    await writer.drain()
                for at in range(0, len(body), 7_001):
                    writer.write(body[at : at + 7_001])
                    await writer.drain()
            case "late":
                writer.write(f"{start}Content-Length: {len(body)}\r\n\r\n".encode() + body[:10])
                self.held.set()
                await self.release.wait()
                writer.write(body[10:])
            case _:
                writer.write(f"{start}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()


@contextlib.asynccontextmanager
async def reading(manner: str) -> AsyncIterator[tuple[Server, RangeReader]]:
    server = Server(manner)
    listener = await asyncio.start_server(server.converse, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    reader = RangeReader(Origin.open(f"http://127.0.0.1:{port}"), None)
    try:
        async with asyncio.timeout(TIMEOUT_S):
            yield server, reader
    finally:
        reader.close()
        listener.close()
        for talk in server.talks:
            talk.cancel()
        await asyncio.gather(*server.talks)


MANNERS = ["plain", "in dribbles", "hangs up when idle", "elsewhere"]


@pytest.mark.parametrize("manner", MANNERS)
async def test_the_right_bytes_come_however_they_are_sent(manner: str) -> None:
    async with reading(manner) as (_, reader):
        for offset, length in ((0, 1), (5, 100_000), (len(DATA) - 3, 3), (0, len(DATA))):
            assert bytes(await reader.read_pack(PACK, offset, length)) == DATA[offset : offset + length]


async def test_one_connection_serves_reads_that_follow_one_another() -> None:
    async with reading("plain") as (server, reader):
        for at in range(10):
            await reader.read_pack(PACK, at, 50)
        assert server.requests == [10]


async def test_reads_at_once_each_get_their_own_bytes() -> None:
    async with reading("plain") as (server, reader):
        answers = await asyncio.gather(*(reader.read_pack(PACK, at, 70_000) for at in range(40)))
        assert [bytes(answer) for answer in answers] == [DATA[at : at + 70_000] for at in range(40)]
        assert len(server.requests) == 40


async def test_the_rest_of_a_cancelled_answer_is_nobody_elses() -> None:
    async with reading("late") as (server, reader):
        given_up = asyncio.create_task(reader.read_pack(PACK, 0, 1_000))
        await server.held.wait()
        given_up.cancel()
        with pytest.raises(asyncio.CancelledError):
            await given_up
        server.manner = "plain"
        assert bytes(await reader.read_pack(PACK, 500, 1_000)) == DATA[500:1_500]
        assert server.requests == [1, 1]


async def test_a_server_that_says_nothing_more_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "ANSWER_S", 0.2)
    async with reading("late") as (_, reader):
        with pytest.raises(OriginUnavailable, match="did not answer in time"):
            await reader.read_pack(PACK, 0, 1_000)


async def test_what_our_server_refuses_is_said_as_the_origin_says_it(tmp_path: Path) -> None:
    place = tmp_path / pack_key(PACK)
    place.parent.mkdir(parents=True)
    place.write_bytes(DATA)
    runner, url = await serve(make_app(tmp_path), "127.0.0.1", 0)
    reader = RangeReader(Origin.open(url), None)
    try:
        assert bytes(await reader.read_pack(PACK, 7, 5)) == DATA[7:12]
        with pytest.raises(NotFound, match="no pack"):
            await reader.read_pack(PackId(bytes(32)), 0, 10)
        with pytest.raises(CorruptPack):
            await reader.read_pack(PACK, len(DATA) - 5, 10)
    finally:
        reader.close()
        await runner.cleanup()
