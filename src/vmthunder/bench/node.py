"""An image server and compute nodes for a benchmark: the real programs, in temporary directories, as processes.

Everything started here is ended when its `with` block is left, in whatever way.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vmthunder.bench.link import FAR_ADDRESS, Link
from vmthunder.bench.processes import VMTHUNDER, Process, finish, running
from vmthunder.errors import AgentUnavailable
from vmthunder.node.control import AgentClient
from vmthunder.node.settings import control_socket

_START_S = 30.0
_PUBLISH_S = 3600.0
_LISTENING = "listening on "


@dataclass(frozen=True)
class Node:
    """A compute node whose agent serves."""

    process: Process
    client: AgentClient


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
    """Run an agent that keeps all it has in `directory`, which is removed at the end."""
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
                f"--cluster-key={_key_file(directory)}",
                "--no-p2p",
            ]
            client = AgentClient(control_socket(Path(run_dir)))
            with running("agent", argv, directory / "agent.log") as process:
                process.wait_until(partial(_serves, client), _START_S)
                yield Node(process, client)
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
