"""The mount table as text, and memory as the kernel sees it."""

import struct
from pathlib import Path

import pytest

from vmthunder.fuse.memory import ZEROS
from vmthunder.fuse.mounts import Mount, parse_mountinfo

MOUNTINFO = """\
22 28 0:21 / /proc rw,nosuid,nodev,noexec,relatime - proc proc rw
31 28 8:1 / /var\\040lib/with\\134backslash rw,relatime shared:1 master:2 - ext4 /dev/sda1 rw
40 28 0:57 / /images ro,nosuid,nodev - fuse.vmthunder vmthunder ro,user_id=0
"""


def test_mounts_are_read_with_their_odd_names() -> None:
    assert parse_mountinfo(MOUNTINFO) == [
        Mount("/proc", "proc", "0:21"),
        Mount("/var lib/with\\backslash", "ext4", "8:1"),
        Mount("/images", "fuse.vmthunder", "0:57"),
    ]


def test_the_connection_has_the_number_of_the_device() -> None:
    assert parse_mountinfo(MOUNTINFO)[2].connection == 57


def test_zeros_that_we_reply_with_are_pages_of_their_own() -> None:
    """Not the kernel's shared page of zeros, which a killed worker's reply would stumble over."""
    pagemap, flags = Path("/proc/self/pagemap"), Path("/proc/kpageflags")
    if not flags.exists():
        pytest.skip("this kernel does not show page flags")
    address = id(ZEROS.obj)
    with pagemap.open("rb") as pages, flags.open("rb") as page_flags:
        for page in range(address // 4096 + 1, (address + len(ZEROS)) // 4096):
            pages.seek(page * 8)
            (entry,) = struct.unpack("=Q", pages.read(8))
            assert entry >> 63, f"page {page} is not in memory"
            page_flags.seek((entry & (1 << 55) - 1) * 8)
            assert not struct.unpack("=Q", page_flags.read(8))[0] >> 24 & 1, f"page {page} is the page of zeros"
