"""The benchmark of publishing measures what it says."""

import json

from conftest import RunCli
from publish.disks import MIB


def test_it_compares_every_way_that_is_installed(run_cli: RunCli) -> None:
    done = run_cli("bench", "publish", "--size", "8MiB", "--runs", "1", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["source_bytes"] == 8 * MIB
    assert {"vmthunder publish", "qemu-img convert -c (zlib)"} <= {row["name"] for row in result["rows"]}
    for row in result["rows"]:
        assert row["mb_s"] > 0 < row["mb_s_per_core"]
        assert MIB < row["stored_bytes"] < 9 * MIB
        assert MIB < row["rss_bytes"] < 300 * MIB


def test_too_little_data_is_one_line(run_cli: RunCli) -> None:
    done = run_cli("bench", "publish", "--source", "/nowhere")
    assert done.returncode == 3
    assert "/nowhere" in done.stderr
