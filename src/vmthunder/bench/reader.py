"""The reader of `bench read`: fio, the same for every row. One thread, one request at a time, pinned to one CPU.

fio is told not to give read-ahead advice (no guest and no QEMU gives any), and drops the file's page cache itself where
a row is measured without it.
"""

import json
import shutil
import subprocess
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final

from vmthunder.errors import Failure, MissingTool

RANDOM_BYTES: Final = 4 << 10
SEQUENTIAL_BYTES: Final = 1 << 20
_SEED = 20140623
_CPU = 0
_TIMEOUT_S = 600.0


class PageCache(Enum):
    """Of the file that is read, at the start."""

    WARM = "warm"
    DROPPED = "dropped"


@dataclass(frozen=True)
class Reading:
    """One run of the reader."""

    ops_s: float
    read_bytes: int
    seconds: float
    reader_cpu_s: float

    @property
    def mb_s(self) -> float:
        """In units of 10^6 bytes."""
        return self.read_bytes / self.seconds / 1e6


def require_reader() -> None:
    """Raises MissingTool when fio is not installed."""
    if shutil.which("fio") is None:
        raise MissingTool("fio is not installed; it is the reader of this benchmark: apt-get install fio")


def warm(path: Path) -> None:
    """Read the file once, so that its page cache is full."""
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(SEQUENTIAL_BYTES)
        while file.readinto(buffer):
            pass


def random_reads(path: Path, cache: PageCache, count: int, seconds: float) -> Reading:
    """4 KiB reads at random places, none twice: `count` of them, or in a warm cache over and over for `seconds`."""
    amount = {
        PageCache.WARM: ["--time_based", f"--runtime={seconds}"],
        PageCache.DROPPED: [f"--io_size={count * RANDOM_BYTES}"],
    }
    return _run(path, cache, "randread", RANDOM_BYTES, amount[cache])


def sequential_read(path: Path, cache: PageCache, passes: int) -> Reading:
    """The whole file in order, `passes` times if its cache is warm."""
    return _run(path, cache, "read", SEQUENTIAL_BYTES, [f"--loops={passes}"] if cache is PageCache.WARM else [])


def _run(path: Path, cache: PageCache, pattern: str, block_bytes: int, amount: list[str]) -> Reading:
    command = [
        "fio",
        "--name=reader",
        "--readonly",
        "--thread",
        "--ioengine=psync",
        "--allow_file_create=0",
        "--fadvise_hint=0",
        "--output-format=json",
        f"--filename={str(path).replace(':', chr(92) + ':')}",
        f"--cpus_allowed={_CPU}",
        f"--randseed={_SEED}",
        f"--invalidate={int(cache is PageCache.DROPPED)}",
        f"--rw={pattern}",
        f"--bs={block_bytes}",
        *amount,
    ]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise Failure(f"reading {path} took longer than {_TIMEOUT_S:.0f} s") from None
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise Failure(f"fio failed on {path}: {said[-1] if said else done.returncode}")
    # fio may print remarks before the JSON.
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    read = job["read"]
    seconds = read["io_bytes"] / read["bw_bytes"]
    return Reading(
        ops_s=read["iops"],
        read_bytes=read["io_bytes"],
        seconds=seconds,
        reader_cpu_s=(job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1000,
    )
