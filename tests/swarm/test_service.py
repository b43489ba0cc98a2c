"""The tracker over HTTP: a real server process, and whatever may be sent to it."""

import http.client
import json
import random
from collections.abc import Iterator
from typing import Any

import pytest

from conftest import RunCli, one_line
from tracker_server import Server, running_server
from vmthunder.ids import ImageId, NodeId
from vmthunder.swarm.service import MAX_JOIN_BYTES, MAX_LEAVE_BYTES
from vmthunder.swarm.view import Join, Member, Poll, Version, encode_join, encode_poll

IMAGE = ImageId(b"i" * 32)
JOIN = encode_join(Join(IMAGE, Member(NodeId(b"n" * 16), "", "10.0.0.1", 7000), None))
POLL = encode_poll(Poll(NodeId(b"n" * 16), {IMAGE: Version(1, 1)}))


class Client:
    """Plain HTTP, with the key."""

    def __init__(self, server: Server) -> None:
        self._headers = {"Authorization": f"Bearer {server.key.token}"}
        self._connection = http.client.HTTPConnection("127.0.0.1", int(server.url.rpartition(":")[2]), timeout=10)

    def send(self, method: str, path: str, body: bytes | None = None) -> tuple[int, str]:
        self._connection.request(method, path, body, self._headers)
        response = self._connection.getresponse()
        return response.status, response.read().decode()

    def close(self) -> None:
        self._connection.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(tmp_path_factory.mktemp("server"), "--stripes=4", "--fanout=5") as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    client = Client(server)
    yield client
    client.close()


def test_who_is_where_is_shown_to_operators(server: Server, client: Client, run_cli: RunCli) -> None:
    status, answer = client.send("POST", "/swarm/join", json.dumps(JOIN).encode())
    assert status == 200
    view = json.loads(answer)[IMAGE.hex()]
    assert (view["stripes"], view["fanout"]) == (4, 5)
    shown = run_cli("swarm", "--tracker", server.url, "--cluster-key", server.key_file, "--json")
    assert json.loads(shown.stdout) == {
        "tracker": server.url,
        "nodes": [],
        "swarms": [{"image_id": IMAGE.hex(), **view}],
    }
    human = run_cli("swarm", "--tracker", server.url, "--cluster-key", server.key_file).stdout
    assert "1 nodes, 4 stripes, fan-out 5" in human
    assert "10.0.0.1:7000" in human
    leave = {"swarm": IMAGE.hex(), "node": (b"n" * 16).hex()}
    assert client.send("POST", "/swarm/leave", json.dumps(leave).encode())[0] == 200
    assert "no image is in use" in run_cli("swarm", "--tracker", server.url, "--cluster-key", server.key_file).stdout


def test_a_poll_of_a_stranger_is_told_to_announce_itself(client: Client) -> None:
    assert client.send("POST", "/swarm/poll", json.dumps(POLL).encode()) == (200, f'{{"{IMAGE.hex()}": null}}')


@pytest.mark.parametrize("what", ["join", "poll", "leave"])
def test_whatever_is_sent_is_taken_or_refused_in_one_line(client: Client, what: str) -> None:
    rng = random.Random(1)
    good = json.dumps({"join": JOIN, "poll": POLL, "leave": JOIN}[what])
    bodies = [b"", b"{}", b"[]", b"null", b"NaN", b"\xff\xfe", b"[" * 4000, good.encode()[:-1]]
    for _ in range(150):
        text = bytearray(good.encode())
        for _ in range(rng.randrange(1, 4)):
            text[rng.randrange(len(text))] = rng.choice(b'"[]{}:,0aA-\\ \x00')
        bodies.append(bytes(text))
    statuses = set()
    for body in bodies:
        status, answer = client.send("POST", f"/swarm/{what}", body)
        statuses.add(status)
        if status != 200:
            one_line(answer)
    assert 400 in statuses
    assert statuses <= {200, 400}
    assert client.send("GET", "/healthz") == (200, "ok\n")


@pytest.mark.parametrize(("what", "size"), [("join", MAX_JOIN_BYTES), ("poll", 1 << 20), ("leave", MAX_LEAVE_BYTES)])
def test_a_body_that_is_too_long_is_refused_before_it_is_taken(server: Server, what: str, size: int) -> None:
    client = Client(server)
    assert client.send("POST", f"/swarm/{what}", b" " * (size + 1))[0] == 413
    client.close()


@pytest.mark.parametrize(
    ("options", "line"), [(["--stripes=0"], "stripes"), (["--stripes=16", "--fanout=16"], "fan-out 16 is too small")]
)
def test_a_shape_that_makes_no_trees_is_refused(run_cli: RunCli, tmp_path: Any, options: list[str], line: str) -> None:
    refused = run_cli("server", "--root", tmp_path, "--listen", "127.0.0.1:0", *options)
    assert refused.returncode == 2
    assert line in one_line(refused.stderr)


def test_without_peers_there_is_no_tracker(run_cli: RunCli, tmp_path: Any) -> None:
    with running_server(tmp_path, "--no-p2p") as server:
        refused = run_cli("swarm", "--tracker", server.url, "--cluster-key", server.key_file)
        assert refused.returncode == 3
        assert "has no tracker" in one_line(refused.stderr)
        assert run_cli("images", "--origin", server.url, "--cluster-key", server.key_file).returncode == 0


@pytest.mark.parametrize(("url", "code"), [("http://127.0.0.1:9", 5), ("ftp://x", 2), ("http://:80", 2), ("nodes", 2)])
def test_a_tracker_that_is_none_is_said_so_in_one_line(run_cli: RunCli, url: str, code: int) -> None:
    refused = run_cli("swarm", "--tracker", url)
    assert refused.returncode == code
    one_line(refused.stderr)
