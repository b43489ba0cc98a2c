"""Garbage collection: removes what no ref reaches, and what publishers that died have left.

Holds the origin's exclusive lock, so nobody can be about to name what is removed here. If anything that a ref reaches
cannot be read, nothing at all is removed: what it would have reached is unknown.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from vmthunder.errors import Corrupt, NotFound
from vmthunder.ids import ImageId, PackId
from vmthunder.origin.damage import remove_stale_marks
from vmthunder.origin.directory import remove_scratch
from vmthunder.origin.lock import Lease, gc_lock, remove_dead
from vmthunder.origin.origin import Origin, PackInfo

DELETES_AT_ONCE: Final = 16


@dataclass(frozen=True, slots=True)
class Collected:
    """What was removed, or would be."""

    packs: int
    pack_bytes: int
    manifests: int
    profiles: int
    locks: int
    kept_packs: int
    kept_bytes: int
    dry_run: bool
    elapsed_s: float


async def collect(
    origin: Origin, *, dry_run: bool = False, watch: Callable[[int, int], None] = lambda _done, _total: None
) -> Collected:
    """Remove what no ref reaches; `watch` is told objects removed and in all.

    Raises:
        Conflict: somebody publishes or collects.
        Corrupt, NotFound: what a ref reaches is damaged; publish that image again, or remove its name.
        OriginUnavailable, NotPermitted
    """
    began_s = time.monotonic()
    async with gc_lock(origin) as lease:
        images, packs = await _reached(origin)
        all_packs = await origin.packs()
        litter = [info for info in all_packs if info.pack not in packs]
        manifests = [image_id for image_id in await origin.manifests() if image_id not in images]
        profiles = [image_id for image_id in await origin.profiles() if image_id not in images]
        locks = 0
        if not dry_run:
            # Manifests first: a manifest whose packs are gone is worse than packs without a manifest.
            await _delete(origin, lease, manifests, profiles, litter, watch)
            await remove_stale_marks(origin, [info for info in all_packs if info.pack in packs])
            locks = await remove_dead(origin)
            if origin.directory is not None:
                await asyncio.to_thread(remove_scratch, origin.directory)
    litter_bytes = sum(info.size_bytes for info in litter)
    return Collected(
        packs=len(litter),
        pack_bytes=litter_bytes,
        manifests=len(manifests),
        profiles=len(profiles),
        locks=locks,
        kept_packs=len(all_packs) - len(litter),
        kept_bytes=sum(info.size_bytes for info in all_packs) - litter_bytes,
        dry_run=dry_run,
        elapsed_s=time.monotonic() - began_s,
    )


async def _reached(origin: Origin) -> tuple[set[ImageId], set[PackId]]:
    images: set[ImageId] = set()
    packs: set[PackId] = set()
    for ref in await origin.refs():
        if ref.image_id in images:
            continue
        try:
            manifest = await origin.manifest(ref.image_id)
        except (Corrupt, NotFound) as error:
            raise type(error)(
                f"nothing was removed, because image {ref.name} is damaged ({error}); publish it again, or rm it"
            ) from None
        images.add(ref.image_id)
        packs.update(manifest.packs)
    return images, packs


async def _delete(
    origin: Origin,
    lease: Lease,
    manifests: list[ImageId],
    profiles: list[ImageId],
    packs: list[PackInfo],
    watch: Callable[[int, int], None],
) -> None:
    done, total = 0, len(manifests) + len(profiles) + len(packs)
    for delete, images in ((origin.delete_manifest, manifests), (origin.delete_profile, profiles)):
        for image_id in images:
            lease.require()
            await delete(image_id)
            done += 1
            watch(done, total)
    for at in range(0, len(packs), DELETES_AT_ONCE):
        lease.require()
        some = packs[at : at + DELETES_AT_ONCE]
        await asyncio.gather(*(origin.delete_pack(info.pack) for info in some))
        done += len(some)
        watch(done, total)
