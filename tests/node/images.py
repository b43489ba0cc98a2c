"""Images in memory and a source of their chunks that does as a test tells it."""

import asyncio
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

from vmthunder.ids import ChunkId, ImageId, PackId, digest
from vmthunder.image.chunk import encode
from vmthunder.image.manifest import ChunkRow, Manifest, ManifestBuilder
from vmthunder.image.pack import PackBuilder
from vmthunder.node.cache import ChunkCache
from vmthunder.node.segments import SEGMENT_UNITS, UNIT_BYTES

CHUNK_BYTES = 4096


class Image:
    """A published image: its content, manifest and packs of `pack_chunks` chunks."""

    def __init__(self, data: bytes, chunk_bytes: int = CHUNK_BYTES, pack_chunks: int = 64) -> None:
        self.data = data
        self.packs: dict[PackId, bytes] = {}
        ids: list[PackId] = []
        builder = ManifestBuilder(len(data), chunk_bytes)
        pack, places = PackBuilder(), dict[ChunkId, tuple[int, int]]()
        for index in range(-(-len(data) // chunk_bytes)):
            chunk_id, encoded = encode(data[index * chunk_bytes :][:chunk_bytes])
            if chunk_id not in places:
                places[chunk_id] = len(ids), pack.add(chunk_id, encoded)
            builder.add(index, chunk_id, len(encoded), *places[chunk_id])
            if pack.count == pack_chunks:
                ids.append(self._seal(pack))
                pack = PackBuilder()
        ids.append(self._seal(pack))
        manifest = builder.finish(ids)
        self.manifest = Manifest.decode(manifest, ImageId(digest(manifest)))

    def _seal(self, pack: PackBuilder) -> PackId:
        pack_id, content = pack.finish()
        self.packs[pack_id] = content
        return pack_id

    def rows(self, first: int, count: int) -> list[ChunkRow]:
        return [row for row in map(self.manifest.row, range(first, first + count)) if row is not None]

    def slices(self, first: int, count: int) -> list[bytes]:
        size = self.manifest.chunk_bytes
        return [self.data[index * size :][:size] for index in range(first, first + count)]


def random_image(chunks: int, *, seed: int = 1, tail_bytes: int = 0, **kwargs: int) -> Image:
    """Slices that differ, some of which stay raw, others shrink; the last one may be short."""
    rng = random.Random(seed)
    data = b"".join(
        rng.randbytes(CHUNK_BYTES) if index % 3 == 0 else rng.randbytes(256) * (CHUNK_BYTES // 256)
        for index in range(chunks)
    )
    return Image(data + rng.randbytes(tail_bytes), **kwargs)


class Packs:
    """An origin in memory. `hold` stops answers; `answer` may be replaced to lie or to fail."""

    def __init__(self, *images: Image) -> None:
        self.packs = {pack: content for image in images for pack, content in image.packs.items()}
        self.requests: list[tuple[PackId, int, int]] = []
        self.now = self.most = 0
        """Requests under way, and the most of them at any time."""
        self.answer: Callable[[PackId, int, int], bytes] = self.honest
        self._open = asyncio.Event()
        self._open.set()

    def honest(self, pack: PackId, offset: int, length_bytes: int) -> bytes:
        return self.packs[pack][offset:][:length_bytes]

    @contextmanager
    def hold(self) -> Iterator[None]:
        self._open.clear()
        try:
            yield
        finally:
            self._open.set()

    async def read_pack(self, pack: PackId, offset: int, length_bytes: int) -> bytes:
        self.requests.append((pack, offset, length_bytes))
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await self._open.wait()
            return self.answer(pack, offset, length_bytes)
        finally:
            self.now -= 1

    def asked_once(self) -> bool:
        """Whether no byte of a pack was asked for twice."""
        asked = sorted(self.requests)
        return all(a[0] != b[0] or a[1] + a[2] <= b[1] for a, b in pairwise(asked))


async def settled(condition: Callable[[], object], deadline_s: float = 10.0) -> None:
    """Let the loop run until `condition` holds."""
    async with asyncio.timeout(deadline_s):
        while not condition():
            await asyncio.sleep(0.001)


def make_cold(cache: ChunkCache, but: Sequence[ChunkId] = ()) -> None:
    """Take all chunks out of the page cache: one alone may be in a folio with its neighbours. Read some again."""
    for file in (cache.directory / "chunks").iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    for chunk_id in but:
        read_alone(cache, chunk_id)


def read_alone(cache: ChunkCache, chunk_id: ChunkId, size_bytes: int = 1 << 30) -> None:
    """Bring a chunk, or as much of it, into the page cache, and nothing with it."""
    file, offset, whole_bytes = place_of(cache, chunk_id)
    descriptor = os.open(file, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead
    os.pread(descriptor, min(size_bytes, whole_bytes), offset)
    os.close(descriptor)


def place_of(cache: ChunkCache, chunk_id: ChunkId) -> tuple[Path, int, int]:
    """The file in which a chunk of the cache is stored, its offset there and its size."""
    found = cache._queues.find(chunk_id)
    assert found is not None
    place, size_bytes = found
    return cache.directory / "chunks" / f"{place // SEGMENT_UNITS:08d}", place % SEGMENT_UNITS * UNIT_BYTES, size_bytes


def flip(file: Path, offset: int) -> None:
    """Damage one bit of a file."""
    descriptor = os.open(file, os.O_RDWR)
    os.pwrite(descriptor, bytes([os.pread(descriptor, 1, offset)[0] ^ 1]), offset)
    os.close(descriptor)
