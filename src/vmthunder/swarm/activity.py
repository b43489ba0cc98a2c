"""Which images a node uses, and which it has not used for so long that it leaves their swarms. [pure]

An image is in use when it is opened, and when its counter of reads moves. Time is an argument.
"""

from collections.abc import Iterable, Mapping
from typing import Final

from vmthunder.ids import ImageId

LEAVE_IDLE_S: Final = 600.0


class Activity:
    """When each image was last used. One owner."""

    def __init__(self) -> None:
        self._used_at: dict[ImageId, float] = {}
        self._reads: dict[ImageId, int] = {}

    def use(self, image: ImageId, now: float) -> None:
        """An image is used in this moment."""
        self._used_at[image] = now

    def observe(self, reads: Mapping[ImageId, int], now: float) -> list[ImageId]:
        """Take note of the counters of all open images; those that moved since the last time, or are new and not 0."""
        moved = [image for image, count in reads.items() if count != self._reads.get(image, 0)]
        self._reads = dict(reads)
        for image in moved:
            self.use(image, now)
        return moved

    def leave_idle(self, images: Iterable[ImageId], now: float) -> list[ImageId]:
        """Those that were not used for LEAVE_IDLE_S; they are forgotten."""
        idle = [image for image in images if self._used_at.get(image, now) + LEAVE_IDLE_S <= now]
        for image in idle:
            del self._used_at[image]
        return idle
