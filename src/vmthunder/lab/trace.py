"""A recorded boot: the reads that a guest asked of its disk, and when. [pure]

As a file it is CSV with the header `issue_s,completion_s,offset,length_bytes`, times in seconds from the first issue, ordered
by issue.

What a replay must keep is not the moment of a read but why it was issued then: the guest waited for an earlier read and
then thought for a while. So each read is hung below the last read that was complete when it was issued; reads that were
under way at the same time do not wait for one another, in the recording or in a replay.
"""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, TextIO

from vmthunder.errors import CorruptFile

HEADER: Final = ("issue_s", "completion_s", "offset", "length_bytes")
MAX_READ_BYTES: Final = 64 << 20


class Read(NamedTuple):
    """One read of a guest."""

    issue_s: float
    completion_s: float
    offset: int
    length_bytes: int


@dataclass(frozen=True)
class Step:
    """One read of a replay: issue it `think_s` after read number `after` has completed, -1 is the begin."""

    after: int
    think_s: float
    offset: int
    length_bytes: int


def write_csv(reads: Iterable[Read], file: TextIO) -> None:
    """Write reads in the order of their issue, times from the first one on."""
    ordered = sorted(reads)
    begin_s = ordered[0].issue_s if ordered else 0.0
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(HEADER)
    for read in ordered:
        issue, completion = (f"{time_s - begin_s:.6f}" for time_s in read[:2])
        writer.writerow((issue, completion, read.offset, read.length_bytes))


def read_csv(file: TextIO, name: str) -> list[Read]:
    """The reads of a trace file; `name` is for the error. Raises CorruptFile."""
    rows = csv.reader(file)
    try:
        if tuple(next(rows, ())) != HEADER:
            raise CorruptFile(f"{name} is no trace: its first line is not {','.join(HEADER)}")
        reads = []
        for row in rows:
            issue, completion, offset, length = row
            reads.append(Read(float(issue), float(completion), int(offset), int(length)))
            _check(reads[-1])
    except (ValueError, csv.Error) as error:
        raise CorruptFile(f"{name}, line {rows.line_num}, is no read of a trace: {error}") from None
    return sorted(reads)


def _check(read: Read) -> None:
    if not 0 <= read.issue_s <= read.completion_s < float("inf"):
        raise ValueError("times run backwards")
    if read.offset < 0 or not 0 < read.length_bytes <= MAX_READ_BYTES:
        raise ValueError("no such range of a disk")


def plan(reads: Sequence[Read]) -> list[Step]:
    """What to replay. `reads` are in the order of their issue, so a step's `after` is always an earlier step."""
    steps: list[Step] = []
    by_completion = sorted(range(len(reads)), key=lambda number: reads[number].completion_s)
    done = 0
    after = -1
    for number, read in enumerate(reads):
        # A read that took no time at all must not wait for itself.
        while by_completion[done] < number and reads[by_completion[done]].completion_s <= read.issue_s:
            after = by_completion[done]
            done += 1
        waited_for_s = reads[after].completion_s if after >= 0 else 0.0
        steps.append(Step(after, read.issue_s - waited_for_s, read.offset, read.length_bytes))
    return steps


def think_times_s(steps: Sequence[Step], think_scale: float) -> list[float]:
    """When each step is issued on a disk that answers at once."""
    at_s: list[float] = []
    for step in steps:
        at_s.append((at_s[step.after] if step.after >= 0 else 0.0) + step.think_s * think_scale)
    return at_s


def distinct_bytes(reads: Iterable[Read]) -> int:
    """Bytes of the disk that were read at least once."""
    total = end = 0
    for offset, length in sorted((read.offset, read.length_bytes) for read in reads):
        total += max(0, offset + length - max(end, offset))
        end = max(end, offset + length)
    return total
