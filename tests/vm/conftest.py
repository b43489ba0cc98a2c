"""Real guests, built once per machine and shared by all test runs."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from conftest import repository
from vmthunder.vm.backing import BackingImage
from vmthunder.vm.machine import Machines

BUILD_TIMEOUT_S = 170


@dataclass(frozen=True)
class GuestDisk:
    """What scripts/build-guest made."""

    folder: Path
    append: str

    @property
    def disk(self) -> Path:
        return self.folder / "disk.raw"

    def backing(self) -> BackingImage:
        """The disk as if an agent had resolved it."""
        return BackingImage("guest", "0" * 64, self.disk, self.disk.stat().st_size)


def build_guest(kind: str) -> GuestDisk:
    """Build it, or wait for another test run that does, or find it there."""
    done = subprocess.run(
        [sys.executable, repository() / "scripts/build-guest", "--kind", kind],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=BUILD_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    folder = Path(json.loads(done.stdout.splitlines()[-1])["folder"])
    return GuestDisk(folder, json.loads((folder / "guest.json").read_text())["append"])


@pytest.fixture(scope="session")
def busybox() -> GuestDisk:
    """Boots in about two seconds; has a root shell on its console, a web server, a guest agent."""
    return build_guest("busybox")


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    """No machine outlives its test."""
    machines = Machines(tmp_path / "state")
    yield machines
    for name in machines.names():
        machines.destroy(name)


def wait_until(condition: Callable[[], Any], timeout_s: float = 20) -> Any:
    """The first true value of `condition`."""
    import time

    deadline_s = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline_s, "timed out"
        time.sleep(0.02)
    return value
