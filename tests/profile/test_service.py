"""Profiles over HTTP: a real server process, the agent's client, and whatever else may be sent to it."""

import asyncio
import http.client
import random
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import one_line
from made_images import boot, manifest
from tracker_server import Server, running_server
from vmthunder.errors import Failure, NotFound, NotPermitted
from vmthunder.ids import NodeId
from vmthunder.image.manifest import Manifest
from vmthunder.origin.origin import Origin
from vmthunder.profile import store
from vmthunder.profile.client import ProfileClient
from vmthunder.profile.live import MAX_LIVE_BYTES, BadLiveMessage, LiveAnswer, LiveCall
from vmthunder.profile.profile import MAX_ENCODED_BYTES, Profile
from vmthunder.profile.service import MERGES, WRITE_S
from vmthunder.serverclient import ServerUnavailable

IMAGE = manifest(range(400))
OTHER = manifest(range(50))
DEADLINE_S = 20.0
NODES = [NodeId(bytes([n]) * 16) for n in range(4)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(tmp_path_factory.mktemp("server")) as server:
        for image in (IMAGE, OTHER):
            asyncio.run(Origin.open(str(server.root)).put_manifest(bytes(image.data)))
        yield server


@pytest.fixture
def run() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


def client_of(server: Server, *, token: str | None = None) -> ProfileClient:
    token = token or server.key.token
    return ProfileClient(Origin.open(server.url, token=token), server.url, token)


def directory(server: Server) -> Origin:
    return Origin.open(str(server.root))


async def stored(server: Server, image: Manifest, boots: int) -> Profile:
    """What is at the origin as soon as it knows that many boots."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        profile = await store.load(directory(server), image.image_id)
        if profile is not None and profile.boots >= boots:
            return profile
        assert time.monotonic() < deadline, f"never stored: {profile}"
        await asyncio.sleep(0.05)


@pytest.fixture(autouse=True)
def nothing_known(server: Server, run: asyncio.Runner) -> None:
    for image in (IMAGE, OTHER):
        run.run(directory(server).delete_profile(image.image_id))


def test_boots_of_many_nodes_become_the_profile_of_their_image(server: Server, run: asyncio.Runner) -> None:
    async def storm() -> None:
        clients = [client_of(server) for _ in range(8)]
        assert await clients[0].profile(IMAGE.image_id) is None
        await asyncio.gather(
            *(each.send_boot(boot(IMAGE, [7, 8, 9, 20 + n])) for n, each in enumerate(clients)),
            clients[0].send_boot(boot(OTHER, [1])),
        )
        at_once = await clients[0].profile(IMAGE.image_id)
        assert at_once is not None
        assert at_once.boots == 8
        assert [entry.index for entry in at_once.expected()] == [7, 8, 9]
        assert await stored(server, IMAGE, 8) == at_once
        assert (await stored(server, OTHER, 1)).boots == 1
        assert await clients[0].profile(IMAGE.image_id) == at_once
        for each in clients:
            each.close()

    run.run(storm())


def test_what_is_reset_at_the_origin_is_not_brought_back(server: Server, run: asyncio.Runner) -> None:
    async def learn_again() -> None:
        client = client_of(server)
        await client.send_boot(boot(IMAGE, [7]))
        await stored(server, IMAGE, 1)
        await directory(server).delete_profile(IMAGE.image_id)
        await client.send_boot(boot(IMAGE, [8]))
        profile = await client.profile(IMAGE.image_id)
        client.close()
        assert profile is not None
        assert [entry.index for entry in profile.entries] == [8]
        await stored(server, IMAGE, 1)

    run.run(learn_again())


def test_a_damaged_profile_is_learned_anew(server: Server, run: asyncio.Runner) -> None:
    async def learn() -> None:
        await directory(server).put_profile(IMAGE.image_id, b"VMTHPROF and no more")
        client = client_of(server)
        await client.send_boot(boot(IMAGE, [7]))
        client.close()
        deadline = time.monotonic() + DEADLINE_S
        while bytes(await directory(server).profile(IMAGE.image_id)).startswith(b"VMTHPROF and"):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        assert (await stored(server, IMAGE, 1)).boots == 1

    run.run(learn())
    assert "event=profile_damaged" in server.log


def test_of_a_large_storm_a_part_is_merged(server: Server, run: asyncio.Runner) -> None:
    async def storm() -> None:
        client = client_of(server)
        began_s = time.monotonic()
        for _ in range(6 * MERGES):
            await client.send_boot(boot(IMAGE, [7]))
        client.close()
        writes = (time.monotonic() - began_s) // WRITE_S + 1
        assert MERGES <= (await stored(server, IMAGE, MERGES)).boots <= MERGES * writes

    run.run(storm())


def test_a_server_that_ends_keeps_what_it_was_told(tmp_path: Path, run: asyncio.Runner) -> None:
    with running_server(tmp_path) as server:
        run.run(directory(server).put_manifest(bytes(IMAGE.data)))
        client = client_of(server)
        run.run(client.send_boot(boot(IMAGE, [7])))
        client.close()
        server.terminate()
        assert run.run(store.load(directory(server), IMAGE.image_id)) is not None


def test_nodes_hear_of_what_others_touch(server: Server, run: asyncio.Runner) -> None:
    async def storm() -> None:
        client = client_of(server)
        first = await client.exchange_live(IMAGE.image_id, NODES[0], 0, [5, 6])
        assert list(first.others) == []
        second = await client.exchange_live(IMAGE.image_id, NODES[1], 0, [6, 7])
        assert list(second.others) == [5]
        assert list((await client.exchange_live(IMAGE.image_id, NODES[0], first.cursor, [])).others) == [7]
        assert list((await client.exchange_live(OTHER.image_id, NODES[0], 0, [])).others) == []
        client.close()

    run.run(storm())


def test_what_the_server_will_not_take_is_said_in_one_line(server: Server, run: asyncio.Runner) -> None:
    async def refused() -> None:
        client = client_of(server)
        unknown = manifest("none")
        with pytest.raises(NotFound, match="does not learn profiles of image"):
            await client.send_boot(boot(unknown, [0]))
        with pytest.raises(NotFound, match="does not learn profiles of image"):
            await client.exchange_live(unknown.image_id, NODES[0], 0, [])
        with pytest.raises(Failure, match="has no chunk 400"):
            await client.send_boot(boot(IMAGE, [1, 400]))
        with pytest.raises(Failure, match="has no chunk 400"):
            await client.exchange_live(IMAGE.image_id, NODES[0], 0, [400])
        client.close()
        stranger = client_of(server, token="stranger")
        for asked in (stranger.profile(IMAGE.image_id), stranger.send_boot(boot(IMAGE, [1]))):
            with pytest.raises(NotPermitted, match="cluster key"):
                await asked
        stranger.close()
        away = ProfileClient(Origin.open(server.url), "http://127.0.0.1:9")
        with pytest.raises(ServerUnavailable):
            await away.send_boot(boot(IMAGE, [1]))

    run.run(refused())


def test_without_a_server_profiles_are_read_and_boots_stay_here(
    server: Server, run: asyncio.Runner, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")

    async def without() -> None:
        await store.save(directory(server), Profile(IMAGE.image_id, IMAGE.chunk_bytes, 1, ()))
        client = ProfileClient(directory(server), None)
        assert not client.learns
        assert await client.profile(IMAGE.image_id) is not None
        for _ in range(2):
            await client.send_boot(boot(IMAGE, [1]))
        with pytest.raises(NotFound):
            await client.exchange_live(IMAGE.image_id, NODES[0], 0, [])

    run.run(without())
    assert caplog.text.count("event=boots_not_learned") == 1


@pytest.mark.parametrize("what", ["boots", "live"])
def test_whatever_is_sent_is_taken_or_refused_in_one_line(server: Server, what: str) -> None:
    rng = random.Random(1)
    good = boot(IMAGE, range(9)).encode() if what == "boots" else LiveCall(NODES[0], 0, range(9)).encode()
    bodies = [b"", b"\0" * 20, good[:-1], good + b"x"]
    for _ in range(150):
        data = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        bodies.append(bytes(data))
    statuses = set()
    connection = http.client.HTTPConnection("127.0.0.1", int(server.url.rpartition(":")[2]), timeout=10)
    headers = {"Authorization": f"Bearer {server.key.token}"}
    for body in bodies:
        connection.request("POST", f"/profiles/{IMAGE.image_id.hex()}/{what}", body, headers)
        response = connection.getresponse()
        answer = response.read()
        statuses.add(response.status)
        if response.status != 200:
            one_line(answer.decode())
    assert 400 in statuses
    assert statuses <= {200, 400}
    too_long = b"x" * ((MAX_ENCODED_BYTES if what == "boots" else MAX_LIVE_BYTES) + 1)
    connection.request("POST", f"/profiles/{IMAGE.image_id.hex()}/{what}", too_long, headers)
    assert connection.getresponse().status == 413
    connection.close()


@pytest.mark.parametrize("path", ["", "/x", f"/{'a' * 63}", f"/{'a' * 64}", f"/{'A' * 64}", f"/{'a' * 64}/boots/x"])
def test_other_paths_are_not_there(server: Server, path: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", int(server.url.rpartition(":")[2]), timeout=10)
    connection.request("GET", f"/profiles{path}", headers={"Authorization": f"Bearer {server.key.token}"})
    assert connection.getresponse().status == 404
    connection.close()


def test_an_answer_that_is_none_is_said_so() -> None:
    good = LiveAnswer(7, [1, 2], 0.25)
    assert LiveAnswer.decode(good.encode()) == (7, (1, 2), 0.25)
    for data in (b"", good.encode()[:-1], struct.pack("<QII", 0, 0, 1 << 31)):
        with pytest.raises(BadLiveMessage):
            LiveAnswer.decode(data)
