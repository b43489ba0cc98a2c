"""Reads ahead of guests what earlier boots of their image read, and learns from each boot.

A session begins when an image is opened here and ends when it has been closed for a while. Its profile is fetched beside
the manifest and replayed in order; what was brought is pushed into the page cache within a budget of memory, and else left
where a read finds it soon. Meanwhile a recorder notes what the guest touches first; when the boot has settled, that goes to
the server. While a profile is missing, or does not fit, nodes that boot at the same time tell each other what they touch.

What was pushed is never asked of us, so a boot with pushes cannot say what it did not read. Therefore a share of the boots
is not pushed for, and all while a profile is young: these are complete, the others only add.

Nothing here is waited for by a guest, and nothing is kept on disk. Belongs to the event loop; a session's state changes
only in its callbacks and in `_replay` and `_learn`, between awaits.
"""

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from vmthunder.errors import OriginUnavailable, VMThunderError
from vmthunder.ids import Buffer, ImageId, NodeId
from vmthunder.image.manifest import ChunkRow, Manifest
from vmthunder.node.background import Background
from vmthunder.node.backoff import delay_s
from vmthunder.node.budget import PushBudget
from vmthunder.node.fetch import Fetcher
from vmthunder.node.limits import RateLimit
from vmthunder.node.mountstate import Node
from vmthunder.node.recorder import FEWEST_TOUCHES, Recorder
from vmthunder.profile.live import LiveAnswer
from vmthunder.profile.profile import Boot, Profile

log = logging.getLogger(__name__)

LINGER_S: Final = 10.0
"""A closed image may be opened again: tools look at it before a guest does."""
LOOK_S: Final = 0.5
YOUNG_BOOTS: Final = 3
"""A profile of fewer boots is learned from all."""
LEARNING_SHARE: Final = 1 / 8
"""Of the boots that are not pushed for, later."""
UNEXPECTED: Final = 8
"""A boot that touched so many chunks which its profile does not have is another boot: nodes tell each other."""
SILENT_S: Final = 5.0
"""A server that cannot be asked what others touch is asked again after that."""
SEND_TRIES: Final = 6
SEND_WITHIN_S: Final = 2.0
"""Nodes that booted together do not send together."""


class Profiles(Protocol):
    """Where boots are learned from."""

    async def profile(self, image: ImageId) -> Profile | None: ...
    async def send_boot(self, boot: Boot) -> None: ...
    async def exchange_live(self, image: ImageId, node: NodeId, cursor: int, touched: Sequence[int]) -> LiveAnswer: ...


class Session:
    """One image that is open here. Implements `vmthunder.node.image.Watch`."""

    def __init__(self, node: Node, manifest: Manifest, clock: Callable[[], float], fetcher: Fetcher) -> None:
        size = manifest.chunk_count
        self.node: Final = node
        self.manifest: Final = manifest
        self.recorder: Recorder = Recorder(manifest)
        self.seen = self.recorder.seen
        self.profile: Profile | None = None
        self.queue: deque[int] = deque()
        self.more = asyncio.Event()
        """There is something in the queue."""
        self.expected = bytearray(size)
        """By index: 1 if the profile or another node named the chunk."""
        self.unexpected: list[int] = []
        """Touched, and neither in the profile nor named by another node."""
        self.told = 0
        """Of them, those that other nodes were told."""
        self.brought = bytearray(size)
        """By index: 1 for what was brought here before it was touched, 2 if it was pushed too."""
        self.pushed_bytes = 0
        self.pushing = False
        self.direct = False
        """Who opened it last reads past the page cache: all that he reads is seen, and nothing is pushed for him."""
        self.hits = 0
        self.misses = 0
        self.replaying: asyncio.Task[None] | None = None
        self.hydrating: asyncio.Task[None] | None = None
        self._clock = clock
        self._fetcher = fetcher

    def touch(self, offset: int, end: int, *, direct: bool) -> None:
        for index in self.recorder.touch(offset, end, self._clock(), direct=direct):
            if self.brought[index]:
                self.hits += 1
            elif (row := self.manifest.row(index)) is not None and not self._fetcher.is_near(self.manifest, row):
                self.misses += 1
            if not self.expected[index]:
                self.unexpected.append(index)

    def expect(self, indexes: Sequence[int]) -> None:
        """Bring these, after what is in the queue already."""
        for index in indexes:
            if 0 <= index < len(self.expected) and not self.expected[index]:
                self.expected[index] = 1
                self.queue.append(index)
        self.more.set()

    def rows(self) -> Iterator[ChunkRow]:
        """What is to be brought, until the queue is empty."""
        while self.queue:
            index = self.queue.popleft()
            if not self.seen[index] and (row := self.manifest.row(index)) is not None:
                yield row

    @property
    def wasted(self) -> int:
        """Chunks that were brought and not touched so far, but for those that were pushed: nobody can tell."""
        return self.brought.count(1) - self.hits


