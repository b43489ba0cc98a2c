"""`agent`, `status`, `materialize`, `dematerialize`: the agent of this compute node."""

import math
import os
from pathlib import Path
from typing import Any

import click
from rich.console import JustifyMethod
from rich.table import Table

from vmthunder.cli.output import bytes_progress, console, emit, json_option, size_text
from vmthunder.cli.sizes import BYTES
from vmthunder.errors import Usage
from vmthunder.node.control import AgentClient
from vmthunder.node.settings import DEFAULT_RUN_DIR, DEFAULT_STATE_DIR, AgentSettings, control_socket

WAITING_SHOWN = 10
_DIRECTORY = click.Path(path_type=Path)

run_dir_option = click.option(
    "--run-dir",
    type=_DIRECTORY,
    envvar="VMTHUNDER_RUN_DIR",
    default=DEFAULT_RUN_DIR,
    help="Socket and log of the agent.",
)


def _client(run_dir: Path) -> AgentClient:
    return AgentClient(control_socket(run_dir.absolute()))


@click.command()
@click.option(
    "--origin", envvar="VMTHUNDER_ORIGIN", help="Where images are published: directory, http(s):// or s3:// URL."
)
@click.option(
    "--mount",
    type=_DIRECTORY,
    envvar="VMTHUNDER_MOUNT",
    show_default="STATE-DIR/images",
    help="Where images appear as NAME.raw.",
)
@click.option(
    "--state-dir",
    type=_DIRECTORY,
    envvar="VMTHUNDER_STATE_DIR",
    default=DEFAULT_STATE_DIR,
    help="Chunk cache, local copies.",
)
@run_dir_option
@click.option("--cache-size", type=BYTES, default="10GiB", help="Quota of the chunk cache on disk.")
@click.option("--decoded-size", type=BYTES, default="256MiB", help="Memory for decoded chunks.")
@click.option(
    "--lookup-timeout",
    metavar="SECONDS",
    type=click.FloatRange(min=0),
    default=30.0,
    help="How long opening an image that this node does not know may wait for the origin; 0: for ever. "
    "Reads of an open image always wait.",
)
@click.option("--detach", is_flag=True, help="Run in the background; return when the mount serves.")
@click.option(
    "--restart", is_flag=True, help="Hand the running agent's mount over to a new worker, from the code installed now."
)
@click.option("--stop", is_flag=True, help="Unmount and end the running agent.")
@json_option
def agent(
    origin: str | None,
    mount: Path | None,
    state_dir: Path,
    run_dir: Path,
    cache_size: int,
    decoded_size: int,
    lookup_timeout: float,
    detach: bool,
    restart: bool,
    stop: bool,
    as_json: bool,
) -> None:
    """Show every published image as a file on this node, chunk by chunk as it is read.

    Images are in the mount as NAME.raw without being attached; `ls` shows those that are open or materialized. The
    agent may be killed, restarted and upgraded under running guests: they see a pause.
    """
    if restart and stop:
        raise Usage("--restart and --stop exclude each other")
    if restart:
        report = _client(run_dir).restart()
        emit(as_json, report, lambda: console.print(f"worker {report['pid']} took over {report['mount']}"))
    elif stop:
        report = _client(run_dir).stop()
        emit(as_json, report, lambda: _print_stopped(report))
    else:
        if not origin:
            raise Usage("an agent needs --origin (or VMTHUNDER_ORIGIN): a directory, an http(s):// or an s3:// URL")
        # Imported here: the other commands need no FUSE.
        from vmthunder.node.agent import run, run_detached

        settings = AgentSettings(
            origin=origin if "://" in origin else str(Path(origin).absolute()),
            mount=Path(os.path.realpath(mount or state_dir / "images")),
            state_dir=state_dir.absolute(),
            run_dir=run_dir.absolute(),
            cache_bytes=cache_size,
            decoded_bytes=decoded_size,
            lookup_timeout_s=lookup_timeout,
        )
        if not detach:
            run(settings)
        report = run_detached(settings)
        emit(as_json, report, lambda: console.print(f"images of {report['origin']} are in {report['mount']}"))


