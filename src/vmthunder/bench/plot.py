"""A picture of a boot benchmark: a bar per row, a dot per round. Needs the extra `plot` (matplotlib)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vmthunder.errors import MissingTool


def require_plot() -> None:
    """Raises MissingTool when matplotlib is not installed: better before a benchmark than after it."""
    try:
        import matplotlib as _  # noqa: F401, ICN001 - the question is whether it is there
    except ImportError:
        raise MissingTool("--plot needs matplotlib: pip install 'vmthunder[plot]'") from None


def plot_boot(result: Mapping[str, Any], path: Path) -> None:
    """Draw the result of `bench_boot`; the format follows the file's suffix. Raises OSError."""
    from matplotlib.figure import Figure

    rows = result["rows"][::-1]  # the first row on top
    figure = Figure(figsize=(8, 1 + 0.5 * len(rows)), layout="constrained")
    axes = figure.subplots()
    names = [row["name"] for row in rows]
    bars = axes.barh(names, [row["ready_s"] for row in rows], color="#9ab8d3")
    axes.bar_label(bars, [f"{row['ready_s']:.2f} s  ×{row['over_local']:.2f}" for row in rows], label_type="center")
    for row in rows:
        axes.plot(row["rounds_s"], [row["name"]] * len(row["rounds_s"]), "k.", markersize=4)
    axes.set_xlabel("seconds to the guest's ready mark: median (bar), rounds (dots)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
