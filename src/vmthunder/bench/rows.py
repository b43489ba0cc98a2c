"""What a benchmark reports, from the figures of its rounds. Pure: no I/O, no clock.

Machines drift: figures of one round belong together, and a ratio is taken within its round before the median is.
"""

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import TypeAlias

Figures: TypeAlias = Mapping[str, float]
"""Of one row in one round: unit-bearing name → value."""
Round: TypeAlias = Mapping[str, Figures]
"""Of one round: row name → its figures."""


def rotated(names: Sequence[str], round_number: int) -> list[str]:
    """The order of one round: each begins with another row, so that none has always the same before it."""
    shift = round_number % len(names)
    return [*names[shift:], *names[:shift]]


def medians(rounds: Iterable[Round], row: str) -> dict[str, float]:
    """Median of each figure of a row, over the rounds that have it."""
    values: dict[str, list[float]] = {}
    for figures in rounds:
        for name, value in figures.get(row, {}).items():
            values.setdefault(name, []).append(value)
    return {name: median(found) for name, found in values.items()}


def ratio(rounds: Iterable[Round], row: str, over: str, figure: str) -> float | None:
    """Median over the rounds of row ÷ over in one figure; None where a round with both is missing."""
    found = [
        figures[row][figure] / figures[over][figure]
        for figures in rounds
        if figure in figures.get(row, {}) and figures.get(over, {}).get(figure)
    ]
    return median(found) if found else None


def rounded(value: float, digits: int = 3) -> float:
    """To so many significant digits, and whole numbers in any case: what is measured has no more."""
    return float(f"{value:.{digits}g}") if abs(value) < 10**digits else float(round(value))
