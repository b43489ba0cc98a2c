"""A peer that misbehaves, as a process of its own, for `bench faults`:

    python -m vmthunder.bench.hostile HOW TRACKER KEY_FILE ORIGIN IMAGE BYTES_S

It has the cluster key and joins the swarm of the image, so that honest nodes have it as a parent; only what it answers is
wrong. Says `joined NODE_ID` when the tracker knows it, and goes on until it is killed. Belongs to one event loop.
"""

import asyncio
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Final

from vmthunder.ids import NODE_ID_BYTES, ChunkId, NodeId, image_name
from vmthunder.image.manifest import ChunkRow, Manifest
from vmthunder.node.settings import DEFAULT_PEER_LISTEN, parse_address
from vmthunder.origin.origin import Origin
from vmthunder.peer.frames import HEAD_BYTES, NONCE_BYTES, Cancel, Get, RemoteProtocolError, encode_chunk_head
from vmthunder.peer.key import cluster_key
from vmthunder.peer.wire import Conversation, Reply, Role
from vmthunder.swarm.key import ClusterKey
from vmthunder.swarm.membership import Membership

_TOO_LONG_BYTES: Final = (1 << 32) - 1
_GARBAGE_BYTES: Final = 4096
_JOIN_S: Final = 20.0


class How(StrEnum):
    """What is wrong with its answers."""

    LIES = "lies"
    """Bytes of the right length that are not the chunk."""
    SILENT = "silent"
    """None at all, though it answers pings."""
    SLOW = "slow"
    """The right ones, at a stated rate."""
    RESETS = "resets"
    """Half a chunk, then a reset of the connection."""
    GARBAGE = "garbage"
    """No frames."""
    OVERSIZED = "oversized"
    """A chunk of 4 GiB."""


class _Connection(asyncio.BufferedProtocol):
    """One honest node that asks us."""

    def __init__(self, peer: "Hostile") -> None:
        self._peer = peer
        self._talk = Conversation(Role.LISTENER, peer.key, peer.node, os.urandom(NONCE_BYTES))
        self._transport: asyncio.Transport | None = None
        self._owed: dict[int, ChunkRow] = {}
        self._sending: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(self._talk.hello())

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self._owed.clear()
        self._talk.close()
        if self._sending is not None:
            self._sending.cancel()

    def get_buffer(self, sizehint: int) -> memoryview:
        del sizehint
        return self._talk.buffer()

    def buffer_updated(self, nbytes: int) -> None:
        assert self._transport is not None
        if self._transport.is_closing():
            return
        try:
            events = self._talk.received(nbytes)
        except RemoteProtocolError:
            self._transport.abort()
            return
        for event in events:
            match event:
                case Reply(data):
                    self._transport.write(data)
                case Get(request, _, chunk_ids):
                    for number, chunk_id in enumerate(chunk_ids, request):
                        self._answer(self._transport, number, chunk_id)
                case Cancel(request) if self._owed.pop(request, None) is not None:
                    self._transport.write(self._talk.cancelled(request))

    def _answer(self, transport: asyncio.Transport, request: int, chunk_id: ChunkId) -> None:
        row = self._peer.image.find(chunk_id)
        assert row is not None
        size = row.encoded_bytes
        match self._peer.how:
            case How.LIES:
                transport.write(self._talk.chunk(request, size) + os.urandom(size))
            case How.SILENT:
                pass
            case How.SLOW:
                self._owed[request] = row
                if self._sending is None or self._sending.done():
                    self._sending = asyncio.get_running_loop().create_task(self._send_slowly(transport))
            case How.RESETS:
                transport.write(self._talk.chunk(request, size) + os.urandom(size // 2))
                # Later: at once, a reset would overtake the half frame.
                asyncio.get_running_loop().call_later(0.02, transport.abort)
            case How.GARBAGE:
                transport.write(os.urandom(_GARBAGE_BYTES))
            case How.OVERSIZED:
                transport.write(encode_chunk_head(request, _TOO_LONG_BYTES) + bytes(HEAD_BYTES))

    async def _send_slowly(self, transport: asyncio.Transport) -> None:
        while self._owed:
            request = next(iter(self._owed))
            row = self._owed[request]
            data = await self._peer.origin.read_pack(row.pack, row.offset, row.encoded_bytes)
            async with self._peer.uplink:
                await asyncio.sleep(len(data) / self._peer.bytes_s)
            if self._owed.pop(request, None) is not None:
                transport.write(self._talk.chunk(request, len(data)) + data)


class Hostile:
    """The peer."""

    def __init__(self, how: How, key: bytes, origin: Origin, image: Manifest, bytes_s: float) -> None:
        self.how: Final = how
        self.key: Final = key
        self.node: Final = NodeId(os.urandom(NODE_ID_BYTES))
        self.origin: Final = origin
        self.image: Final = image
        self.bytes_s: Final = bytes_s
        self.uplink: Final = asyncio.Lock()
        """Of all connections together."""


async def run(how: How, tracker: str, key_file: Path, root: str, image: str, bytes_s: float) -> None:
    """Until cancelled."""
    key = ClusterKey.load(key_file)
    origin = Origin.open(root)
    image_id = (await origin.ref(image_name(image))).image_id
    peer = Hostile(how, cluster_key(key.secret), origin, await origin.manifest(image_id), bytes_s)
    host, port = parse_address(DEFAULT_PEER_LISTEN, "--peer-listen")
    server = await asyncio.get_running_loop().create_server(lambda: _Connection(peer), host, port)
    membership = Membership(tracker, key.token, peer.node, backoff=lambda _failures: 0.2)
    membership.start(port)
    membership.use(image_id)
    await membership.settled(image_id, _JOIN_S)
    sys.stdout.write(f"joined {peer.node.hex()}\n")
    sys.stdout.flush()
    await server.serve_forever()


def main() -> None:
    how, tracker, key_file, root, image, bytes_s = sys.argv[1:]
    asyncio.run(run(How(how), tracker, Path(key_file), root, image, float(bytes_s)))


if __name__ == "__main__":
    main()
