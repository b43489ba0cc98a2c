"""The code of a released Nova, unchanged, on our mount."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from agents import Lab, disk_bytes, eventually, output_of, same
from openstack_names import base_name

IMAGE, OTHER = "11111111-2222-3333-4444-555555555555", "99999999-0000-0000-0000-000000000001"
DRIVE = Path(__file__).parent / "nova_drive.py"


class Compute:
    """A compute node: an agent on `_base`, and Nova's code."""

    def __init__(self, lab: Lab, python: Path) -> None:
        self.lab = lab
        self.python = python
        self.instances = lab.directory / "instances"
        self.base = self.instances / "_base"
        self.base.mkdir(parents=True)
        self.agent = lab.agent(mount=self.base, nova=True, complete_after_s=0.0, lookup_timeout_s=2.0)

    def drive(self, *arguments: object) -> Any:
        return json.loads(output_of(self.python, DRIVE, self.instances, *arguments).splitlines()[-1])


@pytest.fixture
def compute(lab: Lab, nova_python: Path) -> Compute:
    lab.publish(f"nova-{base_name(IMAGE)}", disk_bytes(8 << 20))
    return Compute(lab, nova_python)


def test_a_published_image_becomes_the_backing_file_without_a_download(compute: Compute) -> None:
    disk = compute.drive("root", IMAGE, "qcow2", 64 << 20)
    assert disk["format"] == "qcow2" and disk["virtual-size"] == 64 << 20
    assert disk["backing-filename"] == str(compute.base / base_name(IMAGE))
    assert disk["backing-filename-format"] == "raw"
    assert os.listdir(compute.base) == [base_name(IMAGE)]


def test_a_flat_disk_is_a_copy_of_the_image(compute: Compute) -> None:
    disk = compute.drive("root", IMAGE, "flat", 8 << 20)
    assert disk["format"] == "raw"
    assert same(Path(disk["path"]), compute.base / base_name(IMAGE))


def test_what_is_not_published_nova_downloads_and_converts_itself(compute: Compute, tmp_path: Path) -> None:
    raw, qcow2 = tmp_path / "other.raw", tmp_path / "other.qcow2"
    raw.write_bytes(disk_bytes(4 << 20, seed=9))
    output_of("qemu-img", "convert", "-O", "qcow2", raw, qcow2)
    disk = compute.drive("download", OTHER, qcow2, 64 << 20)
    assert disk["downloads"] == 1 and disk["backing-filename-format"] == "raw"
    assert same(compute.base / base_name(OTHER), raw)
    again = compute.drive("root", OTHER, "qcow2", 64 << 20)
    assert again["downloads"] == 0


def test_swap_is_made_in_place(compute: Compute) -> None:
    disk = compute.drive("swap")
    assert disk["backing-filename"] == str(compute.base / "swap_16")
    assert b"SWAPSPACE2" in (compute.base / "swap_16").read_bytes()[:4096]


def test_pre_caching_brings_the_image_here_and_ageing_removes_it(compute: Compute) -> None:
    assert compute.drive("precache", IMAGE) is False, "what Nova calls `existing`"
    copies = compute.agent.state_dir / "materialized"
    eventually(lambda: [each.suffix for each in copies.iterdir()] == [".raw"], "the whole image on this host")
    assert compute.drive("age", IMAGE) == [base_name(IMAGE)]
    assert list(copies.iterdir()), "an image in use stays"
    assert compute.drive("age") == []
    assert not list(copies.iterdir())
    compute.drive("root", IMAGE, "qcow2", 64 << 20)


def test_a_killed_agent_is_not_seen_by_an_open_overlay(compute: Compute) -> None:
    disk = compute.drive("root", IMAGE, "qcow2", 8 << 20)
    compute.agent.drop_page_cache()
    io = compute.lab.child("qemu-io", "-r", "-t", "none", "-f", "qcow2", disk["path"])
    assert io.stdin is not None
    for step in range(4):
        io.stdin.write(f"read {step * (2 << 20)} 2M\n")
        io.stdin.flush()
        compute.agent.kill_worker()
    output, errors = io.communicate("quit\n", timeout=30)
    assert output.count("read 2097152/2097152 bytes") == 4, output + errors
