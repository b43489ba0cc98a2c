"""A network link of a stated rate between this process and a namespace that holds the server.

A veth pair, shaped at both ends. The caller is in a network namespace of its own (`namespaces.isolate`), so the fixed
addresses meet nobody.
"""

from functools import partial
from typing import Final

from pyroute2 import IPRoute

from vmthunder.lab.namespaces import NetworkNamespace
from vmthunder.lab.shaping import Rate, shape

NEAR_ADDRESS: Final = "198.18.0.1"
"""Of the agent. 198.18.0.0/15 is the range for benchmarks, RFC 2544."""
FAR_ADDRESS: Final = "198.18.0.2"
"""Of the server."""

_PREFIX_BITS = 30


class Link:
    """The link until it is closed. `far` is the server's end: start the server with `far.run`."""

    def __init__(self, rate: Rate) -> None:
        self.far: Final = NetworkNamespace.anonymous()
        try:
            with IPRoute() as netlink:
                netlink.link("add", ifname="near", kind="veth", peer={"ifname": "far", "net_ns_fd": self.far.fd})
            _configure("near", NEAR_ADDRESS, rate)
            self.far.run(partial(_configure, "far", FAR_ADDRESS, rate))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Remove the link, under the server if it still runs."""
        with IPRoute() as netlink:
            for index in netlink.link_lookup(ifname="near"):
                netlink.link("del", index=index)
        self.far.close()


def _configure(ifname: str, address: str, rate: Rate) -> None:
    with IPRoute() as netlink:
        index = netlink.link_lookup(ifname=ifname)[0]
        netlink.addr("add", index=index, address=address, prefixlen=_PREFIX_BITS)
        netlink.link("set", index=index, state="up")
        shape(netlink, index, rate)
