import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from node import committer
from node.committer import content
from node.images import make_cold
from vmthunder.errors import Conflict, Failure, NoSpace, NotPermitted
from vmthunder.ids import ChunkId, digest
from vmthunder.node.cache import QUIET_S, ChunkCache
from vmthunder.node.eviction import CORRELATED_USES

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
    cache.commit(chunk_id, data)
    return chunk_id


def loaded(cache: ChunkCache, chunk_id: ChunkId) -> bytes | None:
    data = cache.load(chunk_id)
    return None if data is None else bytes(data)


def file_of(directory: Path, chunk_id: ChunkId) -> Path:
    return directory / "chunks" / chunk_id.hex()[:2] / chunk_id.hex()


def files(directory: Path) -> list[Path]:
    return [path for path in (directory / "chunks").rglob("*") if path.is_file()]


def test_what_was_committed_is_there_after_a_restart(directory: Path) -> None:
    data = [content(seed) for seed in range(20)]
    with opened(directory) as cache:
        ids = [commit(cache, each) for each in data]
        assert [loaded(cache, chunk_id) for chunk_id in ids] == data
    with opened(directory) as cache:
        assert [loaded(cache, chunk_id) for chunk_id in ids] == data
        assert cache.stats() == {
            "chunks": 20,
            "bytes": sum(map(len, data)),
            "quota_bytes": 64 * MIB,
            "corrupt": 0,
            "evicted": 0,
            "uncached": 0,
        }


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o600)
    path.write_bytes(data)


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


def make_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "damage",
    [flip, grow, lambda path: os.truncate(path, 10), lambda path: os.truncate(path, 0)],
    ids=["flipped", "grown", "truncated", "empty"],
)
@pytest.mark.parametrize("restarted", [False, True])
def test_a_file_with_wrong_bytes_is_dropped_counted_and_replaced(
    directory: Path, damage: Callable[[Path], None], restarted: bool
) -> None:
    with opened(directory) as cache:
        chunk_id = commit(cache, content(1))
        other = commit(cache, content(2))
        if not restarted:
            damage(file_of(directory, chunk_id))
            check_replaced(cache, chunk_id, other)
    if restarted:
        damage(file_of(directory, chunk_id))
        with opened(directory) as cache:
            check_replaced(cache, chunk_id, other)


def check_replaced(cache: ChunkCache, chunk_id: ChunkId, other: ChunkId) -> None:
    assert loaded(cache, chunk_id) is None
    assert chunk_id not in cache
    assert cache.stats()["corrupt"] == 1
    assert not file_of(cache.directory, chunk_id).exists()
    commit(cache, content(1))
    assert loaded(cache, chunk_id) == content(1)
    assert loaded(cache, other) == content(2)
    assert cache.stats()["bytes"] == len(content(1)) + len(content(2))


@pytest.mark.parametrize("vanish", [Path.unlink, make_directory], ids=["file gone", "directory in its place"])
def test_a_file_that_went_away_is_a_miss(directory: Path, vanish: Callable[[Path], None]) -> None:
    with opened(directory) as cache:
        chunk_id = commit(cache, content(1))
        vanish(file_of(directory, chunk_id))
        assert loaded(cache, chunk_id) is None
        assert chunk_id not in cache
        assert cache.stats()["bytes"] == 0


