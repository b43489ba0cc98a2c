import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmthunder.errors import CorruptFile, Failure, NotFound
from vmthunder.lab.record import parse_log
from vmthunder.lab.replay import replay
from vmthunder.lab.trace import HEADER, Read, Step, distinct_bytes, plan, read_csv, think_times_s, write_csv

# Two reads that overlap, then one that waited for the later of them, then a pause.
READS = [
    Read(0.0, 0.02, 0, 4096),
    Read(0.01, 0.03, 8192, 4096),
    Read(0.04, 0.05, 0, 512),
    Read(0.15, 0.16, 65536, 4096),
]

reads = st.lists(
    st.builds(
        lambda issue, took, offset, length: Read(issue / 1e6, (issue + took) / 1e6, offset, length),
        st.integers(0, 10**7),
        st.integers(0, 10**5),
        st.integers(0, 1 << 40),
        st.integers(1, 1 << 20),
    ),
    max_size=50,
)


def test_reads_that_overlapped_do_not_wait_for_one_another() -> None:
    steps = plan(READS)
    assert [step.after for step in steps] == [-1, -1, 1, 2]
    assert [round(step.think_s, 6) for step in steps] == [0.0, 0.01, 0.01, 0.1]


@given(reads)
def test_a_step_waits_only_for_earlier_steps_and_never_thinks_backwards(recorded: list[Read]) -> None:
    recorded.sort()
    steps = plan(recorded)
    assert all(step.after < number and step.think_s >= 0 for number, step in enumerate(steps))
    assert max(think_times_s(steps, 1.0), default=0.0) <= max((read.issue_s for read in recorded), default=0.0) + 1e-9


@given(reads)
def test_a_trace_file_comes_back(recorded: list[Read]) -> None:
    file = io.StringIO()
    write_csv(recorded, file)
    file.seek(0)
    back = read_csv(file, "trace")
    begin_s = min((read.issue_s for read in recorded), default=0.0)
    assert sorted((r.offset, r.length_bytes) for r in back) == sorted((r.offset, r.length_bytes) for r in recorded)
    assert [r.issue_s for r in back] == pytest.approx(sorted(r.issue_s - begin_s for r in recorded), abs=1e-5)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a,b\n",
        "{h}\n1,2,3\n",
        "{h}\n2,1,0,512\n",
        "{h}\n0,1,-1,512\n",
        "{h}\n0,1,0,0\n",
        "{h}\nx,1,0,1\n",
        "{h}\n0,inf,0,1\n",
    ],
)
def test_what_is_no_trace_is_refused(text: str) -> None:
    with pytest.raises(CorruptFile, match=r"boot\.csv"):
        read_csv(io.StringIO(text.replace("{h}", ",".join(HEADER))), "boot.csv")


def test_bytes_read_twice_count_once() -> None:
    assert distinct_bytes([Read(0, 1, 0, 100), Read(0, 1, 50, 100), Read(0, 1, 60, 10), Read(0, 1, 1000, 1)]) == 151


def test_a_log_of_nbdkit_is_understood() -> None:
    log = """\
2026-11-25 04:05:02.640760 Ready thread_model=3
2026-11-25 04:05:02.660936 connection=1 Connect export="" tls=0 size=0x1000000
2026-11-25 04:05:02.662000 connection=1 Read id=2 offset=0x1000 count=0x40000 ...
2026-11-25 04:05:02.663000 connection=2 Read id=2 offset=0x0 count=0x200 ...
2026-11-25 04:05:02.664000 connection=1 ...Read id=2 return=0
2026-11-25 04:05:02.665000 connection=2 ...Read id=2 return=-1 error=EIO
2026-11-25 04:05:02.666000 connection=1 Read id=3 offset=0x0 count=0x200 ..."""
    (read,) = parse_log(log.splitlines())
    assert (read.offset, read.length_bytes) == (4096, 262144)
    assert read.completion_s - read.issue_s == pytest.approx(0.002, abs=1e-6)


def test_a_replay_keeps_think_times_and_overlaps(tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(1 << 20))
    steps = plan(READS)
    done = replay(disk, steps)
    assert done.total_s >= max(think_times_s(steps, 1.0), default=0.0)
    assert done.stall_s == pytest.approx(done.total_s - 0.12, abs=1e-6)
    assert done.read_bytes == sum(read.length_bytes for read in READS)
    assert replay(disk, steps, think_scale=0).total_s < done.total_s


def test_a_file_that_is_too_short_ends_the_replay(tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(4096))
    with pytest.raises(Failure, match="is it the image traced"):
        replay(disk, plan(READS))


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="nothing-here"):
        replay(tmp_path / "nothing-here", [Step(-1, 0, 0, 512)])
