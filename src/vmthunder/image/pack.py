"""The pack: many chunks back to back in one object of the origin, read by range. Pure.

Layout, little-endian (docs/formats.md):

    chunks   their encoded bytes, one after the other
    footer   8s magic "VMTHPACK", u16 version 1, u16 zero, u32 number of entries,
             then entries of 40 bytes: 32s chunk id, u32 offset, u32 encoded length
    trailer  u32 length of the footer, 4s magic "VMTP"

The pack id is the digest of the footer. The footer names every chunk by its digest and its place, so the id vouches for
the whole pack although only the footer was hashed; and what a pack holds is learned, and checked, with two small reads.
"""

import struct
from typing import Final, NamedTuple

from vmthunder.errors import CorruptPack
from vmthunder.ids import Buffer, ChunkId, PackId, digest

MAGIC: Final = b"VMTHPACK"
TRAILER_MAGIC: Final = b"VMTP"
VERSION: Final = 1

_HEAD = struct.Struct("<8sHHI")
_ENTRY = struct.Struct("<32sII")
_TRAILER = struct.Struct("<I4s")
TRAILER_BYTES: Final = _TRAILER.size


class PackEntry(NamedTuple):
    """One chunk in a pack."""

    chunk_id: ChunkId
    offset: int
    encoded_bytes: int


class PackBuilder:
    """A pack in the making. Keeps the chunks in memory until `finish`."""

    def __init__(self) -> None:
        self._parts: list[Buffer] = []
        self._entries = bytearray()
        self.count = 0
        self.size_bytes = 0
        """Of the chunks added so far."""

    def add(self, chunk_id: ChunkId, data: Buffer) -> int:
        """Append a chunk's encoded bytes; returns its offset in the pack."""
        offset = self.size_bytes
        self._parts.append(data)
        self._entries += _ENTRY.pack(chunk_id, offset, len(data))
        self.count += 1
        self.size_bytes += len(data)
        return offset

    def finish(self) -> tuple[PackId, bytes]:
        """The pack's id and its bytes."""
        footer = _HEAD.pack(MAGIC, VERSION, 0, self.count) + self._entries
        trailer = _TRAILER.pack(len(footer), TRAILER_MAGIC)
        return PackId(digest(footer)), b"".join((*self._parts, footer, trailer))


def decode_trailer(trailer: Buffer, pack_bytes: int) -> tuple[int, int]:
    """Offset and length of the footer, from the last TRAILER_BYTES of a pack of `pack_bytes`.

    Raises:
        CorruptPack: this is not the end of a pack.
    """
    if len(trailer) != TRAILER_BYTES:
        raise CorruptPack(f"pack of {pack_bytes} bytes is cut short")
    footer_bytes, magic = _TRAILER.unpack(trailer)
    if magic != TRAILER_MAGIC or not _HEAD.size <= footer_bytes <= pack_bytes - TRAILER_BYTES:
        raise CorruptPack(f"pack of {pack_bytes} bytes does not end like one")
    return pack_bytes - TRAILER_BYTES - footer_bytes, footer_bytes


def decode_footer(footer: Buffer, pack: PackId) -> list[PackEntry]:
    """The chunks of a pack, in the order of their offsets.

    Raises:
        CorruptPack: these bytes are not the footer of `pack`.
    """
    if digest(footer) != pack:
        raise CorruptPack(f"footer of pack {pack.hex()} does not match its id")
    if len(footer) < _HEAD.size:
        raise CorruptPack(f"footer of pack {pack.hex()} is cut short")
    magic, version, zero, count = _HEAD.unpack_from(footer)
    if magic != MAGIC or version != VERSION or zero or len(footer) != _HEAD.size + count * _ENTRY.size:
        raise CorruptPack(f"footer of pack {pack.hex()} is not one of version {VERSION}")
    table = _ENTRY.iter_unpack(memoryview(footer)[_HEAD.size :])
    entries = [PackEntry(ChunkId(chunk), *place) for chunk, *place in table]
    end = 0
    for entry in entries:
        if entry.offset != end or entry.encoded_bytes == 0:
            raise CorruptPack(f"footer of pack {pack.hex()} lists chunks that are not back to back")
        end += entry.encoded_bytes
    return entries