def test_what_is_not_ours_is_left_alone(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    with opened(directory) as cache:
        chunk_id = commit(cache, content(1))
    strangers = [directory / "chunks/00/notes.txt", directory / "chunks/ab" / ("0" * 64)]
    for path in strangers:
        path.write_text("mine")
    (directory / "chunks/cd" / ("cd" * 32)).mkdir()
    (directory / "chunks/ef" / ("ef" * 32)).symlink_to("/etc/passwd")
    with opened(directory) as cache:
        assert cache.stats()["chunks"] == 1
        assert loaded(cache, chunk_id) == content(1)
    assert all(path.read_text() == "mine" for path in strangers)
    assert [record.message.partition(" first=")[0] for record in caplog.records] == [
        "chunk cache: left alone what is not ours: count=4"
    ]


def test_a_load_that_may_not_wait_answers_only_from_the_page_cache(directory: Path) -> None:
    with opened(directory) as cache:
        chunk_id = commit(cache, content(1))
        data = cache.load(chunk_id, wait=False)
        assert data is not None
        assert data == content(1)
        make_cold(cache, chunk_id)
        assert cache.load(chunk_id, wait=False) is None
        assert chunk_id in cache
        assert loaded(cache, chunk_id) == content(1)
        assert cache.stats()["corrupt"] == 0


def test_a_file_that_is_in_the_page_cache_in_part_is_not_taken_for_a_damaged_one(directory: Path) -> None:
    data = random.Random(1).randbytes(60_000)
    with opened(directory) as cache:
        chunk_id = commit(cache, data)
        make_cold(cache, chunk_id)
        descriptor = os.open(file_of(directory, chunk_id), os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead
        os.pread(descriptor, 4096, 0)
        os.close(descriptor)
        assert cache.load(chunk_id, wait=False) is None
        assert cache.stats()["corrupt"] == 0
        assert loaded(cache, chunk_id) == data


def test_a_chunk_that_is_committed_twice_is_counted_once(directory: Path) -> None:
    with opened(directory) as cache:
        assert commit(cache, content(1)) == commit(cache, content(1))
        assert (cache.stats()["chunks"], cache.stats()["bytes"]) == (1, len(content(1)))


def test_the_quota_is_never_exceeded(directory: Path) -> None:
    with opened(directory, MIB) as cache:
        for seed in range(120):
            commit(cache, content(seed))
            assert sum(path.stat().st_size for path in files(directory)) <= MIB
        stats = cache.stats()
        assert stats["bytes"] == sum(path.stat().st_size for path in files(directory))
        assert stats["evicted"] + stats["chunks"] == 120
        assert stats["bytes"] > 0.9 * MIB


def test_a_smaller_quota_is_kept_from_the_restart_on(directory: Path) -> None:
    with opened(directory, 4 * MIB) as cache:
        for seed in range(60):
            commit(cache, content(seed))
    with opened(directory, MIB) as cache:
        assert cache.stats()["bytes"] == sum(path.stat().st_size for path in files(directory)) <= MIB


def test_a_chunk_larger_than_the_quota_stays_uncached(directory: Path) -> None:
    with opened(directory, 100) as cache:
        chunk_id = commit(cache, bytes(range(101)))
        assert chunk_id not in cache
        assert cache.stats()["uncached"] == 1


def test_what_was_used_again_outlives_a_kill_and_the_scan_after_it(directory: Path) -> None:
    sized = [random.Random(seed).randbytes(1000) for seed in range(300)]
    scan, boot, second_scan = sized[:100], sized[100:110], sized[150:300]
    with opened(directory, 100_000) as cache:
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
    with opened(directory, 100_000) as cache:
        for data in second_scan[50:]:
            commit(cache, data)
        assert all(loaded(cache, chunk_id) for chunk_id in ids)


def test_what_came_back_after_it_was_let_go_outlives_a_kill_and_the_scan_after_it(directory: Path) -> None:
    sized = [random.Random(seed).randbytes(1000) for seed in range(230)]
    boot = sized[100:130]
    with opened(directory, 100_000) as cache:
        for data in sized[:100] + boot + boot:
            commit(cache, data)
    with opened(directory, 100_000) as cache:
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
            found = files(directory)
            assert {path.parent.name for path in found} <= {f"{prefix:02x}" for prefix in range(256)}
            assert cache.stats()["bytes"] == sum(path.stat().st_size for path in found) <= 2 * MIB
            for path in found:
                assert digest(path.read_bytes()).hex() == path.name
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
        assert list((small_disk / "state" / "chunks" / "tmp").iterdir()) == []
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
    for number in range(200):  # of 400 inodes
        (small_disk / str(number)).touch()
    with pytest.raises(NoSpace, match=r"cannot be used: No space left on device$"):
        ChunkCache(small_disk / "full", MIB)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(NotPermitted, match=r"cannot be used: Read-only file system$"):
        ChunkCache(small_disk / "read-only", MIB)


def test_five_thousand_chunks_are_usable_within_a_blink(directory: Path) -> None:
    for prefix in range(256):
        (directory / "chunks" / f"{prefix:02x}").mkdir(parents=True)
    ids = [ChunkId(digest(number.to_bytes(4, "big"))) for number in range(5000)]
    for number, chunk_id in enumerate(ids):
        file_of(directory, chunk_id).write_bytes(number.to_bytes(4, "big"))
    before = time.process_time()
    with opened(directory) as cache:
        assert time.process_time() - before < 0.5
        assert cache.stats()["chunks"] == 5000
        assert loaded(cache, ids[1234]) == (1234).to_bytes(4, "big")
