import os

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from vmthunder.errors import CorruptChunk, Usage
from vmthunder.image.chunk import MAX_CHUNK_BYTES, check_chunk_bytes, decode, encode, is_zero, verify


@given(st.binary(min_size=1, max_size=8192), st.sampled_from([1, 6, 19]))
def test_what_was_encoded_decodes_to_the_slice(data: bytes, level: int) -> None:
    encoded = encode(data, level)
    assert len(encoded.data) <= len(data)
    assert verify(encoded.chunk_id, encoded.data)
    assert bytes(decode(encoded.data, len(data))) == data


def test_incompressible_data_is_stored_raw() -> None:
    data = os.urandom(65536)
    assert encode(data).data == data


@given(st.binary(max_size=512), st.integers(1, 4096))
def test_any_bytes_decode_or_are_refused(data: bytes, slice_bytes: int) -> None:
    try:
        assert len(decode(data, slice_bytes)) == slice_bytes
    except CorruptChunk:
        pass


def test_a_frame_of_another_length_is_refused_before_it_is_unpacked() -> None:
    bomb = zstandard.ZstdCompressor(1).compress(bytes(1 << 28))
    with pytest.raises(CorruptChunk, match="not a frame of 65536 bytes"):
        decode(bomb, 65536)


def test_bytes_behind_the_frame_are_refused() -> None:
    data = bytes(1000) + os.urandom(100)
    with pytest.raises(CorruptChunk):
        decode(bytes(encode(data).data) + b"x", len(data))


def test_one_flipped_bit_is_seen() -> None:
    encoded = encode(b"boot" * 1000)
    damaged = bytearray(encoded.data)
    damaged[len(damaged) // 2] ^= 1
    assert not verify(encoded.chunk_id, damaged)


@pytest.mark.parametrize("length", [1, 4096, 65535, MAX_CHUNK_BYTES])
def test_zero_slices_are_recognised(length: int) -> None:
    data = bytearray(length)
    assert is_zero(data)
    assert is_zero(memoryview(data))
    data[-1] = 1
    assert not is_zero(data)


@pytest.mark.parametrize("chunk_bytes", [0, 2048, 65537, MAX_CHUNK_BYTES * 2])
def test_impossible_chunk_sizes_are_refused(chunk_bytes: int) -> None:
    with pytest.raises(Usage, match="power of two"):
        check_chunk_bytes(chunk_bytes)
