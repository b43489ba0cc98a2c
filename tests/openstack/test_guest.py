"""The whole way of an image to a guest, all parts real: Glance, our mount, Nova's image back end, libvirtd, QEMU."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from agents import Agent, Lab, alive, eventually, output_of, run_vmthunder
from glance_server import GlanceServer
from libvirt_daemon import Libvirt, running
from openstack_names import base_name
from vm.conftest import GuestDisk
from vm.conftest import busybox as busybox
from vmthunder.fuse import mounts

DRIVE = Path(__file__).parent / "nova_drive.py"
UNREAD_BYTES = 16 << 20
"""At the end of the disk, past its partition: no boot reads it."""
PASSES, KILLS = 4, 3
DOMAIN_NAME = "instance-00000001"

# The disk's element is Nova's own; around it the part of its driver's XML that this guest needs.
DOMAIN = """<domain type="qemu">
  <name>{name}</name>
  <memory unit="MiB">128</memory>
  <vcpu>1</vcpu>
  <os><type machine="pc">hvm</type><boot dev="hd"/></os>
  <features><acpi/><apic/></features>
  <devices>
    {disk}
    <serial type="pty"><log file="{console}" append="off"/></serial>
  </devices>
</domain>"""


class Console:
    """A guest's serial console: the log of what it says, and the terminal that types into it."""

    def __init__(self, log: Path, terminal: str) -> None:
        self._log = log
        self._terminal = terminal

    def says(self, pattern: str) -> list[str]:
        return re.findall(pattern, self._log.read_text(errors="replace"))

    @contextmanager
    def typed(self, line: str) -> Iterator[None]:
        """QEMU drops what was typed when the terminal is closed too early."""
        with open(os.open(self._terminal, os.O_WRONLY | os.O_NOCTTY), "wb", buffering=0) as terminal:
            terminal.write(line.encode() + b"\n")
            yield


def bytes_read(agent: Agent) -> int:
    """Through the worker that runs now."""
    return sum(image["read_bytes"] for image in agent.status()["images"])


def sync(lab: Lab, *more: object) -> None:
    run_vmthunder("glance-sync", "--origin", lab.origin, "--once", *more)


def started(libvirt: Libvirt, domain: Path, log: Path) -> Console:
    """Start the domain whose console log that is; its guest is ready when this returns."""
    libvirt.virsh("create", domain)
    console = Console(log, libvirt.virsh("ttyconsole", DOMAIN_NAME))
    eventually(lambda: console.says(r"VMTHUNDER-READY [\d.]+[\s\S]*/ # "), "the guest is ready", 60)
    return console


def test_a_guest_of_nova_and_libvirt_outlives_its_image_in_glance_and_our_worker(
    lab: Lab, cloud: GlanceServer, nova_python: Path, busybox: GuestDisk
) -> None:
    unread = os.urandom(UNREAD_BYTES)
    source = lab.directory / "guest"
    output_of("cp", "--sparse=always", busybox.disk, source)
    with source.open("ab") as file:
        file.write(unread)
    image = cloud.upload(source, "raw")
    sync(lab)

    compute_node = lab.directory / "node"
    compute_node.mkdir(mode=0o755)
    instances = compute_node / "instances"
    base = instances / "_base"
    base.mkdir(parents=True)
    with lab.server() as (_, url):
        agent = lab.idle_agent(url, mount=base)
        where = ["--origin", url, "--state-dir", agent.state_dir, "--run-dir", agent.run_dir]
        alone = ["--no-p2p", "--control-listen", "none"]
        rarely = ["--complete-after", 3600, "--cache-size", "8MiB"]  # All of it is nowhere but at the origin.
        run_vmthunder("nova-mount", instances, *where, *alone, *rarely, "--detach")
        made = output_of(nova_python, DRIVE, instances, "root", image, "qcow2", source.stat().st_size)
        disk = json.loads(made.splitlines()[-1])
        assert disk["backing-filename"] == str(base / base_name(image))
        with running(lab, compute_node) as libvirt:
            log, xml = compute_node / "console.log", compute_node / "domain.xml"
            xml.write_text(DOMAIN.format(name=DOMAIN_NAME, disk=disk["xml"], console=log))
            console = started(libvirt, xml, log)
            cloud.delete(image)
            sync(lab)
            skip = (source.stat().st_size - UNREAD_BYTES) >> 20
            read = f"echo 3 > /proc/sys/vm/drop_caches; dd if=/dev/vda bs=1M skip={skip} 2>/dev/null | sha256sum"
            with console.typed(f"for i in $(seq {PASSES}); do {read}; done; echo read=$?"):
                for _ in range(KILLS):
                    before = bytes_read(agent)
                    eventually(lambda least=before + (1 << 20): bytes_read(agent) > least, "the guest reads")
                    agent.kill_worker()
                eventually(lambda: console.says(r"read=\d"), "the guest has read", 60)
            assert console.says("[0-9a-f]{64}") == [hashlib.sha256(unread).hexdigest()] * PASSES

            # Once it is whole on this host, the origin may forget it, too: Nova starts the instance again.
            libvirt.virsh("destroy", DOMAIN_NAME)
            run_vmthunder("materialize", f"nova-{base_name(image)}", "--run-dir", agent.run_dir)
            sync(lab, "--grace", 0)
            run_vmthunder("gc", "--origin", lab.origin)
            console = started(libvirt, xml, log)
            with console.typed(f"{read}; echo errors=$(dmesg | grep -ciE 'I/O error|EXT4-fs error')"):
                eventually(lambda: console.says(r"errors=\d"), "the guest has read", 60)
            assert console.says("[0-9a-f]{64}|errors=\\d") == [hashlib.sha256(unread).hexdigest(), "errors=0"]
            libvirt.virsh("destroy", DOMAIN_NAME)
            assert not libvirt.virsh("list", "--all")
        run_vmthunder("nova-mount", instances, "--run-dir", agent.run_dir, "--stop")
        assert not mounts.find_mount(str(base))
        eventually(lambda: not any(map(alive, agent.pids)), "keeper and workers have ended")
