import http.client
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import RunCli, one_line

PACK_CD = "cd" * 32
PACK, LINK, DIRECTORY, FIFO = "ab" * 32, "11" * 32, "22" * 32, "33" * 32
BODY = os.urandom(3_000_000)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("origin")
    for name in ("refs", "packs/ab", "locks", "manifests"):
        (root / name).mkdir(parents=True)
    (root / f"packs/ab/{PACK}").write_bytes(BODY)
    (root / "locks/publish-1").write_bytes(b"secret")
    (root / f"manifests/{LINK}").symlink_to("/etc/passwd")
    (root / f"manifests/{DIRECTORY}").mkdir()
    (root / "packs/cd").symlink_to(root / "packs/ab")
    (root / f"packs/ab/{PACK_CD}").write_bytes(b"behind a linked directory")
    os.mkfifo(root / f"manifests/{FIFO}")
    return root


@pytest.fixture(scope="module")
def port(root: Path) -> Iterator[int]:
    server = subprocess.Popen(
        [sys.executable, "-m", "vmthunder", "server", "--root", str(root), "--listen", "127.0.0.1:0"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    line = server.stdout.readline()
    assert line.startswith("listening on http://127.0.0.1:")
    yield int(line.rpartition(":")[2])
    server.send_signal(signal.SIGTERM)
    assert server.wait(timeout=10) == 0
    server.stdout.close()


def ask(port: int, path: str, method: str = "GET", **headers: str) -> tuple[int, bytes, http.client.HTTPMessage]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path, headers=headers)
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response.status, body, response.headers


@pytest.mark.parametrize(
    ("header", "begin", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=10-19", 10, 20),
        ("bytes=2999990-", 2_999_990, 3_000_000),
        ("bytes=-5", 2_999_995, 3_000_000),
    ],
)
def test_a_range_is_answered_with_those_bytes(port: int, header: str, begin: int, end: int) -> None:
    status, body, headers = ask(port, f"/packs/ab/{PACK}", Range=header)
    assert (status, body) == (206, BODY[begin:end])
    assert headers["Content-Range"] == f"bytes {begin}-{end - 1}/{len(BODY)}"


@pytest.mark.parametrize("header", ["", "bytes=", "bytes=-", "bytes=5-3", "bytes=0-1,3-4", "lines=1-2", "bytes=a-b"])
def test_what_is_no_single_range_gives_the_whole(port: int, header: str) -> None:
    status, body, _ = ask(port, f"/packs/ab/{PACK}", Range=header)
    assert (status, body == BODY) == (200, True)


def test_a_range_behind_the_end_cannot_be_satisfied(port: int) -> None:
    status, _, headers = ask(port, f"/packs/ab/{PACK}", Range="bytes=3000000-")
    assert (status, headers["Content-Range"]) == (416, f"bytes */{len(BODY)}")


def test_head_gives_the_length_only(port: int) -> None:
    status, body, headers = ask(port, f"/packs/ab/{PACK}", "HEAD")
    assert (status, body, headers["Content-Length"]) == (200, b"", str(len(BODY)))


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/locks/publish-1",
        "/refs/../locks/publish-1",
        "/refs/%2e%2e/locks/publish-1",
        "/refs/..%2flocks%2fpublish-1",
        "//etc/passwd",
        f"/manifests/{LINK}",
        f"/manifests/{DIRECTORY}",
        f"/manifests/{FIFO}",
        "/refs/",
        "/refs/none",
        f"/packs/cd/{PACK}",
        f"/packs/cd/{PACK_CD}",
        f"/packs/ab/{PACK.upper()}",
        f"/manifests/{PACK}",
        "/refs/" + "x" * 5000,
    ],
)
def test_nothing_else_can_be_named(port: int, path: str) -> None:
    assert ask(port, path)[0] == 404


def test_nothing_can_be_written(port: int) -> None:
    for method in ("PUT", "POST", "DELETE"):
        assert ask(port, "/refs/new", method)[0] == 405


def test_a_damaged_ref_does_not_take_the_server_down(port: int, root: Path) -> None:
    (root / "refs/damaged").write_bytes(b"?")
    status, body, _ = ask(port, "/images.json")
    (root / "refs/damaged").unlink()
    assert (status, b"damaged" in body) == (503, True)
    assert ask(port, "/images.json")[:2] == (200, b"{}\n")
    assert ask(port, "/healthz")[:2] == (200, b"ok\n")


def test_a_port_in_use_is_one_line(root: Path, run_cli: RunCli) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run_cli("server", "--root", root, "--listen", f"127.0.0.1:{taken.getsockname()[1]}")
    assert done.returncode == 8
    assert "in use" in one_line(done.stderr)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--root", "/nowhere/at/all"], 3, "no origin at /nowhere/at/all"),
        (["--root", "/tmp", "--listen", "x"], 2, "ADDRESS:PORT"),
        (["--root", "/tmp", "--listen", "127.0.0.1:99999"], 2, "ADDRESS:PORT"),
        (["--root", "/tmp", "--listen", "203.0.113.7:0"], 2, "cannot listen on 203.0.113.7"),
    ],
)
def test_bad_options_are_one_line(arguments: list[str], code: int, says: str, run_cli: RunCli, tmp_path: Path) -> None:
    done = run_cli("server", *arguments, "--cluster-key", tmp_path / "key")
    assert done.returncode == code
    assert says in one_line(done.stderr)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["images", "--origin", "/nowhere"], 3, "/nowhere"),
        (["images", "--origin", "ftp://x/y"], 2, "ftp://x/y"),
        (["images", "--origin", "http://127.0.0.1:9"], 5, "127.0.0.1:9"),
        (["rm", "nothing", "--origin", "{root}"], 3, "nothing"),
        (["rm", "../x", "--origin", "{root}"], 2, "../x"),
        (["rm", "ü", "--origin", "{root}"], 2, "ü"),
        (["verify", "x" * 300, "--origin", "{root}"], 2, "300 characters"),
        (["verify", "a/b", "--origin", "{root}"], 2, "a/b"),
        (["verify", "nothing", "--origin", "{root}"], 3, "nothing"),
    ],
)
def test_bad_input_of_the_image_commands_is_one_line(
    arguments: list[str], code: int, says: str, root: Path, run_cli: RunCli
) -> None:
    done = run_cli(*(argument.replace("{root}", str(root)) for argument in arguments))
    assert done.returncode == code
    assert says in one_line(done.stderr)
    assert len(one_line(done.stderr)) < 300
