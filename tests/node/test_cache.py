import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

import pytest

from node import committer
from node.committer import content
from node.images import flip, make_cold, place_of, read_alone
from vmthunder.errors import Conflict, Failure, MissingTool, NoSpace, NotPermitted
from vmthunder.ids import ChunkId, digest
from vmthunder.node import segments
from vmthunder.node.cache import QUIET_S, ChunkCache
from vmthunder.node.eviction import CORRELATED_USES
from vmthunder.node.segments import UNIT_BYTES

MIB = 1 << 20


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "state"


@contextmanager
def opened(directory: Path, quota_bytes: int = 64 * MIB) -> Iterator[ChunkCache]:
    cache = ChunkCache(directory, quota_bytes)
    try:
        cache.recover()
        yield cache
    finally:
        cache.close()


def commit(cache: ChunkCache, data: bytes) -> ChunkId:
    chunk_id = ChunkId(digest(data))
    cache.commit([(chunk_id, data)])
    return chunk_id


def loaded(cache: ChunkCache, chunk_id: ChunkId) -> bytes | None:
    data = cache.load(chunk_id)
    return None if data is None else bytes(data)


def space(*data: bytes) -> int:
    """What chunks take of the quota."""
    return sum(-(-len(each) // UNIT_BYTES) * UNIT_BYTES for each in data)


def disk_bytes(directory: Path) -> int:
    """What chunks take of the disk."""
    return sum(map(data_bytes, (path for path in (directory / "chunks").iterdir() if path.name != "journal")))


def data_bytes(file: Path) -> int:
    """What of a file is no hole."""
    with file.open("rb") as opened_file:
        size, end, total = os.fstat(opened_file.fileno()).st_size, 0, 0
        with suppress(OSError):  # ENXIO: nothing but holes
            while end < size:
                begin = os.lseek(opened_file.fileno(), end, os.SEEK_DATA)
                end = os.lseek(opened_file.fileno(), begin, os.SEEK_HOLE)
                total += end - begin
        return total


def test_what_was_committed_is_there_after_a_restart(directory: Path) -> None:
    data = [content(seed) for seed in range(20)]
    with opened(directory) as cache:
        ids = [commit(cache, each) for each in data]
        assert [loaded(cache, chunk_id) for chunk_id in ids] == data
    with opened(directory) as cache:
        assert [loaded(cache, chunk_id) for chunk_id in ids] == data
        assert cache.stats() == {
            "chunks": 20,
            "bytes": space(*data),
            "quota_bytes": 64 * MIB,
            "corrupt": 0,
            "evicted": 0,
            "uncached": 0,
        }


def zero(file: Path, offset: int) -> None:
    with file.open("r+b") as opened_file:
        opened_file.seek(offset)
        opened_file.write(bytes(content_bytes(1)))


def truncate(file: Path, offset: int) -> None:
    os.truncate(file, offset + 10)


def content_bytes(seed: int) -> int:
    return len(content(seed))


@pytest.mark.parametrize("damage", [flip, zero, truncate])
@pytest.mark.parametrize("restarted", [False, True])
def test_wrong_bytes_are_dropped_counted_and_replaced(
    directory: Path, damage: Callable[[Path, int], None], restarted: bool
) -> None:
    with opened(directory) as cache:
        other = commit(cache, content(2))
        chunk_id = commit(cache, content(1))
        file, offset, _ = place_of(cache, chunk_id)
        if not restarted:
            damage(file, offset)
            check_replaced(cache, chunk_id, other)
    if restarted:
        damage(file, offset)
        with opened(directory) as cache:
            check_replaced(cache, chunk_id, other)
    with opened(directory) as cache:
        assert loaded(cache, chunk_id) == content(1)
        assert cache.stats()["corrupt"] == 0


def check_replaced(cache: ChunkCache, chunk_id: ChunkId, other: ChunkId) -> None:
    assert loaded(cache, chunk_id) is None
    assert chunk_id not in cache
    assert cache.stats()["corrupt"] == 1
    commit(cache, content(1))
    assert loaded(cache, chunk_id) == content(1)
    assert loaded(cache, other) == content(2)
    assert cache.stats()["bytes"] == space(content(1), content(2))


def test_a_file_of_chunks_that_went_away_is_a_miss(directory: Path) -> None:
    with opened(directory) as cache:
        chunk_id = commit(cache, content(1))
    (directory / "chunks" / "00000000").unlink()
    with opened(directory) as cache:
        assert loaded(cache, chunk_id) is None
        assert cache.stats()["bytes"] == 0
        assert loaded(cache, commit(cache, content(1))) == content(1)


@pytest.mark.parametrize(
    ("spoilt", "left"),
    [
        (lambda journal: journal[:-1], 9),
        (lambda journal: journal[:20], 0),
        (lambda journal: journal[:-48] + bytes(48), 9),
        (lambda journal: journal[:16] + b"\7" + journal[17:], 0),
        (lambda _: b"", 0),
        (lambda journal: b"x" + journal[1:], 0),
        (lambda journal: journal + b"rubbish", 10),
        (lambda journal: random.Random(1).randbytes(len(journal)), 0),
    ],
    ids=[
        "cut",
        "cut in the first",
        "zeros at the end",
        "no kind",
        "empty",
        "no head",
        "rubbish after it",
        "all rubbish",
    ],
)
def test_a_spoilt_journal_costs_chunks_and_no_wrong_byte(
    directory: Path, spoilt: Callable[[bytes], bytes], left: int
) -> None:
    with opened(directory) as cache:
        ids = [commit(cache, content(seed)) for seed in range(10)]
    journal = directory / "chunks" / "journal"
    journal.write_bytes(spoilt(journal.read_bytes()))
    for _ in range(2):
        with opened(directory) as cache:
            assert [loaded(cache, chunk_id) for chunk_id in ids[:left]] == [content(seed) for seed in range(left)]
            assert cache.stats()["chunks"] == left
            assert disk_bytes(directory) <= cache.stats()["bytes"]
            assert cache.stats()["corrupt"] == 0
    with opened(directory) as cache:
        assert [commit(cache, content(seed)) for seed in range(10)] == ids
        assert [loaded(cache, chunk_id) for chunk_id in ids] == [content(seed) for seed in range(10)]


def test_a_record_that_leads_to_another_chunk_shows_no_wrong_byte(directory: Path) -> None:
    with opened(directory) as cache:
        first, second = commit(cache, content(1)), commit(cache, content(2))
    journal = directory / "chunks" / "journal"
    data = journal.read_bytes()
    assert data.count(first) == data.count(second) == 1
    journal.write_bytes(data.replace(first, b"?" * 32).replace(second, first))
    with opened(directory) as cache:
        assert loaded(cache, first) is None
        assert cache.stats()["corrupt"] == 1


def test_the_journal_does_not_grow_for_ever(directory: Path) -> None:
    data = [number.to_bytes(4, "big") * 100 for number in range(4000)]
    with opened(directory, 64 * UNIT_BYTES) as cache:
        for each in data:
            commit(cache, each)
        assert (directory / "chunks" / "journal").stat().st_size < 4400 * 48
        kept = [each for each in data if ChunkId(digest(each)) in cache]
    with opened(directory, 64 * UNIT_BYTES) as cache:
        assert [loaded(cache, ChunkId(digest(each))) for each in kept] == kept


def test_chunks_go_on_in_another_file_when_one_is_full(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "SEGMENT_UNITS", 20)
    data = [random.Random(seed).randbytes(30_000) for seed in range(9)]
    with opened(directory) as cache:
        cache.commit([(ChunkId(digest(each)), each) for each in data])
        assert [loaded(cache, ChunkId(digest(each))) for each in data] == data
        for each in data[:4]:
            cache.drop(ChunkId(digest(each)))
    assert len(list((directory / "chunks").iterdir())) == 6
    with opened(directory) as cache:
        assert [loaded(cache, ChunkId(digest(each))) for each in data] == [None] * 4 + data[4:]
        assert len(list((directory / "chunks").iterdir())) == 4


def test_chunks_that_were_let_go_leave_holes(directory: Path) -> None:
    with opened(directory) as cache:
        ids = [commit(cache, content(seed)) for seed in range(20)]
        for chunk_id in ids[::2]:
            cache.drop(chunk_id)
    with opened(directory) as cache:
        assert disk_bytes(directory) == cache.stats()["bytes"]
        assert [loaded(cache, chunk_id) for chunk_id in ids[1::2]] == [content(seed) for seed in range(1, 20, 2)]
        for chunk_id in ids:
            cache.drop(chunk_id)
    assert disk_bytes(directory) == 0


def test_a_hole_that_a_kill_left_out_is_made_at_the_next_start(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(directory) as cache:
        first, second = commit(cache, content(1)), commit(cache, content(2))
        monkeypatch.setattr(segments.Segments, "free", lambda *_: None)
        cache.drop(first)
        monkeypatch.undo()
        with monkeypatch.context() as patch:
            patch.setattr(segments.Segments, "free", lambda *_: None)
            commit(cache, content(3))
        cache._close.pop_all().close()  # as a kill does: the lock goes and nothing is written
    with opened(directory) as cache:
        assert disk_bytes(directory) == cache.stats()["bytes"]
        assert loaded(cache, second) == content(2)


def test_a_load_that_may_not_wait_answers_only_from_the_page_cache(directory: Path) -> None:
    with opened(directory) as cache:
        chunk_id = commit(cache, content(1))
        data = cache.load(chunk_id, wait=False)
        assert data is not None
        assert data == content(1)
        make_cold(cache)
        assert cache.load(chunk_id, wait=False) is None
        assert chunk_id in cache
        assert loaded(cache, chunk_id) == content(1)
        assert cache.stats()["corrupt"] == 0


def test_a_file_that_is_in_the_page_cache_in_part_is_not_taken_for_a_damaged_one(directory: Path) -> None:
    data = random.Random(1).randbytes(60_000)
    with opened(directory) as cache:
        chunk_id = commit(cache, data)
        make_cold(cache)
        read_alone(cache, chunk_id, 4096)
        assert cache.load(chunk_id, wait=False) is None
        assert cache.stats()["corrupt"] == 0
        assert loaded(cache, chunk_id) == data


def test_a_chunk_that_is_committed_twice_is_counted_once(directory: Path) -> None:
    with opened(directory) as cache:
        assert commit(cache, content(1)) == commit(cache, content(1))
        assert (cache.stats()["chunks"], cache.stats()["bytes"]) == (1, space(content(1)))
        cache.commit([(ChunkId(digest(content(2))), content(2))] * 2)
        assert cache.stats()["bytes"] == space(content(1), content(2))


def test_the_quota_is_never_exceeded(directory: Path) -> None:
    with opened(directory, MIB) as cache:
        for seed in range(120):
            commit(cache, content(seed))
            assert disk_bytes(directory) <= MIB
        stats = cache.stats()
        assert stats["bytes"] == disk_bytes(directory)
        assert stats["evicted"] + stats["chunks"] == 120
        assert stats["bytes"] > 0.9 * MIB


def test_a_smaller_quota_is_kept_from_the_restart_on(directory: Path) -> None:
    with opened(directory, 4 * MIB) as cache:
        for seed in range(60):
            commit(cache, content(seed))
    with opened(directory, MIB) as cache:
        assert cache.stats()["bytes"] == disk_bytes(directory) <= MIB


def test_a_chunk_larger_than_the_quota_stays_uncached(directory: Path) -> None:
    with opened(directory, UNIT_BYTES) as cache:
        chunk_id = commit(cache, bytes(UNIT_BYTES + 1))
        assert chunk_id not in cache
        assert cache.stats()["uncached"] == 1


def test_what_was_used_again_outlives_a_kill_and_the_scan_after_it(directory: Path) -> None:
    sized = [random.Random(seed).randbytes(1000) for seed in range(300)]
    scan, boot, second_scan = sized[:100], sized[100:110], sized[150:300]
    with opened(directory, 100 * UNIT_BYTES) as cache:
        for data in scan:
            commit(cache, data)
        ids = [commit(cache, data) for data in boot]
        for _ in range(CORRELATED_USES):
            cache.touch(ChunkId(bytes(32)))
        for chunk_id in ids:
            assert cache.load(chunk_id)
        for data in second_scan[:50]:
            commit(cache, data)
        assert all(chunk_id in cache for chunk_id in ids)
    with opened(directory, 100 * UNIT_BYTES) as cache:
        for data in second_scan[50:]:
            commit(cache, data)
        assert all(loaded(cache, chunk_id) for chunk_id in ids)


def test_what_came_back_after_it_was_let_go_outlives_a_kill_and_the_scan_after_it(directory: Path) -> None:
    sized = [random.Random(seed).randbytes(1000) for seed in range(230)]
    boot = sized[100:130]
    with opened(directory, 100 * UNIT_BYTES) as cache:
        for data in sized[:100] + boot + boot:
            commit(cache, data)
    with opened(directory, 100 * UNIT_BYTES) as cache:
        for data in sized[130:]:
            commit(cache, data)
        assert all(loaded(cache, ChunkId(digest(data))) for data in boot[:20])


def start_committer(directory: Path, quota_bytes: int) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, committer.__file__, str(directory), str(quota_bytes)], stdout=subprocess.PIPE, text=True
    )


def test_a_kill_at_any_moment_leaves_no_wrong_byte_and_no_litter(directory: Path) -> None:
    rng = random.Random(7)
    for _ in range(8):
        process = start_committer(directory, 2 * MIB)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0, 0.1))  # the moment of the kill is what varies
        process.kill()
        committed = [content(int(line)) for line in process.stdout.read().splitlines() if line.isdecimal()][:-1]
        process.wait()
        process.stdout.close()
        with opened(directory, 2 * MIB) as cache:
            assert disk_bytes(directory) <= cache.stats()["bytes"] <= 2 * MIB
            for kept, _ in cache._queues.in_order():
                assert loaded(cache, kept.chunk_id) is not None
            assert cache.stats()["corrupt"] == 0
            if committed:
                assert loaded(cache, ChunkId(digest(committed[-1]))) == committed[-1]


