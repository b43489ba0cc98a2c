import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import RunCli, one_line
from vmthunder.errors import Conflict, NotFound, Usage
from vmthunder.lab.cluster import Cluster, clusters, remove_cluster
from vmthunder.lab.shaping import Rate

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")

SENT_BYTES = 8 << 20
SEND = f"""
import socket
listener = socket.create_server(("0.0.0.0", 7000))
print("ready", flush=True)
connection, _ = listener.accept()
connection.sendall(bytes({SENT_BYTES}))
"""
RECEIVE = """
import socket, sys
connection = socket.create_connection((sys.argv[1], 7000))
while connection.recv(1 << 20):
    pass
"""
KNOCK = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], 7001), timeout=0.5)
except ConnectionRefusedError:
    pass  # somebody is there, though nobody listens
except OSError:
    sys.exit(1)
"""


@pytest.fixture
def name() -> Iterator[str]:
    chosen = f"t{os.getpid()}"
    yield chosen
    if chosen in clusters():
        remove_cluster(chosen)


def test_bytes_cross_a_shaped_link_at_its_rate_and_are_counted(name: str) -> None:
    cluster = Cluster.create(name, 2, Rate.parse("100mbit"))
    sender = cluster.origin.start([sys.executable, "-c", SEND], stdout=subprocess.PIPE)
    assert sender.stdout is not None
    assert sender.stdout.readline() == b"ready\n"
    begin_s = time.monotonic()
    receiver = cluster.nodes[1].start([sys.executable, "-c", RECEIVE, cluster.origin.address])
    assert receiver.wait(timeout=30) == 0
    took_s = time.monotonic() - begin_s
    sender.wait(timeout=10)
    sender.stdout.close()
    # The bucket lets a little through at once; on a busy machine it takes longer, never shorter.
    assert took_s > SENT_BYTES * 8 / 100e6 * 0.9
    counters = cluster.counters()
    assert counters["origin"].sent_bytes > SENT_BYTES
    assert counters["node2"].received_bytes > SENT_BYTES
    assert counters["node1"].received_bytes < 1 << 20
    cluster.remove()


def test_removing_a_cluster_ends_its_processes_and_leaves_nothing(name: str) -> None:
    cluster = Cluster.create(name, 1, None)
    # One that ends when asked, and one that does not.
    polite = cluster.nodes[0].start(["sleep", "1000"])
    stubborn = cluster.nodes[0].start([sys.executable, "-c", "import signal; signal.signal(15, 1); signal.pause()"])
    links_before = socket.if_nameindex()
    cluster.remove()
    assert polite.wait(timeout=5) == -15
    assert stubborn.wait(timeout=15) in (-9, -15)
    assert name not in clusters()
    assert not list(Path("/run/netns").glob(f"vmthunder-{name}-*"))
    assert socket.if_nameindex() == links_before


def test_what_a_crash_left_is_found_by_name(name: str) -> None:
    Cluster.create(name, 2, None).close()
    subprocess.run(["ip", "netns", "delete", f"vmthunder-{name}-node1"], check=True)
    with pytest.raises(NotFound):
        Cluster(name)
    with pytest.raises(Conflict, match="lab down"):
        Cluster.create(name, 2, None)
    remove_cluster(name)
    assert name not in clusters()


@pytest.mark.parametrize("bad", ["", "a-b", "a/b", "ü", "x" * 21])
def test_impossible_names_are_refused(bad: str) -> None:
    with pytest.raises(Usage):
        Cluster.create(bad, 1, None)


def test_the_command_line_makes_shows_and_ends_a_cluster(name: str, run_cli: RunCli) -> None:
    assert run_cli("lab", "up", "--nodes", 2, "--rate", "1gbit", "--name", name).returncode == 0
    inside = run_cli("lab", "exec", "--name", name, "node2", "--", "ip", "-4", "-o", "addr", "show", "eth0")
    assert "198.18.0.3/15" in inside.stdout
    assert '"host": "node2"' in run_cli("lab", "status", "--name", name, "--json").stdout
    stranger = run_cli("lab", "exec", "--name", name, "node7", "--", "true")
    assert stranger.returncode == 3
    assert "node1 to node2" in one_line(stranger.stderr)
    assert run_cli("lab", "down", "--name", name).returncode == 0
    gone = run_cli("lab", "down", "--name", name)
    assert gone.returncode == 3
    assert name in one_line(gone.stderr)


def test_a_cluster_that_is_parted_is_silent_across_and_not_within_and_heals(name: str) -> None:
    cluster = Cluster.create(name, 3, None)

    def reaches(host: int, other: int) -> bool:
        trying = cluster.nodes[host].start([sys.executable, "-c", KNOCK, cluster.nodes[other].address])
        return trying.wait(timeout=10) == 0

    assert reaches(0, 1)
    for _ in range(2):
        cluster.part(cluster.nodes[1:])
        assert not reaches(0, 1)
        assert reaches(1, 2)
        cluster.heal()
        assert reaches(0, 1)
    cluster.remove()
