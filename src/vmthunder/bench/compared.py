"""A guest's reads, held against the source: `python -m vmthunder.bench.compared FILE SOURCE SECONDS`, a process of its own.

Reads every 64 KiB of the file once, in an order that is the same for all readers, spread over so many seconds, and late
where an answer is late. Says `ready`, waits for a line, and prints one JSON object in the end; errors and wrong bytes are
counted, not fatal. It lets nothing be read ahead, so that each read is one that a guest would wait for.
"""

import json
import os
import random
import sys
import time
from typing import Final

READ_BYTES: Final = 64 << 10
_SEED = 2014


def main() -> None:
    path, source, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
    expected = os.open(source, os.O_RDONLY)
    file = os.open(path, os.O_RDONLY)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
    offsets = list(range(0, os.fstat(expected).st_size, READ_BYTES))
    random.Random(_SEED).shuffle(offsets)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
    begin_s = time.monotonic()
    reads: list[tuple[float, float]] = []
    errors, wrong, first = 0, 0, ""
    for number, offset in enumerate(offsets):
        time.sleep(max(0.0, begin_s + seconds * number / len(offsets) - time.monotonic()))
        sent_s = time.monotonic()
        try:
            data = os.pread(file, READ_BYTES, offset)
        except OSError as error:
            errors += 1
            first = first or f"at {offset}: {error.strerror}"
        else:
            if data != os.pread(expected, READ_BYTES, offset):
                wrong += 1
                first = first or f"at {offset}: not the bytes of the source"
        reads.append((sent_s, time.monotonic()))
    json.dump({"reads": reads, "errors": errors, "wrong": wrong, "first": first}, sys.stdout)


if __name__ == "__main__":
    main()
