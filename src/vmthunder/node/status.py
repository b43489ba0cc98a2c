"""What an agent tells about itself: the JSON of `vmthunder status`. Reads everybody's gauges and changes nothing.

Its keys are an interface. Belongs to the event loop.
"""

import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vmthunder import __version__
from vmthunder.fuse.handoff import Handoff
from vmthunder.node.cache import ChunkCache
from vmthunder.node.catalogue import Catalogue
from vmthunder.node.decoded import DecodedChunks
from vmthunder.node.fetch import Fetcher
from vmthunder.node.imagefs import ImageFileSystem
from vmthunder.node.materialized import MaterializedImages
from vmthunder.node.mountstate import MountState
from vmthunder.node.pusher import Pusher
from vmthunder.node.settings import AgentSettings
from vmthunder.node.source import OriginSource
from vmthunder.node.stall import Stall

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Status:
    """Takes the snapshot."""

    def __init__(
        self,
        settings: AgentSettings,
        handoff: Handoff,
        state: MountState,
        files: ImageFileSystem,
        catalogue: Catalogue,
        materialized: MaterializedImages,
        cache: ChunkCache,
        decoded: DecodedChunks,
        fetcher: Fetcher,
        origin: OriginSource,
        pusher: Pusher,
        stall: Stall,
        swarm: Callable[[], dict[str, Any] | None],
        prefetch: Callable[[], dict[str, Any] | None],
        kept: Callable[[], dict[str, Any]],
    ) -> None:
        self._settings = settings
        self._handoff = handoff
        self._state = state
        self._files = files
        self._catalogue = catalogue
        self._materialized = materialized
        self._cache = cache
        self._decoded = decoded
        self._fetcher = fetcher
        self._origin = origin
        self._pusher = pusher
        self._stall = stall
        self._swarm = swarm
        self._prefetch = prefetch
        self._kept = kept

    def snapshot(self) -> dict[str, Any]:
        agreed = self._handoff.negotiated
        ahead = self._kept()
        return {
            "pid": os.getpid(),
            "keeper_pid": self._handoff.keeper_pid if self._handoff.keeper_lives else None,
            "version": __version__,
            "mount": self._handoff.mount.mountpoint,
            "origin": self._settings.origin,
            "uptime_s": round(time.time() - self._state.mounted_at, 3),
            "restarts": self._handoff.restarts,
            "kernel": {"resend": agreed.resend, "passthrough": agreed.passthrough, "store": agreed.store},
            "images": [image | {"pinned": image["image_id"] in ahead["pinned"]} for image in self._images()],
            "cache": self._cache.stats(),
            "decoded": {
                "bytes": self._decoded.used_bytes,
                "budget_bytes": self._decoded.budget_bytes,
                "hits": self._decoded.hits,
            },
            "fetch": asdict(self._fetcher.stats)
            | {"origin_requests": self._origin.requests, "stalled_s": round(self._stall.total_s, 6)},
            "pushed": {"bytes": self._pusher.pushed_bytes, "dropped": self._pusher.dropped},
            "prefetch": self._prefetch(),
            "ahead": ahead,
            "swarm": self._swarm(),
            "waiting": self._catalogue.waiting() + self._fetcher.waiting(),
            "rss_bytes": int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_BYTES,
        }

    def _images(self) -> list[dict[str, Any]]:
        images: dict[bytes, dict[str, Any]] = {}
        for node in self._state.nodes():
            entry = images.setdefault(
                node.image_id,
                {
                    "name": node.name,
                    "image_id": node.image_id.hex(),
                    "current": self._catalogue.name_of(node.image_id) is not None,
                    "open": 0,
                    "virtual_bytes": node.size_bytes,
                    "read_bytes": 0,
                    "materialized": node.image_id in self._materialized,
                },
            )
            entry["open"] += len(node.handles)
            entry["read_bytes"] += self._files.read_bytes(node)
        for image in self._materialized:
            if image not in images:
                name = self._catalogue.name_of(image)
                images[image] = {
                    "name": name,
                    "image_id": image.hex(),
                    "current": name is not None,
                    "open": 0,
                    "virtual_bytes": self._materialized.virtual_bytes(image),
                    "read_bytes": 0,
                    "materialized": True,
                }
        return list(images.values())
