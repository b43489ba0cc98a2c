"""What a file is, by its first and last bytes, and what QEMU says about its parts. Reads only; no threads.

We look at the magic numbers ourselves and then tell QEMU which format to use: a raw disk is the guest's to write, and
must not become a qcow2 with a backing file of the guest's choice because QEMU was asked to guess.
"""

import fcntl
import json
import os
import struct
import subprocess
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from vmthunder.errors import Conflict, CorruptFile, Failure, MissingTool, NotFound, NotPermitted, Usage, VMThunderError


class DiskFormat(StrEnum):
    """Formats of disk images that can be published."""

    AUTO = "auto"
    RAW = "raw"
    QCOW2 = "qcow2"
    VMDK = "vmdk"
    VHD = "vhd"
    VHDX = "vhdx"
    VDI = "vdi"

    @property
    def driver(self) -> str:
        """QEMU's word for it."""
        return "vpc" if self is DiskFormat.VHD else self.value


PROBE_TIMEOUT_S: Final = 60.0
"""For `qemu-img info`, which reads a few headers."""

_FOOTER_AT: Final = -512
_FLOCK: Final = "hhqqi0q"
"""struct flock with 64-bit offsets: type, whence, start, length, pid."""

_DISKS: Final = (
    (0, b"QFI\xfb", DiskFormat.QCOW2),
    (0, b"KDMV", DiskFormat.VMDK),
    (0, b"COWD", DiskFormat.VMDK),
    (0, b"# Disk DescriptorFile", DiskFormat.VMDK),
    (0, b"conectix", DiskFormat.VHD),
    (_FOOTER_AT, b"conectix", DiskFormat.VHD),
    (0, b"vhdxfile", DiskFormat.VHDX),
    (64, b"\x7f\x10\xda\xbe", DiskFormat.VDI),
)
_OTHERS: Final = (
    (0, b"\x1f\x8b\x08", "compressed with gzip; unpack it first"),
    (0, b"\xfd7zXZ\x00", "compressed with xz; unpack it first"),
    (0, b"\x28\xb5\x2f\xfd", "compressed with zstd; unpack it first"),
    (0, b"BZh", "compressed with bzip2; unpack it first"),
    (0, b"PK\x03\x04", "a zip archive; unpack it first"),
    (257, b"ustar", "a tar archive (an OVA is one); unpack the disk in it first"),
    (0, b"QED\x00", "in the format qed; convert it with qemu-img first"),
    (0, b"WithoutFreeSpace", "in the format parallels; convert it with qemu-img first"),
    (0, b"WithouFreSpacExt", "in the format parallels; convert it with qemu-img first"),
)


def sniff(fd: int, size_bytes: int, label: str) -> DiskFormat:
    """The format of an open file; RAW where nothing else matches.

    Raises:
        Usage: it is something that certainly is no disk, such as a compressed file.
    """
    head = os.pread(fd, 512, 0)
    foot = os.pread(fd, -_FOOTER_AT, size_bytes + _FOOTER_AT) if size_bytes >= -_FOOTER_AT else b""

    def matches(at: int, magic: bytes) -> bool:
        return foot.startswith(magic) if at == _FOOTER_AT else head.startswith(magic, at)

    for at, magic, disk in _DISKS:
        if matches(at, magic):
            return disk
    for at, magic, what in _OTHERS:
        if matches(at, magic):
            raise Usage(f"{label} is {what} (or give --format raw to publish it as it is)")
    return DiskFormat.RAW


def fixed_vhd_bytes(fd: int, size_bytes: int) -> int | None:
    """Length of the disk in a fixed-size VHD, which is a raw disk with a footer behind it; None for any other file.

    QEMU need not read those, and does not say where their holes are.
    """
    if size_bytes <= -_FOOTER_AT:
        return None
    # Microsoft's VHD specification: current size at 48, disk type at 60 (2 is fixed).
    cookie, disk_bytes, kind = struct.unpack(">8s40xQ4xI", os.pread(fd, 64, size_bytes + _FOOTER_AT))
    return disk_bytes if cookie == b"conectix" and kind == 2 and disk_bytes == size_bytes + _FOOTER_AT else None


