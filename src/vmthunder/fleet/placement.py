"""Which node gets which of many virtual machines, and what they are called. [pure]"""

import heapq
from collections.abc import Collection, Iterator, Sequence
from itertools import count, islice


def place(vms: Sequence[int], wanted: int) -> list[int]:
    """The node of each of `wanted` new machines, where node n has `vms[n]` now: always one of those with the fewest.

    Nodes with equally many take turns in their order. No nodes, no machines.
    """
    heap = [(load, node) for node, load in enumerate(vms)]
    heapq.heapify(heap)
    placed = []
    for _ in range(wanted if heap else 0):
        load, node = heap[0]
        heapq.heapreplace(heap, (load + 1, node))
        placed.append(node)
    return placed


def free_names(base: str, taken: Collection[str], wanted: int) -> list[str]:
    """BASE-1, BASE-2, … without those that are taken."""
    names: Iterator[str] = (f"{base[:50].replace('_', '-')}-{number}" for number in count(1))
    return list(islice((name for name in names if name not in taken), wanted))
