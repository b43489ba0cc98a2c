"""One chunk: a slice of an image, encoded. Pure, and safe to call from many threads at once.

A chunk is stored raw exactly when it is as long as its slice; otherwise it is one zstd frame (RFC 8878), and shorter.
So the encoding needs no flag, and a decoder that knows the slice's length cannot be made to allocate more than that.
"""

import threading
from typing import NamedTuple

import zstandard

from vmthunder.errors import CorruptChunk, Usage
from vmthunder.ids import Buffer, ChunkId, digest

MIN_CHUNK_BYTES = 4 << 10
MAX_CHUNK_BYTES = 4 << 20
DEFAULT_CHUNK_BYTES = 64 << 10
DEFAULT_LEVEL = 6
MIN_LEVEL = 1
MAX_LEVEL = 19

_ZEROS = bytes(MAX_CHUNK_BYTES)


class _Coders(threading.local):
    """zstd contexts of this thread; one context must not be used by two threads at once."""

    def __init__(self) -> None:
        self.compressors: dict[int, zstandard.ZstdCompressor] = {}
        self.decompressor = zstandard.ZstdDecompressor()

    def compressor(self, level: int) -> zstandard.ZstdCompressor:
        found = self.compressors.get(level)
        if found is None:
            found = self.compressors[level] = zstandard.ZstdCompressor(level, write_checksum=False)
        return found


_coders = _Coders()


class Encoded(NamedTuple):
    """A chunk as it is stored and sent."""

    chunk_id: ChunkId
    data: Buffer


def check_chunk_bytes(chunk_bytes: int) -> int:
    """`chunk_bytes` itself, if an image may have chunks of that size. Raises Usage."""
    if not MIN_CHUNK_BYTES <= chunk_bytes <= MAX_CHUNK_BYTES or chunk_bytes & (chunk_bytes - 1):
        raise Usage(f"chunk size {chunk_bytes} is not possible; use a power of two from 4 KiB to 4 MiB")
    return chunk_bytes


def is_zero(data: Buffer) -> bool:
    """Whether all bytes are zero. `data` is at most MAX_CHUNK_BYTES long."""
    # One memcmp, where comparing with a memoryview goes byte by byte: 1.5 µs instead of 108 µs for 64 KiB.
    return _ZEROS.startswith(data)


def encode(data: Buffer, level: int = DEFAULT_LEVEL) -> Encoded:
    """Encode one slice, which is not empty."""
    packed = _coders.compressor(level).compress(data)
    stored: Buffer = packed if len(packed) < len(data) else bytes(data)
    return Encoded(ChunkId(digest(stored)), stored)


def verify(chunk_id: ChunkId, data: Buffer) -> bool:
    """Whether the encoded bytes are the ones that `chunk_id` names."""
    return digest(data) == chunk_id


def decode(data: Buffer, slice_bytes: int) -> Buffer:
    """The slice that was encoded; `data` itself where it was stored raw.

    Raises:
        CorruptChunk: it is neither a raw slice nor a zstd frame of exactly `slice_bytes`.
    """
    if len(data) == slice_bytes:
        return data
    try:
        # The frame's own word for its length is checked before anything is allocated for it.
        if zstandard.frame_content_size(data) != slice_bytes:
            raise CorruptChunk(f"chunk of {len(data)} bytes is not a frame of {slice_bytes} bytes")
        return _coders.decompressor.decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CorruptChunk(f"chunk of {len(data)} bytes does not decode: {error}") from None
