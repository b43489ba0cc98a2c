"""The disk stays on one server, and every node reads it from there: NBD, iSCSI, and HTTP with what was read kept."""

import shutil
import subprocess
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from vmthunder.bench.cell import Cell, Setup
from vmthunder.bench.methods.http_server import COMPRESSED, compressed, serve_files
from vmthunder.bench.methods.nbdfile import accepts, missing, show, show_with_qemu
from vmthunder.bench.reader import warm
from vmthunder.lab.cluster import Host
from vmthunder.vm.backing import BackingImage

_NBD_PORT = 10809
_ISCSI_PORT = 3260
_TARGET = "iqn.2014-07.example:disk"
_TIMEOUT_S = 60.0


@dataclass
class Nbd:
    """nbdkit's file plug-in on the raw file, as nbdkit(1) begins; four connections per node, as nbdfuse(1) advises."""

    name: str = "NBD, one server"
    _disk: Path = field(default=Path(), init=False)

    def absent(self) -> str | None:
        return missing("nbdkit", "nbdfuse")

    def publish(self, disk: Path, work: Path) -> None:
        del work
        self._disk = disk
        warm(disk)

    def set_up(self, cell: Cell) -> Setup:
        address = cell.origin.address
        # nbdkit in the foreground ends with the thread that started it (PR_SET_PDEATHSIG), and what starts processes in a
        # namespace is a thread that is soon over: timeout(1), here without a limit, stands between them.
        argv = ["timeout", "0", "nbdkit", "--foreground", "--readonly", f"--ipaddr={address}", f"--port={_NBD_PORT}"]
        argv += ["file", str(self._disk)]
        cell.start(cell.origin, argv, lambda _: _listens(cell.origin, _NBD_PORT))
        return Setup([partial(show, cell, node, f"nbd://{address}:{_NBD_PORT}") for node in cell.nodes])


@dataclass
class Iscsi:
    """tgt on the raw file; on the nodes QEMU's iSCSI driver (libiscsi): the transport of the VMThunder of 2014."""

    name: str = "iSCSI, one server"
    _disk: Path = field(default=Path(), init=False)

    def absent(self) -> str | None:
        return missing("tgtd", "tgtadm", "qemu-nbd", "nbdfuse") or _no_qemu_driver("iscsi")

    def publish(self, disk: Path, work: Path) -> None:
        del work
        self._disk = disk
        warm(disk)

    def set_up(self, cell: Cell) -> Setup:
        address = cell.origin.address
        control = ["env", f"TGT_IPC_SOCKET={cell.short}/tgt"]
        server = [*control, "tgtd", "--foreground", "--iscsi", f"portal={address}:{_ISCSI_PORT}"]
        cell.start(cell.origin, server, lambda _: _listens(cell.origin, _ISCSI_PORT))
        for words in (
            f"--mode target --op new --tid 1 --targetname {_TARGET}",
            f"--mode logicalunit --op new --tid 1 --lun 1 --backing-store {self._disk}",
            "--mode target --op bind --tid 1 --initiator-address ALL",
        ):
            cell.finish(cell.origin, [*control, "tgtadm", "--lld", "iscsi", *words.split()], _TIMEOUT_S)
        url = f"iscsi://{address}:{_ISCSI_PORT}/{_TARGET}/1"
        return Setup([partial(show_with_qemu, cell, node, "--read-only", "--format=raw", url) for node in cell.nodes])


@dataclass
class CopyOnRead:
    """QEMU's copy-on-read over its HTTP driver: what a guest has read stays in a file of the node."""

    name: str = "copy-on-read, HTTP"
    _folder: Path = field(default=Path(), init=False)

    def absent(self) -> str | None:
        return missing("nginx", "qemu-img", "qemu-nbd", "nbdfuse") or _no_qemu_driver("http")

    def publish(self, disk: Path, work: Path) -> None:
        self._folder = compressed(disk, work).parent

    def set_up(self, cell: Cell) -> Setup:
        url = serve_files(cell, self._folder)

        def prepare(node: Host) -> BackingImage:
            overlay = cell.directory(node) / "overlay.qcow2"
            backing = f"{url}/{COMPRESSED}"
            argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", backing, str(overlay)]
            cell.finish(node, argv, _TIMEOUT_S)
            options = f"driver=copy-on-read,file.driver=qcow2,file.file.driver=file,file.file.filename={overlay}"
            return show_with_qemu(cell, node, "--image-opts", options)

        return Setup([partial(prepare, node) for node in cell.nodes])


def _listens(host: Host, port: int) -> bool:
    """Whether a host accepts TCP connections of its own on a port; they do not cross its link."""
    return host.run(lambda: accepts((host.address, port)))


def _no_qemu_driver(name: str) -> str | None:
    program = shutil.which("qemu-nbd")
    if program is None:
        return "qemu-nbd not installed"
    said = subprocess.run(
        [program, f"{name}://127.0.0.1:9/x/1"], capture_output=True, text=True, timeout=20, check=False
    )
    return f"QEMU has no {name} driver" if "Unknown protocol" in said.stderr else None
