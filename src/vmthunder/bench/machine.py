"""Facts about the machine that belong to every figure measured on it."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

from vmthunder import __version__


def facts() -> dict[str, str | int]:
    """CPU, memory, kernel, and versions of the programs that benchmarks use and that are installed."""
    found: dict[str, str | int] = {
        "vmthunder": __version__,
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }
    for program in ("qemu-system-x86_64", "qemu-nbd", "nbdkit", "nbdfuse", "fio"):
        said = version(program)
        if said:
            found[program] = said
    return found


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def version(program: str, option: str = "--version") -> str | None:
    """First line of what it says of itself; None where it is not installed."""
    path = shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if path is None:
        return None
    done = subprocess.run([path, option], capture_output=True, text=True, timeout=10, check=False)
    return (done.stdout or done.stderr).partition("\n")[0]
