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


@contextmanager
def serving(cluster: Cluster, root: Path, work: Path, *options: str) -> Iterator[tuple[str, Process]]:
    """The image server on the cluster's origin, and its URL. Makes the cluster key `work`/cluster.key."""
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
        yield f"http://{cluster.origin.address}:{SERVER_PORT}", server
    finally:
        server.stop()


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
