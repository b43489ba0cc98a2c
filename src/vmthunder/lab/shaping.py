"""Links of a stated rate: a token bucket at each end of a veth pair.

200 Mbit/s measure as 191–196, 1 Gbit/s as 957–963 (payload of TCP), with 1 or 16 flows.
"""

import re
from dataclasses import dataclass

from pyroute2 import IPRoute

from vmthunder.errors import Usage

# A bucket holds what the link carries in 1 ms, and always a whole segment of 64 KiB that was not cut yet (GSO).
_BURST_S = 0.001
_MIN_BURST_BYTES = 64 << 10
# What waits for its turn: 20 ms, and at least what a port of a small switch holds. Less drops the first packets of a few
# connections that begin together, which then stand still for TCP's 200 ms.
_QUEUE_S = 0.02
_MIN_QUEUE_BYTES = 256 << 10
_UNITS = {"kbit": 10**3, "mbit": 10**6, "gbit": 10**9}


@dataclass(frozen=True)
class Rate:
    """Speed of a link, each way."""

    bits_s: int
    text: str
    """As the user wrote it."""

    @property
    def bytes_s(self) -> float:
        """The same in bytes per second."""
        return self.bits_s / 8

    @classmethod
    def parse(cls, text: str) -> "Rate":
        """A rate such as 200mbit or 1gbit. Raises Usage."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)", text.lower())
        bits_s = int(float(match[1]) * _UNITS[match[2]]) if match else 0
        if bits_s < 10**5:
            raise Usage(f"{text!r} is not a link rate; write 200mbit or 1gbit, at least 100kbit")
        return cls(bits_s, text.lower())


def shape(netlink: IPRoute, index: int, rate: Rate) -> None:
    """Let interface `index` send no faster than `rate`."""
    rate_bytes_s = rate.bits_s // 8
    burst_bytes = max(_MIN_BURST_BYTES, int(rate_bytes_s * _BURST_S))
    queue_s = max(_QUEUE_S, _MIN_QUEUE_BYTES / rate_bytes_s)
    netlink.tc("add", "tbf", index, rate=rate_bytes_s, burst=burst_bytes, latency=f"{1000 * queue_s:.0f}ms")
