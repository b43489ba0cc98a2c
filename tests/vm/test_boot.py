"""Real guests on a plain raw file: boots that succeed, and all the ways in which one does not."""

import asyncio
import os
import signal
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import RunCli, one_line
from vm.conftest import GuestDisk, console, typed
from vmthunder.errors import Conflict, Failure, Usage
from vmthunder.vm.boot import BootReport, boot
from vmthunder.vm.machine import Machines
from vmthunder.vm.process import processes
from vmthunder.vm.ready import ConsolePattern, GuestAgent, ReadyCheck, TcpPort
from vmthunder.vm.spec import Accel, Driver, Guest, Spec

TIMEOUT_S = 100
SPECS = {
    Driver.QEMU: Spec(memory_bytes=128 << 20, accel=Accel.TCG),
    Driver.UML: Spec(memory_bytes=64 << 20, driver=Driver.UML),
}
both_drivers = pytest.mark.parametrize("driver", list(Driver))


def boot_guest(
    machines: Machines,
    guest: GuestDisk,
    spec: Spec,
    ready: ReadyCheck | None = None,
    name: str | None = "web",
    timeout_s: float = TIMEOUT_S,
) -> BootReport:
    return asyncio.run(boot(machines, name, guest.backing(), spec, ready or ConsolePattern(), timeout_s=timeout_s))


@both_drivers
def test_a_guest_boots_on_its_own_overlay_and_the_report_adds_up(
    machines: Machines, busybox: GuestDisk, driver: Driver
) -> None:
    untouched_ns = busybox.disk.stat().st_mtime_ns
    report = boot_guest(machines, busybox, SPECS[driver])
    value = report.to_dict()
    phases = value["phases"]
    assert all(phases[step] > 0 for step in ("overlay_s", "start_s", "first_read_s", "ready_s"))
    assert phases["total_s"] == pytest.approx(sum(phases.values()) - phases["total_s"])
    assert value["bytes"]["read"] > 4 << 20  # its init reads 4 MiB of files
    assert value["bytes"]["fetched"] is None  # nobody was asked
    assert value["running"]
    assert machines.load("web") == report.machine
    assert busybox.disk.stat().st_mtime_ns == untouched_ns


def test_a_guest_is_ready_when_its_agent_answers(machines: Machines, busybox: GuestDisk) -> None:
    boot_guest(machines, busybox, replace(SPECS[Driver.QEMU], agent_channel=True), GuestAgent())


class Port80ThenLookAt81(TcpPort):
    """Nobody listens on 81, though QEMU accepts connections to it on the host's side."""

    async def wait(self, guest: Guest) -> None:
        await super().wait(guest)
        self.accepted = await guest.accepts(81)


def test_a_guest_is_ready_when_its_port_accepts_and_not_when_qemu_does(machines: Machines, busybox: GuestDisk) -> None:
    ready = Port80ThenLookAt81(80)
    report = boot_guest(machines, busybox, replace(SPECS[Driver.QEMU], guest_ports=frozenset({80, 81})), ready)
    assert not ready.accepted
    with socket.create_connection(("127.0.0.1", report.machine.ports[80]), timeout=10) as client:
        client.sendall(b"HEAD /00 HTTP/1.0\r\n\r\n")
        assert client.recv(5) == b"HTTP/"


def test_a_kernel_is_booted_directly_on_a_larger_disk(machines: Machines, busybox: GuestDisk) -> None:
    spec = replace(
        SPECS[Driver.QEMU],
        kernel=busybox.folder / "vmlinuz",
        initrd=busybox.folder / "initrd",
        append=f"{busybox.append} vmthunder.test=1",
        disk_bytes=3 << 30,
    )
    report = boot_guest(machines, busybox, spec)
    assert report.bytes_read < 14 << 20  # the kernel alone has 14 MB: it was not read from the disk
    assert "vmthunder.test=1" in typed("cat /proc/cmdline", "vmthunder.test", machines)
    assert str(3 << 21) in typed("cat /sys/block/vda/size", str(3 << 21), machines)


def test_a_driver_that_ends_says_why_and_leaves_nothing(machines: Machines, busybox: GuestDisk, tmp_path: Path) -> None:
    (tmp_path / "kernel").write_bytes(b"no kernel at all" * 1000)
    with pytest.raises(Failure, match=r"qemu of vm web exited with status 1; nothing of it is left\n.*kernel"):
        boot_guest(machines, busybox, replace(SPECS[Driver.QEMU], kernel=tmp_path / "kernel"))
    assert machines.names() == []


def test_a_guest_that_panics_under_uml_says_so(machines: Machines, busybox: GuestDisk) -> None:
    with pytest.raises(Failure, match=r"(?s)uml of vm web .*nothing of it is left.*Unable to mount root"):
        boot_guest(machines, busybox, replace(SPECS[Driver.UML], append="root=/dev/ubdz quiet"))
    assert machines.names() == []


