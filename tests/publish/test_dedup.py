"""What the origin has is not stored again."""

import json
from pathlib import Path

from conftest import RunCli
from publish.disks import MIB, contents, make_disk, make_noise, same, stored_packs


def publish(run_cli: RunCli, source: Path, name: str, origin: Path, *options: str) -> dict[str, object]:
    done = run_cli("publish", source, name, "--origin", origin, "--json", *options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def test_a_second_version_stores_only_changed_chunks(tmp_path: Path, origin: Path, run_cli: RunCli) -> None:
    disk = make_noise(tmp_path / "disk", 16 * MIB)
    publish(run_cli, disk, "it", origin)
    with disk.open("r+b") as file:
        for at in (0, 5 * MIB, 5 * MIB + 65536, 16 * MIB - 1):
            file.seek(at)
            file.write(b"!")
    second = publish(run_cli, disk, "it", origin)
    assert second["new_bytes"] == 4 * 65536
    assert second["stored_bytes"] < 4 * 65536 + 16 * 1024  # and the manifest
    assert same(contents(origin, "it"), disk.read_bytes())


def test_a_chunk_that_occurs_twice_is_stored_once(tmp_path: Path, origin: Path, run_cli: RunCli) -> None:
    disk = make_noise(tmp_path / "disk", 2 * MIB)
    # More than a pack lies between the two, so the first is at the origin when the second is met.
    disk.write_bytes(
        disk.read_bytes() * 2 + make_noise(tmp_path / "rest", 68 * MIB, seed=2).read_bytes() + disk.read_bytes()
    )
    published = publish(run_cli, disk, "it", origin)
    assert published["new_bytes"] == 70 * MIB
    (listed,) = json.loads(run_cli("images", "--origin", origin, "--json").stdout)
    assert listed["allocated_bytes"] == 74 * MIB
    assert listed["stored_bytes"] == 70 * MIB
    assert same(contents(origin, "it"), disk.read_bytes())


def test_the_same_contents_again_are_unchanged(tmp_path: Path, origin: Path, run_cli: RunCli) -> None:
    disk = make_disk(tmp_path / "disk")
    first = publish(run_cli, disk, "it", origin)
    ref = next((origin / "refs").iterdir()).read_bytes()
    second = publish(run_cli, disk, "it", origin)
    assert (first["unchanged"], second["unchanged"]) == (False, True)
    assert second["image_id"] == first["image_id"]
    assert second["stored_bytes"] == 0
    assert next((origin / "refs").iterdir()).read_bytes() == ref


def test_the_same_disk_makes_the_same_packs(tmp_path: Path, run_cli: RunCli) -> None:
    disk = make_noise(tmp_path / "disk", 80 * MIB)
    names = []
    for threads in ("1", "7"):
        origin = tmp_path / f"origin-{threads}"
        origin.mkdir()
        publish(run_cli, disk, "it", origin, "--threads", threads)
        names.append({path.name for path in stored_packs(origin)})
    assert names[0] == names[1]
    assert len(names[0]) == 3
