"""This node among others: where it is in swarms, and its links to other nodes. Puts the two together, for the worker.

Belongs to the event loop.
"""

import logging
import random
from collections.abc import Callable, Mapping
from typing import Any

from vmthunder.errors import VMThunderError
from vmthunder.ids import ImageId
from vmthunder.node.backoff import delay_s
from vmthunder.node.cache import ChunkCache
from vmthunder.node.catalogue import Catalogue
from vmthunder.node.fetch import Fetcher
from vmthunder.node.peering import Peering
from vmthunder.node.settings import AgentSettings, parse_address
from vmthunder.node.source import OriginSource
from vmthunder.peer.key import cluster_key
from vmthunder.swarm.identity import node_id
from vmthunder.swarm.key import ClusterKey
from vmthunder.swarm.membership import Membership

log = logging.getLogger(__name__)


class Peers:
    """Give `source` to a fetcher, then `open`."""

    def __init__(
        self, settings: AgentSettings, key: ClusterKey, origin: OriginSource, reads: Callable[[], Mapping[ImageId, int]]
    ) -> None:
        """`reads` counts what was read of the images that are open and not local."""
        assert settings.tracker is not None
        self._address = parse_address(settings.peer_listen, "--peer-listen")
        self._reads = reads
        node = node_id(settings.node_id_file)
        self.membership = Membership(
            settings.tracker,
            key.token,
            node,
            rack=settings.rack,
            host=settings.advertise,
            reads=reads,
            backoff=lambda failures: delay_s(failures, random.random),
        )
        self._peering = Peering(
            cluster_key(key.secret),
            node,
            origin,
            self.membership.roster,
            upload_bytes_s=settings.upload_limit_bytes_s,
            download_bytes_s=settings.download_limit_bytes_s,
        )
        self.source = self._peering.source

    async def open(self, fetcher: Fetcher, cache: ChunkCache, catalogue: Catalogue, *, needed: bool) -> None:
        """Listen for peers, then tell the tracker where. What goes wrong is raised if this is `needed`."""
        host, port = self._address
        try:
            real_port = await self._peering.open(host, port, fetcher, cache, catalogue.manifest)
        except VMThunderError as error:
            if needed:
                raise
            log.critical("event=no_peers reason=%s", error)  # Guests depend on us: the origin has all they need.
            return
        self.membership.start(real_port)
        for image in self._reads():  # those that the worker before us was asked for
            self.membership.use(image)

    async def close(self) -> None:
        await self.membership.close()
        await self._peering.close()

    def status(self) -> dict[str, Any]:
        return self.membership.status() | {"peers": self._peering.status()}
