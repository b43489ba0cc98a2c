"""What `boot`, `ps` and `destroy` do over all nodes that a tracker knows."""

import asyncio
import base64
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table

from vmthunder.cli.cluster_key import load_key
from vmthunder.cli.output import bytes_progress, console, emit, progress_console, size_text
from vmthunder.errors import Failure, NotFound, Usage, VMThunderError
from vmthunder.fleet.nodes import NodeClient, clients
from vmthunder.fleet.storm import SOURCES, Boot, Refusal, Storm, plan, survey

T = TypeVar("T")

Work = Callable[[Sequence[NodeClient]], Coroutine[Any, Any, T]]


def over_nodes(tracker: str | None, cluster_key: Path | None, work: Work[T]) -> T:
    """Run `work` on the nodes of a cluster. Raises Usage, and what `clients` and `ClusterKey.load` raise."""
    if tracker is None:
        raise Usage("name a `vmthunder server` with --tracker (or VMTHUNDER_TRACKER), which knows the nodes")
    key = load_key(cluster_key)
    if key is None:
        raise Usage("nodes listen only to those who have the cluster key; give it with --cluster-key")

    async def run() -> T:
        return await work(await clients(tracker, key))

    return asyncio.run(run())


def contents(path: Path) -> str:
    """A file as it is sent to a node. Raises Usage."""
    try:
        return base64.b64encode(path.read_bytes()).decode()
    except OSError as error:
        raise Usage(f"{path}: {error.strerror}") from None


async def boot_many(
    nodes: Sequence[NodeClient], base: str, count: int | None, per_node: int | None, wanted: Mapping[str, Any]
) -> Storm:
    """Boot on all of them, with a table that lives where stderr is a terminal."""
    reached, refused = await survey(nodes)
    storm = Storm(plan(reached, base, count, per_node), refused)
    begin_s = time.monotonic()
    with Live(console=progress_console, auto_refresh=False, transient=True) as live:

        def show() -> None:
            if progress_console.is_terminal:
                live.update(_table(storm, time.monotonic() - begin_s), refresh=True)

        await storm.run(wanted, show)
    return storm


def print_storm(storm: Storm, as_json: bool) -> None:
    """The outcome. Raises Failure if something went wrong, after it was printed."""
    outcome = storm.to_dict()

    def human() -> None:
        console.print(_table(storm))
        times = outcome["ready_s"]
        if times:
            said = "   ".join(f"{name} {value:.2f} s" for name, value in times.items())
            console.print(f"ready    {outcome['ready']} of {outcome['asked']}   {said}")
        console.print("bytes    " + "   ".join(f"{size_text(storm.bytes_from(s))} from {s}" for s in SOURCES))
        for boot in storm.boots:
            if boot.error is not None:
                console.print(f"failed   {boot.client.node.name} {boot.name}: {boot.error}", markup=False)

    emit(as_json, outcome, human)
    print_refusals(storm.refused)
    if storm.failures:
        lost = len(storm.boots) - outcome["ready"]
        silent = f"; {len(storm.refused)} nodes took no part" if storm.refused else ""
        raise Failure(f"{lost} of {len(storm.boots)} vms did not become ready{silent}")


def _table(storm: Storm, elapsed_s: float | None = None) -> RenderableType:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("NODE", "VM", "PHASE", "READY", "STALL", *(source.upper() for source in SOURCES)):
        table.add_column(heading, justify="left" if heading in {"NODE", "VM", "PHASE"} else "right")
    for boot in storm.boots:
        table.add_row(*_row(boot))
    if elapsed_s is None:
        return table
    ready = sum(boot.ready_s is not None for boot in storm.boots)
    return Group(f"{ready} of {len(storm.boots)} ready after {elapsed_s:.1f} s", table)


def _row(boot: Boot) -> list[str]:
    ready = "" if boot.ready_s is None else f"{boot.ready_s:.2f} s"
    sources = (size_text(boot.ledger.grown(f"bytes_from_{source}")) for source in SOURCES)
    return [boot.client.node.name, boot.name, boot.step, ready, f"{boot.stall_s:.2f} s", *sources]


async def list_vms(nodes: Sequence[NodeClient]) -> tuple[list[dict[str, Any]], list[Refusal]]:
    """All virtual machines, each with its `node`."""
    reached, refused = await survey(nodes)
    return [{"node": client.node.name, **vm} for client, vms in reached for vm in vms], refused


async def destroy_vms(nodes: Sequence[NodeClient], names: Sequence[str]) -> tuple[list[dict[str, str]], list[Refusal]]:
    """End those of these names wherever they are, or all if there are no names. Raises NotFound."""
    doomed: list[tuple[NodeClient, str | None]] = [(client, None) for client in nodes]
    refused: list[Refusal] = []
    if names:
        reached, refused = await survey(nodes)
        where = defaultdict(list)
        for client, vms in reached:
            for vm in vms:
                where[vm["name"]].append(client)
        missing = [name for name in names if name not in where]
        if missing and not refused:
            raise NotFound(f"there is no vm {missing[0]} on any node; `vmthunder ps --all-nodes` lists them")
        doomed = [(client, name) for name in names for client in where[name]]
    answers = await asyncio.gather(*(client.destroy(name) for client, name in doomed), return_exceptions=True)
    gone = []
    for (client, _), answer in zip(doomed, answers, strict=True):
        if isinstance(answer, VMThunderError):
            refused.append(Refusal(client.node, answer))
        elif isinstance(answer, BaseException):
            raise answer
        else:
            gone += [{"node": client.node.name, "name": name} for name in answer]
    return gone, refused


async def precache_nodes(
    nodes: Sequence[NodeClient], names: Sequence[str] | None, wanted: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], list[Refusal]]:
    """Bring an image to these nodes, or to all, with a bar for each; what it came to on each. Raises NotFound."""
    unknown = set(names or ()) - {client.node.name for client in nodes}
    if unknown:
        raise NotFound(f"the tracker knows no node {min(unknown)}; `vmthunder swarm` shows those that it knows")
    chosen = [client for client in nodes if names is None or client.node.name in names]
    with bytes_progress() as bars:

        async def bring(client: NodeClient) -> dict[str, Any]:
            bar = bars.add_task(client.node.name)

            def heard(line: Mapping[str, Any]) -> None:
                if isinstance(far := line.get("progress"), dict):
                    bars.update(bar, completed=far.get("done_bytes"), total=far.get("total_bytes"))

            return {"node": client.node.name, **await client.precache(wanted, heard)}

        answers = await asyncio.gather(*map(bring, chosen), return_exceptions=True)
    done, refused = [], []
    for client, answer in zip(chosen, answers, strict=True):
        if isinstance(answer, VMThunderError):
            refused.append(Refusal(client.node, answer))
        elif isinstance(answer, BaseException):
            raise answer
        else:
            done.append(answer)
    return done, refused


def print_refusals(refused: Iterable[Refusal]) -> None:
    """On stderr: nodes that did not do what they were asked."""
    for refusal in refused:
        click.echo(f"node {refusal.node.name}: {refusal.error}", err=True)


def raise_for(refused: Sequence[Refusal]) -> None:
    """Raises Failure if a node did not do what it was asked, after it was printed."""
    print_refusals(refused)
    if refused:
        raise Failure(f"{len(refused)} nodes did not answer, or refused")
