"""Images that are brought to this node before they are used, and images that stay here.

An order is a line in `orders.json` until it is done: whoever gave it may go away, and the next worker goes on with it. What
is pinned is a file of chunk ids, `pins/IMAGE-ID`, which the chunk cache hears of before it recovers. A policy file is
looked at now and then; what it wants is ordered and pinned. Chunks come through `Background`, over the swarm, and yield to
guests. Belongs to the event loop.
"""

import asyncio
import contextlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from vmthunder.errors import NoSpace, NotFound, VMThunderError
from vmthunder.ids import DIGEST_BYTES, Buffer, ChunkId, ImageId
from vmthunder.image.manifest import ChunkRow, Manifest
from vmthunder.node.background import Background
from vmthunder.node.cache import ChunkCache
from vmthunder.node.catalogue import Catalogue
from vmthunder.node.limits import RateLimit
from vmthunder.node.policy import Part, Wanted, parse_policy
from vmthunder.node.prefetch import Profiles

log = logging.getLogger(__name__)

POLICY_S: Final = 5.0
"""How often a policy file is looked at, and the names in it are looked up."""
STORE_S: Final = 0.1
"""For the last chunks of an order to be on disk."""
ROUNDS: Final = 5
"""An order whose chunks do not stay in the cache for so long has no room there."""


class Swarms(Protocol):
    """As `vmthunder.node.imagefs.Swarms`."""

    def use(self, image: ImageId) -> None: ...
    async def settled(self, image: ImageId) -> None: ...


@dataclass(eq=False)
class Order:
    """One image on its way."""

    image: ImageId
    part: Part
    rate_bytes_s: int
    """0: as fast as disturbs nobody."""
    done_bytes: int = 0
    total_bytes: int = 0
    task: "asyncio.Task[None] | None" = None

    def saved(self) -> dict[str, Any]:
        return {"image_id": self.image.hex(), "what": self.part, "rate_bytes_s": self.rate_bytes_s}


def read_pins(directory: Path) -> dict[ImageId, frozenset[ChunkId]]:
    """What is pinned, from disk. A file that was torn by a power loss is dropped."""
    pins = {}
    directory.mkdir(parents=True, exist_ok=True)
    for path in directory.iterdir():
        data = path.read_bytes()
        if len(path.name) == 2 * DIGEST_BYTES and data and len(data) % DIGEST_BYTES == 0:
            pins[ImageId(bytes.fromhex(path.name))] = frozenset(
                ChunkId(data[at : at + DIGEST_BYTES]) for at in range(0, len(data), DIGEST_BYTES)
            )
        else:
            path.unlink()
    return pins


