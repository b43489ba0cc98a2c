"""Whatever format a disk is in, what is published is the disk, byte for byte."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import RunCli, one_line
from publish.disks import MIB, contents, convert, litter, make_disk, qemu_img, same


def publish(run_cli: RunCli, source: object, origin: Path, *options: str) -> dict[str, object]:
    done = run_cli("publish", source, "it", "--origin", origin, "--json", *options)
    assert done.returncode == 0, done.stderr
    assert not litter(origin.parent)
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("driver", "options"),
    [
        ("qcow2", ()),
        ("qcow2", ("-c",)),
        ("qcow2", ("-o", "compat=0.10,cluster_size=4k")),
        ("vmdk", ()),
        ("vmdk", ("-o", "subformat=streamOptimized")),
        ("vmdk", ("-o", "subformat=twoGbMaxExtentSparse")),
        ("vpc", ()),
        ("vpc", ("-o", "subformat=fixed")),
        ("vhdx", ()),
        ("vdi", ()),
        ("raw", ()),
    ],
)
def test_every_format_is_published_byte_for_byte(
    driver: str, options: tuple[str, ...], tmp_path: Path, origin: Path, run_cli: RunCli
) -> None:
    raw = make_disk(tmp_path / "raw")
    published = publish(run_cli, convert(raw, tmp_path / "disk", driver, *options), origin)
    disk = contents(origin, "it")
    expected = raw.read_bytes()
    # A vhd is as long as cylinders, heads and sectors allow.
    assert len(disk) == len(expected) or (driver == "vpc" and len(disk) > len(expected))
    assert same(disk, expected.ljust(len(disk), b"\0"))
    assert published["virtual_bytes"] == len(disk)


def test_a_backing_chain_is_published_as_its_top_shows_it(tmp_path: Path, origin: Path, run_cli: RunCli) -> None:
    base = convert(make_disk(tmp_path / "raw"), tmp_path / "base.qcow2", "qcow2")
    for name, backing in (("middle", "base.qcow2"), ("top", "middle")):
        qemu_img("create", "-f", "qcow2", "-b", backing, "-F", "qcow2", tmp_path / name)
    writes = ("-c", f"write -P 7 {MIB} 64k", "-c", f"write -z {2 * MIB} 64k")
    subprocess.run(["qemu-io", "-f", "qcow2", *writes[:2], tmp_path / "middle"], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["qemu-io", "-f", "qcow2", *writes[2:], tmp_path / "top"], check=True, stdout=subprocess.DEVNULL)
    qemu_img("convert", "-O", "raw", tmp_path / "top", tmp_path / "expected")
    publish(run_cli, tmp_path / "top", origin)
    assert same(contents(origin, "it"), (tmp_path / "expected").read_bytes())
    assert base.exists()


def test_a_block_device_is_published(tmp_path: Path, origin: Path, run_cli: RunCli) -> None:
    if os.geteuid() != 0:
        pytest.skip("loop devices need root")
    raw = make_disk(tmp_path / "raw")
    device = subprocess.check_output(["losetup", "--find", "--show", "--read-only", raw], text=True).strip()
    try:
        publish(run_cli, device, origin)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
    assert same(contents(origin, "it"), raw.read_bytes())


def test_holes_are_not_read(tmp_path: Path, origin: Path, run_cli: RunCli) -> None:
    # Reading them would take a quarter of an hour.
    disk = make_disk(tmp_path / "raw", size_bytes=1 << 40)
    published = publish(run_cli, disk, origin)
    assert published["virtual_bytes"] == 1 << 40
    assert published["allocated_bytes"] < 5 * MIB


def test_zeros_that_are_no_holes_cost_nothing(tmp_path: Path, origin: Path, run_cli: RunCli) -> None:
    (tmp_path / "zeros").write_bytes(bytes(8 * MIB))
    published = publish(run_cli, tmp_path / "zeros", origin)
    assert published["allocated_bytes"] == published["new_bytes"] == 0
    assert published["stored_bytes"] < 1000


@pytest.mark.parametrize("chunk_size", ["4KiB", "1MiB", "4MiB"])
def test_any_chunk_size_holds_the_disk(chunk_size: str, tmp_path: Path, origin: Path, run_cli: RunCli) -> None:
    raw = make_disk(tmp_path / "raw")
    publish(run_cli, raw, origin, "--chunk-size", chunk_size)
    assert same(contents(origin, "it"), raw.read_bytes())


def test_raw_is_raw_whatever_a_guest_wrote_into_it(tmp_path: Path, origin: Path, run_cli: RunCli) -> None:
    disk = convert(make_disk(tmp_path / "raw"), tmp_path / "disk", "qcow2")
    publish(run_cli, disk, origin, "--format", "raw")
    assert same(contents(origin, "it"), disk.read_bytes())


@pytest.fixture
def web(tmp_path: Path, serve: Callable[[Path], str]) -> tuple[Path, str]:
    """A directory, and the URL under which a web server shows it."""
    directory = tmp_path / "web"
    directory.mkdir()
    return directory, serve(directory)


@pytest.mark.parametrize("driver", ["raw", "qcow2", "vmdk", "vpc"])
def test_a_url_is_published_byte_for_byte(
    driver: str, web: tuple[Path, str], tmp_path: Path, origin: Path, run_cli: RunCli
) -> None:
    directory, url = web
    raw = make_disk(tmp_path / "raw")
    convert(raw, directory / "disk", driver)
    publish(run_cli, f"{url}/disk", origin)
    disk = contents(origin, "it")
    assert same(disk, raw.read_bytes().ljust(len(disk), b"\0"))


def test_a_download_that_names_a_local_file_is_refused(web: tuple[Path, str], origin: Path, run_cli: RunCli) -> None:
    directory, url = web
    secret = directory.parent / "secret"
    make_disk(secret)
    qemu_img("create", "-f", "qcow2", "-b", secret, "-F", "raw", directory / "backing")
    qemu_img("create", "-f", "qcow2", "-o", f"data_file={secret}.data,data_file_raw=on", directory / "data", "1M")
    convert(secret, directory / "extents", "vmdk", "-o", "subformat=monolithicFlat")
    convert(secret, directory / "parent", "vmdk")
    qemu_img("create", "-f", "vmdk", "-b", directory / "parent", "-F", "vmdk", directory / "child")
    wrapped = bytearray((directory / "parent").read_bytes())
    wrapped[12:20] = bytes(8)  # capacity: QEMU then takes its extents from the descriptor
    (directory / "wrapped").write_bytes(wrapped)
    for name, what in (
        ("backing", "a backing file"),
        ("data", "an external data file"),
        ("extents", "extents in other files"),
        ("wrapped", "extents in other files"),
        ("child", "a backing file"),
    ):
        for options in ((), ("--format", "vmdk" if what.startswith("ext") and name != "data" else "auto")):
            done = run_cli("publish", f"{url}/{name}", "it", "--origin", origin, *options)
            assert (done.returncode, what in one_line(done.stderr)) == (2, True), (name, done.stderr)
    assert not list((origin / "refs").glob("*"))


@pytest.mark.parametrize(("path", "code"), [("missing", 3), ("secret", 7), ("short", 1)])
def test_a_url_that_does_not_work_is_one_line(
    path: str, code: int, web: tuple[Path, str], origin: Path, run_cli: RunCli
) -> None:
    done = run_cli("publish", f"{web[1]}/{path}", "it", "--origin", origin)
    assert done.returncode == code
    assert path in one_line(done.stderr)
