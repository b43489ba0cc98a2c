"""A new version of an image starts with what is known of the one before."""

import asyncio
import json
from pathlib import Path

import pytest

from conftest import RunCli
from publish.disks import MIB, make_noise
from vmthunder.ids import image_id
from vmthunder.origin.origin import Origin
from vmthunder.profile import store
from vmthunder.profile.merge import CARRIED_BOOTS
from vmthunder.profile.profile import WHOLE, Entry, Profile


def publish(run_cli: RunCli, disk: Path, origin: Path, name: str = "it") -> bytes:
    done = run_cli("publish", disk, name, "--origin", origin, "--json")
    assert done.returncode == 0, done.stderr
    return image_id(json.loads(done.stdout)["image_id"])


def load(origin: Path, image: bytes) -> Profile | None:
    return asyncio.run(store.load(Origin.open(str(origin)), image))  # type: ignore[arg-type]  # an image id


def change(disk: Path, *places: int) -> None:
    with disk.open("r+b") as file:
        for at in places:
            file.seek(at)
            file.write(b"another version")


@pytest.fixture
def known(tmp_path: Path, origin: Path, run_cli: RunCli) -> tuple[Path, Profile]:
    """A disk that is published, and its profile."""
    disk = make_noise(tmp_path / "disk", 8 * MIB)
    entries = tuple(Entry(index, 10 * index, WHOLE, True) for index in (3, 4, 5, 100))
    profile = Profile(publish(run_cli, disk, origin), 65536, 7, entries)  # type: ignore[arg-type]  # an image id
    asyncio.run(store.save(Origin.open(str(origin)), profile))
    return disk, profile


def test_a_new_version_starts_with_the_profile_of_the_one_before(
    known: tuple[Path, Profile], origin: Path, run_cli: RunCli
) -> None:
    disk, profile = known
    change(disk, 4 * 65536, 6 * MIB)
    new = publish(run_cli, disk, origin)
    assert load(origin, new) == Profile(new, 65536, CARRIED_BOOTS, profile.entries)  # type: ignore[arg-type]  # an image id
    assert load(origin, profile.image_id) == profile


def test_what_is_known_of_a_version_is_not_replaced(known: tuple[Path, Profile], origin: Path, run_cli: RunCli) -> None:
    disk, profile = known
    before = disk.read_bytes()
    change(disk, 0)
    publish(run_cli, disk, origin)
    disk.write_bytes(before)  # back to the first version
    assert publish(run_cli, disk, origin) == profile.image_id
    assert load(origin, profile.image_id) == profile


def test_a_damaged_profile_stops_no_publish(known: tuple[Path, Profile], origin: Path, run_cli: RunCli) -> None:
    disk, profile = known
    (origin / "profiles" / profile.image_id.hex()).write_bytes(b"?")
    change(disk, 0)
    assert load(origin, publish(run_cli, disk, origin)) is None


def test_another_name_starts_without_one(known: tuple[Path, Profile], origin: Path, run_cli: RunCli) -> None:
    disk, _ = known
    change(disk, 0)
    assert load(origin, publish(run_cli, disk, origin, "other")) is None
