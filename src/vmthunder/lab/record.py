"""Records what a booting guest asks of its disk, before any page cache has answered for it.

nbdkit stands between the guest's overlay and the image file and logs every request (its `log` filter); its answers come
from the same file that a guest reads otherwise.
"""

import asyncio
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Final

from vmthunder.errors import Failure, MissingTool
from vmthunder.lab.trace import Read
from vmthunder.vm.backing import BackingImage
from vmthunder.vm.boot import BootReport, boot
from vmthunder.vm.machine import Machines
from vmthunder.vm.ready import ReadyCheck
from vmthunder.vm.spec import Spec

_START_S = 10.0
_STAMP = r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+) connection=(\d+) "
# nbdkit-log-filter(1)
_ISSUE = re.compile(_STAMP + r"Read id=(\d+) offset=0x([0-9a-f]+) count=0x([0-9a-f]+)")
_COMPLETION = re.compile(_STAMP + r"\.\.\.Read id=(\d+) return=0")


def parse_log(lines: Iterable[str]) -> list[Read]:
    """The completed reads of an nbdkit log, in the order of their issue; times are seconds since the epoch."""
    issued: dict[tuple[str, str], tuple[float, int, int]] = {}
    reads = []
    for line in lines:
        if match := _ISSUE.match(line):
            stamp, connection, request, offset, count = match.groups()
            issued[connection, request] = (_seconds(stamp), int(offset, 16), int(count, 16))
        elif match := _COMPLETION.match(line):
            stamp, connection, request = match.groups()
            if (begun := issued.pop((connection, request), None)) is not None:
                issue_s, offset_bytes, length_bytes = begun
                reads.append(Read(issue_s, max(issue_s, _seconds(stamp)), offset_bytes, length_bytes))
    return sorted(reads)


def _seconds(stamp: str) -> float:
    return datetime.fromisoformat(stamp).timestamp()


def record(image: BackingImage, spec: Spec, ready: ReadyCheck, timeout_s: float) -> tuple[list[Read], BootReport]:
    """Boot `image` once, and return what it read until it was ready.

    Raises:
        MissingTool: nbdkit is not installed.
        Failure and others: as `boot`.
    """
    scratch: Final = Path(tempfile.mkdtemp(prefix="vmthunder-record-"))
    machines = Machines(scratch)
    log = scratch / "requests.log"
    try:
        with _logged(image.path, scratch / "nbd.sock", log) as uri:
            through = replace(image, path=uri)
            report = asyncio.run(boot(machines, "recorded", through, spec, ready, timeout_s=timeout_s))
            ready_s = time.time()
            machines.destroy("recorded")
        reads = [read for read in parse_log(log.read_text().splitlines()) if read.completion_s <= ready_s]
        if not reads:
            raise Failure(
                f"guest of image {image.name} was ready without a read of its disk; there is nothing to record"
            )
        return reads, report
    finally:
        if any(machine.name == "recorded" for machine in machines.all()):
            machines.destroy("recorded")
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _logged(image: Path | str, socket: Path, log: Path) -> Iterator[str]:
    """nbdkit on an image file; gives the URI of its export."""
    argv = ["nbdkit", "-f", "-U", str(socket), "-r", "--filter=log", "file", f"file={image}", f"logfile={log}"]
    try:
        nbdkit = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    except FileNotFoundError:
        raise MissingTool("nbdkit is not installed; `make setup` installs what is missing") from None
    try:
        deadline_s = time.monotonic() + _START_S
        while not socket.exists():
            if nbdkit.poll() is not None or time.monotonic() > deadline_s:
                nbdkit.kill()
                said = (nbdkit.communicate()[1] or b"").decode(errors="replace").strip().splitlines()
                raise Failure(f"nbdkit cannot serve {image}: {said[-1] if said else 'it does not start'}")
            time.sleep(0.01)
        yield f"nbd+unix:///?socket={socket}"
    finally:
        nbdkit.terminate()
        nbdkit.communicate()
