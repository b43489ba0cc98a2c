import json
import os
from pathlib import Path

import pytest

from conftest import RunCli, one_line
from vmthunder.bench.guest import GuestDisk
from vmthunder.bench.plot import plot_boot
from vmthunder.bench.read import CHUNKS, COLD, LOCAL, MATERIALIZED, NBDKIT, PAGES, QEMU_NBD
from vmthunder.errors import CorruptFile, NotFound

ALL_WAYS = [LOCAL, COLD, CHUNKS, PAGES, MATERIALIZED, NBDKIT, QEMU_NBD]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_every_way_to_read_is_measured_and_nothing_is_left(run_cli: RunCli, tmp_path: Path) -> None:
    done = run_cli("bench", "read", "--size=16MiB", "--rounds=1", f"--directory={tmp_path}", "--json", timeout=150)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == ALL_WAYS
    assert all(row[figure] > 0 for row in rows.values() for figure in ("rand4k_iops", "seq_mb_s", "cpu_s_per_gb"))
    # Holds on any machine under any load: the page cache needs none of our processes, a cold node needs all of them.
    assert rows[PAGES]["rand4k_iops"] > rows[COLD]["rand4k_iops"]
    assert set(result["ratios"][f"{CHUNKS} ÷ {NBDKIT}"]) == {"rand4k_iops", "seq_mb_s"}
    assert list(tmp_path.iterdir()) == []
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["read", "--size=1MiB"], "16 MiB"),
        (["boot", "--rate=fast"], "link rate"),
        (["boot", "--chunk-size=60000"], "power of two"),
    ],
)
def test_settings_that_make_no_sense_are_one_line(run_cli: RunCli, arguments: list[str], said: str) -> None:
    done = run_cli("bench", *arguments)
    assert done.returncode == 2
    assert said in one_line(done.stderr)


def test_a_missing_reader_is_one_line(run_cli: RunCli, tmp_path: Path) -> None:
    done = run_cli("bench", "read", env={"PATH": str(tmp_path)})
    assert done.returncode == 9
    assert "apt-get install fio" in one_line(done.stderr)


def test_a_folder_without_a_guest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="scripts/build-guest"):
        GuestDisk.load(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"memory_mib": "much", "ready": "x"}', '{"ready": "x"}'])
def test_a_damaged_description_of_a_guest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "disk.raw").touch()
    (tmp_path / "guest.json").write_text(text)
    with pytest.raises(CorruptFile, match="does not describe a guest"):
        GuestDisk.load(tmp_path)


def test_a_boot_benchmark_is_drawn(tmp_path: Path) -> None:
    row = {"name": "warm", "ready_s": 4.0, "over_local": 1.02, "rounds_s": [3.9, 4.0, 4.3]}
    plot_boot({"rows": [row]}, tmp_path / "boot.svg")
    assert "<svg" in (tmp_path / "boot.svg").read_text()
