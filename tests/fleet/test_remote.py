"""What a node says to other machines, and what it does not do for them: over real connections."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from vmthunder.errors import AgentUnavailable, NotFound, NotPermitted, Usage
from vmthunder.fleet.nodes import FleetNode, NodeClient
from vmthunder.ids import NodeId, digest
from vmthunder.node import exchange
from vmthunder.node.remote import listen
from vmthunder.node.settings import AgentSettings
from vmthunder.swarm.key import ClusterKey

KEY = ClusterKey(bytes(32))
NODE = NodeId(b"this node's id..")
STATUS = {"pid": 1, "fetch": {"bytes_from_origin": 0, "bytes_from_peers": 0, "bytes_from_cache": 0, "stalled_s": 0.0}}


async def no_agent(_request: object, _progress: object) -> Any:
    raise AssertionError("what is nonsense must not get so far")


def with_node(
    tmp_path: Path, work: Callable[[NodeClient, int], Awaitable[None]], key: ClusterKey = KEY, node: NodeId = NODE
) -> None:
    """Run `work` on a node that has no agent behind it; a failure that nobody waits for fails the test.

    `key` and `node` are what its client believes.
    """
    settings = AgentSettings(
        "unused", tmp_path / "mount", tmp_path / "state", tmp_path / "run", control_listen="127.0.0.1:0"
    )

    async def run() -> None:
        lost: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: lost.append(context))
        server, port = await listen(settings, KEY, NODE, lambda: STATUS, no_agent)
        async with server:
            await work(NodeClient(key, FleetNode("node", f"http://127.0.0.1:{port}", node)), port)
        assert not lost

    asyncio.run(run())


async def said_to(port: int, request: bytes | Callable[[bytes], bytes]) -> bytes:
    """The answer to bytes that are sent at once, or to what is made of the node's nonce."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        async with asyncio.timeout(20):
            if not isinstance(request, bytes):
                writer.write(b"GET /challenge HTTP/1.1\r\nHost: n\r\n\r\n")
                await reader.readuntil(b"\r\n\r\n")
                request = request(bytes.fromhex(json.loads(await reader.readline())["nonce"]))
            writer.write(request)
            return await reader.read()
    finally:
        writer.close()


def request_of(method: str, path: str, body: bytes = b"", key: ClusterKey = KEY) -> Callable[[bytes], bytes]:
    def sign(nonce: bytes) -> bytes:
        signature = f"{key.order_mac(NODE, nonce, method, path, digest(body)).hex()} {digest(body).hex()}"
        head = f"{method} {path} HTTP/1.1\r\nHost: n\r\nAuthorization: VMThunder {signature}\r\n"
        return head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body

    return sign


@pytest.mark.parametrize(
    ("key", "node"),
    [(ClusterKey(bytes(31) + b"x"), NODE), (KEY, NodeId(b"some other node!"))],
    ids=["another key", "for another node"],
)
def test_an_order_of_a_stranger_or_for_somebody_else_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, key: ClusterKey, node: NodeId
) -> None:
    async def work(client: NodeClient, port: int) -> None:
        for ask in (client.vms(), client.destroy(None), client.boot({"image": "x"}, lambda _: None)):
            with pytest.raises(NotPermitted, match="another cluster key, for another node"):
                await ask
        assert caplog.text.count("event=remote_refused address=127.0.0.1") == 1

    with_node(tmp_path, work, key, node)


def test_an_order_that_was_heard_is_of_no_use(tmp_path: Path) -> None:
    async def work(client: NodeClient, port: int) -> None:
        heard: list[bytes] = []

        def listened_to(nonce: bytes) -> bytes:
            heard.append(request_of("DELETE", "/vms")(nonce))
            return heard[0]

        assert b" 200 " in await said_to(port, listened_to)
        (order,) = heard
        for again in (order, lambda _: order):
            assert b" 401 " in await said_to(port, again)
        # Two in one connection: the second is not even read.
        assert (await said_to(port, lambda nonce: 2 * request_of("GET", "/vms")(nonce))).count(b"HTTP/1.1") == 1

    with_node(tmp_path, work)


@pytest.mark.parametrize(
    ("said", "instead"),
    [
        (b"DELETE /vms/a ", b"DELETE /vms "),
        (b"DELETE /vms/a ", b"POST /vms/a "),
        (b"{}", b"[]"),
        (b"Authorization: VMThunder", b"Authorization: Bearer"),
        (b"Authorization:", b"X:"),
    ],
    ids=["path", "method", "body", "scheme", "nothing signed"],
)
def test_an_order_that_was_changed_is_refused(tmp_path: Path, said: bytes, instead: bytes) -> None:
    async def work(client: NodeClient, port: int) -> None:
        def changed(nonce: bytes) -> bytes:
            order = request_of("DELETE", "/vms/a", b"{}")(nonce)
            assert order.count(said) == 1
            return order.replace(said, instead)

        assert b" 401 " in await said_to(port, changed)
        assert b" 404 " in await said_to(port, request_of("DELETE", "/vms/a", b"{}"))

    with_node(tmp_path, work)


def test_nothing_but_the_challenge_is_answered_without_a_signature_and_no_body_is_taken(tmp_path: Path) -> None:
    async def work(client: NodeClient, port: int) -> None:
        assert b" 401 " in await said_to(port, b"GET /status HTTP/1.1\r\nHost: node\r\n\r\n")
        body = b"Host: node\r\nContent-Length: 1000000\r\n\r\n"
        assert b" 401 " in await said_to(port, b"POST /vms HTTP/1.1\r\n" + body)
        assert b" 413 " in await said_to(port, b"POST /challenge HTTP/1.1\r\n" + body + b"x")
        assert b" 400 " in await said_to(port, lambda _: b"GET /challenge HTTP/1.1\r\nHost: node\r\n\r\n")

    with_node(tmp_path, work)


@pytest.mark.parametrize("head", [b"GET /challenge HTTP/1.0", b"CONNECT /challenge HTTP/1.1\r\nHost: n"])
def test_who_asks_for_a_challenge_that_no_order_can_follow_is_no_failure_of_ours(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, head: bytes
) -> None:
    async def work(client: NodeClient, port: int) -> None:
        assert b" 200 " in await said_to(port, head + b"\r\n\r\n")
        assert "remote_request_failed" not in caplog.text

    with_node(tmp_path, work)


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
def test_requests_that_make_no_sense_get_an_answer(
    tmp_path: Path, request_: bytes | Callable[[bytes], bytes], status: bytes
) -> None:
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
