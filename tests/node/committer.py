"""Commits chunks to the cache in the directory `argv[1]` within the quota `argv[2]`, until it is killed. A process of its own.

Prints `ready`, then the seed of each chunk that was committed.
"""

import random
import sys
from itertools import count
from pathlib import Path

from vmthunder.ids import ChunkId, digest
from vmthunder.node.cache import ChunkCache


def content(seed: int) -> bytes:
    rng = random.Random(seed)
    return rng.randbytes(rng.randint(1, 60_000))


def main() -> None:
    cache = ChunkCache(Path(sys.argv[1]), int(sys.argv[2]))
    cache.recover()
    print("ready", flush=True)
    for seed in count(random.randrange(1 << 40)):
        data = content(seed)
        cache.commit([(ChunkId(digest(data)), data)])
        print(seed, flush=True)


if __name__ == "__main__":
    main()
