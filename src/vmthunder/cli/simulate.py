"""`vmthunder simulate`: how long would so many nodes take on a network like mine?"""

import asyncio
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import click
from rich.table import Table

from vmthunder.bench.plot import plot_simulation, require_plot
from vmthunder.bench.spread import ALONE, CHUNK_BYTES, OURS, TREE
from vmthunder.cli.cluster_key import cluster_key_option, open_origin
from vmthunder.cli.output import console, emit, json_option, progress_console
from vmthunder.cli.sizes import BYTES, BYTES_PER_SECOND
from vmthunder.errors import CorruptFile, Usage
from vmthunder.ids import image_name
from vmthunder.lab.shaping import Rate
from vmthunder.node.relay import MAX_HOPS, RETRY_S, UPLOADS
from vmthunder.node.source import MAX_REQUESTS
from vmthunder.sim.run import simulate as run
from vmthunder.sim.scenario import MAX_NODES, Practice, Scenario, Shape

PRACTICE: Final = Practice(MAX_REQUESTS, UPLOADS, RETRY_S, MAX_HOPS)
WORK: Final = 500_000
"""Deliveries that a run simulates, if the image has as many: half a minute; with ten thousand nodes, several."""
LEAST_CHUNKS: Final = 250
MOST_CHUNKS: Final = 2000
_VARIANTS: Final = {OURS: Shape.OURS, TREE: Shape.TREE, ALONE: Shape.STAR}


class _Counts(click.ParamType[list[int]]):
    """`100` or `10,100,1000`."""

    name = "N,…"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        if isinstance(value, list):
            return value
        parts = str(value).split(",")
        if not all(part.isdecimal() and 1 <= int(part) <= MAX_NODES for part in parts):
            self.fail(f"{value!r} is no list of numbers of nodes from 1 to {MAX_NODES}", param, ctx)
        return [int(part) for part in parts]


