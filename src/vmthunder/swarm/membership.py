"""A node's side of its swarms: says where it is and in which, and follows the tracker's views. Never in a reader's way.

Owns the connections to the tracker and the views. One poll waits for news of all swarms; announcements go beside it. The
tracker away means that the node goes on with the views it has, or, for a new image, with the origin: one line in the log
when the tracker goes, one when it is back, and a view that it lost is brought back to it.

Belongs to one event loop. Views change only in `_run`, between awaits.
"""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from vmthunder.errors import Failure, VMThunderError
from vmthunder.ids import ImageId, NodeId
from vmthunder.serverclient import ServerUnavailable
from vmthunder.swarm.activity import Activity
from vmthunder.swarm.client import TrackerClient
from vmthunder.swarm.view import (
    CLUSTER,
    Join,
    Leave,
    Member,
    Poll,
    Roster,
    Snapshot,
    Update,
    Version,
    decode_updates,
    encode_join,
    encode_leave,
    encode_poll,
)

log = logging.getLogger(__name__)

SETTLE_S: Final = 0.3
"""The most that the first read of an image waits for its swarm."""
POLL_TIMEOUT_S: Final = 25.0
"""The tracker answers within 15 s, whether there is news or not."""
REQUEST_TIMEOUT_S: Final = 5.0
REFUSED_AGAIN_S: Final = 15.0
"""When to ask again who said that it is no tracker, or does not know us."""
LEAVE_TIMEOUT_S: Final = 1.0
"""For good-byes at our end."""
LOOK_S: Final = 5.0
"""How often the counters of reads are looked at."""


class _Swarm:
    """One image's swarm, as this node knows it."""

    __slots__ = ("announced", "roster", "settled", "wanted")

    def __init__(self) -> None:
        self.roster: Roster | None = None
        self.announced = False  # the tracker has told us a view, and not since that it does not know us
        self.wanted = True
        self.settled = asyncio.Event()  # nobody needs to wait: there is a view, or none is to be had


