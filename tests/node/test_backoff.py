from vmthunder.node.backoff import CAP_S, FIRST_S, delay_s


def test_delays_double_up_to_the_cap() -> None:
    longest = [delay_s(failures, lambda: 1.0) for failures in range(1, 12)]
    assert longest[:4] == [FIRST_S, 2 * FIRST_S, 4 * FIRST_S, 8 * FIRST_S]
    assert longest[-1] == CAP_S
    assert delay_s(10**9, lambda: 1.0) == CAP_S


def test_jitter_is_spread_over_the_whole_interval() -> None:
    assert delay_s(20, lambda: 0.0) == 0.0
    assert delay_s(20, lambda: 0.5) == CAP_S / 2
