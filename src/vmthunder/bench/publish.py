"""What publishing costs, against the ways an image is packed today. Each runs as a process; its CPU time is counted.

The runs alternate, so that a machine that gets slower meanwhile is slower for all; the figures are medians.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic
from typing import Any, Final

from vmthunder.errors import Failure, NotFound
from vmthunder.publishing.formats import DiskFormat
from vmthunder.publishing.source import open_source

OURS: Final = "vmthunder publish"
QEMU_IMG: Final = "qemu-img convert -c (zlib)"
CASYNC: Final = "casync make"

_ALIGN_BYTES: Final = 4096
"""Files lie on blocks of a file system in a disk image."""


@dataclass(frozen=True)
class Cost:
    """One way to pack an image. MB are 10^6 bytes of data in the source."""

    name: str
    mb_s: float
    mb_s_per_core: float
    """Per second of CPU time of the process and all its children."""
    cpu_s: float
    rss_bytes: int
    """The largest process."""
    stored_bytes: int


@dataclass(frozen=True)
class _Run:
    wall_s: float
    cpu_s: float
    rss_bytes: int
    stored_bytes: int


def compare(source: Path, runs: int, directory: Path, told: Callable[[str], None]) -> dict[str, Any]:
    """Publish `source` as the others pack it, `runs` times each, in `directory`.

    Returns:
        {"rows": [Cost as a dict, …], "source_bytes": data in the source, "over_qemu_img": ours ÷ theirs per core}

    Raises:
        Failure: one of the programs failed.
    """
    data_bytes = sum(end - begin for begin, end in _extents(source))
    ways = dict(_ways(source))
    done: dict[str, list[_Run]] = {name: [] for name in ways}
    for number in range(runs):
        for name, command in ways.items():
            told(f"run {number + 1} of {runs}: {name}")
            with tempfile.TemporaryDirectory(dir=directory) as target:
                done[name].append(_measure(command(Path(target)), Path(target)))
    rows = [_cost(name, data_bytes, measured) for name, measured in done.items()]
    per_core = {row.name: row.mb_s_per_core for row in rows}
    over = per_core[OURS] / per_core[QEMU_IMG] if QEMU_IMG in per_core else None
    return {"rows": [asdict(row) for row in rows], "source_bytes": data_bytes, "over_qemu_img": over}


def realistic_disk(path: Path, size_bytes: int, tree: Path = Path("/usr")) -> None:
    """Fill `path` with files of this machine, in the order of their names, as an installed system's disk has them.

    Raises:
        NotFound: there is not that much.
    """
    at = 0
    with path.open("wb") as disk:
        for name in _files(tree):
            try:
                with Path(name).open("rb") as file:
                    at += os.sendfile(disk.fileno(), file.fileno(), None, size_bytes - at)
            except OSError:
                continue
            at += -at % _ALIGN_BYTES
            if at >= size_bytes:
                disk.truncate(size_bytes)
                return
            disk.seek(at)
    raise NotFound(f"{tree} holds only {at} bytes in files; give a smaller --size or a --source")


def _files(tree: Path) -> Iterator[str]:
    for directory, subdirectories, names in os.walk(tree):
        subdirectories.sort()
        for name in sorted(names):
            path = os.path.join(directory, name)  # noqa: PTH118 - half a million of them
            if os.path.isfile(path) and not os.path.islink(path):  # noqa: PTH113, PTH114
                yield path


def _extents(source: Path) -> Iterator[tuple[int, int]]:
    with open_source(str(source), DiskFormat.RAW) as opened:
        yield from opened.extents(_ALIGN_BYTES)


Command = Callable[[Path], Sequence[str]]
"""The command line of one way, given an empty directory for its output."""


def _ways(source: Path) -> Iterator[tuple[str, Command]]:
    """What is installed here."""

    def ours(target: Path) -> Sequence[str]:
        return (
            sys.executable,
            "-m",
            "vmthunder",
            "publish",
            "--format",
            "raw",
            "--origin",
            f"{target}",
            f"{source}",
            "it",
        )

    def qemu_img(target: Path) -> Sequence[str]:
        return ("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", f"{source}", f"{target}/it.qcow2")

    def casync(target: Path) -> Sequence[str]:
        return ("casync", "make", f"--store={target}/it.castr", f"{target}/it.caibx", f"{source}")

    yield OURS, ours
    if shutil.which("qemu-img"):
        yield QEMU_IMG, qemu_img
    if shutil.which("casync"):
        yield CASYNC, casync


def _measure(command: Sequence[str], target: Path) -> _Run:
    began_s = monotonic()
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=complaints)
        # wait4 tells what this one child and its children used, which getrusage mixes with those before.
        _, status, usage = os.wait4(process.pid, 0)
        wall_s = monotonic() - began_s
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            complaints.seek(0)
            reason = complaints.read().decode(errors="replace").strip().splitlines()
            raise Failure(
                f"{command[0]} failed ({process.returncode}): {reason[-1] if reason else 'it gave no reason'}"
            )
    stored_bytes = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    return _Run(wall_s, usage.ru_utime + usage.ru_stime, usage.ru_maxrss << 10, stored_bytes)


def _cost(name: str, data_bytes: int, runs: Sequence[_Run]) -> Cost:
    cpu_s = statistics.median(run.cpu_s for run in runs)
    return Cost(
        name=name,
        mb_s=data_bytes / 1e6 / statistics.median(run.wall_s for run in runs),
        mb_s_per_core=data_bytes / 1e6 / cpu_s,
        cpu_s=cpu_s,
        rss_bytes=max(run.rss_bytes for run in runs),
        stored_bytes=runs[-1].stored_bytes,
    )
