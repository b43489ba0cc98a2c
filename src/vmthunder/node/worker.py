"""The worker: puts the agent together, serves until it is told to leave, and takes it apart in the opposite order.

    python -m vmthunder.node.worker SETTINGS     (started by the keeper, with its handoff in the environment)

Everything but threads of pools and the pusher runs on one event loop. Each part registers its end when it has begun.
What is not expected ends the process loudly: the keeper starts another one, and no guest notices more than a pause.
"""

import asyncio
import contextlib
import errno
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

from vmthunder.errors import CorruptFile, Failure, NoSpace, VMThunderError
from vmthunder.fuse.handoff import Cause, Handoff, Leave
from vmthunder.fuse.memory import prepare_worker_memory
from vmthunder.fuse.session import Session
from vmthunder.fuse.writable import WritableSession
from vmthunder.ids import Buffer, ChunkId, ImageId
from vmthunder.image.manifest import Manifest
from vmthunder.node import control
from vmthunder.node.background import Background
from vmthunder.node.budget import PushBudget
from vmthunder.node.cache import ChunkCache
from vmthunder.node.catalogue import Catalogue
from vmthunder.node.decoded import DecodedChunks
from vmthunder.node.fetch import Fetcher
from vmthunder.node.image import LocalImage, OnDemandImage
from vmthunder.node.imagefs import ImageFileSystem
from vmthunder.node.materialized import MaterializedImages
from vmthunder.node.mountstate import MountState, Node
from vmthunder.node.novabase import NovaBase
from vmthunder.node.novaimages import NovaImages
from vmthunder.node.operations import Operations
from vmthunder.node.orders import Orders, read_pins
from vmthunder.node.peers import Peers
from vmthunder.node.policy import Part
from vmthunder.node.prefetch import Prefetcher
from vmthunder.node.pusher import Pusher
from vmthunder.node.realfiles import RealFiles
from vmthunder.node.remote import listen
from vmthunder.node.settings import AgentSettings
from vmthunder.node.source import OriginSource
from vmthunder.node.stall import Stall
from vmthunder.node.status import Status
from vmthunder.origin.origin import Origin
from vmthunder.profile.client import ProfileClient
from vmthunder.swarm.identity import node_id
from vmthunder.swarm.key import ClusterKey

log = logging.getLogger(__name__)

FILE_THREADS = 4
"""For files that may make the loop wait: manifests, local copies."""
DRAIN_S = 2.0
"""How long requests that were read may take to be answered before we leave."""
EXIT_BUG = 70


