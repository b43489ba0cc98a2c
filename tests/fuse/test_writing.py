"""The writing part of the protocol: bytes as the kernel lays them out (include/uapi/linux/fuse.h)."""

import asyncio
import socket
import struct
from typing import cast

import pytest

from vmthunder.fuse import writing
from vmthunder.fuse.negotiate import Negotiated
from vmthunder.fuse.protocol import IN_HEADER, OUT_HEADER, UNIQUE_RESEND, ProtocolError
from vmthunder.fuse.writable import WritableFileSystem, WritableSession
from vmthunder.fuse.writing import NOW, Change, WriteOpcode


def message(body: bytes) -> bytes:
    return bytes(IN_HEADER.size) + body


def test_structures_have_the_kernels_sizes() -> None:
    sizes = {
        writing.SETATTR_IN: 88,
        writing.CREATE_IN: 16,
        writing.WRITE_IN: 40,
        writing.FSYNC_IN: 16,
        writing.FALLOCATE_IN: 32,
        writing.LSEEK_IN: 24,
        writing.RENAME_IN: 8,
    }
    assert {layout.format: layout.size for layout in sizes} == {layout.format: size for layout, size in sizes.items()}


def test_a_setattr_says_what_changes_and_leaves_the_rest() -> None:
    fields = struct.pack("=IIQQQQQQIIIIIIII", 0b1001, 0, 7, 4096, 0, 1, 2, 3, 4, 5, 6, 0o100640, 0, 8, 9, 0)
    assert writing.decode_change(writing.SETATTR_IN.unpack(fields)) == Change(mode=0o640, size_bytes=4096)
    times = struct.pack("=IIQQQQQQIIIIIIII", 0b110110110, 0, 7, 0, 0, 1, 2, 3, 4, 5, 6, 0, 0, 8, 9, 0)
    assert writing.decode_change(writing.SETATTR_IN.unpack(times)) == Change(uid=8, gid=9, atime_ns=NOW, mtime_ns=NOW)
    past = struct.pack("=IIQQQQQQIIIIIIII", 0b100000, 0, 7, 0, 0, 1, 2, 3, 4, 5, 6, 0, 0, 8, 9, 0)
    assert writing.decode_change(writing.SETATTR_IN.unpack(past)) == Change(mtime_ns=2 * 10**9 + 5)


def test_names_behind_a_structure() -> None:
    two = message(struct.pack("=Q", 1) + b"from\0to\0")
    assert writing.decode_names(two, len(two), writing.RENAME_IN, 2) == [b"from", b"to"]
    for broken in (b"from\0to", b"from\0\0", b"from\0", b"a\0b\0c\0"):
        wrong = message(struct.pack("=Q", 1) + broken)
        with pytest.raises(ProtocolError):
            writing.decode_names(wrong, len(wrong), writing.RENAME_IN, 2)


def test_a_write_carries_exactly_the_bytes_that_it_announces() -> None:
    whole = message(struct.pack("=QQIIQII", 3, 8192, 4, 0, 0, 0, 0) + b"data")
    assert writing.decode_write(whole, len(whole)) == (3, 8192, b"data")
    with pytest.raises(ProtocolError):
        writing.decode_write(whole, len(whole) - 1)


@pytest.mark.asyncio
async def test_a_request_that_comes_again_is_told_so() -> None:
    """The kernel's mark is in its number, which the answer carries, too."""
    told: list[bool] = []

    class Files:
        async def unlink(self, parent: int, name: bytes, *, again: bool) -> None:
            told.append(again)

    ours, kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    kernel.settimeout(5)
    files = cast("WritableFileSystem", Files())
    session = WritableSession(ours.fileno(), Negotiated(40, 0, 4096, 4096), files, asyncio.get_running_loop())
    session.start()
    for unique in (6, 6 | UNIQUE_RESEND):
        name = b"x\0"
        kernel.send(IN_HEADER.pack(IN_HEADER.size + len(name), WriteOpcode.UNLINK, unique, 1, 0, 0, 0, 0, 0) + name)
        answer = await asyncio.to_thread(kernel.recv, 100)
        assert OUT_HEADER.unpack(answer) == (OUT_HEADER.size, 0, unique)
    await session.close()
    ours.close()
    kernel.close()
    assert told == [False, True]
