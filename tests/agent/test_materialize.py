"""Local copies: made, opened in passthrough, given back."""

import os
import shutil
import signal
import subprocess

import pytest

from agents import Lab, disk_bytes, eventually, finish, run_vmthunder, same, sha256
from conftest import VMTHUNDER
from vmthunder.errors import Conflict, NoSpace, NotFound

SIZE_BYTES = (12 << 20) + 777


def test_a_local_copy_is_read_without_the_worker(lab: Lab) -> None:
    source = lab.publish("debian-12", disk_bytes(SIZE_BYTES))
    agent = lab.agent()
    progress: list[tuple[int, int]] = []
    agent.client.materialize("debian-12", lambda done, total: progress.append((done, total)))
    assert progress[-1][0] == progress[-1][1] > 0
    holder = lab.holder(agent.path("debian-12"))
    worker = agent.status()["pid"]
    os.kill(worker, signal.SIGSTOP)
    try:
        # Nobody is there to answer a READ: the kernel reads the file itself.
        assert finish([holder]) == [sha256(source)]
    finally:
        os.kill(worker, signal.SIGCONT)


def test_a_local_copy_that_is_open_is_read_on_after_the_agent_has_stopped(lab: Lab) -> None:
    source = lab.publish("debian-12", disk_bytes(SIZE_BYTES))
    agent = lab.agent()
    agent.client.materialize("debian-12")
    holder = lab.holder(agent.path("debian-12"))
    assert "goes on reading" in run_vmthunder("agent", "--stop", "--run-dir", agent.run_dir)
    agent.drop_page_cache()
    assert finish([holder]) == [sha256(source)]


def test_a_local_copy_has_holes_where_the_image_is_zero(lab: Lab) -> None:
    lab.publish("sparse", b"x" * 65536 + bytes(64 << 20) + b"y")
    agent = lab.agent()
    agent.client.materialize("sparse")
    (copy,) = (agent.state_dir / "materialized").iterdir()
    assert copy.stat().st_size == (64 << 20) + 65537
    assert copy.stat().st_blocks * 512 < 1 << 20
    assert copy.stat().st_mode & 0o777 == 0o600


def test_whoever_had_the_image_open_before_goes_on_beside_the_local_copy(lab: Lab) -> None:
    source = lab.publish("debian-12", disk_bytes(SIZE_BYTES))
    agent = lab.agent()
    before = [lab.reader(agent.path("debian-12"), source, seed, how) for seed, how in enumerate(("buffered", "direct"))]
    agent.client.materialize("debian-12")
    after = [lab.reader(agent.path("debian-12"), source, seed, how) for seed, how in enumerate(("buffered", "direct"))]
    agent.kill_worker()
    assert same(agent.path("debian-12"), source)
    assert all(int(reads) > 0 for reads in finish(before + after))


def test_whoever_had_the_image_open_before_needs_no_origin_once_the_copy_is_whole(lab: Lab) -> None:
    source = lab.publish("debian-12", disk_bytes(SIZE_BYTES))
    # Neither memory nor the chunk cache has what a reader asks for: it is in the copy, or nowhere.
    agent = lab.agent(decoded_bytes=0, cache_bytes=1 << 20)
    holders = [lab.holder(agent.path("debian-12")) for _ in range(2)]
    assert same(agent.path("debian-12"), source)
    agent.client.materialize("debian-12")
    shutil.rmtree(lab.origin / "packs")
    agent.drop_page_cache()
    with pytest.raises(Conflict, match="open 2 times"):
        agent.client.dematerialize("debian-12")
    assert finish(holders[:1]) == [sha256(source)]
    agent.kill_worker()
    agent.drop_page_cache()
    assert finish(holders[1:]) == [sha256(source)]


def test_a_copy_that_is_open_is_not_removed_and_one_that_is_not_gives_its_space_back(lab: Lab) -> None:
    source = lab.publish("debian-12", disk_bytes(SIZE_BYTES))
    agent = lab.agent()
    agent.client.materialize("debian-12")
    holder = lab.holder(agent.path("debian-12"))
    agent.kill_worker()
    with pytest.raises(Conflict, match="open 1 times"):
        agent.client.dematerialize("debian-12")
    assert finish([holder]) == [sha256(source)]

    def removed() -> bool:
        try:
            return bool(agent.client.dematerialize("debian-12")["freed_bytes"] > SIZE_BYTES / 2)
        except Conflict:
            return False  # RELEASE comes a moment after close(2) has returned.

    eventually(removed, "the copy to be removable")
    assert list((agent.state_dir / "materialized").iterdir()) == []
    assert same(agent.path("debian-12"), source)
    with pytest.raises(NotFound, match="not materialized"):
        agent.client.dematerialize("debian-12")
    agent.client.materialize("debian-12")
    assert same(agent.path("debian-12"), source)


