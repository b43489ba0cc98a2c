from vmthunder.bench.rows import medians, ratio, rotated, rounded

ROUNDS = [
    {"local": {"ready_s": 4.0}, "warm": {"ready_s": 4.4}},
    {"local": {"ready_s": 8.0}, "warm": {"ready_s": 8.0}},
    {"local": {"ready_s": 2.0}, "warm": {"ready_s": 2.4}},
]


def test_a_figure_is_the_median_over_the_rounds() -> None:
    assert medians(ROUNDS, "local") == {"ready_s": 4.0}


def test_a_ratio_is_taken_within_rounds_so_that_a_slow_round_does_not_count_for_one_side_only() -> None:
    assert ratio(ROUNDS, "warm", "local", "ready_s") == 1.1


def test_a_ratio_with_a_row_that_was_not_measured_is_none() -> None:
    assert ratio(ROUNDS, "warm", "nbdkit", "ready_s") is None
    assert ratio([{"warm": {"x": 1.0}, "local": {"x": 0.0}}], "warm", "local", "x") is None


def test_every_row_comes_first_once() -> None:
    orders = [rotated(["a", "b", "c"], number) for number in range(3)]
    assert [order[0] for order in orders] == ["a", "b", "c"]
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)


def test_figures_keep_three_digits_and_all_before_the_point() -> None:
    assert rounded(0.123456) == 0.123
    assert rounded(123456.7) == 123457.0
    assert rounded(0.0) == 0.0
