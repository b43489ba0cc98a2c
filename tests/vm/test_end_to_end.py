"""The main job, all parts real: publish, serve, mount, boot; and the death of the agent's worker under a guest."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agents import Agent, Lab, eventually, finish, run_vmthunder
from agents import lab as lab
from conftest import VMTHUNDER
from vm.conftest import GuestDisk, typed
from vmthunder.vm.machine import Machines

IMAGE = "busybox"


class Node:
    """An agent behind an image server, and the machines on it."""

    def __init__(self, lab: Lab, agent: Agent, machines: Machines) -> None:
        self.lab, self.agent, self.machines = lab, agent, machines

    def booting(self, name: str, *options: str) -> "subprocess.Popen[str]":
        where = ["--state-dir", self.machines.state_dir, "--run-dir", self.agent.run_dir]
        # TCG, so that a test means the same on every host.
        return self.lab.child(
            *VMTHUNDER, "boot", IMAGE, "--name", name, "--memory", "128MiB", "--json", *where, *options
        )

    def boot(self, name: str, *options: str) -> dict[str, Any]:
        (said,) = finish([self.booting(name, *options)], deadline_s=120)
        report: dict[str, Any] = json.loads(said)
        return report

    def bytes_read(self) -> int:
        return sum(image["read_bytes"] for image in self.agent.status()["images"])

    def read_errors(self, name: str) -> str:
        """What the guest's kernel says of its disk."""
        return typed("echo errors=$(dmesg | grep -ciE 'I/O error|EXT4-fs error')", r"errors=\d", self.machines, name)


@pytest.fixture
def node(lab: Lab, busybox: GuestDisk, tmp_path: Path) -> Iterator[Node]:
    run_vmthunder("publish", busybox.disk, IMAGE, "--origin", lab.origin, "--format", "raw")
    with lab.server() as (_, url):
        machines = Machines(tmp_path / "machines")
        try:
            yield Node(lab, lab.agent(url), machines)
        finally:
            # Before the mount goes: a guest whose disk went away would not die of it, and hold the mount.
            for name in machines.names():
                machines.destroy(name)


def test_a_guest_boots_cold_then_warm_then_through_the_death_of_the_worker(node: Node) -> None:
    cold = node.boot("cold", "--accel", "tcg")
    assert 0 < cold["bytes"]["fetched"] < cold["bytes"]["read"]
    warm = node.boot("warm", "--accel", "tcg")
    assert warm["bytes"]["fetched"] < cold["bytes"]["fetched"] / 20  # no two boots read quite the same

    # Past the page cache of this host, so that the guest depends on the worker from its first read to its last.
    read_before = node.bytes_read()
    booting = node.booting("killed", "--accel", "tcg", "--cache", "none")
    for count_from in (read_before, 0, 0):  # a new worker counts from nothing
        eventually(lambda least=count_from + (3 << 20): node.bytes_read() > least, "the guest reads")
        node.agent.kill_worker()
    (said,) = finish([booting], deadline_s=120)
    assert json.loads(said)["bytes"]["read"] == pytest.approx(warm["bytes"]["read"], rel=0.1)
    assert "errors=0" in node.read_errors("killed")
    assert node.agent.status()["restarts"] == 3


def test_user_mode_linux_boots_from_the_same_image_file(node: Node) -> None:
    report = node.boot("uml", "--driver", "uml")
    assert report["bytes"]["fetched"] > 0
    assert (node.machines.directory("uml") / "image.raw").readlink() == node.agent.mount / f"{report['image_id']}.raw"
    assert "errors=0" in node.read_errors("uml")


def test_guests_that_bypass_the_page_cache_cost_each_chunk_once(node: Node, busybox: GuestDisk) -> None:
    # Without firmware and boot loader, which take most of the time.
    kernel = ["--kernel", str(busybox.folder / "vmlinuz"), "--initrd", str(busybox.folder / "initrd")]
    options = [*kernel, "--append", busybox.append, "--accel", "tcg", "--cache", "none"]
    finish([node.booting(f"vm-{number}", *options) for number in range(3)], deadline_s=150)
    status = node.agent.status()
    distinct = status["cache"]["chunks"]
    assert distinct > (4 << 20) // 65536  # its init reads 4 MiB of files
    assert status["fetch"]["chunks_fetched"] == distinct
    assert status["fetch"]["chunks_decoded"] == distinct


def test_a_guest_keeps_its_image_when_the_name_is_published_again(node: Node, tmp_path: Path) -> None:
    before = node.boot("before", "--driver", "uml")
    changed = tmp_path / "changed.raw"
    subprocess.run(
        ["cp", "--sparse=always", node.machines.directory("before") / "image.raw", changed], check=True, timeout=60
    )
    with changed.open("r+b") as disk:
        disk.seek(-512, 2)
        disk.write(b"another version".ljust(512))
    run_vmthunder("publish", changed, IMAGE, "--origin", node.lab.origin, "--format", "raw")
    after = node.boot("after", "--driver", "uml")
    assert after["image_id"] != before["image_id"]
    assert before["image_id"] in str((node.machines.directory("before") / "image.raw").readlink())


def test_an_image_that_is_not_published_leaves_no_machine(node: Node) -> None:
    where = ["--state-dir", node.machines.state_dir, "--run-dir", node.agent.run_dir]
    assert "nothing-here" in run_vmthunder("boot", "nothing-here", *where, exit_code=3)
    assert node.machines.names() == []
