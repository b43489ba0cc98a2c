"""Everybody reads everything at once: the relay on paper, to choose stripes and fan-out by. [pure]

A discrete-event simulation of N nodes and an origin, each with an uplink and a downlink of one rate, that all read one
image in order at the same moment through the production topology. Time is counted in chunk times: what one chunk takes
on a link. It must not grow into a network simulator; it knows neither TCP nor disks.
"""

import argparse
import heapq
import json
from collections import defaultdict, deque
from typing import Final, NamedTuple

from vmthunder.ids import NODE_ID_BYTES, NodeId
from vmthunder.swarm.topology import DEFAULT_FANOUT, DEFAULT_STRIPES, Topology

ORIGIN: Final = -1


class Spread(NamedTuple):
    """What one run came to. All three are ratios."""

    time_over_bound: float
    origin_over_unique: float
    max_upload_over_download: float


def bound_chunk_times(nodes: int, chunks: int) -> float:
    """The least time in which all can have everything: (F/u)(1 + ⌊log2 N⌋/M), Mundinger, Weber and Weiss, 2008."""
    return chunks + nodes.bit_length() - 1


def spread(
    nodes: int,
    chunks: int,
    *,
    stripes: int = DEFAULT_STRIPES,
    fanout: int = DEFAULT_FANOUT,
    window: int = 256,
    latency: float = 0.1,
    busy_after: int | None = None,
) -> Spread:
    """Let `nodes` nodes read `chunks` chunks, each with `window` requests under way.

    `latency` is one way, in chunk times (0.1 is half a millisecond at 100 Mbit/s and 64 KiB). A node with more than
    `busy_after` chunks in line for its uplink answers "busy", and names a child that it gives the same chunk to.
    """
    ids = [NodeId(node.to_bytes(NODE_ID_BYTES, "big")) for node in range(nodes)]
    topology = Topology(((node, "") for node in ids), stripes=stripes, fanout=fanout)
    place = {node: at for at, node in enumerate(ids)}
    parents = [[ORIGIN if up is None else place[up] for up in topology.parents(node)] for node in ids]
    return _Run(parents, chunks, window, latency, busy_after).run()


class _Run:
    def __init__(
        self, parents: list[list[int]], chunks: int, window: int, latency: float, busy_after: int | None
    ) -> None:
        self.parents = parents
        self.chunks = chunks
        self.window = window
        self.latency = latency
        self.busy_after = busy_after
        nodes = len(parents)
        self.events: list[tuple[float, int, int, int, int]] = []  # time, kind, node, chunk, from whom
        self.asked = [0] * nodes
        self.held = [bytearray(chunks) for _ in range(nodes)]
        self.got = [0] * nodes
        self.waiting: list[dict[int, list[int]]] = [defaultdict(list) for _ in range(nodes)]
        self.uplink: list[deque[tuple[int, int]]] = [deque() for _ in range(nodes + 1)]
        self.sending = [False] * (nodes + 1)
        self.sent = [0] * (nodes + 1)
        self.downlink_free = [0.0] * nodes
        self.given: list[dict[int, deque[int]]] = [defaultdict(deque) for _ in range(nodes)]

    def run(self) -> Spread:
        for node in range(len(self.parents)):
            for _ in range(min(self.window, self.chunks)):
                self.ask_next(node, 0.0)
        handlers = (self.on_request, self.on_sent, self.on_received)
        now = 0.0
        while self.events:
            now, kind, node, chunk, other = heapq.heappop(self.events)
            handlers[kind](now, node, chunk, other)
        nodes = len(self.parents)
        return Spread(
            now / bound_chunk_times(nodes, self.chunks),
            self.sent[ORIGIN] / self.chunks,
            max(self.sent[:nodes]) / self.chunks,
        )

    def ask_next(self, node: int, now: float) -> None:
        chunk = self.asked[node]
        if chunk < self.chunks:
            self.asked[node] = chunk + 1
            # Chunk ids are digests: which stripe comes next is as good as random, and the same for everybody.
            parent = self.parents[node][chunk * 2654435761 % 2**32 * len(self.parents[node]) >> 32]
            heapq.heappush(self.events, (now + self.latency, 0, parent, chunk, node))

    def on_request(self, now: float, node: int, chunk: int, child: int) -> None:
        if node != ORIGIN and not self.held[node][chunk]:
            self.waiting[node][chunk].append(child)
            return
        queue = self.uplink[node]
        if node != ORIGIN and self.busy_after is not None:
            holders = self.given[node].get(chunk)
            if holders and len(queue) > self.busy_after:
                holders.rotate(-1)
                heapq.heappush(self.events, (now + 2 * self.latency, 0, holders[-1], chunk, child))
                return
            self.given[node][chunk].append(child)
        queue.append((chunk, child))
        if not self.sending[node]:
            self.send(node, now)

    def send(self, node: int, now: float) -> None:
        chunk, child = self.uplink[node].popleft()
        self.sending[node] = True
        self.sent[node] += 1
        arrived = max(now + self.latency, self.downlink_free[child]) + 1
        self.downlink_free[child] = arrived
        heapq.heappush(self.events, (now + 1, 1, node, chunk, child))
        heapq.heappush(self.events, (arrived, 2, child, chunk, node))

    def on_sent(self, now: float, node: int, _chunk: int, _child: int) -> None:
        self.sending[node] = False
        if self.uplink[node]:
            self.send(node, now)

    def on_received(self, now: float, node: int, chunk: int, _sender: int) -> None:
        self.held[node][chunk] = 1
        self.got[node] += 1
        self.ask_next(node, now)
        for child in self.waiting[node].pop(chunk, ()):
            self.on_request(now, node, chunk, child)


def main() -> None:
    """Print one run as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=16)
    parser.add_argument("--chunks", type=int, default=1000)
    parser.add_argument("--stripes", type=int, default=DEFAULT_STRIPES)
    parser.add_argument("--fanout", type=int, default=DEFAULT_FANOUT)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--busy-after", type=int)
    asked = parser.parse_args()
    print(json.dumps(spread(**vars(asked))._asdict()))  # noqa: T201 - the result


if __name__ == "__main__":
    main()
