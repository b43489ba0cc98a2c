import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from vmthunder.errors import Conflict, OriginUnavailable
from vmthunder.origin import lock as lock_module
from vmthunder.origin.lock import LEASE_S, Lease, gc_lock, publish_lease, remove_dead
from vmthunder.origin.origin import Origin

HOLD = """
import asyncio, sys
from vmthunder.origin.lock import publish_lease
from vmthunder.origin.origin import Origin
async def main():
    async with publish_lease(Origin.open(sys.argv[1])):
        print("held", flush=True)
        await asyncio.sleep(1000)
asyncio.run(main())
"""


@pytest.fixture
def origin(tmp_path: Path) -> Origin:
    return Origin.open(str(tmp_path))


def locks(origin: Origin) -> list[str]:
    assert origin.directory is not None
    return [path.name for path in (origin.directory / "locks").iterdir()]


@pytest.mark.asyncio
async def test_publishers_share_and_a_collector_waits_for_none(origin: Origin) -> None:
    async with publish_lease(origin), publish_lease(origin):
        with pytest.raises(Conflict, match=rf"publish is under way .* process {os.getpid()} on "):
            async with gc_lock(origin):
                pass
        assert len(locks(origin)) == 2
    assert locks(origin) == []


@pytest.mark.asyncio
async def test_a_collector_excludes_everybody(origin: Origin) -> None:
    async with gc_lock(origin):
        for other in (gc_lock, publish_lease):
            with pytest.raises(Conflict, match="gc is under way"):
                async with other(origin):
                    pass


@pytest.mark.asyncio
async def test_of_two_that_come_at_once_not_both_get_in(origin: Origin) -> None:
    inside: set[str] = set()

    async def enter(name: str) -> None:
        async with publish_lease(origin) if name == "publish" else gc_lock(origin):
            inside.add(name)
            await asyncio.sleep(0.01)
            assert inside == {name}
            inside.discard(name)

    for _ in range(20):
        outcomes = await asyncio.gather(enter("publish"), enter("gc"), return_exceptions=True)
        assert all(outcome is None or isinstance(outcome, Conflict) for outcome in outcomes)


@pytest.mark.asyncio
async def test_the_lock_of_a_killed_process_does_not_count(origin: Origin) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, origin.url], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(Conflict):
        async with gc_lock(origin):
            pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    async with gc_lock(origin):
        assert await remove_dead(origin) == 1
        assert len(locks(origin)) == 1


@pytest.mark.asyncio
async def test_the_lock_of_another_machine_counts_until_its_lease_is_over(origin: Origin) -> None:
    assert origin.directory is not None
    await origin.put("locks/publish-far", json.dumps({"host": "far", "pid": 1, "machine": "far"}).encode())
    with pytest.raises(Conflict, match="process 1 on far"):
        async with gc_lock(origin):
            pass
    old_s = time.time() - LEASE_S - 10
    os.utime(origin.directory / "locks/publish-far", (old_s, old_s))
    async with gc_lock(origin):
        pass


@pytest.mark.parametrize("data", [b"", b"\xff", b"[]", b"null", b'{"pid": "x"}'])
@pytest.mark.asyncio
async def test_a_damaged_lock_counts_like_one_of_another_machine(origin: Origin, data: bytes) -> None:
    await origin.put("locks/gc-x", data)
    with pytest.raises(Conflict, match="gc is under way"):
        async with publish_lease(origin):
            pass


@pytest.mark.parametrize("lock", [publish_lease, gc_lock])
@pytest.mark.asyncio
async def test_a_holder_that_was_stopped_for_longer_than_its_lease_is_told(
    origin: Origin, lock: Callable[[Origin], AbstractAsyncContextManager[Lease]]
) -> None:
    async with lock(origin) as lease:
        lease.require()
        lease.renewed_s -= LEASE_S  # as if the process had slept
        with pytest.raises(OriginUnavailable, match="could not be renewed"):
            lease.require()


@pytest.mark.asyncio
async def test_a_stopped_holder_is_cancelled_and_does_not_revive_its_lock(
    origin: Origin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock_module, "RENEW_S", 0.01)
    with pytest.raises(OriginUnavailable, match="could not be renewed"):
        async with publish_lease(origin) as lease:
            (name,) = locks(origin)
            lease.renewed_s -= LEASE_S
            await origin.delete(f"locks/{name}")  # as gc does
            try:
                await asyncio.sleep(10)
            finally:
                assert locks(origin) == []


@pytest.mark.asyncio
async def test_a_lock_is_renewed_while_it_is_held(origin: Origin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "RENEW_S", 0.01)
    assert origin.directory is not None
    async with publish_lease(origin) as lease, asyncio.timeout(10):
        (path,) = (origin.directory / "locks").iterdir()
        began_s, put_ns = lease.renewed_s, path.stat().st_mtime_ns
        while lease.renewed_s == began_s or path.stat().st_mtime_ns == put_ns:
            await asyncio.sleep(0.01)


@pytest.mark.asyncio
async def test_files_that_are_no_locks_are_left_alone(origin: Origin) -> None:
    await origin.put("locks/readme", b"hello")
    async with gc_lock(origin):
        pass