def test_a_second_agent_is_told_who_is_there(directory: Path) -> None:
    process = start_committer(directory, MIB)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(Conflict, match=r"another agent uses .*--state-dir"):
            ChunkCache(directory, MIB, lock_timeout_s=0.1)
    finally:
        process.kill()
        process.communicate()


def test_a_successor_waits_for_the_lock_of_a_worker_that_is_being_killed(directory: Path) -> None:
    process = start_committer(directory, MIB)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        os.kill(process.pid, signal.SIGSTOP)
        killer = subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -9 {process.pid}"])
        with opened(directory, MIB) as cache:
            assert process.wait(10) == -signal.SIGKILL
            assert cache.stats()["quota_bytes"] == MIB
        killer.wait(10)
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m,nr_inodes=400", "vmthunder-test", disk], check=True)
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk_costs_only_the_cache_and_is_told_once(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    with opened(small_disk / "state", 64 * MIB) as cache:
        ballast = small_disk / "ballast"
        ballast.write_bytes(bytes(MIB))
        ids = [commit(cache, content(seed)) for seed in range(60)]
        stats = cache.stats()
        assert 0 < stats["chunks"] < 60
        assert stats["uncached"] == 60 - stats["chunks"]
        for seed, chunk_id in enumerate(ids):
            assert loaded(cache, chunk_id) in {None, content(seed)}
        assert cache.stats()["corrupt"] == 0
        assert [record.message.partition(": directory=")[0] for record in caplog.records] == [
            "chunk cache: cannot store chunks, reads go on without"
        ]
        caplog.clear()
        ballast.unlink()
        before = cache.stats()["uncached"]
        now_s = cache._clock()
        cache._clock = lambda: now_s
        for seed in range(1000, 1005):
            commit(cache, content(seed))
            now_s += QUIET_S / 3
        assert cache.stats()["uncached"] == before
        assert [record.message.partition(": after_s=")[0] for record in caplog.records] == [
            "chunk cache: stores chunks again"
        ]


def test_a_directory_that_cannot_be_made_is_one_line(small_disk: Path) -> None:
    (small_disk / "file").write_text("")
    with pytest.raises(Failure, match=r"cannot be used: Not a directory$"):
        ChunkCache(small_disk / "file" / "state", MIB)
    with pytest.raises(OSError, match="No space left"):
        for number in count():  # of 400 inodes
            (small_disk / str(number)).touch()
    with pytest.raises(NoSpace, match=r"cannot be used: No space left on device$"):
        ChunkCache(small_disk / "full", MIB)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(NotPermitted, match=r"cannot be used: Read-only file system$"):
        ChunkCache(small_disk / "read-only", MIB)


def test_a_file_system_without_holes_is_one_line(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    subprocess.run(["mount", "-t", "ramfs", "vmthunder-test", tmp_path], check=True)
    try:
        with pytest.raises(MissingTool, match=r"cannot make holes in files .*; use ext4, XFS, Btrfs or tmpfs$"):
            ChunkCache(tmp_path / "state", MIB)
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


def test_a_hundred_thousand_chunks_are_usable_within_a_blink(directory: Path) -> None:
    data = [number.to_bytes(4, "big") for number in range(100_000)]
    chunks = [(ChunkId(digest(each)), each) for each in data]
    with opened(directory, 1 << 40) as cache:
        for start in range(0, len(chunks), 1000):
            cache.commit(chunks[start : start + 1000])
    before = time.process_time()
    with opened(directory, 1 << 40) as cache:
        assert time.process_time() - before < 2
        assert cache.stats()["chunks"] == 100_000
        assert loaded(cache, chunks[12_345][0]) == data[12_345]
