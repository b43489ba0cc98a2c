"""Disks to publish, what an origin says they are, and a publish that can be stopped in the middle."""

import asyncio
import hashlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from vmthunder.ids import image_name
from vmthunder.image.chunk import decode, verify
from vmthunder.origin.origin import Origin

MIB = 1 << 20
DEADLINE_S = 30


def wait_until(true: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not true():
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.002)


def make_disk(path: Path, seed: int = 1, size_bytes: int = 24 * MIB + 512) -> Path:
    """A sparse raw disk: text, noise, zeros that are not holes, extents that begin and end anywhere."""
    rng = random.Random(seed)
    with path.open("wb") as disk:
        disk.truncate(size_bytes)
        for at, data in (
            (0, rng.randbytes(3 * MIB + 77)),
            (5 * MIB + 4096, b"all work and no play " * 40_000),
            (8 * MIB, bytes(2 * MIB)),
            (12 * MIB - 9, rng.randbytes(18)),
            (size_bytes - 100, rng.randbytes(100)),
        ):
            disk.seek(at)
            disk.write(data)
    return path


def make_noise(path: Path, size_bytes: int = 160 * MIB, seed: int = 1) -> Path:
    """A disk that takes a while and several packs."""
    rng = random.Random(seed)
    with path.open("wb") as disk:
        for _ in range(size_bytes // MIB):
            disk.write(rng.randbytes(MIB))
    return path


def qemu_img(*args: object) -> None:
    subprocess.run(["qemu-img", *map(str, args)], check=True, capture_output=True, timeout=60)


def convert(raw: Path, target: Path, driver: str, *options: str) -> Path:
    qemu_img("convert", "-f", "raw", "-O", driver, *options, raw, target)
    return target


def contents(origin: Path, name: str) -> bytes:
    """The disk that is published under `name`, put together from checked chunks."""

    async def read() -> bytes:
        store = Origin.open(str(origin))
        manifest = await store.manifest((await store.ref(image_name(name))).image_id)
        disk = bytearray(manifest.virtual_bytes)
        for row in manifest.rows():
            data = await store.read_pack(row.pack, row.offset, row.encoded_bytes)
            assert verify(row.chunk_id, data)
            begin = row.index * manifest.chunk_bytes
            length = manifest.slice_bytes(row.index)
            disk[begin : begin + length] = decode(data, length)
        return bytes(disk)

    return asyncio.run(read())


def same(a: bytes, b: bytes) -> bool:
    """Compare without pytest's idea of showing the difference of two disks."""
    return hashlib.sha256(a).digest() == hashlib.sha256(b).digest()


def stored_packs(origin: Path) -> list[Path]:
    return [path for path in (origin / "packs").rglob("*") if path.is_file() and len(path.name) == 64]


def litter(tmp_path: Path) -> list[object]:
    """What publishes left in the directory for temporary files, and mounts of theirs."""
    scratch = tmp_path / "scratch"
    mounts = Path("/proc/self/mounts").read_text().splitlines()
    return [*scratch.iterdir(), *(line for line in mounts if str(scratch) in line)]


class Publish:
    """`vmthunder publish` as a process that can be caught in the act."""

    def __init__(
        self, source: Path | str, name: str, origin: Path, *, program: tuple[str, ...] = ("-m", "vmthunder")
    ) -> None:
        command = [sys.executable, *program, "publish", str(source), name, "--origin", str(origin)]
        self.origin = origin
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def stop_in_the_middle(self) -> None:
        """SIGSTOP it once its first pack is stored."""
        wait_until(lambda: stored_packs(self.origin) or self.process.poll() is not None, "a pack is stored")
        self.process.send_signal(signal.SIGSTOP)
        assert self.process.poll() is None, self.process.communicate()

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def end(self) -> tuple[int, str]:
        """Exit code and what it said on stderr."""
        _, stderr = self.process.communicate(timeout=60)
        return self.process.returncode, stderr

    def daemons(self) -> list[int]:
        """Process ids of its children."""
        children = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return [int(pid) for file in children for pid in file.read_text().split()]
