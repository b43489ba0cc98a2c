"""`vmthunder bench boot`."""

from pathlib import Path
from typing import Any

import click
from rich.table import Table

from vmthunder.bench.boot import bench_boot
from vmthunder.bench.plot import plot_boot, require_plot
from vmthunder.cli.output import console, emit, json_option, progress_console, size_text
from vmthunder.cli.sizes import BYTES
from vmthunder.image.chunk import check_chunk_bytes
from vmthunder.lab.shaping import Rate


@click.command()
@click.option(
    "--guest",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder made by scripts/build-guest.  [default: the lean guest, built once]",
)
@click.option(
    "--rate", "rates", multiple=True, default=["1gbit"], help="Link to the image server; repeat for more rows."
)
@click.option(
    "--chunk-size",
    "chunk_sizes",
    type=BYTES,
    multiple=True,
    default=["64KiB"],
    help="Repeat to compare sizes.",
)
@click.option("--rounds", type=click.IntRange(min=1), default=5, help="Figures are medians over the rounds.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Also draw it: FILE.svg, .png or .pdf.")
@json_option
def boot(
    guest: Path | None,
    rates: tuple[str, ...],
    chunk_sizes: tuple[int, ...],
    rounds: int,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Boot one real guest from its disk, in every way.

    \b
    local file      the raw file, in the page cache
    cold loopback   nothing on the node, image server on loopback
    cold 1gbit      the same over a link of that rate: veth and token buckets
    warm            the same node has booted it before

    Times are from the question which image it is to the guest's ready mark. Bytes read are what the guest asked of
    its disk, bytes fetched what came from the image server. Needs root.
    """
    if plot:
        require_plot()
    sizes = [check_chunk_bytes(size) for size in chunk_sizes]
    result = bench_boot(guest, [Rate.parse(rate) for rate in rates], sizes, rounds, progress_console.print)
    if plot:
        plot_boot(result, plot)
    emit(as_json, result, lambda: _show(result))


def _show(result: dict[str, Any]) -> None:
    table = Table("", "ready s", "over local", "read", "fetched", "fetched ÷ read", "requests")
    for row in result["rows"]:
        table.add_row(
            row["name"],
            f"{row['ready_s']:.2f}",
            f"{row['over_local']:.2f}",
            size_text(row["bytes_read"]),
            size_text(row["bytes_fetched"]),
            f"{row['fetched_over_read']:.2f}",
            f"{row['origin_requests']:.0f}",
        )
    console.print(table)
