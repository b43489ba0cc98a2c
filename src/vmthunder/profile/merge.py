"""How profiles learn: a boot is merged into the profile of its image; a new version of an image takes its predecessor's. [pure]

Every entry has a *share*, a running mean of "did this boot touch it": 1 ÷ number of boots is the weight of a boot, and
FLOOR once there are many. So a chunk that all of eight boots touched is no longer expected (share < EXPECTED) after seven
that did not, and gone after eighteen; a chunk that one boot of three or more touched is not expected, whatever else it
touched. Times move by the same weight, and never far in one boot: a boot that reads in another order shuffles nothing.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from statistics import median
from typing import Final

from vmthunder.image.manifest import Manifest
from vmthunder.profile.profile import EXPECTED, MAX_BOOT_MS, MAX_ENTRIES, WHOLE, Boot, Entry, Profile, Touch

FLOOR: Final = 1 / 8
"""The least weight of a complete boot."""
PARTIAL: Final = 1 / 4
"""Weight of what an incomplete boot saw, in that of a complete one: nothing it did not see counts against an entry, so
that rare chunks would pile up."""
FORGOTTEN: Final = 100
"""An entry of a smaller share goes."""
LARGE: Final = 4
"""A boot that touches so many times what was expected is believed when a second one does it too."""
CARRIED_BOOTS: Final = 1
"""As of how many boots a carried profile counts at most: what the first boot of the new version adds is expected of the
second, and what its first two do not touch is not any more."""


def merged(profile: Profile | None, boot: Boot, manifest: Manifest) -> Profile:
    """The profile after one more boot. Touches of slices that have no chunk are left out.

    `boot` and `profile` are of the image of `manifest`.
    """
    if profile is None:
        profile = Profile(manifest.image_id, manifest.chunk_bytes, 0, ())
    touches = {touch.index: touch for touch in boot.touches if manifest.row(touch.index) is not None}
    if not touches:
        return profile  # a boot of which nothing was seen, such as from another cache
    weight = max(1 / (profile.boots + 1), FLOOR)
    if profile.boots and not boot.complete:
        weight *= PARTIAL
    scale = _time_scale(profile.entries, touches)
    span_ms = max((entry.at_ms for entry in profile.entries), default=0)

    entries = []
    for entry in profile.entries:
        touch = touches.pop(entry.index, None)
        if touch is not None:
            entries.append(_touched(entry, touch, weight, scale, most_ms=span_ms / 4))
        elif not boot.complete:
            entries.append(entry)
        else:
            share = round(entry.share * (1 - weight))
            if share >= FORGOTTEN:
                entries.append(entry._replace(share=share))
    share = max(round(WHOLE * weight), 1)
    if profile.boots and len(touches) > (LARGE - 1) * len(profile.expected()):
        share = min(share, EXPECTED - 1)
    if share >= FORGOTTEN or not boot.complete:
        entries += (
            Entry(touch.index, min(round(touch.at_ms * scale), MAX_BOOT_MS), share, touch.demand)
            for touch in touches.values()
        )
    return Profile(profile.image_id, profile.chunk_bytes, profile.boots + boot.complete, _bounded(entries))


def _touched(entry: Entry, touch: Touch, weight: float, scale: float, *, most_ms: float) -> Entry:
    apart_ms = max(-most_ms, min(touch.at_ms * scale - entry.at_ms, most_ms))
    return Entry(
        entry.index,
        round(entry.at_ms + weight * apart_ms),
        round(entry.share + weight * (WHOLE - entry.share)),
        touch.demand,
    )


def _time_scale(entries: Iterable[Entry], touches: dict[int, Touch]) -> float:
    """Milliseconds of the profile for one of the boot: hosts are not equally fast, and only the order matters."""
    common = [(entry.at_ms, touches[entry.index].at_ms) for entry in entries if entry.index in touches]
    if not common:
        return 1.0
    usual_ms, now_ms = (median(times) for times in zip(*common, strict=True))
    return usual_ms / now_ms if usual_ms and now_ms else 1.0


def _bounded(entries: list[Entry]) -> tuple[Entry, ...]:
    """By typical time; where there are too many, those that most boots touch."""
    if len(entries) > MAX_ENTRIES:
        entries = sorted(entries, key=lambda entry: (-entry.share, entry.at_ms, entry.index))[:MAX_ENTRIES]
    return tuple(sorted(entries, key=lambda entry: (entry.at_ms, entry.index)))


def carried(profile: Profile, new: Manifest, old: Manifest) -> Profile:
    """The profile that a new version of an image starts with. `old` is the manifest that `profile` is of.

    A chunk that is in the new version is found by its id, wherever it is now; one that is not, by its place, moved as far as
    the nearest chunk before or after it that was found.
    """
    places: Iterable[tuple[Entry, Iterable[int]]]
    if new.chunk_bytes != old.chunk_bytes:
        places = ((entry, _same_bytes(entry.index, new, old)) for entry in profile.entries)
    else:
        places = _places(profile, new, old)
    found: dict[int, Entry] = {}
    for entry, indices in places:
        for index in indices:
            if index not in found and new.row(index) is not None:
                found[index] = entry._replace(index=index)
    boots = min(profile.boots, CARRIED_BOOTS)
    return Profile(new.image_id, new.chunk_bytes, boots, _bounded(list(found.values())))


def _places(profile: Profile, new: Manifest, old: Manifest) -> Iterator[tuple[Entry, tuple[int]]]:
    moved: dict[int, int] = {}
    by_index = sorted(entry.index for entry in profile.entries)
    shift = 0
    for index in by_index:
        row = old.row(index)
        if row is None:
            continue
        # A chunk may be in an image many times; the one that moved as its neighbour did is the one that is meant.
        there = new.row(index + shift) if index + shift >= 0 else None
        if there is None or there.chunk_id != row.chunk_id:
            there = new.find(row.chunk_id)
        if there is not None:
            moved[index] = there.index
            shift = there.index - index
    anchors = sorted(moved)
    for entry in profile.entries:
        place = moved.get(entry.index)
        if place is None:
            place = entry.index + _shift(entry.index, anchors, moved)
        if place >= 0:
            yield entry, (place,)


def _shift(index: int, anchors: list[int], moved: dict[int, int]) -> int:
    """How far the nearest of the chunks that were found has moved."""
    at = bisect_left(anchors, index)
    near = min(anchors[max(at - 1, 0) : at + 1], key=lambda anchor: abs(anchor - index), default=None)
    return 0 if near is None else moved[near] - near


def _same_bytes(index: int, new: Manifest, old: Manifest) -> range:
    """Slices of the new version, of another size, that hold the bytes of an old one."""
    begin = index * old.chunk_bytes
    return range(begin // new.chunk_bytes, -(-(begin + old.chunk_bytes) // new.chunk_bytes))
