"""Pictures of benchmarks. Need the extra `plot` (matplotlib)."""

from collections.abc import Mapping, Sequence
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
    """Draw the result of `bench_boot`: a bar per row, a dot per round; the suffix says the format. Raises OSError."""
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


def plot_storm(result: Mapping[str, Any], path: Path) -> None:
    """Draw the result of `bench_storm`: a line per row, from the first to the last node. Raises OSError."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(row["name"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["name"] == name]
        nodes = [row["nodes"] for row in rows]
        spread = [[row["median_s"] - row["min_s"] for row in rows], [row["max_s"] - row["median_s"] for row in rows]]
        axes.errorbar(nodes, [row["median_s"] for row in rows], spread, marker="o", markersize=4, capsize=3, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(nodes, [str(count) for count in nodes])
    axes.set_xlabel(f"nodes that boot at once, links of {result['machine']['rate']}")
    axes.set_ylabel("seconds to ready: median, first and last node")
    axes.set_ylim(bottom=0)
    axes.legend()
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def plot_simulation(result: Mapping[str, Any], path: Path) -> None:
    """Draw the result of `simulate`: the last node's time over the number of nodes, and the bound. Raises OSError."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for shape in dict.fromkeys(row["topology"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["topology"] == shape]
        nodes = [row["nodes"] for row in rows]
        axes.plot(nodes, [row["last_s"] for row in rows], marker="o", markersize=4, label=shape)
    axes.plot(nodes, [row["bound_s"] for row in rows], "k--", label="least possible")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(f"nodes that read at once, links of {result['rate_bytes_s'] * 8e-6:g} Mbit/s")
    axes.set_ylabel(f"seconds until the last one has {result['size_bytes'] / 2**20:.0f} MiB")
    axes.legend()
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def plot_rivals(result: Mapping[str, Any], paths: Sequence[Path]) -> None:
    """Draw the result of `bench_rivals`: time and the origin's bytes over nodes, with the bounds. Raises OSError."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    figure = Figure(figsize=(11, 5.5), layout="constrained")
    time_axes, bytes_axes = figure.subplots(1, 2)
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for row in result["rows"]:
        by_name.setdefault(row["name"], []).append(row)
    counts = sorted({row["nodes"] for row in result["rows"]})
    for name, rows in by_name.items():
        nodes = [row["nodes"] for row in rows]
        ours = name.startswith("VMThunder")
        style: dict[str, Any] = {"marker": "o" if ours else "s", "markersize": 4, "linewidth": 2.2 if ours else 1.2}
        (line,) = time_axes.plot(nodes, [row["max_s"] for row in rows], label=name, **style)
        # A local file sends next to nothing, which a log axis would make the subject of the picture.
        sent = [row["origin_sent_bytes"] / 2**20 for row in rows]
        if name != "local file":
            bytes_axes.plot(nodes, sent, color=line.get_color(), **style)
    bound: dict[str, Any] = {"color": "black", "linestyle": "--", "linewidth": 1}
    if result["delta_star_s"] is not None:
        local = by_name.get("local file", [])
        least_s = [row["median_s"] + result["delta_star_s"] for row in local]
        time_axes.plot([row["nodes"] for row in local], least_s, label="bound: local + Δ*", **bound)
        bytes_axes.axhline(result["touched_bytes"] / 2**20, label="bound: what one boot touches, once", **bound)
        bytes_axes.legend()
    for axes in (time_axes, bytes_axes):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(f"nodes that boot at once, links of {result['machine']['rate']}")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(visible=True, alpha=0.3)
    time_axes.set_ylabel("seconds until the last node is ready")
    bytes_axes.set_ylabel("MiB that the origin sent")
    figure.legend(*time_axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    for path in paths:
        figure.savefig(path, dpi=140)
