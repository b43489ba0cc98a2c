"""Boots a machine: directory → seed and overlay → driver → first read → ready, and says where the time went.

Whatever goes wrong on the way is said with the guest's last words, and nothing of the machine is left, with one
exception: a guest that is only late goes on running, so that an operator can look at it. Belongs to one event loop;
short blocking steps (a qcow2 header, an ISO of a few KiB) are done on it, since nothing else runs there.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

from vmthunder.errors import Failure
from vmthunder.vm import machine, qemu
from vmthunder.vm.backing import BackingImage, NodeCounters
from vmthunder.vm.machine import Machine, Machines
from vmthunder.vm.overlay import create_overlay, overlay_bytes
from vmthunder.vm.process import Child
from vmthunder.vm.qemu import QemuGuest, choose_accel
from vmthunder.vm.ready import ReadyCheck
from vmthunder.vm.seed import write_seed
from vmthunder.vm.spec import Driver, Guest, Spec
from vmthunder.vm.uml import UmlGuest

FIRST_READ_POLL_S = 0.01
LAST_WORD_S = 1.0
"""How long a driver that stopped answering may take to end and so tell us why."""

Result = TypeVar("Result")


class Step(StrEnum):
    """What a boot does now. The seconds that each took are in `Phases`."""

    OVERLAY = "overlay"
    START = "start"
    FIRST_READ = "first read"
    READY = "ready"


@dataclass(frozen=True, slots=True)
class Phases:
    """Seconds of each step, one after the other; their sum is the whole boot."""

    overlay_s: float
    """Directory, seed and overlay."""
    start_s: float
    """Until the driver answers."""
    first_read_s: float
    """Until the guest reads its disk."""
    ready_s: float
    """Until the guest is ready."""

    @property
    def total_s(self) -> float:
        return self.overlay_s + self.start_s + self.first_read_s + self.ready_s


@dataclass(frozen=True, slots=True)
class BootReport:
    """One boot that succeeded."""

    machine: Machine
    phases: Phases
    bytes_read: int
    """What the guest read of its disk."""
    bytes_fetched: int | None
    """What the node fetched from the origin meanwhile; None: the agent did not say, or was replaced meanwhile."""
    bytes_from_cache: int | None
    """What the node took from its chunk cache meanwhile."""

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.machine.to_dict(),
            "phases": {**asdict(self.phases), "total_s": self.phases.total_s},
            "bytes": {"read": self.bytes_read, "fetched": self.bytes_fetched, "from_cache": self.bytes_from_cache},
        }


class _Ended(Exception):
    """The driver's process has ended; says how."""


async def boot(
    machines: Machines,
    name: str | None,
    image: BackingImage,
    spec: Spec,
    ready: ReadyCheck,
    *,
    timeout_s: float,
    counters: Callable[[], NodeCounters | None] = lambda: None,
    on_step: Callable[[Step], None] = lambda _step: None,
) -> BootReport:
    """Make and start a machine, and wait until its guest is ready. `on_step` is told when each step begins.

    Raises:
        Conflict: the name is taken.
        Failure: the driver ended, or the guest was not ready in time.
        Usage, NoSpace, NotPermitted, MissingTool: a step before the guest's first instruction.
    """
    before = counters()
    lap = _Stopwatch()
    on_step(Step.OVERLAY)
    name, directory = machines.create(name, image.name)
    try:
        _prepare(name, directory, image, spec)
        overlay_s = lap()
        on_step(Step.START)
        guest = _start(name, directory, image, spec, machines)
    except BaseException:
        machines.destroy(name)
        raise
    try:
        record = _record(name, image, spec, guest)
        machines.save(record)
        async with asyncio.timeout(timeout_s):
            record = replace(record, ports=await _unless_ended(guest.child, guest.connected()))
            machines.save(record)
            start_s = lap()
            first_read_s, bytes_read = await _unless_ended(guest.child, _watch(guest, ready, lap, on_step))
        ready_s = lap()
    except TimeoutError:
        guest.child.let_go()
        raise Failure(
            f"vm {name} was not ready within {timeout_s:g} s (waited for {ready}). It goes on running: "
            f"`vmthunder console {name}` shows it, `vmthunder destroy {name}` removes it{_last_words(directory)}"
        ) from None
    except BaseException as error:
        # After Ctrl-C too: a machine whose boot nobody waits for has no owner.
        last_words = _last_words(directory)
        machines.destroy(name)
        guest.child.reap()
        if isinstance(error, _Ended):
            raise Failure(f"{spec.driver} of vm {name} {error}; nothing of it is left{last_words}") from None
        raise
    finally:
        await guest.close()
    guest.child.let_go()
    phases = Phases(overlay_s, start_s, first_read_s, ready_s)
    return BootReport(record, phases, bytes_read, *_brought_in(before, counters()))


