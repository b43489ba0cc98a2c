"""An origin that claims more than anything may have: nobody takes memory for it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from vmthunder.errors import CorruptFile, Usage
from vmthunder.ids import ImageId, image_name
from vmthunder.origin import origin as origin_module
from vmthunder.origin.origin import Origin

IMAGE = ImageId(bytes(32))


@asynccontextmanager
async def claiming(length_bytes: int) -> AsyncIterator[Origin]:
    """A web server whose every object is so long, and begins at once."""

    talking: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        talking[task] = writer
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                date = "Last-Modified: Wed, 25 Nov 2026 00:00:00 GMT"
                writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {length_bytes}\r\n{date}\r\n\r\n".encode())
                for _ in range(length_bytes >> 16):
                    writer.write(bytes(1 << 16))
                    await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield Origin.open(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    for writer in talking.values():
        writer.transport.abort()
    await asyncio.gather(*talking)


@pytest.mark.parametrize(
    "ask",
    [
        lambda origin: origin.ref(image_name("debian")),
        lambda origin: origin.refs(),
        lambda origin: origin.manifest(IMAGE),
        lambda origin: origin.profile(IMAGE),
    ],
    ids=["ref", "list", "manifest", "profile"],
)
def test_what_claims_to_be_too_long_is_refused_before_it_is_taken(ask: Callable[[Origin], Awaitable[Any]]) -> None:
    async def run() -> None:
        async with claiming(1 << 40) as origin, asyncio.timeout(10):
            with pytest.raises(CorruptFile, match=f"has {1 << 40} bytes, more than"):
                await ask(origin)

    asyncio.run(run())


def test_a_manifest_that_nobody_would_read_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(origin_module, "MAX_MANIFEST_BYTES", 10)
    origin = Origin.open(str(tmp_path))
    with pytest.raises(Usage, match="larger --chunk-size"):
        asyncio.run(origin.put_manifest(bytes(11)))
    assert not list(tmp_path.iterdir())
