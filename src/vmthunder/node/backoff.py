"""How long to wait before another try. Pure."""

from collections.abc import Callable

FIRST_S = 0.1
CAP_S = 5.0


def delay_s(failures: int, random: Callable[[], float]) -> float:
    """Seconds to wait after `failures` failed tries in a row (at least 1); `random` gives numbers in [0, 1).

    Exponential with full jitter: after an outage many waiters come back spread over the whole interval, not in waves.
    """
    return random() * min(CAP_S, FIRST_S * 2.0 ** min(failures - 1, 16))
