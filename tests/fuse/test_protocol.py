"""Bytes of the FUSE protocol, against the layouts of the kernel's include/uapi/linux/fuse.h."""

import stat
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmthunder.fuse import protocol
from vmthunder.fuse.protocol import Attr, DirEntry, Entry, InitFlag, Opened, ProtocolError, Statfs

UNIQUE = 0x1122334455667788


def request(opcode: int, body: bytes, node: int = 5) -> bytes:
    """A request as the kernel lays it out, written without the codec."""
    return struct.pack("=IIQQIIIHH", 40 + len(body), opcode, UNIQUE, node, 1000, 1001, 4242, 0, 0) + body


def test_the_header_is_taken_apart() -> None:
    message = request(15, bytes(40))
    header = protocol.decode_request(message, len(message))
    assert header == (80, 15, UNIQUE, 5, 1000, 1001, 4242)


def test_a_read_taken_apart_at_once_is_the_one_taken_apart_in_two_steps() -> None:
    message = request(15, struct.pack("=QQIIQII", 7, 1 << 40, 131072, 0, 0, 0o100000, 0))
    length, opcode, unique, node, fh, offset, size = protocol.READ_REQUEST.unpack_from(message)
    assert (length, opcode, unique, node) == protocol.decode_request(message, len(message))[:4]
    assert (fh, offset, size) == protocol.body(message, length, protocol.READ_IN)[:3] == (7, 1 << 40, 131072)
    assert protocol.READ_REQUEST.size == len(message)


@pytest.mark.parametrize("read_bytes", [0, 39, 40, 79, 81])
def test_a_request_of_another_length_than_it_claims_is_refused(read_bytes: int) -> None:
    with pytest.raises(ProtocolError):
        protocol.decode_request(request(15, bytes(40)), read_bytes)


@pytest.mark.parametrize("length_bytes", [40, 79, 81])
def test_a_body_of_the_wrong_length_is_refused(length_bytes: int) -> None:
    with pytest.raises(ProtocolError):
        protocol.body(bytes(200), length_bytes, protocol.READ_IN)


def test_a_name_ends_at_its_zero() -> None:
    message = request(1, b"debian-12.raw\0")
    assert protocol.decode_name(message, len(message)) == b"debian-12.raw"


@pytest.mark.parametrize("name", [b"", b"\0", b"abc", b"a\0b\0"])
def test_a_name_that_does_not_end_at_its_zero_is_refused(name: bytes) -> None:
    message = request(1, name)
    with pytest.raises(ProtocolError):
        protocol.decode_name(message, len(message))


def test_many_nodes_are_forgotten_at_once() -> None:
    message = request(42, struct.pack("=IIQQQQ", 2, 0, 7, 1, 9, 3))
    assert protocol.decode_batch_forget(message, len(message)) == [(7, 1), (9, 3)]


@pytest.mark.parametrize("body", [b"", struct.pack("=IIQQ", 2, 0, 7, 1), struct.pack("=IIQQ", 0, 0, 7, 1)])
def test_a_forget_of_another_count_than_it_claims_is_refused(body: bytes) -> None:
    message = request(42, body)
    with pytest.raises(ProtocolError):
        protocol.decode_batch_forget(message, len(message))


def test_flags_beyond_32_bits_count_only_next_to_init_ext() -> None:
    plain = request(26, struct.pack("=IIIII44x", 7, 45, 131072, 0, 1 << 7))
    assert protocol.decode_init(plain, len(plain)).flags == 0
    extended = request(26, struct.pack("=IIIII44x", 7, 45, 131072, 1 << 30, 1 << 7))
    assert protocol.decode_init(extended, len(extended)) == (7, 45, 131072, InitFlag.INIT_EXT | InitFlag.HAS_RESEND)


def test_the_init_of_an_old_kernel_is_short() -> None:
    message = request(26, struct.pack("=IIII", 7, 31, 131072, 1))
    assert protocol.decode_init(message, len(message)) == (7, 31, 131072, InitFlag.ASYNC_READ)


def test_the_init_reply() -> None:
    flags = InitFlag.ASYNC_READ | InitFlag.INIT_EXT | InitFlag.PASSTHROUGH
    reply = protocol.encode_init(
        UNIQUE,
        minor=40,
        flags=flags,
        max_readahead_bytes=524288,
        max_background=512,
        max_pages=256,
        max_write_bytes=4096,
        stack_depth=1,
    )
    assert reply.hex() == (
        "50000000" "00000000" "8877665544332211"
        "07000000" "28000000" "00000800" "01000040" "0002" "8001" "00100000" "01000000" "0001" "0000" "20000000" "01000000"
        + "00" * 24
    )  # fmt: skip


def test_an_error_is_negative_and_nothing_else() -> None:
    assert protocol.encode_error(UNIQUE, 2).hex() == "10000000feffffff8877665544332211"


