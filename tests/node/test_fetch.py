import asyncio
import gc
import logging
import random
import threading
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from node.images import CHUNK_BYTES, Image, Packs, flip, make_cold, place_of, random_image, settled
from vmthunder.errors import CorruptChunk, NotFound, OriginUnavailable
from vmthunder.ids import ChunkId, PackId, digest
from vmthunder.image.chunk import encode
from vmthunder.image.manifest import ChunkRow, encode_manifest
from vmthunder.node.cache import ChunkCache
from vmthunder.node.decoded import DecodedChunks
from vmthunder.node.fetch import LOADERS, Fetcher
from vmthunder.node.source import MAX_REQUESTS, OriginSource

pytestmark = pytest.mark.asyncio


class Node:
    """A fetcher over a cache in a directory of its own."""

    def __init__(self, directory: Path, packs: Packs, decoded_bytes: int, rng: float) -> None:
        self.packs = packs
        self.cache = ChunkCache(directory, 64 << 20)
        self.cache.recover()
        self.decoded = DecodedChunks(decoded_bytes)
        self.origin = OriginSource(packs)
        self.fetcher = Fetcher(self.origin, self.cache, self.decoded, rng=lambda: rng)

    def end(self) -> None:
        for pool in (self.fetcher._helper, self.fetcher._loaders, self.fetcher._storer._thread):
            pool.shutdown()
        self.cache.close()

    async def read(self, image: Image, first: int, number: int = 1) -> list[bytes]:
        rows = image.rows(first, number)
        slices = self.fetcher.read_now(image.manifest, rows)
        return list(map(bytes, slices if slices is not None else await self.fetcher.read(image.manifest, rows)))

    def start(self, image: Image, first: int, number: int = 1) -> "asyncio.Task[list[bytes]]":
        return asyncio.get_running_loop().create_task(self.read(image, first, number))

    async def idle(self) -> None:
        """Until nothing is in flight."""
        await settled(lambda: not self.fetcher._flights)


class Nodes:
    def __init__(self, tmp_path: Path) -> None:
        self.paths = (tmp_path / str(number) for number in count())
        self.started: list[Node] = []

    def __call__(
        self, *images: Image, decoded_bytes: int = 1 << 20, rng: float = 0.001, like: Node | None = None
    ) -> Node:
        """A new node; with `like`, one that was restarted: the same cache, nothing in memory."""
        if like is None:
            self.started.append(Node(next(self.paths), Packs(*images), decoded_bytes, rng))
        else:
            like.end()
            self.started.remove(like)
            self.started.append(Node(like.cache.directory, like.packs, decoded_bytes, rng))
        return self.started[-1]


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    nodes = Nodes(tmp_path)
    yield nodes
    for node in nodes.started:
        node.end()


@pytest.fixture
def image() -> Image:
    return random_image(40, tail_bytes=1000)


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message.partition(": ")[0] for record in caplog.records if record.levelno >= logging.WARNING]


async def test_every_read_gives_the_bytes_of_the_image(nodes: Nodes, image: Image) -> None:
    node = nodes(image, decoded_bytes=8 * CHUNK_BYTES)
    rng = random.Random(3)
    for _ in range(300):
        first, number = rng.randrange(41), rng.randint(1, 8)
        number = min(number, 41 - first)
        assert await node.read(image, first, number) == image.slices(first, number)
    await node.idle()
    assert node.packs.asked_once()
    node = nodes(like=node)
    node.packs.requests.clear()
    assert await node.read(image, 0, 41) == image.slices(0, 41)
    assert node.packs.requests == []
    assert node.fetcher.stats.chunks_from_cache == 41


async def test_equal_slices_in_one_read_are_one_chunk(nodes: Nodes) -> None:
    image = Image((b"a" * CHUNK_BYTES + b"b" * CHUNK_BYTES) * 8)
    node = nodes(image)
    assert await node.read(image, 0, 16) == image.slices(0, 16)
    assert node.fetcher.stats.chunks_decoded == 2


async def test_two_readers_share_one_flight(nodes: Nodes, image: Image) -> None:
    node = nodes(image)
    with node.packs.hold():
        readers = [node.start(image, 0, 8), node.start(image, 4, 8), node.start(image, 5)]
        await settled(lambda: node.packs.now == 2)
    assert await asyncio.gather(*readers) == [image.slices(0, 8), image.slices(4, 8), image.slices(5, 1)]
    assert len(node.packs.requests) == 2
    assert node.packs.asked_once()


async def test_neighbours_are_one_request(nodes: Nodes, image: Image) -> None:
    node = nodes(image)
    await node.read(image, 8, 16)
    assert len(node.packs.requests) == node.origin.requests == 1
    assert node.fetcher.stats.bytes_fetched == sum(row.encoded_bytes for row in image.rows(8, 16))


