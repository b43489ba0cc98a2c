"""Real guests, built once per machine and shared by all test runs."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from agents import eventually
from conftest import VMTHUNDER, repository
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


@contextmanager
def console(machines: Machines, name: str = "web") -> Iterator["subprocess.Popen[bytes]"]:
    """`vmthunder console` as a process."""
    command = [*VMTHUNDER, "console", name, "--state-dir", str(machines.state_dir)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def typed(command: str, expected: str, machines: Machines, name: str = "web") -> str:
    """Type a command into the guest's console; what is shown until a line matches `expected`, the echo aside."""
    with console(machines, name) as process:
        assert process.stdin
        assert process.stdout
        os.set_blocking(process.stdout.fileno(), False)
        shown = ""

        def answered() -> bool:
            nonlocal shown
            shown += (process.stdout.read() or b"").decode(errors="replace")  # type: ignore[union-attr]
            return any(re.search(expected, line) and command not in line for line in shown.splitlines())

        # What is typed before its prompt is lost.
        eventually(lambda: answered() or "/ # " in shown, "a shell on the console")
        process.stdin.write(command.encode() + b"\n")
        process.stdin.flush()
        eventually(answered, "an answer on the console")
        process.stdin.write(b"\x1d")
        process.stdin.flush()
        assert process.wait(10) == 0
        return shown
