"""`agent`, `status`, `materialize`, `dematerialize`: the agent of this compute node."""

import asyncio
import contextlib
import math
import os
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich.console import JustifyMethod
from rich.table import Table

from vmthunder.cli.cluster_key import HTTP, cluster_key_option, find_key_file, load_key
from vmthunder.cli.output import bytes_progress, console, emit, json_option, size_text
from vmthunder.cli.sizes import BYTES, BYTES_PER_SECOND
from vmthunder.cli.swarm import ask_tracker
from vmthunder.errors import Failure, NotFound, OriginUnavailable, Usage
from vmthunder.node.control import AgentClient
from vmthunder.node.policy import parse_policy
from vmthunder.node.settings import (
    DEFAULT_CONTROL_LISTEN,
    DEFAULT_PEER_LISTEN,
    DEFAULT_RUN_DIR,
    DEFAULT_STATE_DIR,
    AgentSettings,
    control_socket,
)

WAITING_SHOWN = 10
CHECK_S = 2.0
"""How long the start of an agent may wait for what the server says to its key."""
_DIRECTORY = click.Path(path_type=Path)
_ORDERS = frozenset({"restart", "stop", "run_dir", "as_json"})
"""Options that an agent which runs can be given."""

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
@cluster_key_option
@click.option(
    "--tracker",
    metavar="URL",
    envvar="VMTHUNDER_TRACKER",
    show_default="the origin, if it is a server's URL",
    help="Who knows the other nodes.",
)
@click.option(
    "--p2p/--no-p2p", default=True, help="Whether to pass chunks on to other nodes, and take them from those."
)
@click.option("--peer-listen", default=DEFAULT_PEER_LISTEN, help="ADDRESS:PORT for other nodes.")
@click.option(
    "--control-listen",
    default=DEFAULT_CONTROL_LISTEN,
    help="ADDRESS:PORT for `vmthunder boot --count` and the like, from machines that have the cluster key; or none.",
)
@click.option(
    "--advertise",
    metavar="HOST",
    show_default="the address from which this node reaches the tracker",
    help="Where other nodes reach this one.",
)
@click.option(
    "--rack",
    metavar="LABEL",
    default="",
    show_default="none",
    help="Chunks enter a rack about once, through all its nodes.",
)
@click.option(
    "--upload-limit",
    type=BYTES_PER_SECOND,
    default=0,
    show_default="none",
    help="To all other nodes together: 200mbit.",
)
@click.option(
    "--download-limit",
    type=BYTES_PER_SECOND,
    default=0,
    show_default="none",
    help="From nodes and origin together; only with other nodes (p2p).",
)
@click.option(
    "--prefetch/--no-prefetch",
    default=True,
    help="Whether to learn what boots of an image read, and to bring it here before the next guest asks.",
)
@click.option(
    "--prefetch-memory", type=BYTES, default="256MiB", help="Prefetched chunks that may be put into the page cache."
)
@click.option(
    "--hydrate",
    metavar="RATE",
    type=BYTES_PER_SECOND,
    is_flag=False,
    flag_value="0",
    show_default="off",
    help="After a boot, bring the rest of its image into the cache: at 200mbit, or as fast as disturbs nobody.",
)
@click.option("--policy", type=_DIRECTORY, help="TOML file of images to be kept on this node; read again on change.")
@click.option("--detach", is_flag=True, help="Run in the background; return when the mount serves.")
@click.option(
    "--restart",
    is_flag=True,
    help="Hand the running agent's mount over to a new worker, from the code installed now, with the settings it has.",
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
    cluster_key: Path | None,
    tracker: str | None,
    p2p: bool,
    peer_listen: str,
    control_listen: str,
    advertise: str | None,
    rack: str,
    upload_limit: int,
    download_limit: int,
    prefetch: bool,
    prefetch_memory: int,
    hydrate: int | None,
    policy: Path | None,
    detach: bool,
    restart: bool,
    stop: bool,
    as_json: bool,
    nova: bool = False,
    complete_after: float = 0.0,
) -> None:
    """Show every published image as a file on this node, chunk by chunk as it is read.

    Images are in the mount as NAME.raw without being attached; `ls` shows those that are open or materialized. The
    agent may be killed, restarted and upgraded under running guests: they see a pause.
    """
    if restart and stop:
        raise Usage("--restart and --stop exclude each other")
    if restart or stop:
        _refuse_settings("--restart" if restart else "--stop")
    if restart:
        report = _client(run_dir).restart()
        emit(as_json, report, lambda: console.print(f"worker {report['pid']} took over {report['mount']}"))
    elif stop:
        report = _client(run_dir).stop()
        emit(as_json, report, lambda: _print_stopped(report))
    else:
        if not origin:
            raise Usage("an agent needs --origin (or VMTHUNDER_ORIGIN): a directory, an http(s):// or an s3:// URL")
        if policy is not None:
            check_policy(policy)
        # Imported here: the other commands need no FUSE.
        from vmthunder.node.agent import run, run_detached

        key_file = find_key_file(cluster_key)
        settings = AgentSettings(
            origin=origin if "://" in origin else str(Path(origin).absolute()),
            mount=Path(os.path.realpath(mount or state_dir / "images")),
            state_dir=state_dir.absolute(),
            run_dir=run_dir.absolute(),
            cache_bytes=cache_size,
            decoded_bytes=decoded_size,
            lookup_timeout_s=lookup_timeout,
            cluster_key=key_file,
            tracker=_tracker(origin, tracker, key_file) if p2p else None,
            peer_listen=peer_listen,
            control_listen=None if control_listen == "none" else control_listen,
            advertise=advertise,
            rack=rack,
            upload_limit_bytes_s=upload_limit,
            download_limit_bytes_s=download_limit,
            prefetch=prefetch,
            prefetch_memory_bytes=prefetch_memory,
            nova=nova,
            complete_after_s=complete_after,
            hydrate_bytes_s=hydrate,
            policy=policy and policy.absolute(),
        )
        _check_key(settings)
        if not detach:
            run(settings)
        report = run_detached(settings)
        emit(as_json, report, lambda: console.print(f"images of {report['origin']} are in {report['mount']}"))


