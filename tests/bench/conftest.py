"""A disk and a boot of it, small enough to be replayed many times."""

import random
from pathlib import Path

import pytest

from bench_disks import IMAGE_BYTES, OFFSETS, READ_BYTES
from vmthunder.lab.trace import Read, write_csv


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """An image that does not shrink."""
    path = tmp_path / "disk.raw"
    path.write_bytes(random.Random(7).randbytes(IMAGE_BYTES))
    return path


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Every second chunk of the image, one after the other, 5 ms apart."""
    path = tmp_path / "boot.csv"
    with path.open("w") as file:
        write_csv([Read(n * 0.006, n * 0.006 + 0.001, offset, READ_BYTES) for n, offset in enumerate(OFFSETS)], file)
    return path