def test_two_who_ask_for_the_same_copy_share_the_work(lab: Lab) -> None:
    lab.publish("debian-12", disk_bytes(SIZE_BYTES))
    agent = lab.agent(decoded_bytes=0)
    clients = [
        lab.child(*VMTHUNDER, "materialize", "debian-12", "--run-dir", agent.run_dir, "--json") for _ in range(2)
    ]
    finish(clients)
    fetch = agent.status()["fetch"]
    assert fetch["chunks_decoded"] == fetch["chunks_fetched"]


def test_a_copy_outlives_the_agent(lab: Lab) -> None:
    source = lab.publish("debian-12", disk_bytes(SIZE_BYTES))
    agent = lab.agent()
    agent.client.materialize("debian-12")
    agent.client.stop()
    agent.start()
    assert [(image["name"], image["materialized"]) for image in agent.status()["images"]] == [("debian-12", True)]
    assert same(agent.path("debian-12"), source)
    assert agent.status()["fetch"]["chunks_from_cache"] == 0


def test_a_killed_worker_leaves_no_half_copy_and_the_client_does_not_notice(lab: Lab) -> None:
    source = lab.publish("debian-12", disk_bytes(48 << 20))
    agent = lab.agent()
    client = lab.child(*VMTHUNDER, "materialize", "debian-12", "--run-dir", agent.run_dir)
    directory = agent.state_dir / "materialized"
    eventually(lambda: any(path.suffix == ".part" for path in directory.iterdir()), "a part")
    (directory / f"{'0' * 64}.part").write_bytes(b"of an image that nobody asks for again")
    agent.kill_worker()
    finish([client])
    (copy,) = directory.iterdir()
    assert copy.suffix == ".raw"
    assert copy.read_bytes() == source.read_bytes()


def test_a_copy_without_space_says_so_in_one_line_and_leaves_nothing(lab: Lab) -> None:
    source = lab.publish("debian-12", disk_bytes(SIZE_BYTES))
    state = lab.directory / "small"
    state.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", state], check=True)
    try:
        agent = lab.agent(state_dir=state)
        with pytest.raises(NoSpace, match="it needs"):
            agent.client.materialize("debian-12")
        assert list((state / "materialized").iterdir()) == []
        error = run_vmthunder("materialize", "debian-12", "--run-dir", agent.run_dir, exit_code=6)
        assert len(error.splitlines()) == 1
        assert same(agent.path("debian-12"), source)
        agent.client.stop()
    finally:
        subprocess.run(["umount", "-l", state], check=True)


def test_where_the_kernel_takes_no_backing_file_the_worker_reads_it(lab: Lab) -> None:
    source = lab.publish("debian-12", disk_bytes(SIZE_BYTES))
    # The kernel refuses a backing file that is on a stacked file system itself.
    stacked, upper_disk = lab.directory / "stacked", lab.directory / "upper"
    stacked.mkdir()
    upper_disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", upper_disk], check=True)
    for name in ("lower", "upper", "work"):
        (upper_disk / name).mkdir()
    options = f"lowerdir={upper_disk}/lower,upperdir={upper_disk}/upper,workdir={upper_disk}/work"
    subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", stacked], check=True)
    try:
        agent = lab.agent(state_dir=stacked)
        agent.client.materialize("debian-12")
        readers = [lab.reader(agent.path("debian-12"), source, n, how) for n, how in enumerate(("direct", "buffered"))]
        agent.kill_worker()
        assert same(agent.path("debian-12"), source)
        finish(readers)
        assert agent.log_lines("no_passthrough")
        agent.client.stop()
    finally:
        subprocess.run(["umount", "-l", stacked], check=True)
        subprocess.run(["umount", "-l", upper_disk], check=True)


def test_a_copy_that_somebody_removed_by_hand_is_on_demand_again(lab: Lab) -> None:
    source = lab.publish("debian-12", disk_bytes(SIZE_BYTES))
    agent = lab.agent()
    agent.client.materialize("debian-12")
    assert same(agent.path("debian-12"), source)
    for copy in (agent.state_dir / "materialized").iterdir():
        copy.unlink()
    assert same(agent.path("debian-12"), source)
    (image,) = agent.status()["images"]
    assert not image["materialized"]


def test_an_image_that_is_not_published_cannot_be_placed(lab: Lab) -> None:
    lab.publish("debian-12", b"x")
    agent = lab.agent()
    for command in ("materialize", "dematerialize"):
        assert "not published" in run_vmthunder(command, "nobody", "--run-dir", agent.run_dir, exit_code=3)
        assert "no image name" in run_vmthunder(command, "../x", "--run-dir", agent.run_dir, exit_code=2)
