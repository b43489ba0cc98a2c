"""The nodes of a cluster, from any machine that has its key: who they are, and what can be asked of them over HTTP.

Each order is signed for one node, in answer to its challenge (`node/exchange.py`). Nothing is kept; whatever a node answers is
checked before it is used. Belongs to one event loop.
"""

import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final, NamedTuple

import aiohttp
from yarl import URL

from vmthunder.errors import AgentUnavailable, Failure, NotFound
from vmthunder.ids import NodeId, digest
from vmthunder.node.control import error_of
from vmthunder.node.exchange import CHALLENGE
from vmthunder.swarm.client import TrackerClient
from vmthunder.swarm.key import NONCE_BYTES, ClusterKey
from vmthunder.swarm.view import CLUSTER, BadMessage, Snapshot, decode_update

TRACKER_S: Final = 10.0
CONNECT_S: Final = 3.0
SILENT_S: Final = 30.0
"""A node that says nothing for so long is given up. One that boots says something twice a second."""
MAX_LINE_BYTES: Final = 1 << 20

Heard = Callable[[Mapping[str, Any]], None]


class FleetNode(NamedTuple):
    """A node, and where it can be asked."""

    name: str
    """Its host; with the port where several share one."""
    url: str
    node_id: NodeId


async def known_nodes(tracker_url: str, key: ClusterKey) -> list[FleetNode]:
    """The nodes that the tracker knows, in an order that stays.

    Raises:
        OriginUnavailable, NotPermitted, NotFound, Failure, Usage: the tracker does not say.
    """
    tracker = TrackerClient(tracker_url, key.token)
    try:
        answer = await tracker.ask("GET", "/swarm", timeout_s=TRACKER_S)
    finally:
        tracker.close()
    try:
        views = {found["image_id"]: decode_update(found) for found in json.loads(answer)["swarms"]}
    except (ValueError, TypeError, KeyError, BadMessage):
        raise Failure(f"{tracker_url} answers, but not as a tracker") from None
    view = views.get(CLUSTER.hex())
    members = view.members if isinstance(view, Snapshot) else ()
    shared = Counter(member.host for member in members)
    nodes = []
    for member in members:
        address = f"[{member.host}]:{member.port}" if ":" in member.host else f"{member.host}:{member.port}"
        nodes.append(FleetNode(member.host if shared[member.host] == 1 else address, f"http://{address}", member.node))
    return nodes


class NodeClient:
    """Asks one node. Every method raises AgentUnavailable if it does not answer, and what its answer says."""

    def __init__(self, key: ClusterKey, node: FleetNode) -> None:
        self.node: Final = node
        self._key = key

    async def vms(self) -> list[dict[str, Any]]:
        """Its virtual machines, as `vmthunder ps --json` prints them."""
        found = (await self._ask("GET", "/vms")).get("vms")
        if not isinstance(found, list) or not all(isinstance(vm, dict) and "name" in vm for vm in found):
            raise self._nonsense()
        return found

    async def destroy(self, name: str | None) -> list[str]:
        """End one of its virtual machines, or all; their names."""
        gone = (await self._ask("DELETE", f"/vms/{name}" if name else "/vms")).get("destroyed")
        if not isinstance(gone, list):
            raise self._nonsense()
        return gone

    async def boot(self, wanted: Mapping[str, Any], heard: Heard) -> dict[str, Any]:
        """Boot one there; the report, as `vmthunder boot --json` prints it. `heard` is told each line on the way."""
        return await self._order("/vms", wanted, heard)

    async def precache(self, wanted: Mapping[str, Any], heard: Heard) -> dict[str, Any]:
        """Bring an image there; what it came to. `heard` is told each line on the way."""
        return await self._order("/precache", wanted, heard)

    async def _order(self, path: str, wanted: Mapping[str, Any], heard: Heard) -> dict[str, Any]:
        async with self._errors():
            async with self._send("POST", path, json.dumps(wanted).encode()) as response:
                if response.status != 200:
                    await self._value(response)
                async for line in response.content:
                    value = self._object(line)
                    heard(value)
                    if isinstance(report := value.get("report"), dict):
                        return report
                    self._raise_for(value)
            raise AgentUnavailable(self._cut_off())

    async def _ask(self, method: str, path: str) -> dict[str, Any]:
        async with self._errors(), self._send(method, path) as response:
            return await self._value(response)

    @asynccontextmanager
    async def _send(self, method: str, path: str, body: bytes = b"") -> AsyncIterator[aiohttp.ClientResponse]:
        """An order, on a connection of its own: a challenge is good for the next request on the same one."""
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=1),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=SILENT_S),
            read_bufsize=MAX_LINE_BYTES,
        ) as session:
            async with session.get(self.node.url + CHALLENGE) as response:
                nonce = self._nonce(await self._value(response))
            url = URL(self.node.url + path)
            body_digest = digest(body)
            mac = self._key.order_mac(self.node.node_id, nonce, method, url.raw_path_qs, body_digest)
            headers = {"Authorization": f"VMThunder {mac.hex()} {body_digest.hex()}"}
            async with session.request(method, url, data=body, headers=headers) as response:
                yield response

    def _nonce(self, challenge: Mapping[str, Any]) -> bytes:
        """Raises Failure."""
        with contextlib.suppress(KeyError, ValueError, TypeError):
            if len(nonce := bytes.fromhex(challenge["nonce"])) == NONCE_BYTES:
                return nonce
        raise self._nonsense()

    async def _value(self, response: aiohttp.ClientResponse) -> dict[str, Any]:
        value = self._object(await response.read())
        self._raise_for(value)
        return value

    def _object(self, text: bytes) -> dict[str, Any]:
        with contextlib.suppress(ValueError, RecursionError):
            if isinstance(value := json.loads(text), dict):
                return value
        raise self._nonsense()

    def _raise_for(self, value: Mapping[str, Any]) -> None:
        if "error" in value:
            code = value.get("exit_code")
            raise error_of(code if isinstance(code, int) else 1, str(value["error"]))

    def _nonsense(self) -> Failure:
        return Failure(f"{self.node.name} answers, but not as an agent; is the same version installed there?")

    def _cut_off(self) -> str:
        return "the agent was killed or restarted meanwhile; `vmthunder ps --all-nodes` shows what became of the vm"

    @asynccontextmanager
    async def _errors(self) -> AsyncIterator[None]:
        try:
            yield
        except (aiohttp.ClientConnectorError, aiohttp.ServerTimeoutError, TimeoutError) as error:
            why = str(getattr(error, "strerror", "") or "no answer in time")
            raise AgentUnavailable(f"no agent answers at {self.node.url} ({why})") from None
        except (aiohttp.ClientError, ConnectionError):
            raise AgentUnavailable(self._cut_off()) from None


async def clients(tracker_url: str, key: ClusterKey) -> list[NodeClient]:
    """Clients of all nodes that the tracker knows. Raises what `known_nodes` does, and NotFound where it knows none."""
    nodes = await known_nodes(tracker_url, key)
    if not nodes:
        raise NotFound(
            f"tracker {tracker_url} knows no nodes; start agents there with the cluster key: `vmthunder agent`"
        )
    return [NodeClient(key, node) for node in nodes]
