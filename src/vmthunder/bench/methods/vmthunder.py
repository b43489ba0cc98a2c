"""VMThunder itself, as it is and with parts of it switched off."""

import asyncio
import time
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Final

from vmthunder.bench.cell import Cell, Setup
from vmthunder.bench.fleet import fleet, serving
from vmthunder.bench.node import publish
from vmthunder.errors import Failure
from vmthunder.ids import image_name
from vmthunder.image.manifest import Manifest
from vmthunder.origin.origin import Origin
from vmthunder.vm.backing import BackingImage

IMAGE: Final = "storm"
_CACHE_BYTES = 4 << 30
_LEARN_S = 60.0
"""A boot is over after some seconds of silence, and sent and stored a little later."""


class Profile(Enum):
    """What is known of the image's boots when the cell begins."""

    NONE = auto()
    """It has never been booted; waits, when all is measured, until the boot has been learned."""
    AS_IT_IS = auto()
    """What the cells before have left."""


@dataclass
class VMThunder:
    """One image server, one agent on each node."""

    name: str
    server_options: tuple[str, ...] = ()
    agent_options: tuple[str, ...] = ()
    profile: Profile = Profile.AS_IT_IS
    _root: Path = field(default=Path(), init=False)

    def absent(self) -> None:
        return None

    def publish(self, disk: Path, work: Path) -> None:
        """All rows share one origin."""
        self._root = work / "origin"
        if not self._root.exists():
            publish(disk, IMAGE, self._root)

    def set_up(self, cell: Cell) -> Setup:
        if self.profile is Profile.NONE:
            asyncio.run(_forget(self._root))
        server = cell.stack.enter_context(serving(cell.cluster, self._root, cell.work, *self.server_options))
        agents = cell.stack.enter_context(fleet(cell.nodes, server.url, cell.work, _CACHE_BYTES, *self.agent_options))
        cell.pids += [server.process.pid, *(node.process.pid for node in agents)]

        def figures() -> dict[str, float]:
            found = _figures([node.client.status() for node in agents])
            if self.profile is Profile.NONE:
                _wait_for_profile(self._root)
            return found

        return Setup([partial(BackingImage.resolve, node.client, IMAGE) for node in agents], figures)


def _figures(statuses: list[dict[str, Any]]) -> dict[str, float]:
    """Bytes of all nodes together, and of the median node what it brought, missed and how long its guest waited."""
    fetches = [status["fetch"] for status in statuses]
    found = {
        f"bytes_from_{source}": float(sum(each[f"bytes_from_{source}"] for each in fetches)) for source in _SOURCES
    }
    found["node_bytes"] = median(each["bytes_fetched"] for each in fetches)
    found["agent_stall_s"] = median(each["stalled_s"] for each in fetches)
    ahead = [status["prefetch"] for status in statuses if status["prefetch"]]
    if ahead:
        found["node_misses"] = median(each["misses"] for each in ahead)
    return found


_SOURCES = ("origin", "peers", "cache")


async def image_manifest(root: Path) -> Manifest:
    """Of the image in an origin that `publish` made."""
    origin = Origin.open(str(root))
    return await origin.manifest((await origin.ref(image_name(IMAGE))).image_id)


async def _forget(root: Path) -> None:
    origin = Origin.open(str(root))
    for image in await origin.profiles():
        await origin.delete_profile(image)


def _wait_for_profile(root: Path) -> None:
    deadline_s = time.monotonic() + _LEARN_S
    while not asyncio.run(Origin.open(str(root)).profiles()):
        if time.monotonic() > deadline_s:
            raise Failure(f"no profile was learned within {_LEARN_S:.0f} s of the first storm")
        time.sleep(0.2)
