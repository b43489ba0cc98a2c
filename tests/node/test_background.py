"""Background reads bring chunks, and give way to whoever waits."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from node.images import Image, Packs, random_image, settled
from vmthunder.ids import Buffer
from vmthunder.image.manifest import ChunkRow
from vmthunder.node.background import Background
from vmthunder.node.cache import ChunkCache
from vmthunder.node.decoded import DecodedChunks
from vmthunder.node.fetch import Fetcher
from vmthunder.node.limits import RateLimit
from vmthunder.node.source import MAX_BACKGROUND, MAX_REQUESTS, OriginSource
from vmthunder.node.turns import Errand, Turns, pace
from vmthunder.peer.frames import Priority

pytestmark = pytest.mark.asyncio


class Node:
    def __init__(self, directory: Path, image: Image) -> None:
        self.image = image
        self.packs = Packs(image)
        self.cache = ChunkCache(directory, 64 << 20)
        self.cache.recover()
        self.fetcher = Fetcher(OriginSource(self.packs), self.cache, DecodedChunks(8 << 20), rng=lambda: 0.001)
        self.background = Background(self.fetcher)
        self.arrived: list[tuple[int, bytes]] = []

    async def bring(self, rows: list[ChunkRow]) -> None:
        await self.background.bring(self.image.manifest, rows, self.note)

    def note(self, row: ChunkRow, slice_: Buffer) -> None:
        self.arrived.append((row.index, bytes(slice_)))

    async def read(self, index: int) -> bytes:
        (row,) = self.image.rows(index, 1)
        return bytes((await self.fetcher.read(self.image.manifest, [row]))[0])


Make = Callable[[Image], Node]


@pytest_asyncio.fixture
async def make(tmp_path: Path) -> AsyncIterator[Make]:
    made: list[Node] = []

    def node(image: Image) -> Node:
        made.append(Node(tmp_path / str(len(made)), image))
        return made[-1]

    yield node
    for one in made:
        await one.fetcher.close()
        one.cache.close()


async def test_what_is_brought_is_told_stored_and_not_brought_again(make: Make) -> None:
    image = random_image(40)
    node = make(image)
    await node.bring(image.rows(0, 40)[::-1])
    assert sorted(node.arrived) == list(enumerate(image.slices(0, 40)))
    await settled(lambda: not node.fetcher._flights)
    before = len(node.packs.requests)
    await node.bring(image.rows(0, 40))
    assert (len(node.packs.requests), len(node.arrived), node.background.in_flight_bytes) == (before, 40, 0)


async def test_a_reader_that_meets_a_background_flight_takes_it_over(make: Make) -> None:
    image = random_image(8)
    node = make(image)
    with node.packs.hold():
        bringing = asyncio.create_task(node.bring(image.rows(3, 1)))
        await settled(lambda: node.packs.requests)
        assert node.fetcher.urgent == 0
        reading = asyncio.create_task(node.read(3))
        await settled(lambda: node.fetcher.urgent == 1)
    assert await reading == image.slices(3, 1)[0]
    await bringing
    assert len(node.packs.requests) == 1
    assert node.fetcher.stats.hurried == 1
    assert node.fetcher.urgent == 0


async def test_a_reader_goes_before_all_that_waits_in_the_background(make: Make) -> None:
    image = random_image(600)
    node = make(image)
    with node.packs.hold():
        # No two of these are neighbours, so each is a request.
        flights = node.fetcher.bring(image.manifest, image.rows(0, 600)[::2])
        await settled(lambda: node.packs.now == MAX_BACKGROUND)
        reading = asyncio.create_task(node.read(599))
        await settled(lambda: node.packs.now == MAX_BACKGROUND + 1)
        # One that waits for its turn is given one as soon as somebody waits for it.
        late = asyncio.create_task(node.read(flights[-1].rows[0].index))
        await settled(lambda: node.packs.now == MAX_BACKGROUND + 2)
    assert await reading == image.slices(599, 1)[0]
    assert await late == image.slices(flights[-1].rows[0].index, 1)[0]


async def test_while_somebody_waits_little_is_brought(make: Make) -> None:
    image = random_image(400)
    node = make(image)
    node.background._window.limit_bytes = 4 << 20
    with node.packs.hold():
        reading = asyncio.create_task(node.read(0))
        await settled(lambda: node.fetcher.urgent)
        bringing = asyncio.create_task(node.bring(image.rows(1, 399)))
        await settled(lambda: node.background.in_flight_bytes)
        await asyncio.sleep(0.05)
        assert len(node.arrived) == 0
        assert node.background.in_flight_bytes <= 4096 + 64  # one chunk: nothing is known of the rate
    await asyncio.gather(reading, bringing)
    assert len(node.arrived) == 399


async def test_no_more_than_a_window_is_under_way(make: Make) -> None:
    image = random_image(1000)
    node = make(image)
    with node.packs.hold():
        bringing = asyncio.create_task(node.bring(image.rows(0, 1000)))
        await settled(lambda: node.background.in_flight_bytes)
        await asyncio.sleep(0.05)
        assert 0 < node.background.in_flight_bytes <= node.background.window_bytes
    await bringing
    assert len(node.arrived) == 1000


async def test_who_is_cancelled_gives_his_turn_back() -> None:
    turns = Turns(1, 1)

    async def work(errand: Errand) -> None:
        async with turns.turn(errand):
            await asyncio.sleep(0)

    async with turns.turn(Errand()):
        waiting = [asyncio.create_task(work(Errand(0, Priority.BACKGROUND))) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
    waiting[1].cancel()  # in the moment in which it is given the turn
    async with asyncio.timeout(5):
        assert await asyncio.gather(*waiting, return_exceptions=True) is not None
        await work(Errand())
    assert not waiting[2].cancelled()


async def test_under_a_limit_the_background_takes_only_what_is_left() -> None:
    limit = RateLimit(1e6)
    order: list[str] = []
    clock = asyncio.get_running_loop().time

    async def go(name: str, errand: Errand) -> None:
        await pace(limit, 100_000, errand, clock)
        order.append(name)

    background = Errand(0, Priority.BACKGROUND)
    hurried = Errand(0, Priority.BACKGROUND)
    tasks = [asyncio.create_task(go("first", Errand()))]
    await asyncio.sleep(0)
    tasks += [
        asyncio.create_task(go(name, errand)) for name, errand in (("background", background), ("hurried", hurried))
    ]
    await asyncio.sleep(0.01)
    tasks += [asyncio.create_task(go("second", Errand()))]
    await asyncio.sleep(0)
    hurried.hurry()
    async with asyncio.timeout(5):
        await asyncio.gather(*tasks)
    assert order == ["first", "second", "hurried", "background"]


async def test_all_turns_are_for_readers_if_they_want_them() -> None:
    turns = Turns(MAX_REQUESTS, MAX_BACKGROUND)
    inside = 0
    leave = asyncio.Event()

    async def work(errand: Errand) -> None:
        nonlocal inside
        async with turns.turn(errand):
            inside += 1
            await leave.wait()

    tasks = [asyncio.create_task(work(Errand(0, Priority.BACKGROUND))) for _ in range(50)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert inside == MAX_BACKGROUND
    tasks += [asyncio.create_task(work(Errand())) for _ in range(50)]
    await settled(lambda: inside == MAX_REQUESTS)
    leave.set()
    await asyncio.gather(*tasks)
    assert inside == 100
