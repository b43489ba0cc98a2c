"""`vmthunder bench spread`."""

from pathlib import Path
from typing import Any

import click
from rich.table import Table

from vmthunder.bench.spread import ALONE, OURS, TREE, Variant, bench_spread
from vmthunder.cli.lab import RATE
from vmthunder.cli.output import console, emit, json_option, progress_console, size_text
from vmthunder.cli.sizes import BYTES
from vmthunder.lab.shaping import Rate


@click.command()
@click.option("--nodes", type=click.IntRange(1, 200), default=16, help="Nodes that read at once.")
@click.option("--rate", type=RATE, default="200mbit", help="Speed of each link, each way.")
@click.option("--size", "size_bytes", type=BYTES, default="128MiB", help="Size of the image, which does not compress.")
@click.option("--rounds", type=click.IntRange(min=1), default=1, help="Figures are medians over the rounds.")
@click.option("--stripes", type=int, help="Measure only this many stripes …")
@click.option("--fanout", type=int, help="… and this fan-out.")
@click.option("--no-p2p", is_flag=True, help="Measure only nodes that all ask the origin.")
@click.option("--compare", is_flag=True, help="Also the tree of 2014 and without peer to peer.")
@click.option("--directory", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Where the data goes.")
@json_option
def spread(
    nodes: int,
    rate: Rate,
    size_bytes: int,
    rounds: int,
    stripes: int | None,
    fanout: int | None,
    no_p2p: bool,
    compare: bool,
    directory: Path | None,
    as_json: bool,
) -> None:
    """Every node of a lab cluster reads the whole image at once.

    The time until the last one has it all is held against the least possible, (F/u)(1 + ⌊log2 N⌋/M) for M chunks; what the
    origin sent against one copy of the image; and of all nodes the most that one sent against what it received. Real
    programs in network namespaces; needs root.
    """
    tree = Variant(TREE, server=("--stripes=1", "--fanout=2"))
    alone = Variant(ALONE, agent=("--no-p2p",))
    if no_p2p:
        variants = [alone]
    elif stripes is not None or fanout is not None:
        shape = (f"--stripes={stripes or 16}", f"--fanout={fanout or (stripes or 16) + 1}")
        variants = [Variant(" ".join(shape), server=shape)]
    else:
        variants = [Variant(OURS)]
    if compare:
        variants += [tree, alone]
    result = bench_spread(nodes, rate, size_bytes, rounds, variants, directory, progress_console.print)
    emit(as_json, result, lambda: _show(result))


def _show(result: dict[str, Any]) -> None:
    table = Table("", "time s", "÷ bound", "origin ÷ image", "most sent ÷ received", "from peers", "agents' CPU s/GB")
    for row in result["rows"]:
        table.add_row(
            row["name"],
            f"{row['time_s']:.1f}",
            f"{row['time_over_bound']:.2f}",
            f"{row['origin_over_unique']:.2f}",
            f"{row['max_upload_over_download']:.2f}",
            size_text(row["bytes_from_peers"]),
            f"{row['agent_cpu_s_per_gb']:.1f}",
        )
    console.print(table)
