"""A real keeper, a real worker, a real mount, and processes that read from it."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vmthunder.fuse import libc, mounts
from vmthunder.fuse.spawn import spawn_keeper

HERE = Path(__file__).parent
DEADLINE_S = 20.0


def eventually(condition: Callable[[], object], what: str) -> None:
    """Poll until `condition` holds; fail with `what` when it does not in time."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, f"{what} did not happen within {DEADLINE_S:.0f} s"
        time.sleep(0.005)


class Lab:
    """One mount. Nothing in the test's own process ever reads from it: what reads must be killable."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files = directory / "files"
        self.mountpoint = directory / "mnt"
        self.log = directory / "log"
        self.trace_path = directory / "trace"
        self.files.mkdir()
        self.mountpoint.mkdir()
        self.trace_path.touch()
        self.keeper: subprocess.Popen[bytes] | None = None
        self.children: list[subprocess.Popen[str]] = []

    def add(self, name: str, size_bytes: int = 8 << 20) -> bytes:
        content = random.Random(name).randbytes(size_bytes)
        (self.files / name).write_bytes(content)
        return content

    def start(self) -> None:
        argv = [sys.executable, str(HERE / "memfs_worker.py"), str(self.directory)]
        self.keeper = spawn_keeper(self.mountpoint, argv, log=self.log, ready_timeout_s=DEADLINE_S)

    def trace(self, prefix: str) -> list[str]:
        """Lines of the workers' trace that begin with `prefix`."""
        return [line for line in self.trace_path.read_text().splitlines() if line.startswith(prefix)]

    @property
    def worker_pid(self) -> int:
        return int(self.trace("worker")[-1].split()[1])

    def signal_worker(self, number: int) -> None:
        os.kill(self.worker_pid, number)

    def replace_worker(self, number: int) -> None:
        """Signal the worker and wait until there is another one."""
        before = len(self.trace("worker"))
        self.signal_worker(number)
        eventually(lambda: len(self.trace("worker")) > before, "a new worker")

    def child(self, *argv: object) -> "subprocess.Popen[str]":
        command = [sys.executable, *map(str, argv)]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.children.append(process)
        return process

    def reader(self, name: str, seed: int, how: str = "direct") -> "subprocess.Popen[str]":
        return self.child(HERE / "reader.py", self.mountpoint / name, self.files / name, seed, how)

    def code(self, source: str, *arguments: object) -> "subprocess.Popen[str]":
        """Python `source` in a process of its own, in the mount's directory."""
        return self.child("-c", f"import os, sys\nos.chdir({str(self.mountpoint)!r})\n{source}", *arguments)

    def run(self, source: str) -> str:
        """What Python `source` prints, run in the mount's directory."""
        return finish(self.code(source))

    def stop(self) -> int:
        assert self.keeper is not None
        self.keeper.terminate()
        return self.keeper.wait(DEADLINE_S)

    def clean_up(self) -> None:
        for child in self.children:
            child.kill()
        mounted = mounts.find_mount(str(self.mountpoint))
        if mounted is not None:
            libc.umount2(str(self.mountpoint), libc.MNT_FORCE | libc.MNT_DETACH)
        for child in self.children:
            child.communicate()
        if self.keeper is not None:
            self.keeper.kill()
            self.keeper.wait()
        for line in self.trace("worker"):
            try:
                pid = int(line.split()[1])
                if str(self.directory) in Path(f"/proc/{pid}/cmdline").read_text():
                    os.kill(pid, signal.SIGKILL)
            except (FileNotFoundError, ProcessLookupError):
                pass


def finish(process: "subprocess.Popen[str]") -> str:
    """Let a child end; what it printed. Fails unless it ended well."""
    output, errors = process.communicate("", timeout=DEADLINE_S)
    assert process.returncode == 0, errors
    return output.strip()


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    if os.geteuid() != 0 or not Path("/dev/fuse").exists():
        pytest.skip("mounting takes root and /dev/fuse")
    lab = Lab(tmp_path)
    try:
        yield lab
    finally:
        lab.clean_up()
