"""The kernel's FUSE protocol as bytes: what every file system of ours needs of it, and nothing that touches a file.

What only a writable one needs is in `fuse.writing`.

Facts come from the kernel's include/uapi/linux/fuse.h (numbers and layouts) and fs/fuse/dev.c (what it does with a
reply). Numbers are in the byte order of the host; every structure is a multiple of 8 bytes. A request is one read(2)
of the device: header, then the structure of its opcode. A reply is one write(2): header, then the answer.
Pure; imports nothing of ours, so that the keeper stays small.
"""

import enum
import stat
import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

ROOT_NODE = 1
PAGE_BYTES = 4096
MAJOR = 7
MINOR = 40
"""The version that this module was written after (Linux 6.9); both sides speak the smaller of the two."""
OLDEST_MINOR = 23
"""Linux 3.15: from here on an INIT reply has 64 bytes."""

REQUEST_BUFFER_BYTES = 8192
"""FUSE_MIN_READ_BUFFER. The kernel refuses to fill a smaller one, and without writes nothing longer comes."""
LEAST_WRITE_BYTES = 4096
"""The least that the kernel accepts as the longest WRITE: where nobody writes, the request buffer may stay small."""

UNIQUE_RESEND = 1 << 63
"""Set in `unique` of a request that was sent again. The reply has to carry it too."""


