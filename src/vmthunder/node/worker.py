"""The worker: puts the agent together, serves until it is told to leave, and takes it apart in the opposite order.

    python -m vmthunder.node.worker SETTINGS     (started by the keeper, with its handoff in the environment)

Everything but threads of pools and the pusher runs on one event loop. Each part registers its end when it has begun.
What is not expected ends the process loudly: the keeper starts another one, and no guest notices more than a pause.
"""

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

from vmthunder.errors import CorruptFile, VMThunderError
from vmthunder.fuse.handoff import Cause, Handoff, Leave
from vmthunder.fuse.memory import prepare_worker_memory
from vmthunder.fuse.session import Session
from vmthunder.ids import Buffer
from vmthunder.image.manifest import Manifest
from vmthunder.node import control
from vmthunder.node.cache import ChunkCache
from vmthunder.node.catalogue import Catalogue
from vmthunder.node.decoded import DecodedChunks
from vmthunder.node.fetch import Fetcher
from vmthunder.node.image import LocalImage, OnDemandImage
from vmthunder.node.imagefs import ImageFileSystem
from vmthunder.node.materialized import MaterializedImages
from vmthunder.node.mountstate import MountState, Node
from vmthunder.node.operations import Operations
from vmthunder.node.pusher import Pusher
from vmthunder.node.settings import AgentSettings
from vmthunder.node.source import OriginSource
from vmthunder.node.stall import Stall
from vmthunder.node.status import Status
from vmthunder.origin.origin import Origin

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
        sys.exit(error.exit_code)
    handoff.leave(how)


async def _serve(settings: AgentSettings, handoff: Handoff) -> Leave:
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_die_of)
    loop.set_default_executor(ThreadPoolExecutor(FILE_THREADS, "file"))
    orders: asyncio.Queue[Leave] = asyncio.Queue()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, orders.put_nowait, Leave.STOP)

    async with contextlib.AsyncExitStack() as stack:
        origin = Origin.open(settings.origin)
        state = _mount_state(settings, handoff)
        cache = ChunkCache(settings.state_dir, settings.cache_bytes)
        stack.callback(cache.close)
        await asyncio.to_thread(cache.recover)
        decoded = DecodedChunks(settings.decoded_bytes)
        source = OriginSource(origin)
        fetcher = Fetcher(source, cache, decoded)
        stall = Stall(time.monotonic)
        stack.push_async_callback(fetcher.close)
        catalogue = Catalogue(origin, settings.state_dir, settings.lookup_timeout_s)
        materialized = MaterializedImages(settings.materialized_dir, fetcher.read)

        def open_image(node: Node, manifest: Manifest) -> OnDemandImage:
            number = node.number

            def push(offset: int, data: Buffer) -> None:
                pusher.push(number, offset, data)

            return OnDemandImage(manifest, fetcher, push, stall)

        files = ImageFileSystem(catalogue, materialized, state, open_image, LocalImage)
        session = Session(handoff.fuse_fd, handoff.negotiated, files, loop)
        if handoff.negotiated.passthrough:
            files.backing = session
        pusher = Pusher(session.notify_store, handoff.fuse_fd)
        stack.callback(pusher.stop)
        status = Status(
            settings, handoff, state, files, catalogue, materialized, cache, decoded, fetcher, source, pusher, stall
        )
        operations = Operations(handoff, catalogue, materialized, state, status.snapshot, orders.put_nowait)

        prepare_worker_memory()
        session.start(resend=handoff.cause is not Cause.START)
        stack.push_async_callback(session.close)
        server = await control.serve(settings.socket, operations.handlers())
        stack.callback(server.close)
        handoff.ready()
        log.info("event=serving mount=%s origin=%s cause=%s", settings.mount, settings.origin, handoff.cause)
        how = await _told_to_leave(session, orders)
        log.info("event=leaving how=%s", how.name.lower())
        if how is Leave.STOP:
            for promise in (settings.socket, settings.mount_state_file):
                promise.unlink(missing_ok=True)
    return how


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
