"""Boots and profiles as bytes."""

import struct
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from vmthunder.ids import ImageId
from vmthunder.profile.profile import (
    EXPECTED,
    MAX_BOOT_MS,
    MAX_ENCODED_BYTES,
    MAX_ENTRIES,
    WHOLE,
    Boot,
    CorruptProfile,
    Entry,
    Profile,
    Touch,
)

GOLDEN = Path(__file__).parent.parent / "golden"
IMAGE = ImageId(bytes(range(32)))
BOOT = Boot(IMAGE, (Touch(7, 0, True), Touch(8, 0, False), Touch(3, 1500, True)), complete=True, settled_ms=9000)
PROFILE = Profile(IMAGE, 65536, 5, (Entry(7, 0, WHOLE, True), Entry(8, 2, 399, False), Entry(3, 1500, 400, True)))

u32 = st.integers(0, 2**32 - 1)
times = st.lists(st.integers(0, MAX_BOOT_MS), max_size=60).map(sorted)
indices = st.lists(u32, min_size=60, max_size=60, unique=True)


@pytest.mark.parametrize(("name", "value"), [("boot-v1.bin", BOOT), ("profile-v1.bin", PROFILE)])
def test_the_formats_are_frozen(name: str, value: Boot | Profile) -> None:
    data = (GOLDEN / name).read_bytes()
    assert type(value).decode(data, IMAGE) == value
    assert value.encode()[:52] == data[:52]  # another zstd may make other bytes of the rest
    assert zstandard.decompress(value.encode()[52:]) == zstandard.decompress(data[52:])


@given(times, indices, st.booleans())
def test_boots_come_back(at: list[int], index: list[int], complete: bool) -> None:
    touches = tuple(Touch(i, ms, i % 2 == 0) for i, ms in zip(index, at, strict=False))
    boot = Boot(IMAGE, touches, complete, settled_ms=MAX_BOOT_MS)
    assert Boot.decode(boot.encode(), IMAGE) == boot


@given(times, indices, u32, st.integers(12, 22))
def test_profiles_come_back(at: list[int], index: list[int], boots: int, log2: int) -> None:
    entries = tuple(Entry(i, ms, 1 + i % WHOLE, i % 2 == 0) for i, ms in zip(index, at, strict=False))
    profile = Profile(IMAGE, 1 << log2, boots, entries)
    assert Profile.decode(profile.encode(), IMAGE) == profile


def test_the_longest_fits() -> None:
    entries = tuple(Entry(i * 2654435761 % 2**32, i * 50, 1 + i % WHOLE, i % 3 == 0) for i in range(MAX_ENTRIES))
    data = Profile(IMAGE, 65536, 1, entries).encode()
    assert len(data) <= MAX_ENCODED_BYTES
    assert len(Profile.decode(data, IMAGE).entries) == MAX_ENTRIES


def test_what_few_boots_touch_is_not_expected() -> None:
    assert [entry.share for entry in PROFILE.expected()] == [WHOLE, EXPECTED]


def body(*columns: list[int]) -> bytes:
    return zstandard.compress(b"".join(struct.pack(f"<{len(column)}I", *column) for column in columns))


def header(magic: bytes = b"VMTHPROF", version: int = 1, small: int = 16, number: int = 1, rows: int = 2) -> bytes:
    return struct.pack("<8sHHI32sI", magic, version, small, number, IMAGE, rows)


GOOD = body([1, 2], [0, 5], [1, 1000], [0, 1])


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "not a profile"),
        (header(magic=b"VMTHBOOT") + GOOD, "not a profile"),
        (header(version=2) + GOOD, "version 2"),
        (header(small=11) + GOOD, "chunk size"),
        (header(small=65535) + GOOD, "chunk size"),
        (header(rows=3) + GOOD, "length"),
        (header(rows=MAX_ENTRIES + 1) + GOOD, "too long"),
        (header() + GOOD + bytes(MAX_ENCODED_BYTES), "too long"),
        (header() + GOOD[:-1], "damaged"),
        (header() + GOOD + b"x", "damaged"),
        (header() + body([1, 1], [0, 5], [1, 1], [0, 0]), "twice"),
        (header() + body([1, 2], [5, 0], [1, 1], [0, 0]), "backwards"),
        (header() + body([1, 2], [0, MAX_BOOT_MS + 1], [1, 1], [0, 0]), "beyond"),
        (header() + body([1, 2], [0, 1], [0, 1], [0, 0]), "share"),
        (header() + body([1, 2], [0, 1], [1, 1001], [0, 0]), "share"),
        (header() + body([1, 2], [0, 1], [1, 1], [0, 2]), "demand"),
    ],
)
def test_a_profile_that_cannot_be_is_refused(data: bytes, why: str) -> None:
    assert Profile.decode(header() + GOOD, IMAGE).boots == 1
    with pytest.raises(CorruptProfile, match=why):
        Profile.decode(data, IMAGE)


def test_a_boot_that_goes_on_after_it_settled_is_refused() -> None:
    with pytest.raises(CorruptProfile, match="settled"):
        Boot.decode(Boot(IMAGE, BOOT.touches, True, 1499).encode(), IMAGE)


def test_a_profile_of_another_image_is_refused() -> None:
    with pytest.raises(CorruptProfile, match="of image 0001"):
        Profile.decode(PROFILE.encode(), ImageId(bytes(32)))


def test_a_frame_that_promises_more_than_its_rows_is_not_unpacked() -> None:
    bomb = zstandard.compress(bytes(1 << 30))
    assert len(bomb) < MAX_ENCODED_BYTES
    with pytest.raises(CorruptProfile, match="length"):
        Profile.decode(header() + bomb, IMAGE)


@given(st.integers(0, 200), st.binary(min_size=1, max_size=8))
def test_damaged_bytes_are_refused_or_make_sense(at: int, patch: bytes) -> None:
    for value in (BOOT, PROFILE):
        data = bytearray(value.encode())
        data[at : at + len(patch)] = patch
        try:
            found = type(value).decode(bytes(data), IMAGE)
        except CorruptProfile:
            continue
        assert type(value).decode(found.encode(), IMAGE) == found
