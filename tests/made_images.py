"""Manifests made up for tests: what matters of an image here is which chunk is where."""

from collections.abc import Iterable

from vmthunder.ids import ChunkId, ImageId, PackId, digest
from vmthunder.image.manifest import ChunkRow, Manifest, encode_manifest
from vmthunder.profile.profile import Boot, Touch

CHUNK_BYTES = 65536
PACK = PackId(bytes(32))


def manifest(contents: Iterable[str | int | None], chunk_bytes: int = CHUNK_BYTES) -> Manifest:
    """An image whose slices have these contents; None is a hole."""
    slices = list(contents)
    rows = [
        ChunkRow(index, ChunkId(digest(str(content).encode())), 1, PACK, 0)
        for index, content in enumerate(slices)
        if content is not None
    ]
    data = encode_manifest(len(slices) * chunk_bytes, chunk_bytes, rows)
    return Manifest.decode(data, ImageId(digest(data)))


def boot(image: Manifest, indices: Iterable[int], *, complete: bool = True, ms_each: float = 10) -> Boot:
    """A boot that touches these chunks, one each `ms_each`."""
    touches = tuple(Touch(index, round(number * ms_each), True) for number, index in enumerate(indices))
    return Boot(image.image_id, touches, complete, settled_ms=touches[-1].at_ms if touches else 0)
