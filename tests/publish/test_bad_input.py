"""Everything an operator may get wrong is one line and an exit code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import RunCli, one_line
from publish.disks import MIB, convert, make_disk, qemu_img


@pytest.mark.parametrize(
    ("name", "data", "options", "code"),
    [
        ("empty", b"", (), 2),
        ("disk.gz", b"\x1f\x8b\x08rest", (), 2),
        ("disk.xz", b"\xfd7zXZ\x00rest", (), 2),
        ("disk.ova", b"disk.ovf".ljust(257, b"\0") + b"ustar", (), 2),
        ("not-qcow2", b"junk" * 1000, ("--format", "qcow2"), 4),
        ("broken-qcow2", b"QFI\xfb" + b"\xff" * 1000, (), 4),
        ("broken-vmdk", b"KDMV" + b"\xff" * 1000, (), 4),
        ("broken-vhd", b"conectix" + b"\xff" * 1000, (), 4),
        ("broken-vhdx", b"vhdxfile" + b"\xff" * 1000, (), 4),
        ("disk", b"x" * 1000, ("--chunk-size", "5KiB"), 2),
        ("disk", b"x" * 1000, ("--chunk-size", "1GiB"), 2),
    ],
)
def test_a_bad_source_is_one_line(
    name: str, data: bytes, options: tuple[str, ...], code: int, tmp_path: Path, origin: Path, run_cli: RunCli
) -> None:
    (tmp_path / name).write_bytes(data)
    done = run_cli("publish", tmp_path / name, "it", "--origin", origin, *options)
    assert done.returncode == code, done.stderr
    one_line(done.stderr)
    assert not list((origin / "refs").glob("*"))


@pytest.mark.parametrize(
    ("source", "code"), [("missing", 3), (".", 2), ("/dev/zero", 2), ("ftp://host/disk", 2), ("http://[", 1)]
)
def test_a_source_that_is_no_file_is_one_line(
    source: str, code: int, tmp_path: Path, origin: Path, run_cli: RunCli
) -> None:
    done = run_cli("publish", source, "it", "--origin", origin, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    one_line(done.stderr)


@pytest.mark.parametrize("name", ["a/b", "..", "", "ü", "x" * 300, "0" * 64, "a\nb"])
def test_a_bad_name_is_one_line(name: str, tmp_path: Path, origin: Path, run_cli: RunCli) -> None:
    done = run_cli("publish", make_disk(tmp_path / "disk"), name, "--origin", origin)
    assert done.returncode == 2, done.stderr
    one_line(done.stderr)


def test_a_disk_that_a_vm_writes_to_is_refused(tmp_path: Path, origin: Path, run_cli: RunCli) -> None:
    for driver in ("qcow2", "raw"):
        disk = convert(make_disk(tmp_path / "source"), tmp_path / driver, driver)
        node = f"driver={driver},node-name=disk,file.driver=file,file.filename={disk}"
        export = f"type=vhost-user-blk,id=disk,node-name=disk,writable=on,addr.type=unix,addr.path={tmp_path}/socket"
        writer = subprocess.Popen(
            [
                "qemu-storage-daemon",
                "--blockdev",
                node,
                "--export",
                export,
                "--chardev",
                "stdio,id=qmp",
                "--monitor",
                "qmp",
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        try:
            assert writer.stdout is not None
            assert b"QMP" in writer.stdout.readline()
            done = run_cli("publish", disk, "it", "--origin", origin)
        finally:
            writer.kill()
            writer.communicate()
        assert done.returncode == 8, done.stderr
        assert "running VM" in one_line(done.stderr)


def test_a_missing_backing_file_is_one_line(tmp_path: Path, origin: Path, run_cli: RunCli) -> None:
    base = convert(make_disk(tmp_path / "raw"), tmp_path / "base", "qcow2")
    qemu_img("create", "-f", "qcow2", "-b", base, "-F", "qcow2", tmp_path / "top")
    base.unlink()
    done = run_cli("publish", tmp_path / "top", "it", "--origin", origin)
    assert done.returncode == 3, done.stderr
    assert str(base) in one_line(done.stderr)


def test_an_encrypted_disk_is_one_line(tmp_path: Path, origin: Path, run_cli: RunCli) -> None:
    secret = ("--object", "secret,id=key,data=hush")
    options = ("-o", "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10")
    # qemu-img times its own key derivation, and on a busy machine now and then finds that it cannot.
    for attempt in range(20):
        try:
            qemu_img("create", *secret, "-f", "qcow2", *options, tmp_path / "disk", "1M")
            break
        except subprocess.CalledProcessError:
            assert attempt < 19
    done = run_cli("publish", tmp_path / "disk", "it", "--origin", origin)
    assert done.returncode == 2, done.stderr
    assert "encrypted" in one_line(done.stderr)


def test_without_qemu_raw_disks_are_published_and_others_say_what_to_install(
    tmp_path: Path, origin: Path, run_cli: RunCli
) -> None:
    environment = os.environ | {"PATH": str(tmp_path)}
    raw = make_disk(tmp_path / "raw")
    assert run_cli("publish", raw, "it", "--origin", origin, env=environment).returncode == 0
    disk = convert(raw, tmp_path / "disk", "qcow2")
    done = run_cli("publish", disk, "it", "--origin", origin, env=environment)
    assert done.returncode == 9
    assert "qemu-utils" in one_line(done.stderr)


def test_memory_does_not_grow_with_the_disk(tmp_path: Path, origin: Path) -> None:
    disk = tmp_path / "disk"
    with disk.open("wb") as file:
        for number in range(60):
            file.write(os.urandom(4 * MIB))
            file.seek(3 * number * MIB, os.SEEK_CUR)
    command = (sys.executable, "-m", "vmthunder", "publish", disk, "it", "--origin", origin)
    # A process begins with the peak of the one that forked it, and pytest's own may be larger than what is allowed here.
    small = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); "
    small += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    done = subprocess.run(
        (sys.executable, "-c", small, *command), capture_output=True, text=True, timeout=120, check=True
    )
    assert int(done.stdout) < 300 * 1024
