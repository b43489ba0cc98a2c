"""The cloud-init seed, read back by an ISO 9660 reader."""

import json
from io import BytesIO
from pathlib import Path

import pycdlib
import pytest

from vmthunder.errors import Usage
from vmthunder.vm.seed import read_ssh_keys, read_user_data, write_seed

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIE9uZSBrZXkgb2YgYSB0ZXN0IHRoYXQgb3BlbnMgbm8g somebody"


def read_back(seed: Path, **names: str) -> bytes:
    iso = pycdlib.PyCdlib()
    iso.open(str(seed))
    try:
        data = BytesIO()
        iso.get_file_from_iso_fp(data, **names)
        return data.getvalue()
    finally:
        iso.close()


@pytest.mark.parametrize("user_data", [b"#!/bin/sh\necho \xff\x00 > /x\n", b"#cloud-config\n" + b"a: b\n" * 20_000])
def test_user_data_arrives_byte_for_byte_under_both_kinds_of_long_names(tmp_path: Path, user_data: bytes) -> None:
    write_seed(tmp_path / "seed.iso", "web-1", user_data, [])
    assert read_back(tmp_path / "seed.iso", rr_path="/user-data") == user_data
    assert read_back(tmp_path / "seed.iso", joliet_path="/user-data") == user_data


def test_meta_data_has_host_name_keys_and_a_new_instance_each_time(tmp_path: Path) -> None:
    ids = set()
    for _ in range(2):
        write_seed(tmp_path / "seed.iso", "web-1", None, [KEY])
        meta_data = json.loads(read_back(tmp_path / "seed.iso", rr_path="/meta-data"))
        assert meta_data["local-hostname"] == "web-1"
        assert meta_data["public-keys"] == [KEY]
        ids.add(meta_data["instance-id"])
    assert len(ids) == 2


def test_the_volume_has_the_label_that_cloud_init_looks_for(tmp_path: Path) -> None:
    write_seed(tmp_path / "seed.iso", "web-1", None, [])
    primary_volume_descriptor = (tmp_path / "seed.iso").read_bytes()[16 * 2048 :][:2048]
    assert primary_volume_descriptor[40:72].rstrip() == b"cidata"


def test_a_private_key_is_refused(tmp_path: Path) -> None:
    (tmp_path / "id").write_text("-----BEGIN OPENSSH PRIVATE KEY-----\nabc\n-----END OPENSSH PRIVATE KEY-----\n")
    with pytest.raises(Usage, match=r"private key.*id\.pub"):
        read_ssh_keys(tmp_path / "id")


@pytest.mark.parametrize("content", [b"", b"# only a remark\n", b"hello\n", b"\xff\xfe"])
def test_a_file_without_public_keys_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "keys").write_bytes(content)
    with pytest.raises(Usage):
        read_ssh_keys(tmp_path / "keys")


def test_all_keys_of_a_file_are_taken(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"# team\n{KEY}\n\necdsa-sha2-nistp256 AAAA other\n")
    assert read_ssh_keys(tmp_path / "keys") == [KEY, "ecdsa-sha2-nistp256 AAAA other"]


def test_user_data_that_is_not_there_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(Usage, match="No such file"):
        read_user_data(tmp_path / "none")