def main(arguments: Sequence[str] = sys.argv) -> NoReturn:
    """Run one worker to its end. Exit status: see `Leave`, or that of an error that kept it from starting."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s level=%(levelname)s pid=%(process)d %(message)s", stream=sys.stderr
    )
    try:
        handoff = Handoff.from_environ()
        settings = AgentSettings.from_json(arguments[1] if len(arguments) > 1 else "")
        how = asyncio.run(_serve(settings, handoff))
    except VMThunderError as error:
        sys.stderr.write(f"vmthunder: {error}\n")
        sys.stderr.flush()
        os._exit(error.exit_code)  # The object store's threads do not survive the end of the interpreter.
    handoff.leave(how)


async def _serve(settings: AgentSettings, handoff: Handoff) -> Leave:
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_die_of)
    loop.set_default_executor(ThreadPoolExecutor(FILE_THREADS, "file"))
    orders: asyncio.Queue[Leave] = asyncio.Queue()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, orders.put_nowait, Leave.STOP)

    def reads() -> dict[ImageId, int]:
        return {
            node.image_id: files.read_bytes(node) for node in state.nodes() if node.handles and not node.materialized
        }

    async with contextlib.AsyncExitStack() as stack:
        with _explained(settings):
            key = _cluster_key(settings, handoff)
            origin = Origin.open(settings.origin, token=key and key.token)
            state = _mount_state(settings, handoff)
            cache = ChunkCache(settings.state_dir, settings.cache_bytes)
            stack.callback(cache.close)
            pins = read_pins(settings.state_dir / "pins")
            cache.pin(frozenset[ChunkId]().union(*pins.values()))
            await asyncio.to_thread(cache.recover)
            decoded = DecodedChunks(settings.decoded_bytes)
            origin_source = OriginSource(origin)
            peers = None if key is None or settings.tracker is None else Peers(settings, key, origin_source, reads)
            fetcher = Fetcher(peers.source if peers else origin_source, cache, decoded)
            stall = Stall(time.monotonic)
            stack.push_async_callback(fetcher.close)
            catalogue = Catalogue(origin, settings.state_dir, settings.lookup_timeout_s)
            materialized = MaterializedImages(settings.materialized_dir, fetcher.read)

        def open_image(node: Node, manifest: Manifest) -> OnDemandImage:
            number = node.number

            def push(offset: int, data: Buffer) -> None:
                pusher.push(number, offset, data)

            watch = None if prefetcher is None else prefetcher.watch(node, manifest)
            return OnDemandImage(manifest, fetcher, push, stall, watch)

        def opened(node: Node, direct: bool) -> None:
            if prefetcher is not None:
                prefetcher.opened(node, direct=direct)

        swarms = peers.membership if peers else None
        files = ImageFileSystem(catalogue, materialized, state, open_image, LocalImage, swarms, opened)

        async def complete(manifest: Manifest) -> None:
            """First the chunks, in the background, then the file: a guest's boot waits for neither."""
            order = orders_here.place(manifest.image_id, Part.FULL, 0)
            if order.task is not None:
                await asyncio.wait([order.task])  # A cache too small for all of it is no reason to give up.
            await materialized.make(manifest, _unwatched)

        real = nova = None
        if settings.base_fd is None:
            session: Session = Session(handoff.fuse_fd, handoff.negotiated, files, loop)
        else:
            with _explained(settings):
                nova = NovaImages(
                    settings.nova_dir,
                    catalogue,
                    materialized,
                    complete,
                    complete_after_s=settings.complete_after_s,
                )
                real = RealFiles(settings.base_fd, settings.real_state_file, resume=handoff.cause is not Cause.START)
            stack.callback(real.close)
            session = WritableSession(handoff.fuse_fd, handoff.negotiated, NovaBase(real, files, nova, state), loop)
        if handoff.negotiated.passthrough:
            files.backing = session
            if real is not None:
                real.backing = session
        pusher = Pusher(session.notify_store, handoff.fuse_fd)
        stack.callback(pusher.stop)
        if peers is not None:
            stack.push_async_callback(peers.close)
            await peers.open(fetcher, cache, catalogue, needed=handoff.cause is Cause.START)

        background = Background(fetcher)
        profiles = _profiles(settings, origin, key)
        stack.callback(profiles.close)
        orders_here = Orders(settings.state_dir, pins, background, cache, catalogue, profiles, swarms)
        stack.push_async_callback(orders_here.close)
        if nova is not None:
            stack.push_async_callback(nova.close)
            nova.start()
        prefetcher = None
        if settings.prefetch:
            prefetcher = Prefetcher(
                background,
                fetcher,
                profiles,
                node_id(settings.node_id_file),
                pusher.push,
                PushBudget(settings.prefetch_memory_bytes),
                catalogue.manifest,
                swarms.settled if swarms else _nothing_to_wait_for,
                warm={node.number for node in state.nodes()},
                hydrate_bytes_s=settings.hydrate_bytes_s,
            )
            stack.push_async_callback(prefetcher.close)

        def swarm_status() -> dict[str, Any] | None:
            return peers.status() if peers else None

        def prefetch_status() -> dict[str, Any] | None:
            return None if prefetcher is None else prefetcher.status()

        status = Status(
            settings, handoff, state, files, catalogue, materialized, cache, decoded, fetcher, origin_source, pusher,
            stall, swarm_status, prefetch_status, orders_here.status,
        )  # fmt: skip
        operations = Operations(
            handoff, catalogue, materialized, state, status.snapshot, orders.put_nowait, prefetcher, orders_here
        )

        prepare_worker_memory()
        session.start(resend=handoff.cause is not Cause.START)
        stack.push_async_callback(session.close)
        orders_here.start(settings.policy)
        server = await control.serve(settings.socket, operations.handlers())
        stack.callback(server.close)
        if peers is not None and key is not None and settings.control_listen is not None:
            with _forgiven(unless=handoff.cause is Cause.START):
                remote, port = await listen(settings, key, peers.membership.node, status.snapshot, operations.precache)
                stack.callback(remote.close)
                peers.membership.announce(port)
        handoff.ready()
        log.info("event=serving mount=%s origin=%s cause=%s", settings.mount, settings.origin, handoff.cause)
        how = await _told_to_leave(session, orders)
        log.info("event=leaving how=%s", how.name.lower())
        if how is Leave.STOP:
            if peers is not None:
                await peers.membership.leave_all()
            for promise in (settings.socket, settings.mount_state_file, settings.real_state_file):
                promise.unlink(missing_ok=True)
    return how