@click.command()
@click.option(
    "--nodes", "counts", type=_Counts(), default="10,100,1000", help="Nodes that begin at once; a run for each."
)
@click.option("--rate", type=BYTES_PER_SECOND, default="1gbit", help="Of each node's link, each way.")
@click.option("--origin-rate", type=BYTES_PER_SECOND, help="Of the image server's link.  [default: as a node's]")
@click.option("--latency-ms", type=click.FloatRange(0), default=0.2, help="One way, between any two.")
@click.option("--bytes", "size_bytes", type=BYTES, default="1GiB", help="What each node reads, as stored.")
@click.option("--image", "name", help="Take the size, and the size of chunks, from this image …")
@click.option(
    "--origin", "origin_url", metavar="URL", envvar="VMTHUNDER_ORIGIN", show_envvar=True, help="… of this origin."
)
@cluster_key_option
@click.option(
    "--topology",
    "shapes",
    type=click.Choice([shape.value for shape in Shape]),
    multiple=True,
    default=[shape.value for shape in Shape],
    help="ours; tree: binary, as in 2014; star: no peer to peer; chain. Repeat to compare.",
)
@click.option("--racks", type=click.IntRange(min=1), default=1, help="Nodes are dealt to so many.")
@click.option(
    "--slow-fraction", type=click.FloatRange(0, 0.99), default=0.0, help="Share of nodes at a tenth of the rate."
)
@click.option(
    "--churn", type=click.FloatRange(0, 100), default=0.0, help="Percent of nodes lost and replaced a minute."
)
@click.option("--window", type=click.IntRange(min=1), default=64, help="Chunks that a reader has under way.")
@click.option("--cpu-us", type=click.FloatRange(0), default=0.0, help="CPU time to receive a chunk, and to send one.")
@click.option(
    "--cores", type=click.IntRange(0), default=0, help="Processors that all nodes share; 0: each has its own."
)
@click.option(
    "--chunks", type=click.IntRange(1), help="Simulate so many of the image's.  [default: by the number of nodes]"
)
@click.option("--seed", type=int, default=1, help="Of chance; the same gives the same.")
@click.option(
    "--validate",
    "measured",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Simulate what this result of `bench spread --json` measured, and compare.",
)
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Also draw it: FILE.svg, .png or .pdf.")
@json_option
def simulate(
    counts: list[int],
    rate: int,
    origin_rate: int | None,
    latency_ms: float,
    size_bytes: int,
    name: str | None,
    origin_url: str | None,
    cluster_key: Path | None,
    shapes: tuple[str, ...],
    racks: int,
    slow_fraction: float,
    churn: float,
    window: int,
    cpu_us: float,
    cores: int,
    chunks: int | None,
    seed: int,
    measured: Path | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """How long would 500 nodes take to read this image on my network?

    \b
      vmthunder simulate --nodes 500 --rate 10gbit --image debian-12 --origin http://images:8930
      vmthunder simulate --nodes 1000 --rate 1gbit --slow-fraction 0.1 --churn 10 --topology ours

    All nodes begin to read in the same moment, as fast as they can; a boot reads a part of the image, give that as --bytes.
    Needs no network and no root: links are simulated, but the trees, the tracker's state, the ranking of sources and the
    search for a chunk are the code that agents run. Of a large image the first chunks are simulated, one by one, and times
    are scaled to the whole; docs/simulation.md says how, and how far it can be trusted.

    Beside each time stands the least possible, (F/u)(1 + ⌊log2 N⌋/M) for M chunks.
    """
    if plot:
        require_plot()
    if (name is None) != (origin_url is None) and name is not None:
        raise Usage("--image needs --origin, the place where it is published")
    chunk_bytes = CHUNK_BYTES
    if name is not None and origin_url is not None:
        size_bytes, chunk_bytes = asyncio.run(_sizes(name, origin_url, cluster_key))
    image_chunks = max(1, round(size_bytes / chunk_bytes))
    base = Scenario(
        nodes=1,
        chunks=1,
        image_chunks=image_chunks,
        chunk_bytes=chunk_bytes,
        rate_bytes_s=rate,
        practice=PRACTICE,
        origin_rate_bytes_s=origin_rate or 0,
        latency_s=latency_ms / 1e3,
        window=window,
        racks=racks,
        slow_fraction=slow_fraction,
        churn_per_minute=churn / 100,
        cpu_s=cpu_us / 1e6,
        cores=cores,
        seed=seed,
    )
    if measured is not None:
        _compare(measured, base, as_json)
        return
    scenarios = [
        replace(base, nodes=nodes, shape=Shape(shape), chunks=min(image_chunks, chunks or _chunks(nodes)))
        for nodes in counts
        for shape in dict.fromkeys(shapes)
    ]
    result = {"size_bytes": size_bytes, "rate_bytes_s": rate, "rows": list(_run(scenarios))}
    if plot:
        plot_simulation(result, plot)
    emit(as_json, result, lambda: _show(result["rows"]))  # type: ignore[arg-type]  # a list, by its key


def _chunks(nodes: int) -> int:
    return min(MOST_CHUNKS, max(LEAST_CHUNKS, WORK // nodes))


async def _sizes(name: str, origin_url: str, cluster_key: Path | None) -> tuple[int, int]:
    """Stored bytes of an image, and of a chunk of it on average."""
    origin = open_origin(origin_url, cluster_key)
    ref = await origin.ref(image_name(name))
    sizes = [row.encoded_bytes for row in (await origin.manifest(ref.image_id)).rows()]
    if not sizes:
        raise Usage(f"image {name} is all zero: there is nothing to read")
    return sum(sizes), sum(sizes) // len(sizes)


def _run(scenarios: Sequence[Scenario]) -> Iterator[dict[str, Any]]:
    with ProcessPoolExecutor() as pool:
        for number, outcome in enumerate(pool.map(run, scenarios)):
            done = outcome.scenario
            if progress_console.is_terminal:
                progress_console.print(f"{number + 1} of {len(scenarios)}: {done.shape.value}, {done.nodes} nodes")
            yield outcome.summary()


def _compare(path: Path, base: Scenario, as_json: bool) -> None:
    """Simulated against measured."""
    try:
        found = json.loads(path.read_text().splitlines()[-1])
        machine = found["machine"]
        rate = Rate.parse(machine["rate"]).bytes_s
        chunks = machine["size_bytes"] // CHUNK_BYTES
        rows = [(row["name"], row["nodes"], row["time_s"]) for row in found["rows"] if row["name"] in _VARIANTS]
        base = replace(base, chunk_bytes=CHUNK_BYTES, image_chunks=chunks, chunks=chunks, rate_bytes_s=rate)
    except (ValueError, LookupError, TypeError) as error:
        raise CorruptFile(f"{path} is no result of `vmthunder bench spread --json`: {error!r}") from None
    scenarios = [replace(base, nodes=nodes, shape=_VARIANTS[name]) for name, nodes, _ in rows]
    result = [
        simulated | {"measured_s": time_s, "simulated_over_measured": simulated["last_s"] / time_s}
        for simulated, (_, _, time_s) in zip(_run(scenarios), rows, strict=True)
    ]

    def human() -> None:
        table = Table("topology", "nodes", "measured s", "simulated s", "simulated ÷ measured")
        for row in result:
            ratio = row["simulated_over_measured"]
            table.add_row(
                row["topology"], str(row["nodes"]), f"{row['measured_s']:.2f}", f"{row['last_s']:.2f}", f"{ratio:.2f}"
            )
        console.print(table)

    emit(as_json, {"rows": result}, human)


def _show(rows: Sequence[dict[str, Any]]) -> None:
    table = Table(
        "nodes",
        "topology",
        "first s",
        "median s",
        "last s",
        "bound s",
        "÷ bound",
        "origin ÷ image",
        "most sent ÷ received",
    )
    for row in rows:
        table.add_row(
            str(row["nodes"]),
            row["topology"],
            *(f"{row[key]:.2f}" for key in ("first_s", "median_s", "last_s", "bound_s", "time_over_bound")),
            *(f"{row[key]:.2f}" for key in ("origin_over_unique", "max_upload_over_download")),
        )
    console.print(table)
