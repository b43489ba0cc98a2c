"""`vmthunder bench storm`."""

from pathlib import Path
from typing import Any

import click
from rich.table import Table

from vmthunder.bench.plot import plot_storm, require_plot
from vmthunder.bench.storm import bench_storm
from vmthunder.cli.bench_guests import Choose, guest_options
from vmthunder.cli.lab import NODE_COUNTS, RATE
from vmthunder.cli.output import console, emit, json_option, progress_console, size_text
from vmthunder.lab.shaping import Rate


@click.command()
@click.option("--nodes", type=NODE_COUNTS, default="8", help="Nodes that boot at once; 1,4,8,16 measures each.")
@click.option("--rate", type=RATE, default="1gbit", help="Speed of each link, each way.")
@guest_options
@click.option("--rounds", type=click.IntRange(min=1), default=1, help="Figures are medians over the rounds.")
@click.option("--directory", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Where the data goes.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Also draw it: FILE.svg, .png or .pdf.")
@json_option
def storm(
    choose: Choose,
    nodes: list[int],
    rate: Rate,
    rounds: int,
    directory: Path | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Boot one image on many nodes at the same moment, all of them cold.

    \b
    local file                the raw file, in the page cache: as many boots at once
    first storm, no profile   VMThunder, and nobody has booted the image before
    everything                VMThunder, with the profile that the first storm left
    no prefetch, no p2p       without one of both
    neither                   every node asks the origin for what its guest waits for

    Nodes and origin are network namespaces of a lab cluster with shaped links; programs and mounts are the real ones.
    Each node replays a recorded boot through its mount, or boots a real guest from it. Times run from the
    moment at which all begin. Δ* is the least possible stall: what a boot asks for, over the link, in order.
    Needs root.
    """
    if plot:
        require_plot()
    disk, guests = choose()
    result = bench_storm(disk, guests, nodes, rate, rounds, directory, progress_console.print)
    if plot:
        plot_storm(result, plot)
    emit(as_json, result, lambda: _show(result))


def _show(result: dict[str, Any]) -> None:
    table = Table(box=None, pad_edge=False)
    for heading in ("NODES", "", "MEDIAN s", "LAST s", "÷ LOCAL", "STALL s", "ORIGIN", "PEERS", "HIT", "WASTE"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for row in result["rows"]:
        table.add_row(
            str(row["nodes"]),
            row["name"],
            f"{row['median_s']:.2f}",
            f"{row['max_s']:.2f}",
            f"{row['median_over_local']:.2f}",
            f"{row['stall_s']:.2f}",
            _shown(row, "origin_over_unique", "{:.2f}"),
            size_text(row["bytes_from_peers"]) if "bytes_from_peers" in row else "",
            _shown(row, "prefetch_hit", "{:.1%}"),
            _shown(row, "prefetch_waste", "{:.1%}"),
        )
    console.print(table)
    if result["delta_star_s"] is not None:
        console.print(
            f"least possible stall Δ* {result['delta_star_s']:.3f} s; ORIGIN is in copies of what a boot touches"
        )


def _shown(row: dict[str, Any], figure: str, form: str) -> str:
    return form.format(row[figure]) if figure in row else ""
