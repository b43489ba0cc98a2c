"""`vmthunder bench faults`."""

from pathlib import Path
from typing import Any

import click
from rich.table import Table

from vmthunder.bench.faults import Fault, Load, bench_faults
from vmthunder.cli.lab import RATE
from vmthunder.cli.output import console, emit, json_option, progress_console
from vmthunder.lab.shaping import Rate


@click.command()
@click.option("--nodes", type=click.IntRange(3, 200), default=8, help="Nodes that read at once.", show_default=True)
@click.option("--rate", type=RATE, default="200mbit", help="Speed of each link, each way.", show_default=True)
@click.option(
    "--seconds",
    type=click.FloatRange(2, 3600),
    default=60.0,
    help="How long nodes read beside each fault.",
    show_default=True,
)
@click.option(
    "--away",
    "away_s",
    type=click.FloatRange(0.1),
    default=20.0,
    help="Seconds that tracker, origin and half of the nodes are away.",
    show_default=True,
)
@click.option(
    "--fault",
    "faults",
    type=click.Choice([fault.value for fault in Fault]),
    multiple=True,
    help="Only this one; can be given several times.  [default: all]",
)
@click.option("--directory", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Where the data goes.")
@json_option
@click.pass_context
def faults(
    ctx: click.Context,
    nodes: int,
    rate: Rate,
    seconds: float,
    away_s: float,
    faults: tuple[str, ...],
    directory: Path | None,
    as_json: bool,
) -> None:
    """Break a lab cluster while its nodes read, and show what the readers noticed.

    Every node reads one image, 50 times 64 KiB a second, and compares each byte with the source, while: a tenth of the
    workers, or of the agents that nobody reads on, is killed each second; tracker, origin or half of the nodes are away
    for a while; one peer lies, is silent, sends at 1/20 of its link's rate, resets the connection in the middle of a
    frame, sends garbage, or announces a chunk of 4 GiB. Ends with exit code 1 if a read failed or a byte was wrong. Real
    programs in network namespaces; needs root.

    Beside no fault at all it also measures what an idle agent costs.

    "stall" is how long reads were held up after something was killed, or after it was back; "own" is that of reads on the
    very node whose worker was killed, which wait for the next one to start.
    """
    wanted = [Fault(name) for name in faults] or list(Fault)
    result = bench_faults(wanted, Load(nodes, rate, seconds, away_s), directory, progress_console.print)
    emit(as_json, result, lambda: _show(result))
    if any(row["read_errors"] or row["wrong_reads"] for row in result["rows"]):
        ctx.exit(1)


def _show(result: dict[str, Any]) -> None:
    table = Table(
        "",
        "reads",
        "errors",
        "wrong",
        "median s",
        "p99 s",
        "max s",
        "stall p99 s",
        "own max s",
        "origin ÷ image",
        "it is banned / left alone by",
    )
    for row in result["rows"]:
        stall, own = row["stall_p99_s"], row["own_stall_max_s"]
        table.add_row(
            row["name"],
            str(row["reads"]),
            str(row["read_errors"]),
            str(row["wrong_reads"]),
            f"{row['median_s']:.3f}",
            f"{row['p99_s']:.3f}",
            f"{row['max_s']:.2f}",
            "" if stall is None else f"{stall:.2f}",
            "" if own is None else f"{own:.2f}",
            f"{row['origin_over_unique']:.2f}",
            f"{row['nodes_that_ban_it']} / {row['nodes_that_leave_it_alone']}",
        )
    console.print(table)
    for row in result["rows"]:
        if "idle_core_share" in row:
            console.print(f"an agent in a swarm that nobody reads on uses {row['idle_core_share']:.2%} of a core")
