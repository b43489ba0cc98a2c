"""A disk that speaks NBD, or that QEMU's block layer can read, shown as a file: nbdfuse, with qemu-nbd under it.

QEMU itself would open these without a file in between. A replay, as any guest of another kind, reads a file: so this is where
a method that ends in QEMU's block layer is put to the same test as one that ends in a mount.
"""

import shutil
import socket
from pathlib import Path

from vmthunder.bench.cell import Cell, as_image
from vmthunder.lab.cluster import Host
from vmthunder.vm.backing import BackingImage


def missing(*programs: str) -> str | None:
    """Which of the programs are not installed, as a reason; None if all are."""
    lost = [name for name in programs if shutil.which(name) is None and not Path("/usr/sbin", name).exists()]
    return f"{', '.join(lost)} not installed: scripts/setup-system --rivals" if lost else None


def show(cell: Cell, host: Host, uri: str) -> BackingImage:
    """An NBD export as a file on a host, until the cell ends. Raises Failure."""
    mountpoint = cell.work / f"{host.name}.mount"
    mountpoint.mkdir()
    file = mountpoint / "nbd"
    cell.start(host, ["nbdfuse", "--readonly", str(mountpoint), uri], lambda _: file.exists())
    return as_image(file)


def show_with_qemu(cell: Cell, host: Host, *disk: str) -> BackingImage:
    """What qemu-nbd is told to open, as a file on a host, until the cell ends. Raises Failure."""
    path = cell.short / f"{host.name}.sock"
    argv = ["qemu-nbd", "--persistent", "--shared=8", f"--socket={path}", *disk]
    cell.start(host, argv, lambda _: accepts(str(path)))
    return show(cell, host, f"nbd+unix:///?socket={path}")


def accepts(address: str | tuple[str, int]) -> bool:
    """Whether something accepts connections at a unix socket's path, or at a host and port. That the socket is there is not
    enough: it is bound before it listens."""
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(address)
        except OSError:
            return False
        return True
