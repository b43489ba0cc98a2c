"""`vmthunder bench publish`."""

import tempfile
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from vmthunder.bench.publish import compare, realistic_disk
from vmthunder.cli.output import console, emit, json_option, progress_console, size_text
from vmthunder.cli.sizes import BYTES
from vmthunder.errors import NotFound


@click.command
@click.option("--source", type=click.Path(path_type=Path), help="A raw disk image.  [default: files of this machine]")
@click.option("--size", "size_bytes", type=BYTES, default="512MiB", help="Of the default source.")
@click.option("--runs", type=click.IntRange(1), default=3, help="Of each, alternating; medians are shown.")
@click.option(
    "--dir",
    "directory",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    default=Path("/var/tmp"),
    help="For the output of all of them.",
)
@json_option
def publish(source: Path | None, size_bytes: int, runs: int, directory: Path, as_json: bool) -> None:
    """Compare publishing with qemu-img convert and casync make, on the same data."""
    with tempfile.TemporaryDirectory(prefix="vmthunder-bench-", dir=directory) as scratch:
        if source is None:
            source = Path(scratch, "disk.raw")
            realistic_disk(source, size_bytes)
        elif not source.exists():
            raise NotFound(f"{source} does not exist")
        result = compare(source.absolute(), runs, Path(scratch), progress_console.print)
    emit(as_json, result, lambda: _show(result))


def _show(result: dict[str, Any]) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for heading in ("MB/s", "MB/s PER CORE", "CPU s", "RSS", "STORED"):
        table.add_column(heading, justify="right")
    for row in result["rows"]:
        table.add_row(
            row["name"],
            f"{row['mb_s']:.0f}",
            f"{row['mb_s_per_core']:.0f}",
            f"{row['cpu_s']:.1f}",
            size_text(row["rss_bytes"]),
            size_text(row["stored_bytes"]),
        )
    console.print(table)
    if result["over_qemu_img"] is not None:
        console.print(f"per CPU second {result['over_qemu_img']:.1f} × qemu-img on {size_text(result['source_bytes'])}")