def test_the_answer_to_a_lookup() -> None:
    attr = Attr(9, 10 << 30, stat.S_IFREG | 0o444, mtime_s=1700000000, allocated_bytes=1 << 20)
    assert protocol.encode_entry(Entry(9, attr, 1.5, 60.0)).hex() == (
        "0900000000000000" "0000000000000000" "0100000000000000" "3c00000000000000" "0065cd1d" "00000000"
        "0900000000000000" "0000008002000000" "0008000000000000"
        "00f1536500000000" "00f1536500000000" "00f1536500000000" "00000000" "00000000" "00000000"
        "24810000" "01000000" "00000000" "00000000" "00000000" "00100000" "00000000"
    )  # fmt: skip


def test_the_answer_to_a_getattr() -> None:
    answer = protocol.encode_attr(Attr(1, 0, stat.S_IFDIR | 0o555, nlink=2), 0.25)
    assert len(answer) == 104
    assert answer[:16].hex() == "000000000000000080b2e60e00000000"


@pytest.mark.parametrize(
    ("opened", "golden"),
    [
        (Opened(3), "03000000000000002200000000000000"),
        (Opened(3, direct_io=True), "03000000000000002100000000000000"),
        (Opened(3, backing_id=4), "0300000000000000a000000004000000"),
    ],
)
def test_the_answer_to_an_open(opened: Opened, golden: str) -> None:
    assert protocol.encode_open(opened).hex() == golden


def test_the_answer_to_a_statfs() -> None:
    assert protocol.encode_statfs(Statfs(100, 10, 3)) == struct.pack(
        "=QQQQQIIII24x", 100, 10, 10, 3, 0, 4096, 255, 4096, 0
    )


def test_notifications() -> None:
    assert protocol.encode_resend().hex() == "10000000070000000000000000000000"
    assert protocol.encode_inval_inode(9).hex() == (
        "28000000" "02000000" "0000000000000000" "0900000000000000" "0000000000000000" "0000000000000000"
    )  # fmt: skip
    assert protocol.encode_inval_entry(1, b"ab").hex() == (
        "23000000" "03000000" "0000000000000000" "0100000000000000" "02000000" "00000000" "616200"
    )  # fmt: skip
    assert protocol.encode_store(9, 65536, 4096).hex() == (
        "28100000" "04000000" "0000000000000000" "0900000000000000" "0000010000000000" "00100000" "00000000"
    )  # fmt: skip


ENTRIES = st.lists(
    st.builds(DirEntry, st.integers(2, 1 << 60), st.binary(min_size=1, max_size=255), st.just(stat.S_IFREG))
)


@given(ENTRIES, st.integers(0, 4096))
def test_a_listing_holds_as_many_whole_entries_as_fit(entries: list[DirEntry], size_bytes: int) -> None:
    answer = protocol.encode_entries(entries, 0, size_bytes)
    assert len(answer) <= size_bytes
    names, at = [], 0
    while at < len(answer):
        node, cookie, length, kind = struct.unpack_from("=QQII", answer, at)
        names.append(answer[at + 24 : at + 24 + length])
        assert (node, cookie, kind) == (entries[len(names) - 1].node, len(names), 8)
        at += 24 + (length + 7) // 8 * 8
    assert names == [entry.name for entry in entries[: len(names)]]
    if len(names) < len(entries):
        assert len(answer) + 24 + (len(entries[len(names)].name) + 7) // 8 * 8 > size_bytes


@given(ENTRIES, st.integers(300, 4096))
def test_a_listing_taken_in_parts_is_whole(entries: list[DirEntry], size_bytes: int) -> None:
    seen = 0
    while part := protocol.encode_entries(entries, seen, size_bytes):
        at = 0
        while at < len(part):
            _, seen, length, _ = struct.unpack_from("=QQII", part, at)
            at += 24 + (length + 7) // 8 * 8
    assert seen == len(entries)


SIZES = {
    "fuse_in_header": protocol.IN_HEADER,
    "fuse_out_header": protocol.OUT_HEADER,
    "fuse_init_in": protocol.INIT_IN,
    "fuse_init_out": protocol.INIT_OUT,
    "fuse_read_in": protocol.READ_IN,
    "fuse_open_in": protocol.OPEN_IN,
    "fuse_open_out": protocol._OPEN_OUT,
    "fuse_release_in": protocol.RELEASE_IN,
    "fuse_forget_in": protocol.FORGET_IN,
    "fuse_batch_forget_in": protocol.BATCH_FORGET_IN,
    "fuse_forget_one": protocol.FORGET_ONE,
    "fuse_attr": protocol._ATTR,
    "fuse_kstatfs": protocol._KSTATFS,
    "fuse_notify_store_out": protocol._STORE_OUT,
    "fuse_notify_inval_inode_out": protocol._INVAL_INODE_OUT,
    "fuse_notify_inval_entry_out": protocol._INVAL_ENTRY_OUT,
}


def test_sizes_are_those_of_the_header_that_is_installed(tmp_path: Path) -> None:
    if not Path("/usr/include/linux/fuse.h").exists():
        pytest.skip("no kernel headers are installed")
    lines = "\n".join(f'_Static_assert(sizeof(struct {name}) == {layout.size}, "");' for name, layout in SIZES.items())
    source = tmp_path / "sizes.c"
    source.write_text(f"#include <linux/fuse.h>\n{lines}\n")
    try:
        compiled = subprocess.run(["cc", "-fsyntax-only", source], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no C compiler is installed")
    assert compiled.returncode == 0, compiled.stderr
