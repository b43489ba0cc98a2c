"""`vmthunder swarm`: which nodes use which image now."""

import asyncio
import json
from itertools import groupby
from pathlib import Path
from typing import Any

import click

from vmthunder.cli.cluster_key import cluster_key_option, load_key
from vmthunder.cli.output import console, emit, json_option
from vmthunder.errors import Failure, Usage
from vmthunder.swarm.client import TrackerClient
from vmthunder.swarm.key import ClusterKey
from vmthunder.swarm.view import CLUSTER

_TIMEOUT_S = 10.0

tracker_option = click.option(
    "--tracker",
    metavar="URL",
    envvar=["VMTHUNDER_TRACKER", "VMTHUNDER_ORIGIN"],
    show_envvar=True,
    help="A `vmthunder server`, which knows the nodes.",
)


@click.command()
@tracker_option
@cluster_key_option
@json_option
def swarm(tracker: str | None, cluster_key: Path | None, as_json: bool) -> None:
    """Show which nodes are up, and which image they use now, in the order of their seats."""
    if tracker is None:
        raise Usage("name a `vmthunder server` with --tracker (or VMTHUNDER_TRACKER)")
    answer = asyncio.run(ask_tracker(tracker, load_key(cluster_key), _TIMEOUT_S))
    try:
        found: dict[str, dict[str, Any]] = {view["image_id"]: view for view in json.loads(answer)["swarms"]}
        nodes: list[Any] = found.pop(CLUSTER.hex(), {"members": []})["members"]
    except (ValueError, TypeError, KeyError):
        raise Failure(f"{tracker} answers, but not as a tracker") from None
    swarms = list(found.values())
    emit(as_json, {"tracker": tracker, "nodes": nodes, "swarms": swarms}, lambda: _print(tracker, nodes, swarms))


async def ask_tracker(url: str, key: ClusterKey | None, timeout_s: float) -> bytes:
    """Its swarms, as it says it. Raises what `TrackerClient` raises."""
    client = TrackerClient(url, key and key.token)
    try:
        return await client.ask("GET", "/swarm", timeout_s=timeout_s)
    finally:
        client.close()


def _print(tracker: str, nodes: list[Any], swarms: list[dict[str, Any]]) -> None:
    console.print(f"{len(nodes)} nodes take orders: {'  '.join(host for _, _, host, _ in nodes)}")
    if not swarms:
        console.print(f"no image is in use at {tracker}")
    for found in swarms:
        members = found["members"]
        console.print(
            f"image {found['image_id'][:16]}: {len(members)} nodes, {found['stripes']} stripes, fan-out {found['fanout']}"
        )
        for rack, there in groupby(members, key=lambda member: member[1]):
            places = "  ".join(f"{host}:{port}" for _, _, host, port in there)
            console.print(f"  {rack or '—'}: {places}")
