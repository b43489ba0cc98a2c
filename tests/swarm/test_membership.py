"""A node's side of its swarms, against a real server process: killed, restarted, never there."""

import asyncio
import json
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tracker_server import Server, running_server
from vmthunder.ids import ImageId, NodeId
from vmthunder.swarm import activity, membership
from vmthunder.swarm.client import TrackerClient
from vmthunder.swarm.membership import Membership
from vmthunder.swarm.view import Join, Member, Poll, Snapshot, decode_updates, encode_join, encode_poll

IMAGE, OTHER = ImageId(b"i" * 32), ImageId(b"o" * 32)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with running_server(tmp_path) as server:
        yield server


def node(number: int) -> NodeId:
    return NodeId(number.to_bytes(16, "big"))


@asynccontextmanager
async def members(url: str, token: str | None, count: int, **options: Any) -> AsyncIterator[list[Membership]]:
    """Nodes that follow the tracker."""
    nodes = [
        Membership(url, token, node(number), **{"backoff": lambda _: 0.05, **options}) for number in range(1, count + 1)
    ]
    for number, member in enumerate(nodes, 1):
        member.start(7000 + number)
    try:
        yield nodes
    finally:
        await asyncio.gather(*(member.close() for member in nodes))


async def eventually(condition: Callable[[], Any], what: str, within_s: float = 10.0) -> float:
    """Wait until `condition` holds; how long that took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() < began + within_s, f"{what}: not within {within_s:g} s"
        await asyncio.sleep(0.005)
    return time.monotonic() - began


def view(member: Membership, image: ImageId = IMAGE) -> Snapshot | None:
    roster = member.roster(image)
    return None if roster is None else roster.snapshot()


def all_see(nodes: list[Membership], count: int) -> bool:
    views = [view(member) for member in nodes]
    return views[0] is not None and len(views[0].members) == count and all(view == views[0] for view in views)


async def open_image(member: Membership, image: ImageId = IMAGE) -> None:
    member.use(image)
    await member.settled(image)


@pytest.mark.asyncio
async def test_160_nodes_that_open_an_image_in_one_second_all_have_parents_in_it(server: Server) -> None:
    async with members(server.url, server.key.token, 160) as nodes:
        began = time.monotonic()

        async def open_later(number: int) -> None:
            await asyncio.sleep(number / 160)
            await open_image(nodes[number])

        await asyncio.gather(*(open_later(number) for number in range(160)))
        await eventually(lambda: all_see(nodes, 160), "160 nodes see each other")
        took = time.monotonic() - began
        parents = [nodes[9].roster(IMAGE).topology.parents(member.node) for member in nodes]  # type: ignore[union-attr]
        origin_asked = [stripe for links in parents for stripe, parent in enumerate(links) if parent is None]
        assert sorted(origin_asked) == list(range(16))  # each stripe leaves the origin once
        print(f"160 nodes: last view after {took - 159 / 160:.3f} s")
        assert took < 159 / 160 + 1


@pytest.mark.asyncio
async def test_nodes_that_open_an_image_in_one_moment_begin_with_one_view(server: Server) -> None:
    async with members(server.url, server.key.token, 20) as nodes:
        await asyncio.gather(*(open_image(member) for member in nodes))
        assert all_see(nodes, 20)


@pytest.mark.asyncio
async def test_who_comes_and_who_goes_is_heard_by_the_others(server: Server) -> None:
    async with members(server.url, server.key.token, 3) as nodes:
        await asyncio.gather(*(open_image(member) for member in nodes[:2]))
        await open_image(nodes[2])
        assert await eventually(lambda: all_see(nodes, 3), "the third is seen") < 1
        await nodes[0].leave_all()
        assert await eventually(lambda: all_see(nodes[1:], 2), "the first is gone") < 1


@pytest.mark.asyncio
async def test_a_node_that_dies_is_gone_soon_and_its_next_worker_is_not(server: Server) -> None:
    async with members(server.url, server.key.token, 2) as nodes:
        await asyncio.gather(*(open_image(member) for member in nodes))
        seats = view(nodes[0])
        await polls(server, nodes[1])
        await nodes[1].close()  # hangs up and says nothing, as a killed process does
        async with members(server.url, server.key.token, 2) as (_, successor):
            await open_image(successor)
            assert view(successor) == seats
            await polls(server, successor)
        await eventually(lambda: all_see(nodes[:1], 1), "the dead one is gone")


@pytest.mark.asyncio
async def test_a_tracker_that_was_killed_learns_everything_from_its_nodes_again(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with members(server.url, server.key.token, 12, rack="r1") as nodes:
        for member in nodes:
            await open_image(member)
        await eventually(lambda: all_see(nodes, 12), "all are there")
        before = view(nodes[0])
        assert before is not None
        server.kill()
        await eventually(lambda: not any(member.reachable for member in nodes), "the loss is noticed")
        assert all(view(member) == before for member in nodes)

        late = time.monotonic()
        nodes[0].use(OTHER)
        await nodes[0].settled(OTHER)
        assert time.monotonic() - late < 0.05, "a tracker that is known to be away is not waited for"
        assert nodes[0].roster(OTHER) is None

        await asyncio.to_thread(server.start)  # while they try again and again

        def rebuilt() -> bool:
            now = view(nodes[0])
            return now is not None and now.version.term != before.version.term and all_see(nodes, 12)

        await eventually(rebuilt, "the swarm is there again")
        after = view(nodes[0])
        assert after is not None
        assert after.members == before.members
        await eventually(lambda: nodes[0].roster(OTHER), "what was opened meanwhile has a swarm, too")
    for event in ("tracker_away", "tracker_back"):
        assert sum(f"event={event} " in record.message for record in caplog.records) == len(nodes)


@pytest.mark.asyncio
async def test_a_tracker_that_was_never_there_is_not_waited_for(server: Server) -> None:
    server.kill()
    async with members(server.url, None, 1, backoff=lambda _: 60) as (member,):
        began = time.monotonic()
        await open_image(member)
        await open_image(member, OTHER)
        assert time.monotonic() - began < membership.SETTLE_S
        assert member.roster(IMAGE) is None
        assert member.status()["tracker_reachable"] is False


@pytest.mark.asyncio
async def test_a_tracker_that_does_not_answer_delays_the_first_read_of_an_image_for_a_moment_and_no_other() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async with await asyncio.start_server(silent, "127.0.0.1", 0) as deaf:
        port = deaf.sockets[0].getsockname()[1]
        async with members(f"http://127.0.0.1:{port}", None, 1) as (member,):
            waits = []
            for _ in range(2):
                began = time.monotonic()
                await open_image(member)
                waits.append(time.monotonic() - began)
            assert membership.SETTLE_S - 0.01 < waits[0] < membership.SETTLE_S + 0.2
            assert waits[1] < 0.05


@pytest.mark.asyncio
async def test_who_has_the_wrong_key_is_told_once_and_goes_on_without_peers(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    async with members(server.url, "wrong", 1) as (member,):
        await open_image(member)
        assert member.roster(IMAGE) is None
    (line,) = [record.message for record in caplog.records if "tracker_away" in record.message]
    assert line.endswith("wants the cluster key of that server; give it with --cluster-key")
    assert server.log.count("event=refused") == 1
    assert "reason=wrong cluster key" in server.log


@pytest.mark.asyncio
async def test_an_image_that_is_not_read_is_left_and_joined_again_when_it_is(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership, "LOOK_S", 0.05)
    monkeypatch.setattr(activity, "LEAVE_IDLE_S", 0.4)
    reads = {IMAGE: 1, OTHER: 1}

    def busy_with_one() -> dict[ImageId, int]:
        reads[OTHER] += 1
        return dict(reads)

    async with members(server.url, server.key.token, 1, reads=busy_with_one) as (member,):
        for image in (IMAGE, OTHER):
            await open_image(member, image)
        await eventually(lambda: member.roster(IMAGE) is None, "the idle swarm is left")
        await still_in(server, member, [OTHER])
        reads[IMAGE] += 1
        await eventually(lambda: member.roster(IMAGE), "the swarm is joined again")
        assert member.roster(OTHER) is not None


async def polls(server: Server, member: Membership) -> None:
    """Wait until the tracker has the node's poll."""
    await eventually(lambda: member._client._streams, "the node polls")
    await shown(server)  # what was sent before was read before


