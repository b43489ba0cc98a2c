"""The local file: what every other way is held against."""

from dataclasses import dataclass, field
from pathlib import Path

from vmthunder.bench.cell import Cell, Setup, as_image
from vmthunder.bench.reader import warm


@dataclass
class LocalFile:
    """One raw file in the page cache, from which all guests boot: faster than a disk on each node."""

    name: str = "local file"
    _disk: Path = field(default=Path(), init=False)

    def absent(self) -> None:
        return None

    def publish(self, disk: Path, work: Path) -> None:
        del work
        self._disk = disk
        warm(disk)

    def set_up(self, cell: Cell) -> Setup:
        return Setup([lambda: as_image(self._disk)] * len(cell.nodes))
