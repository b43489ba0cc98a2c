import json
import os
import subprocess
from typing import Any

import pytest

from conftest import VMTHUNDER
from vmthunder.bench.faults import READS_S, Event, Fault, Load, quantile, stall_s, stalls
from vmthunder.errors import Usage
from vmthunder.lab.cluster import clusters
from vmthunder.lab.shaping import Rate

NODES = 3
SECONDS = 2
HOSTILE = [fault for fault in Fault if fault.value.startswith("a peer")]

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")

Rows = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """Every fault once, for a short time: the long run is the command's default."""
    work = tmp_path_factory.mktemp("faults")
    options = (
        f"--nodes={NODES}",
        "--rate=200mbit",
        f"--seconds={SECONDS}",
        "--away=0.8",
        f"--directory={work}",
        "--json",
    )
    command = [*VMTHUNDER, "bench", "faults", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as bench:
        try:
            output, errors = bench.communicate(timeout=170)
        finally:
            bench.kill()
    assert bench.returncode == 0, errors + output
    assert list(work.iterdir()) == []
    assert f"faults{bench.pid}" not in clusters()
    return {row["name"]: row for row in json.loads(output.splitlines()[-1])["rows"]}


@needs_root
@pytest.mark.parametrize("fault", list(Fault))
def test_readers_get_every_byte_whatever_happens(rows: Rows, fault: Fault) -> None:
    row = rows[fault.value]
    readers = NODES - (fault in HOSTILE or fault is Fault.AGENTS)
    assert row["reads"] == readers * SECONDS * READS_S
    assert (row["read_errors"], row["wrong_reads"], row["first_failure"]) == (0, 0, None)
    assert row["honest_nodes_banned"] == 0


@needs_root
def test_a_liar_is_banned_by_every_node(rows: Rows) -> None:
    assert rows[Fault.LIES.value]["nodes_that_ban_it"] == NODES - 1


@needs_root
@pytest.mark.parametrize("fault", [fault for fault in HOSTILE if fault is not Fault.LIES])
def test_a_peer_that_does_not_deliver_is_left_alone_and_named_by_status(rows: Rows, fault: Fault) -> None:
    row = rows[fault.value]
    assert row["nodes_that_leave_it_alone"] == NODES - 1
    assert row["nodes_that_ban_it"] == 0


@needs_root
def test_nobody_waits_long_for_a_parent_that_is_dead(rows: Rows) -> None:
    for fault in (Fault.AGENTS, Fault.WORKERS):
        assert rows[fault.value]["events"] >= 1
        assert rows[fault.value]["stall_p99_s"] <= 1
    assert rows[Fault.WORKERS.value]["own_stall_max_s"] > 0


@needs_root
def test_the_tracker_is_in_nobodys_way(rows: Rows) -> None:
    assert rows[Fault.TRACKER.value]["stall_max_s"] < 1


@needs_root
@pytest.mark.parametrize("fault", [Fault.ORIGIN, Fault.PARTED])
def test_who_waited_for_what_was_away_goes_on_when_it_is_back(rows: Rows, fault: Fault) -> None:
    row = rows[fault.value]
    assert row["max_s"] >= 0.6  # it was away
    assert row["stall_max_s"] <= 10


@needs_root
def test_the_origin_sends_less_than_without_peers_beside_each_fault(rows: Rows) -> None:
    for fault, row in rows.items():
        assert row["origin_over_unique"] < NODES - 1, fault


@needs_root
def test_an_idle_agent_costs_less_than_a_hundredth_of_a_core(rows: Rows) -> None:
    assert rows[Fault.NONE.value]["idle_core_share"] < 0.01


def test_a_stall_counts_from_the_end_of_what_caused_it() -> None:
    reads = [(0.0, 0.5), (1.0, 9.0), (5.5, 8.0), (30.0, 50.0)]
    assert stall_s(Event(2.0, 6.0), reads) == 3.0
    assert stall_s(Event(2.0, 2.0), reads[:1]) == 0.0
    assert stall_s(Event(4.5, 4.5), reads[2:3]) == 2.5  # began shortly after, and late because of it


def test_what_a_node_waits_for_its_own_worker_is_counted_apart() -> None:
    killed = Event(5.0, 5.0, hit=[0])
    hit, other = [(4.9, 7.0), (7.0, 7.1)], [(4.9, 5.2), (5.2, 5.3)]
    others, own = stalls([killed, Event(6.0, 6.0)], [hit, other])
    assert own == [2.0]
    assert others == pytest.approx([0.0, 0.1, 0.2])


def test_quantiles_are_of_values_that_were_measured() -> None:
    assert quantile([1.0, 2.0, 3.0], 0.99) == 3.0
    assert quantile([1.0], 0.5) == 1.0


@pytest.mark.parametrize(("nodes", "seconds", "away_s"), [(2, 10, 1), (4, 10, 6), (4, 10, 0)])
def test_a_load_that_makes_no_sense_is_refused(nodes: int, seconds: float, away_s: float) -> None:
    with pytest.raises(Usage):
        Load(nodes, Rate.parse("1gbit"), seconds, away_s)
