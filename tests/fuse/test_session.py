"""What processes see that use the mount."""

import os
import signal
import subprocess
import time

import pytest

from fuse.conftest import Lab, eventually, finish
from vmthunder.fuse.negotiate import READAHEAD_BYTES


@pytest.mark.parametrize("how", ["direct", "buffered"])
def test_random_concurrent_reads_are_the_bytes_of_the_source(lab: Lab, how: str) -> None:
    lab.add("disk", (8 << 20) + 1234)
    lab.start()
    reading = [lab.reader("disk", seed, how) for seed in range(4)]
    eventually(lambda: len(lab.trace("size")) > 200, "reads")
    assert sum(int(finish(reader)) for reader in reading) > 0


def test_files_that_bypass_the_page_cache_read_the_same(lab: Lab) -> None:
    content = lab.add("disk.direct", 300_000)
    lab.start()
    assert lab.run("sys.stdout.write(open('disk.direct', 'rb').read().hex())") == content.hex()


def test_a_sequential_reader_is_served_in_large_pieces(lab: Lab) -> None:
    lab.add("disk", 8 << 20)
    lab.start()
    lab.run("open('disk', 'rb', 0).read()")
    sizes = [int(line.split()[1]) for line in lab.trace("size")]
    assert max(sizes) == READAHEAD_BYTES  # the kernel of itself; who asks for more at a time past its cache gets that
    lab.run("import mmap\nfd = os.open('disk', os.O_RDONLY | os.O_DIRECT)\nos.preadv(fd, [mmap.mmap(-1, 4 << 20)], 0)")
    assert max(int(line.split()[1]) for line in lab.trace("size")) == 1024 * 1024


def test_what_was_read_once_is_read_again_without_the_worker(lab: Lab) -> None:
    content = lab.add("disk", 1 << 20)
    lab.start()
    reads_twice = lab.code(
        "fd = os.open('disk', os.O_RDONLY)\n"
        "os.read(fd, 1 << 20)\n"
        "os.close(fd); fd = os.open('disk', os.O_RDONLY)\n"
        "print('read once', flush=True); sys.stdin.read()\n"
        "sys.stdout.write(os.pread(fd, 1 << 20, 0).hex())"
    )
    assert reads_twice.stdout is not None
    assert reads_twice.stdout.readline() == "read once\n"
    lab.signal_worker(signal.SIGSTOP)
    assert finish(reads_twice) == content.hex()


def test_what_was_pushed_is_read_without_the_worker(lab: Lab) -> None:
    content = lab.add("disk", 1 << 20)
    lab.start()
    opened = lab.code(
        "fd = os.open('disk', os.O_RDONLY)\nos.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)\n"
        "print('open', flush=True); sys.stdin.read()\nsys.stdout.write(os.pread(fd, 65536, 0).hex())"
    )
    assert opened.stdout is not None
    assert opened.stdout.readline() == "open\n"
    lab.signal_worker(signal.SIGUSR2)
    eventually(lambda: lab.trace("pushed"), "the push")
    lab.signal_worker(signal.SIGSTOP)
    assert finish(opened) == content[:65536].hex()
    assert lab.trace("size") == []


def test_a_file_with_a_backing_file_is_read_without_the_worker(lab: Lab) -> None:
    content = lab.add("disk.native", 3 << 20)
    lab.start()
    opened = lab.code(
        "fd = os.open('disk.native', os.O_RDONLY)\nprint('open', flush=True); sys.stdin.read()\n"
        "sys.stdout.write(os.pread(fd, 3 << 20, 0).hex())"
    )
    assert opened.stdout is not None
    assert opened.stdout.readline() == "open\n"
    lab.signal_worker(signal.SIGSTOP)
    assert finish(opened) == content.hex()


def test_names_sizes_and_modes_are_listed(lab: Lab) -> None:
    names = [f"{index:03d}-{'x' * 100}" for index in range(200)]  # more than one READDIR holds
    for name in names:
        lab.add(name, 10)
    lab.start()
    assert lab.run("print('\\n'.join(sorted(os.listdir())))").splitlines() == names
    assert lab.run("print(oct(os.stat('.').st_mode), oct(os.stat(os.listdir()[7]).st_mode))") == "0o40555 0o100444"
    assert (
        lab.run("status = os.statvfs('.'); print(status.f_blocks, status.f_bfree, status.f_namemax)") == "1000 10 255"
    )