@dataclass(slots=True)
class _Counts:
    """Of sessions that have ended."""

    hits: int = 0
    misses: int = 0
    wasted: int = 0
    pushed_bytes: int = 0


class Prefetcher:
    """The sessions of a node."""

    def __init__(
        self,
        background: Background,
        fetcher: Fetcher,
        profiles: Profiles,
        me: NodeId,
        push: Callable[[int, int, Buffer], None],
        budget: PushBudget,
        manifest: Callable[[ImageId], Awaitable[Manifest]],
        settled: Callable[[ImageId], Awaitable[None]],
        warm: set[int],
        hydrate_bytes_s: int | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        rng: Callable[[], float] = random.random,
    ) -> None:
        """`settled` waits for the swarm of an image; `warm` are nodes that the page cache may know already; at
        `hydrate_bytes_s`, 0 for no limit, the rest of an image follows its boot.
        """
        self._background = background
        self._fetcher = fetcher
        self._profiles = profiles
        self._me = me
        self._push = push
        self._budget = budget
        self._manifest = manifest
        self._settled = settled
        self._warm = warm
        self._hydrate_bytes_s = hydrate_bytes_s
        self._clock = clock
        self._rng = rng
        self._sessions: dict[ImageId, Session] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._past = _Counts()
        self._boots_sent = 0
        self._boots_dropped = 0

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def opened(self, node: Node, *, direct: bool) -> None:
        """An image is read on demand from now on; `direct`: past the page cache."""
        session = self._sessions.get(node.image_id)
        if session is None:
            self._spawn(self._open(node, direct))
        else:
            session.direct = direct

    def watch(self, node: Node, manifest: Manifest) -> Session:
        """Who is to be told of the reads of an image."""
        session = self._sessions.get(node.image_id)
        if session is None or session.node is not node:
            session = self._sessions[node.image_id] = Session(node, manifest, self._clock, self._fetcher)
            session.replaying = self._spawn(self._replay(session))
            self._spawn(self._learn(session))
        return session

    def ready(self, image: ImageId) -> None:
        """A guest of this image is ready."""
        session = self._sessions.get(image)
        if session is not None:
            session.recorder.ready(self._clock())

    def status(self) -> dict[str, Any]:
        """For `vmthunder status`. Counts chunks, of all sessions so far."""
        sessions = self._sessions.values()
        return {
            "images": len(sessions),
            "chunks": self._background.chunks,
            "bytes": self._background.bytes,
            "hits": self._past.hits + sum(session.hits for session in sessions),
            "misses": self._past.misses + sum(session.misses for session in sessions),
            "wasted": self._past.wasted + sum(session.wasted for session in sessions),
            "pushed_bytes": self._past.pushed_bytes + sum(session.pushed_bytes for session in sessions),
            "in_flight_bytes": self._background.in_flight_bytes,
            "window_bytes": self._background.window_bytes,
            "boots_sent": self._boots_sent,
            "boots_dropped": self._boots_dropped,
        }

    def _spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _open(self, node: Node, direct: bool) -> None:
        self.watch(node, await self._manifest(node.image_id)).direct = direct

    async def _replay(self, session: Session) -> None:
        image = session.manifest.image_id
        # The swarm must be known before everything is asked of the origin.
        profile, _ = await asyncio.gather(self._profile(image), self._settled(image))
        if profile is not None:
            indexes = _indexes(profile, session.manifest)
            if indexes is None:
                log.warning("event=profile_ignored image=%s reason=it does not fit the image", image.hex())
            else:
                session.profile = profile
                session.pushing = profile.boots >= YOUNG_BOOTS and self._rng() >= LEARNING_SHARE
                session.expect(indexes)
        while True:
            session.more.clear()
            await self._background.bring(
                session.manifest, session.rows(), lambda row, slice_: self._arrived(session, row, slice_)
            )
            await session.more.wait()

    async def _profile(self, image: ImageId) -> Profile | None:
        try:
            return await self._profiles.profile(image)
        except VMThunderError as error:
            log.warning("event=no_profile image=%s reason=%s", image.hex(), error)
            return None

    def _arrived(self, session: Session, row: ChunkRow, slice_: Buffer) -> None:
        if session.seen[row.index]:
            session.hits += 1  # while it was on its way
            return
        session.brought[row.index] = 1
        if session.pushing and not session.direct and self._budget.take(len(slice_)):
            self._push(session.node.number, row.index * session.manifest.chunk_bytes, slice_)
            session.brought[row.index] = 2
            session.pushed_bytes += len(slice_)

    async def _learn(self, session: Session) -> None:
        """Until the image has been closed for a while; its boot is sent when it has settled."""
        closed_at_s = float("inf")
        cursor, wait_s, learned = 0, LOOK_S, False
        while True:
            await asyncio.sleep(wait_s)
            now_s, wait_s = self._clock(), LOOK_S
            closed_at_s = min(closed_at_s, now_s) if not session.node.handles else float("inf")
            closed = now_s - closed_at_s >= LINGER_S or self._sessions.get(session.node.image_id) is not session
            if not learned and (closed or session.recorder.is_over(now_s)):
                learned = True
                cold = session.node.number not in self._warm and not session.pushed_bytes
                boot = session.recorder.boot(complete=cold or session.direct)
                if boot is not None:
                    self._spawn(self._send(boot))
                    if self._hydrate_bytes_s is not None and not closed:
                        session.hydrating = self._spawn(self._hydrate(session, RateLimit(self._hydrate_bytes_s)))
            if closed:
                self._end(session)
                return
            if not learned and (session.profile is None or len(session.unexpected) >= UNEXPECTED):
                cursor, wait_s = await self._exchange(session, cursor)

    async def _hydrate(self, session: Session, limit: RateLimit) -> None:
        """The whole image, for as long as it is open."""
        manifest = session.manifest
        await self._background.bring(manifest, manifest.rows(), lambda _row, _slice: None, limit)
        log.info("event=hydrated image=%s", manifest.image_id.hex())

    async def _exchange(self, session: Session, cursor: int) -> tuple[int, float]:
        """Tell what was touched here, bring what was touched elsewhere; where to go on, and after how many seconds."""
        touched = session.unexpected[session.told :]
        try:
            answer = await self._profiles.exchange_live(session.manifest.image_id, self._me, cursor, touched)
        except VMThunderError as error:
            log.debug("event=no_live_profile image=%s reason=%s", session.manifest.image_id.hex(), error)
            return cursor, SILENT_S
        session.told += len(touched)
        session.expect(answer.others)
        return answer.cursor, answer.next_s

    async def _send(self, boot: Boot) -> None:
        for failures in range(1, SEND_TRIES + 1):
            await asyncio.sleep(self._rng() * SEND_WITHIN_S)
            try:
                await self._profiles.send_boot(boot)
            except OriginUnavailable as error:
                why = str(error)
                await asyncio.sleep(delay_s(failures, self._rng))
            except VMThunderError as error:
                why = str(error)
                break
            else:
                self._boots_sent += 1
                return
        self._boots_dropped += 1
        log.warning("event=boot_dropped image=%s reason=%s", boot.image_id.hex(), why)

    def _end(self, session: Session) -> None:
        for task in filter(None, (session.replaying, session.hydrating)):
            task.cancel()
        if session.pushed_bytes or len(session.recorder.touches) >= FEWEST_TOUCHES:
            self._warm.add(session.node.number)
        self._budget.give_back(session.pushed_bytes)
        self._past.hits += session.hits
        self._past.misses += session.misses
        self._past.wasted += session.wasted
        self._past.pushed_bytes += session.pushed_bytes
        if self._sessions.get(session.node.image_id) is session:
            del self._sessions[session.node.image_id]


def _indexes(profile: Profile, manifest: Manifest) -> list[int] | None:
    """What the next boot will touch, in order; None if that are no chunks of this image."""
    indexes = [entry.index for entry in profile.expected()]
    if profile.chunk_bytes != manifest.chunk_bytes or max(indexes, default=0) >= manifest.chunk_count:
        return None
    return indexes