class Opcode(enum.IntEnum):
    """Requests that we answer with more than ENOSYS, which means "do without, and never ask again"."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    OPEN = 14
    READ = 15
    STATFS = 17
    RELEASE = 18
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42


class Notify(enum.IntEnum):
    """What we tell the kernel unasked: a reply with `unique` 0 and one of these where the error would be."""

    INVAL_INODE = 2
    INVAL_ENTRY = 3
    STORE = 4
    RESEND = 7


class InitFlag(enum.IntFlag):
    """The INIT flags that we look at. Bits 32 and up travel in `flags2`, which counts only next to INIT_EXT."""

    ASYNC_READ = 1 << 0
    BIG_WRITES = 1 << 5
    ASYNC_DIO = 1 << 15
    PARALLEL_DIROPS = 1 << 18
    MAX_PAGES = 1 << 22
    EXPLICIT_INVAL_DATA = 1 << 25
    INIT_EXT = 1 << 30
    PASSTHROUGH = 1 << 37
    HAS_RESEND = 1 << 39


class OpenFlag(enum.IntFlag):
    """`open_flags` of an OPEN reply."""

    DIRECT_IO = 1 << 0
    KEEP_CACHE = 1 << 1
    NOFLUSH = 1 << 5
    PASSTHROUGH = 1 << 7


# Structures, named after those of the header without the `fuse_`.
IN_HEADER = struct.Struct("=IIQQIIIHH")  # len opcode unique nodeid uid gid pid total_extlen padding
OUT_HEADER = struct.Struct("=IiQ")  # len error unique
INIT_IN = struct.Struct("=IIIII44x")  # major minor max_readahead flags flags2 unused[11]
INIT_IN_SHORT = struct.Struct("=IIII")  # before 7.36
INIT_OUT = struct.Struct("=IIIIHHIIHHII24x")
READ_REQUEST = struct.Struct("=IIQQ16xQQI20x")  # len opcode unique nodeid, and fh offset size of READ_IN
READ_IN = struct.Struct("=QQIIQII")  # fh offset size read_flags lock_owner flags padding
OPEN_IN = struct.Struct("=II")  # flags open_flags
RELEASE_IN = struct.Struct("=QIIQ")  # fh flags release_flags lock_owner
FORGET_IN = struct.Struct("=Q")  # nlookup
BATCH_FORGET_IN = struct.Struct("=II")  # count dummy
FORGET_ONE = struct.Struct("=QQ")  # nodeid nlookup
INTERRUPT_IN = struct.Struct("=Q")  # unique
_ATTR = struct.Struct("=QQQQQQIIIIIIIIII")
_ENTRY_OUT = struct.Struct("=QQQQII")
_ATTR_OUT = struct.Struct("=QII")
_OPEN_OUT = struct.Struct("=QIi")
_KSTATFS = struct.Struct("=QQQQQIIII24x")
_DIRENT = struct.Struct("=QQII")
_STORE_OUT = struct.Struct("=QQII")
_INVAL_INODE_OUT = struct.Struct("=Qqq")
_INVAL_ENTRY_OUT = struct.Struct("=QII")
BACKING_MAP = struct.Struct("=iIQ")  # fd flags padding

BACKING_OPEN = 0x4010E501
"""FUSE_DEV_IOC_BACKING_OPEN = _IOW(229, 1, struct fuse_backing_map); returns the backing id."""
BACKING_CLOSE = 0x4004E502
"""FUSE_DEV_IOC_BACKING_CLOSE = _IOW(229, 2, uint32_t)."""


class ProtocolError(Exception):
    """Bytes that are not the message they claim to be. Never seen from a real kernel; a bug when it is."""


class Request(NamedTuple):
    """The header of a request."""

    length_bytes: int
    opcode: int
    unique: int
    node: int
    uid: int
    gid: int
    pid: int
    """Thread that asks; 0 when there is none, or none that our pid namespace can see."""


class Attr(NamedTuple):
    """What stat(2) shows of a node."""

    node: int
    size_bytes: int
    mode: int
    mtime_s: int = 0
    allocated_bytes: int = 0
    nlink: int = 1
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    """Beside `mtime_s`: the nanoseconds within that second."""


class Entry(NamedTuple):
    """Answer to a lookup. `node` 0 says "no such name" and lets the kernel remember that for `entry_valid_s`."""

    node: int
    attr: Attr
    entry_valid_s: float
    attr_valid_s: float
    generation: int = 0


class Opened(NamedTuple):
    """Answer to an open.

    With a `backing_id` (from `Session.open_backing`) the kernel reads the backing file itself. A node must not be open
    both ways at once: the kernel answers the second open with EIO (fs/fuse/iomode.c).
    """

    fh: int
    backing_id: int = 0
    direct_io: bool = False
    keep_cache: bool = True
    """Whether what the kernel has cached of the node is still right."""


class DirEntry(NamedTuple):
    node: int
    name: bytes
    mode: int


class Statfs(NamedTuple):
    blocks: int = 0
    blocks_free: int = 0
    files: int = 0
    block_bytes: int = 4096
    name_max_bytes: int = 255


class InitIn(NamedTuple):
    major: int
    minor: int
    max_readahead_bytes: int
    flags: InitFlag


def decode_request(message: bytes | bytearray | memoryview, read_bytes: int) -> Request:
    """The header at the start of a message of which `read_bytes` were read. Raises ProtocolError."""
    if read_bytes < IN_HEADER.size:
        raise ProtocolError(f"a request of {read_bytes} bytes, shorter than its header")
    header = Request._make(IN_HEADER.unpack_from(message)[:7])
    if header.length_bytes != read_bytes:
        raise ProtocolError(f"a request that claims {header.length_bytes} bytes came with {read_bytes}")
    return header


def body(message: bytes | bytearray | memoryview, length_bytes: int, layout: struct.Struct) -> tuple[int, ...]:
    """The structure behind the header; its length has to be exact. Raises ProtocolError."""
    if length_bytes != IN_HEADER.size + layout.size:
        raise ProtocolError(f"{layout.size} bytes expected behind the header, {length_bytes - IN_HEADER.size} came")
    return layout.unpack_from(message, IN_HEADER.size)


def decode_name(message: bytes | bytearray | memoryview, length_bytes: int) -> bytes:
    """The zero-terminated name behind the header (LOOKUP). Raises ProtocolError."""
    name = bytes(message[IN_HEADER.size : length_bytes])
    if len(name) < 2 or name.find(0) != len(name) - 1:
        raise ProtocolError(f"a name of {len(name)} bytes that is empty or does not end at its zero")
    return name[:-1]


def decode_batch_forget(message: bytes | bytearray | memoryview, length_bytes: int) -> list[tuple[int, int]]:
    """(node, nlookup) of each node in a BATCH_FORGET. Raises ProtocolError."""
    start = IN_HEADER.size + BATCH_FORGET_IN.size
    if length_bytes < start:
        raise ProtocolError(f"a BATCH_FORGET of {length_bytes} bytes")
    count, _ = BATCH_FORGET_IN.unpack_from(message, IN_HEADER.size)
    if length_bytes != start + count * FORGET_ONE.size:
        raise ProtocolError(f"a BATCH_FORGET of {count} nodes in {length_bytes} bytes")
    return [FORGET_ONE.unpack_from(message, start + i * FORGET_ONE.size) for i in range(count)]


def decode_init(message: bytes | bytearray | memoryview, length_bytes: int) -> InitIn:
    """The kernel's offer. Kernels before 7.36 send 16 bytes, without `flags2`. Raises ProtocolError."""
    if length_bytes == IN_HEADER.size + INIT_IN_SHORT.size:
        major, minor, readahead, flags = body(message, length_bytes, INIT_IN_SHORT)
        flags2 = 0
    else:
        major, minor, readahead, flags, flags2 = body(message, length_bytes, INIT_IN)
    if not flags & InitFlag.INIT_EXT:
        flags2 = 0
    return InitIn(major, minor, readahead, InitFlag(flags | flags2 << 32))


def encode_init(
    unique: int,
    *,
    minor: int,
    flags: int,
    max_readahead_bytes: int,
    max_background: int,
    max_pages: int,
    max_write_bytes: int,
    stack_depth: int,
) -> bytes:
    """The reply to INIT: 64 bytes since 7.23."""
    answer = INIT_OUT.pack(
        MAJOR,
        minor,
        max_readahead_bytes,
        flags & 0xFFFFFFFF,
        max_background,
        max_background * 3 // 4,  # congestion_threshold: read-ahead holds back from here on
        max_write_bytes,
        1,  # time_gran in ns
        max_pages,
        0,  # map_alignment: DAX only
        flags >> 32,
        stack_depth,
    )
    return encode_head(unique, len(answer)) + answer


