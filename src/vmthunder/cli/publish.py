"""`vmthunder publish`."""

import asyncio
import dataclasses

import click
from rich.table import Table

from vmthunder.cli.output import bytes_progress, console, emit, json_option, size_text
from vmthunder.cli.sizes import BYTES
from vmthunder.errors import NotPermitted, Usage
from vmthunder.ids import image_name
from vmthunder.image.chunk import DEFAULT_CHUNK_BYTES, DEFAULT_LEVEL, MAX_LEVEL, MIN_LEVEL, check_chunk_bytes
from vmthunder.origin.origin import Origin
from vmthunder.publishing.formats import DiskFormat
from vmthunder.publishing.publish import Published
from vmthunder.publishing.publish import publish as publish_source
from vmthunder.publishing.source import open_source

GLANCE = "glance:"


@click.command
@click.argument("source")
@click.argument("name", required=False)
@click.option(
    "--origin",
    "origin_url",
    envvar="VMTHUNDER_ORIGIN",
    show_envvar=True,
    required=True,
    metavar="URL",
    help="Where to publish: a directory, which is made if need be, or s3://BUCKET/PREFIX.",
)
@click.option(
    "--format",
    "disk_format",
    type=click.Choice([each.value for each in DiskFormat]),
    default=DiskFormat.AUTO.value,
    help="Format of SOURCE; auto looks at its first bytes.",
)
@click.option(
    "--chunk-size",
    "chunk_bytes",
    type=BYTES,
    default=f"{DEFAULT_CHUNK_BYTES >> 10}KiB",
    help="A power of two, 4KiB to 4MiB.",
)
@click.option("--level", type=click.IntRange(MIN_LEVEL, MAX_LEVEL), default=DEFAULT_LEVEL, help="Of zstd.")
@click.option("--threads", type=click.IntRange(1, 256), help="That read and compress.  [default: one per CPU]")
@json_option
def publish(
    source: str,
    name: str | None,
    origin_url: str,
    disk_format: str,
    chunk_bytes: int,
    level: int,
    threads: int | None,
    as_json: bool,
) -> None:
    """Publish the disk image SOURCE under NAME.

    SOURCE is a raw disk, a block device, a qcow2 (with its backing files), vmdk, vhd, vhdx or vdi, or an http(s) URL
    of one; or glance:ID or glance:NAME, which takes no NAME and is checked as Nova would check it.

    Holes are not read, and only chunks that the origin does not have are stored. Nothing is visible until all
    of it is there; a publish that was interrupted keeps what it has stored when it is started again.

    Give --format raw for disks that a guest could write: it may have written a header of another format there.
    """
    if (name is None) != source.startswith(GLANCE):
        raise Usage("an image of Glance is published as glance-ID; leave NAME out" if name else "give the image a NAME")
    image = image_name(name) if name is not None else None
    check_chunk_bytes(chunk_bytes)
    origin = Origin.open(origin_url, create=True)
    if not origin.writable:  # said before anything is downloaded
        raise NotPermitted(f"{origin.url} can only be read; publish to the directory or bucket behind it")
    with bytes_progress() as progress:
        task = progress.add_task("download" if "://" in source or image is None else "publish", total=None)

        def watch(done: int, total: int | None) -> None:
            progress.update(task, completed=done, total=total)

        if image is None:
            from vmthunder.cli.glance import publish_from_glance  # It takes a second to import.

            published = publish_from_glance(source.removeprefix(GLANCE), origin, watch)
        else:
            with open_source(source, DiskFormat(disk_format), watch) as opened:
                progress.reset(task, description="publish", total=opened.virtual_bytes)
                published = asyncio.run(
                    publish_source(
                        opened, image, origin, chunk_bytes=chunk_bytes, level=level, threads=threads, watch=watch
                    )
                )
    value = dataclasses.asdict(published) | {"image_id": published.image_id.hex()}
    emit(as_json, value, lambda: _show(published))


def _show(published: Published) -> None:
    table = Table(box=None, pad_edge=False)
    for heading in ("IMAGE", "VIRTUAL", "ALLOCATED", "NEW", "STORED", "TIME"):
        table.add_column(heading, justify="left" if heading == "IMAGE" else "right")
    table.add_row(
        published.name + (" (unchanged)" if published.unchanged else ""),
        *map(
            size_text,
            (published.virtual_bytes, published.allocated_bytes, published.new_bytes, published.stored_bytes),
        ),
        f"{published.elapsed_s:.1f} s",
    )
    console.print(table)
