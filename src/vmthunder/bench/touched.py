"""What a boot needs of an image's stored chunks, and the least that it must wait for them over a link. [pure]"""

from collections.abc import Sequence
from typing import NamedTuple

from vmthunder.image.manifest import Manifest
from vmthunder.lab.trace import Step, think_times_s


class Touch(NamedTuple):
    """The first read of a stored chunk."""

    at_s: float
    """When a guest reads it whose disk answers at once."""
    encoded_bytes: int


def first_touches(steps: Sequence[Step], think_scale: float, manifest: Manifest) -> list[Touch]:
    """In order of time. Chunks of zeros are not stored; equal chunks are stored, and fetched, once."""
    seen = set()
    touches = []
    for at_s, step in sorted(zip(think_times_s(steps, think_scale), steps, strict=True), key=lambda each: each[0]):
        first = step.offset // manifest.chunk_bytes
        last = min(step.offset + step.length_bytes - 1, manifest.virtual_bytes - 1) // manifest.chunk_bytes
        for index in range(first, last + 1):
            row = manifest.row(index)
            if row is not None and row.chunk_id not in seen:
                seen.add(row.chunk_id)
                touches.append(Touch(at_s, row.encoded_bytes))
    return touches


def least_stall_s(touches: Sequence[Touch], bytes_s: float) -> float:
    """Δ*: no method that begins with nothing on the node can hold up the guest for less.

    The first chunk can only be sent when it has been asked for; then the link of `bytes_s` never rests, and brings the
    chunks in the very order in which they are read. The guest must lag so much that none of them is late:
    max over t of (bytes asked by t ÷ rate − t), and the way of the first chunk to the origin's end of the link before.
    """
    if not touches:
        return 0.0
    asked_bytes, lag_s = 0, 0.0
    for touch in touches:
        asked_bytes += touch.encoded_bytes
        lag_s = max(lag_s, asked_bytes / bytes_s - touch.at_s)
    return touches[0].encoded_bytes / bytes_s + lag_s
