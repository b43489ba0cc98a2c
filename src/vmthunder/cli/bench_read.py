"""`vmthunder bench read`."""

from pathlib import Path
from typing import Any

import click
from rich.table import Table

from vmthunder.bench.read import bench_read
from vmthunder.cli.output import console, emit, json_option, progress_console
from vmthunder.cli.sizes import BYTES


@click.command()
@click.option("--size", "size_bytes", type=BYTES, default="1GiB", help="Size of the image.")
@click.option("--rounds", type=click.IntRange(min=1), default=3, help="Figures are medians over the rounds.")
@click.option(
    "--directory",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Where the data goes, about four times --size.  [default: the system's temporary directory]",
)
@json_option
def read(size_bytes: int, rounds: int, directory: Path | None, as_json: bool) -> None:
    """Read one image in every way that this host can offer it.

    \b
    local file           a raw file, in the page cache
    ours cold            nothing on the node, image server on loopback
    ours cached chunks   chunk cache full, page cache dropped
    ours page cache      read before
    ours materialised    the whole image on the node, in the page cache
    nbdkit, qemu-nbd     on the raw file in the page cache, shown as a file by nbdfuse

    Each is read by fio: 4 KiB at random places, then the whole file in order. CPU time is that of the reader and of
    all processes behind the file, per 10⁹ bytes of the sequential read. Needs root and fio.
    """
    result = bench_read(size_bytes, rounds, directory, progress_console.print)
    emit(as_json, result, lambda: _show(result))


def _show(result: dict[str, Any]) -> None:
    table = Table("", "random 4 KiB/s", "sequential MB/s", "CPU s per GB")
    for row in result["rows"]:
        table.add_row(
            row["name"], f"{row['rand4k_iops']:,.0f}", f"{row['seq_mb_s']:,.0f}", f"{row['cpu_s_per_gb']:.2f}"
        )
    console.print(table)
    for name, figures in result["ratios"].items():
        console.print(f"{name}: random {figures['rand4k_iops']:.2f}, sequential {figures['seq_mb_s']:.2f}")
