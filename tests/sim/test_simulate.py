"""The simulator: nothing is lost or made up in it, and what it says of simple shapes is what arithmetic says."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from vmthunder.cli.simulate import PRACTICE, simulate
from vmthunder.errors import Usage
from vmthunder.sim.run import simulate as run
from vmthunder.sim.scenario import Scenario, Shape

MBIT_100 = 12.5e6
PLAIN = Scenario(
    nodes=16, chunks=400, image_chunks=1 << 20, chunk_bytes=65536, rate_bytes_s=MBIT_100, practice=PRACTICE
)
LOSSY = replace(PLAIN, nodes=20, chunks=200, image_chunks=0, churn_per_minute=1.0, slow_fraction=0.1)


@given(
    nodes=st.integers(1, 40),
    shape=st.sampled_from(Shape),
    racks=st.integers(1, 4),
    slow=st.sampled_from([0.0, 0.2]),
    churn=st.sampled_from([0.0, 1.0]),
)
@settings(max_examples=25, deadline=None)
def test_every_node_gets_each_chunk_and_nothing_beats_the_bound(
    nodes: int, shape: Shape, racks: int, slow: float, churn: float
) -> None:
    scenario = replace(
        PLAIN,
        chunks=60,
        image_chunks=0,
        nodes=nodes,
        shape=shape,
        racks=racks,
        slow_fraction=slow,
        churn_per_minute=churn,
    )
    outcome = run(scenario)
    assert len(outcome.times_s) + len(outcome.slow_times_s) == nodes
    if churn:
        # Who vanished took some of what was sent with it, and had some of what was delivered.
        assert outcome.delivered - outcome.duplicates >= nodes * scenario.chunks
        assert outcome.delivered <= outcome.sent
    else:
        assert outcome.delivered - outcome.duplicates == nodes * scenario.chunks
        assert outcome.delivered == outcome.sent
        assert outcome.time_over_bound > 0.95 if slow else outcome.time_over_bound > 0.999


def test_the_same_seed_gives_the_same_and_another_seed_another() -> None:
    assert run(PLAIN) == run(PLAIN)
    first = run(LOSSY)
    assert run(LOSSY) == first
    assert first.times_s != run(replace(LOSSY, seed=2)).times_s


def test_one_node_takes_what_its_link_takes() -> None:
    assert run(replace(PLAIN, nodes=1)).time_over_bound == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("nodes", [4, 16, 32])
def test_our_trees_are_within_a_fifth_of_the_bound(nodes: int) -> None:
    outcome = run(replace(PLAIN, nodes=nodes, chunks=600))
    assert outcome.time_over_bound <= 1.2
    assert outcome.origin_sent <= 1.02 * outcome.scenario.chunks
    assert outcome.most_sent <= 1.25 * outcome.scenario.chunks


def test_the_binary_tree_of_2014_takes_twice_as_long() -> None:
    outcome = run(replace(PLAIN, nodes=31, shape=Shape.TREE))
    assert outcome.time_over_bound == pytest.approx(2, abs=0.1)
    assert outcome.most_sent == 2 * outcome.scenario.chunks


def test_without_peer_to_peer_the_origin_sends_a_copy_to_each() -> None:
    outcome = run(replace(PLAIN, nodes=12, shape=Shape.STAR))
    assert outcome.origin_sent == 12 * outcome.scenario.chunks
    assert outcome.time_over_bound == pytest.approx(12, abs=0.3)


def test_a_chain_sends_one_copy_over_each_link() -> None:
    outcome = run(replace(PLAIN, shape=Shape.CHAIN))
    assert outcome.origin_sent == outcome.most_sent == outcome.scenario.chunks


def test_a_parent_that_vanishes_is_passed_over() -> None:
    outcome = run(replace(LOSSY, slow_fraction=0, chunks=400))
    assert outcome.left > 0
    assert len(outcome.times_s) == outcome.scenario.nodes


def test_a_slow_processor_counts() -> None:
    plain = replace(PLAIN, nodes=4, chunks=100)
    assert run(replace(plain, cpu_s=0.02)).times_s[-1] > 3 * run(plain).times_s[-1]


def test_a_scenario_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(Usage):
        replace(PLAIN, nodes=0)
    with pytest.raises(Usage):
        replace(PLAIN, slow_fraction=1.0)


def test_the_command_scales_times_to_the_whole_image() -> None:
    arguments = ["--nodes", "4", "--topology", "ours", "--chunks", "300", "--json"]
    done = CliRunner().invoke(simulate, arguments, catch_exceptions=False)
    (row,) = json.loads(done.output)["rows"]
    assert row["bound_s"] == pytest.approx((1 << 30) / 125e6, rel=0.01)
    assert 1 <= row["last_s"] / row["bound_s"] <= 1.2


def test_what_bench_spread_measured_is_simulated_beside_it(tmp_path: Path) -> None:
    measured = {
        "machine": {"rate": "100mbit", "size_bytes": 64 << 20},
        "rows": [
            {"name": "vmthunder", "nodes": 4, "time_s": 6.0},
            {"name": "no peer to peer", "nodes": 4, "time_s": 22.0},
        ],
    }
    file = tmp_path / "spread.json"
    file.write_text(json.dumps(measured))
    done = CliRunner().invoke(simulate, ["--validate", str(file), "--json"], catch_exceptions=False)
    ours, star = json.loads(done.output)["rows"]
    assert ours["simulated_over_measured"] == pytest.approx(0.95, abs=0.15)
    assert star["simulated_over_measured"] == pytest.approx(0.98, abs=0.05)
