"""Pushes decoded bytes that nobody asked for yet into the kernel's page cache, from a thread of its own.

FUSE_NOTIFY_STORE waits for page locks that unanswered READs hold, so whoever answers READs must not issue it, and must
not wait for whoever does. If the worker is killed while the thread waits in the kernel, the thread stays until its
successor has answered those READs; therefore it holds no descriptor but the connection: its own table (CLONE_FILES
unshared) has no copy of the pipe that tells the keeper of the worker's death, nor of any lock.

`push` is for the event loop and never waits: when the kernel takes too long, pushes are dropped.
"""

import logging
import os
import queue
import sys
import threading
from collections.abc import Callable, Sequence

from vmthunder.fuse import libc
from vmthunder.ids import Buffer

log = logging.getLogger(__name__)

QUEUE_BYTES = 8 << 20
"""Of decoded chunks that wait to be pushed."""
JOIN_S = 0.5

Store = Callable[[int, int, Sequence[Buffer]], object]
"""Node, offset, bytes. Raises OSError."""


class Pusher:
    """The thread and its queue."""

    def __init__(self, store: Store, fuse_fd: int) -> None:
        self._store = store
        self._fuse_fd = fuse_fd
        self._queue: queue.SimpleQueue[tuple[int, int, Buffer] | None] = queue.SimpleQueue()
        # Each counter has one writer, so their difference needs no lock.
        self._taken_bytes = 0
        self._done_bytes = 0
        self.pushed_bytes = 0
        self.dropped = 0
        """Pushes that the queue had no room for."""
        self._queued: set[tuple[int, int]] = set()
        self._thread = threading.Thread(target=self._run, name="pusher", daemon=True)
        self._thread.start()

    def push(self, node: int, offset: int, data: Buffer) -> None:
        """Offer bytes of a node to the page cache."""
        if (node, offset) in self._queued:
            return
        if self._taken_bytes - self._done_bytes + len(data) > QUEUE_BYTES:
            self.dropped += 1
            return
        self._queued.add((node, offset))
        self._taken_bytes += len(data)
        self._queue.put((node, offset, data))

    def stop(self) -> None:
        """End the thread, or leave it behind if the kernel does not let it go."""
        self._queue.put(None)
        self._thread.join(JOIN_S)

    def _run(self) -> None:
        libc.unshare_files()
        start = 0
        for descriptor in (sys.stderr.fileno(), self._fuse_fd, os.sysconf("SC_OPEN_MAX")):
            os.closerange(start, descriptor)
            start = descriptor + 1
        while (entry := self._queue.get()) is not None:
            node, offset, data = entry
            try:
                self._store(node, offset, (data,))
                self.pushed_bytes += len(data)
            except OSError as error:
                # The node is forgotten, or the connection ends: either way nobody misses the bytes.
                log.debug("event=push_refused node=%d offset=%d reason=%s", node, offset, error.strerror)
            finally:
                self._queued.discard((node, offset))
                self._done_bytes += len(data)
