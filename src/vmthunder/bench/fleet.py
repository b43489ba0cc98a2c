"""An image server and a node on each host of a lab cluster: the real programs, as processes in their namespaces.

Everything started here is ended when its `with` block is left, in whatever way.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Final

from vmthunder.bench.node import Node, starting_node
from vmthunder.bench.processes import VMTHUNDER, Process
from vmthunder.lab.cluster import Cluster, Host

SERVER_PORT: Final = 8930
_START_S = 60.0


class Server:
    """An image server on the cluster's origin. Makes the cluster key `work`/cluster.key if it is not there."""

    def __init__(self, cluster: Cluster, root: Path, work: Path, *options: str, port: int = SERVER_PORT) -> None:
        self.url: Final = f"http://{cluster.origin.address}:{port}"
        self._log = work / f"server-{port}.log"
        argv = [
            *VMTHUNDER,
            "server",
            f"--root={root}",
            f"--listen={cluster.origin.address}:{port}",
            f"--cluster-key={work / 'cluster.key'}",
            *options,
        ]
        self._start = partial(cluster.origin.run, partial(Process, "image server", argv, self._log))
        self.process = self._start()

    def wait(self) -> None:
        """Until it serves. Raises Failure."""
        self.process.wait_until(lambda: "listening on " in self._log.read_text(), _START_S)

    def start(self) -> None:
        """Begin again, after its process was killed. Raises Failure."""
        self.process = self._start()
        self.wait()


@contextmanager
def serving(cluster: Cluster, root: Path, work: Path, *options: str, port: int = SERVER_PORT) -> Iterator[Server]:
    """A server for the length of a `with` block, once it serves."""
    server = Server(cluster, root, work, *options, port=port)
    try:
        server.wait()
        yield server
    finally:
        server.process.stop()


@contextmanager
def fleet(hosts: Sequence[Host], url: str, work: Path, cache_bytes: int, *options: str) -> Iterator[list[Node]]:
    """An agent on each host, all started at once; gives them when all serve."""
    key = f"--cluster-key={work / 'cluster.key'}"
    with ExitStack() as stack:
        nodes = [
            stack.enter_context(starting_node(url, work / host.name, cache_bytes, key, *options, host=host))
            for host in hosts
        ]
        for node in nodes:
            node.wait()
        yield nodes
