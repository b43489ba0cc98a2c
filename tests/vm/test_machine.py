"""Records of machines, their processes, their overlays; no guest is needed."""

import json
import os
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import RunCli
from vmthunder.errors import Conflict, CorruptFile, NotFound, Usage
from vmthunder.vm import machine
from vmthunder.vm.machine import Machine, Machines
from vmthunder.vm.overlay import create_overlay, overlay_bytes
from vmthunder.vm.process import ProcessIdentity, end_processes, processes, start
from vmthunder.vm.spec import Driver, Spec


def record(name: str, identity: ProcessIdentity) -> Machine:
    return Machine(
        name=name,
        image="debian",
        image_id="0" * 64,
        driver="qemu",
        accel="tcg",
        memory_bytes=1 << 28,
        cpus=1,
        created_at="2026-01-01T00:00:00+00:00",
        pid=identity.pid,
        start_ticks=identity.start_ticks,
        ports={22: 40022},
    )


def sleeper(directory: Path, command: str = "sleep 600") -> ProcessIdentity:
    child = start(["sh", "-c", command], directory, stdin_fd=subprocess.DEVNULL, output="out")
    child.let_go()
    return child.identity


def test_a_record_is_read_back_as_it_was_written(machines: Machines) -> None:
    machines.create("web", "debian")
    vm = record("web", ProcessIdentity.of(os.getpid()))
    machines.save(vm)
    assert machines.load("web") == vm
    assert vm.running


def test_unnamed_machines_take_the_first_free_number(machines: Machines) -> None:
    assert [machines.create(None, "debian_12")[0] for _ in range(2)] == ["debian-12-1", "debian-12-2"]
    machines.destroy("debian-12-1")
    assert machines.create(None, "debian_12")[0] == "debian-12-1"


def test_a_name_is_given_once(machines: Machines) -> None:
    machines.create("web", "debian")
    with pytest.raises(Conflict, match="destroy web"):
        machines.create("web", "debian")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-a", "ä", "a b", "a" * 64, "../../etc"])
def test_names_that_are_no_host_names_are_refused(machines: Machines, name: str) -> None:
    with pytest.raises(Usage):
        machines.directory(name)


def test_a_used_again_pid_is_not_the_machine(machines: Machines) -> None:
    ours = ProcessIdentity.of(os.getpid())
    assert not replace(record("web", ours), start_ticks=ours.start_ticks - 1).running


def test_a_zombie_does_not_run() -> None:
    child = subprocess.Popen(["sleep", "0"])
    identity = ProcessIdentity.of(child.pid)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not identity.is_alive()
    child.wait()


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"name": "web"}', '{"ports": []}'])
def test_a_damaged_record_is_named_and_can_be_destroyed(machines: Machines, damage: str) -> None:
    _, directory = machines.create("web", "debian")
    (directory / machine.RECORD).write_text(damage)
    with pytest.raises(CorruptFile, match="destroy web"):
        machines.load("web")
    assert machines.all() == []
    machines.destroy("web")
    assert machines.names() == []


def test_destroy_finds_processes_whose_pid_was_never_written_down(machines: Machines) -> None:
    _, directory = machines.create("web", "debian")
    leader = sleeper(directory, "sleep 600 & sleep 600 & wait")
    while len(list(processes(directory))) < 3:
        time.sleep(0.01)
    machines.destroy("web")
    assert not leader.is_alive()
    assert list(processes(directory)) == []
    assert not directory.exists()


def test_destroy_leaves_processes_alone_that_only_stand_in_the_directory(machines: Machines) -> None:
    _, directory = machines.create("web", "debian")
    with subprocess.Popen(["sleep", "600"], cwd=directory) as bystander:
        machines.destroy("web")
        assert bystander.poll() is None
        bystander.kill()


def test_destroy_of_one_machine_leaves_the_others(machines: Machines) -> None:
    first, second = (machines.create(name, "debian")[1] for name in ("web", "web-1"))
    identities = sleeper(first), sleeper(second)
    machines.destroy("web")
    assert [identity.is_alive() for identity in identities] == [False, True]
    assert machines.names() == ["web-1"]


def test_destroy_of_nothing_is_not_found(machines: Machines) -> None:
    with pytest.raises(NotFound, match="no vm web"):
        machines.destroy("web")


def test_ending_twice_is_no_error(tmp_path: Path) -> None:
    end_processes(tmp_path)
    end_processes(tmp_path)


def test_sockets_work_in_directories_that_are_too_long_for_their_address(tmp_path: Path) -> None:
    directory = tmp_path / ("d" * 120)
    directory.mkdir()
    with machine.listen(directory, "a.sock") as listener, machine.connect(directory, "a.sock") as client:
        peer, _ = listener.accept()
        with peer:
            client.sendall(b"hello")
            assert peer.recv(5) == b"hello"


def test_last_lines_are_printable(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"x" * 9000 + b"\nfirst\n\x1b[1;31mred\x1b[0m\x07\n\n\xff\n")
    assert machine.last_lines(tmp_path / "log", count=3) == ["first", "red", "�"]
    assert machine.last_lines(tmp_path / "none") == []


def test_an_overlay_names_its_image_and_reads_nothing_of_it(tmp_path: Path) -> None:
    image = tmp_path / "not, there.raw"
    create_overlay(tmp_path / "overlay.qcow2", image, 5 << 20)
    assert (tmp_path / "overlay.qcow2").stat().st_mode & 0o777 == 0o600
    said = subprocess.run(
        ["qemu-img", "info", "-U", "--output=json", tmp_path / "overlay.qcow2"], capture_output=True, check=True
    )
    info = json.loads(said.stdout)
    assert (info["backing-filename"], info["backing-filename-format"]) == (str(image), "raw")
    assert info["virtual-size"] == 5 << 20


def test_a_disk_may_be_larger_than_its_image_but_not_smaller() -> None:
    assert overlay_bytes(1000, None) == 1000
    assert overlay_bytes(1000, 5000) == 5120
    with pytest.raises(Usage, match="smaller than the image"):
        overlay_bytes(1000, 999)


@pytest.mark.parametrize(
    "contradiction",
    [
        {"memory_bytes": 1},
        {"cpus": 0},
        {"append": "quiet"},
        {"initrd": Path(__file__)},
        {"kernel": Path("/none")},
        {"driver": Driver.UML, "cpus": 2},
        {"driver": Driver.UML, "kernel": Path(__file__)},
        {"driver": Driver.UML, "disk_bytes": 1 << 30},
        {"driver": Driver.UML, "guest_ports": frozenset({22})},
        {"driver": Driver.UML, "agent_channel": True},
    ],
)
def test_a_machine_that_cannot_be_is_refused(contradiction: dict[str, object]) -> None:
    with pytest.raises(Usage):
        Spec(**contradiction)  # type: ignore[arg-type]


def test_names_are_listed_whole_in_a_pipe(machines: Machines, run_cli: RunCli) -> None:
    name = "a-machine-with-a-name-of-63-letters-digits-and-dashes-123456789"
    machines.create(name, "debian")
    image = "an-image-with-a-name-that-is-" + "long-" * 20
    machines.save(replace(record(name, ProcessIdentity.of(os.getpid())), image=image))
    _, line = run_cli("ps", "--state-dir", machines.state_dir).stdout.splitlines()
    assert line.split()[:3] == [name, image, "running"]
