"""`vmthunder bench rivals`."""

from pathlib import Path
from typing import Any

import click
from rich.table import Table

from vmthunder.bench.plot import require_plot
from vmthunder.bench.report import cells, write_report
from vmthunder.bench.rivals import LOCAL, bench_rivals, methods
from vmthunder.cli.bench_guests import Choose, guest_options
from vmthunder.cli.lab import NODE_COUNTS, RATE
from vmthunder.cli.output import console, emit, json_option, progress_console
from vmthunder.lab.shaping import Rate


@click.command()
@click.option("--nodes", type=NODE_COUNTS, default="1,4,8,16", help="Nodes that boot at once, each number a column.")
@click.option("--rate", type=RATE, default="1gbit", help="Speed of each link, each way.")
@guest_options
@click.option("--rounds", type=click.IntRange(min=1), default=1, help="Figures are medians over the rounds.")
@click.option(
    "--only",
    multiple=True,
    type=click.Choice([method.name for method in methods() if method.name != LOCAL]),
    help="Beside the local file, measure only this; repeat for more.",
)
@click.option("--directory", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Where the data goes.")
@click.option(
    "--report",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write rivals.html, .svg, .png and .json into this folder.",
)
@json_option
def rivals(
    choose: Choose,
    nodes: list[int],
    rate: Rate,
    rounds: int,
    only: tuple[str, ...],
    directory: Path | None,
    report: Path | None,
    as_json: bool,
) -> None:
    """The same storm, by VMThunder and by what people use today.

    \b
    full copy, HTTP         a compressed qcow2 from nginx to each node, then boot
    full copy, BitTorrent   the same by libtorrent
    NBD, iSCSI              every node reads from one nbdkit, one tgt
    copy-on-read, HTTP      QEMU reads the qcow2 over HTTP and keeps what it read
    VMThunder as in 2014    one binary tree, no prefetch
    VMThunder               first storm of an image, and with the profile that it left

    As `vmthunder bench storm`: network namespaces with shaped links, cold nodes, all boots at the same moment, against the
    same guest. What is not installed is reported as absent. Needs root, and for each node the size of
    the compressed image on disk.
    """
    if report:
        require_plot()
    disk, guests = choose()
    result = bench_rivals(disk, guests, nodes, rate, rounds, only, directory, progress_console.print)
    if report:
        for path in write_report(result, report):
            progress_console.print(f"written: {path}")
    emit(as_json, result, lambda: _show(result))


def _show(result: dict[str, Any]) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("N", "", "FIRST", "MEDIAN", "LAST s", "÷LOCAL", "SENT MiB", "NODE MiB", "CPU s"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for row in result["rows"]:
        table.add_row(*cells(row))
    console.print(table)
    for lost in result["absent"]:
        console.print(f"absent: {lost['name']}: {lost['reason']}")
    for lost in result["failed"]:
        console.print(f"failed: {lost['name']} on {lost['nodes']} nodes: {lost['reason']}")
