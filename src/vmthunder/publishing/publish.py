"""A source becomes a published image: chunks, packs, manifest, and last of all the ref that makes it visible.

Until the ref is put nothing that was there is changed and nothing new can be seen, so a publish may die anywhere. What
it stored by then is found by the next run through the packs' footers, or removed by gc.
"""

import contextlib
import os
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, NamedTuple

from vmthunder.errors import Corrupt, NotFound
from vmthunder.ids import ImageId, ImageName, digest
from vmthunder.image.chunk import DEFAULT_CHUNK_BYTES, DEFAULT_LEVEL, check_chunk_bytes
from vmthunder.image.manifest import Manifest, ManifestBuilder
from vmthunder.origin.index import KnownChunks
from vmthunder.origin.lock import publish_lease
from vmthunder.origin.origin import Origin
from vmthunder.origin.ref import Ref
from vmthunder.profile import store
from vmthunder.profile.merge import carried
from vmthunder.profile.profile import CorruptProfile
from vmthunder.publishing.download import Watch
from vmthunder.publishing.encoding import encode_source
from vmthunder.publishing.packing import Occurrence, PackWriter
from vmthunder.publishing.source import Source

MAX_THREADS: Final = 32
"""Unless told otherwise: what is done for each chunk under the interpreter's lock leaves no work for more."""


@dataclass(frozen=True)
class Published:
    """What a publish did. Sizes in bytes."""

    name: ImageName
    image_id: ImageId
    virtual_bytes: int
    allocated_bytes: int
    """Of the disk, in slices that are not zero."""
    new_bytes: int
    """Of those, in slices whose chunk the origin did not have."""
    stored_bytes: int
    """Written to the origin: packs and manifest."""
    elapsed_s: float
    unchanged: bool
    """The name meant these very contents before."""


async def publish(
    source: Source,
    name: ImageName,
    origin: Origin,
    *,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    level: int = DEFAULT_LEVEL,
    threads: int | None = None,
    watch: Watch | None = None,
) -> Published:
    """Publish an open source under a name, which from then on means this image.

    Args:
        source: stays open; the caller closes it.
        name: replaced if it exists.
        origin: must be writable.
        chunk_bytes: a power of two.
        level: of zstd.
        threads: that read and encode; None: one for each CPU, up to MAX_THREADS.
        watch: called with bytes of the source done and in all.

    Raises:
        Conflict: the source changed while it was read, or gc runs.
        Usage, Failure, NoSpace, NotPermitted, OriginUnavailable
    """
    began_s = time.monotonic()
    check_chunk_bytes(chunk_bytes)
    builder = ManifestBuilder(source.virtual_bytes, chunk_bytes)
    threads = threads or min(len(os.sched_getaffinity(0)), MAX_THREADS)
    allocated_bytes = new_bytes = encoded_bytes = 0
    async with publish_lease(origin) as lease, KnownChunks.refreshed(origin) as known:
        packs = PackWriter(origin, known)
        try:
            async with contextlib.aclosing(encode_source(source, chunk_bytes, level, threads)) as spans:
                async for span in spans:
                    for index, slice_bytes, encoded in span.chunks:
                        place = await packs.place(encoded)
                        builder.add(index, encoded.chunk_id, len(encoded.data), place.pack_number, place.offset)
                        allocated_bytes += slice_bytes
                        if place.occurrence is not Occurrence.REPEATED:
                            encoded_bytes += len(encoded.data)
                        if place.occurrence is Occurrence.NEW:
                            new_bytes += slice_bytes
                    if watch is not None:
                        watch(span.end, source.virtual_bytes)
            manifest = builder.finish(await packs.finish())
            if watch is not None:
                watch(source.virtual_bytes, source.virtual_bytes)  # it may end with a hole
        except BaseException:
            await packs.abandon()
            raise
        source.check_unchanged()
        now = Manifest.decode(manifest, ImageId(digest(manifest)))
        before = await _predecessor(origin, name)
        unchanged = before is not None and _same(before.manifest, now) and known.has(before.manifest.packs)
        if before is not None and unchanged:
            ref = before.ref
        else:
            if before is not None:
                await _carry_profile(origin, before.manifest, now)
            ref = Ref(
                name=name,
                image_id=await origin.put_manifest(manifest),
                virtual_bytes=source.virtual_bytes,
                chunk_bytes=chunk_bytes,
                allocated_bytes=allocated_bytes,
                stored_bytes=encoded_bytes,
                published_at=datetime.now(UTC).isoformat(timespec="seconds"),
            )
            lease.require()
            await origin.put_ref(ref)
    return Published(
        name=name,
        image_id=ref.image_id,
        virtual_bytes=source.virtual_bytes,
        allocated_bytes=allocated_bytes,
        new_bytes=new_bytes,
        stored_bytes=packs.stored_bytes + (0 if unchanged else len(manifest)),
        elapsed_s=time.monotonic() - began_s,
        unchanged=unchanged,
    )


class _Predecessor(NamedTuple):
    """What a name meant before."""

    ref: Ref
    manifest: Manifest


async def _predecessor(origin: Origin, name: ImageName) -> _Predecessor | None:
    try:
        ref = await origin.ref(name)
        return _Predecessor(ref, await origin.manifest(ref.image_id))
    except (NotFound, Corrupt):
        return None  # a damaged one is replaced


def _same(before: Manifest, now: Manifest) -> bool:
    """Whether both are of the same contents.

    The manifests may differ all the same: a chunk that is in two packs may be named in either.
    """
    if (before.virtual_bytes, before.chunk_bytes, before.row_count) != (
        now.virtual_bytes,
        now.chunk_bytes,
        now.row_count,
    ):
        return False
    return all(a.index == b.index and a.chunk_id == b.chunk_id for a, b in zip(before.rows(), now.rows(), strict=True))


async def _carry_profile(origin: Origin, before: Manifest, now: Manifest) -> None:
    """Let the new version start with what is known of the old one, unless its own boots are known already."""
    try:
        known = await store.load(origin, now.image_id)
        profile = await store.load(origin, before.image_id)
    except CorruptProfile:
        return  # a new one is learned
    if known is None and profile is not None:
        await store.save(origin, carried(profile, now, before))
