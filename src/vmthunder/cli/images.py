"""`vmthunder images`, `verify`, `rm`, `gc`: what is published at an origin."""

import asyncio
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from vmthunder.cli.cluster_key import cluster_key_option, open_origin
from vmthunder.cli.output import bytes_progress, console, emit, json_option, progress_console, size_text
from vmthunder.errors import Corrupt
from vmthunder.ids import image_name
from vmthunder.origin.collect import collect
from vmthunder.origin.origin import Origin
from vmthunder.origin.verify import verify_image

Command = TypeVar("Command", bound=Callable[..., Any])

SHOWN = 10
"""Damaged chunks that are listed one by one."""


def origin_option(command: Command) -> Command:
    """`--origin`, or VMTHUNDER_ORIGIN."""
    return click.option(
        "--origin",
        "origin_url",
        metavar="URL",
        required=True,
        envvar="VMTHUNDER_ORIGIN",
        show_envvar=True,
        help="Directory, http(s)://… or s3://bucket/prefix.",
    )(command)


@click.command()
@origin_option
@cluster_key_option
@json_option
def images(origin_url: str, cluster_key: Path | None, as_json: bool) -> None:
    """List the published images."""
    refs = asyncio.run(open_origin(origin_url, cluster_key).refs())

    def human() -> None:
        table = Table("name", "virtual", "allocated", "stored", "published", "image id", box=None)
        for ref in refs:
            sizes = map(size_text, (ref.virtual_bytes, ref.allocated_bytes, ref.stored_bytes))
            table.add_row(ref.name, *sizes, ref.published_at[:16], ref.image_id.hex()[:16])
        console.print(table if refs else f"no images at {origin_url}")

    emit(as_json, [ref.to_dict() for ref in refs], human)


@click.command()
@click.argument("name")
@origin_option
@cluster_key_option
@json_option
def verify(name: str, origin_url: str, cluster_key: Path | None, as_json: bool) -> None:
    """Read every chunk of image NAME at its origin and check it. Exits with 4 if any is damaged."""
    checked = image_name(name)
    with bytes_progress() as progress:
        bar = progress.add_task(f"verify {name}", total=None)
        origin = open_origin(origin_url, cluster_key)
        found = asyncio.run(
            verify_image(origin, checked, lambda done, total: progress.update(bar, completed=done, total=total))
        )

    def human() -> None:
        for damage in found.damaged[:SHOWN]:
            console.print(
                f"damaged: slice {damage.index} at byte {damage.offset}, chunk {damage.chunk[:16]}: {damage.why}"
            )
        if len(found.damaged) > SHOWN:
            console.print(f"… and {len(found.damaged) - SHOWN} more")
        for why in found.footers[:SHOWN]:
            console.print(f"damaged: {why}")
        if found.sound:
            console.print(f"{name}: {found.chunks} chunks, {size_text(found.read_bytes)} read, all right")

    emit(as_json, {"name": name, **asdict(found)}, human)
    if not found.sound:
        repair = "publish it" if found.marked else "verify it at the directory or bucket itself, then publish it"
        raise Corrupt(
            f"image {name} is damaged ({len(found.damaged)} of {found.chunks} chunks, {len(found.footers)} pack footers); "
            f"{repair} again from its source"
        )


@click.command()
@click.argument("name")
@origin_option
@json_option
def rm(name: str, origin_url: str, as_json: bool) -> None:
    """Remove the name of an image. `vmthunder gc` frees what no other image shares with it."""
    asyncio.run(Origin.open(origin_url).remove_ref(image_name(name)))
    emit(as_json, {"removed": name}, lambda: console.print(f"removed {name}; `vmthunder gc` frees its space"))


@click.command()
@origin_option
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@json_option
def gc(origin_url: str, dry_run: bool, as_json: bool) -> None:
    """Remove what no image name reaches: old versions, removed images, and what interrupted publishes left.

    A guest that still runs on a version without a name loses its disk's unread parts: `vmthunder materialize` it first.
    Refuses while somebody publishes.
    """
    origin = Origin.open(origin_url)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=progress_console, disable=not progress_console.is_terminal) as progress:
        bar = progress.add_task("gc", total=None)
        done = asyncio.run(
            collect(
                origin,
                dry_run=dry_run,
                watch=lambda removed, total: progress.update(bar, completed=removed, total=total),
            )
        )
    verb = "would remove" if dry_run else "removed"
    emit(
        as_json,
        asdict(done),
        lambda: console.print(
            f"{verb} {done.packs} packs ({size_text(done.pack_bytes)}) and {done.manifests} manifests; "
            f"{done.kept_packs} packs ({size_text(done.kept_bytes)}) are in use"
        ),
    )
