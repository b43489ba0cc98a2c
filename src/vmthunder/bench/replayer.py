"""The guest of a replayed storm, as a process of its own: `python -m vmthunder.bench.replayer TRACE THINK_SCALE`.

Says `loaded` when it has read its trace, waits for a line with the path of a file, replays the trace against that, and prints
one JSON object. What it costs is so little that 16 of them beside 16 agents do not matter (see `cpu_s`): it imports no
more than the trace and the player.
"""

import json
import sys
import time
from pathlib import Path

from vmthunder.errors import VMThunderError
from vmthunder.lab.replay import replay
from vmthunder.lab.trace import plan, read_csv


def main() -> None:
    trace, think_scale = Path(sys.argv[1]), float(sys.argv[2])
    with trace.open() as lines:
        steps = plan(read_csv(lines, str(trace)))
    begin_cpu_s = time.process_time()
    sys.stdout.write("loaded\n")
    sys.stdout.flush()
    path = Path(sys.stdin.readline().rstrip("\n"))
    try:
        done = replay(path, steps, think_scale)
    except (VMThunderError, OSError) as error:
        sys.exit(f"replay against {path}: {error}")
    report = {
        "end_s": time.monotonic(),
        "stall_s": done.stall_s,
        "first_read_s": done.latencies_s[0] if done.latencies_s else 0.0,
        "cpu_s": time.process_time() - begin_cpu_s,
    }
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