@pytest.mark.parametrize("decoded_bytes", [0, 1 << 20])
async def test_a_chunk_that_is_being_stored_is_not_fetched_again(
    nodes: Nodes, image: Image, decoded_bytes: int
) -> None:
    node = nodes(image, decoded_bytes=decoded_bytes)
    with node.cache._commit_lock:  # a disk that takes its time
        assert await node.read(image, 0, 4) == image.slices(0, 4)
        assert await node.read(image, 0, 4) == image.slices(0, 4)
        assert len(node.packs.requests) == 1
    await node.idle()
    assert await node.read(image, 0, 4) == image.slices(0, 4)
    assert len(node.packs.requests) == 1


async def test_eight_direct_readers_decode_each_chunk_once(nodes: Nodes, image: Image) -> None:
    node = nodes(image)

    async def reader() -> None:
        for index in range(40):
            for _ in range(4):
                assert await node.read(image, index) == image.slices(index, 1)

    await asyncio.gather(*(reader() for _ in range(8)))
    stats = node.fetcher.stats
    assert (stats.chunks_decoded, stats.chunks_fetched, stats.chunks_from_cache) == (40, 40, 0)
    assert node.packs.asked_once()


async def test_requests_at_a_time_have_a_bound(nodes: Nodes) -> None:
    image = random_image(80)
    node = nodes(image)
    with node.packs.hold():
        readers = [node.start(image, index) for index in range(0, 80, 2)]
        await settled(lambda: node.packs.now == MAX_REQUESTS)
    assert await asyncio.gather(*readers) == [image.slices(index, 1) for index in range(0, 80, 2)]
    assert node.packs.most == MAX_REQUESTS


async def test_a_reader_that_leaves_does_not_take_the_flight_along(nodes: Nodes, image: Image) -> None:
    node = nodes(image)
    with node.packs.hold():
        leaving, staying = node.start(image, 0, 4), node.start(image, 0, 4)
        await settled(lambda: node.packs.now == 1)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
    assert await staying == image.slices(0, 4)
    assert len(node.packs.requests) == 1


async def test_a_reader_may_leave_at_every_await(nodes: Nodes, image: Image) -> None:
    """Cancelled after 0, 1, 2 … turns of the loop until it gets through: nobody else notices, nothing is fetched twice."""
    for cached in (False, True):
        for turns in range(200):
            node = nodes(image)
            if cached:
                await node.read(image, 0, 4)
                await node.idle()
                node = nodes(like=node)
            leaving = node.start(image, 0, 4)
            for _ in range(turns):
                await asyncio.sleep(0)
            through = leaving.done()
            leaving.cancel()
            assert await node.read(image, 0, 6) == image.slices(0, 6)
            await node.idle()
            assert node.packs.asked_once()
            assert not node.fetcher._tasks
            assert all(row.chunk_id in node.cache for row in image.rows(0, 6))
            await node.fetcher.close()
            if through:
                break
        else:
            pytest.fail("the reader never got through")


async def test_readers_wait_while_the_origin_is_away_and_the_log_says_so_once(
    nodes: Nodes, image: Image, caplog: pytest.LogCaptureFixture
) -> None:
    node = nodes(image)
    node.packs.answer = lambda *_: raise_(OriginUnavailable("connection refused"))
    readers = [node.start(image, index, 2) for index in range(0, 8, 2)]
    await settled(lambda: len(node.packs.requests) > 20)
    waiting = node.fetcher.waiting()
    assert [(each["image"], each["chunk"], each["chunks"], each["why"]) for each in waiting] == [
        (image.manifest.image_id.hex(), index, 2, "connection refused") for index in range(0, 8, 2)
    ]
    assert not any(reader.done() for reader in readers)
    node.packs.answer = node.packs.honest
    assert await asyncio.gather(*readers) == [image.slices(index, 2) for index in range(0, 8, 2)]
    assert node.fetcher.waiting() == []
    assert messages(caplog) == ["origin is away, reads wait for it", "origin is back"]


async def test_the_first_answer_after_an_outage_ends_everybodys_wait(nodes: Nodes, image: Image) -> None:
    node = nodes(image, rng=0.999)
    node.packs.answer = lambda *_: raise_(OriginUnavailable("connection refused"))
    waiting = node.start(image, 0)
    await settled(lambda: len(node.packs.requests) == 5)  # the next delay is 1.6 s
    node.packs.answer = node.packs.honest
    assert await node.read(image, 4) == image.slices(4, 1)
    assert await asyncio.wait_for(waiting, 0.8) == image.slices(0, 1)


