"""What one boot reads first, in the order in which it does. [pure]

`seen` and `touch` are on the path of every read: a bitmap that C searches, and an append for each chunk that is new. The
kernel reads ahead, and does not say so; a read that goes on where the one before it ended is taken for that.
"""

from typing import Final

from vmthunder.image.manifest import Manifest
from vmthunder.profile.profile import Boot, Touch

SILENCE_S: Final = 8.0
"""A boot that touched nothing new for so long is over."""
AFTER_READY_S: Final = 3.0
"""What a guest still reads after it said that it is ready belongs to the boot."""
MOST_S: Final = 600.0
MOST_TOUCHES: Final = 65_536
FEWEST_TOUCHES: Final = 4
"""Fewer are no boot: somebody looked at the image."""


class Recorder:
    """One boot of one image. Times are seconds of any clock that does not go back."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest: Final = manifest
        self.seen: Final = bytearray(manifest.chunk_count)
        """By index: 1 if the chunk was touched, also after the boot."""
        self.touches: Final[list[Touch]] = []
        self._begin_s = float("inf")
        self._last_s = float("-inf")
        self._end_s = float("inf")
        self._next_offset = -1

    def touch(self, offset: int, end: int, now_s: float, *, direct: bool) -> list[int]:
        """The bytes from `offset` to `end` are read; the chunks that are new."""
        chunk_bytes = self.manifest.chunk_bytes
        first = offset // chunk_bytes
        demand = direct or offset != self._next_offset
        self._next_offset = end
        new = []
        for index in range(first, (end - 1) // chunk_bytes + 1):
            if not self.seen[index]:
                self.seen[index] = 1
                if self.manifest.row(index) is not None:
                    new.append(index)
        if new and not self.is_over(now_s):
            if self._is_look() and now_s - self._last_s > SILENCE_S:
                self._begin_s, self._end_s = now_s, min(self._end_s, now_s + MOST_S)
            at_ms = int((now_s - self._begin_s) * 1000)
            self.touches.extend(Touch(index, at_ms, direct or (demand and index == first)) for index in new)
            self._last_s = now_s
        return new

    def ready(self, now_s: float) -> None:
        """The guest said that it is ready; the first word counts."""
        self._end_s = min(self._end_s, now_s + AFTER_READY_S)

    def is_over(self, now_s: float) -> bool:
        """Whether the boot has settled."""
        silent = not self._is_look() and now_s - self._last_s >= SILENCE_S
        return silent or now_s >= self._end_s or len(self.touches) >= MOST_TOUCHES

    def boot(self, *, complete: bool) -> Boot | None:
        """What was recorded; None if that was no boot."""
        if self._is_look():
            return None
        settled_ms = int((self._last_s - self._begin_s) * 1000)
        return Boot(self.manifest.image_id, tuple(self.touches[:MOST_TOUCHES]), complete, settled_ms)

    def _is_look(self) -> bool:
        """So far somebody only looked at the image."""
        return len(self.touches) < FEWEST_TOUCHES
