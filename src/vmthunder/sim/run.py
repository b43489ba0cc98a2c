"""Everybody reads everything at once: the relay, event by event. [pure]

Trees, views, the tracker, the ranking of sources and the search for a chunk are the modules that agents run; here are
only links, queues and readers. A node's uplink is shared by its connections in turns, its downlink takes what comes; they
know neither TCP nor disks. One run has one owner; the same scenario gives the same outcome, to the last digit.
"""

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from vmthunder.ids import NODE_ID_BYTES, ChunkId, NodeId
from vmthunder.sim.scenario import SLOW_SHARE, Outcome, Scenario, Shape
from vmthunder.sim.views import POLL_S, View, Views
from vmthunder.swarm.rank import Ranking
from vmthunder.swarm.search import Ask, Search
from vmthunder.swarm.topology import stripe_of

_LEAST_S: Final = 1e-6
"""Timers never wait for less: a sum of small numbers may not move the clock."""


class _Flight:
    """A chunk on its way to a node."""

    __slots__ = ("asked", "askers", "hops", "reader", "search")

    def __init__(self, search: Search, hops: int) -> None:
        self.search = search
        self.hops = hops
        self.asked = 0  # questions that may still be answered
        self.askers: list[_Node] = []  # who gets it when it is here
        self.reader = False


class _Node:
    """A node; the origin is one that holds everything and has no id."""

    __slots__ = (
        "alive", "answers", "began_s", "core", "down_free_s", "down_s", "ended_s", "flights", "half_s", "held",
        "left_chunks", "next", "node_id", "origin_queue", "origin_requests", "ranking", "sending", "sent", "under_way",
        "up_s", "uplink", "view",
    )  # fmt: skip

    def __init__(self, node_id: NodeId | None, chunks: int, chunk_s: float, core: list[float]) -> None:
        self.node_id = node_id
        self.alive = True
        self.up_s = self.down_s = chunk_s
        self.core = core  # when the processor of its event loop is free
        self.began_s = self.half_s = self.ended_s = 0.0
        self.held = bytearray(chunks)
        self.left_chunks = chunks
        self.next = 0  # chunk that the reader asks for next
        self.under_way = 0  # of the reader
        self.flights: dict[int, _Flight] = {}
        self.answers = 0  # promised to peers and not here yet
        self.view: View | None = None
        self.ranking = Ranking()
        self.uplink: dict[_Node, deque[int]] = {}  # answers in line, by link; the link whose turn it is comes first
        self.sending = False
        self.sent = 0
        self.down_free_s = 0.0
        self.origin_requests = 0  # under way
        self.origin_queue: deque[int] = deque()


def simulate(scenario: Scenario) -> Outcome:
    """Run a scenario to its end."""
    return _Run(scenario).run()


