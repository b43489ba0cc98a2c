"""A publish may end anywhere: nothing half published is seen, and the next one goes on."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conftest import RunCli, one_line
from publish.disks import MIB, Publish, contents, convert, litter, make_noise, same, stored_packs, wait_until

Start = Callable[..., Publish]


def visible(origin: Path) -> list[str]:
    return [path.name for path in (origin / "refs").glob("*")]


def daemons_on(disk: Path) -> list[str]:
    """Command lines of the storage daemons that have `disk` open, wherever they come from."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(file.read_text())
        except OSError:
            continue  # ended meanwhile
    return [line for line in found if line.startswith("qemu-storage-daemon") and str(disk) in line]


def test_a_killed_publish_shows_nothing_and_the_next_one_uses_what_it_stored(
    tmp_path: Path, origin: Path, start_publish: Start, run_cli: RunCli
) -> None:
    disk = convert(make_noise(tmp_path / "raw"), tmp_path / "disk", "qcow2")
    killed = start_publish(disk, "it", origin)
    killed.stop_in_the_middle()
    killed.process.kill()
    killed.end()
    assert visible(origin) == []
    wait_until(lambda: not daemons_on(disk), "the storage daemon ends by itself")
    assert not litter(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in stored_packs(origin)}
    again = run_cli("publish", disk, "it", "--origin", origin)
    assert again.returncode == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert sum(path.stat().st_size for path in stored_packs(origin)) < 161 * MIB
    assert same(contents(origin, "it"), (tmp_path / "raw").read_bytes())


def test_kills_at_any_moment_lose_nothing_and_leave_nothing(tmp_path: Path, origin: Path, run_cli: RunCli) -> None:
    rng = random.Random(7)
    disk = convert(make_noise(tmp_path / "raw", 48 * MIB), tmp_path / "disk", "qcow2")
    began_s = time.monotonic()
    first = run_cli("publish", disk, "old", "--origin", origin)
    takes_s = time.monotonic() - began_s
    assert first.returncode == 0, first.stderr
    make_noise(tmp_path / "raw", 48 * MIB, seed=2)
    convert(tmp_path / "raw", disk, "qcow2")
    for _ in range(12):
        victim = Publish(disk, "new", origin)
        time.sleep(rng.uniform(0, takes_s))
        victim.process.kill()
        victim.end()
    wait_until(lambda: not daemons_on(disk), "the storage daemons end by themselves")
    assert run_cli("publish", disk, "new", "--origin", origin).returncode == 0
    assert run_cli("gc", "--origin", origin).returncode == 0
    for name in ("old", "new"):
        assert run_cli("verify", name, "--origin", origin).returncode == 0
    assert same(contents(origin, "new"), (tmp_path / "raw").read_bytes())
    for name in ("old", "new"):
        assert run_cli("rm", name, "--origin", origin).returncode == 0
    assert run_cli("gc", "--origin", origin).returncode == 0
    left = [path for path in origin.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in left) < 1000, left


def test_ctrl_c_ends_in_one_line(tmp_path: Path, origin: Path, start_publish: Start) -> None:
    disk = convert(make_noise(tmp_path / "raw"), tmp_path / "disk", "qcow2")
    publish = start_publish(disk, "it", origin)
    publish.stop_in_the_middle()
    publish.process.send_signal(signal.SIGINT)
    publish.go_on()
    code, stderr = publish.end()
    assert (code, one_line(stderr)) == (130, "interrupted")
    assert visible(origin) == []
    assert not litter(tmp_path)


def test_a_dead_storage_daemon_is_one_line(tmp_path: Path, origin: Path, start_publish: Start) -> None:
    disk = convert(make_noise(tmp_path / "raw"), tmp_path / "disk", "qcow2")
    publish = start_publish(disk, "it", origin)
    publish.stop_in_the_middle()
    (daemon,) = publish.daemons()
    os.kill(daemon, signal.SIGKILL)
    publish.go_on()
    code, stderr = publish.end()
    assert code == 1
    assert "qemu-storage-daemon ended (signal 9)" in one_line(stderr)
    assert visible(origin) == []
    assert not litter(tmp_path)


IMPATIENT = """
import sys
from vmthunder.publishing import encoding
encoding.STALL_S = 0.5
from vmthunder.cli.main import main
main()
"""


def test_a_hung_storage_daemon_is_one_line(tmp_path: Path, origin: Path, start_publish: Start) -> None:
    disk = convert(make_noise(tmp_path / "raw"), tmp_path / "disk", "qcow2")
    publish = start_publish(disk, "it", origin, program=("-c", IMPATIENT))
    publish.stop_in_the_middle()
    (daemon,) = publish.daemons()
    os.kill(daemon, signal.SIGSTOP)
    publish.go_on()
    code, stderr = publish.end()
    assert code == 1
    assert "qemu-storage-daemon stopped answering" in one_line(stderr)
    assert not litter(tmp_path)


def shorten(disk: Path) -> None:
    os.truncate(disk, 100 * MIB)


def lengthen(disk: Path) -> None:
    os.truncate(disk, 200 * MIB)


def overwrite(disk: Path) -> None:
    with disk.open("r+b") as file:
        file.write(b"x")


@pytest.mark.parametrize("change", [shorten, lengthen, overwrite, Path.unlink])
def test_a_source_that_changes_is_not_published(
    change: Callable[[Path], None], tmp_path: Path, origin: Path, start_publish: Start
) -> None:
    disk = make_noise(tmp_path / "disk")
    publish = start_publish(disk, "it", origin)
    publish.stop_in_the_middle()
    change(disk)
    publish.go_on()
    code, stderr = publish.end()
    assert code in (1, 8)
    assert str(disk) in one_line(stderr)
    assert visible(origin) == []


def test_a_backing_file_that_changes_is_noticed(tmp_path: Path, origin: Path, start_publish: Start) -> None:
    base = convert(make_noise(tmp_path / "raw"), tmp_path / "base", "qcow2")
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", tmp_path / "top"], check=True, timeout=60
    )
    publish = start_publish(tmp_path / "top", "it", origin)
    publish.stop_in_the_middle()
    os.utime(base)
    publish.go_on()
    code, stderr = publish.end()
    assert code == 8
    assert str(base) in one_line(stderr)
    assert visible(origin) == []


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    path = tmp_path / "small"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", path], check=True)
    yield path
    subprocess.run(["umount", path], check=True)


def test_a_full_origin_is_one_line_and_gc_empties_it(tmp_path: Path, small: Path, run_cli: RunCli) -> None:
    disk = make_noise(tmp_path / "disk", 80 * MIB)
    done = run_cli("publish", disk, "it", "--origin", small)
    assert done.returncode == 6
    one_line(done.stderr)
    assert run_cli("gc", "--origin", small).returncode == 0
    assert sum(path.stat().st_size for path in small.rglob("*") if path.is_file()) < 1000
    os.truncate(disk, 40 * MIB)
    assert run_cli("publish", disk, "it", "--origin", small).returncode == 0


def test_a_full_temporary_directory_is_one_line(
    tmp_path: Path, small: Path, origin: Path, run_cli: RunCli, serve: Callable[[Path], str]
) -> None:
    directory = tmp_path / "web"
    directory.mkdir()
    make_noise(directory / "disk", 80 * MIB)
    environment = os.environ | {"TMPDIR": str(small)}
    done = run_cli("publish", f"{serve(directory)}/disk", "it", "--origin", origin, env=environment)
    assert done.returncode == 6
    assert "TMPDIR" in one_line(done.stderr)
