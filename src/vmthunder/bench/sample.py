"""Data for benchmarks that looks like an image's: the files of this machine's /usr, back to back."""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from vmthunder.errors import NotFound

SOURCE: Final = Path("/usr")
_READ_BYTES = 4 << 20


def write_sample(path: Path, size_bytes: int) -> None:
    """Write exactly `size_bytes` of realistic data without holes.

    Where /usr holds less, its files come again one byte further on, so that no chunk is the same as an earlier one.

    Raises:
        NotFound: there are no files to take data from.
    """
    with path.open("wb") as out:
        left = size_bytes
        while left:
            before = left
            for data in _contents():
                left -= out.write(data[:left])
                if not left:
                    return
            if left == before:
                raise NotFound(f"{SOURCE} holds no readable files to make sample data of")
            left -= out.write(b"\n")


def _contents() -> Iterator[bytes]:
    for file in sorted(SOURCE.rglob("*")):
        if file.is_symlink() or not file.is_file():
            continue
        with file.open("rb") as opened:
            while data := opened.read(_READ_BYTES):
                yield data
