"""The network of a cluster on one machine: N nodes and an origin as network namespaces on one bridge.

        origin ──┐
        node1  ──┤ bridge (in a namespace of its own)
        node2  ──┤
        …      ──┘

Each link is a veth pair with a token bucket at both ends. Nothing is in the machine's own network, and nothing is written
down: the namespaces' names are all there is to know, so `remove` finds whatever a crash has left.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from pyroute2 import IPRoute

from vmthunder.errors import Conflict, NotFound, Usage
from vmthunder.lab.namespaces import NAMED, NetworkNamespace, remove
from vmthunder.lab.shaping import Rate, shape

T = TypeVar("T")

MAX_NODES: Final = 1000
ORIGIN: Final = "origin"

_PREFIX = "vmthunder-"
_SWITCH = "switch"
_BRIDGE = "bridge"
_OTHER_BRIDGE = "bridge2"
_BASE = IPv4Address("198.18.0.1")
"""The origin's; nodes follow. 198.18.0.0/15 is the range for benchmarks (RFC 2544), routed by nobody."""
_PREFIX_BITS = 15
_END_S = 5.0


class LinkBytes(NamedTuple):
    """What a host has sent and received since its link was made, headers included."""

    sent_bytes: int
    received_bytes: int


class Host:
    """One machine of the cluster."""

    def __init__(self, cluster: str, name: str, number: int) -> None:
        self.name: Final = name
        self.address: Final = str(_BASE + number)
        self.namespace: Final = NetworkNamespace.open(_full(cluster, name))

    def run(self, action: Callable[[], T]) -> T:
        """Run `action` on a thread that sees this host's network."""
        return self.namespace.run(action)

    def start(self, argv: Sequence[str], **options: Any) -> "subprocess.Popen[bytes]":
        """Start a process on this host; `options` are Popen's."""
        return self.run(lambda: subprocess.Popen(argv, **options))

    def counters(self) -> LinkBytes:
        """Bytes over this host's link."""
        return self.run(_counters)


class Cluster:
    """A cluster that exists. `close` lets go of it, `remove` ends it."""

    def __init__(self, name: str) -> None:
        """Raises NotFound: no cluster has that name."""
        self.name: Final = name
        found = {path.name.removeprefix(_full(name, "")) for path in _namespaces(name)}
        count = len(found - {ORIGIN, _SWITCH})
        names = [ORIGIN, *(f"node{number}" for number in range(1, count + 1))]
        if not found.issuperset({_SWITCH, *names}):
            raise NotFound(f"no cluster {name!r} is up; make one with: vmthunder lab up")
        self.hosts: Final[Mapping[str, Host]] = {host: Host(name, host, number) for number, host in enumerate(names)}

    @classmethod
    def create(cls, name: str, nodes: int, rate: Rate | None, origin_rate: Rate | None = None) -> "Cluster":
        """Make a cluster; links are not shaped where the rate is None; `origin_rate` defaults to `rate`.

        Raises:
            Usage: name or number of nodes is not possible.
            Conflict: there is a cluster of that name, or what a crash left of one.
            NotPermitted: not root.
        """
        if not name.isascii() or not name.isalnum() or len(name) > 20:
            raise Usage(f"{name!r} is not a cluster name; use at most 20 letters and digits")
        if not 1 <= nodes <= MAX_NODES:
            raise Usage(f"a cluster of {nodes} nodes is not possible; use 1 to {MAX_NODES}")
        if _namespaces(name):
            raise Conflict(f"cluster {name!r} exists; end it with: vmthunder lab down --name {name}")
        try:
            switch = NetworkNamespace.create(_full(name, _SWITCH))
            bridge = switch.run(_make_bridge)
            for number, host in enumerate([ORIGIN, *(f"node{n}" for n in range(1, nodes + 1))]):
                namespace = NetworkNamespace.create(_full(name, host))
                host_rate = origin_rate or rate if host == ORIGIN else rate
                switch.run(partial(_make_port, bridge, host, namespace.fd, host_rate))
                namespace.run(partial(_configure, str(_BASE + number), host_rate))
                namespace.close()
            switch.close()
        except BaseException:
            remove_cluster(name)
            raise
        return cls(name)

    @property
    def origin(self) -> Host:
        """The host for the image server."""
        return self.hosts[ORIGIN]

    @property
    def nodes(self) -> list[Host]:
        """The compute nodes."""
        return [host for name, host in self.hosts.items() if name != ORIGIN]

    def host(self, name: str) -> Host:
        """`origin` or `nodeN`. Raises NotFound."""
        if name not in self.hosts:
            raise NotFound(
                f"no host {name!r} in cluster {self.name!r}; there are origin and node1 to node{len(self.nodes)}"
            )
        return self.hosts[name]

    def counters(self) -> dict[str, LinkBytes]:
        """Bytes over each host's link, from its interface's counters."""
        return {name: host.counters() for name, host in self.hosts.items()}

    def part(self, hosts: Sequence[Host]) -> None:
        """Cut some hosts off from the others, without a word to either side; among themselves they stay connected."""
        self._switch(partial(_plug, _OTHER_BRIDGE, [host.name for host in hosts]))

    def heal(self) -> None:
        """Connect all hosts again."""
        self._switch(partial(_plug, _BRIDGE, list(self.hosts)))

    def _switch(self, action: Callable[[], None]) -> None:
        switch = NetworkNamespace.open(_full(self.name, _SWITCH))
        try:
            switch.run(action)
        finally:
            switch.close()

    def close(self) -> None:
        """Let go of the cluster, which stays up."""
        for host in self.hosts.values():
            host.namespace.close()

    def remove(self) -> None:
        """End the cluster and all processes in it."""
        self.close()
        remove_cluster(self.name)


