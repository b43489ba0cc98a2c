"""`bench spread`: every node reads the whole image at once, over links of a stated rate, and is held against the bound.

The bound (Mundinger, Weber, Weiss, "Optimal scheduling of peer-to-peer file dissemination", 2008): with F bytes in M parts,
and uplinks of u bytes/s at the origin and at each of N nodes, nobody can do better than (F/u)(1 + ⌊log2 N⌋/M).
"""

import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from vmthunder.bench.disk import empty_disk
from vmthunder.bench.fleet import fleet, serving
from vmthunder.bench.machine import facts
from vmthunder.bench.namespaces import isolate_mounts
from vmthunder.bench.node import publish
from vmthunder.bench.processes import cpu_s
from vmthunder.bench.rows import Round, medians, rounded
from vmthunder.errors import Failure, Usage
from vmthunder.lab.cluster import Cluster
from vmthunder.lab.shaping import Rate

OURS: Final = "vmthunder"
TREE: Final = "one binary tree (2014)"
ALONE: Final = "no peer to peer"

CHUNK_BYTES: Final = 64 << 10
_IMAGE = "sample"
_READ_S = 1800.0
_SPARE_BYTES: Final = 4 << 30
"""Of the disk, for its own tables and our logs. It is a sparse file."""
# Several readers per node keep enough under way that the links are the limit, not one reader's read-ahead.
_READER = """
import os, sys, threading
path, readers, part = sys.argv[1], int(sys.argv[2]), 1 << 20
fd = os.open(path, os.O_RDONLY)
size = os.fstat(fd).st_size
parts = iter(range(0, size, part))
lock = threading.Lock()
def work():
    buffer = bytearray(part)
    while True:
        with lock:
            at = next(parts, None)
        if at is None:
            return
        if os.preadv(fd, [buffer], at) != min(part, size - at):
            os._exit(1)
threads = [threading.Thread(target=work) for _ in range(readers)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""
_READERS = 4

Say = Callable[[str], None]


@dataclass(frozen=True)
class Variant:
    """One row: options of the server and of the agents."""

    name: str
    server: tuple[str, ...] = ()
    agent: tuple[str, ...] = ()


def bound_s(size_bytes: int, parts: int, nodes: int, bytes_s: float) -> float:
    """The least time in which `nodes` nodes can have `size_bytes` bytes in `parts` parts."""
    return size_bytes / bytes_s * (1 + (nodes.bit_length() - 1) / parts)


def bench_spread(
    nodes: int, rate: Rate, size_bytes: int, rounds: int, variants: Sequence[Variant], directory: Path | None, say: Say
) -> dict[str, Any]:
    """Run the benchmark; returns `rows` and `machine`.

    Raises:
        Usage, NotPermitted (not root), Failure.
    """
    if size_bytes < 1 << 20 or size_bytes % CHUNK_BYTES:
        raise Usage("the image has at least 1 MiB and is a multiple of 64 KiB")
    measured: list[Round] = []
    isolate_mounts()
    # The image, the origin's copy and one for each node, of the current round and, not deleted yet, of the last.
    with empty_disk(directory, (2 * nodes + 3) * size_bytes + _SPARE_BYTES, say) as work:
        say(f"publishing {size_bytes >> 20} MiB of data that does not shrink")
        raw, origin = work / "disk.raw", work / "origin"
        raw.write_bytes(random.Random(1).randbytes(size_bytes))
        publish(raw, _IMAGE, origin)
        for number in range(rounds):
            figures = {}
            for variant in variants:
                say(f"round {number + 1} of {rounds}: {variant.name}")
                with tempfile.TemporaryDirectory(dir=work) as scratch:
                    figures[variant.name] = _measure(nodes, rate, size_bytes, origin, variant, Path(scratch))
            measured.append(figures)
    rows = []
    for variant in variants:
        found = medians(measured, variant.name)
        rows.append({"name": variant.name, "nodes": nodes, **{key: rounded(value, 4) for key, value in found.items()}})
    machine = facts() | {"nodes": nodes, "rate": rate.text, "size_bytes": size_bytes, "rounds": rounds}
    return {**rows[0], "rows": rows, "machine": machine}


def _measure(nodes: int, rate: Rate, size_bytes: int, origin: Path, variant: Variant, work: Path) -> dict[str, float]:
    cluster = Cluster.create(f"bench{os.getpid()}", nodes, rate)
    try:
        with (
            serving(cluster, origin, work, *variant.server) as server,
            fleet(cluster.nodes, server.url, work, 2 * size_bytes, *variant.agent) as agents,
        ):
            paths = [Path(node.client.resolve(_IMAGE)["path"]) for node in agents]
            before, cpu_before_s = cluster.counters(), cpu_s(node.process.pid for node in agents)
            took_s = _read_all(paths)
            after, cpu_after_s = cluster.counters(), cpu_s(node.process.pid for node in agents)
            sent = {name: after[name].sent_bytes - before[name].sent_bytes for name in after}
            received = {name: after[name].received_bytes - before[name].received_bytes for name in after}
            status = [node.client.status()["fetch"] for node in agents]
            least_s = bound_s(size_bytes, size_bytes // CHUNK_BYTES, nodes, rate.bytes_s)
            return {
                "time_s": took_s,
                "bound_s": least_s,
                "time_over_bound": took_s / least_s,
                "origin_over_unique": sum(each["bytes_from_origin"] for each in status) / size_bytes,
                "max_upload_over_download": max(sent[host.name] / received[host.name] for host in cluster.nodes),
                "agent_cpu_s_per_gb": (cpu_after_s - cpu_before_s) / (nodes * size_bytes / 1e9),
                "bytes_from_peers": sum(each["bytes_from_peers"] for each in status),
                "origin_sent_bytes": sent["origin"],
            }
    finally:
        cluster.remove()


def _read_all(paths: Sequence[Path]) -> float:
    """Seconds until the last node has read everything."""
    begin_s = time.monotonic()
    readers = [
        subprocess.Popen([sys.executable, "-c", _READER, str(path), str(_READERS)], stdin=subprocess.DEVNULL)
        for path in paths
    ]
    try:
        for reader in readers:
            if reader.wait(timeout=max(0.1, begin_s + _READ_S - time.monotonic())):
                raise Failure("a reader failed; the agent's log says why")
    except subprocess.TimeoutExpired:
        raise Failure(f"a node had not read the image after {_READ_S:.0f} s") from None
    finally:
        for reader in readers:
            reader.kill()
            reader.wait()
    return time.monotonic() - begin_s