@both_drivers
def test_a_driver_killed_during_the_boot_is_told_as_such(
    machines: Machines, busybox: GuestDisk, driver: Driver
) -> None:
    async def kill_while_booting() -> None:
        booting = asyncio.ensure_future(
            boot(machines, "web", busybox.backing(), SPECS[driver], ConsolePattern("never"), timeout_s=TIMEOUT_S)
        )
        while not (pids := list(processes(machines.directory("web")))):
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        os.kill(min(pids), signal.SIGKILL)
        await booting

    with pytest.raises(Failure, match=f"{driver} of vm web was killed by SIGKILL"):
        asyncio.run(kill_while_booting())
    assert machines.names() == []


def test_a_late_guest_goes_on_running(machines: Machines, busybox: GuestDisk) -> None:
    with pytest.raises(Failure, match=r"not ready within 0\.2 s .*vmthunder console web"):
        boot_guest(machines, busybox, SPECS[Driver.UML], timeout_s=0.2)
    assert machines.load("web").running


@both_drivers
def test_an_interrupted_boot_leaves_nothing(machines: Machines, busybox: GuestDisk, driver: Driver) -> None:
    async def interrupt() -> None:
        async with asyncio.timeout(1):
            await boot(machines, "web", busybox.backing(), SPECS[driver], ConsolePattern("never"), timeout_s=TIMEOUT_S)

    with pytest.raises(TimeoutError):
        asyncio.run(interrupt())
    assert machines.names() == []
    assert list(processes(machines.directory("web"))) == []


def test_a_taken_name_costs_the_first_guest_nothing(machines: Machines, busybox: GuestDisk) -> None:
    first = boot_guest(machines, busybox, SPECS[Driver.UML])
    with pytest.raises(Conflict):
        boot_guest(machines, busybox, SPECS[Driver.UML])
    assert machines.load("web") == first.machine
    assert first.machine.running


def test_a_pattern_that_is_none_is_refused() -> None:
    with pytest.raises(Usage, match="ready pattern"):
        ConsolePattern("(")


@both_drivers
def test_the_console_is_a_shell_in_the_guest_and_ends_with_it(
    machines: Machines, busybox: GuestDisk, driver: Driver
) -> None:
    boot_guest(machines, busybox, SPECS[driver])
    assert "sum=42" in typed("echo sum=$((6*7))", "sum=42", machines)
    # A second time: leaving has not disturbed the guest.
    assert "sum=43" in typed("echo sum=$((6*7+1))", "sum=43", machines)
    with console(machines) as process:
        assert process.stdout
        process.stdout.read(1)
        for pid in processes(machines.directory("web")):
            os.kill(pid, signal.SIGKILL)
        assert process.wait(10) == 0


def test_a_console_has_one_user_at_a_time(machines: Machines, busybox: GuestDisk, run_cli: RunCli) -> None:
    boot_guest(machines, busybox, SPECS[Driver.UML])
    with console(machines) as first:
        assert first.stdout
        first.stdout.read(1)
        second = run_cli("console", "web", "--state-dir", machines.state_dir)
        assert second.returncode == Conflict.exit_code
        assert "another console" in one_line(second.stderr)


@both_drivers
def test_a_machine_outlives_its_command_and_destroy_removes_all_of_it(
    machines: Machines, busybox: GuestDisk, driver: Driver, run_cli: RunCli
) -> None:
    report = boot_guest(machines, busybox, SPECS[driver])
    listed = run_cli("ps", "--state-dir", machines.state_dir)
    assert "web" in listed.stdout
    assert "running" in listed.stdout
    os.kill(report.machine.pid, signal.SIGKILL)
    os.waitpid(report.machine.pid, 0)
    stopped = run_cli("ps", "--json", "--state-dir", machines.state_dir)
    assert '"running": false' in stopped.stdout
    refused = run_cli("console", "web", "--state-dir", machines.state_dir)
    assert refused.returncode == Failure.exit_code
    assert "does not run" in one_line(refused.stderr)
    destroyed = run_cli("destroy", "web", "--state-dir", machines.state_dir)
    assert destroyed.returncode == 0, destroyed.stderr
    assert list(processes(machines.directory("web"))) == []  # UML's helpers outlive their leader
    assert run_cli("ps", "--json", "--state-dir", machines.state_dir).stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "exit_code", "said"),
    [
        (["destroy", "none"], 3, "no vm none"),
        (["destroy"], 2, "--all"),
        (["destroy", "a/b"], 2, "no name"),
        (["console", "none"], 3, "no vm none"),
        (["boot", "debian", "--ready-pattern", "("], 2, "ready pattern"),
        (["boot", "debian", "--ready-agent", "--ready-port", "22"], 2, "choose one"),
        (["boot", "debian", "--user-data", "/none"], 2, "No such file"),
        (["boot", "debian", "--memory", "1KiB"], 2, "memory"),
        (["boot", "debian"], 10, "no agent"),
    ],
)
def test_a_mistake_is_one_line_and_an_exit_code(
    tmp_path: Path, run_cli: RunCli, arguments: list[str], exit_code: int, said: str
) -> None:
    where = ["--state-dir", tmp_path / "state"] + (["--run-dir", tmp_path / "run"] if "boot" in arguments else [])
    done = run_cli(*arguments, *where)
    assert done.returncode == exit_code, done.stderr
    assert said in one_line(done.stderr)
