"""What a profile says to people: totals, and a row for each second of the boot. [pure]"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

from vmthunder.image.manifest import Manifest
from vmthunder.profile.profile import CorruptProfile, Entry, Profile


@dataclass(frozen=True, slots=True)
class Second:
    """What boots first touch in one second."""

    second: int
    chunks: int
    read_bytes: int
    """Of the disk."""
    fetch_bytes: int
    """Encoded: what crosses the network."""
    demand_chunks: int
    """That a guest waited for."""


@dataclass(frozen=True, slots=True)
class Summary:
    """A profile in figures."""

    boots: int
    chunks: int
    """That are expected of the next boot."""
    rare_chunks: int
    """That too few boots touched to be expected."""
    read_bytes: int
    fetch_bytes: int
    span_ms: int
    """From the first to the last touch that is expected."""
    seconds: tuple[Second, ...]
    """In which something is touched."""


def summary(profile: Profile, manifest: Manifest) -> Summary:
    """Figures of a profile. Raises CorruptProfile: it does not fit the image."""
    check_fits(profile, manifest)
    expected = profile.expected()
    seconds = tuple(
        _second(number, entries, manifest) for number, entries in groupby(expected, lambda entry: entry.at_ms // 1000)
    )
    return Summary(
        boots=profile.boots,
        chunks=len(expected),
        rare_chunks=len(profile.entries) - len(expected),
        read_bytes=sum(second.read_bytes for second in seconds),
        fetch_bytes=sum(second.fetch_bytes for second in seconds),
        span_ms=expected[-1].at_ms if expected else 0,
        seconds=seconds,
    )


def check_fits(profile: Profile, manifest: Manifest) -> None:
    """Raises CorruptProfile: it names chunks that the image does not have."""
    for entry in profile.entries:
        if manifest.row(entry.index) is None:
            raise CorruptProfile(f"the profile names chunk {entry.index}, which the image does not have")


def _second(number: int, entries: Iterable[Entry], manifest: Manifest) -> Second:
    chunks = read_bytes = fetch_bytes = demand_chunks = 0
    for entry in entries:
        row = manifest.row(entry.index)
        assert row is not None
        chunks += 1
        read_bytes += manifest.slice_bytes(entry.index)
        fetch_bytes += row.encoded_bytes
        demand_chunks += entry.demand
    return Second(number, chunks, read_bytes, fetch_bytes, demand_chunks)
