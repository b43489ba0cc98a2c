"""The tracker over HTTP: the asyncio shell of `Tracker`. Bodies and answers are the JSON of `view`.

    POST  /swarm/join    Join   → the whole view, once the swarm has settled
    POST  /swarm/poll    Poll   → what is new, as soon as there is something; {} after POLL_S
    POST  /swarm/leave   Leave  → {}
    GET   /swarm         who is where, for operators

An answer to `join` and `poll` is an object, image id → update, or null for a swarm that the node must announce itself to
again. A message that makes no sense gets 400 and one line. Belongs to one event loop; nothing is stored.
"""

import asyncio
import itertools
import json
import random
from collections.abc import Iterable
from typing import Final, TypeAlias

from aiohttp import web

from vmthunder.ids import ImageId
from vmthunder.serverhandlers import body, told_in_one_line
from vmthunder.swarm.topology import DEFAULT_FANOUT, DEFAULT_STRIPES
from vmthunder.swarm.tracker import LEASE_S, Tracker
from vmthunder.swarm.view import (
    MAX_TERM,
    Delta,
    Update,
    Version,
    decode_join,
    decode_leave,
    decode_poll,
    encode_update,
)

POLL_S: Final = 15.0
"""How long a poll waits for news."""
assert 3 * POLL_S <= LEASE_S

MAX_JOIN_BYTES: Final = 16 << 20
"""An announcement that brings a view of 100,000 members, of up to 150 bytes each."""
MAX_POLL_BYTES: Final = 256 << 10
"""The versions of 1,024 swarms."""
MAX_LEAVE_BYTES: Final = 4 << 10

NOTHING_NEW: Final = "{}"

_Updates: TypeAlias = Iterable[tuple[ImageId, Update | None]]
_Encoded: TypeAlias = dict[tuple[ImageId, Version, int | None], str]
"""Updates by swarm, version, and what they begin from: most are the same for all who are told in one moment."""


class TrackerService:
    """One tracker, and the requests that wait for it."""

    def __init__(self, *, stripes: int = DEFAULT_STRIPES, fanout: int = DEFAULT_FANOUT) -> None:
        """Raises Usage: stripes or fan-out make no tree."""
        self._tracker = Tracker(random.SystemRandom().randint(1, MAX_TERM), stripes=stripes, fanout=fanout)
        self._loop = asyncio.get_running_loop()
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[str]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def attach(self, app: web.Application) -> None:
        """Answer below /swarm of an application, whose runner must cancel the handlers of connections that break."""
        app.router.add_post("/swarm/join", told_in_one_line(self._join))
        app.router.add_post("/swarm/poll", told_in_one_line(self._poll))
        app.router.add_post("/swarm/leave", told_in_one_line(self._leave))
        app.router.add_get("/swarm", self._show)
        app.on_shutdown.append(self._shut_down)

    async def _join(self, request: web.Request) -> web.Response:
        join = decode_join(await body(request, MAX_JOIN_BYTES))
        waiter = next(self._numbers)
        view = self._tracker.join(join, waiter, self._loop.time())
        return await self._answer(waiter, None if view is None else [(join.swarm, view)])

    async def _poll(self, request: web.Request) -> web.Response:
        poll = decode_poll(await body(request, MAX_POLL_BYTES))
        waiter = next(self._numbers)
        return await self._answer(waiter, self._tracker.poll(poll, waiter, self._loop.time()))

    async def _leave(self, request: web.Request) -> web.Response:
        leave = decode_leave(await body(request, MAX_LEAVE_BYTES))
        self._tracker.leave(leave, self._loop.time())
        self._tick()
        return _json(NOTHING_NEW)

    async def _show(self, _: web.Request) -> web.Response:
        swarms = [{"image_id": image.hex(), **encode_update(view)} for image, view in self._tracker.views().items()]
        return _json(json.dumps({"swarms": swarms}))

    async def _answer(self, waiter: int, updates: _Updates | None) -> web.Response:
        """Answer now, or park the request until the tracker says what with, or POLL_S have passed."""
        if updates is not None:
            self._tick()
            return _json(_encode(updates, {}))
        future = self._waiting[waiter] = self._loop.create_future()
        self._tick()
        try:
            async with asyncio.timeout(POLL_S):
                return _json(await future)
        except TimeoutError:
            self._tracker.forget(waiter)
            return _json(NOTHING_NEW)
        except asyncio.CancelledError:
            self._tracker.hung_up(waiter, self._loop.time())
            self._tick()
            raise
        finally:
            self._waiting.pop(waiter, None)

    def _tick(self) -> None:
        """After every event, and when the tracker is due: answer whom it names."""
        encoded: _Encoded = {}
        for waiter, updates in self._tracker.tick(self._loop.time()):
            future = self._waiting.pop(waiter, None)
            if future is not None and not future.done():
                future.set_result(_encode(updates, encoded))
        if self._timer is not None:
            self._timer.cancel()
        due = self._tracker.due()
        self._timer = None if due is None else self._loop.call_at(due, self._tick)

    async def _shut_down(self, _: web.Application) -> None:
        for future in self._waiting.values():
            if not future.done():
                future.set_result(NOTHING_NEW)
        if self._timer is not None:
            self._timer.cancel()


def _encode(updates: _Updates, encoded: _Encoded) -> str:
    """An answer, as JSON; `encoded` remembers its parts for the next one."""
    parts = []
    for image, update in updates:
        text = "null"
        if update is not None:
            key = image, update.version, update.since if isinstance(update, Delta) else None
            text = encoded.get(key) or encoded.setdefault(key, json.dumps(encode_update(update)))
        parts.append(f'"{image.hex()}": {text}')
    return f"{{{', '.join(parts)}}}"


def _json(text: str) -> web.Response:
    return web.Response(text=text, content_type="application/json", headers={"Cache-Control": "no-store"})
