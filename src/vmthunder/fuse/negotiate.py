"""What this kernel and we agree on at INIT, and what is lost on an older one. Pure.

The kernel offers, we take what we want of it; whatever is missing is said in one line each and done without.
"""

import json
from typing import NamedTuple

from vmthunder.fuse.protocol import (
    LEAST_WRITE_BYTES,
    MINOR,
    OLDEST_MINOR,
    PAGE_BYTES,
    REQUEST_BUFFER_BYTES,
    InitFlag,
    InitIn,
    ProtocolError,
    Request,
    encode_init,
)

READAHEAD_BYTES = 256 * 1024
"""How far the kernel reads ahead of a sequential reader: what a boot reads beside it is mostly in vain (ADR 1)."""
MAX_READ_BYTES = 1024 * 1024
"""The longest READ: 256 pages, the most that a kernel without tuning allows."""
MAX_WRITE_BYTES = 32 * PAGE_BYTES
"""The longest WRITE, where writing is possible at all."""
PLAIN_READ_BYTES = 32 * PAGE_BYTES
"""The longest READ of a kernel without MAX_PAGES."""
MAX_BACKGROUND = 512
"""Read-ahead and asynchronous reads in flight. At the limit the kernel holds back further ones, also those of files
whose data is at hand; so it is far above what reads that wait for an unreachable origin should ever use up."""
STACK_DEPTH = 1
"""Passthrough to a backing file on a plain file system; another file system may still be stacked on ours."""

WANTED = (
    InitFlag.ASYNC_READ
    | InitFlag.ASYNC_DIO
    | InitFlag.PARALLEL_DIROPS
    | InitFlag.MAX_PAGES
    | InitFlag.EXPLICIT_INVAL_DATA
    | InitFlag.INIT_EXT
    | InitFlag.PASSTHROUGH
    | InitFlag.HAS_RESEND
)


class UnsupportedKernel(Exception):
    """The kernel's protocol is too old, or not ours at all. `str()` is one line."""


class Negotiated(NamedTuple):
    """What holds for this mount as long as it lives, whichever worker serves it."""

    minor: int
    flags: int
    max_read_bytes: int
    max_readahead_bytes: int
    max_write_bytes: int = LEAST_WRITE_BYTES

    @property
    def request_bytes(self) -> int:
        """The longest request: header and structure of a WRITE take less than a page."""
        return max(REQUEST_BUFFER_BYTES, PAGE_BYTES + self.max_write_bytes)

    @property
    def resend(self) -> bool:
        """Whether requests that a killed worker had read can be asked for again (Linux 6.9)."""
        return bool(self.flags & InitFlag.HAS_RESEND)

    @property
    def passthrough(self) -> bool:
        """Whether the kernel can read a backing file without us (Linux 6.9, CONFIG_FUSE_PASSTHROUGH)."""
        return bool(self.flags & InitFlag.PASSTHROUGH)

    @property
    def store(self) -> bool:
        """Whether chunks can be pushed into the page cache (7.15: every kernel that we accept)."""
        return True

    def to_json(self) -> str:
        return json.dumps(self._asdict())

    @classmethod
    def from_json(cls, text: str) -> "Negotiated":
        return cls(**json.loads(text))


def negotiate(request: Request, offer: InitIn, *, writable: bool = False) -> tuple[Negotiated, bytes, list[str]]:
    """What we agree on, the INIT reply that says so, and one line for each thing that is lost.

    Raises:
        UnsupportedKernel: the offer is not of protocol 7.23 or later.
        ProtocolError: the request is not an INIT.
    """
    if request.unique == 0:
        raise ProtocolError("an INIT without a number")
    if offer.major != 7 or offer.minor < OLDEST_MINOR:
        raise UnsupportedKernel(
            f"the kernel speaks FUSE {offer.major}.{offer.minor}; 7.{OLDEST_MINOR} (Linux 3.15) or later is needed"
        )
    flags = offer.flags & (WANTED | InitFlag.BIG_WRITES if writable else WANTED)
    if not flags & InitFlag.INIT_EXT:
        flags &= 0xFFFFFFFF
    large = bool(flags & InitFlag.MAX_PAGES)
    agreed = Negotiated(
        minor=min(offer.minor, MINOR),
        flags=int(flags),
        max_read_bytes=MAX_READ_BYTES if large else PLAIN_READ_BYTES,
        max_readahead_bytes=READAHEAD_BYTES,
        max_write_bytes=MAX_WRITE_BYTES if writable else LEAST_WRITE_BYTES,
    )
    reply = encode_init(
        request.unique,
        minor=agreed.minor,
        flags=agreed.flags,
        max_readahead_bytes=READAHEAD_BYTES,
        max_background=MAX_BACKGROUND,
        max_pages=MAX_READ_BYTES // PAGE_BYTES if large else 0,
        max_write_bytes=agreed.max_write_bytes,
        stack_depth=STACK_DEPTH if agreed.passthrough else 0,
    )
    return agreed, reply, _losses(agreed)


def _losses(agreed: Negotiated) -> list[str]:
    lines = []
    if not agreed.resend:
        lines.append(
            "this kernel cannot send requests again (Linux 6.9): reads that a killed worker had taken hang until the "
            "mount is stopped; orderly restarts lose nothing"
        )
    if not agreed.passthrough:
        lines.append(
            "this kernel has no FUSE passthrough (Linux 6.9): materialized images are served by the agent, "
            "slower than the local file"
        )
    if not agreed.flags & InitFlag.MAX_PAGES:
        lines.append(
            "this kernel reads at most 128 KiB at a time (1 MiB since Linux 4.20): sequential reads are slower"
        )
    return lines
