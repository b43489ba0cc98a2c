"""A machine's own writable disk on top of the image file. Blocking; no state."""

import subprocess
from pathlib import Path

from vmthunder.errors import Failure, MissingTool, NoSpace, Usage

SECTOR_BYTES = 512


def overlay_bytes(image_bytes: int, disk_bytes: int | None) -> int:
    """Size of the guest's disk: the image's, or larger. Raises Usage."""
    if disk_bytes is None:
        return image_bytes
    if disk_bytes < image_bytes:
        raise Usage(f"--disk-size {disk_bytes} is smaller than the image, which has {image_bytes} bytes")
    return -(-disk_bytes // SECTOR_BYTES) * SECTOR_BYTES


def create_overlay(overlay: Path, image: Path | str, size_bytes: int) -> None:
    """Make a qcow2 file whose backing file is the raw file (or NBD export) `image`.

    It is its owner's alone, unless a default ACL of the directory says otherwise. Nothing of the image is read: its size and
    format are given (`-u`), so this does not wait for an origin either.

    Raises:
        MissingTool, NoSpace, Failure.
    """
    command = ["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", str(image), str(overlay)]
    try:
        done = subprocess.run(
            [*command, str(size_bytes)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            umask=0o077,
        )
    except FileNotFoundError:
        raise MissingTool("qemu-img is not installed; `make setup` installs what is missing") from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        if "No space left" in reason:
            raise NoSpace(f"no space left for {overlay}")
        raise Failure(f"qemu-img cannot make {overlay}: {reason}")