async def _unwatched(done_bytes: int, total_bytes: int) -> None:
    """Nobody waits for an image that is completed in the background."""


async def _told_to_leave(session: Session, orders: "asyncio.Queue[Leave]") -> Leave:
    """Until there is an order to leave, or nothing left to serve."""
    gone = asyncio.create_task(session.closed.wait())
    gone.add_done_callback(lambda _: orders.put_nowait(Leave.STOP))
    while True:
        how = await orders.get()
        if session.closed.is_set():
            return Leave.STOP
        left = await session.drain(DRAIN_S)
        if how is Leave.STOP or not left or session.negotiated.resend:
            gone.cancel()
            return how
        # This kernel would never send again what we leave unanswered: rather an old worker than a guest that hangs.
        log.error("event=handover_refused unanswered=%d reason=%s", left, "reads wait for the origin")
        session.start()


def _profiles(settings: AgentSettings, origin: Origin, key: ClusterKey | None) -> ProfileClient:
    """Profiles are learned by the server that images come from, or by the one that knows the swarms."""
    server = settings.origin if settings.origin.startswith(("http://", "https://")) else settings.tracker
    return ProfileClient(origin, server, key and key.token)


async def _nothing_to_wait_for(_image: ImageId) -> None:
    """This node is in no swarm."""


def _cluster_key(settings: AgentSettings, handoff: Handoff) -> ClusterKey | None:
    if settings.cluster_key is None:
        return None
    try:
        return ClusterKey.load(settings.cluster_key)
    except VMThunderError as error:
        if handoff.cause is Cause.START:
            raise
        # Guests depend on us: cached chunks and local copies are served without it.
        log.critical("event=cluster_key_lost reason=%s", error)
        return None


@contextlib.contextmanager
def _forgiven(*, unless: bool) -> Iterator[None]:
    """What other machines ask of us can wait; guests cannot."""
    try:
        yield
    except VMThunderError as error:
        if unless:
            raise
        log.critical("event=no_remote_control reason=%s", error)


@contextlib.contextmanager
def _explained(settings: AgentSettings) -> Iterator[None]:
    """A directory that cannot be used is an operator's business, not a bug."""
    try:
        yield
    except OSError as error:
        kind = NoSpace if error.errno in {errno.ENOSPC, errno.EDQUOT} else Failure
        place = error.filename or settings.state_dir
        raise kind(f"the agent cannot use {place}: {error.strerror}") from None


def _mount_state(settings: AgentSettings, handoff: Handoff) -> MountState:
    path = settings.mount_state_file
    if handoff.cause is not Cause.START:
        try:
            return MountState.load(path)
        except CorruptFile as error:
            log.critical("event=mount_state_lost reason=%s", error)  # Open files get ESTALE; new opens work.
    state = MountState(path)
    state.save()  # Another mount's must not be found here, should this worker die before its first promise.
    return state


def _die_of(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """A task or a callback failed that nobody waits for: a bug, after which nothing here can be relied on."""
    log.critical("event=crash message=%s", context["message"], exc_info=context.get("exception"))
    sys.stderr.flush()
    os._exit(EXIT_BUG)


if __name__ == "__main__":
    main()
