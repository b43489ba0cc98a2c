"""`vmthunder swarm`: which nodes use which image now."""

import asyncio
import json
from itertools import groupby
from pathlib import Path
from typing import Any

import click

from vmthunder.cli.cluster_key import cluster_key_option, load_key
from vmthunder.cli.output import console, emit, json_option
from vmthunder.errors import Failure
from vmthunder.swarm.client import TrackerClient
from vmthunder.swarm.key import ClusterKey

_TIMEOUT_S = 10.0


@click.command()
@click.option(
    "--tracker",
    metavar="URL",
    required=True,
    envvar=["VMTHUNDER_TRACKER", "VMTHUNDER_ORIGIN"],
    show_envvar=True,
    help="A `vmthunder server`.",
)
@cluster_key_option
@json_option
def swarm(tracker: str, cluster_key: Path | None, as_json: bool) -> None:
    """Show which nodes use which image now, in the order of their seats."""
    answer = asyncio.run(ask_tracker(tracker, load_key(cluster_key), _TIMEOUT_S))
    try:
        swarms: list[dict[str, Any]] = json.loads(answer)["swarms"]
    except (ValueError, TypeError, KeyError):
        raise Failure(f"{tracker} answers, but not as a tracker") from None
    emit(as_json, {"tracker": tracker, "swarms": swarms}, lambda: _print(tracker, swarms))


async def ask_tracker(url: str, key: ClusterKey | None, timeout_s: float) -> bytes:
    """Its swarms, as it says it. Raises what `TrackerClient` raises."""
    client = TrackerClient(url, key and key.token)
    try:
        return await client.request("GET", "/swarm", timeout_s=timeout_s)
    finally:
        client.close()


def _print(tracker: str, swarms: list[dict[str, Any]]) -> None:
    if not swarms:
        console.print(f"no image is in use at {tracker}")
    for found in swarms:
        members = found["members"]
        console.print(
            f"image {found['image_id'][:16]}: {len(members)} nodes, {found['stripes']} stripes, fan-out {found['fanout']}"
        )
        for rack, nodes in groupby(members, key=lambda member: member[1]):
            places = "  ".join(f"{host}:{port}" for _, _, host, port in nodes)
            console.print(f"  {rack or '—'}: {places}")