class Membership:
    """The swarms that this node is in."""

    def __init__(
        self,
        tracker_url: str,
        token: str | None,
        node: NodeId,
        *,
        rack: str = "",
        host: str | None = None,
        reads: Callable[[], Mapping[ImageId, int]] = dict,
        backoff: Callable[[int], float],
    ) -> None:
        """Peers reach this node at `host`; at the address from which it reaches the tracker, if that is None.

        `reads` gives counters of reads by image: while one moves, its image is in use. `backoff` gives seconds after so
        many failures.

        Raises:
            Usage: not a tracker's URL.
        """
        self.node: Final = node
        self.tracker_url: Final = tracker_url
        self.reachable: bool | None = None
        """Whether the tracker answered last time; None before the first."""
        self._token = token
        self._port = 0
        self._control_port = 0
        self._rack = rack
        self._host = host
        self._reads = reads
        self._backoff = backoff
        self._swarms: dict[ImageId, _Swarm] = {}
        self._activity = Activity()
        self._changed = asyncio.Event()  # something is to be announced, or to be left
        self._client = TrackerClient(tracker_url, token)
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, port: int) -> None:
        """Begin to follow the tracker; peers are listened for at `port`. Nothing is sent before an image is used."""
        self._port = port
        self._tasks = [asyncio.create_task(self._run()), asyncio.create_task(self._look())]

    def announce(self, control_port: int) -> None:
        """Be known as a node that takes orders at `control_port`, from now on and whatever it reads."""
        self._control_port = control_port
        self.use(CLUSTER)

    async def close(self) -> None:
        """Stop. The tracker gives the next worker of this node a moment to take our place."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._client.close()

    async def leave_all(self) -> None:
        """Stop, and say good-bye."""
        await self.close()
        if self.reachable:
            announced = [image for image, swarm in self._swarms.items() if swarm.announced]
            with contextlib.suppress(VMThunderError, TimeoutError):
                async with asyncio.timeout(LEAVE_TIMEOUT_S):
                    await _all(*(self._leave(image) for image in announced))

    def use(self, image: ImageId) -> None:
        """An image is opened or read: be in its swarm."""
        self._activity.use(image, time.monotonic())
        swarm = self._swarms.get(image)
        if swarm is None:
            swarm = self._swarms[image] = _Swarm()
            if self.reachable is False or not self._tasks:
                swarm.settled.set()
        swarm.wanted = True
        if not swarm.announced:
            self._changed.set()

    async def settled(self, image: ImageId, timeout_s: float = SETTLE_S) -> None:
        """Wait until there is a view of an image that was just used, or none is to be had; once, and never for long."""
        swarm = self._swarms.get(image)
        if swarm is not None and not swarm.settled.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await swarm.settled.wait()
            swarm.settled.set()

    def roster(self, image: ImageId) -> Roster | None:
        """The last known view; it follows the tracker. None: ask the origin."""
        swarm = self._swarms.get(image)
        return None if swarm is None else swarm.roster

    def status(self) -> dict[str, Any]:
        """For `vmthunder status`."""
        return {
            "node_id": self.node.hex(),
            "tracker": self.tracker_url,
            "tracker_reachable": self.reachable,
            "swarms": [
                {"image_id": image.hex(), "members": len(roster.members), "epoch": roster.version.epoch}
                for image, swarm in self._swarms.items()
                if image != CLUSTER and (roster := swarm.roster) is not None
            ],
        }

    # Following

    async def _run(self) -> None:
        failures = 0
        while True:
            self._changed.clear()
            try:
                await self._keep_promises()
                failures = 0
                await self._follow()
            except ServerUnavailable as error:
                failures += 1
                self._lost(error)
                await asyncio.sleep(self._backoff(failures))
            except VMThunderError as error:
                self._lost(error)
                await asyncio.sleep(REFUSED_AGAIN_S)

    async def _keep_promises(self) -> None:
        """Announce this node where it wants to be and is not, leave where it is and does not want to be."""
        todo: list[Awaitable[None]] = []
        for image, swarm in list(self._swarms.items()):
            if swarm.wanted and not swarm.announced:
                todo.append(self._join(image, swarm))
            elif not swarm.wanted and swarm.announced:
                todo.append(self._leave(image))
            elif not swarm.wanted:
                del self._swarms[image]
        await _all(*todo)

    async def _follow(self) -> None:
        """Poll until there is news, or something to be said to the tracker."""
        if self._changed.is_set():
            return
        changed = asyncio.create_task(self._changed.wait())
        versions = {
            image: Version(0, 0) if swarm.roster is None else swarm.roster.version
            for image, swarm in self._swarms.items()
            if swarm.announced
        }
        news = asyncio.create_task(self._poll(versions)) if versions else None
        try:
            await asyncio.wait([changed, *([news] if news else [])], return_when=asyncio.FIRST_COMPLETED)
            if news is not None and news.done():
                self._hear(news.result())
        finally:
            tasks = [changed, *([news] if news else [])]
            for task in tasks:
                task.cancel()
            # Not under a `suppress`: a `close` that comes just here cancels us, and that must not be taken for theirs.
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _poll(self, versions: dict[ImageId, Version]) -> dict[ImageId, Update | None]:
        return await self._ask(self._client, "poll", encode_poll(Poll(self.node, versions)), POLL_TIMEOUT_S)

    async def _join(self, image: ImageId, swarm: _Swarm) -> None:
        client = TrackerClient(self.tracker_url, self._token)
        try:
            host = self._host or await client.connect()
            port = self._control_port if image == CLUSTER else self._port
            member = Member(self.node, self._rack, host, port)
            view = None if swarm.roster is None else swarm.roster.snapshot()
            answer = await self._ask(client, "join", encode_join(Join(image, member, view)), REQUEST_TIMEOUT_S)
        except Failure as error:
            log.warning("event=swarm_refused image=%s reason=%s", image.hex(), error)
            swarm.wanted = False
            swarm.settled.set()
            return
        finally:
            client.close()
        update = answer.get(image)
        if not isinstance(update, Snapshot):
            raise ServerUnavailable(f"tracker {self.tracker_url} is being restarted")
        swarm.announced = True
        self._update(swarm, update)
        log.info("event=swarm_joined image=%s members=%d", image.hex(), len(update.members))

    async def _leave(self, image: ImageId) -> None:
        client = TrackerClient(self.tracker_url, self._token)
        try:
            await self._ask(client, "leave", encode_leave(Leave(image, self.node)), REQUEST_TIMEOUT_S)
        finally:
            client.close()
        log.info("event=swarm_left image=%s", image.hex())
        swarm = self._swarms.pop(image)
        if swarm.wanted:  # used again meanwhile
            self.use(image)

    async def _ask(
        self, client: TrackerClient, what: str, message: dict[str, Any], timeout_s: float
    ) -> dict[ImageId, Update | None]:
        answer = await client.ask("POST", f"/swarm/{what}", json.dumps(message).encode(), timeout_s=timeout_s)
        updates = decode_updates(answer)
        if self.reachable is False:
            log.info("event=tracker_back tracker=%s", self.tracker_url)
        self.reachable = True
        return updates

    def _hear(self, updates: Mapping[ImageId, Update | None]) -> None:
        for image, update in updates.items():
            swarm = self._swarms.get(image)
            if swarm is None:
                continue
            if update is None:
                swarm.announced = False
            else:
                self._update(swarm, update)

    def _update(self, swarm: _Swarm, update: Update) -> None:
        if swarm.roster is None:
            swarm.roster = Roster()
        swarm.roster.update(update)  # What does not fit changes nothing: the next poll says what we know.
        swarm.settled.set()

    def _lost(self, error: VMThunderError) -> None:
        if self.reachable is not False:
            log.warning("event=tracker_away tracker=%s reason=%s", self.tracker_url, error)
        self.reachable = False
        for swarm in self._swarms.values():
            swarm.settled.set()

    async def _look(self) -> None:
        """Stay where images are read, go where they are not."""
        while True:
            await asyncio.sleep(LOOK_S)
            now = time.monotonic()
            for image in self._activity.observe(self._reads(), now):
                self.use(image)
            for image in self._activity.leave_idle(self._swarms.keys() - {CLUSTER}, now):
                self._swarms[image].wanted = False
                self._changed.set()


async def _all(*requests: Awaitable[None]) -> None:
    """All at once, and all to their end, before the first failure is raised."""
    for result in await asyncio.gather(*requests, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result
