"""One connection to a peer: asks for chunks and answers for them.

Owns the transport, the waiters of our requests and the answers that are on their way out. Does not choose peers, check
chunks or look into caches: `Answerer` is given at construction, and whoever asked checks what came.

Threading: everything runs on one event loop. Back pressure: answers are made only while few wait to be sent, and sent
only while the transport takes them; a demand read's answer overtakes all background ones. Cancelling the future of a
request cancels the request. Reading is never paused: two ends that waited for each other to read would wait for ever.
"""

import asyncio
import functools
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, TypeAlias

from vmthunder.errors import Failure
from vmthunder.ids import Buffer, ChunkId, ImageId, NodeId
from vmthunder.peer.answer import Absent, Answer, Answerer, TooBusy
from vmthunder.peer.frames import (
    HEAD_BYTES,
    NONCE_BYTES,
    Busy,
    Cancel,
    Get,
    Goodbye,
    Have,
    Hurry,
    NotHere,
    Pong,
    Priority,
    ProtocolError,
    Reason,
    RemoteProtocolError,
    Route,
    WrongKey,
    WrongVersion,
)
from vmthunder.peer.wire import Chunk, Conversation, Event, Held, Opened, Reply, Role

log = logging.getLogger(__name__)

HANDSHAKE_S: Final = 5.0
SILENCE_S: Final = 10.0
"""A peer that has sent nothing for so long, not even a PONG, is taken for dead."""
_GOODBYE_S: Final = 2.0
_SEND_BUFFER_BYTES: Final = 256 << 10
"""Of the kernel: what a demand read's answer cannot overtake any more. Enough for 10 Gbit/s at 0.2 ms."""
_WRITE_BYTES: Final = 128 << 10
"""Answers are joined to writes of about this size; more costs cache misses, less costs system calls."""
_READY_BYTES: Final = 1 << 20
"""No more answers are made while so much waits to be sent."""
_MAKING: Final = 64
"""Background answers that are being made at one time."""
_STUCK_BYTES: Final = 8 << 20
"""A peer that lets so much wait in the transport asks and does not read."""


class LinkLost(Failure):
    """The connection is gone, or was never made; another source may do."""


Waiter: TypeAlias = "asyncio.Future[memoryview | NotHere | Busy]"


