"""This node among its peers: what it takes from them, what it gives them, and over which connections.

Puts together the source that a fetcher reads from, the relay that answers peers, and the pool of links. Belongs to the event
loop.
"""

import errno
from collections.abc import Awaitable, Callable
from typing import Any, Final

from vmthunder.errors import Conflict, NotPermitted, Usage
from vmthunder.ids import ImageId, NodeId
from vmthunder.image.manifest import Manifest
from vmthunder.node.cache import ChunkCache
from vmthunder.node.fetch import Fetcher
from vmthunder.node.limits import RateLimit
from vmthunder.node.relay import Relay
from vmthunder.node.source import OriginSource
from vmthunder.node.swarmsource import SwarmSource
from vmthunder.peer.pool import Pool
from vmthunder.swarm.view import Roster


class Peering:
    """Give `source` to a fetcher, then `open`."""

    def __init__(
        self,
        key: bytes,
        node: NodeId,
        origin: OriginSource,
        roster: Callable[[ImageId], Roster | None],
        *,
        upload_bytes_s: float = 0,
        download_bytes_s: float = 0,
    ) -> None:
        """`roster` gives the last known view of the swarm of an image. A limit of 0 is none."""
        self._pool = Pool(key, node)
        self._roster = roster
        self._upload = RateLimit(upload_bytes_s)
        self._relay: Relay | None = None
        self.source: Final = SwarmSource(node, roster, self._pool, origin, RateLimit(download_bytes_s))

    async def open(
        self,
        host: str,
        port: int,
        fetcher: Fetcher,
        cache: ChunkCache,
        manifest: Callable[[ImageId], Awaitable[Manifest]],
    ) -> int:
        """Accept peers; returns the real port.

        Raises:
            Conflict, NotPermitted, Usage: this address cannot be listened at.
        """

        async def of_our_swarms(image: ImageId) -> Manifest | None:
            # A stranger with the key must not make this node ask the origin for just anything.
            return await manifest(image) if self._roster(image) is not None else None

        self._relay = Relay(fetcher, cache, of_our_swarms, self._upload)
        try:
            return await self._pool.open(host, port, self._relay)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise Conflict(f"port {port} of {host} is in use; choose another with --peer-listen") from None
            if error.errno == errno.EACCES:
                raise NotPermitted(f"port {port} of {host} needs root") from None
            raise Usage(f"cannot listen for peers at {host}:{port}: {error.strerror or error}") from None

    async def close(self) -> None:
        """Say goodbye to all peers."""
        await self._pool.close()

    def status(self) -> dict[str, Any]:
        """For `vmthunder status`."""
        return {
            "links": len(self._pool),
            "sent_bytes": self._relay.sent_bytes if self._relay else 0,
            "refused": self._relay.refused if self._relay else 0,
            "hedges": self.source.ranking.hedges,
            "left_alone": {node.hex(): times for node, times in self.source.ranking.left_alone.items()},
            "banned": sorted(node.hex() for node in self.source.ranking.banned),
        }
