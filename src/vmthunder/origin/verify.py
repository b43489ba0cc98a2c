"""Reads every chunk of an image at its origin and checks it: digest, then decoding; and the footers of its packs. Bounded
memory for any image. Marks the packs it finds damaged, so that publishing the image again repairs it.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from vmthunder.errors import Corrupt, CorruptChunk, NotFound, NotPermitted
from vmthunder.ids import Buffer, ImageName, PackId
from vmthunder.image.chunk import decode, verify
from vmthunder.image.manifest import ChunkRow, Manifest
from vmthunder.origin.damage import mark_damaged
from vmthunder.origin.origin import Origin

RUN_BYTES: Final = 1 << 20
"""Encoded bytes of one read; neighbours in a pack are read together."""
READS_AT_ONCE: Final = 8


@dataclass(frozen=True, slots=True)
class Damage:
    """A chunk that is not what the manifest says."""

    index: int
    offset: int
    """Of the slice in the image, bytes."""
    chunk: str
    pack: str
    why: str


@dataclass(frozen=True, slots=True)
class Verified:
    """What was read."""

    image_id: str
    chunks: int
    """Slices that are not zero."""
    read_bytes: int
    damaged: tuple[Damage, ...]
    footers: tuple[str, ...]
    """What is wrong with footers of packs. Guests do not need them, publishing does."""
    marked: bool
    """Whether publishing knows of the damage now."""

    @property
    def sound(self) -> bool:
        return not self.damaged and not self.footers


async def verify_image(
    origin: Origin, name: ImageName, watch: Callable[[int, int], None] = lambda _done, _total: None
) -> Verified:
    """Check an image; `watch` is told bytes read and in all.

    Raises:
        NotFound, CorruptFile, CorruptManifest: there is no such image, or not even its table can be read.
        OriginUnavailable: nothing can be said about the image.
    """
    ref = await origin.ref(name)
    manifest = await origin.manifest(ref.image_id)
    # A chunk that the image has many times is read once.
    rows = {row.chunk_id: row for row in manifest.rows()}.values()
    ordered = sorted(rows, key=lambda row: (row.pack, row.offset))
    total_bytes = sum(row.encoded_bytes for row in ordered)
    damaged: list[Damage] = []
    footers: dict[PackId, str] = {}
    done_bytes = 0
    runs = _runs(ordered)
    packs = iter(manifest.packs)

    async def work() -> None:
        nonlocal done_bytes
        for run in runs:
            damaged.extend(await _check(origin, manifest, run))
            done_bytes += sum(row.encoded_bytes for row in run)
            watch(done_bytes, total_bytes)
        for pack in packs:
            try:
                await origin.pack_entries(await origin.pack_info(pack))
            except (NotFound, Corrupt) as error:
                footers[pack] = str(error)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(READS_AT_ONCE):
                group.create_task(work())
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    damaged.sort(key=lambda damage: damage.index)
    bad = {*footers, *(PackId(bytes.fromhex(damage.pack)) for damage in damaged)}
    marked = await _mark(origin, bad)
    return Verified(
        ref.image_id.hex(), manifest.row_count, total_bytes, tuple(damaged), tuple(footers.values()), marked
    )


async def _mark(origin: Origin, bad: set[PackId]) -> bool:
    if not bad or not origin.writable:
        return False
    try:
        await mark_damaged(origin, bad)
    except NotPermitted:
        return False
    return True


def _runs(rows: Sequence[ChunkRow]) -> Iterator[list[ChunkRow]]:
    run: list[ChunkRow] = []
    for row in rows:
        if run:
            last = run[-1]
            end = row.offset + row.encoded_bytes - run[0].offset
            if last.pack != row.pack or last.offset + last.encoded_bytes != row.offset or end > RUN_BYTES:
                yield run
                run = []
        run.append(row)
    if run:
        yield run


async def _check(origin: Origin, manifest: Manifest, run: Sequence[ChunkRow]) -> list[Damage]:
    first, last = run[0], run[-1]
    try:
        data = await origin.read_pack(first.pack, first.offset, last.offset + last.encoded_bytes - first.offset)
    except (NotFound, Corrupt) as error:
        if len(run) > 1:
            # The pack may be cut short in the middle of the run.
            return [damage for row in run for damage in await _check(origin, manifest, [row])]
        return [_damage(manifest, first, str(error))]
    return await asyncio.to_thread(_wrong, manifest, run, memoryview(data))


def _wrong(manifest: Manifest, run: Sequence[ChunkRow], data: memoryview) -> list[Damage]:
    damaged = []
    for row in run:
        encoded: Buffer = data[row.offset - run[0].offset :][: row.encoded_bytes]
        if not verify(row.chunk_id, encoded):
            damaged.append(_damage(manifest, row, "its bytes do not match its id"))
            continue
        try:
            decode(encoded, manifest.slice_bytes(row.index))
        except CorruptChunk as error:
            damaged.append(_damage(manifest, row, str(error)))
    return damaged


def _damage(manifest: Manifest, row: ChunkRow, why: str) -> Damage:
    return Damage(row.index, row.index * manifest.chunk_bytes, row.chunk_id.hex(), row.pack.hex(), why)
