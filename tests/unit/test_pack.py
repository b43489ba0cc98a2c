from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmthunder.errors import CorruptPack
from vmthunder.ids import ChunkId, PackId, digest
from vmthunder.image.pack import TRAILER_BYTES, PackBuilder, PackEntry, decode_footer, decode_trailer

GOLDEN = Path(__file__).parent.parent / "golden"


def build(chunks: list[bytes]) -> tuple[PackId, bytes, list[PackEntry]]:
    builder = PackBuilder()
    entries = []
    for data in chunks:
        chunk_id = ChunkId(digest(data))
        entries.append(PackEntry(chunk_id, builder.add(chunk_id, data), len(data)))
    return *builder.finish(), entries


def entries_of(pack: PackId, data: bytes) -> list[PackEntry]:
    offset, length = decode_trailer(data[-TRAILER_BYTES:], len(data))
    return decode_footer(data[offset : offset + length], pack)


def test_the_format_is_frozen() -> None:
    assert build([b"first", b"second chunk"])[1] == (GOLDEN / "pack-v1.bin").read_bytes()


@given(st.lists(st.binary(min_size=1, max_size=100), max_size=20))
def test_the_footer_tells_where_each_chunk_is(chunks: list[bytes]) -> None:
    pack, data, entries = build(chunks)
    assert entries_of(pack, data) == entries
    assert [data[e.offset : e.offset + e.encoded_bytes] for e in entries] == chunks


@given(st.integers(0, 10_000), st.binary(min_size=1, max_size=4))
def test_a_damaged_end_is_refused(at: int, patch: bytes) -> None:
    pack, data, entries = build([b"first", b"second chunk"])
    begin = sum(e.encoded_bytes for e in entries)
    at = begin + at % (len(data) - begin)
    damaged = data[:at] + patch + data[at + len(patch) :]
    if damaged == data:
        return
    with pytest.raises(CorruptPack):
        entries_of(pack, damaged)


@given(st.integers(0, 120))
def test_a_torn_pack_is_refused(length: int) -> None:
    pack, data, _ = build([b"first", b"second chunk"])
    with pytest.raises(CorruptPack):
        entries_of(pack, data[: min(length, len(data) - 1)])
