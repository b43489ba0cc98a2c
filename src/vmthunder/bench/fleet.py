"""An image server and a node on each host of a lab cluster: the real programs, as processes in their namespaces.

Everything started here is ended when its `with` block is left, in whatever way.
"""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Final

from vmthunder.bench.node import Node
from vmthunder.bench.processes import VMTHUNDER, Process
from vmthunder.errors import AgentUnavailable
from vmthunder.lab.cluster import Cluster, Host
from vmthunder.node.control import AgentClient
from vmthunder.node.settings import control_socket

SERVER_PORT: Final = 8930
_START_S = 60.0


@contextmanager
def serving(cluster: Cluster, root: Path, work: Path, *options: str) -> Iterator[str]:
    """The image server on the cluster's origin; gives its URL. Makes the cluster key `work`/cluster.key."""
    log = work / "server.log"
    argv = [
        *VMTHUNDER,
        "server",
        f"--root={root}",
        f"--listen={cluster.origin.address}:{SERVER_PORT}",
        f"--cluster-key={work / 'cluster.key'}",
        *options,
    ]
    server = cluster.origin.run(partial(Process, "image server", argv, log))
    try:
        server.wait_until(lambda: "listening on " in log.read_text(), _START_S)
        yield f"http://{cluster.origin.address}:{SERVER_PORT}"
    finally:
        server.stop()


@contextmanager
def fleet(hosts: Sequence[Host], url: str, work: Path, cache_bytes: int, *options: str) -> Iterator[list[Node]]:
    """An agent on each host, all started at once; gives them when all serve."""
    with ExitStack() as stack:
        nodes = [_start(host, url, work, cache_bytes, options, stack) for host in hosts]
        for node in nodes:
            node.process.wait_until(partial(_serves, node.client), _START_S)
        yield nodes


def _start(host: Host, url: str, work: Path, cache_bytes: int, options: Sequence[str], stack: ExitStack) -> Node:
    directory = work / host.name
    directory.mkdir()
    stack.callback(shutil.rmtree, directory, ignore_errors=True)
    argv = [
        *VMTHUNDER,
        "agent",
        f"--origin={url}",
        f"--cluster-key={work / 'cluster.key'}",
        f"--mount={directory / 'images'}",
        f"--state-dir={directory / 'state'}",
        f"--run-dir={directory / 'run'}",
        f"--cache-size={cache_bytes}",
        *options,
    ]
    process = host.run(partial(Process, f"agent of {host.name}", argv, directory / "agent.log"))
    stack.callback(process.stop)
    return Node(process, AgentClient(control_socket(directory / "run")), directory)


def _serves(client: AgentClient) -> bool:
    try:
        client.status()
    except AgentUnavailable:
        return False
    return True