class Link(asyncio.BufferedProtocol):
    """One end of a connection. Made by `dial` and `listen`."""

    def __init__(
        self, role: Role, key: bytes, node: NodeId, answerer: Answerer, on_open: "Callable[[Link], None] | None" = None
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._talk = Conversation(role, key, node, os.urandom(NONCE_BYTES))
        self._answerer = answerer
        self._on_open = on_open
        self._transport: asyncio.Transport | None = None
        self._paused = False
        self._waiters: dict[int, Waiter] = {}
        self._questions: dict[int, asyncio.Future[list[bool]]] = {}
        # Their requests, by priority. Each is in one of three places, in the order of asking:
        self._todo: tuple[dict[int, tuple[ChunkId, Route]], ...] = ({}, {})
        self._making: dict[int, tuple[asyncio.Task[None], ChunkId, Route]] = {}
        self._ready: tuple[dict[int, Answer], ...] = ({}, {})
        self._ready_bytes = 0
        self._heard = False
        self._watch: asyncio.TimerHandle | None = None
        self.where = "?"
        """Address of the other side, for log lines."""
        self.peer: NodeId | None = None
        self.opened: asyncio.Future[None] = self._loop.create_future()
        self.closed: asyncio.Future[ProtocolError | LinkLost] = self._loop.create_future()
        """Done when the connection is gone; its result says why. Never fails."""
        self.opened.add_done_callback(_observe)

    # Asking

    @property
    def unanswered(self) -> int:
        """Chunks asked for and not answered; at most `wire.MAX_REQUESTS`."""
        return self._talk.unanswered

    def get(self, route: Route, chunks: Sequence[tuple[ChunkId, int]]) -> list[Waiter]:
        """Ask for chunks, each given with its encoded length, in one frame; one future for each, in the same order.

        A future's result is the chunk's bytes, unchecked, or what the peer said instead. It fails with LinkLost.
        Cancelling it tells the peer.

        Raises:
            LinkLost: the link is gone already.
            LocalProtocolError: too many chunks; see `Conversation.get`.
        """
        if self.closed.done():
            raise self.closed.result()
        requests, data = self._talk.get(route, chunks)
        waiters: list[Waiter] = []
        for request in requests:
            waiter = self._waiters[request] = self._loop.create_future()
            waiter.add_done_callback(functools.partial(self._on_waiter, request))
            waiters.append(waiter)
        self._write(data)
        return waiters

    def hurry(self, waiter: Waiter) -> None:
        """A guest waits now for a chunk that was asked for in the background; `waiter` is from `get`."""
        for request, known in self._waiters.items():
            if known is waiter:
                self._write(self._talk.hurry(request))
                return

    async def have(self, swarm: ImageId, chunk_ids: Sequence[ChunkId]) -> list[bool]:
        """Which of these the peer holds. Raises LinkLost."""
        if self.closed.done():
            raise self.closed.result()
        request, data = self._talk.have(swarm, chunk_ids)
        answer: asyncio.Future[list[bool]] = self._loop.create_future()
        self._questions[request] = answer
        self._write(data)
        return await answer

    def close(self, reason: Reason = Reason.LEAVING, text: str = "") -> None:
        """Say goodbye and close. Idempotent."""
        self._end(LinkLost(f"connection to peer {self.where} was closed by us"), self._talk.goodbye(reason, text))

    def _on_waiter(self, request: int, waiter: "Waiter") -> None:
        if not waiter.cancelled():
            waiter.exception()  # whoever asked may have lost interest: then nobody else looks at it
        elif self._waiters.pop(request, None) is not None:
            self._write(self._talk.cancel(request))

    # The transport's calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        host, port, *_ = transport.get_extra_info("peername") or ("?", 0)  # None if it has hung up already
        self.where = f"{host}:{port}"
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        # Any byte that the kernel does not take pauses us, so that what waits stays in our queues, sorted by priority.
        transport.set_write_buffer_limits(high=0)
        self._write(self._talk.hello())
        self._watch = self._loop.call_later(HANDSHAKE_S, self._look)

    def get_buffer(self, sizehint: int) -> memoryview:
        del sizehint
        return self._talk.buffer()

    def buffer_updated(self, nbytes: int) -> None:
        if self.closed.done():
            return  # the rest of what was sent before we closed
        self._heard = True
        try:
            events = self._talk.received(nbytes)
        except RemoteProtocolError as error:
            self._end(type(error)(f"{error} ({self.where})"), self._talk.goodbye(error.reason, str(error)))
            return
        for event in events:
            if self.closed.done():
                return  # one before this ended the conversation
            self._on_event(event)
        self._pump()

    def eof_received(self) -> None:
        """Nothing is half-open here: the transport closes."""

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(LinkLost(f"connection to peer {self.where} was lost: {exc or 'closed by the other side'}"))

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._pump()

    def _look(self) -> None:
        """Every SILENCE_S: is anybody there?"""
        if not self._talk.is_open:
            self._end(LinkLost(f"peer {self.where} did not finish the handshake within {HANDSHAKE_S:.0f} s"))
            return
        if not self._heard:
            self._end(LinkLost(f"peer {self.where} was silent for {SILENCE_S:.0f} s"))
            return
        self._heard = False
        self._write(self._talk.ping()[1])
        self._watch = self._loop.call_later(SILENCE_S, self._look)

    def _write(self, data: bytes) -> None:
        if not data or self._transport is None or self._transport.is_closing():
            return
        self._transport.write(data)
        if self._transport.get_write_buffer_size() > _STUCK_BYTES:
            self._transport.abort()  # what waits there cannot be taken back, and a goodbye would wait behind it
            self._end(LinkLost(f"peer {self.where} asks and does not read"))

    def _end(self, why: ProtocolError | LinkLost, last_words: bytes = b"") -> None:
        """The one way out: tell the peer, fail the waiters, stop the work. The first reason counts."""
        if self.closed.done():
            return
        self.closed.set_result(why)
        self._talk.close()
        if self._watch is not None:
            self._watch.cancel()
        if self._transport is not None:
            self._write(last_words)
            self._transport.close()
            # A peer that does not read any more must not keep the connection.
            self._loop.call_later(_GOODBYE_S, self._transport.abort)
        for task, _, _ in self._making.values():
            task.cancel()
        for todo, ready in zip(self._todo, self._ready, strict=True):
            todo.clear()
            ready.clear()
        waiters: list[asyncio.Future[Any]] = [*self._waiters.values(), *self._questions.values(), self.opened]
        self._waiters.clear()
        self._questions.clear()
        for waiter in waiters:
            if not waiter.done():
                waiter.set_exception(type(why)(str(why)))  # one each: raising adds to an exception's traceback
        if isinstance(why, ProtocolError):
            log.warning("%s", why)

    def _on_event(self, event: Event) -> None:
        match event:
            case Chunk(request, data):
                self._settle(request, data)
            case NotHere(request) | Busy(request):
                self._settle(request, event)
            case Get(request, route, chunk_ids):
                todo = self._todo[route.priority]
                for number, chunk_id in enumerate(chunk_ids, request):
                    todo[number] = chunk_id, route
            case Cancel(request):
                self._cancel(request)
            case Hurry(request):
                self._hurry(request)
            case Have(request, swarm, chunk_ids):
                self._write(self._talk.held(request, self._answerer.held(swarm, chunk_ids)))
            case Held(request, held):
                answer = self._questions.pop(request)
                if not answer.done():
                    answer.set_result(held)
            case Reply(data):
                self._write(data)
            case Opened(node):
                self.peer = node
                self._watch_again()
                self.opened.set_result(None)
                if self._on_open is not None:
                    self._on_open(self)
            case Goodbye(reason, text):
                kind = {Reason.WRONG_KEY: WrongKey, Reason.VERSION: WrongVersion}.get(reason, LinkLost)
                self._end(kind(f"peer {self.where} closed the connection: {text or reason.name.lower()}"))
            case Pong():
                pass  # that something was heard is all we wanted

    def _watch_again(self) -> None:
        assert self._watch is not None
        self._watch.cancel()
        self._watch = self._loop.call_later(SILENCE_S / 2, self._look)

    def _settle(self, request: int, answer: memoryview | NotHere | Busy) -> None:
        waiter = self._waiters.pop(request, None)
        if waiter is not None and not waiter.done():
            waiter.set_result(answer)

    # Answering

    def _pump(self) -> None:
        """Make answers while few are ready, send them while the transport takes them; again, until one is not true."""
        while not self.closed.done():
            self._make()
            if self._paused or not any(self._ready):
                # Something will call again: the transport, a made answer, or the next request.
                return
            self._write(self._take_ready())

    def _make(self) -> None:
        """Begin to make answers, demand first, while there is room for them."""
        while self._ready_bytes < _READY_BYTES:
            todo = self._todo[0] or (self._todo[1] if len(self._making) < _MAKING else None)
            if not todo:
                return
            request = next(iter(todo))
            chunk_id, route = todo.pop(request)
            assert self.peer is not None
            answer = self._answerer.answer(self.peer, chunk_id, route)
            if isinstance(answer, Awaitable):
                task = self._loop.create_task(self._make_one(request, answer, route.priority))
                self._making[request] = task, chunk_id, route
            else:
                self._enqueue(request, answer, route.priority)

    async def _make_one(self, request: int, coming: Awaitable[Answer], priority: int) -> None:
        try:
            answer = await coming
        except asyncio.CancelledError:
            raise
        except Exception:
            # A bug of ours must not hang the peer: it goes on to its next source.
            log.exception("an answer to peer %s failed", self.where)
            answer = Absent()
        # Cancelled or closed in the meantime: then it is not among these, and has its answer.
        if self._making.pop(request, None) is not None and not self.closed.done():
            self._enqueue(request, answer, priority)
            self._pump()

    def _enqueue(self, request: int, answer: Answer, priority: int) -> None:
        self._ready[priority][request] = answer
        self._ready_bytes += _size(answer)

    def _take_ready(self) -> bytes:
        """The next answers to send, demand first."""
        parts: list[Buffer] = []
        size = 0
        while size < _WRITE_BYTES and (ready := self._ready[0] or self._ready[1]):
            request = next(iter(ready))
            answer = ready.pop(request)
            self._ready_bytes -= _size(answer)
            size += HEAD_BYTES + _size(answer)
            if isinstance(answer, Absent):
                parts.append(self._talk.not_here(request, answer.hint))
            elif isinstance(answer, TooBusy):
                parts.append(self._talk.busy(request, answer.retry_after_s, answer.hint))
            else:
                parts += (self._talk.chunk(request, len(answer)), answer)
        return b"".join(parts)

    def _cancel(self, request: int) -> None:
        for todo in self._todo:
            todo.pop(request, None)
        for ready in self._ready:
            answer = ready.pop(request, None)
            if answer is not None:
                self._ready_bytes -= _size(answer)
        making = self._making.pop(request, None)
        if making is not None:
            making[0].cancel()
        self._write(self._talk.cancelled(request))

    def _hurry(self, request: int) -> None:
        """Wherever a background request is, it goes on as one that a guest waits for."""
        making = self._making.get(request)
        if (found := self._todo[Priority.BACKGROUND].pop(request, None)) is None and making is not None:
            task, chunk_id, route = making
            if route.priority is Priority.BACKGROUND:
                # Asked again, whoever makes the answer learns that it is urgent; what it has begun goes on.
                del self._making[request]
                task.cancel()
                found = chunk_id, route
        if found is not None:
            self._todo[Priority.DEMAND][request] = found[0], found[1]._replace(priority=Priority.DEMAND)
        elif (answer := self._ready[Priority.BACKGROUND].pop(request, None)) is not None:
            self._ready[Priority.DEMAND][request] = answer


def _size(answer: Answer) -> int:
    return 0 if isinstance(answer, Absent | TooBusy) else len(answer)


def _observe(future: "asyncio.Future[None]") -> None:
    """Nobody may be waiting for `opened`; its failure is also in `closed`."""
    if not future.cancelled():
        future.exception()


async def dial(
    host: str, port: int, key: bytes, node: NodeId, answerer: Answerer, *, timeout_s: float = HANDSHAKE_S
) -> Link:
    """Connect to a peer; returns when both sides have proved that they know the key.

    Raises:
        LinkLost: nobody there, or no answer within `timeout_s`.
        WrongKey, WrongVersion, RemoteProtocolError: it is no peer of ours.
    """
    loop = asyncio.get_running_loop()
    link: Link | None = None
    try:
        async with asyncio.timeout(timeout_s):
            _, link = await loop.create_connection(lambda: Link(Role.DIALER, key, node, answerer), host, port)
            await asyncio.shield(link.opened)
    except (OSError, TimeoutError) as error:
        raise LinkLost(
            f"cannot reach peer {host}:{port}: {str(error) or f'no answer within {timeout_s:g} s'}"
        ) from error
    finally:
        if link is not None and not link.opened.done():
            link.close()
    return link


async def listen(
    host: str, port: int, key: bytes, node: NodeId, answerer: Answerer, on_open: Callable[[Link], None]
) -> asyncio.Server:
    """Accept peers; `on_open` gets each link that has proved that it knows the key. Raises OSError."""
    loop = asyncio.get_running_loop()
    return await loop.create_server(lambda: Link(Role.LISTENER, key, node, answerer, on_open), host, port)
