"""The cluster key, and who is let in with it."""

import http.client
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import RunCli, one_line
from tracker_server import Server, running_server
from vmthunder.errors import CorruptFile, NotFound, NotPermitted, VMThunderError
from vmthunder.ids import NodeId
from vmthunder.peer.key import cluster_key
from vmthunder.swarm.key import NONCE_BYTES, ClusterKey

HEX = "0f" * 32


def write(path: Path, content: str | bytes, mode: int = 0o600) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    path.chmod(mode)
    return path


def test_a_key_that_was_made_is_private_and_found_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "cluster.key"
    made = ClusterKey.load_or_create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(made.secret) == 32
    assert ClusterKey.load_or_create(path) == made
    assert [file.name for file in path.parent.iterdir()] == ["cluster.key"]


def test_who_makes_the_key_at_the_same_time_gets_the_same(tmp_path: Path) -> None:
    found: list[ClusterKey] = []
    barrier = threading.Barrier(8)

    def make() -> None:
        barrier.wait()
        found.append(ClusterKey.load_or_create(tmp_path / "key"))

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1


@pytest.mark.parametrize(
    ("content", "mode", "error"),
    [
        (HEX, 0o640, NotPermitted),
        (HEX, 0o604, NotPermitted),
        ("", 0o600, CorruptFile),
        (HEX[:-1], 0o600, CorruptFile),
        (HEX + "0", 0o600, CorruptFile),
        (HEX.upper(), 0o600, CorruptFile),
        (b"\xff" * 64, 0o600, CorruptFile),
        (HEX + "\n" * 1000, 0o600, CorruptFile),
    ],
)
def test_a_key_file_that_is_wrong_or_open_to_others_is_refused(
    tmp_path: Path, content: str | bytes, mode: int, error: type[VMThunderError]
) -> None:
    with pytest.raises(error) as raised:
        ClusterKey.load(write(tmp_path / "key", content, mode))
    assert str(tmp_path / "key") in one_line(str(raised.value))


def test_a_key_file_that_is_not_there_or_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        ClusterKey.load(tmp_path / "key")
    with pytest.raises(NotPermitted):
        ClusterKey.load(tmp_path)


def test_what_is_derived_from_the_key_does_not_tell_it_and_the_key_does_not_print(tmp_path: Path) -> None:
    key = ClusterKey.load(write(tmp_path / "key", HEX + "\n"))
    mac = key.order_mac(NodeId(bytes(16)), bytes(NONCE_BYTES), "GET", "/vms", bytes(32))
    secrets = {key.secret.hex(), key.token, mac.hex(), cluster_key(key.secret).hex()}
    assert len(secrets) == 4
    assert not any(secret in f"{key} {key!r}" for secret in secrets)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(tmp_path_factory.mktemp("server")) as server:
        yield server


def status(server: Server, path: str, authorization: str | None, body: bytes = b"") -> int:
    connection = http.client.HTTPConnection("127.0.0.1", int(server.url.rpartition(":")[2]), timeout=10)
    headers = {} if authorization is None else {"Authorization": authorization}
    connection.request("POST" if body else "GET", path, body, headers)
    answer = connection.getresponse().status
    connection.close()
    return answer


def test_the_first_start_makes_a_key_and_says_where(server: Server) -> None:
    assert len(server.key.secret) == 32
    assert f"nodes need a copy of the cluster key, {server.key_file}" in server.log


@pytest.mark.parametrize("path", ["/images.json", "/swarm", "/refs/debian-12", "/nothing"])
def test_nobody_without_the_key_is_answered(server: Server, path: str) -> None:
    right = f"Bearer {server.key.token}"
    wrong = [None, "", "Bearer", "Bearer ", right[:-1], right + "0", right.lower(), "Basic " + right[7:], "Bearer \xff"]
    assert {status(server, path, authorization) for authorization in wrong} == {401}
    assert status(server, path, right) != 401


def test_whether_the_server_lives_is_told_to_anybody(server: Server) -> None:
    assert status(server, "/healthz", None) == 200


def test_who_is_refused_is_logged_once(server: Server) -> None:
    for _ in range(5):
        status(server, "/swarm", "Bearer no")
    assert sum("event=refused address=127.0.0.1" in line for line in server.log.splitlines()) == 1


@pytest.mark.parametrize("command", [("images", "--origin"), ("verify", "x", "--origin"), ("swarm", "--tracker")])
def test_a_command_with_the_wrong_key_says_so_in_one_line(
    server: Server, run_cli: RunCli, tmp_path: Path, command: tuple[str, ...]
) -> None:
    other = write(tmp_path / "other.key", HEX)
    refused = run_cli(*command, server.url, "--cluster-key", other)
    assert refused.returncode == 7
    assert one_line(refused.stderr).endswith("wants the cluster key of that server; give it with --cluster-key")
    assert run_cli(*command, server.url, "--cluster-key", server.key_file).returncode in (0, 3)


def test_an_agent_with_the_wrong_key_does_not_start(server: Server, run_cli: RunCli, tmp_path: Path) -> None:
    other = write(tmp_path / "other.key", HEX)
    places = [f"--{place}-dir={tmp_path / place}" for place in ("state", "run")]
    refused = run_cli("agent", "--detach", "--origin", server.url, "--cluster-key", other, *places)
    assert refused.returncode == 7
    assert "wants the cluster key" in one_line(refused.stderr)


def test_beyond_loopback_the_server_wants_a_key_that_it_can_make(run_cli: RunCli, tmp_path: Path) -> None:
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        arguments = ("server", "--root", tmp_path, "--listen", f"0.0.0.0:{port}", "--cluster-key")
        refused = run_cli(*arguments, "/proc/cluster.key")
        assert "cannot be made" in one_line(refused.stderr)
        # With a key it goes on, to find that the port is taken.
        made = run_cli(*arguments, tmp_path / "key")
        assert made.returncode == 8
        one_line(made.stderr)
    assert ClusterKey.load(tmp_path / "key")


def test_on_loopback_without_a_key_everybody_is_answered(run_cli: RunCli, tmp_path: Path) -> None:
    with running_server(tmp_path, with_key=False) as server:
        assert status(server, "/swarm", None) == 200
        assert run_cli("images", "--origin", server.url).returncode == 0
