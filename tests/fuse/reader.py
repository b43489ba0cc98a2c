"""Reads a file at random and compares it with its source, until its standard input ends. Runs as a process of its own.

    python reader.py FILE SOURCE SEED buffered|direct

Says so on standard error after the first read, and prints how many reads it did; ends with status 1 and one line at the
first wrong byte or error.
"""

import mmap
import os
import random
import select
import sys

LONGEST_BYTES = 256 * 1024


def main(path: str, source: str, seed: str, how: str) -> str | None:
    rng = random.Random(int(seed))
    with open(source, "rb") as file:
        expected = file.read()
    direct = how == "direct"
    fd = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
    reads = 0
    while not select.select([sys.stdin], [], [], 0)[0]:
        offset = rng.randrange(len(expected))
        size = rng.randrange(1, LONGEST_BYTES)
        if direct:
            offset, size = offset & -4096, (size + 4095) & -4096
        else:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)  # so that the server is asked again
        buffer = mmap.mmap(-1, size)
        try:
            read = os.preadv(fd, [buffer], offset)
        except OSError as error:
            return f"read {reads} at {offset}: {error}"
        if buffer[:read] != expected[offset : offset + size]:
            return f"read {reads} of {size} bytes at {offset}: {read} bytes, not those of the source"
        reads += 1
        if reads == 1:
            print("reading", file=sys.stderr, flush=True)
    print(reads)
    return None


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
