from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from node.images import Image, make_cold, random_image
from vmthunder.node.cache import ChunkCache
from vmthunder.node.flight import load


@pytest.fixture
def image() -> Image:
    return random_image(32)


@pytest.fixture
def cache(tmp_path: Path, image: Image) -> Iterator[ChunkCache]:
    """A cache that holds every chunk of the image."""
    cache = ChunkCache(tmp_path, 1 << 20)
    for row in image.rows(0, 32):
        cache.commit([(row.chunk_id, image.packs[row.pack][row.offset :][: row.encoded_bytes])])
    yield cache
    cache.close()


def test_whoever_may_not_wait_leaves_a_cold_chunk_and_all_after_it_to_others(cache: ChunkCache, image: Image) -> None:
    rows = image.rows(0, 8)
    make_cold(cache, but=[row.chunk_id for row in rows[:3]])
    todo = deque(rows)
    assert list(load(cache, image.manifest, todo, wait=False).values()) == image.slices(0, 3)
    assert list(todo) == rows[3:]
    assert list(load(cache, image.manifest, todo).values()) == image.slices(3, 5)


def test_threads_that_share_the_work_do_each_chunk_once(cache: ChunkCache, image: Image) -> None:
    todo = deque(image.rows(0, 32))
    with ThreadPoolExecutor(4) as pool:
        parts = [job.result() for job in [pool.submit(load, cache, image.manifest, todo) for _ in range(4)]]
    assert sum(map(len, parts)) == 32
    found = {want: outcome for part in parts for want, outcome in part.items()}
    assert [found[row.chunk_id, 4096] for row in image.rows(0, 32)] == image.slices(0, 32)
