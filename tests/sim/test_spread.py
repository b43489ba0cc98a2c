"""The shape that is the default, held against the bound by simulation."""

import pytest

from vmthunder.sim.spread import spread

CHUNKS = 600


@pytest.mark.parametrize("nodes", [4, 16, 32, 64])
def test_everybody_has_everything_within_a_quarter_above_the_bound(nodes: int) -> None:
    result = spread(nodes, CHUNKS)
    assert result.time_over_bound <= 1.25
    assert result.origin_over_unique == 1.0
    assert result.max_upload_over_download <= 1.5


@pytest.mark.parametrize("nodes", [7, 12, 15, 24, 31, 47])
def test_saying_busy_levels_rows_that_are_not_full(nodes: int) -> None:
    unequal = spread(nodes, CHUNKS)
    level = spread(nodes, CHUNKS, busy_after=16)
    assert level.time_over_bound <= min(1.3, unequal.time_over_bound + 0.05)
    assert level.origin_over_unique == 1.0


def test_the_tree_of_2014_takes_twice_as_long() -> None:
    assert spread(16, CHUNKS, stripes=1, fanout=2).time_over_bound == pytest.approx(2, abs=0.1)


def test_one_node_takes_what_its_link_takes() -> None:
    assert spread(1, CHUNKS).time_over_bound == pytest.approx(1, abs=0.01)


def test_a_short_window_still_fills_the_links() -> None:
    assert spread(16, CHUNKS, window=32).time_over_bound <= 1.25
