"""`vmthunder precache`, `pin`, `unpin`: images that are brought to nodes before they are used, and stay there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from vmthunder.cli.agent import run_dir_option
from vmthunder.cli.cluster_key import cluster_key_option
from vmthunder.cli.output import bytes_progress, console, emit, json_option, size_text
from vmthunder.cli.sizes import BYTES_PER_SECOND
from vmthunder.cli.swarm import tracker_option
from vmthunder.node.control import AgentClient
from vmthunder.node.policy import Part
from vmthunder.node.settings import control_socket

Command = TypeVar("Command", bound=Callable[..., Any])


def part_option(command: Command) -> Command:
    """Add `--boot-set` and `--full`, as the argument `part`."""
    command = click.option("--full", "part", flag_value=Part.FULL.value, help="The whole image.")(command)
    return click.option(
        "--boot-set", "part", flag_value=Part.BOOT_SET.value, default=Part.BOOT_SET.value, help="What its boots read."
    )(command)


@click.command()
@click.argument("image")
@part_option
@click.option(
    "--at",
    "rate",
    metavar="RATE",
    type=BYTES_PER_SECOND,
    default=0,
    help="Of each node: 200mbit; 0: what guests leave.",
)
@click.option("--nodes", metavar="A,B", help="Only these, by host.  [default: all that the tracker knows]")
@tracker_option
@cluster_key_option
@run_dir_option
@json_option
def precache(
    image: str,
    part: str,
    rate: int,
    nodes: str | None,
    tracker: str | None,
    cluster_key: Path | None,
    run_dir: Path,
    as_json: bool,
) -> None:
    """Bring IMAGE into the chunk caches of nodes before it is used there.

    By default what its boots read, as far as they are known: a guest then boots as from a local disk. Nodes pass it on to
    each other, and yield to guests. With --tracker, from any machine; without it, on this node. An order that is
    interrupted here goes on there, also after a restart of the agent.
    """
    if tracker is None and nodes is None:
        client = AgentClient(control_socket(run_dir.absolute()))
        with bytes_progress() as bar:
            task = bar.add_task(image)
            report = client.precache(
                image, part, rate, lambda done, total: bar.update(task, completed=done, total=total)
            )
        emit(as_json, report, lambda: console.print(f"{image} is on this node: {size_text(report['bytes'])}"))
        return
    # Imported here: this node's own needs no HTTP.
    from vmthunder.cli.fleet import over_nodes, precache_nodes, raise_for

    wanted = {"image": image, "what": part, "rate_bytes_s": rate}
    names = None if nodes is None else [name.strip() for name in nodes.split(",")]
    done, refused = over_nodes(tracker, cluster_key, lambda found: precache_nodes(found, names, wanted))

    def human() -> None:
        for report in done:
            console.print(f"{image} is on {report['node']}: {size_text(report['bytes'])}")

    failed = [{"node": refusal.node.name, "error": str(refusal.error)} for refusal in refused]
    emit(as_json, {"nodes": done, "failed_nodes": failed}, human)
    raise_for(refused)


@click.command()
@click.argument("image")
@part_option
@run_dir_option
@json_option
def pin(image: str, part: str, run_dir: Path, as_json: bool) -> None:
    """Keep IMAGE in this node's chunk cache, whatever else comes: what is here of it now, and what comes later.

    `precache` brings it here.
    """
    report = AgentClient(control_socket(run_dir.absolute())).pin(image, part)
    emit(as_json, report, lambda: console.print(f"{image} stays on this node: {report['chunks']} chunks"))


@click.command()
@click.argument("image")
@run_dir_option
@json_option
def unpin(image: str, run_dir: Path, as_json: bool) -> None:
    """Let IMAGE leave this node's chunk cache again when others need the room."""
    report = AgentClient(control_socket(run_dir.absolute())).unpin(image)
    emit(as_json, report, lambda: console.print(f"{image} may leave this node's cache again"))
