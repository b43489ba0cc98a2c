"""One origin of each kind, empty, with a way to write to it."""

import asyncio
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import ProxyHandler, Request, build_opener

import pytest

from vmthunder.origin.origin import Origin

START_S = 30.0


@dataclass
class Place:
    """The same images, seen for reading and for writing."""

    reader: str
    writer: str

    def open(self) -> Origin:
        return Origin.open(self.reader)

    def open_writer(self) -> Origin:
        return Origin.open(self.writer)


@pytest.fixture(scope="session")
def s3_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real S3 server process on loopback."""
    log = tmp_path_factory.mktemp("s3") / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        deadline_s = time.monotonic() + START_S
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline_s, log.read_text()
            time.sleep(0.05)
        yield found[0]
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def s3_bucket(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    bucket = f"images-{os.getpid()}-{abs(hash(tmp_path)) % 10**8}"
    try:
        build_opener(ProxyHandler({})).open(Request(f"{s3_endpoint}/{bucket}", method="PUT"), timeout=10).close()
    except URLError as error:
        raise AssertionError(f"no bucket: {error}") from error
    return f"s3://{bucket}/prefix"


@pytest.fixture(scope="session")
def http_origin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A directory and its server process, which is also told to end."""
    root = tmp_path_factory.mktemp("served")
    server = subprocess.Popen(
        [sys.executable, "-m", "vmthunder", "server", "--root", str(root), "--listen", "127.0.0.1:0"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    try:
        yield Place(server.stdout.readline().split()[-1], str(root))
    finally:
        server.terminate()
        assert server.wait(timeout=10) == 0
        server.stdout.close()


@pytest.fixture(params=["directory", "s3", "http"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "s3":
        url = request.getfixturevalue("s3_bucket")
        return Place(url, url)
    if request.param == "directory":
        return Place(str(tmp_path), str(tmp_path))
    served: Place = request.getfixturevalue("http_origin")
    for left in Path(served.writer).iterdir():
        shutil.rmtree(left)
    return served


@pytest.fixture
def run() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner
