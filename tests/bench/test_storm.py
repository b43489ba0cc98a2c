import json
import os
from pathlib import Path

import pytest

from bench_disks import CHUNK_BYTES, IMAGE_BYTES
from conftest import RunCli, one_line
from vmthunder.bench.boots import Replayed
from vmthunder.bench.storm import LOCAL, NEITHER, NO_P2P, methods
from vmthunder.bench.touched import Touch, first_touches, least_stall_s
from vmthunder.errors import Failure
from vmthunder.ids import ChunkId, ImageId, PackId, digest
from vmthunder.image.manifest import ChunkRow, Manifest, encode_manifest
from vmthunder.lab.trace import Step
from vmthunder.vm.backing import BackingImage


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_storm_is_measured_in_every_way_and_nothing_is_left(
    run_cli: RunCli, disk: Path, trace: Path, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    arguments = ["--nodes=2", "--rate=100mbit", f"--image={disk}", f"--trace={trace}", f"--directory={work}"]
    done = run_cli(
        "bench", "storm", *arguments, "--think-scale=1", f"--plot={tmp_path / 'storm.svg'}", "--json", timeout=150
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == [method.name for method in methods()]
    touched_bytes = result["touched_bytes"]
    assert IMAGE_BYTES / 2 <= touched_bytes < IMAGE_BYTES / 2 + 4096
    for name in rows.keys() - {LOCAL}:
        assert rows[name]["min_s"] <= rows[name]["median_s"] <= rows[name]["max_s"]
        # All that the guests read came over the links: nothing was left on a node by the row before.
        assert rows[name]["bytes_from_origin"] + rows[name]["bytes_from_peers"] >= 2 * touched_bytes
        assert rows[name]["origin_over_unique"] >= 1
    assert rows[NO_P2P]["bytes_from_peers"] == 0
    assert rows[NO_P2P]["origin_over_unique"] >= 2
    assert rows[NEITHER]["stall_s"] > result["delta_star_s"]
    assert list(work.iterdir()) == []
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()
    assert "<svg" in (tmp_path / "storm.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--nodes=many"], "numbers of nodes"),
        (["--nodes=1,0"], "numbers of nodes"),
        (["--image=/dev/null"], "--trace"),
        (["--rate=fast"], "link rate"),
    ],
)
def test_a_storm_that_makes_no_sense_is_one_line(run_cli: RunCli, arguments: list[str], said: str) -> None:
    done = run_cli("bench", "storm", *arguments)
    assert done.returncode == 2
    assert said in one_line(done.stderr)


def test_boots_begin_together_and_preparing_counts(disk: Path, trace: Path) -> None:
    local = BackingImage("disk", "", disk, IMAGE_BYTES)
    boots = Replayed(trace, 1.0).boot([lambda: local] * 3)
    recorded_s = 31 * 0.005
    assert len(boots) == 3
    assert all(boot.ready_s >= recorded_s and boot.stall_s >= 0 for boot in boots)


def test_a_disk_that_is_too_short_ends_the_storm_with_its_reason(tmp_path: Path, trace: Path) -> None:
    short = tmp_path / "short.raw"
    short.write_bytes(bytes(CHUNK_BYTES))
    with pytest.raises(Failure, match="is it the image traced"):
        Replayed(trace, 0.0).boot([lambda: BackingImage("short", "", short, CHUNK_BYTES)])


def manifest(*chunks: int | None) -> Manifest:
    """An image of chunks with these numbers; equal numbers are equal chunks, None are zeros."""
    rows = [
        ChunkRow(index, ChunkId(bytes([number]) * 32), 1000, PackId(bytes(32)), 1000 * number)
        for index, number in enumerate(chunks)
        if number is not None
    ]
    data = encode_manifest(len(chunks) * CHUNK_BYTES, CHUNK_BYTES, rows)
    return Manifest.decode(data, ImageId(digest(data)))


def test_a_chunk_is_needed_once_however_often_it_is_read() -> None:
    steps = [
        Step(-1, 1.0, CHUNK_BYTES - 1, 2),  # chunks 0 and 1
        Step(0, 1.0, 2 * CHUNK_BYTES, 1),  # equal to chunk 0
        Step(1, 1.0, 3 * CHUNK_BYTES, 1),  # zeros
        Step(2, 1.0, 4 * CHUNK_BYTES, 1),
    ]
    assert first_touches(steps, 0.5, manifest(1, 2, 1, None, 3)) == [
        Touch(0.5, 1000),
        Touch(0.5, 1000),
        Touch(2.0, 1000),
    ]


def test_the_least_stall_is_that_of_the_worst_moment() -> None:
    # 5 s of link by second 1: 4 s late; later on the link is ahead. And 1 s for the first chunk to be asked for.
    touches = [Touch(0.0, 1000), Touch(1.0, 4000), Touch(10.0, 1000)]
    assert least_stall_s(touches, 1000.0) == pytest.approx(1 + 4)
    assert least_stall_s([], 1000.0) == 0.0
