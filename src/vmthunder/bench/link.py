"""A network link of a stated rate between this process and a namespace that holds the server.

A veth pair with a token bucket at each end: 200 Mbit/s measure as 191–196, 1 Gbit/s as 957–963 (payload of TCP).
The caller is in a network namespace of its own (`namespaces.isolate`), so the fixed addresses meet nobody.
"""

import re
from dataclasses import dataclass
from functools import partial
from typing import Final

from pyroute2 import IPRoute

from vmthunder.bench.namespaces import NetworkNamespace
from vmthunder.errors import Usage

NEAR_ADDRESS: Final = "198.18.0.1"
"""Of the agent. 198.18.0.0/15 is the range for benchmarks, RFC 2544."""
FAR_ADDRESS: Final = "198.18.0.2"
"""Of the server."""

_PREFIX_BITS = 30
# A bucket holds what the link carries in 1 ms, and always a whole segment of 64 KiB that was not cut yet (GSO).
_BURST_S = 0.001
_MIN_BURST_BYTES = 64 << 10
_QUEUE_LATENCY = "20ms"
_UNITS = {"kbit": 10**3, "mbit": 10**6, "gbit": 10**9}


@dataclass(frozen=True)
class Rate:
    """Speed of a link, each way."""

    bits_s: int
    text: str
    """As the user wrote it."""

    @classmethod
    def parse(cls, text: str) -> "Rate":
        """A rate such as 200mbit or 1gbit. Raises Usage."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)", text.lower())
        bits_s = int(float(match[1]) * _UNITS[match[2]]) if match else 0
        if bits_s < 10**5:
            raise Usage(f"{text!r} is not a link rate; write 200mbit or 1gbit, at least 100kbit")
        return cls(bits_s, text.lower())


class Link:
    """The link until it is closed. `far` is the server's end: start the server with `far.run`."""

    def __init__(self, rate: Rate) -> None:
        self.far: Final = NetworkNamespace()
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
        rate_bytes_s = rate.bits_s // 8
        burst_bytes = max(_MIN_BURST_BYTES, int(rate_bytes_s * _BURST_S))
        netlink.tc("add", "tbf", index, rate=rate_bytes_s, burst=burst_bytes, latency=_QUEUE_LATENCY)
