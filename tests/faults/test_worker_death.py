"""Killed workers, killed keepers and handovers while guests read: they see a pause, never an error or a wrong byte."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

from agents import Agent, Lab, alive, disk_bytes, eventually, finish, run_vmthunder, same
from vmthunder.fuse import mounts

KILLS = 8


def worker_loop(agent: Agent, kills: int, *, rng: random.Random) -> None:
    """Kill workers at moments of no particular kind."""
    for _ in range(kills):
        time.sleep(rng.uniform(0.05, 0.4))
        agent.kill_worker()
        agent.drop_page_cache()


def test_fio_finds_no_error_and_no_wrong_checksum_while_workers_are_killed(lab: Lab) -> None:
    disk = lab.directory / "disk.raw"
    fio = ["fio", "--name=disk", "--bs=4k", "--size=32m", "--verify=crc32c"]
    written = [*fio, f"--filename={disk}", "--rw=write", "--do_verify=0", "--buffer_compress_percentage=40"]
    subprocess.run(written, check=True, capture_output=True, timeout=60, cwd=lab.directory)
    lab.publish("disk", disk.read_bytes())
    agent = lab.agent(decoded_bytes=4 << 20)
    read = [*fio, f"--filename={agent.path('disk')}", "--readonly", "--rw=randread", "--norandommap", "--time_based"]
    read += ["--runtime=6", "--numjobs=2", "--verify_fatal=1", "--loops=1000"]
    jobs = [lab.child(*read, "--direct=0", "--invalidate=1"), lab.child(*read, "--direct=1")]
    worker_loop(agent, KILLS, rng=random.Random(1))
    for output in finish(jobs):
        assert "err= 0" in output
        assert "verify" not in output.lower(), output
    assert agent.status()["restarts"] == KILLS


def test_readers_of_two_images_see_their_bytes_while_workers_are_killed(lab: Lab) -> None:
    sources = [lab.publish(name, disk_bytes(24 << 20, seed)) for seed, name in enumerate(("one", "two"))]
    agent = lab.agent(decoded_bytes=2 << 20)
    readers = [
        lab.reader(agent.path(name), source, seed, how)
        for seed, (name, source) in enumerate(zip(("one", "two"), sources, strict=True))
        for how in ("buffered", "direct")
    ]
    worker_loop(agent, KILLS, rng=random.Random(2))
    assert all(int(reads) > 0 for reads in finish(readers))
    assert "ESTALE" not in agent.log
    assert "CRITICAL" not in agent.log


def test_files_can_be_opened_and_closed_while_workers_are_killed(lab: Lab) -> None:
    source = lab.publish("debian-12", disk_bytes(200_000))
    agent = lab.agent()
    script = f"for n in $(seq 60); do cmp {agent.path('debian-12')} {source} || exit 1; done"
    loop = lab.child("sh", "-c", script)
    worker_loop(agent, 4, rng=random.Random(3))
    finish([loop], deadline_s=60)
    eventually(lambda: agent.status()["images"][0]["open"] <= 4, "closed files to be counted as closed")


def test_a_handover_under_load_is_not_noticed(lab: Lab) -> None:
    source = lab.publish("debian-12", disk_bytes(24 << 20))
    agent = lab.agent(decoded_bytes=2 << 20)
    readers = [
        lab.reader(agent.path("debian-12"), source, seed, how) for seed, how in enumerate(("buffered", "direct"))
    ]
    for _ in range(3):
        agent.client.restart()
    assert all(int(reads) > 0 for reads in finish(readers))
    assert len(agent.log_lines("serving")) == 4
    assert "cause=death" not in agent.log


def test_the_death_of_the_keeper_is_not_noticed_and_the_agent_can_still_be_stopped(lab: Lab) -> None:
    source = lab.publish("debian-12", disk_bytes(8 << 20))
    agent = lab.agent(decoded_bytes=2 << 20)
    reader = lab.reader(agent.path("debian-12"), source)
    keeper = agent.status()["keeper_pid"]
    os.kill(keeper, signal.SIGKILL)
    eventually(lambda: not alive(keeper), "the death of the keeper")
    assert agent.status()["keeper_pid"] is None
    assert "keeper was killed" in run_vmthunder("agent", "--restart", "--run-dir", agent.run_dir, exit_code=8)
    assert "already runs" in run_vmthunder("agent", *agent.arguments, "--detach", exit_code=8)
    agent.drop_page_cache()
    assert same(agent.path("debian-12"), source)
    finish([reader])
    run_vmthunder("agent", "--stop", "--run-dir", agent.run_dir)
    assert mounts.find_mount(str(agent.mount)) is None
    agent.start()
    assert same(agent.path("debian-12"), source)


def test_the_successor_finds_the_chunks_of_its_predecessor(lab: Lab) -> None:
    source = lab.publish("debian-12", disk_bytes(8 << 20))
    agent = lab.agent()
    assert same(agent.path("debian-12"), source)
    agent.kill_worker()
    agent.drop_page_cache()
    assert same(agent.path("debian-12"), source)
    assert agent.status()["fetch"]["chunks_fetched"] == 0


def test_the_mount_state_of_another_mount_is_not_taken_over(lab: Lab) -> None:
    source = lab.publish("debian-12", disk_bytes(100_000))
    agent = lab.agent()
    state = Path(agent.run_dir / "mount.json")
    assert same(agent.path("debian-12"), source)
    left = state.read_bytes()
    agent.client.stop()
    assert not state.exists()
    state.write_bytes(left)
    agent.start()
    agent.kill_worker()
    assert agent.status()["images"] == []
