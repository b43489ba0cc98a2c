"""A real `vmthunder server` process on loopback, to be killed and started again at the same port."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conftest import VMTHUNDER
from vmthunder.swarm.key import ClusterKey


class Server:
    """Serves `directory/origin`, and the tracker. It makes its key when it starts for the first time."""

    def __init__(self, directory: Path, *options: str, with_key: bool = True) -> None:
        self.root = directory / "origin"
        self.root.mkdir(exist_ok=True)
        self.key_file = directory / "cluster.key"
        self.log_file = directory / "server.log"
        self.url = ""
        self._port = 0
        self._options = [*options, *([f"--cluster-key={self.key_file}"] if with_key else [])]
        self._process: subprocess.Popen[str] | None = None

    @property
    def key(self) -> ClusterKey:
        return ClusterKey.load(self.key_file)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def start(self) -> None:
        with self.log_file.open("a") as log:
            self._process = subprocess.Popen(
                [*VMTHUNDER, "server", f"--root={self.root}", f"--listen=127.0.0.1:{self._port}", *self._options],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line.startswith("listening on http://"), line + self.log
        self.url = line.split()[-1]
        self._port = int(line.rpartition(":")[2])

    def terminate(self) -> None:
        assert self._process is not None
        self._process.terminate()
        self._process.communicate()
        self._process = None

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


@contextmanager
def running_server(directory: Path, *options: str, with_key: bool = True) -> Iterator[Server]:
    """A server that runs, and is killed at the end."""
    server = Server(directory, *options, with_key=with_key)
    try:
        server.start()
        yield server
    finally:
        server.kill()