async def shown(server: Server) -> Any:
    """What the tracker shows to operators."""
    client = TrackerClient(server.url, server.key.token)
    try:
        return json.loads(await client.ask("GET", "/swarm", timeout_s=5))["swarms"]
    finally:
        client.close()


async def still_in(server: Server, member: Membership, images: list[ImageId]) -> None:
    """The tracker has the node in these swarms."""
    swarms = await shown(server)
    assert [found["image_id"] for found in swarms] == [image.hex() for image in images]
    assert member.status()["swarms"] == [
        {"image_id": found["image_id"], "members": 1, "epoch": found["epoch"]} for found in swarms
    ]


@pytest.mark.asyncio
async def test_a_node_advertises_what_it_was_told_or_the_address_it_comes_from(server: Server) -> None:
    async with (
        members(server.url, server.key.token, 1) as (first,),
        members(server.url, server.key.token, 2, host="node-2.lan", rack="r2") as (_, second),
    ):
        await asyncio.gather(open_image(first), open_image(second))
        found = view(first)
        assert found is not None
        assert set(found.members) == {
            Member(node(1), "", "127.0.0.1", 7001),
            Member(node(2), "r2", "node-2.lan", 7002),
        }


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.asyncio
async def test_1000_idle_nodes_cost_the_tracker_a_fraction_of_a_core(server: Server) -> None:
    """Each renews its poll every 15 s in production. Here a renewal is a second poll, which releases the first."""
    clients = [TrackerClient(server.url, server.key.token) for _ in range(1000)]

    async def ask(number: int, what: str, message: dict[str, Any]) -> bytes:
        body = json.dumps(message).encode()
        return await clients[number].ask("POST", f"/swarm/{what}", body, timeout_s=30)

    await in_parts(
        lambda number: ask(number, "join", encode_join(Join(IMAGE, Member(node(number), "", "10.0.0.1", 7000), None)))
    )
    answer = decode_updates(await ask(0, "poll", encode_poll(Poll(node(0), {IMAGE: (0, 0)}))))  # type: ignore[dict-item]
    newest = answer[IMAGE]
    assert isinstance(newest, Snapshot)
    assert len(newest.members) == 1000

    def poll(number: int) -> "asyncio.Task[bytes]":
        return asyncio.create_task(ask(number, "poll", encode_poll(Poll(node(number), {IMAGE: newest.version}))))

    parked = [poll(number) for number in range(1000)]
    await asyncio.sleep(2)
    renewals, window_s = 1000 / 15, 5.0
    began, cpu = time.monotonic(), cpu_s(server.pid)
    renewed = 0
    while (now := time.monotonic() - began) < window_s:
        while renewed < now * renewals:
            old, clients[renewed] = clients[renewed], TrackerClient(server.url, server.key.token)
            new = poll(renewed)
            assert await parked[renewed] == b"{}"
            parked[renewed] = new
            old.close()
            renewed += 1
        await asyncio.sleep(0.01)
    share = (cpu_s(server.pid) - cpu) / (time.monotonic() - began)
    print(f"1,000 idle nodes: {renewed} renewals, {share:.1%} of a core")
    for task in parked:
        task.cancel()
    await asyncio.gather(*parked, return_exceptions=True)
    assert share < 0.2


async def in_parts(action: Callable[[int], Awaitable[object]], count: int = 1000, at_once: int = 200) -> None:
    for start in range(0, count, at_once):
        await asyncio.gather(*(action(number) for number in range(start, start + at_once)))
