import json
import os
from pathlib import Path
from typing import Any

import pytest

from bench_disks import IMAGE_BYTES, OFFSETS, READ_BYTES
from conftest import RunCli, one_line
from vmthunder.bench.report import write_report
from vmthunder.bench.rivals import FIRST, LOCAL, ORIGINAL, OURS, methods

RIVALS = [method.name for method in methods() if method.name not in (LOCAL, FIRST, ORIGINAL)]
COPIES = ("full copy, HTTP", "full copy, BitTorrent")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_every_rival_boots_the_same_storm_or_says_why_not(
    run_cli: RunCli, disk: Path, trace: Path, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    arguments = ["--nodes=2", "--rate=200mbit", f"--image={disk}", f"--trace={trace}", f"--directory={work}"]
    # The others are more of the same; the first storm also waits until its boot is learned.
    only = [f"--only={name}" for name in RIVALS]
    done = run_cli("bench", "rivals", *arguments, *only, f"--report={tmp_path / 'page'}", "--json", timeout=150)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["failed"] == []
    rows = {row["name"]: row for row in result["rows"]}
    absent = {each["name"]: each["reason"] for each in result["absent"]}
    assert {LOCAL, *RIVALS} == rows.keys() | absent.keys()
    assert rows.keys().isdisjoint(absent)
    assert all("installed" in reason or "driver" in reason for reason in absent.values())
    for name, row in rows.items():
        assert 0 < row["min_s"] <= row["median_s"] <= row["max_s"]
        if name == LOCAL:
            assert row["origin_sent_bytes"] < 1 << 20
            continue
        # What a guest reads came over the links of this very cell, at least once.
        assert row["origin_sent_bytes"] > READ_BYTES * len(OFFSETS), name
        if name in COPIES:
            assert row["stored_bytes"] >= IMAGE_BYTES, name
    for name in rows.keys() & set(COPIES):
        assert rows[name]["origin_sent_bytes"] > IMAGE_BYTES
    assert rows[OURS]["cpu_s"] > 0  # of the others, less than a tick of the clock may be needed
    assert rows[OURS]["origin_sent_bytes"] < 2 * IMAGE_BYTES
    assert json.loads((tmp_path / "page" / "rivals.json").read_text()) == result
    assert list(work.iterdir()) == []
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()


def a_result() -> dict[str, Any]:
    row = {
        "name": OURS, "nodes": 2, "min_s": 1.0, "median_s": 1.5, "max_s": 2.0, "last_over_local": 1.1,
        "origin_sent_bytes": 1 << 20, "stored_bytes": 1 << 20, "cpu_s": 0.5,
    }  # fmt: skip
    return {
        "rows": [{**row, "name": LOCAL, "origin_sent_bytes": 0}, row, {**row, "nodes": 4}],
        "absent": [{"name": "NBD", "reason": "nbdkit <not> installed"}],
        "failed": [{"name": "iSCSI", "nodes": 4, "reason": "tgtd ended"}],
        "delta_star_s": 0.1, "touched_bytes": 1 << 20, "think_scale": 0.15,
        "machine": {"rate": "1gbit", "cores": 2}, "commit": "0123", "command": "vmthunder bench rivals",
    }  # fmt: skip


def test_the_page_needs_nothing_else_and_hides_nothing(tmp_path: Path) -> None:
    paths = write_report(a_result(), tmp_path / "new" / "folder")
    assert [path.name for path in paths] == ["rivals.json", "rivals.png", "rivals.svg", "rivals.html"]
    assert paths[1].read_bytes().startswith(b"\x89PNG")
    page = paths[3].read_text()
    assert "<svg" in page
    assert not any(word in page for word in ("<script", "<link", "src=", "@import", "<?xml"))
    assert "nbdkit &lt;not&gt; installed" in page
    assert "iSCSI on 4 nodes: failed: tgtd ended" in page


def test_a_storm_of_real_guests_is_drawn_without_bounds(tmp_path: Path) -> None:
    result = a_result() | {"delta_star_s": None, "touched_bytes": None, "think_scale": None}
    assert "think times" not in write_report(result, tmp_path)[3].read_text()


def test_an_unknown_rival_is_refused(run_cli: RunCli) -> None:
    done = run_cli("bench", "rivals", "--only=floppy")
    assert done.returncode == 2
    assert "floppy" in done.stderr
    assert "Traceback" not in done.stderr


def test_rivals_of_no_nodes_are_one_line(run_cli: RunCli) -> None:
    assert "numbers of nodes" in one_line(run_cli("bench", "rivals", "--nodes=0").stderr)
