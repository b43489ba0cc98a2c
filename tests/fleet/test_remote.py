"""What a node says to other machines, and what it does not do for them: over real connections."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from vmthunder.errors import AgentUnavailable, NotFound, NotPermitted, Usage
from vmthunder.fleet.nodes import FleetNode, NodeClient
from vmthunder.node import exchange
from vmthunder.node.remote import listen
from vmthunder.node.settings import AgentSettings
from vmthunder.swarm.key import ClusterKey

KEY = ClusterKey(bytes(32))
STATUS = {"pid": 1, "fetch": {"bytes_from_origin": 0, "bytes_from_peers": 0, "bytes_from_cache": 0, "stalled_s": 0.0}}


async def no_agent(_request: object, _progress: object) -> Any:
    raise AssertionError("what is nonsense must not get so far")


def with_node(
    tmp_path: Path, work: Callable[[NodeClient, int], Awaitable[None]], token: str = KEY.orders_token
) -> None:
    """Run `work` on a node that has no agent behind it; a failure that nobody waits for fails the test."""
    settings = AgentSettings(
        "unused", tmp_path / "mount", tmp_path / "state", tmp_path / "run", control_listen="127.0.0.1:0"
    )

    async def run() -> None:
        lost: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: lost.append(context))
        server, port = await listen(settings, KEY, lambda: STATUS, no_agent)
        async with server, aiohttp.ClientSession(headers={"Authorization": f"Bearer {token}"}) as session:
            await work(NodeClient(session, FleetNode("node", f"http://127.0.0.1:{port}")), port)
        assert not lost

    asyncio.run(run())


async def said_to(port: int, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        async with asyncio.timeout(20):
            return await reader.read()
    finally:
        writer.close()


def request_of(method: str, path: str, body: bytes = b"") -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: n\r\nAuthorization: Bearer {KEY.orders_token}\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"\r\n" + body


def test_nobody_is_answered_without_the_key(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def work(client: NodeClient, port: int) -> None:
        for ask in (client.vms(), client.destroy(None), client.boot({"image": "x"}, lambda _: None)):
            with pytest.raises(NotPermitted, match="wants the cluster key"):
                await ask
        assert b" 401 " in await said_to(port, b"GET /status HTTP/1.1\r\nHost: node\r\n\r\n")
        assert caplog.text.count("event=remote_refused address=127.0.0.1") == 1

    for token in ("0" * 64, KEY.token):  # the one that the image server hears is not good for orders
        caplog.clear()
        with_node(tmp_path, work, token=token)


@pytest.mark.parametrize(
    ("wanted", "line"),
    [
        ({}, "image: a text"),
        ({"image": 5}, "image: a text"),
        ({"image": "a\0b"}, "image: a text"),
        ({"image": "x" * 5000}, "image: a text"),
        ({"image": "x", "kernel": "/etc/shadow"}, "'kernel' is no option"),
        ({"image": "x", "state_dir": "/etc"}, "'state_dir' is no option"),
        ({"image": "x", "memory": "256"}, "--memory: a number"),
        ({"image": "x", "memory": True}, "--memory: a number"),
        ({"image": "x", "timeout": float("nan")}, "--timeout: a number"),
        ({"image": "x", "ready_agent": 1}, "--ready-agent: a truth value"),
        ({"image": "x", "forward": ["80"]}, "--forward: a list of numbers"),
        ({"image": "x", "user_data": "?"}, "user_data is to be sent in base64"),
        ({"image": "x", "driver": "--help"}, "'--help' is not one of"),
        ({"image": "x", "memory": 1}, "16 MiB of memory"),
        ({"image": "x", "ssh_key": "bm8ga2V5IGF0IGFsbAo="}, r"/proc/self/fd/\d+"),
    ],
)
def test_a_boot_that_makes_no_sense_is_refused(tmp_path: Path, wanted: dict[str, Any], line: str) -> None:
    async def work(client: NodeClient, port: int) -> None:
        with pytest.raises(Usage, match=line):
            await client.boot(wanted, lambda _: None)

    with_node(tmp_path, work)


def test_a_name_that_looks_like_an_option_is_a_name_and_steps_are_told_before_an_error(tmp_path: Path) -> None:
    async def work(client: NodeClient, port: int) -> None:
        heard: list[Any] = []
        with pytest.raises(AgentUnavailable, match="no agent answers"):
            await client.boot({"image": "--help"}, heard.append)
        told = [line for line in heard if "step" in line]
        assert told[0]["step"] in {"queued", "launch"}
        assert all(line["node"]["pid"] == 1 for line in told)

    with_node(tmp_path, work)


def test_vms_that_are_not_there_are_not_found(tmp_path: Path) -> None:
    async def work(client: NodeClient, port: int) -> None:
        assert await client.vms() == []
        assert await client.destroy(None) == []
        with pytest.raises(NotFound, match="there is no vm web"):
            await client.destroy("web")
        for path in ("/vms/..", "/vms/%2e%2e", "/vms/--all", "/vms/a/b", "/nothing"):
            answer = await said_to(port, request_of("DELETE", path))
            assert b" 404 " in answer.splitlines()[0]
            assert b"there is no DELETE" in answer

    with_node(tmp_path, work)


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"400"),
        (b"GET /status HTTP/1.1\r\nX: " + b"y" * (64 << 10), b"431"),
        (request_of("POST", "/vms", b"x" * (exchange.MAX_BODY_BYTES + 1)), b"413"),
        (request_of("POST", "/vms", b"[1]"), b"400"),
        (request_of("POST", "/vms", b"[" * 100_000), b"400"),
        (request_of("POST", "/vms", b"{"), b"400"),
        (request_of("PUT", "/vms", b"{}"), b"404"),
    ],
    ids=["tls", "long head", "long body", "no object", "deep", "no json", "no such method"],
)
def test_requests_that_make_no_sense_get_an_answer(tmp_path: Path, request_: bytes, status: bytes) -> None:
    async def work(client: NodeClient, port: int) -> None:
        answer = await said_to(port, request_)
        assert answer.split()[1] == status
        error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
        assert error.count("\n") == 0
        assert b" 200 " in await said_to(port, request_of("GET", "/status"))  # it goes on

    with_node(tmp_path, work)


def test_who_says_nothing_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "REQUEST_S", 0.1)

    async def work(client: NodeClient, port: int) -> None:
        assert await said_to(port, b"POST /vms HTTP/1.1\r\n") == b""

    with_node(tmp_path, work)


def test_connections_beyond_the_limit_are_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "MAX_CONNECTIONS", 2)

    async def work(client: NodeClient, port: int) -> None:
        held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        assert b" 503 " in await said_to(port, request_of("GET", "/status"))
        for _, writer in held:
            writer.close()

    with_node(tmp_path, work)


@pytest.mark.parametrize(
    "wanted",
    [
        {},
        {"image": "x", "what": "half", "rate_bytes_s": 0},
        {"image": "x", "what": "full", "rate_bytes_s": -1},
        {"image": "x", "what": "full", "rate_bytes_s": True},
        {"image": "x\0", "what": "full", "rate_bytes_s": 0},
        {"image": "x", "what": [], "rate_bytes_s": 0},
        {"image": "x", "what": "full", "rate_bytes_s": 0, "more": 1},
    ],
)
def test_an_image_is_not_brought_for_nonsense(tmp_path: Path, wanted: dict[str, Any]) -> None:
    async def work(client: NodeClient, port: int) -> None:
        del port
        with pytest.raises(Usage):
            await client.precache(wanted, lambda _: None)

    with_node(tmp_path, work)