class _Run:
    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.random = random.Random(scenario.seed)
        self.events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self.numbers = itertools.count()
        self.now = 0.0
        self.cores = [[0.0] for _ in range(scenario.cores)]
        one_stripe = scenario.shape is not Shape.OURS
        self.stripes, fanout = (1, 2) if one_stripe else (scenario.stripes, scenario.fanout)
        self.stripe = _stripes_of(scenario, self.stripes, self.random)
        # A tree, a chain or a star has nobody else to turn to: there a second question would only be one more copy.
        self.impatient = scenario.shape is Shape.OURS or scenario.churn_per_minute > 0
        self.chunk_s = scenario.chunk_bytes / scenario.rate_bytes_s
        self.origin = _Node(None, scenario.chunks, self.chunk_s, [0.0])
        self.origin.held = bytearray(b"\1") * scenario.chunks
        self.origin.up_s = scenario.chunk_bytes / (scenario.origin_rate_bytes_s or scenario.rate_bytes_s)
        self.nodes: list[_Node] = []
        self.by_id: dict[NodeId | None, _Node] = {None: self.origin}
        self.views = Views(scenario.shape, self.stripes, fanout, self.told)
        self.reading = scenario.nodes  # of the first ones, that live and have not got everything
        self.strangers = 0  # nodes that the tracker has not answered
        self.duplicates = self.delivered = self.left = 0

    def run(self) -> Outcome:
        scenario = self.scenario
        slow = set(self.random.sample(range(scenario.nodes), scenario.slow_nodes))
        for number in range(scenario.nodes):
            self.enter(slow=number in slow)
        settled_s = self.views.due()
        assert settled_s is not None
        self.now = settled_s
        self.views.tick(self.now)
        if scenario.churn_per_minute:
            self.at(self.now + POLL_S, self.renew)
            self.next_leave()
        while self.events:
            self.now, _, handler, arguments = heapq.heappop(self.events)
            handler(*arguments)
        there = [node for node in self.nodes if node.alive]
        assert not any(node.left_chunks for node in there), "a node waits for ever"
        return Outcome(
            scenario,
            self.times_s([node for node in there if node.down_s == self.chunk_s]),
            self.times_s([node for node in there if node.down_s > self.chunk_s]),
            origin_sent=self.origin.sent,
            most_sent=max(node.sent for node in self.nodes),
            duplicates=self.duplicates,
            delivered=self.delivered,
            sent=self.origin.sent + sum(node.sent for node in self.nodes),
            left=self.left,
            hedges=sum(node.ranking.hedges for node in self.nodes),
        )

    def times_s(self, nodes: list[_Node]) -> list[float]:
        """From the first read to the last byte of the whole image.

        What is not simulated goes on at the pace at which the last node went from half to all of what is.
        """
        if not nodes:
            return []
        chunks, image_chunks = self.scenario.chunks, max(self.scenario.chunks, self.scenario.image_chunks)
        half_s = max(node.half_s - node.began_s for node in nodes)
        times_s = sorted(node.ended_s - node.began_s for node in nodes)
        more_s = (times_s[-1] - half_s) / (chunks - chunks // 2) * (image_chunks - chunks)
        return [time_s + more_s for time_s in times_s]

    def at(self, time_s: float, handler: Callable[..., None], *arguments: Any) -> None:
        heapq.heappush(self.events, (time_s, next(self.numbers), handler, arguments))

    # Coming and going

    def enter(self, *, slow: bool = False) -> None:
        """A node that has nothing."""
        number = len(self.nodes)
        node_id = NodeId(number.to_bytes(NODE_ID_BYTES, "big"))
        core = self.cores[number % len(self.cores)] if self.cores else [0.0]
        node = _Node(node_id, self.scenario.chunks, self.chunk_s / (SLOW_SHARE if slow else 1), core)
        self.nodes.append(node)
        self.by_id[node_id] = node
        self.strangers += 1
        self.views.join(node_id, str(number % self.scenario.racks), self.now)

    def told(self, node_id: NodeId, view: View) -> None:
        """A node has a view; with the first one it begins to read."""
        node = self.by_id[node_id]
        first = node.view is None
        node.view = view
        node.ranking.retain(view.roster.members)
        if first:
            self.strangers -= 1
            node.began_s = self.now
            self.at(self.now, self.read, node)

    def next_leave(self) -> None:
        per_s = self.scenario.churn_per_minute * self.scenario.nodes / 60
        self.at(self.now + self.random.expovariate(per_s), self.leave)

    def leave(self) -> None:
        """Some node vanishes, and an empty one comes."""
        if not self.reading:
            return
        node = self.random.choice([node for node in self.nodes if node.alive])
        node.alive = False
        self.strangers -= node.view is None
        self.left += 1
        if node.left_chunks and int.from_bytes(node.node_id or b"") < self.scenario.nodes:
            self.reading -= 1
        assert node.node_id is not None
        self.views.vanish(node.node_id)
        node.flights.clear()
        node.uplink.clear()
        self.enter(slow=node.down_s > self.chunk_s)
        self.settle()
        self.next_leave()

    def settle(self) -> None:
        """Look again when the tracker has something to say."""
        due_s = self.views.due()
        if due_s is not None and (self.reading or self.strangers):
            self.at(max(due_s, self.now), self.tick)

    def tick(self) -> None:
        self.views.tick(self.now)
        self.settle()

    def renew(self) -> None:
        if self.reading:
            self.views.renew(self.now)
            self.settle()
            self.at(self.now + POLL_S, self.renew)

    # Asking

    def read(self, node: _Node) -> None:
        """The reader keeps its window full."""
        while node.under_way < self.scenario.window and node.next < self.scenario.chunks and node.alive:
            chunk = node.next
            node.next += 1
            if not node.held[chunk]:
                flight = node.flights.get(chunk) or self.start(node, chunk, 0)
                flight.reader = True
                node.under_way += 1

    def start(self, node: _Node, chunk: int, hops: int) -> _Flight:
        """Look for a chunk."""
        assert node.view is not None and node.node_id is not None
        ancestors = node.view.ancestors(node.node_id, self.stripe[chunk])
        search = Search(node.ranking, ancestors, node.view.roster.members, self.now)
        flight = node.flights[chunk] = _Flight(search, hops)
        self.ask(node, chunk, flight, search.ask_next(self.now))
        if self.impatient:
            self.watch(node, chunk, flight)
        return flight

    def ask(self, node: _Node, chunk: int, flight: _Flight, ask: Ask | None) -> None:
        if ask is None:
            if not flight.asked:  # a failed flight begins again
                flight.search = Search(node.ranking, (), (), self.now)
                self.ask(node, chunk, flight, flight.search.ask_next(self.now))
            return
        flight.asked += 1
        if ask.source is not None:
            self.at(self.now + self.scenario.latency_s, self.asked, self.by_id[ask.source], chunk, node, flight.hops)
        elif node.origin_requests < self.scenario.practice.origin_requests:
            node.origin_requests += 1
            self.at(self.now + self.scenario.latency_s, self.asked, self.origin, chunk, node, flight.hops)
        else:
            node.origin_queue.append(chunk)

    def watch(self, node: _Node, chunk: int, flight: _Flight) -> None:
        patience_s = flight.search.patience_s(self.now)
        if patience_s is not None:
            self.at(self.now + max(patience_s, _LEAST_S), self.late, node, chunk, flight)

    def late(self, node: _Node, chunk: int, flight: _Flight) -> None:
        if node.flights.get(chunk) is not flight:
            return
        patience_s = flight.search.patience_s(self.now)
        if patience_s is not None and patience_s <= _LEAST_S:
            self.ask(node, chunk, flight, flight.search.late(self.now, self.scenario.chunk_bytes))
        self.watch(node, chunk, flight)

    def refused(self, node: _Node, chunk: int, source: _Node, retry_s: float) -> None:
        """A source is busy, for so long, or has not got it."""
        flight = node.flights.get(chunk)
        if flight is None:
            return
        if retry_s:
            node.ranking.busy(source.node_id, retry_s, self.now)
        flight.asked -= 1
        flight.search.refused(None, self.now)
        if not flight.asked:
            self.ask(node, chunk, flight, flight.search.ask_next(self.now))

    # Answering

    def asked(self, source: _Node, chunk: int, node: _Node, hops: int) -> None:
        if not source.alive:
            return
        if source.held[chunk]:
            self.give(source, chunk, node)
            return
        practice = self.scenario.practice
        busy = source.answers >= practice.answers
        if busy or (hops >= practice.max_hops and chunk not in source.flights) or source.view is None:
            retry_s = practice.retry_s if busy else 0.0
            self.at(self.now + self.scenario.latency_s, self.refused, node, chunk, source, retry_s)
            return
        flight = source.flights.get(chunk) or self.start(source, chunk, hops + 1)
        flight.askers.append(node)
        source.answers += 1

    def give(self, source: _Node, chunk: int, node: _Node) -> None:
        line = source.uplink.get(node)
        if line is None:
            source.uplink[node] = deque((chunk,))
        else:
            line.append(chunk)
        if not source.sending:
            self.send(source)

    def send(self, source: _Node) -> None:
        """Put the next answer on the link, but for those that nobody waits for any more."""
        source.sending = False
        while source.uplink:
            node = next(iter(source.uplink))
            line = source.uplink.pop(node)
            chunk = line.popleft()
            if line:
                source.uplink[node] = line
            if not node.alive or node.held[chunk]:
                self.answered(source, node)
                continue
            source.sending = True
            source.sent += 1
            begin_s = self.work(source, self.now)
            arrived_s = max(
                begin_s + self.scenario.latency_s + max(source.up_s, node.down_s), node.down_free_s + node.down_s
            )
            node.down_free_s = arrived_s
            self.at(begin_s + source.up_s, self.send, source)
            self.at(self.work(node, arrived_s), self.arrived, node, chunk, source)
            return

    def work(self, node: _Node, from_s: float) -> float:
        """When a node's processor has done its part."""
        if not self.scenario.cpu_s or node is self.origin:
            return from_s
        node.core[0] = max(from_s, node.core[0]) + self.scenario.cpu_s
        return node.core[0]

    def answered(self, source: _Node, node: _Node) -> None:
        """A question to the origin is over: the next may go."""
        if source is self.origin:
            if node.origin_queue:
                chunk = node.origin_queue.popleft()
                self.at(self.now + self.scenario.latency_s, self.asked, self.origin, chunk, node, 0)
            else:
                node.origin_requests -= 1

    def arrived(self, node: _Node, chunk: int, source: _Node) -> None:
        self.answered(source, node)
        if not node.alive:
            return
        self.delivered += 1
        if node.held[chunk]:
            self.duplicates += 1
            return
        node.held[chunk] = 1
        node.left_chunks -= 1
        flight = node.flights.pop(chunk)
        flight.search.delivered(source.node_id, self.scenario.chunk_bytes, self.now)
        node.answers -= len(flight.askers)
        for asker in flight.askers:
            self.give(node, chunk, asker)
        if flight.reader:
            node.under_way -= 1
            self.read(node)
        if node.left_chunks == self.scenario.chunks - self.scenario.chunks // 2:
            node.half_s = self.now
        if not node.left_chunks:
            node.ended_s = self.now
            if node.node_id is not None and int.from_bytes(node.node_id) < self.scenario.nodes:
                self.reading -= 1


def _stripes_of(scenario: Scenario, stripes: int, chance: random.Random) -> list[int]:
    """The stripe of each chunk that is simulated.

    Chunk ids are digests: each chunk of the image falls into any stripe, the same for everybody, and stripes are unequal
    by chance, less so the more chunks there are. Where only some are simulated, each stripe has its share of all chunks.
    """
    image_chunks = max(scenario.chunks, scenario.image_chunks)
    ahead = [0.0] * stripes
    found: list[int] = []
    for number in range(1, image_chunks + 1):
        ahead[stripe_of(ChunkId(chance.randbytes(4)), stripes)] += scenario.chunks / image_chunks
        if number * scenario.chunks // image_chunks > len(found):
            stripe = max(range(stripes), key=ahead.__getitem__)
            ahead[stripe] -= 1
            found.append(stripe)
    return found
