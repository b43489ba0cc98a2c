"""Fixtures of the tests of publishing."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from publish.disks import Publish


@pytest.fixture
def start_publish() -> Iterator[Callable[..., Publish]]:
    started: list[Publish] = []

    def start(*args: object, **kwargs: object) -> Publish:
        started.append(Publish(*args, **kwargs))  # type: ignore[arg-type]
        return started[-1]

    yield start
    for each in started:
        if each.process.poll() is None:
            each.process.kill()
        each.process.communicate()


@pytest.fixture(autouse=True)
def own_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What publishes remember of an origin goes with the origin, and what they leave behind is found."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(scratch))


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    path = tmp_path / "origin"
    path.mkdir()
    return path


class _Web(SimpleHTTPRequestHandler):
    """Files of a directory, and two things that go wrong."""

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/short":
            self.send_response(200)
            self.send_header("Content-Length", "1000000")
            self.end_headers()
            self.wfile.write(bytes(5000))
        elif self.path == "/secret":
            self.send_error(403)
        else:
            super().do_GET()


@pytest.fixture
def serve() -> Iterator[Callable[[Path], str]]:
    """Show a directory on a web server; returns its URL."""
    with ExitStack() as cleanup:

        def start(directory: Path) -> str:
            server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Web, directory=str(directory)))
            server.handle_error = lambda *_: None  # a client that went away
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
            thread.start()
            cleanup.callback(server.server_close)
            cleanup.callback(thread.join)
            cleanup.callback(server.shutdown)
            return f"http://127.0.0.1:{server.server_port}"

        yield start