class _Stopwatch:
    """Seconds since it was last asked."""

    def __init__(self) -> None:
        self._last_s = time.monotonic()

    def __call__(self) -> float:
        before_s, self._last_s = self._last_s, time.monotonic()
        return self._last_s - before_s


def _prepare(name: str, directory: Path, image: BackingImage, spec: Spec) -> None:
    with machine.file_errors(directory):
        write_seed(directory / machine.SEED, name, spec.user_data, spec.ssh_keys)
    if spec.driver is Driver.QEMU:
        size_bytes = overlay_bytes(image.virtual_bytes, spec.disk_bytes)
        create_overlay(directory / qemu.OVERLAY, image.path, size_bytes)


def _start(name: str, directory: Path, image: BackingImage, spec: Spec, machines: Machines) -> Guest:
    with machine.file_errors(directory):
        if spec.driver is Driver.QEMU:
            return QemuGuest.start(name, directory, spec, choose_accel(spec.accel, machines.state_dir))
        return UmlGuest.start(name, directory, image, spec)


def _record(name: str, image: BackingImage, spec: Spec, guest: Guest) -> Machine:
    return Machine(
        name=name,
        image=image.name,
        image_id=image.image_id,
        driver=spec.driver,
        accel=guest.accel,
        memory_bytes=spec.memory_bytes,
        cpus=spec.cpus,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        pid=guest.child.identity.pid,
        start_ticks=guest.child.identity.start_ticks,
    )


async def _watch(
    guest: Guest, ready: ReadyCheck, lap: _Stopwatch, on_step: Callable[[Step], None]
) -> tuple[float, int]:
    """Until the guest is ready; seconds until its first read, and bytes read until it was ready."""
    on_step(Step.FIRST_READ)
    waiting = asyncio.ensure_future(ready.wait(guest))
    try:
        # A guest whose files are all in its initrd may be ready without a read.
        while not waiting.done() and not await guest.bytes_read():
            await asyncio.wait({waiting}, timeout=FIRST_READ_POLL_S)
        first_read_s = lap()
        on_step(Step.READY)
        await waiting
    finally:
        waiting.cancel()
    return first_read_s, await guest.bytes_read()


async def _unless_ended(child: Child, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`; raises _Ended as soon as the process ends before that."""
    working, ending = asyncio.ensure_future(work), asyncio.ensure_future(child.ended())
    try:
        await asyncio.wait({working, ending}, return_when=asyncio.FIRST_COMPLETED)
        if working.done() and working.exception():
            # A monitor that hangs up is the first sign of a process that is about to end.
            await asyncio.wait({ending}, timeout=LAST_WORD_S)
        if ending.done():
            raise _Ended(ending.result())
        return working.result()
    finally:
        working.cancel()
        ending.cancel()
        await asyncio.gather(working, ending, return_exceptions=True)


def _last_words(directory: Path) -> str:
    """What driver and guest said last, to be added to an error's line."""
    words = [*machine.last_lines(directory / machine.DRIVER_LOG), *machine.last_lines(directory / machine.CONSOLE_LOG)]
    return "".join(f"\n  {line}" for line in words)


def _brought_in(before: NodeCounters | None, after: NodeCounters | None) -> tuple[int | None, int | None]:
    """Bytes fetched and from the cache between two looks at one agent."""
    if before is None or after is None or before.agent_pid != after.agent_pid:
        return None, None
    return after.bytes_fetched - before.bytes_fetched, after.bytes_from_cache - before.bytes_from_cache
