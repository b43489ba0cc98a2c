"""The manifest: which chunk holds which slice of an image, and where the origin keeps it. Pure.

Layout, little-endian (docs/formats.md):

    0   8s   magic "VMTHMNFT"
    8   u16  version, 1
    10  u16  log2 of the chunk size
    12  u32  number of packs P
    16  u64  virtual size of the image, bytes
    24  u32  number of rows R
    28  u32  zero
    32       P pack ids of 32 bytes
    …        R rows of 48 bytes, in the order of their indices:
             32s chunk id, u32 index, u32 encoded length, u32 pack number, u32 offset in the pack

A slice without a row is all zero. The image id is the digest of all these bytes.
"""

import struct
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from vmthunder.errors import CorruptManifest, Usage
from vmthunder.ids import DIGEST_BYTES, Buffer, ChunkId, ImageId, PackId, digest
from vmthunder.image.chunk import check_chunk_bytes

MAGIC: Final = b"VMTHMNFT"
VERSION: Final = 1
MAX_PACK_BYTES: Final = 1 << 32
MAX_CHUNKS: Final = 1 << 32

_HEADER = struct.Struct("<8sHHIQII")
_ROW = struct.Struct("<32sIIII")
_PREFIX = struct.Struct(">I")


class ChunkRow(NamedTuple):
    """Where one chunk of an image is."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody wants of a row
    """Number of the slice: it begins at byte index × chunk size."""
    chunk_id: ChunkId
    encoded_bytes: int
    pack: PackId
    offset: int
    """In the pack, bytes."""


class Manifest:
    """An immutable chunk table. Keeps the encoded bytes (they may be a mapped file) and 4 bytes a row beside them."""

    def __init__(self, data: Buffer, image_id: ImageId) -> None:
        """Use `Manifest.decode`."""
        magic, version, log2, pack_count, virtual_bytes, row_count, zero = _header(data)
        if magic != MAGIC:
            raise CorruptManifest("not a manifest: wrong magic number")
        if version != VERSION:
            raise CorruptManifest(f"manifest version {version} is not known here; this program reads version {VERSION}")
        if zero or not 12 <= log2 <= 22 or virtual_bytes == 0:
            raise CorruptManifest(f"manifest header makes no sense: chunk size 2^{log2}, virtual size {virtual_bytes}")
        self.image_id: Final = image_id
        self.virtual_bytes: Final[int] = virtual_bytes
        self.chunk_bytes: Final[int] = 1 << log2
        self.chunk_count: Final[int] = -(-virtual_bytes >> log2)
        self.row_count: Final[int] = row_count
        self._rows_at = _HEADER.size + pack_count * DIGEST_BYTES
        if len(data) != self._rows_at + row_count * _ROW.size:
            raise CorruptManifest(f"manifest is {len(data)} bytes long, its header says otherwise")
        view = memoryview(data)
        table = view[_HEADER.size : self._rows_at]
        self.packs: Final = tuple(PackId(bytes(table[i : i + 32])) for i in range(0, len(table), 32))
        self._data = view
        self._indices = self._checked_indices()
        self._by_chunk: array[int] | None = None

    @classmethod
    def decode(cls, data: Buffer, image_id: ImageId) -> "Manifest":
        """Check the digest, the header and every row.

        Raises:
            CorruptManifest: these bytes are not the manifest named `image_id`, or say what cannot be.
        """
        if digest(data) != image_id:
            raise CorruptManifest(f"manifest does not match its image id {image_id.hex()}")
        return cls(data, image_id)

    def _checked_indices(self) -> "array[int]":
        """The row's indices, after a look at every row: a manifest may be well signed and still lie."""
        indices = array("I", bytes(4 * self.row_count))
        before = -1
        last = self.chunk_count - 1
        last_bytes = self.slice_bytes(last)
        packs = len(self.packs)
        for number, (_, index, encoded, pack, offset) in enumerate(_ROW.iter_unpack(self._data[self._rows_at :])):
            limit = self.chunk_bytes if index != last else last_bytes
            if (
                not before < index <= last
                or not 0 < encoded <= limit
                or pack >= packs
                or offset + encoded > MAX_PACK_BYTES
            ):
                raise CorruptManifest(
                    f"manifest row {number} makes no sense: slice {index}, {encoded} bytes, pack {pack}"
                )
            indices[number] = before = index
        return indices

    @property
    def data(self) -> memoryview:
        """The encoded manifest."""
        return self._data

    def slice_bytes(self, index: int) -> int:
        """Length of a slice: the chunk size, but for the last one."""
        return min(self.chunk_bytes, self.virtual_bytes - index * self.chunk_bytes)

    def row(self, index: int) -> ChunkRow | None:
        """The row of a slice; None where it is all zero."""
        number = bisect_left(self._indices, index)
        if number == self.row_count or self._indices[number] != index:
            return None
        return self._row(number)

    def rows(self) -> Iterator[ChunkRow]:
        """All rows, in the order of their indices."""
        return map(self._row, range(self.row_count))

    def find(self, chunk_id: ChunkId) -> ChunkRow | None:
        """The first row of a chunk, by its id."""
        number = self.number(chunk_id)
        return None if number is None else self._row(number)

    def number(self, chunk_id: ChunkId) -> int | None:
        """How many rows are before the first one of a chunk. The first call makes an index of 8 bytes a row."""
        if self._by_chunk is None:
            # The first half of each number is the begin of an id, the second half the number of the row.
            rows = range(self.row_count)
            at = self._rows_at
            self._by_chunk = array(
                "Q", sorted(_PREFIX.unpack_from(self._data, at + n * _ROW.size)[0] << 32 | n for n in rows)
            )
        prefix = _PREFIX.unpack_from(chunk_id)[0]
        place = bisect_left(self._by_chunk, prefix << 32)
        while place < self.row_count and self._by_chunk[place] >> 32 == prefix:
            number = self._by_chunk[place] & 0xFFFF_FFFF
            if self._row(number).chunk_id == chunk_id:
                return number
            place += 1
        return None

    def _row(self, number: int) -> ChunkRow:
        chunk, index, encoded, pack, offset = _ROW.unpack_from(self._data, self._rows_at + number * _ROW.size)
        return ChunkRow(index, ChunkId(chunk), encoded, self.packs[pack], offset)


