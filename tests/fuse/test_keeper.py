"""No death of a worker is seen by who reads; and what the keeper does when it cannot go on."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import one_line
from fuse.conftest import Lab, eventually, finish
from vmthunder.errors import Conflict, Failure, NotFound
from vmthunder.fuse import mounts
from vmthunder.fuse.spawn import spawn_keeper

CONFIGURATION_ERROR = 78
KILLS = 12


def readers(lab: Lab) -> "list[subprocess.Popen[str]]":
    return [lab.reader("disk", seed, how) for seed, how in enumerate(("direct", "buffered", "direct", "buffered"))]


def test_readers_see_the_same_bytes_while_the_worker_is_killed_again_and_again(lab: Lab) -> None:
    lab.add("disk")
    lab.start()
    reading = readers(lab)
    for _ in range(KILLS):
        lab.replace_worker(signal.SIGKILL)
    assert sum(int(finish(reader)) for reader in reading) > 0
    assert len(lab.trace("worker")) == 1 + KILLS


def test_readers_see_the_same_bytes_while_workers_hand_over(lab: Lab) -> None:
    lab.add("disk")
    lab.start()
    reading = readers(lab)
    for _ in range(6):
        lab.replace_worker(signal.SIGUSR1)
    assert sum(int(finish(reader)) for reader in reading) > 0
    assert [line.split()[2] for line in lab.trace("worker")] == ["start"] + 6 * ["handover"]


def test_a_read_that_waits_is_answered_by_the_next_worker(lab: Lab) -> None:
    content = lab.add("disk.waits", 4096)
    lab.start()
    reader = lab.code("sys.stdout.write(open('disk.waits', 'rb').read().hex())")
    eventually(lambda: lab.trace("read waits"), "a read")
    lab.replace_worker(signal.SIGKILL)
    (lab.directory / "open-gate").touch()
    assert finish(reader) == content.hex()


def test_a_worker_that_cannot_die_because_it_pushes_is_replaced_all_the_same(lab: Lab) -> None:
    content = lab.add("disk.pushed", 4096)
    lab.start()
    reader = lab.code("sys.stdout.write(open('disk.pushed', 'rb').read().hex())")
    eventually(lambda: lab.trace("read waits"), "a read")
    first = lab.worker_pid
    eventually(lambda: "D" in thread_states(first), "a thread that hangs in the kernel")
    lab.replace_worker(signal.SIGKILL)
    assert thread_states(first) == ["Z", "D"], "the first worker could die after all: this test shows nothing"
    (lab.directory / "open-gate").touch()
    assert finish(reader) == content.hex()
    eventually(lambda: not Path(f"/proc/{first}").exists(), "the end of the first worker")


def thread_states(pid: int) -> list[str]:
    tasks = sorted(Path(f"/proc/{pid}/task").iterdir(), key=lambda task: int(task.name))
    return [(task / "stat").read_text().rpartition(")")[2].split()[0] for task in tasks]


def test_a_worker_that_dies_young_is_replaced_too(lab: Lab) -> None:
    lab.add("disk", 4096)
    (lab.directory / "dies-young").touch()
    lab.start()
    lab.replace_worker(signal.SIGKILL)
    assert lab.run("print(len(open('disk', 'rb').read()))") == "4096"
    assert lab.log.read_text().count("starting another one") == 2


def test_without_its_keeper_a_worker_serves_on_and_still_stops_in_order(lab: Lab) -> None:
    lab.add("disk", 4096)
    lab.start()
    assert lab.keeper is not None
    lab.keeper.kill()
    lab.keeper.wait()
    assert lab.run("print(len(open('disk', 'rb').read()))") == "4096"
    lab.signal_worker(signal.SIGTERM)
    eventually(lambda: mounts.find_mount(str(lab.mountpoint)) is None, "the unmount")


def test_stop_unmounts_and_ends_well(lab: Lab) -> None:
    lab.start()
    assert lab.stop() == 0
    assert mounts.find_mount(str(lab.mountpoint)) is None
    assert lab.log.read_text().count("\n") <= 1, "a stop in order has nothing to say"


@pytest.mark.parametrize("name", ["disk.waits", "disk.pushed"])
def test_stop_takes_the_mount_away_from_under_a_reader(lab: Lab, name: str) -> None:
    """The second one with a thread of the worker that hangs in the kernel and holds the connection open."""
    lab.add(name, 4096)
    lab.start()
    reader = lab.code(f"open('{name}', 'rb').read()")
    eventually(lambda: lab.trace("read waits"), "a read")
    assert lab.stop() == 0
    assert mounts.find_mount(str(lab.mountpoint)) is None
    reader.communicate(timeout=20)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGPIPE])
def test_signals_of_a_terminal_do_not_end_the_keeper(lab: Lab, number: int) -> None:
    lab.start()
    assert lab.keeper is not None
    lab.keeper.send_signal(number)
    lab.replace_worker(signal.SIGUSR1)
    assert lab.keeper.poll() is None


def test_a_stop_that_comes_while_no_worker_lives_is_obeyed(lab: Lab) -> None:
    lab.start()
    lab.signal_worker(signal.SIGKILL)
    assert lab.stop() == 0
    assert mounts.find_mount(str(lab.mountpoint)) is None


def test_an_unmount_by_somebody_else_ends_worker_and_keeper(lab: Lab) -> None:
    lab.start()
    subprocess.run(["umount", lab.mountpoint], check=True)
    assert lab.keeper is not None
    assert lab.keeper.wait(20) == 0


def test_a_worker_that_cannot_start_ends_the_keeper_with_its_own_words_and_status(lab: Lab) -> None:
    (lab.directory / "broken").touch()
    with pytest.raises(Failure, match="the configuration is broken") as raised:
        lab.start()
    assert raised.value.exit_code == CONFIGURATION_ERROR
    assert mounts.find_mount(str(lab.mountpoint)) is None


def test_a_worker_that_is_broken_later_is_tried_until_it_works(lab: Lab) -> None:
    lab.add("disk", 4096)
    lab.start()
    (lab.directory / "broken").touch()
    lab.signal_worker(signal.SIGUSR1)
    eventually(lambda: lab.log.read_text().count("status 78") >= 2, "a second try")
    (lab.directory / "broken").unlink()
    assert lab.run("print(len(open('disk', 'rb').read()))") == "4096"


def test_a_mount_that_a_dead_agent_left_is_replaced(lab: Lab) -> None:
    lab.start()
    assert lab.keeper is not None
    lab.keeper.kill()
    lab.keeper.wait()
    lab.signal_worker(signal.SIGKILL)
    eventually(lambda: not mounts._answers(str(lab.mountpoint)), "a dead mount")
    lab.add("disk", 4096)
    lab.start()
    assert lab.run("print(len(open('disk', 'rb').read()))") == "4096"


def failure(lab: Lab, mountpoint: Path, program: str = sys.executable) -> Failure:
    log = lab.directory / "failure.log"
    with pytest.raises(Failure) as raised:
        spawn_keeper(mountpoint, [program, "-c", ""], log=log, ready_timeout_s=20)
    one_line("\n".join(line for line in log.read_text().splitlines() if "oom_score_adj" not in line))
    return raised.value


def test_a_mount_that_is_served_is_not_touched(lab: Lab) -> None:
    lab.start()
    second = failure(lab, lab.mountpoint)
    assert "is served by a running agent" in str(second)
    assert second.exit_code == Conflict.exit_code
    assert lab.run("print(os.listdir())") == "[]"


def test_a_directory_that_is_not_there_is_said_in_one_line(lab: Lab) -> None:
    missing = failure(lab, lab.directory / "missing")
    assert "make it first" in str(missing)
    assert missing.exit_code == NotFound.exit_code


def test_a_worker_program_that_is_not_there_is_said_in_one_line(lab: Lab) -> None:
    assert "cannot run /no/such/program" in str(failure(lab, lab.mountpoint, "/no/such/program"))
    assert mounts.find_mount(str(lab.mountpoint)) is None


def test_the_keeper_is_small(lab: Lab) -> None:
    lab.start()
    assert lab.keeper is not None
    status = Path(f"/proc/{lab.keeper.pid}/status").read_text()
    resident_kib = int(status.partition("VmRSS:")[2].split()[0])
    assert resident_kib < 24 * 1024
    assert "asyncio" not in Path(f"/proc/{lab.keeper.pid}/maps").read_text()
