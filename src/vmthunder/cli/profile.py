"""`vmthunder profile`: what is known of the boots of an image."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import click
from rich.table import Table

from vmthunder.cli.cluster_key import cluster_key_option, open_origin
from vmthunder.cli.images import origin_option
from vmthunder.cli.output import console, emit, json_option, size_text
from vmthunder.errors import Failure, NotFound
from vmthunder.ids import image_name
from vmthunder.image.manifest import Manifest
from vmthunder.origin.origin import Origin
from vmthunder.profile import store
from vmthunder.profile.picture import check_suffix, draw
from vmthunder.profile.profile import MAX_ENCODED_BYTES, CorruptProfile, Profile
from vmthunder.profile.summary import Second, check_fits, summary

FILE = click.Path(path_type=Path, dir_okay=False)


class _Known(NamedTuple):
    """An image and its profile."""

    manifest: Manifest
    profile: Profile


@click.group()
def profile() -> None:
    """What is known of the boots of an image: which chunks they touch, and in which order.

    Agents tell a `vmthunder server` of each boot; what boots have in common is prefetched in the next one. A new version
    of an image starts with the profile of the version before. Nobody has to do anything for it.
    """


@profile.command()
@click.argument("name")
@origin_option
@cluster_key_option
@json_option
def show(name: str, origin_url: str, cluster_key: Path | None, as_json: bool) -> None:
    """Show what boots of image NAME read, second by second."""
    known = asyncio.run(_known(open_origin(origin_url, cluster_key), name))
    found = summary(known.profile, known.manifest)

    def human() -> None:
        console.print(
            f"{name}: {found.boots} boots; {found.chunks} chunks of {size_text(found.read_bytes)}, "
            f"{size_text(found.fetch_bytes)} to fetch, in {found.span_ms / 1000:.1f} s; "
            f"{found.rare_chunks} more that few boots touch"
        )
        console.print(_table(found.seconds))

    emit(as_json, {"name": name, "image_id": known.manifest.image_id.hex(), **asdict(found)}, human)


def _table(seconds: tuple[Second, ...]) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("SECOND", "CHUNKS", "WAITED FOR", "READ", "FETCH", "FETCH SO FAR"):
        table.add_column(heading, justify="right")
    so_far_bytes = 0
    for each in seconds:
        so_far_bytes += each.fetch_bytes
        sizes = map(size_text, (each.read_bytes, each.fetch_bytes, so_far_bytes))
        table.add_row(str(each.second), str(each.chunks), str(each.demand_chunks), *sizes)
    return table


@profile.command()
@click.argument("name")
@click.option("--output", "-o", type=FILE, help="File to write.  [default: NAME.profile]")
@origin_option
@cluster_key_option
@json_option
def export(name: str, output: Path | None, origin_url: str, cluster_key: Path | None, as_json: bool) -> None:
    """Write the profile of image NAME to a file."""
    known = asyncio.run(_known(open_origin(origin_url, cluster_key), name))
    path = output or Path(f"{name}.profile")
    with _one_line(path):
        path.write_bytes(known.profile.encode())
    emit(as_json, {"name": name, "file": str(path)}, lambda: console.print(f"profile of {name} is in {path}"))


@profile.command("import")
@click.argument("name")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False, exists=True))
@origin_option
@json_option
def import_(name: str, file: Path, origin_url: str, as_json: bool) -> None:
    """Replace the profile of image NAME by one that was exported.

    It must be of the very image that NAME means. Needs the directory or bucket itself as the origin.
    """
    with _one_line(file), file.open("rb") as stream:
        data = stream.read(MAX_ENCODED_BYTES + 1)
    imported = asyncio.run(_import(Origin.open(origin_url), name, file, data))
    emit(
        as_json,
        {"name": name, "boots": imported.boots, "chunks": len(imported.expected())},
        lambda: console.print(f"profile of {name}: {imported.boots} boots, {len(imported.expected())} chunks"),
    )


async def _import(origin: Origin, name: str, file: Path, data: bytes) -> Profile:
    manifest = await origin.manifest((await origin.ref(image_name(name))).image_id)
    try:
        imported = Profile.decode(data, manifest.image_id)
        check_fits(imported, manifest)
    except CorruptProfile as error:
        raise CorruptProfile(f"{file} is no profile of image {name}: {error}") from None
    await store.save(origin, imported)
    return imported


@profile.command()
@click.argument("name")
@origin_option
@json_option
def reset(name: str, origin_url: str, as_json: bool) -> None:
    """Forget what is known of the boots of image NAME. The next boots are learned anew.

    Needs the directory or bucket itself as the origin.
    """
    asyncio.run(_reset(Origin.open(origin_url), name))
    emit(as_json, {"reset": name}, lambda: console.print(f"profile of {name} is forgotten"))


async def _reset(origin: Origin, name: str) -> None:
    ref = await origin.ref(image_name(name))
    await origin.delete_profile(ref.image_id)


@profile.command()
@click.argument("name")
@click.option("--output", "-o", type=FILE, help="FILE.html, .png, .svg or .pdf.  [default: NAME.html]")
@origin_option
@cluster_key_option
@json_option
def plot(name: str, output: Path | None, origin_url: str, cluster_key: Path | None, as_json: bool) -> None:
    """Draw where on the disk boots of image NAME read, over time.

    A page (.html) needs nothing else and tells of the chunk under the pointer; pictures need matplotlib.
    """
    path = output or Path(f"{name}.html")
    check_suffix(path)
    known = asyncio.run(_known(open_origin(origin_url, cluster_key), name))
    check_fits(known.profile, known.manifest)
    with _one_line(path):
        draw(known.profile, name, known.manifest.virtual_bytes, path)
    emit(as_json, {"name": name, "file": str(path)}, lambda: console.print(f"drawn: {path}"))


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """What the file system says of the operator's file."""
    try:
        yield
    except OSError as error:
        raise Failure(f"{path}: {error.strerror or error}") from None


async def _known(origin: Origin, name: str) -> _Known:
    """Raises NotFound: no such image, or nothing is known of its boots."""
    ref = await origin.ref(image_name(name))
    found = await store.load(origin, ref.image_id)
    if found is None:
        raise NotFound(f"nothing is known of boots of {name}; agents of a `vmthunder server` tell it when they boot it")
    return _Known(await origin.manifest(ref.image_id), found)