def _refuse_settings(order: str) -> None:
    """An agent that runs keeps its settings: nobody shall believe that it took others. Raises Usage."""
    context = click.get_current_context()
    for option in context.command.params:
        given = context.get_parameter_source(str(option.name)) is ParameterSource.COMMANDLINE
        if given and isinstance(option, click.Option) and option.name not in _ORDERS:
            raise Usage(
                f"{order} leaves the settings as they are; without {option.opts[0]}, or stop the agent and start it anew"
            )


def check_policy(path: Path) -> None:
    """Raises Usage: an agent would not follow it."""
    try:
        parse_policy(path.read_text())
    except OSError as error:
        raise Usage(f"{path}: {error.strerror}") from None
    except Usage as error:
        raise Usage(f"{path}: {error}") from None


def _tracker(origin: str, tracker: str | None, key_file: Path | None) -> str | None:
    """The tracker that was named, or that of the origin if there is a key to talk to peers with."""
    if tracker is None and key_file is not None and origin.startswith(HTTP):
        return origin
    return tracker


def _check_key(settings: AgentSettings) -> None:
    """Ask the server once whether it takes our key, before images fail to open for the want of it.

    Raises:
        NotPermitted: it does not.
        Usage, NotFound, CorruptFile: the tracker's URL or the key is wrong.
    """
    server = settings.tracker or settings.origin
    key = load_key(settings.cluster_key)
    if not server.startswith(HTTP):
        return
    with contextlib.suppress(OriginUnavailable, NotFound, Failure):  # The agent begins without them, if it must.
        asyncio.run(ask_tracker(server, key, CHECK_S))


def _print_stopped(report: dict[str, Any]) -> None:
    console.print(f"stopped; {report['mount']} is unmounted")
    still_open = [image for image in report["images"] if image["open"]]
    if still_open:
        names = ", ".join(image["name"] or image["image_id"] for image in still_open)
        console.print(f"it was in use: who had {names} open reads errors from now on")
    if any(image["materialized"] for image in still_open) and report["kernel"]["passthrough"]:
        console.print("but for those who opened a local copy: the kernel goes on reading it for them")


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
    swarm = report["swarm"]
    if swarm is not None:
        state = {True: "", False: ", which does not answer", None: ", not asked yet"}[swarm["tracker_reachable"]]
        console.print(f"swarm    node {swarm['node_id'][:8]}, tracker {swarm['tracker']}{state}")
        for found in swarm["swarms"]:
            console.print(f"swarm    {found['image_id'][:12]}: {found['members']} nodes")
    ahead = report["prefetch"]
    if ahead is not None and (ahead["chunks"] or ahead["misses"] or ahead["boots_sent"]):
        console.print(
            f"prefetch {ahead['chunks']} chunks, {size_text(ahead['bytes'])}: {ahead['hits']} read so far, "
            f"{ahead['wasted']} not; {ahead['misses']} misses; {size_text(ahead['pushed_bytes'])} in the page cache; "
            f"{ahead['boots_sent']} boots learned"
        )
    for order in report["ahead"]["orders"]:
        done, total = size_text(order["done_bytes"]), size_text(order["total_bytes"])
        console.print(f"precache {order['image_id'][:12]} {order['what']}: {done} of {total}")
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
                ("local copy" if image["materialized"] else "on demand") + (", pinned" if image["pinned"] else ""),
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
