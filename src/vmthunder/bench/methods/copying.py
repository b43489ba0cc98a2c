"""The whole image is copied to each node before its guest starts: over HTTP from one server, or by BitTorrent.

The copy is a compressed qcow2, and the guest boots from it as it is: to unpack it to a raw file first, as Nova does unless
`force_raw_images` is off, would only add to the time.
"""

import importlib.util
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

from vmthunder.bench.cell import Cell, Setup
from vmthunder.bench.methods.http_server import COMPRESSED, compressed, serve_files
from vmthunder.bench.methods.nbdfile import missing, show_with_qemu
from vmthunder.bench.processes import Process, finish
from vmthunder.lab.cluster import Host
from vmthunder.vm.backing import BackingImage

COPY_S: Final = 900.0
TORRENT: Final = "disk.torrent"
_PEER = (sys.executable, "-m", "vmthunder.bench.methods.torrent_peer")
_QCOW2 = ("--read-only", "--format=qcow2")


@dataclass
class HttpCopy:
    """curl from nginx, then boot."""

    name: str = "full copy, HTTP"
    _folder: Path = field(default=Path(), init=False)

    def absent(self) -> str | None:
        return missing("nginx", "curl", "qemu-img", "qemu-nbd", "nbdfuse")

    def publish(self, disk: Path, work: Path) -> None:
        self._folder = compressed(disk, work).parent

    def set_up(self, cell: Cell) -> Setup:
        url = serve_files(cell, self._folder)

        def prepare(node: Host) -> BackingImage:
            copy = cell.directory(node) / COMPRESSED
            argv = ["curl", "--silent", "--show-error", "--fail", "--output", str(copy), f"{url}/{COMPRESSED}"]
            cell.finish(node, argv, COPY_S)
            return show_with_qemu(cell, node, *_QCOW2, str(copy))

        return Setup([partial(prepare, node) for node in cell.nodes])


@dataclass
class BitTorrent:
    """libtorrent on the origin, which has the file, and on each node. Nodes that are done go on to give."""

    name: str = "full copy, BitTorrent"
    _file: Path = field(default=Path(), init=False)
    _torrent: Path = field(default=Path(), init=False)

    def absent(self) -> str | None:
        if importlib.util.find_spec("libtorrent") is None:
            return "libtorrent not installed: pip install 'vmthunder[rivals]'"
        return missing("qemu-img", "qemu-nbd", "nbdfuse")

    def publish(self, disk: Path, work: Path) -> None:
        self._file = compressed(disk, work)
        self._torrent = work / TORRENT
        if not self._torrent.exists():
            finish("libtorrent", [*_PEER, "make", str(self._file), str(self._torrent)], work / "torrent.log", COPY_S)

    def set_up(self, cell: Cell) -> Setup:
        origin = cell.origin.address
        seed = [*_PEER, "seed", origin, str(self._file.parent), str(self._torrent)]
        cell.start(cell.origin, seed, lambda process: "complete" in process.log.read_text())
        addresses = [origin, *(node.address for node in cell.nodes)]
        fetchers = []
        for node in cell.nodes:
            others = [address for address in addresses if address != node.address]
            argv = [*_PEER, "fetch", node.address, str(cell.directory(node)), *others]
            fetchers.append(cell.start(node, argv, lambda process: "listening" in process.log.read_text()))

        def prepare(node: Host, fetcher: Process) -> BackingImage:
            folder = cell.directory(node)
            scratch = folder / "scratch"
            scratch.write_bytes(self._torrent.read_bytes())
            scratch.rename(folder / TORRENT)
            fetcher.wait_until(lambda: "complete" in fetcher.log.read_text(), COPY_S)
            return show_with_qemu(cell, node, *_QCOW2, str(folder / COMPRESSED))

        return Setup([partial(prepare, node, fetcher) for node, fetcher in zip(cell.nodes, fetchers, strict=True)])