async def test_a_request_that_takes_long_is_shown_as_waiting(nodes: Nodes, image: Image) -> None:
    node = nodes(image)
    now_s = 100.0
    node.fetcher._clock = lambda: now_s
    with node.packs.hold():
        reader = node.start(image, 3)
        await settled(lambda: node.packs.now == 1)
        assert node.fetcher.waiting() == []
        now_s += 5
        (shown,) = node.fetcher.waiting()
        assert (shown["chunk"], shown["since_s"], shown["why"], shown["failures"]) == (3, 5.0, "under way", 0)
    await reader


async def test_a_pack_that_is_missing_is_asked_for_until_it_is_there(
    nodes: Nodes, image: Image, caplog: pytest.LogCaptureFixture
) -> None:
    node = nodes(image)
    node.packs.answer = lambda *_: raise_(NotFound("no such pack"))
    reader = node.start(image, 0)
    await settled(lambda: len(node.packs.requests) > 5)
    node.packs.answer = node.packs.honest
    assert await reader == image.slices(0, 1)
    assert messages(caplog) == ["origin does not give a chunk"]


async def test_wrong_bytes_are_never_shown_nor_stored_and_hold_up_no_other_chunk(
    nodes: Nodes, image: Image, caplog: pytest.LogCaptureFixture
) -> None:
    node = nodes(image)
    lie_at = image.rows(2, 1)[0].offset

    def lie(pack: PackId, offset: int, length_bytes: int) -> bytes:
        data = bytearray(node.packs.honest(pack, offset, length_bytes))
        if offset <= lie_at < offset + length_bytes:
            data[lie_at - offset] ^= 1
        return bytes(data)

    node.packs.answer = lie
    reader = node.start(image, 0, 4)
    await settled(lambda: node.fetcher.stats.wrong_bytes > 5)
    assert await node.read(image, 3) == image.slices(3, 1)
    assert not reader.done()
    assert image.rows(2, 1)[0].chunk_id not in node.cache
    (waiting,) = node.fetcher.waiting()
    assert (waiting["chunk"], waiting["why"]) == (2, "the origin sends wrong bytes")
    node.packs.answer = node.packs.honest
    assert await reader == image.slices(0, 4)
    await node.idle()
    assert image.rows(2, 1)[0].chunk_id in node.cache
    assert messages(caplog) == ["origin sent wrong bytes, asking again"]


async def test_an_answer_that_is_cut_short_is_wrong_bytes(nodes: Nodes, image: Image) -> None:
    node = nodes(image)
    node.packs.answer = lambda *range_: node.packs.honest(*range_)[:-1]
    reader = node.start(image, 0, 4)
    await settled(lambda: node.fetcher.stats.wrong_bytes > 2)
    node.packs.answer = node.packs.honest
    assert await reader == image.slices(0, 4)


async def test_a_flipped_bit_in_the_cache_is_fetched_again_and_counted(nodes: Nodes, image: Image) -> None:
    node = nodes(image)
    await node.read(image, 0, 8)
    await node.idle()
    node = nodes(like=node)
    chunk_id = image.rows(3, 1)[0].chunk_id
    file, offset, _ = place_of(node.cache, chunk_id)
    flip(file, offset)
    node.packs.requests.clear()
    assert await node.read(image, 0, 8) == image.slices(0, 8)
    await node.idle()
    assert len(node.packs.requests) == 1
    assert node.cache.stats()["corrupt"] == 1
    assert digest(node.cache.load(chunk_id) or b"") == chunk_id
    stats = node.fetcher.stats
    assert (stats.chunks_from_cache, stats.chunks_fetched, stats.chunks_decoded) == (7, 1, 8)


async def test_a_single_chunk_in_the_page_cache_is_read_without_a_wait(nodes: Nodes, image: Image) -> None:
    node = nodes(image)
    assert node.fetcher.read_now(image.manifest, image.rows(0, 1)) is None
    await node.read(image, 0)
    await node.idle()
    node = nodes(like=node)
    assert node.fetcher.read_now(image.manifest, image.rows(0, 1)) == image.slices(0, 1)
    assert node.fetcher.read_now(image.manifest, image.rows(0, 2)) is None
    assert (node.fetcher.stats.chunks_from_cache, node.decoded.hits) == (1, 0)
    assert node.fetcher.read_now(image.manifest, image.rows(0, 1)) == image.slices(0, 1)
    assert (node.fetcher.stats.chunks_from_cache, node.decoded.hits) == (1, 1)


async def test_a_chunk_that_is_being_loaded_is_not_decoded_a_second_time(nodes: Nodes, image: Image) -> None:
    node = nodes(image)
    await node.read(image, 0, 4)
    await node.idle()
    node = nodes(like=node)
    free = threading.Event()
    for _ in range(LOADERS):
        node.fetcher._loaders.submit(free.wait)
    try:
        make_cold(node.cache)
        readers = [node.start(image, 0, 4), node.start(image, 2, 2)]
        await settled(lambda: node.fetcher._flights)
        for row in image.rows(0, 4):
            assert node.cache.load(row.chunk_id)  # in the page cache again
        assert node.fetcher.read_now(image.manifest, image.rows(1, 1)) is None
    finally:
        free.set()
    assert await asyncio.gather(*readers) == [image.slices(0, 4), image.slices(2, 2)]
    assert node.fetcher.stats.chunks_decoded == 4


