"""An image server and compute nodes for a benchmark: the real programs, in temporary directories, as processes.

Everything started here is ended when its `with` block is left, in whatever way.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vmthunder.bench.link import FAR_ADDRESS, Link
from vmthunder.bench.processes import VMTHUNDER, Process, finish
from vmthunder.errors import AgentUnavailable
from vmthunder.lab.cluster import Host
from vmthunder.node.control import AgentClient
from vmthunder.node.settings import control_socket

_START_S = 60.0
_PUBLISH_S = 3600.0
_LISTENING = "listening on "


@dataclass
class Node:
    """A compute node."""

    process: Process
    client: AgentClient
    start: Callable[[], Process]

    def wait(self) -> None:
        """Until it serves. Raises Failure."""
        self.process.wait_until(partial(_serves, self.client), _START_S)

    def kill_and_start(self) -> None:
        """Keeper and worker die together; a new agent begins with what they left on disk."""
        self.process.kill()
        self.process = self.start()


def publish(source: Path, name: str, origin: Path, *options: str) -> None:
    """Publish a raw file as an image of a directory origin. Raises Failure."""
    log = origin.with_name(f"{origin.name}-publish.log")
    argv = [*VMTHUNDER, "publish", str(source), name, "--origin", str(origin), "--format", "raw", *options]
    finish("publish", argv, log, _PUBLISH_S)


@contextmanager
def image_server(origin: Path, link: Link | None = None) -> Iterator[tuple[str, Process]]:
    """Serve a directory origin over HTTP, on loopback or at the far end of a link; gives its URL."""
    address = FAR_ADDRESS if link else "127.0.0.1"
    log = origin.with_name(f"{origin.name}-server-{address}.log")
    # Whatever this machine's cluster key is, it has nothing to do with a benchmark.
    argv = [
        *VMTHUNDER,
        "server",
        f"--root={origin}",
        f"--listen={address}:0",
        f"--cluster-key={_key_file(origin)}",
        "--no-p2p",
    ]
    start = partial(Process, "image server", argv, log)
    process = link.far.run(start) if link else start()
    try:
        process.wait_until(lambda: _LISTENING in log.read_text(), _START_S)
        yield log.read_text().partition(_LISTENING)[2].split()[0], process
    finally:
        process.stop()


@contextmanager
def compute_node(origin_url: str, directory: Path, cache_bytes: int) -> Iterator[Node]:
    """Run an agent that keeps all it has in `directory`, which is removed at the end. It reads nothing unasked."""
    key = f"--cluster-key={_key_file(directory)}"
    with starting_node(origin_url, directory, cache_bytes, key, "--no-p2p", "--no-prefetch") as node:
        node.wait()
        yield node


@contextmanager
def starting_node(
    origin_url: str, directory: Path, cache_bytes: int, *options: str, host: Host | None = None
) -> Iterator[Node]:
    """The same, given before it serves, so that several can start together; on a host of a cluster if one is given."""
    directory.mkdir(parents=True)
    try:
        # A run directory of its own: a path to a unix socket must be short, and `directory` may be anywhere.
        with tempfile.TemporaryDirectory(prefix="vmthunder-") as run_dir:
            argv = [
                *VMTHUNDER,
                "agent",
                f"--origin={origin_url}",
                f"--mount={directory / 'images'}",
                f"--state-dir={directory / 'state'}",
                f"--run-dir={run_dir}",
                f"--cache-size={cache_bytes}",
                *options,
            ]
            start = partial(Process, "agent", argv, directory / "agent.log")
            begin = partial(host.run, start) if host else start
            node = Node(begin(), AgentClient(control_socket(Path(run_dir))), begin)
            try:
                yield node
            finally:
                node.process.stop()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _key_file(beside: Path) -> Path:
    """Made by the image server, whose nodes have their directories beside its own."""
    return beside.with_name("cluster.key")


def _serves(client: AgentClient) -> bool:
    try:
        client.status()
    except AgentUnavailable:
        return False
    return True
