"""What is known of boots: `Boot` is what one node saw of one boot, `Profile` what many boots of an image had in common.
As bytes, little-endian (docs/formats.md):

    0   8s   magic, "VMTHBOOT" or "VMTHPROF"
    8   u16  version, 1
    10  u16  boot: 1 if complete, else 0; profile: log2 of the chunk size
    12  u32  boot: milliseconds until it had settled; profile: number of complete boots
    16  32s  image id
    48  u32  number of rows N
    52       one zstd frame of N × u32, N × u32, … : a column after the other

    boot     index, milliseconds, demand (0 or 1)
    profile  index, milliseconds, share (1…1000), demand (0 or 1)

An index names a slice of the image, and the image id vouches for which chunk that is: chunk ids need not be sent, which
makes a profile of 2,500 chunks at most 12 KiB long instead of 90. [pure]
"""

import struct
import sys
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import zstandard

from vmthunder.errors import Corrupt
from vmthunder.ids import DIGEST_BYTES, Buffer, ImageId
from vmthunder.image.chunk import MAX_CHUNK_BYTES, MIN_CHUNK_BYTES

VERSION: Final = 1
MAX_ENTRIES: Final = 65_536
"""Of a profile, and touches of a boot."""
MAX_BOOT_MS: Final = 3_600_000
MAX_ENCODED_BYTES: Final = 2 << 20
"""Of a profile or a boot: more than the longest one that nothing compresses."""
WHOLE: Final = 1000
"""The share of an entry that every boot touches."""
EXPECTED: Final = 400
"""The least share that is worth a prefetch: a stall costs a guest more than the bytes of a chunk that it does not read."""

_HEADER: Final = struct.Struct("<8sHHI32sI")
_BOOT_MAGIC: Final = b"VMTHBOOT"
_PROFILE_MAGIC: Final = b"VMTHPROF"
_LEVEL: Final = 6


class CorruptProfile(Corrupt):
    """Bytes are no profile or no boot, are of another image, or say what cannot be."""


