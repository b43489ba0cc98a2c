from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmthunder.errors import CorruptManifest, Usage
from vmthunder.ids import ChunkId, ImageId, PackId, digest
from vmthunder.image.manifest import ChunkRow, Manifest, ManifestBuilder, encode_manifest

GOLDEN = Path(__file__).parent.parent / "golden"
PACKS = [PackId(bytes([n]) * 32) for n in (7, 9)]


def chunk(number: int) -> ChunkId:
    return ChunkId(digest(number.to_bytes(4, "big")))


def rows() -> list[ChunkRow]:
    return [
        ChunkRow(0, chunk(1), 65536, PACKS[0], 0),
        ChunkRow(2, chunk(2), 100, PACKS[1], 7),
        ChunkRow(3, chunk(1), 512, PACKS[0], 65536),
    ]


VIRTUAL_BYTES = 3 * 65536 + 512


def encoded() -> bytes:
    return encode_manifest(VIRTUAL_BYTES, 65536, rows())


def load(data: bytes) -> Manifest:
    return Manifest.decode(data, ImageId(digest(data)))


def test_the_format_is_frozen() -> None:
    assert encoded() == (GOLDEN / "manifest-v1.bin").read_bytes()


def test_rows_come_back() -> None:
    manifest = load(encoded())
    assert list(manifest.rows()) == rows()
    assert [manifest.row(i) for i in range(4)] == [rows()[0], None, rows()[1], rows()[2]]
    assert manifest.packs == tuple(PACKS)
    assert (manifest.chunk_count, manifest.slice_bytes(0), manifest.slice_bytes(3)) == (4, 65536, 512)


def test_a_row_is_found_by_its_chunk() -> None:
    manifest = load(encoded())
    assert manifest.find(chunk(2)) == rows()[1]
    assert manifest.find(chunk(1)) in (rows()[0], rows()[2])
    assert manifest.find(chunk(3)) is None
    # Ids that begin alike are told apart.
    assert manifest.find(ChunkId(chunk(2)[:4] + bytes(28))) is None


def test_rows_may_be_added_in_any_order() -> None:
    builder = ManifestBuilder(VIRTUAL_BYTES, 65536)
    for row in reversed(rows()):
        builder.add(row.index, row.chunk_id, row.encoded_bytes, PACKS.index(row.pack), row.offset)
    assert builder.finish(PACKS) == encoded()


def test_another_digest_is_refused() -> None:
    with pytest.raises(CorruptManifest, match="does not match"):
        Manifest.decode(encoded(), ImageId(bytes(32)))


@pytest.mark.parametrize(
    "row",
    [
        ChunkRow(4, chunk(1), 1, PACKS[0], 0),
        ChunkRow(3, chunk(1), 513, PACKS[0], 0),
        ChunkRow(1, chunk(1), 0, PACKS[0], 0),
        ChunkRow(1, chunk(1), 65537, PACKS[0], 0),
        ChunkRow(1, chunk(1), 2, PACKS[0], (1 << 32) - 1),
    ],
)
def test_rows_that_cannot_be_are_refused_at_load(row: ChunkRow) -> None:
    with pytest.raises(CorruptManifest, match="row 0"):
        encode_manifest(VIRTUAL_BYTES, 65536, [row])


def test_two_rows_of_one_slice_are_refused() -> None:
    with pytest.raises(CorruptManifest, match="row 1"):
        encode_manifest(VIRTUAL_BYTES, 65536, [rows()[0], rows()[0]])


@given(st.integers(0, 400), st.binary(min_size=1, max_size=8))
def test_a_damaged_manifest_is_refused_or_well_formed(at: int, patch: bytes) -> None:
    data = bytearray(encoded())
    data[at : at + len(patch)] = patch
    try:
        manifest = load(bytes(data))
    except CorruptManifest:
        return
    for row in manifest.rows():
        assert row.index < manifest.chunk_count
        assert 0 < row.encoded_bytes <= manifest.slice_bytes(row.index)
        assert row.pack in manifest.packs


@given(st.binary(max_size=200))
def test_any_bytes_are_a_manifest_or_refused(data: bytes) -> None:
    with pytest.raises(CorruptManifest):
        load(data)


def test_an_image_without_bytes_is_impossible() -> None:
    with pytest.raises(Usage, match="0 bytes"):
        ManifestBuilder(0, 65536)