async def test_a_chunk_that_was_published_broken_fails_every_reader_and_only_them(nodes: Nodes) -> None:
    broken = b"not a zstd frame"
    good = encode(b"good" * 1024)
    pack = PackId(digest(b"pack"))
    rows = [
        ChunkRow(0, good.chunk_id, len(good.data), pack, 0),
        ChunkRow(1, ChunkId(digest(broken)), len(broken), pack, len(good.data)),
    ]
    image = random_image(2)
    data = encode_manifest(2 * CHUNK_BYTES, CHUNK_BYTES, rows)
    image.manifest = type(image.manifest)(data, image.manifest.image_id)
    node = nodes()
    node.packs.packs[pack] = bytes(good.data) + broken
    with node.packs.hold():
        readers = [node.start(image, 0, 2), node.start(image, 1), node.start(image, 0)]
        await settled(lambda: node.packs.now == 1)
    results = await asyncio.gather(*readers, return_exceptions=True)
    assert [type(result) for result in results] == [CorruptChunk, CorruptChunk, list]
    await node.idle()
    with pytest.raises(CorruptChunk, match="published broken"):
        await node.read(image, 1)
    assert len(node.packs.requests) == 1


async def test_a_bug_reaches_every_reader_and_the_log_and_the_next_read_tries_again(
    nodes: Nodes, image: Image, caplog: pytest.LogCaptureFixture
) -> None:
    node = nodes(image)
    node.packs.answer = lambda *_: raise_(ZeroDivisionError())
    with node.packs.hold():
        readers = [node.start(image, 0, 2), node.start(image, 0)]
        await settled(lambda: node.packs.now == 1)
    results = await asyncio.gather(*readers, return_exceptions=True)
    assert [type(result) for result in results] == [ZeroDivisionError] * 2
    assert messages(caplog) == ["flight failed"]
    node.packs.answer = node.packs.honest
    assert await node.read(image, 0, 2) == image.slices(0, 2)


async def test_a_bug_that_nobody_waits_for_is_logged_once(
    nodes: Nodes, image: Image, caplog: pytest.LogCaptureFixture
) -> None:
    node = nodes(image)
    node.packs.answer = lambda *_: raise_(ZeroDivisionError())
    with node.packs.hold():
        reader = node.start(image, 0)
        await settled(lambda: node.packs.now == 1)
        reader.cancel()
        await asyncio.wait([reader])
    await node.idle()
    gc.collect()  # asyncio complains of an error that nobody looked at when the future goes away
    assert messages(caplog) == ["flight failed"]


async def test_one_chunk_id_in_images_of_two_chunk_sizes(nodes: Nodes) -> None:
    """The raw slice of one image is a whole zstd frame for the other."""
    inner = random.Random(5).randbytes(4 * CHUNK_BYTES - 1000) + bytes(1000)
    frame = bytes(encode(inner, 1).data)
    assert CHUNK_BYTES < len(frame) < 4 * CHUNK_BYTES
    outer = Image(inner, chunk_bytes=4 * CHUNK_BYTES)
    raw = Image(frame, chunk_bytes=4 * CHUNK_BYTES)
    frame_row = ChunkRow(0, ChunkId(digest(frame)), len(frame), next(iter(raw.packs)), 0)
    raw.packs = {frame_row.pack: frame}
    for image in (outer, raw):
        data = encode_manifest(len(image.data), 4 * CHUNK_BYTES, [frame_row])
        image.manifest = type(image.manifest)(data, image.manifest.image_id)
    node = nodes(raw)
    with node.packs.hold():
        readers = [node.start(outer, 0), node.start(raw, 0)]
        await settled(lambda: node.packs.now == 2)
    assert await asyncio.gather(*readers) == [[inner], [frame]]
    await node.idle()
    assert [await node.read(outer, 0), await node.read(raw, 0)] == [[inner], [frame]]


async def test_closing_ends_readers_that_wait_and_keeps_what_arrived(nodes: Nodes, image: Image) -> None:
    node = nodes(image)
    with node.cache._commit_lock:
        await node.read(image, 0, 4)
        with node.packs.hold():
            reader = node.start(image, 8)
            await settled(lambda: node.packs.now == 1)
            closing = asyncio.get_running_loop().create_task(node.fetcher.close())
            with pytest.raises(asyncio.CancelledError):
                await reader
    await closing
    assert all(row.chunk_id in node.cache for row in image.rows(0, 4))


def raise_(error: Exception) -> bytes:
    raise error
