"""Many boots at once, over many nodes: what is asked of each, how far it is, and what came of all. Owns no process.

A node that fails costs its own virtual machines and nobody else's. Belongs to one event loop.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from vmthunder.errors import VMThunderError
from vmthunder.fleet.ledger import Ledger, spread
from vmthunder.fleet.nodes import FleetNode, NodeClient
from vmthunder.fleet.placement import free_names, place

SOURCES: Final = ("origin", "peers", "cache")
TICK_S: Final = 0.2


@dataclass(frozen=True, slots=True)
class Refusal:
    """A node that did not do what it was asked."""

    node: FleetNode
    error: VMThunderError


@dataclass(slots=True)
class Boot:
    """One virtual machine on its way."""

    client: NodeClient
    name: str
    step: str = "asked"
    ready_s: float | None = None
    """From the begin of the storm."""
    ledger: Ledger = field(default_factory=Ledger)
    report: dict[str, Any] | None = None
    error: VMThunderError | None = None

    @property
    def stall_s(self) -> float:
        """Seconds in which reads of its node waited for chunks; its own, where it is the only one there."""
        return self.ledger.grown("stalled_s")

    def to_dict(self) -> dict[str, Any]:
        error = self.error and {"error": str(self.error), "exit_code": self.error.exit_code}
        return {
            "node": self.client.node.name,
            "name": self.name,
            "ready_s": self.ready_s,
            "stall_s": round(self.stall_s, 3),
            "report": self.report,
            **(error or {}),
        }


Reached = tuple[NodeClient, list[dict[str, Any]]]
"""A node that answered, and its virtual machines."""


async def survey(clients: Sequence[NodeClient]) -> tuple[list[Reached], list[Refusal]]:
    """Which virtual machines are where, and which nodes do not say."""
    answers = await asyncio.gather(*(client.vms() for client in clients), return_exceptions=True)
    reached: list[Reached] = []
    refused = []
    for client, answer in zip(clients, answers, strict=True):
        if isinstance(answer, VMThunderError):
            refused.append(Refusal(client.node, answer))
        elif isinstance(answer, BaseException):
            raise answer
        else:
            reached.append((client, answer))
    return reached, refused


def plan(reached: Sequence[Reached], base: str, count: int | None, per_node: int | None) -> list[Boot]:
    """Boots of `count` machines in all, where there are the fewest; or of `per_node` on each node."""
    if per_node is not None:
        seats = list(range(len(reached))) * per_node
    else:
        seats = place([len(vms) for _, vms in reached], count or 1)
    names = free_names(base, {vm["name"] for _, vms in reached for vm in vms}, len(seats))
    return [Boot(reached[seat][0], name) for seat, name in zip(seats, names, strict=True)]


class Storm:
    """All boots of one command."""

    def __init__(self, boots: Sequence[Boot], refused: Iterable[Refusal] = ()) -> None:
        """`refused`: nodes that were to take part and do not."""
        self.boots: Final = boots
        self.refused: Final = list(refused)
        self._ledgers: dict[FleetNode, Ledger] = defaultdict(Ledger)
        self._begin_s = 0.0

    async def run(self, wanted: Mapping[str, Any], on_tick: Callable[[], None] = lambda: None) -> None:
        """Boot all at once; what goes wrong is in `boots`. `on_tick` is called now and then, and at the end."""
        self._begin_s = time.monotonic()
        pending = {asyncio.create_task(self._boot(boot, wanted)) for boot in self.boots}
        while pending:
            done, pending = await asyncio.wait(pending, timeout=TICK_S)
            for task in done:
                task.result()
            on_tick()

    async def _boot(self, boot: Boot, wanted: Mapping[str, Any]) -> None:
        node = boot.client.node

        def heard(line: Mapping[str, Any]) -> None:
            if isinstance(step := line.get("step"), str):
                boot.step = step
            if isinstance(counters := line.get("node"), dict):
                boot.ledger.look(counters)
                self._ledgers[node].look(counters)

        try:
            boot.report = await boot.client.boot({**wanted, "name": boot.name}, heard)
        except VMThunderError as error:
            boot.step, boot.error = "failed", error
        else:
            boot.step, boot.ready_s = "ready", time.monotonic() - self._begin_s

    @property
    def failures(self) -> int:
        """Machines that are not ready, and nodes that took no part."""
        return len(self.refused) + sum(boot.error is not None for boot in self.boots)

    def bytes_from(self, source: str) -> int:
        """What all nodes together brought in from one of SOURCES, each node counted once."""
        return int(sum(ledger.grown(f"bytes_from_{source}") for ledger in self._ledgers.values()))

    def to_dict(self) -> dict[str, Any]:
        """The outcome, as `vmthunder boot --count --json` prints it."""
        times = [boot.ready_s for boot in self.boots if boot.ready_s is not None]
        return {
            "asked": len(self.boots),
            "ready": len(times),
            "ready_s": spread(times),
            "bytes": {f"from_{source}": self.bytes_from(source) for source in SOURCES},
            "vms": [boot.to_dict() for boot in self.boots],
            "failed_nodes": [
                {"node": refusal.node.name, "error": str(refusal.error), "exit_code": refusal.error.exit_code}
                for refusal in self.refused
            ],
        }
