"""Who publishes and who collects, over the object store itself: any number of publishers, or one collector.

A holder puts an object below `locks/`, and only then looks who else is there; so of two that come at the same moment at
least one sees the other and steps back. A holder renews its object; one that was not renewed for LEASE_S is dead, and so is
one whose process ended, if it ran on this machine. Ages are measured against the object just put, by the store's own clock.
"""

import asyncio
import contextlib
import json
import logging
import os
import socket
import time
import uuid
from collections.abc import AsyncIterator
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from vmthunder.errors import Conflict, NotFound, OriginUnavailable, VMThunderError
from vmthunder.origin.origin import Origin

log = logging.getLogger(__name__)

LEASE_S: Final = 120.0
RENEW_S: Final = 20.0


class Holder(StrEnum):
    """Why somebody holds a lock."""

    PUBLISH = "publish"
    GC = "gc"


class Lease:
    """A holder's own view of its lock. A process that was stopped for long does not know until it asks."""

    def __init__(self, origin: Origin) -> None:
        self._url = origin.url
        self.renewed_s = _now_s()
        """When the last successful put began: the store's clock started later."""

    @property
    def lost(self) -> bool:
        """Whether others may take the holder for dead, or are about to."""
        return _now_s() - self.renewed_s > LEASE_S - RENEW_S

    def require(self) -> None:
        """Call before what cannot be undone. Raises OriginUnavailable: others may have been let in."""
        if self.lost:
            raise OriginUnavailable(
                f"the lock at {self._url} could not be renewed for {LEASE_S - RENEW_S:.0f} s; try again"
            )


@contextlib.asynccontextmanager
async def publish_lease(origin: Origin) -> AsyncIterator[Lease]:
    """Keep gc away, so that what the origin has stays there.

    Raises:
        Conflict: gc runs.
        OriginUnavailable: the lease could not be renewed for so long that gc may run now.
    """
    async with _held(origin, Holder.PUBLISH, {Holder.GC}) as lease:
        yield lease


@contextlib.asynccontextmanager
async def gc_lock(origin: Origin) -> AsyncIterator[Lease]:
    """Keep publishers and other collectors away. Raises Conflict and OriginUnavailable, as `publish_lease` does."""
    async with _held(origin, Holder.GC, {Holder.PUBLISH, Holder.GC}) as lease:
        yield lease


async def remove_dead(origin: Origin) -> int:
    """Remove the locks of holders that died. Returns how many. Call with a lock held."""
    keys = [key async for key, _, _ in origin.list("locks")]
    live = {key for key, _ in await _live(origin)}
    for key in keys:
        if key not in live:
            await origin.delete(key)
    return len(keys) - len(live)


@contextlib.asynccontextmanager
async def _held(origin: Origin, holder: Holder, excludes: set[Holder]) -> AsyncIterator[Lease]:
    key = f"locks/{holder}-{uuid.uuid4().hex}"
    data = json.dumps(_here()).encode()
    lease = Lease(origin)
    await origin.put(key, data)
    try:
        for other, who in await _live(origin):
            if other != key and _holder(other) in excludes:
                raise Conflict(
                    f"{_holder(other)} is under way at {origin.url}, by process {who.get('pid')} on {who.get('host')}; "
                    "try again when it has ended"
                )
        body = asyncio.current_task()
        assert body is not None
        renewal = asyncio.create_task(_renew(origin, key, data, lease, body))
        try:
            yield lease
        except asyncio.CancelledError:
            if lease.lost:
                body.uncancel()
                lease.require()
            raise
        finally:
            renewal.cancel()
            await asyncio.wait([renewal])
    finally:
        # A lock that stays is seen to be dead; what happened in the body is worth more than why this failed.
        with contextlib.suppress(VMThunderError):
            await origin.delete(key)


async def _renew(origin: Origin, key: str, data: bytes, lease: Lease, body: "asyncio.Task[Any]") -> None:
    while True:
        await asyncio.sleep(RENEW_S)
        # Before the put, not after: a process that was stopped must not revive a lock that gc has already ignored.
        if lease.lost:
            body.cancel()
            return
        began_s = _now_s()
        try:
            await origin.put(key, data)
            lease.renewed_s = began_s
        except VMThunderError as error:
            log.warning("event=lease_not_renewed origin=%s reason=%s", origin.url, error)


def _now_s() -> float:
    """Seconds that go on while the machine sleeps, as the store's do."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


async def _live(origin: Origin) -> list[tuple[str, dict[str, Any]]]:
    """Keys and contents of locks whose holders live."""
    found = [(key, modified_s) async for key, _, modified_s in origin.list("locks") if _holder(key)]
    now_s = max((modified_s for _, modified_s in found), default=0.0)
    live = []
    for key, modified_s in found:
        if now_s - modified_s > LEASE_S:
            continue
        try:
            who = json.loads(bytes(await origin.get(key, "")))
        except NotFound:
            continue  # released meanwhile
        except ValueError:
            who = None
        if not isinstance(who, dict):
            who = {}  # damaged; whose it is is unknown, that it is there is not
        if not _is_dead(who):
            live.append((key, who))
    return live


def _holder(key: str) -> Holder | None:
    name = key.removeprefix("locks/").partition("-")[0]
    return next((holder for holder in Holder if holder == name), None)


def _here() -> dict[str, Any]:
    pid = os.getpid()
    return {"host": socket.gethostname(), "pid": pid, "started": _started(pid), "machine": _machine()}


def _is_dead(who: dict[str, Any]) -> bool:
    """Whether a holder ran on this machine and has ended. Of others nothing is known."""
    if who.get("machine") != _machine():
        return False
    pid = who.get("pid")
    return not isinstance(pid, int) or _started(pid) != who.get("started")


def _machine() -> str:
    """This boot of this machine, and in it this pid namespace."""
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {Path('/proc/self/ns/pid').readlink()}"


def _started(pid: int) -> int | None:
    """When a process began, in clock ticks since boot (field 22 of proc_pid_stat(5)); None if there is none."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None