def test_a_directory_is_listed_to_its_end_by_the_next_worker(lab: Lab) -> None:
    names = {f"{index:03d}-{'x' * 100}" for index in range(200)}
    for name in names:
        lab.add(name, 1)
    lab.start()
    listing = lab.code(
        "listing = os.scandir('.'); first = next(listing).name; print('begun', flush=True); sys.stdin.read()\n"
        "print('\\n'.join([first, *(entry.name for entry in listing)]))"
    )
    assert listing.stdout is not None
    assert listing.stdout.readline() == "begun\n"
    lab.replace_worker(signal.SIGKILL)
    assert set(finish(listing).splitlines()) == names


def test_requests_that_we_do_not_know_are_refused_and_harm_nothing(lab: Lab) -> None:
    lab.add("disk", 4096)
    lab.start()
    assert lab.run("try: os.listxattr('disk')\nexcept OSError as error: print(error.strerror)") == (
        "Operation not supported"
    )
    assert lab.run("fd = os.open('disk', os.O_RDONLY); print(os.lseek(fd, 0, os.SEEK_HOLE))") == "4096"
    assert lab.run("try: open('disk', 'r+')\nexcept OSError as error: print(error.strerror)") == "Read-only file system"
    assert lab.run("print(len(open('disk', 'rb').read()))") == "4096"


def test_names_that_are_not_there_are_not_found(lab: Lab) -> None:
    lab.start()
    assert lab.run("print([os.path.exists(name) for name in ('missing', 'y' * 255)])") == "[False, False]"


def test_a_bug_in_the_file_system_costs_its_caller_an_error_and_nobody_else(lab: Lab) -> None:
    lab.add("disk", 4096)
    lab.start()
    assert lab.run("try: open('bug')\nexcept OSError as error: print(error.strerror)") == "Input/output error"
    assert lab.run("print(len(open('disk', 'rb').read()))") == "4096"
    assert "a bug in the file system" in lab.log.read_text()


READ_PAGE = """
import ctypes, mmap, signal
signal.signal(signal.SIGUSR1, lambda *_: None); signal.siginterrupt(signal.SIGUSR1, True)
fd = os.open(sys.argv[1], os.O_RDONLY | int(sys.argv[2])); page = mmap.mmap(-1, 4096)
read = ctypes.CDLL(None).pread(fd, ctypes.byref(ctypes.c_char.from_buffer(page)), 4096, ctypes.c_long(0))
print(read, bytes(page).hex())
"""
WAYS = [("disk.waits", 0), ("disk.waits", os.O_DIRECT), ("disk.waits.direct", 0)]
"""Through the page cache; asynchronously and synchronously past it. The kernel waits differently in each."""


def page_reader(lab: Lab, name: str, flags: int) -> "subprocess.Popen[str]":
    reader = lab.code(READ_PAGE, name, flags)
    eventually(lambda: lab.trace("read waits"), "a read")
    return reader


@pytest.mark.parametrize(("name", "flags"), WAYS)
def test_a_reader_that_waits_can_be_killed(lab: Lab, name: str, flags: int) -> None:
    lab.add(name, 4096)
    lab.start()
    reader = page_reader(lab, name, flags)
    reader.send_signal(signal.SIGUSR1)  # of which the kernel may tell us, and then of no other
    reader.kill()
    reader.wait(20)


@pytest.mark.parametrize(("name", "flags"), WAYS)
def test_a_signal_that_does_not_kill_does_not_end_a_read(lab: Lab, name: str, flags: int) -> None:
    content = lab.add(name, 4096)
    lab.start()
    reader = page_reader(lab, name, flags)
    os.kill(reader.pid, signal.SIGUSR1)
    time.sleep(1.2)  # the worker has to look twice and leave it alone
    assert lab.trace("read cancelled") == []
    (lab.directory / "open-gate").touch()
    assert finish(reader).splitlines() == [f"4096 {content.hex()}"]


def test_lookups_are_given_back(lab: Lab) -> None:
    lab.add("disk", 4096)
    lab.start()
    lab.run("os.stat('disk')")
    with open("/proc/sys/vm/drop_caches", "w") as drop:
        drop.write("2")
    eventually(lambda: lab.trace("forget 2 "), "a forget")
