"""What is simulated, and what came of it. [pure]"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from statistics import median
from typing import Final, NamedTuple

from vmthunder.errors import Usage
from vmthunder.swarm.topology import DEFAULT_FANOUT, DEFAULT_STRIPES

SLOW_SHARE: Final = 0.1
"""Of the rate of the others: what a slow node has, up and down."""
MAX_NODES: Final = 20_000


class Shape(Enum):
    """Who takes chunks from whom."""

    OURS = "ours"
    TREE = "tree"  # one binary tree, as VMThunder was in 2014
    STAR = "star"  # everybody from the origin
    CHAIN = "chain"  # everybody from who came before


class Practice(NamedTuple):
    """Limits that the agent has (room `node`)."""

    origin_requests: int
    answers: int
    retry_s: float
    max_hops: int


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """Nodes that begin to read one image in the same moment."""

    nodes: int
    chunks: int
    """That are simulated: all of the image, or its first ones."""
    chunk_bytes: int
    rate_bytes_s: float
    """Of each node's link, each way."""
    practice: Practice
    image_chunks: int = 0
    """That the image has, if it has more. Times are those of the whole image."""
    origin_rate_bytes_s: float = 0
    """Of the image server's link; 0: as a node's."""
    latency_s: float = 0.0002
    """One way."""
    window: int = 64
    """Chunks that a reader has under way."""
    shape: Shape = Shape.OURS
    stripes: int = DEFAULT_STRIPES
    fanout: int = DEFAULT_FANOUT
    racks: int = 1
    slow_fraction: float = 0.0
    churn_per_minute: float = 0.0
    """Share of the nodes that vanish without a word, each replaced at once by an empty one."""
    cpu_s: float = 0.0
    """Of a node's event loop for a chunk received, and again for one sent."""
    cores: int = 0
    """Processors that all nodes share, as in a lab on one machine; 0: each has its own."""
    seed: int = 1

    def __post_init__(self) -> None:
        if not (1 <= self.nodes <= MAX_NODES and self.chunks > 0 and self.window > 0 and self.rate_bytes_s > 0):
            raise Usage(f"1 to {MAX_NODES} nodes, some bytes and a rate above 0 can be simulated")
        if not (0 <= self.slow_fraction < 1 and 0 <= self.churn_per_minute <= 1):
            raise Usage("the share of slow nodes is below 1, and at most all nodes leave in a minute")

    @property
    def slow_nodes(self) -> int:
        """How many nodes are slow."""
        return round(self.nodes * self.slow_fraction)

    def bound_s(self, *, slow: bool = False) -> float:
        """The least time in which all can have everything; for a slow node, what its own link allows.

        (F/u)(1 + ⌊log2 N⌋/M) for links of one rate (Mundinger, Weber, Weiss, 2008). In general no less than one copy
        through the origin's link, N copies through all uplinks together, and one copy through a node's downlink.
        """
        size_bytes = max(self.chunks, self.image_chunks) * self.chunk_bytes
        origin = self.origin_rate_bytes_s or self.rate_bytes_s
        uplinks = origin + self.rate_bytes_s * (self.nodes - self.slow_nodes * (1 - SLOW_SHARE))
        own = self.rate_bytes_s * (SLOW_SHARE if slow else 1)
        steps = self.nodes.bit_length() - 1
        least_s = max(size_bytes / min(own, origin), size_bytes * self.nodes / uplinks)
        return least_s + steps * self.chunk_bytes / self.rate_bytes_s


@dataclass(frozen=True)
class Outcome:
    """What a run came to. Times are from a node's first read to the last byte of the whole image."""

    scenario: Scenario
    times_s: Sequence[float]
    """Of the nodes that lived to the end, at the full rate; sorted."""
    slow_times_s: Sequence[float]
    origin_sent: int
    """Chunks."""
    most_sent: int
    """By one node, chunks."""
    duplicates: int
    """Chunks that came to a node which had them already."""
    delivered: int
    sent: int
    left: int
    """Nodes that vanished."""
    hedges: int

    @property
    def time_over_bound(self) -> float:
        """The last node against the least possible; of slow nodes, against what their own links allow."""
        worst = [times[-1] / self.scenario.bound_s(slow=slow) for times, slow in self._kinds() if times]
        return max(worst)

    def summary(self) -> dict[str, float | int | str]:
        """For tables and JSON."""
        every = sorted([*self.times_s, *self.slow_times_s])
        return {
            "topology": self.scenario.shape.value,
            "nodes": self.scenario.nodes,
            "first_s": every[0],
            "median_s": median(every),
            "last_s": every[-1],
            "bound_s": self.scenario.bound_s(),
            "time_over_bound": self.time_over_bound,
            "origin_over_unique": self.origin_sent / self.scenario.chunks,
            "max_upload_over_download": self.most_sent / self.scenario.chunks,
            "duplicates_over_delivered": self.duplicates / self.delivered,
            "hedges": self.hedges,
            "left": self.left,
            "simulated_chunks": self.scenario.chunks,
        }

    def _kinds(self) -> tuple[tuple[Sequence[float], bool], ...]:
        return (self.times_s, False), (self.slow_times_s, True)