class Touch(NamedTuple):
    """The first touch of a chunk in a boot."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody wants of a touch
    """Number of the slice in the image."""
    at_ms: int
    """Since the first read of the boot."""
    demand: bool
    """A guest waited for it; else it was read ahead."""


@dataclass(frozen=True, slots=True)
class Boot:
    """The first touches of one boot."""

    image_id: ImageId
    touches: tuple[Touch, ...]
    """By time; each index once; at most MAX_ENTRIES."""
    complete: bool
    """False: chunks had been pushed into the page cache, and which of those the guest read could not be seen. Such a boot
    can add to a profile, and never count against an entry."""
    settled_ms: int
    """When nothing new was touched any more: at or after the last touch."""

    def encode(self) -> bytes:
        """As bytes."""
        columns = zip(*self.touches, strict=True) if self.touches else ((), (), ())
        return _encode(_BOOT_MAGIC, int(self.complete), self.settled_ms, self.image_id, len(self.touches), columns)

    @classmethod
    def decode(cls, data: Buffer, image_id: ImageId) -> "Boot":
        """Raises CorruptProfile: not a boot, or one of another image."""
        complete, settled_ms, (indices, times, demands) = _decode(data, _BOOT_MAGIC, image_id, columns=3)
        if complete > 1 or settled_ms > MAX_BOOT_MS or (times and times[-1] > settled_ms):
            raise CorruptProfile("a boot makes no sense: it goes on after it had settled")
        touches = tuple(map(Touch, indices, times, map(bool, demands)))
        return cls(image_id, touches, complete == 1, settled_ms)


class Entry(NamedTuple):
    """A chunk that boots touch."""

    index: int  # type: ignore[assignment]  # as above
    """Number of the slice in the image."""
    at_ms: int
    """Typical time of the first touch, since the first read of a boot."""
    share: int
    """How much of the boots touch it, late ones counting more: 1…WHOLE."""
    demand: bool
    """In the last complete boot that touched it a guest waited for it."""


@dataclass(frozen=True, slots=True)
class Profile:
    """What boots of an image touch, in the order of typical time."""

    image_id: ImageId
    chunk_bytes: int
    boots: int
    """Complete boots that it was learned from. After few of them it is better to look than to trust it."""
    entries: tuple[Entry, ...]
    """By typical time; each index once; at most MAX_ENTRIES. Those that few boots touched are there to be learned."""

    def expected(self) -> list[Entry]:
        """What the next boot will touch, in the order of typical time: what to prefetch."""
        return [entry for entry in self.entries if entry.share >= EXPECTED]

    def encode(self) -> bytes:
        """As bytes."""
        columns = zip(*self.entries, strict=True) if self.entries else ((), (), (), ())
        log2 = self.chunk_bytes.bit_length() - 1
        return _encode(_PROFILE_MAGIC, log2, self.boots, self.image_id, len(self.entries), columns)

    @classmethod
    def decode(cls, data: Buffer, image_id: ImageId) -> "Profile":
        """Indices are not compared with the image, whose manifest may not be here yet.

        Raises:
            CorruptProfile: not a profile, or one of another image.
        """
        log2, boots, (indices, times, shares, demands) = _decode(data, _PROFILE_MAGIC, image_id, columns=4)
        if not MIN_CHUNK_BYTES <= 1 << log2 <= MAX_CHUNK_BYTES:
            raise CorruptProfile(f"a profile makes no sense: chunk size 2^{log2}")
        if shares and not 1 <= min(shares) <= max(shares) <= WHOLE:
            raise CorruptProfile("a profile makes no sense: no share of the boots")
        return cls(image_id, 1 << log2, boots, tuple(map(Entry, indices, times, shares, map(bool, demands))))


def _encode(
    magic: bytes, small: int, number: int, image_id: ImageId, rows: int, columns: Iterable[Sequence[int]]
) -> bytes:
    body = b"".join(_little(array("I", column)).tobytes() for column in columns)
    header = _HEADER.pack(magic, VERSION, small, number, image_id, rows)
    return header + zstandard.ZstdCompressor(_LEVEL, write_checksum=False).compress(body)


def _decode(data: Buffer, magic: bytes, image_id: ImageId, *, columns: int) -> tuple[int, int, list["array[int]"]]:
    """The two numbers of the header, and the columns: index, time, …, demand. What all formats demand of them is checked."""
    what = "boot" if magic == _BOOT_MAGIC else "profile"
    if len(data) < _HEADER.size or bytes(data[:8]) != magic:
        raise CorruptProfile(f"not a {what}: {len(data)} bytes that do not begin as one")
    _, version, small, number, found_id, rows = _HEADER.unpack_from(data)
    if version != VERSION:
        raise CorruptProfile(f"{what} version {version} is not known here; this program reads version {VERSION}")
    if found_id != image_id:
        raise CorruptProfile(f"this {what} is of image {found_id.hex()[:16]}…, not of {image_id.hex()[:16]}…")
    if rows > MAX_ENTRIES or len(data) > MAX_ENCODED_BYTES:
        raise CorruptProfile(f"{what} is too long: {rows} chunks in {len(data)} bytes")
    body_bytes = rows * columns * 4
    frame = memoryview(data)[_HEADER.size :]
    try:
        # The frame's own word for its length is checked before anything is allocated for it.
        if zstandard.frame_content_size(frame) != body_bytes:
            raise CorruptProfile(f"{what} is damaged: its length does not fit {rows} chunks")
        body = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CorruptProfile(f"{what} is damaged: {error}") from None
    found = [
        _little(array("I", body[at : at + rows * 4]))
        for at in (range(0, body_bytes, rows * 4) if rows else [0] * columns)
    ]
    indices, times, demands = found[0], found[1], found[-1]
    if len(set(indices)) != rows:
        raise CorruptProfile(f"{what} makes no sense: it names a chunk twice")
    if any(map(int.__gt__, times, times[1:])) or (times and times[-1] > MAX_BOOT_MS):
        raise CorruptProfile(f"{what} makes no sense: its times run backwards, or beyond {MAX_BOOT_MS // 1000} s")
    if demands and max(demands) > 1:
        raise CorruptProfile(f"{what} makes no sense: demand is 0 or 1")
    return small, number, found


def _little(column: "array[int]") -> "array[int]":
    """Between this machine's order of bytes and the format's."""
    if sys.byteorder == "big":
        column.byteswap()
    return column


assert _HEADER.size == 20 + DIGEST_BYTES