def encode_head(unique: int, answer_bytes: int) -> bytes:
    """The header of a successful reply; `answer_bytes` have to follow in the same write(2)."""
    return OUT_HEADER.pack(OUT_HEADER.size + answer_bytes, 0, unique)


def encode_error(unique: int, errno: int) -> bytes:
    """A reply that is an error and nothing else. `errno` is positive, 1 to 511."""
    return OUT_HEADER.pack(OUT_HEADER.size, -errno, unique)


def encode_attr(attr: Attr, valid_s: float) -> bytes:
    """Answer to GETATTR (104 bytes)."""
    seconds, nanoseconds = _seconds(valid_s)
    return _ATTR_OUT.pack(seconds, nanoseconds, 0) + _attr(attr)


def encode_entry(entry: Entry) -> bytes:
    """Answer to LOOKUP (128 bytes)."""
    entry_s, entry_ns = _seconds(entry.entry_valid_s)
    attr_s, attr_ns = _seconds(entry.attr_valid_s)
    return _ENTRY_OUT.pack(entry.node, entry.generation, entry_s, attr_s, entry_ns, attr_ns) + _attr(entry.attr)


def encode_open(opened: Opened) -> bytes:
    """Answer to OPEN and OPENDIR (16 bytes).

    The kernel closes without waiting for us.
    """
    if opened.backing_id:
        flags = OpenFlag.PASSTHROUGH
    else:
        flags = OpenFlag.DIRECT_IO if opened.direct_io else OpenFlag.KEEP_CACHE if opened.keep_cache else OpenFlag(0)
    return _OPEN_OUT.pack(opened.fh, flags | OpenFlag.NOFLUSH, opened.backing_id)


def encode_statfs(statfs: Statfs) -> bytes:
    """Answer to STATFS (80 bytes)."""
    size, free = statfs.block_bytes, statfs.blocks_free
    return _KSTATFS.pack(statfs.blocks, free, free, statfs.files, 0, size, statfs.name_max_bytes, size, 0)


def encode_entries(entries: Sequence[DirEntry], start: int, size_bytes: int) -> bytes:
    """Answer to READDIR: as many of `entries[start:]` as fit whole; the cookie of each is the index of the next."""
    packed: list[bytes] = []
    left_bytes = size_bytes
    for index, (node, name, mode) in enumerate(entries[start:], start + 1):
        record = _DIRENT.pack(node, index, len(name), stat.S_IFMT(mode) >> 12) + name
        record += bytes(-len(record) % 8)
        left_bytes -= len(record)
        if left_bytes < 0:
            break
        packed.append(record)
    return b"".join(packed)


def encode_notify(code: Notify, *parts: bytes, payload_bytes: int = 0) -> bytes:
    """A notification; `payload_bytes` will be written behind it in the same write(2)."""
    answer = b"".join(parts)
    return OUT_HEADER.pack(OUT_HEADER.size + len(answer) + payload_bytes, code, 0) + answer


def encode_store(node: int, offset: int, size_bytes: int) -> bytes:
    """Head of a STORE: the `size_bytes` that follow go into the page cache of `node` at `offset`."""
    return encode_notify(Notify.STORE, _STORE_OUT.pack(node, offset, size_bytes, 0), payload_bytes=size_bytes)


def encode_inval_inode(node: int) -> bytes:
    """Drop the attributes and every cached page of a node (length 0: to the end)."""
    return encode_notify(Notify.INVAL_INODE, _INVAL_INODE_OUT.pack(node, 0, 0))


def encode_inval_entry(parent: int, name: bytes) -> bytes:
    """Forget what `name` in `parent` was."""
    return encode_notify(Notify.INVAL_ENTRY, _INVAL_ENTRY_OUT.pack(parent, len(name), 0), name, b"\0")


def encode_resend() -> bytes:
    """Send every request again that was read and not answered."""
    return encode_notify(Notify.RESEND)


def total_bytes(buffers: Iterable[bytes | bytearray | memoryview]) -> int:
    return sum(map(len, buffers))


def _attr(attr: Attr) -> bytes:
    time_s, blocks = attr.mtime_s, attr.allocated_bytes // 512
    return _ATTR.pack(
        attr.node,
        attr.size_bytes,
        blocks,
        time_s,
        time_s,
        time_s,
        attr.mtime_ns,
        attr.mtime_ns,
        attr.mtime_ns,
        attr.mode,
        attr.nlink,
        attr.uid,
        attr.gid,
        0,
        PAGE_BYTES,
        0,
    )


def _seconds(seconds: float) -> tuple[int, int]:
    whole = int(seconds)
    return whole, int((seconds - whole) * 1e9)