class Orders:
    """Those of one node."""

    def __init__(
        self,
        state_dir: Path,
        pins: dict[ImageId, frozenset[ChunkId]],
        background: Background,
        cache: ChunkCache,
        catalogue: Catalogue,
        profiles: Profiles,
        swarms: Swarms | None,
    ) -> None:
        """`pins` as from `read_pins`, of which the cache knows already."""
        self._file = state_dir / "orders.json"
        self._pin_dir = state_dir / "pins"
        self._background = background
        self._cache = cache
        self._catalogue = catalogue
        self._profiles = profiles
        self._swarms = swarms
        self._pins = pins
        self._orders: dict[tuple[ImageId, Part], Order] = {}
        self._policy: asyncio.Task[None] | None = None

    def start(self, policy: Path | None) -> None:
        """Go on with what the worker before left, and follow the policy."""
        try:
            for fields in json.loads(self._file.read_bytes()):
                image = ImageId(bytes.fromhex(fields["image_id"]))
                self.place(image, Part(fields["what"]), fields["rate_bytes_s"])
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("event=orders_lost file=%s reason=%r", self._file, error)
        if policy is not None:
            self._policy = asyncio.create_task(self._follow(policy))

    async def close(self) -> None:
        """Stop; what is not done stays on disk."""
        tasks = [order.task for order in self._orders.values()] + [self._policy]
        for task in filter(None, tasks):
            task.cancel()
        await asyncio.gather(*filter(None, tasks), return_exceptions=True)

    def place(self, image: ImageId, part: Part, rate_bytes_s: int) -> Order:
        """Bring an image here. One that is being brought goes on as it is."""
        order = self._orders.get((image, part))
        if order is None:
            order = self._orders[image, part] = Order(image, part, rate_bytes_s)
            self._save()
            order.task = asyncio.create_task(self._run(order))
            order.task.add_done_callback(lambda task: self._ended(order, task))
        return order

    async def pin(self, image: ImageId, part: Part) -> int:
        """Keep what is here, or comes here, of an image; how many chunks that are. Takes the place of an earlier pin of it."""
        rows = await self._rows(await self._catalogue.manifest(image), part)
        ids = frozenset(row.chunk_id for row in rows)
        path = self._pin_dir / image.hex()
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(b"".join(ids))
        temporary.replace(path)
        self._pins[image] = ids
        self._tell_cache()
        return len(ids)

    def unpin(self, image: ImageId) -> None:
        """Let an image's chunks be evicted again. Raises NotFound."""
        if self._pins.pop(image, None) is None:
            raise NotFound(f"image {image.hex()} is not pinned on this node")
        (self._pin_dir / image.hex()).unlink(missing_ok=True)
        self._tell_cache()

    def _tell_cache(self) -> None:
        self._cache.pin(frozenset[ChunkId]().union(*self._pins.values()))

    def pinned(self, image: ImageId) -> bool:
        return image in self._pins

    def status(self) -> dict[str, Any]:
        """For `vmthunder status`."""
        return {
            "pinned": [image.hex() for image in self._pins],
            "orders": [
                order.saved() | {"done_bytes": order.done_bytes, "total_bytes": order.total_bytes}
                for order in self._orders.values()
            ],
        }

    async def _run(self, order: Order) -> None:
        manifest = await self._catalogue.manifest(order.image)
        if self._swarms is not None:
            self._swarms.use(order.image)
            await self._swarms.settled(order.image)
        rows = await self._rows(manifest, order.part)
        order.total_bytes = sum(row.encoded_bytes for row in rows)
        if order.total_bytes > self._cache.quota_bytes:
            raise NoSpace(
                f"{order.total_bytes >> 20} MiB do not fit in a chunk cache of {self._cache.quota_bytes >> 20} MiB; "
                "give the agent a larger --cache-size"
            )
        limit = RateLimit(order.rate_bytes_s) if order.rate_bytes_s else None

        def arrived(row: ChunkRow, _slice: Buffer) -> None:
            order.done_bytes += row.encoded_bytes
            if self._swarms is not None:
                self._swarms.use(order.image)  # nobody reads it yet, and others ask this node

        for _ in range(ROUNDS):
            missing = [row for row in rows if row.chunk_id not in self._cache]
            order.done_bytes = order.total_bytes - sum(row.encoded_bytes for row in missing)
            if not missing:
                return
            await self._background.bring(manifest, missing, arrived, limit)
            await asyncio.sleep(STORE_S)
        raise NoSpace("chunks do not stay in the cache: other images need it, or are pinned; see `vmthunder status`")

    async def _rows(self, manifest: Manifest, part: Part) -> Sequence[ChunkRow]:
        """The chunks of a part of an image, each once."""
        found: dict[ChunkId, ChunkRow] = {}
        if part is Part.FULL:
            found = {row.chunk_id: row for row in manifest.rows()}
        else:
            profile = await self._profiles.profile(manifest.image_id)
            if profile is None:
                raise NotFound(
                    f"nothing is known of boots of image {manifest.image_id.hex()}; boot it once, or use --full"
                )
            for entry in profile.expected():
                row = manifest.row(entry.index) if entry.index < manifest.chunk_count else None
                if row is not None:
                    found.setdefault(row.chunk_id, row)
        return list(found.values())

    def _ended(self, order: Order, task: "asyncio.Task[None]") -> None:
        if task.cancelled():
            return  # the next worker goes on
        del self._orders[order.image, order.part]
        self._save()
        error = task.exception()
        if error is None:
            log.info("event=precached image=%s what=%s bytes=%d", order.image.hex(), order.part, order.total_bytes)
        elif isinstance(error, VMThunderError):
            log.error("event=precache_failed image=%s what=%s reason=%s", order.image.hex(), order.part, error)
        else:
            log.critical("event=precache_failed image=%s", order.image.hex(), exc_info=error)

    def _save(self) -> None:
        temporary = self._file.with_suffix(".tmp")
        with contextlib.suppress(OSError):  # a full disk: then a restart forgets it
            temporary.write_text(json.dumps([order.saved() for order in self._orders.values()]))
            temporary.replace(self._file)

    # The policy

    async def _follow(self, path: Path) -> None:
        """Look at the policy for as long as the agent runs."""
        said, kept = "", dict[Wanted, ImageId]()
        wanted: tuple[Wanted, ...] = ()
        while True:
            try:
                wanted, why = parse_policy(path.read_text()), ""
            except (OSError, UnicodeDecodeError, VMThunderError) as error:
                why = str(error)
            failures = [why, *[await self._keep(one, kept) for one in wanted]]
            for one in kept.keys() - set(wanted):
                image = kept.pop(one)
                if image not in kept.values() and self.pinned(image):
                    self.unpin(image)
            line = "; ".join(filter(None, failures))
            if line and line != said:
                log.error("event=policy_not_followed file=%s reason=%s", path, line)
            said = line
            await asyncio.sleep(POLICY_S)

    async def _keep(self, wanted: Wanted, kept: dict[Wanted, ImageId]) -> str:
        """Bring and pin what a name means now; why that cannot be, if so."""
        try:
            image = (await self._catalogue.find(wanted.name)).image_id
            before = kept.get(wanted)
            if before != image:
                await self.pin(image, wanted.part)
                self.place(image, wanted.part, 0)
                kept[wanted] = image
                if before is not None and before not in kept.values() and self.pinned(before):
                    self.unpin(before)
        except VMThunderError as error:
            return str(error)
        return ""
