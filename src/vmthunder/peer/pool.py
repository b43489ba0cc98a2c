"""Connections to peers: one each, made when it is first needed, by whoever needs it first.

Owns the links of this node. Remembers nothing of peers that could not be reached: the ranking of sources does. Belongs to
one event loop.
"""

import asyncio
from typing import Final, Protocol

from vmthunder.ids import NodeId
from vmthunder.peer.answer import Answerer
from vmthunder.peer.frames import Reason
from vmthunder.peer.link import Link, dial, listen

DIAL_S: Final = 2.0
"""A peer that does not finish the handshake within it is asked later."""


class Address(Protocol):
    """Who is where."""

    @property
    def node(self) -> NodeId: ...
    @property
    def host(self) -> str: ...
    @property
    def port(self) -> int: ...


class Pool:
    """The links of one node."""

    def __init__(self, key: bytes, node: NodeId) -> None:
        """`key` is from `key.cluster_key`."""
        self._key = key
        self._node = node
        self._answerer: Answerer | None = None
        self._links: dict[NodeId, Link] = {}
        self._dials: dict[NodeId, asyncio.Task[Link]] = {}
        self._server: asyncio.Server | None = None

    async def open(self, host: str, port: int, answerer: Answerer) -> int:
        """Accept peers, and answer those we reach too; returns the real port. Call first. Raises OSError."""
        self._answerer = answerer
        self._server = await listen(host, port, self._key, self._node, answerer, self._adopt)
        real_port: int = self._server.sockets[0].getsockname()[1]
        return real_port

    def get(self, node: NodeId) -> Link | None:
        """An open link to a peer, if there is one."""
        return self._links.get(node)

    async def reach(self, peer: Address) -> Link:
        """An open link to a peer, made if need be; many callers share one attempt.

        Raises:
            LinkLost, ProtocolError: it cannot be reached, or is not who it should be.
        """
        link = self._links.get(peer.node)
        if link is not None:
            return link
        attempt = self._dials.get(peer.node)
        if attempt is None:
            attempt = self._dials[peer.node] = asyncio.create_task(self._dial(peer))
            attempt.add_done_callback(lambda task: self._dialled(peer.node, task))
        # A caller that is cancelled must not take the others' attempt with it.
        return await asyncio.shield(attempt)

    def drop(self, node: NodeId, reason: Reason) -> None:
        """Say goodbye to a peer."""
        link = self._links.get(node)
        if link is not None:
            link.close(reason)

    def __len__(self) -> int:
        return len(self._links)

    async def close(self) -> None:
        """Say goodbye to all."""
        if self._server is not None:
            self._server.close()
        for attempt in self._dials.values():
            attempt.cancel()
        for link in list(self._links.values()):
            link.close()
        await asyncio.gather(*self._dials.values(), return_exceptions=True)

    async def _dial(self, peer: Address) -> Link:
        assert self._answerer is not None
        link = await dial(peer.host, peer.port, self._key, self._node, self._answerer, timeout_s=DIAL_S)
        self._adopt(link)
        return link

    def _dialled(self, node: NodeId, attempt: "asyncio.Task[Link]") -> None:
        del self._dials[node]
        if not attempt.cancelled():
            attempt.exception()  # every caller may have gone meanwhile

    def _adopt(self, link: Link) -> None:
        """A link is open. Where there are two to one peer the newer one is used: it may have replaced a dead one."""
        peer = link.peer
        if peer is None or link.closed.done():
            return
        self._links[peer] = link

        def gone(_: object) -> None:
            if self._links.get(peer) is link:
                del self._links[peer]

        link.closed.add_done_callback(gone)
