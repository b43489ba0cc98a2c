"""Who may go now, where not all can go at once: a guest's read before what nobody waits for.

Belongs to the event loop.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Final

from vmthunder.node.limits import RateLimit
from vmthunder.peer.frames import Priority


class Errand:
    """For whom chunks are fetched. A background errand becomes a demand one when a guest begins to wait for it."""

    __slots__ = ("_listeners", "hops", "priority")

    def __init__(self, hops: int = 0, priority: Priority = Priority.DEMAND) -> None:
        self.hops: Final = hops
        """Nodes that the request came through; 0: from a reader on this node."""
        self.priority = priority
        self._listeners: list[Callable[[], None]] = []

    @property
    def background(self) -> bool:
        """Whether nobody waits."""
        return self.priority is Priority.BACKGROUND

    def hurry(self) -> None:
        """A guest waits now."""
        if self.background:
            self.priority = Priority.DEMAND
            for listener in self._listeners:
                listener()
            self._listeners.clear()

    def when_hurried(self, listener: Callable[[], None]) -> None:
        """Be told, once, if a guest begins to wait; never for an errand that a guest waits for anyway."""
        if self.background:
            self._listeners.append(listener)


async def pace(limit: RateLimit, size_bytes: int, errand: Errand, clock: Callable[[], float]) -> None:
    """Wait until so many bytes may go. Nothing goes in the background while anything else is in the queue."""
    if not limit.bytes_s:
        return
    hurried = asyncio.Event()
    errand.when_hurried(hurried.set)
    while errand.background and (backlog_s := limit.backlog_s(clock())):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(backlog_s):
                await hurried.wait()
    await asyncio.sleep(limit.reserve(size_bytes, clock()))


class Turns:
    """So many at a time, of which so many in the background."""

    def __init__(self, count: int, background: int) -> None:
        self._free = count
        self._free_background = background
        self._waiting: dict[asyncio.Future[bool], Errand] = {}

    @contextlib.asynccontextmanager
    async def turn(self, errand: Errand) -> AsyncIterator[None]:
        """Wait for one, and have it."""
        mine: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting[mine] = errand
        errand.when_hurried(self._admit)
        self._admit()
        try:
            await mine
            yield
        finally:
            # It may have been given in the moment in which whoever waited was cancelled.
            if self._waiting.pop(mine, None) is None:
                self._free += 1
                self._free_background += mine.result()
                self._admit()

    def _admit(self) -> None:
        for mine, errand in sorted(self._waiting.items(), key=lambda waiting: waiting[1].priority):
            if not self._free or (errand.background and not self._free_background):
                return
            if mine.done():
                continue  # cancelled, and about to leave
            del self._waiting[mine]
            self._free -= 1
            self._free_background -= errand.background
            mine.set_result(errand.background)
