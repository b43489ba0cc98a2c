"""What a machine is to be, as an operator asks for it. Pure values and their checks."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from vmthunder.errors import Usage
from vmthunder.vm.process import Child

MIN_MEMORY_BYTES = 16 << 20
SSH_PORT = 22


class Driver(StrEnum):
    """What runs the guest."""

    QEMU = "qemu"
    UML = "uml"
    """User-mode Linux: its own kernel, the image's file system, an ordinary process."""


class Accel(StrEnum):
    """How QEMU runs the guest's code."""

    AUTO = "auto"
    KVM = "kvm"
    TCG = "tcg"


class CacheMode(StrEnum):
    """QEMU's cache modes (qemu-system-x86_64(1), `-drive cache=`), for overlay and image file alike."""

    NONE = "none"
    WRITEBACK = "writeback"
    WRITETHROUGH = "writethrough"
    DIRECTSYNC = "directsync"
    UNSAFE = "unsafe"


@dataclass(frozen=True, slots=True)
class Spec:
    """A machine to be. Raises Usage where its parts contradict each other."""

    driver: Driver = Driver.QEMU
    accel: Accel = Accel.AUTO
    memory_bytes: int = 256 << 20
    cpus: int = 1
    disk_bytes: int | None = None
    """None: as large as the image."""
    cache: CacheMode = CacheMode.WRITEBACK
    user_data: bytes | None = None
    ssh_keys: tuple[str, ...] = ()
    kernel: Path | None = None
    """None: the firmware boots from the disk."""
    initrd: Path | None = None
    append: str | None = None
    """None: root on the first partition, console on the serial port."""
    guest_ports: frozenset[int] = frozenset()
    """TCP ports of the guest to reach from this host."""
    agent_channel: bool = False
    """Whether the guest has a device for the QEMU guest agent."""

    def __post_init__(self) -> None:
        if self.memory_bytes < MIN_MEMORY_BYTES:
            raise Usage(f"a guest needs {MIN_MEMORY_BYTES >> 20} MiB of memory at least")
        if self.cpus < 1:
            raise Usage("a guest needs one cpu at least")
        for file in (self.kernel, self.initrd):
            if file and not file.is_file():
                raise Usage(f"{file} is not a file")
        if self.initrd and not self.kernel:
            raise Usage("--initrd needs --kernel")
        if self.driver is Driver.UML:
            self._check_uml()
        elif self.append and not self.kernel:
            raise Usage("--append needs --kernel; otherwise the boot loader in the image says what the kernel gets")

    def _check_uml(self) -> None:
        refused = {
            "--kernel": self.kernel,
            "--disk-size": self.disk_bytes,
            "--cpus": self.cpus > 1,
            "--accel": self.accel is not Accel.AUTO,
            "--cache": self.cache is not CacheMode.WRITEBACK,
            "a port to reach": self.guest_ports,
            "a guest agent": self.agent_channel,
        }
        for option, given in refused.items():
            if given:
                raise Usage(f"user-mode Linux has no use for {option}; use --driver qemu")


class Guest(Protocol):
    """A started machine, as boot and the readiness checks see it."""

    directory: Path
    child: Child
    accel: str

    async def connected(self) -> dict[int, int]:
        """Wait until the driver answers; guest port → port on 127.0.0.1."""

    async def bytes_read(self) -> int:
        """What the guest has read of its disks."""

    async def accepts(self, port: int) -> bool:
        """Whether something in the guest accepts a TCP connection on a forwarded port."""

    async def close(self) -> None:
        """Let go of the driver; the guest goes on."""