def _print_stopped(report: dict[str, Any]) -> None:
    console.print(f"stopped; {report['mount']} is unmounted")
    still_open = [image for image in report["images"] if image["open"]]
    if still_open:
        names = ", ".join(image["name"] or image["image_id"] for image in still_open)
        console.print(f"it was in use: who had {names} open reads errors from now on")


@click.command()
@run_dir_option
@json_option
def status(run_dir: Path, as_json: bool) -> None:
    """Show what the agent of this node serves, holds and waits for."""
    report = _client(run_dir).status()
    emit(as_json, report, lambda: _print_status(report))


def _print_status(report: dict[str, Any]) -> None:
    keeper = "" if report["keeper_pid"] else ", keeper is gone"
    console.print(
        f"agent {report['version']}, worker {report['pid']}, up {_duration(report['uptime_s'])}, "
        f"{report['restarts']} restarts{keeper}, {size_text(report['rss_bytes'])} resident"
    )
    console.print(f"{report['origin']} → {report['mount']}")
    cache, decoded, fetch = report["cache"], report["decoded"], report["fetch"]
    console.print(
        f"cache    {cache['chunks']} chunks, {size_text(cache['bytes'])} of {size_text(cache['quota_bytes'])}, "
        f"{cache['evicted']} evicted, {cache['corrupt']} corrupt"
    )
    console.print(
        f"decoded  {size_text(decoded['bytes'])} of {size_text(decoded['budget_bytes'])}, {decoded['hits']} hits"
    )
    console.print(
        f"fetched  {fetch['chunks_fetched']} chunks, {size_text(fetch['bytes_fetched'])} "
        f"in {fetch['origin_requests']} requests; {fetch['chunks_from_cache']} chunks from the cache"
    )
    lost = [name for name, there in report["kernel"].items() if not there]
    if lost:
        console.print(f"kernel   has no {', '.join(lost)}")
    if report["images"]:
        table = Table(box=None, pad_edge=False)
        for column in ("image", "id", "size", "open", "read", "where"):
            justify: JustifyMethod = "right" if column in {"size", "open", "read"} else "left"
            table.add_column(column, justify=justify, overflow="fold")
        for image in report["images"]:
            table.add_row(
                _name(image),
                image["image_id"][: 12 if image["current"] else None],
                size_text(image["virtual_bytes"]),
                str(image["open"]),
                size_text(image["read_bytes"]),
                "local copy" if image["materialized"] else "on demand",
            )
        console.print(table)
    waiting = report["waiting"]
    for entry in waiting[:WAITING_SHOWN]:
        chunk = "" if entry["chunk"] is None else f" chunk {entry['chunk']}"
        console.print(f"waiting  {entry['image'][:40]}{chunk} for {_duration(entry['since_s'])}: {entry['why']}")
    if len(waiting) > WAITING_SHOWN:
        console.print(f"waiting  … and {len(waiting) - WAITING_SHOWN} more")


def _name(image: dict[str, Any]) -> str:
    if image["current"]:
        return str(image["name"])
    return f"{image['name']} (older)" if image["name"] else "—"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(math.floor(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


@click.command()
@click.argument("image")
@run_dir_option
@json_option
def materialize(image: str, run_dir: Path, as_json: bool) -> None:
    """Place the whole IMAGE on this node: from then on it is read at the speed of a local file."""
    with bytes_progress() as bar:
        task = bar.add_task(image)
        report = _client(run_dir).materialize(image, lambda done, total: bar.update(task, completed=done, total=total))
    emit(as_json, report, lambda: console.print(f"{image} is on this node; the next to open it reads the local copy"))


@click.command()
@click.argument("image")
@run_dir_option
@json_option
def dematerialize(image: str, run_dir: Path, as_json: bool) -> None:
    """Remove the local copy of IMAGE. It stays available on demand."""
    report = _client(run_dir).dematerialize(image)
    emit(
        as_json, report, lambda: console.print(f"{image} is on demand again; freed {size_text(report['freed_bytes'])}")
    )