class ManifestBuilder:
    """Collects rows in any order, 48 bytes each; pack ids may be known only at the end."""

    def __init__(self, virtual_bytes: int, chunk_bytes: int) -> None:
        check_chunk_bytes(chunk_bytes)
        if not 0 < virtual_bytes <= MAX_CHUNKS * chunk_bytes:
            raise Usage(f"an image of {virtual_bytes} bytes is not possible with chunks of {chunk_bytes} bytes")
        self._virtual_bytes = virtual_bytes
        self._chunk_bytes = chunk_bytes
        self._rows = bytearray()
        self._last = -1
        self._sorted = True

    def add(self, index: int, chunk_id: ChunkId, encoded_bytes: int, pack_number: int, offset: int) -> None:
        """Add a row; `pack_number` counts the packs that will be given to `finish`."""
        self._sorted = self._sorted and index > self._last
        self._last = index
        self._rows += _ROW.pack(chunk_id, index, encoded_bytes, pack_number, offset)

    def finish(self, packs: Sequence[PackId]) -> bytes:
        """The encoded manifest. Raises CorruptManifest if the rows that were added make no sense."""
        rows: Buffer = self._rows
        if not self._sorted:
            rows = b"".join(_ROW.pack(*row) for row in sorted(_ROW.iter_unpack(rows), key=lambda row: row[1]))
        header = _HEADER.pack(
            MAGIC,
            VERSION,
            self._chunk_bytes.bit_length() - 1,
            len(packs),
            self._virtual_bytes,
            len(rows) // _ROW.size,
            0,
        )
        data = b"".join((header, *packs, rows))
        Manifest(data, ImageId(b""))
        return data


def encode_manifest(virtual_bytes: int, chunk_bytes: int, rows: Iterable[ChunkRow]) -> bytes:
    """The encoded manifest of rows whose packs are known, numbered as they first appear."""
    builder = ManifestBuilder(virtual_bytes, chunk_bytes)
    numbers: dict[PackId, int] = {}
    for row in rows:
        builder.add(row.index, row.chunk_id, row.encoded_bytes, numbers.setdefault(row.pack, len(numbers)), row.offset)
    return builder.finish(tuple(numbers))


def _header(data: Buffer) -> tuple[bytes, int, int, int, int, int, int]:
    if len(data) < _HEADER.size:
        raise CorruptManifest(f"manifest is cut short: {len(data)} bytes")
    fields: tuple[bytes, int, int, int, int, int, int] = _HEADER.unpack_from(data)
    return fields
