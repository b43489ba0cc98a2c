"""A real agent on a real mount, an origin for it, and processes that read from it.

Nothing in the test's own process reads from the mount: what reads must be killable.
"""

import asyncio
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from conftest import VMTHUNDER
from vmthunder.errors import VMThunderError
from vmthunder.fuse import libc, mounts
from vmthunder.ids import image_name
from vmthunder.node.agent import run_detached
from vmthunder.node.control import AgentClient
from vmthunder.node.settings import AgentSettings
from vmthunder.origin.origin import Origin
from vmthunder.publishing.formats import DiskFormat
from vmthunder.publishing.publish import publish
from vmthunder.publishing.source import open_source

DEADLINE_S = 30.0
_HOLDER = """
import hashlib, sys
with open(sys.argv[1], "rb") as file:
    print("open", flush=True)
    sys.stdin.read()
    print(hashlib.sha256(file.read()).hexdigest())
"""
READER = Path(__file__).parent / "fuse" / "reader.py"


def eventually(condition: Callable[[], Any], what: str, deadline_s: float = DEADLINE_S) -> Any:
    """Poll until `condition` holds, and return what it gave; fail with `what` when it does not in time."""
    end_s = time.monotonic() + deadline_s
    while not (result := condition()):
        assert time.monotonic() < end_s, f"{what}: not within {deadline_s:.0f} s"
        time.sleep(0.01)
    return result


