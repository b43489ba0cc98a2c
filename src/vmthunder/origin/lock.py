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


@contextlib.asynccontextmanager
async def publish_lease(origin: Origin) -> AsyncIterator[None]:
    """Keep gc away, so that what the origin has stays there.

    Raises:
        Conflict: gc runs.
        OriginUnavailable: the lease could not be renewed for so long that gc may run now.
    """
    async with _held(origin, Holder.PUBLISH, {Holder.GC}):
        yield


@contextlib.asynccontextmanager
async def gc_lock(origin: Origin) -> AsyncIterator[None]:
    """Keep publishers and other collectors away. Raises Conflict and OriginUnavailable, as `publish_lease` does."""
    async with _held(origin, Holder.GC, {Holder.PUBLISH, Holder.GC}):
        yield


async def remove_dead(origin: Origin) -> int:
    """Remove the locks of holders that died. Returns how many. Call with a lock held."""
    keys = [key async for key, _, _ in origin.list("locks")]
    live = {key for key, _ in await _live(origin)}
    for key in keys:
        if key not in live:
            await origin.delete(key)
    return len(keys) - len(live)


@contextlib.asynccontextmanager
async def _held(origin: Origin, holder: Holder, excludes: set[Holder]) -> AsyncIterator[None]:
    key = f"locks/{holder}-{uuid.uuid4().hex}"
    data = json.dumps(_here()).encode()
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
        lost = asyncio.Event()
        renewal = asyncio.create_task(_renew(origin, key, data, body, lost))
        try:
            yield
        except asyncio.CancelledError:
            if lost.is_set():
                body.uncancel()
                raise OriginUnavailable(
                    f"{origin.url} was away for {LEASE_S:.0f} s; nothing was made visible"
                ) from None
            raise
        finally:
            renewal.cancel()
            await asyncio.wait([renewal])
    finally:
        # A lock that stays is seen to be dead; what happened in the body is worth more than why this failed.
        with contextlib.suppress(VMThunderError):
            await origin.delete(key)


async def _renew(origin: Origin, key: str, data: bytes, body: "asyncio.Task[Any]", lost: asyncio.Event) -> None:
    renewed_s = time.monotonic()
    while time.monotonic() - renewed_s < LEASE_S - RENEW_S:
        await asyncio.sleep(RENEW_S)
        try:
            await origin.put(key, data)
            renewed_s = time.monotonic()
        except VMThunderError as error:
            log.warning("event=lease_not_renewed origin=%s reason=%s", origin.url, error)
    lost.set()
    body.cancel()


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
