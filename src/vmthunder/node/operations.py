"""What an operator, or a program on this host, can ask of a running agent; the handlers behind its socket.

Belongs to the event loop. The keys of the answers are an interface: `vmthunder … --json` prints them.
"""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Final

from vmthunder.errors import Conflict, NotFound
from vmthunder.fuse.handoff import Handoff, Leave
from vmthunder.ids import image_id, is_hex_digest
from vmthunder.node.catalogue import Catalogue
from vmthunder.node.control import Handler, Progress
from vmthunder.node.imagefs import SUFFIX
from vmthunder.node.materialized import MaterializedImages
from vmthunder.node.mountstate import MountState
from vmthunder.node.orders import Orders
from vmthunder.node.policy import Part
from vmthunder.node.prefetch import Prefetcher

BEAT_S: Final = 0.25
"""How often the progress of an order is told."""


class Operations:
    """Handlers; each takes the request and a way to tell progress, and returns the result."""

    def __init__(
        self,
        handoff: Handoff,
        catalogue: Catalogue,
        materialized: MaterializedImages,
        state: MountState,
        status: Callable[[], dict[str, Any]],
        leave: Callable[[Leave], None],
        prefetcher: Prefetcher | None,
        orders: Orders,
    ) -> None:
        self._handoff = handoff
        self._catalogue = catalogue
        self._materialized = materialized
        self._state = state
        self._status = status
        self._leave = leave
        self._prefetcher = prefetcher
        self._orders = orders

    def handlers(self) -> dict[str, Handler]:
        return {
            "status": self.status,
            "resolve": self.resolve,
            "materialize": self.materialize,
            "dematerialize": self.dematerialize,
            "booted": self.booted,
            "precache": self.precache,
            "pin": self.pin,
            "unpin": self.unpin,
            "restart": self.restart,
            "stop": self.stop,
        }

    async def status(self, request: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
        del request, progress
        return self._status()

    async def resolve(self, request: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
        del progress
        manifest = await self._catalogue.find(request["image"])
        image = manifest.image_id
        return {
            "name": self._catalogue.name_of(image),
            "image_id": image.hex(),
            "path": f"{self._handoff.mount.mountpoint}/{image.hex()}{SUFFIX}",
            "virtual_bytes": manifest.virtual_bytes,
        }

    async def materialize(self, request: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
        manifest = await self._catalogue.find(request["image"])

        async def tell(done_bytes: int, total_bytes: int) -> None:
            await progress({"done_bytes": done_bytes, "total_bytes": total_bytes})

        await self._materialized.make(manifest, tell)
        return {"image_id": manifest.image_id.hex(), "virtual_bytes": manifest.virtual_bytes}

    async def dematerialize(self, request: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
        """Refused while the copy is open: its space would not come back before, and a guest might lose its disk."""
        del progress
        text = request["image"]
        image = image_id(text) if is_hex_digest(text) else (await self._catalogue.find(text)).image_id
        if image not in self._materialized:
            raise NotFound(f"image {text} is not materialized on this node")
        if (times := self._state.open_times(image)) > 0:
            raise Conflict(f"image {text} is open {times} times, and read from its local copy; stop those guests first")
        return {"image_id": image.hex(), "freed_bytes": self._materialized.remove(image)}

    async def precache(self, request: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
        """Bring an image here before it is used. Who asked may go away: it goes on."""
        manifest = await self._catalogue.find(request["image"])
        order = self._orders.place(manifest.image_id, Part(request["what"]), int(request["rate_bytes_s"]))
        assert order.task is not None
        while not (await asyncio.wait([order.task], timeout=BEAT_S))[0]:
            await progress({"done_bytes": order.done_bytes, "total_bytes": order.total_bytes})
        order.task.result()
        return order.saved() | {"bytes": order.total_bytes}

    async def pin(self, request: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
        del progress
        image = (await self._catalogue.find(request["image"])).image_id
        return {"image_id": image.hex(), "chunks": await self._orders.pin(image, Part(request["what"]))}

    async def unpin(self, request: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
        del progress
        text = request["image"]
        image = image_id(text) if is_hex_digest(text) else (await self._catalogue.find(text)).image_id
        self._orders.unpin(image)
        return {"image_id": image.hex()}

    async def booted(self, request: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
        """A guest of this image is ready: what it reads from now on is not its boot."""
        del progress
        image = image_id(request["image"])
        if self._prefetcher is not None:
            self._prefetcher.ready(image)
        return {"image_id": image.hex()}

    async def restart(self, request: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
        del request, progress
        if not self._handoff.keeper_lives:
            raise Conflict(
                "this agent's keeper was killed, so nobody could start the next worker; its guests are served until "
                "`vmthunder agent --stop`"
            )
        answer = self._status()
        self._leave(Leave.HANDOVER)
        return answer

    async def stop(self, request: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
        del request, progress
        answer = self._status()
        self._leave(Leave.STOP)
        return answer
