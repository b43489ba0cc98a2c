"""Links over real sockets on loopback."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import pytest

from vmthunder.ids import ChunkId, ImageId, NodeId
from vmthunder.peer.answer import Absent, Answer, TooBusy
from vmthunder.peer.frames import Busy, Kind, NotHere, Priority, Reason, RemoteProtocolError, Route, WrongKey, encode
from vmthunder.peer.key import cluster_key
from vmthunder.peer.link import HANDSHAKE_S, SILENCE_S, Link, LinkLost, dial, listen

pytestmark = pytest.mark.asyncio

KEY = cluster_key(b"secret")
ALICE, BOB, CAROL = (NodeId(name.ljust(16, b".")) for name in (b"alice", b"bob", b"carol"))
ROUTE = Route(ImageId(bytes(32)), 1, 0, 0, Priority.BACKGROUND)
DEMAND = ROUTE._replace(priority=Priority.DEMAND)
SIZE = 65536


def chunk_id(number: int) -> ChunkId:
    return ChunkId(number.to_bytes(32, "big"))


def body(chunk: ChunkId) -> bytes:
    return chunk * (SIZE // len(chunk))


def chunks(first: int = 0, count: int = 250) -> list[tuple[ChunkId, int]]:
    """What to ask for."""
    return [(chunk_id(number), SIZE) for number in range(first, first + count)]


class Shelf:
    """Answers as told; remembers what it was asked."""

    def __init__(self, answer: Callable[[ChunkId], Answer | Awaitable[Answer]] = body) -> None:
        self._answer = answer
        self.asked: list[ChunkId] = []

    def answer(self, _peer: NodeId, chunk_id: ChunkId, _route: Route) -> Answer | Awaitable[Answer]:
        self.asked.append(chunk_id)
        return self._answer(chunk_id)

    def held(self, _swarm: ImageId, chunk_ids: Sequence[ChunkId]) -> list[bool]:
        return [chunk[-1] % 2 == 0 for chunk in chunk_ids]


@asynccontextmanager
async def linked(shelf: Shelf | None = None) -> AsyncIterator[tuple[Link, Link]]:
    """A dialer's and a listener's end."""
    accepted: asyncio.Future[Link] = asyncio.get_running_loop().create_future()
    server = await listen("127.0.0.1", 0, KEY, BOB, shelf or Shelf(), accepted.set_result)
    async with server:
        link = await dial("127.0.0.1", port(server), KEY, ALICE, Shelf())
        try:
            yield link, await accepted
        finally:
            link.close()
            await (await accepted).closed


@asynccontextmanager
async def impostor(
    behave: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[int]:
    """A server that is no peer; yields its port."""
    gone = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await behave(reader, writer)
        writer.close()
        await writer.wait_closed()
        gone.set()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield port(server)
        async with asyncio.timeout(5):
            await gone.wait()


def port(server: asyncio.Server) -> int:
    number = server.sockets[0].getsockname()[1]
    assert isinstance(number, int)
    return number


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


async def test_both_ends_know_who_the_other_is() -> None:
    async with linked() as (alice, bob):
        assert (alice.peer, bob.peer) == (BOB, ALICE)


async def test_a_thousand_chunks_asked_for_at_once_all_come_without_a_nudge() -> None:
    began = time.monotonic()
    async with linked() as (alice, _):
        for _ in range(3):
            waiters = [waiter for first in range(0, 1000, 250) for waiter in alice.get(ROUTE, chunks(first))]
            for number, data in enumerate(await asyncio.gather(*waiters)):
                assert data == body(chunk_id(number))
    # A lost wake-up would be mended by the next PING: too late to be seen above, so it is seen here.
    assert time.monotonic() - began < SILENCE_S / 2


async def test_both_ends_ask_at_once() -> None:
    async with linked() as (alice, bob):
        waiters = [end.get(ROUTE, chunks()) for end in (alice, bob)]
        for answers in waiters:
            for number, data in enumerate(await asyncio.gather(*answers)):
                assert data == body(chunk_id(number))


async def test_who_cannot_serve_names_another() -> None:
    async with linked(Shelf(lambda chunk: TooBusy(0.5, CAROL) if chunk == chunk_id(1) else Absent(CAROL))) as (
        alice,
        _,
    ):
        busy, absent = await asyncio.gather(*alice.get(ROUTE, [(chunk_id(1), SIZE), (chunk_id(2), SIZE)]))
    assert isinstance(busy, Busy)
    assert busy[1:] == (0.5, CAROL)
    assert isinstance(absent, NotHere)
    assert absent.hint == CAROL


async def test_questions_about_what_is_held_are_answered() -> None:
    async with linked() as (alice, _):
        assert await alice.have(ROUTE.swarm, [chunk_id(1), chunk_id(2)]) == [False, True]


async def test_a_chunk_is_passed_on_when_it_has_come() -> None:
    coming: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
    async with linked(Shelf(lambda chunk: coming if chunk == chunk_id(1) else body(chunk))) as (alice, _):
        late, early = alice.get(ROUTE, [(chunk_id(1), SIZE), (chunk_id(2), SIZE)])
        assert await early == body(chunk_id(2))
        assert not late.done()
        coming.set_result(body(chunk_id(1)))
        assert await late == body(chunk_id(1))


async def test_a_demand_read_overtakes_background_reads() -> None:
    coming: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

    async def wait(chunk: ChunkId) -> Answer:
        await asyncio.shield(coming)
        return body(chunk)

    shelf = Shelf(lambda chunk: wait(chunk) if chunk != chunk_id(999) else body(chunk))
    async with linked(shelf) as (alice, _):
        background = alice.get(ROUTE, chunks())
        await until(lambda: len(shelf.asked) > 10)
        (demand,) = alice.get(DEMAND, [(chunk_id(999), SIZE)])
        assert await demand == body(chunk_id(999))
        assert not any(waiter.done() for waiter in background)
        assert len(shelf.asked) < 100  # most of them wait in line, not in memory
        coming.set_result(Absent())
        await asyncio.gather(*background)


async def test_a_demand_reads_answer_overtakes_answers_that_wait_to_be_sent() -> None:
    order: list[ChunkId] = []
    async with linked() as (alice, bob):
        assert alice._transport is not None
        alice._transport.pause_reading()
        waiting = alice.get(ROUTE, chunks())
        await until(lambda: len(bob._ready[Priority.BACKGROUND]) > 10)
        (demand,) = alice.get(DEMAND, [(chunk_id(999), SIZE)])
        await until(lambda: bool(bob._todo[Priority.DEMAND]))
        for waiter in (*waiting, demand):
            waiter.add_done_callback(lambda done: order.append(ChunkId(bytes(done.result()[:32]))))
        alice._transport.resume_reading()
        await asyncio.gather(*waiting, demand)
    assert order.index(chunk_id(999)) < 200


async def test_cancelling_a_request_cancels_the_work_for_it() -> None:
    stopped = asyncio.Event()

    async def never(chunk: ChunkId) -> Answer:
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()
        raise AssertionError

    shelf = Shelf(lambda chunk: never(chunk) if chunk == chunk_id(1) else body(chunk))
    async with linked(shelf) as (alice, bob):
        (waiter,) = alice.get(ROUTE, [(chunk_id(1), SIZE)])
        await until(lambda: bool(shelf.asked))
        waiter.cancel()
        async with asyncio.timeout(5):
            await stopped.wait()
        # The answer to the next one comes behind that to the cancelled one.
        assert await alice.get(ROUTE, [(chunk_id(2), SIZE)])[0] == body(chunk_id(2))
        assert alice.unanswered == 0
        assert not bob.closed.done()


async def test_a_peer_that_does_not_read_costs_little_memory() -> None:
    shelf = Shelf()
    async with linked(shelf) as (alice, _):
        assert alice._transport is not None
        alice._transport.pause_reading()
        waiters = [waiter for first in range(0, 1000, 250) for waiter in alice.get(ROUTE, chunks(first))]
        await until(lambda: len(shelf.asked) > 16)
        before = -1
        while before != len(shelf.asked):
            before = len(shelf.asked)
            await asyncio.sleep(0.1)
        assert len(shelf.asked) < 500  # what the sockets hold, and 1 MiB
        alice._transport.resume_reading()
        await asyncio.gather(*waiters)


async def test_a_peer_that_asks_and_never_reads_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmthunder.peer.link._STUCK_BYTES", 100_000)
    async with linked() as (alice, bob):
        assert alice._transport is not None
        alice._transport.pause_reading()
        while not bob.closed.done():
            alice._transport.write(encode(Kind.PING, 1) * 1000)
            await asyncio.sleep(0)
        assert "does not read" in str(await bob.closed)


async def test_a_bug_in_answering_is_logged_and_does_not_hang_the_peer(caplog: pytest.LogCaptureFixture) -> None:
    async def broken(chunk: ChunkId) -> Answer:
        raise RuntimeError("bug")

    async with linked(Shelf(broken)) as (alice, _):
        assert isinstance(await alice.get(ROUTE, [(chunk_id(1), SIZE)])[0], NotHere)
    assert "an answer to peer" in caplog.text


async def test_when_a_link_is_lost_every_waiter_hears_it() -> None:
    async with linked(Shelf(lambda _: asyncio.get_running_loop().create_future())) as (alice, bob):
        waiters = alice.get(ROUTE, [(chunk_id(number), SIZE) for number in range(3)])
        held = asyncio.ensure_future(alice.have(ROUTE.swarm, [chunk_id(1)]))
        await held
        assert bob._transport is not None
        bob._transport.abort()
        for waiter in waiters:
            with pytest.raises(LinkLost):
                await waiter
        with pytest.raises(LinkLost):
            alice.get(ROUTE, [(chunk_id(1), SIZE)])


async def test_goodbye_tells_why() -> None:
    async with linked() as (alice, bob):
        bob.close(Reason.CROWDED, "too many links")
        assert "too many links" in str(await alice.closed)


async def test_another_cluster_key_is_refused_with_one_line_on_both_ends(caplog: pytest.LogCaptureFixture) -> None:
    server = await listen("127.0.0.1", 0, KEY, BOB, Shelf(), lambda _: None)
    async with server:
        with pytest.raises(WrongKey, match="another cluster key"):
            await dial("127.0.0.1", port(server), cluster_key(b"guess"), ALICE, Shelf())
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(lines) == 2
    assert all("another cluster key" in line and "127.0.0.1" in line for line in lines)


async def test_nobody_there_is_said_with_the_address() -> None:
    server = await asyncio.start_server(lambda _reader, writer: writer.close(), "127.0.0.1", 0)
    number = port(server)
    server.close()
    await server.wait_closed()
    with pytest.raises(LinkLost, match=f"127.0.0.1:{number}"):
        await dial("127.0.0.1", number, KEY, ALICE, Shelf())


async def test_one_that_accepts_and_never_answers_is_given_up() -> None:
    async def silent(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await reader.read()

    async with impostor(silent) as number:
        began = time.monotonic()
        with pytest.raises(LinkLost, match="no answer within"):
            await dial("127.0.0.1", number, KEY, ALICE, Shelf(), timeout_s=0.2)
    # The impostor has seen us hang up, too.
    assert time.monotonic() - began < HANDSHAKE_S / 2


async def test_one_that_sends_garbage_is_no_peer() -> None:
    async def garbage(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n")
        await writer.drain()

    async with impostor(garbage) as number:
        with pytest.raises(RemoteProtocolError):
            await dial("127.0.0.1", number, KEY, ALICE, Shelf())


async def test_one_that_hangs_up_in_the_handshake_is_lost() -> None:
    async def rude(_reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        pass

    async with impostor(rude) as number:
        with pytest.raises(LinkLost):
            await dial("127.0.0.1", number, KEY, ALICE, Shelf())


async def test_a_silent_peer_is_taken_for_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmthunder.peer.link.SILENCE_S", 0.2)
    async with linked(Shelf(lambda _: asyncio.get_running_loop().create_future())) as (alice, bob):
        (waiter,) = alice.get(ROUTE, [(chunk_id(1), SIZE)])
        assert bob._transport is not None
        assert bob._watch is not None
        bob._transport.pause_reading()  # alive, but neither hears nor complains
        bob._watch.cancel()
        with pytest.raises(LinkLost, match="silent"):
            async with asyncio.timeout(5):
                await waiter
        bob._transport.resume_reading()


async def test_a_slow_peer_that_answers_pings_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmthunder.peer.link.SILENCE_S", 0.5)
    coming: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
    async with linked(Shelf(lambda _: coming)) as (alice, _):
        (waiter,) = alice.get(ROUTE, [(chunk_id(1), SIZE)])
        asyncio.get_running_loop().call_later(1.5, coming.set_result, body(chunk_id(1)))
        assert await waiter == body(chunk_id(1))


async def test_a_hurried_request_overtakes_those_that_nobody_waits_for() -> None:
    order: list[ChunkId] = []
    async with linked() as (alice, bob):
        assert alice._transport is not None
        alice._transport.pause_reading()
        waiting = [waiter for first in (0, 250) for waiter in alice.get(ROUTE, chunks(first))]
        await until(lambda: bool(bob._todo[Priority.BACKGROUND]))
        alice.hurry(waiting[-1])
        await until(
            lambda: not bob._todo[Priority.BACKGROUND].keys() & {waiting[-1]} and bool(bob._todo[0] or bob._ready[0])
        )
        for waiter in waiting:
            waiter.add_done_callback(lambda done: order.append(ChunkId(bytes(done.result()[:32]))))
        alice._transport.resume_reading()
        await asyncio.gather(*waiting)
    assert order.index(chunk_id(499)) < 400


async def test_a_hurried_request_that_is_being_made_is_asked_for_again_as_urgent() -> None:
    asked: list[Priority] = []
    release = asyncio.Event()

    class Slow(Shelf):
        def answer(self, peer: NodeId, chunk: ChunkId, route: Route) -> Answer | Awaitable[Answer]:
            asked.append(route.priority)
            return self._later(chunk)

        async def _later(self, chunk: ChunkId) -> Answer:
            await release.wait()
            return body(chunk)

    async with linked(Slow()) as (alice, _):
        (waiter,) = alice.get(ROUTE, [(chunk_id(1), SIZE)])
        await until(lambda: bool(asked))
        alice.hurry(waiter)
        await until(lambda: len(asked) == 2)
        release.set()
        assert await waiter == body(chunk_id(1))
        alice.hurry(waiter)  # answered already: nothing is sent, nothing breaks
    assert asked == [Priority.BACKGROUND, Priority.DEMAND]
