"""Nodes of a swarm in one process: real links over loopback, real caches and fetchers, an origin in memory."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

import pytest
import pytest_asyncio

from node.images import Image, Packs, random_image, settled
from vmthunder.ids import Buffer, ChunkId, ImageId, NodeId, digest
from vmthunder.image.manifest import Manifest
from vmthunder.node.background import Background
from vmthunder.node.cache import ChunkCache
from vmthunder.node.decoded import DecodedChunks
from vmthunder.node.fetch import Fetcher
from vmthunder.node.limits import RateLimit
from vmthunder.node.relay import Relay
from vmthunder.node.source import OriginSource
from vmthunder.node.swarmsource import SwarmSource
from vmthunder.peer.answer import Answer
from vmthunder.peer.frames import Route
from vmthunder.peer.key import cluster_key
from vmthunder.peer.pool import Pool
from vmthunder.swarm.view import Joined, Member, Roster, Version

KEY = cluster_key(b"secret")

pytestmark = pytest.mark.asyncio


class Behaviour:
    """An answerer that may be told to do otherwise."""

    def __init__(self) -> None:
        self.relay: Relay | None = None
        self.instead: Callable[[Answer], Awaitable[Answer]] | None = None

    def answer(self, peer: NodeId, chunk_id: ChunkId, route: Route) -> Answer | Awaitable[Answer]:
        assert self.relay is not None
        if self.instead is None:
            return self.relay.answer(peer, chunk_id, route)
        return self._other(peer, chunk_id, route)

    async def _other(self, peer: NodeId, chunk_id: ChunkId, route: Route) -> Answer:
        assert self.relay is not None
        assert self.instead is not None
        answer = self.relay.answer(peer, chunk_id, route)
        return await self.instead(await answer if isinstance(answer, Awaitable) else answer)

    def held(self, swarm: ImageId, chunk_ids: Sequence[ChunkId]) -> list[bool]:
        assert self.relay is not None
        return self.relay.held(swarm, chunk_ids)


class Node:
    def __init__(
        self, number: int, directory: Path, packs: Packs, images: Sequence[Image], rosters: dict[ImageId, Roster]
    ) -> None:
        self.id = NodeId(digest(number.to_bytes(4, "big"))[:16])
        self.behaviour = Behaviour()
        self.pool = Pool(KEY, self.id)
        self.origin = OriginSource(packs)
        self.source = SwarmSource(self.id, rosters.get, self.pool, self.origin, RateLimit(0))
        self.cache = ChunkCache(directory, 1 << 30)
        self.cache.recover()
        self.fetcher = Fetcher(self.source, self.cache, DecodedChunks(1 << 20))
        manifests: dict[ImageId, Manifest] = {image.manifest.image_id: image.manifest for image in images}

        async def manifest(image: ImageId) -> Manifest | None:
            return manifests.get(image)

        self.relay = self.behaviour.relay = Relay(self.fetcher, self.cache, manifest, RateLimit(0))
        self.port = 0

    async def read(self, image: Image, first: int, count: int) -> list[Buffer]:
        rows = image.rows(first, count)
        return self.fetcher.read_now(image.manifest, rows) or await self.fetcher.read(image.manifest, rows)

    async def read_all(self, image: Image, step: int = 8) -> None:
        for first in range(0, image.manifest.chunk_count, step):
            count = min(step, image.manifest.chunk_count - first)
            assert await self.read(image, first, count) == image.slices(first, count)

    async def close(self) -> None:
        await self.pool.close()
        await self.fetcher.close()
        self.cache.close()


class Swarm:
    """Nodes that all have the same view."""

    def __init__(self, image: Image, nodes: list[Node], packs: Packs) -> None:
        self.image, self.nodes, self.packs = image, nodes, packs

    @property
    def origin_copies(self) -> float:
        """How often the origin sent the image."""
        return sum(length for _, _, length in self.packs.requests) / sum(
            row.encoded_bytes for row in self.image.rows(0, 10**6)
        )


Make = Callable[..., Awaitable[Swarm]]


@pytest_asyncio.fixture
async def make_swarm(tmp_path: Path) -> AsyncIterator[Make]:
    made: list[Node] = []

    async def make(count: int, *, chunks: int = 300, stripes: int = 4, fanout: int = 5) -> Swarm:
        image = random_image(chunks)
        packs = Packs(image)
        roster = Roster(stripes, fanout)
        roster.version = Version(1, 1)
        rosters = {image.manifest.image_id: roster}
        for number in range(count):
            node = Node(number, tmp_path / str(number), packs, [image], rosters)
            made.append(node)
            node.port = await node.pool.open("127.0.0.1", 0, node.behaviour)
            roster.change(Joined(Member(node.id, "", "127.0.0.1", node.port)))
        return Swarm(image, list(made), packs)

    yield make
    for node in made:
        await node.close()


async def test_nodes_that_read_together_get_each_chunk_from_the_origin_once(make_swarm: Make) -> None:
    swarm = await make_swarm(8)
    await asyncio.gather(*(node.read_all(swarm.image) for node in swarm.nodes))
    assert swarm.origin_copies <= 1.05
    size = sum(row.encoded_bytes for row in swarm.image.rows(0, 10**6))
    assert sum(node.fetcher.stats.bytes_from_peers for node in swarm.nodes) >= 6.8 * size
    # Nobody forwards much more than it receives.
    assert max(node.relay.sent_bytes for node in swarm.nodes) <= 2.0 * size


async def test_a_chunk_is_passed_on_while_it_is_still_on_its_way(make_swarm: Make) -> None:
    swarm = await make_swarm(6)
    with swarm.packs.hold():
        readers = [asyncio.create_task(node.read(swarm.image, 5, 1)) for node in swarm.nodes]
        await asyncio.sleep(0.1)
        assert len(swarm.packs.requests) == 1
    assert await asyncio.gather(*readers) == [swarm.image.slices(5, 1)] * 6


async def test_a_node_that_never_reads_passes_on_what_others_ask_of_it(make_swarm: Make) -> None:
    swarm = await make_swarm(6)
    await swarm.nodes[5].read_all(swarm.image)
    assert swarm.origin_copies <= 1.05
    assert swarm.nodes[0].relay.sent_bytes > 0


async def test_a_peer_that_lies_is_dropped_and_nobody_sees_its_bytes(make_swarm: Make) -> None:
    swarm = await make_swarm(6)

    async def lie(answer: Answer) -> Answer:
        assert not isinstance(answer, tuple)
        return bytes([answer[0] ^ 1, *answer[1:]])

    liar = swarm.nodes[0]
    liar.behaviour.instead = lie
    await asyncio.gather(*(node.read_all(swarm.image) for node in swarm.nodes[1:]))
    believed = [node for node in swarm.nodes[1:] if liar.id in node.source.ranking.banned]
    assert believed
    assert all(node.fetcher.stats.wrong_bytes for node in believed)
    asked = liar.relay.sent_bytes
    await swarm.nodes[1].read_all(random_image(1))
    assert liar.relay.sent_bytes == asked


async def test_a_peer_that_never_answers_costs_time_only(make_swarm: Make) -> None:
    swarm = await make_swarm(5, chunks=60)

    async def be_silent(answer: Answer) -> Answer:
        await asyncio.sleep(1000)
        return answer

    swarm.nodes[0].behaviour.instead = be_silent
    async with asyncio.timeout(30):
        await asyncio.gather(*(node.read_all(swarm.image) for node in swarm.nodes[1:]))


async def test_a_parent_that_goes_is_replaced_at_once(make_swarm: Make) -> None:
    swarm = await make_swarm(8)
    readers = [asyncio.create_task(node.read_all(swarm.image, 4)) for node in swarm.nodes[1:]]
    await asyncio.sleep(0.1)
    await swarm.nodes[0].pool.close()
    async with asyncio.timeout(30):
        await asyncio.gather(*readers)


async def test_without_an_origin_what_the_swarm_has_is_read(make_swarm: Make) -> None:
    swarm = await make_swarm(6)
    await asyncio.gather(*(node.read_all(swarm.image) for node in swarm.nodes[:3]))
    with swarm.packs.hold():
        await asyncio.gather(*(node.read_all(swarm.image) for node in swarm.nodes[3:]))


async def test_the_tree_of_2014_is_one_stripe(make_swarm: Make) -> None:
    swarm = await make_swarm(7, stripes=1, fanout=2)
    await asyncio.gather(*(node.read_all(swarm.image) for node in swarm.nodes))
    assert swarm.origin_copies <= 1.05
    assert sorted(node.relay.sent_bytes > 0 for node in swarm.nodes) == [False] * 4 + [True] * 3


async def test_an_upload_limit_is_kept(make_swarm: Make) -> None:
    swarm = await make_swarm(2, chunks=200, stripes=1, fanout=2)
    first, second = swarm.nodes
    await first.read_all(swarm.image)
    size = sum(row.encoded_bytes for row in swarm.image.rows(0, 10**6))
    first.relay._upload = RateLimit(size / 0.5)  # all of it in half a second
    begin_s = asyncio.get_running_loop().time()
    await second.read_all(swarm.image, step=40)
    took_s = asyncio.get_running_loop().time() - begin_s
    # What the limit delays the origin may send instead; what was sent kept to it.
    assert 0 < first.relay.sent_bytes <= size * (took_s / 0.5 + 0.15)


async def test_a_reader_hurries_a_background_read_all_the_way_up(make_swarm: Make) -> None:
    """The flight of each node on the way is the one that was there; the origin is asked once, and first for this."""
    swarm = await make_swarm(6, stripes=1, fanout=2)
    child = swarm.nodes[-1]
    (row,) = swarm.image.rows(7, 1)
    with swarm.packs.hold():
        child.fetcher.bring(swarm.image.manifest, [row])
        await settled(lambda: swarm.packs.requests)
        way = [node for node in swarm.nodes if node.fetcher._flights]
        assert len(way) >= 3
        assert not any(node.fetcher.urgent for node in swarm.nodes)
        reading = asyncio.create_task(child.read(swarm.image, 7, 1))
        await settled(lambda: all(node.fetcher.urgent == 1 for node in way))
    assert await reading == swarm.image.slices(7, 1)
    assert len(swarm.packs.requests) == 1
    assert all(node.fetcher.stats.hurried == 1 for node in way)
    assert all(node.source.ranking.hedges == 0 for node in swarm.nodes)


async def test_nodes_that_bring_the_same_in_the_background_get_it_from_the_origin_once(make_swarm: Make) -> None:
    swarm = await make_swarm(8)
    rows = swarm.image.rows(0, 10**6)
    arrived = [0] * 8

    async def bring(number: int) -> None:
        def count(_row: object, _slice: object) -> None:
            arrived[number] += 1

        await Background(swarm.nodes[number].fetcher).bring(swarm.image.manifest, rows, count)

    await asyncio.gather(*map(bring, range(8)))
    assert swarm.origin_copies <= 1.05
    await asyncio.gather(*(node.read_all(swarm.image) for node in swarm.nodes))
    assert swarm.origin_copies <= 1.05