def disk_bytes(size_bytes: int, seed: int = 1) -> bytes:
    """Contents like a disk's: what compresses, what does not, and holes."""
    rng = random.Random(seed)
    parts: list[bytes] = []
    left = size_bytes
    while left > 0:
        length = min(left, rng.choice((4096, 20000, 65536, 200000)))
        kind = rng.random()
        if kind < 0.2:
            parts.append(bytes(length))
        elif kind < 0.4:
            parts.append(rng.randbytes(length))
        else:
            parts.append((rng.randbytes(64) * (length // 64 + 1))[:length])
        left -= length
    return b"".join(parts)


@dataclass
class Lab:
    """An origin directory, an agent, and everything that has to be removed after the test."""

    directory: Path
    children: list["subprocess.Popen[str]"] = field(default_factory=list)
    agents: list["Agent"] = field(default_factory=list)

    @property
    def origin(self) -> Path:
        return self.directory / "origin"

    def publish(self, name: str, data: bytes, *, chunk_bytes: int = 64 << 10) -> Path:
        """Publish an image; returns the file that it was made of."""
        path = self.directory / f"{name}-{hashlib.sha256(data).hexdigest()[:8]}.raw"
        path.write_bytes(data)
        with open_source(str(path), DiskFormat.RAW) as source:
            origin = Origin.open(str(self.origin), create=True)
            asyncio.run(publish(source, image_name(name), origin, chunk_bytes=chunk_bytes, level=1))
        return path

    def agent(self, origin: str | Path | None = None, **settings: Any) -> "Agent":
        """Start an agent; other arguments are fields of `AgentSettings`."""
        agent = self.idle_agent(origin, **settings)
        agent.start()
        return agent

    def idle_agent(self, origin: str | Path | None = None, **settings: Any) -> "Agent":
        """An agent that is not started yet."""
        base = self.directory / "agent"
        places = {"mount": base / "images", "state_dir": base / "state", "run_dir": base / "run"}
        agent = Agent(AgentSettings(**{"origin": str(origin or self.origin), **places, **settings}))
        self.agents.append(agent)
        return agent

    def child(self, *command: object) -> "subprocess.Popen[str]":
        child = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.children.append(child)
        return child

    def reader(self, path: Path, source: Path, seed: int = 1, how: str = "buffered") -> "subprocess.Popen[str]":
        """Reads at random and compares, until `finish`; it has begun when this returns."""
        child = self.child(sys.executable, READER, path, source, seed, how)
        assert child.stderr is not None
        line = child.stderr.readline()
        assert line == "reading\n", line + child.communicate(timeout=5)[1]
        return child

    def holder(self, path: Path) -> "subprocess.Popen[str]":
        """Has the file open when this returns; after `finish` it has read it and printed the SHA-256."""
        child = self.child(sys.executable, "-c", _HOLDER, path)
        assert child.stdout is not None
        assert child.stdout.readline() == "open\n", child.communicate(timeout=5)
        return child

    @contextmanager
    def server(self, port: int = 0) -> Iterator[tuple["subprocess.Popen[str]", str]]:
        """`vmthunder server` on the origin directory, and its URL; SIGKILLed at the end."""
        server = self.child(*VMTHUNDER, "server", "--root", self.origin, "--listen", f"127.0.0.1:{port}")
        assert server.stdout is not None
        try:
            line = server.stdout.readline()
            assert line.startswith("listening on "), line + server.communicate(timeout=5)[1]
            yield server, line.split()[-1]
        finally:
            server.kill()
            server.communicate()

    def clean_up(self) -> None:
        for child in self.children:
            if child.poll() is None:
                child.kill()
        for agent in self.agents:
            agent.clean_up()
        for child in self.children:
            if child.stdin is not None:
                with suppress(BrokenPipeError):
                    child.stdin.close()
            child.wait(DEADLINE_S)
            for pipe in (child.stdout, child.stderr):
                if pipe is not None:
                    pipe.close()


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    """An origin, agents and readers for one test; everything is taken away after it."""
    if os.geteuid() != 0 or not Path("/dev/fuse").exists():
        pytest.skip("mounting takes root and /dev/fuse")
    lab = Lab(tmp_path)
    try:
        yield lab
    finally:
        lab.clean_up()


class Agent:
    """One agent in the background."""

    def __init__(self, settings: AgentSettings) -> None:
        self.settings = settings
        self.mount = settings.mount
        self.run_dir = settings.run_dir
        self.state_dir = settings.state_dir
        self.client = AgentClient(settings.socket)
        self.pids: set[int] = set()

    @property
    def arguments(self) -> list[str]:
        """The options of `vmthunder agent` that mean this one."""
        return [
            *("--origin", self.settings.origin),
            *("--state-dir", str(self.state_dir)),
            *("--run-dir", str(self.run_dir)),
            *("--mount", str(self.mount)),
        ]

    def start(self) -> None:
        run_detached(self.settings)
        self.status()

    def status(self) -> dict[str, Any]:
        status = self.client.status()
        self.pids |= {status["pid"], status["keeper_pid"] or status["pid"]}
        return status

    def path(self, name: str) -> Path:
        return self.mount / f"{name}.raw"

    @property
    def log(self) -> str:
        return (self.run_dir / "agent.log").read_text()

    def log_lines(self, event: str) -> list[str]:
        return [line for line in self.log.splitlines() if f"event={event}" in line]

    def kill_worker(self) -> None:
        """SIGKILL the worker; its successor serves when this returns."""
        before = self.status()
        os.kill(before["pid"], signal.SIGKILL)
        eventually(lambda: self.status()["restarts"] > before["restarts"], "a new worker")

    def drop_page_cache(self) -> None:
        """Make the kernel forget what it has of the images and of the chunk cache."""
        Path("/proc/sys/vm/drop_caches").write_text("1")

    def clean_up(self) -> None:
        with suppress(VMThunderError):
            self.client.stop(timeout_s=15)
        for pid in self.pids:
            if _is_ours(pid, self.run_dir):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        while (mounted := mounts.find_mount(str(self.mount))) is not None:
            with suppress(OSError):
                mounts.abort(mounted.connection)
            libc.umount2(str(self.mount), libc.MNT_FORCE | libc.MNT_DETACH)


def alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _is_ours(pid: int, run_dir: Path) -> bool:
    """Whether the process is one of this agent's: a pid alone may be somebody else's by now."""
    try:
        return os.fsencode(run_dir) in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def run_vmthunder(*arguments: object, exit_code: int = 0) -> str:
    """Run a command that must end with `exit_code`; what it printed, on stderr if that is not 0."""
    process = subprocess.run(
        [*VMTHUNDER, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S * 2,
        check=False,
    )
    assert process.returncode == exit_code, (arguments, process.returncode, process.stdout, process.stderr)
    return process.stdout if exit_code == 0 else process.stderr


def finish(children: "Sequence[subprocess.Popen[str]]", deadline_s: float = DEADLINE_S) -> list[str]:
    """Let children end; what they printed. Fails unless all ended well."""
    outputs = []
    for child in children:
        output, errors = child.communicate("", timeout=deadline_s)
        assert child.returncode == 0, errors or output
        outputs.append(output.strip())
    return outputs


def output_of(*command: object) -> str:
    """What a command that must succeed prints. Killed when it takes too long."""
    process = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert process.returncode == 0, (command, process.stderr)
    return process.stdout


def python(source: str, *arguments: object) -> str:
    """What Python code prints, run in a process of its own with `arguments` in sys.argv[1:]."""
    return output_of(sys.executable, "-c", f"import errno, os, sys\n{source}", *arguments).strip()


def errno_of(source: str, *arguments: object) -> str:
    """The name of the errno that an expression fails with, `none` if it does not."""
    return python(
        f"try:\n    {source}\n    print('none')\nexcept OSError as error:\n    print(errno.errorcode[error.errno])",
        *arguments,
    )


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def same(path: Path, source: Path) -> bool:
    """Whether two files are equal, by another process."""
    return subprocess.run(["cmp", str(path), str(source)], timeout=DEADLINE_S * 2, check=False).returncode == 0