def refuse_written(fd: int, label: str) -> None:
    """Raises Conflict if a QEMU has the open file for writing: it marks that with a lock, for others to respect."""
    # QEMU's block/file-posix.c: the permission of bit n is held by a shared lock on byte 100 + n; BLK_PERM_WRITE is bit 1.
    question = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 101, 1, 0)
    kind, *_ = struct.unpack(_FLOCK, fcntl.fcntl(fd, fcntl.F_OFD_GETLK, question))
    if kind != fcntl.F_UNLCK:
        raise _written(label)


def refuse_references(fd: int, label: str) -> None:
    """Refuse an image from elsewhere that names further files: they would be files of this machine.

    Only what QEMU opens without being asked for is looked for here; backing files are refused by `parts` as well.

    Raises:
        Usage: it names a backing file, a data file or extents.
    """
    head = os.pread(fd, 512, 0).ljust(512, b"\0")
    # docs/interop/qcow2.txt: backing file offset at 8; from version 3, features at 72: bit 2, external data.
    (version,) = struct.unpack_from(">I", head, 4)
    (backing,) = struct.unpack_from(">Q", head, 8)
    (features,) = struct.unpack_from(">Q", head, 72)
    # block/vmdk.c: a sparse extent of capacity 0 is only the wrapping of a descriptor, which may name any file.
    (capacity,) = struct.unpack_from("<Q", head, 12)
    if head.startswith(b"QFI\xfb") and (backing or (version >= 3 and features & 4)):
        what = "a backing file" if backing else "an external data file"
    elif head.startswith((b"# Disk DescriptorFile", b"COWD")) or (head.startswith(b"KDMV") and capacity == 0):
        what = "extents in other files"
    else:
        return
    raise _refused(label, what)


def _refused(label: str, what: str) -> Usage:
    return Usage(
        f"{label} names {what}, which a download must not; download all of its files and publish the local copy"
    )


def _written(label: str) -> Conflict:
    return Conflict(f"{label} is being written by a running VM; stop it, or publish a copy made with a snapshot")


def parts(
    filename: str, disk: DiskFormat, label: str, *, pass_fds: Sequence[int] = (), alone: bool = False
) -> list[Path]:
    """The local files an image consists of: itself, its extents and its backing chain, after QEMU has looked at them.

    Args:
        filename: absolute, so that QEMU cannot take it for a URL.
        disk: its format; not AUTO.
        label: how errors call it.
        pass_fds: descriptors that `filename` needs.
        alone: it must not name a backing file.

    Raises:
        Conflict: a running VM (or another writer) has one of the files.
        CorruptFile, NotFound, NotPermitted, Usage, MissingTool
    """
    command = [
        "qemu-img",
        "info",
        "--output=json",
        "-f",
        disk.driver,
        *([] if alone else ["--backing-chain"]),
        filename,
    ]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, pass_fds=pass_fds, check=False
        )
    except FileNotFoundError:
        raise MissingTool(f"qemu-img is needed to read {label}; install it (apt install qemu-utils)") from None
    except subprocess.TimeoutExpired:
        raise Failure(f"qemu-img did not answer for {PROBE_TIMEOUT_S:.0f} s about {label}") from None
    if done.returncode:
        raise explain(done.stderr, disk, label)
    found: Any = json.loads(done.stdout)
    chain: list[dict[str, Any]] = found if isinstance(found, list) else [found]
    if alone and "backing-filename" in chain[0]:
        raise _refused(label, "a backing file")
    files: list[Path] = []
    for layer in chain:
        here = Path(layer["filename"])
        data: dict[str, Any] = layer.get("format-specific", {}).get("data", {})
        names = [extent["filename"] for extent in data.get("extents", ())]
        names += [data["data-file"]] if "data-file" in data else []
        files += [here, *(here.parent / name for name in names)]
    return list(dict.fromkeys(files))


def explain(stderr: str, disk: DiskFormat, label: str) -> VMThunderError:
    """What QEMU's complaint about an image means."""
    text = stderr.strip().partition("\n")[0].removeprefix("qemu-img: ").removeprefix("qemu-storage-daemon: ")
    if "Failed to get shared" in stderr:
        return _written(label)
    if "Permission denied" in stderr:
        return NotPermitted(f"{label}: {text}")
    if "No such file" in stderr:
        return NotFound(f"{label} needs a file that is missing: {text}")
    if "encrypt" in stderr:
        return Usage(f"{label} is encrypted; decrypt it with qemu-img convert first")
    text = text.rpartition("': ")[2]  # what could not be opened is in `label`
    return CorruptFile(f"{label} cannot be read as {disk.value}: {text}")
