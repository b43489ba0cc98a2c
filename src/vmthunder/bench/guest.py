"""The guests of `scripts/build-guest`, and their recorded boots."""

import fcntl
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmthunder.bench.processes import finish
from vmthunder.errors import CorruptFile, NotFound, Usage
from vmthunder.lab.record import record
from vmthunder.lab.trace import write_csv
from vmthunder.vm.backing import BackingImage
from vmthunder.vm.ready import ConsolePattern
from vmthunder.vm.spec import Spec

KINDS: Final = ("lean", "heavy")

_BUILD_S = 1800.0
_RECORD_S = 600.0
_BUILD_GUEST = Path(__file__).parents[3] / "scripts" / "build-guest"


@dataclass(frozen=True)
class GuestDisk:
    """A guest as `scripts/build-guest` leaves it."""

    disk: Path
    memory_bytes: int
    ready_pattern: str

    @classmethod
    def load(cls, directory: Path) -> "GuestDisk":
        """Raises NotFound, CorruptFile."""
        facts_file, disk = directory / "guest.json", directory / "disk.raw"
        for path in (facts_file, disk):
            if not path.is_file():
                raise NotFound(f"{path} is not there; make a guest with scripts/build-guest")
        try:
            found = json.loads(facts_file.read_text())
            return cls(disk, int(found["memory_mib"]) << 20, found["ready"])
        except (ValueError, KeyError, TypeError):
            raise CorruptFile(
                f"{facts_file} does not describe a guest; make it again with scripts/build-guest"
            ) from None

    def local(self) -> BackingImage:
        """The disk as a file of this machine."""
        return BackingImage("guest", "", self.disk, self.disk.stat().st_size)

    def trace(self, say: Callable[[str], None]) -> Path:
        """Its recorded boot, beside the disk; recorded when it is first asked for. Raises as `record`."""
        path = self.disk.with_name("boot.csv")
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                say(f"recording a boot of {self.disk}, once")
                spec = Spec(memory_bytes=self.memory_bytes)
                reads, _ = record(self.local(), spec, ConsolePattern(self.ready_pattern), _RECORD_S)
                scratch = path.with_suffix(".new")
                with scratch.open("w") as file:
                    write_csv(reads, file)
                scratch.rename(path)
        return path


def build_guest(kind: str) -> Path:
    """The folder of a guest, which is built once per machine. Needs a checkout. Raises Usage, Failure."""
    if not _BUILD_GUEST.is_file():
        raise Usage("this installation has no scripts/build-guest; name a guest's folder with --guest")
    with tempfile.NamedTemporaryFile("r", prefix="vmthunder-build-guest-") as log:
        finish("build-guest", [str(_BUILD_GUEST), "--kind", kind], Path(log.name), _BUILD_S)
        return Path(json.loads(log.read().splitlines()[-1])["folder"])
