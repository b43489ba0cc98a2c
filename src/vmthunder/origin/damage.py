"""Packs that were found damaged: marks at the origin, so that what is published later does not build on them.

A pack whose footer is sound may still hold wrong bytes, which only `verify` sees. A marked pack is still read, as its other
chunks are good. A mark is older than a pack that was written again, and then means nothing.
"""

from collections.abc import Iterable
from typing import Final

from vmthunder.ids import PackId, is_hex_digest
from vmthunder.origin.origin import Origin, PackInfo

_PREFIX: Final = "damaged"


async def mark_damaged(origin: Origin, packs: Iterable[PackId]) -> None:
    """Distrust these packs from now on. Raises NotPermitted, NoSpace, OriginUnavailable."""
    for pack in packs:
        await origin.put(f"{_PREFIX}/{pack.hex()}", b"")


async def trusted(origin: Origin, packs: Iterable[PackInfo]) -> list[PackInfo]:
    """Those of `packs` that were not found damaged since they were written."""
    marks = await _marks(origin)
    return [info for info in packs if info.modified_s > marks.get(info.pack, 0.0)]


async def remove_stale_marks(origin: Origin, packs: Iterable[PackInfo]) -> None:
    """Remove the marks that say nothing of `packs`, which are all that the origin has."""
    written_s = {info.pack: info.modified_s for info in packs}
    for pack, marked_s in (await _marks(origin)).items():
        if pack not in written_s or written_s[pack] > marked_s:
            await origin.delete(f"{_PREFIX}/{pack.hex()}")


async def _marks(origin: Origin) -> dict[PackId, float]:
    found = [(key.rpartition("/")[2], marked_s) async for key, _, marked_s in origin.list(_PREFIX)]
    return {PackId(bytes.fromhex(name)): marked_s for name, marked_s in found if is_hex_digest(name)}
