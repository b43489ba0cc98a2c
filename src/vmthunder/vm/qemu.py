"""QEMU: its command line, and what its monitor says. One `QemuGuest` belongs to one event loop."""

import asyncio
import logging
import re
import subprocess
from pathlib import Path
from typing import Any

from qemu.qmp import QMPClient, QMPError

from vmthunder.errors import Failure, NotPermitted
from vmthunder.vm import machine
from vmthunder.vm.accel import QEMU, kvm_verdict
from vmthunder.vm.process import Child, start
from vmthunder.vm.spec import Accel, Guest, Spec

_log = logging.getLogger(__name__)
# Whatever the library logs it also raises, and what it raises is told to the operator in our words.
logging.getLogger("qemu.qmp").propagate = False

OVERLAY = "overlay.qcow2"
DEFAULT_APPEND = "root=/dev/vda1 rw console=ttyS0"
DISK = "disk"
KVM = ("-accel", "kvm", "-cpu", "host")
# More vCPU features make translated code slower; tb-size saves 50 MiB of translated code a guest, and no time is lost.
TCG = ("-accel", "tcg,thread=multi,tb-size=64", "-cpu", "qemu64")
POLL_S = 0.02
ACCEPT_POLLS = 25
# From `info usernet`: "TCP[HOST_FORWARD]  12  127.0.0.1 43465  10.0.2.15  22  0 0".
_CONNECTION = re.compile(r"TCP\[(\w+)\]\s+\d+\s+\S+\s+(\d+)\s+\S+\s+(\d+)")


def choose_accel(wanted: Accel, state_dir: Path) -> str:
    """`kvm` or `tcg`. Raises NotPermitted where KVM was demanded and does not work."""
    if wanted is Accel.TCG:
        return "tcg"
    verdict = kvm_verdict(state_dir)
    if not verdict.usable:
        if wanted is Accel.KVM:
            raise NotPermitted(f"KVM runs no guest on this host: {verdict.why}; use --accel tcg")
        _log.info("event=kvm_unusable why=%r", verdict.why)
    return "kvm" if verdict.usable else "tcg"


def command(name: str, accel: str, spec: Spec, sockets: dict[str, int]) -> list[str]:
    """QEMU's command line, run in the machine's directory; `sockets`: file name → listening descriptor."""

    def chardev(ident: str, socket: str, more: str = "") -> list[str]:
        return ["-chardev", f"socket,id={ident},fd={sockets[socket]},server=on,wait=off{more}"]

    forwards = "".join(f",hostfwd=tcp:127.0.0.1:0-:{port}" for port in sorted(spec.guest_ports))
    words = [
        QEMU, "-name", name, "-nodefaults", "-no-user-config", "-display", "none", "-M", "pc",
        "-smp", str(spec.cpus), "-m", f"{spec.memory_bytes >> 20}M",
        *(KVM if accel == "kvm" else TCG),
        *chardev("monitor", machine.MONITOR_SOCKET), "-mon", "chardev=monitor,mode=control",
        *chardev("console", machine.CONSOLE_SOCKET, f",logfile={machine.CONSOLE_LOG},logappend=on"),
        "-serial", "chardev:console",
        "-drive", f"if=none,id={DISK},format=qcow2,file={OVERLAY},cache={spec.cache},discard=unmap",
        "-device", f"virtio-blk-pci,drive={DISK}{'' if spec.kernel else ',bootindex=0'}",
        "-drive", f"if=none,id=seed,format=raw,file={machine.SEED},read-only=on",
        "-device", "virtio-blk-pci,drive=seed",
        "-netdev", f"user,id=net{forwards}", "-device", "virtio-net-pci,netdev=net,romfile=",
    ]  # fmt: skip
    if spec.agent_channel:
        words += [*chardev("agent", machine.AGENT_SOCKET), "-device", "virtio-serial-pci"]
        words += ["-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"]
    if spec.kernel:
        words += ["-kernel", str(spec.kernel.absolute()), "-append", spec.append or DEFAULT_APPEND]
    if spec.initrd:
        words += ["-initrd", str(spec.initrd.absolute())]
    return words


class QemuGuest(Guest):
    """A QEMU process and our connection to its monitor."""

    def __init__(self, directory: Path, child: Child, accel: str) -> None:
        self.directory, self.child, self.accel = directory, child, accel
        self._qmp = QMPClient()

    @classmethod
    def start(cls, name: str, directory: Path, spec: Spec, accel: str) -> "QemuGuest":
        """Raises MissingTool."""
        # Made here and inherited: connecting cannot come too early, and no path is too long for a socket.
        files = [machine.MONITOR_SOCKET, machine.CONSOLE_SOCKET] + [machine.AGENT_SOCKET] * spec.agent_channel
        sockets = {file: machine.listen(directory, file) for file in files}
        try:
            fds = {file: sock.fileno() for file, sock in sockets.items()}
            child = start(
                command(name, accel, spec, fds),
                directory,
                stdin_fd=subprocess.DEVNULL,
                output=machine.DRIVER_LOG,
                pass_fds=list(fds.values()),
            )
        finally:
            for sock in sockets.values():
                sock.close()
        return cls(directory, child, accel)

    async def connected(self) -> dict[int, int]:
        """Raises Failure: QEMU went away or speaks something else."""
        try:
            await self._qmp.connect(machine.connect(self.directory, machine.MONITOR_SOCKET))
        except (QMPError, OSError) as error:
            raise Failure(f"the monitor of QEMU in {self.directory} does not answer: {error}") from None
        return {guest: host for state, host, guest in await self._connections() if state == "HOST_FORWARD"}

    async def bytes_read(self) -> int:
        for device in await self._execute("query-blockstats"):
            if device["device"] == DISK:
                return int(device["stats"]["rd_bytes"])
        raise Failure(f"QEMU in {self.directory} has lost its disk")

    async def accepts(self, port: int) -> bool:
        """QEMU itself accepts on the host's side at once; whether the guest did is in its table of connections."""
        hosts = [host for state, host, guest in await self._connections() if state == "HOST_FORWARD" and guest == port]
        if not hosts:
            return False
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", hosts[0])
        except OSError:
            return False
        try:
            for _ in range(ACCEPT_POLLS):
                await asyncio.sleep(POLL_S)
                if reader.at_eof():
                    break  # the guest refused
                if any(state == "ESTABLISHED" and guest == port for state, _, guest in await self._connections()):
                    return True
        finally:
            writer.close()
        return False

    async def close(self) -> None:
        try:
            await self._qmp.disconnect()
        except (QMPError, EOFError, OSError):
            pass  # it is gone, which is what we wanted

    async def _connections(self) -> list[tuple[str, int, int]]:
        """Rows of the user-mode network: state, port on this host, port in the guest."""
        table = str(await self._execute("human-monitor-command", {"command-line": "info usernet"}))
        return [(state, int(host), int(guest)) for state, host, guest in _CONNECTION.findall(table)]

    async def _execute(self, name: str, arguments: dict[str, object] | None = None) -> Any:
        try:
            return await self._qmp.execute(name, arguments)
        except QMPError as error:
            raise Failure(f"QEMU in {self.directory} did not answer {name}: {error}") from None