def clusters() -> list[str]:
    """Names of the clusters on this machine, with what crashes left of them."""
    return sorted({path.name.removeprefix(_PREFIX).partition("-")[0] for path in NAMED.glob(f"{_PREFIX}*-*")})


def remove_cluster(name: str) -> int:
    """End a cluster, whole or not, and the processes in it: SIGTERM, then SIGKILL. Returns how many processes.

    Raises:
        NotFound: there is nothing of that name.
    """
    paths = _namespaces(name)
    if not paths:
        raise NotFound(f"no cluster {name!r} is up")
    ended: set[int] = set()
    for path in paths:
        namespace = NetworkNamespace.open(path.name)
        try:
            _end(namespace, ended)
        finally:
            namespace.close()
        remove(path.name)
    return len(ended)


def _end(namespace: NetworkNamespace, ended: set[int]) -> None:
    deadline_s = time.monotonic() + _END_S
    while processes := namespace.processes():
        late = time.monotonic() > deadline_s
        for pid in processes:
            if late or pid not in ended:
                ended.add(pid)
                try:
                    os.kill(pid, signal.SIGKILL if late else signal.SIGTERM)
                except ProcessLookupError:
                    pass  # it ended by itself meanwhile
        if time.monotonic() > deadline_s + _END_S:
            return  # waits in the kernel; the namespace goes with it
        time.sleep(0.01)


def _full(cluster: str, host: str) -> str:
    return f"{_PREFIX}{cluster}-{host}"


def _namespaces(cluster: str) -> list[Path]:
    return sorted(NAMED.glob(_full(cluster, "*")))


def _make_bridge() -> int:
    with IPRoute() as netlink:
        return _add_bridge(netlink, _BRIDGE)


def _add_bridge(netlink: IPRoute, name: str) -> int:
    netlink.link("add", ifname=name, kind="bridge")
    index: int = netlink.link_lookup(ifname=name)[0]
    netlink.link("set", index=index, state="up")
    return index


def _plug(bridge: str, hosts: Sequence[str]) -> None:
    with IPRoute() as netlink:
        found = netlink.link_lookup(ifname=bridge)
        master = found[0] if found else _add_bridge(netlink, bridge)
        for host in hosts:
            netlink.link("set", index=netlink.link_lookup(ifname=host)[0], master=master)


def _make_port(bridge: int, host: str, host_namespace: int, rate: Rate | None) -> None:
    with IPRoute() as netlink:
        netlink.link("add", ifname=host, kind="veth", peer={"ifname": "eth0", "net_ns_fd": host_namespace})
        index = netlink.link_lookup(ifname=host)[0]
        netlink.link("set", index=index, master=bridge, state="up")
        if rate:
            shape(netlink, index, rate)


def _configure(address: str, rate: Rate | None) -> None:
    with IPRoute() as netlink:
        index = netlink.link_lookup(ifname="eth0")[0]
        netlink.addr("add", index=index, address=address, prefixlen=_PREFIX_BITS)
        netlink.link("set", index=index, state="up")
        if rate:
            shape(netlink, index, rate)


def _counters() -> LinkBytes:
    with IPRoute() as netlink:
        stats = netlink.get_links(ifname="eth0")[0].get_attr("IFLA_STATS64")
        return LinkBytes(stats["tx_bytes"], stats["rx_bytes"])
