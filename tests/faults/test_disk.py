"""Damaged and full disks below an agent: reads go on with the right bytes."""

import subprocess

from agents import Lab, disk_bytes, errno_of, eventually, finish, same


def test_a_flipped_bit_in_the_chunk_cache_is_found_counted_and_mended(lab: Lab) -> None:
    source = lab.publish("debian-12", disk_bytes(4 << 20))
    agent = lab.agent()
    assert same(agent.path("debian-12"), source)
    fetched = agent.status()["fetch"]["chunks_fetched"]
    eventually(lambda: agent.status()["cache"]["chunks"] == fetched, "all chunks to be stored")
    agent.client.stop()
    with (agent.state_dir / "chunks" / "00000000").open("r+b") as chunks:
        for page in (0, 1, 2):  # three chunks at least: this disk's have 64 KiB
            chunks.seek(page << 16)
            data = chunks.read(4096)
            chunks.seek(page << 16)
            chunks.write(bytes(byte ^ 1 for byte in data))
    agent.start()
    assert same(agent.path("debian-12"), source)
    status = agent.status()
    assert (status["cache"]["corrupt"], status["fetch"]["chunks_fetched"]) == (3, 3)
    assert status["cache"]["chunks"] == fetched


def test_damaged_manifests_and_refs_on_disk_are_fetched_again(lab: Lab) -> None:
    source = lab.publish("debian-12", disk_bytes(1 << 20))
    agent = lab.agent()
    assert same(agent.path("debian-12"), source)
    agent.client.stop()
    for directory in ("manifests", "refs"):
        for path in (agent.state_dir / directory).iterdir():
            path.write_bytes(path.read_bytes()[:-7])
        (agent.state_dir / directory / "not a name of ours").write_text("")
    agent.start()
    assert same(agent.path("debian-12"), source)
    assert agent.log_lines("manifest_dropped")


def test_a_worker_that_finds_its_manifest_damaged_while_the_image_is_open_gets_another(lab: Lab) -> None:
    source = lab.publish("debian-12", disk_bytes(4 << 20))
    agent = lab.agent()
    reader = lab.reader(agent.path("debian-12"), source)
    eventually(lambda: agent.status()["images"], "the image is open")
    for path in (agent.state_dir / "manifests").iterdir():
        path.write_bytes(b"")
    agent.kill_worker()
    assert int(finish([reader])[0]) > 0


def test_a_full_disk_costs_the_cache_and_nothing_else(lab: Lab) -> None:
    source = lab.publish("debian-12", disk_bytes(16 << 20))
    state = lab.directory / "small"
    state.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", state], check=True)
    try:
        agent = lab.agent(state_dir=state, decoded_bytes=1 << 20)
        assert same(agent.path("debian-12"), source)
        readers = [lab.reader(agent.path("debian-12"), source, seed, "direct") for seed in range(2)]
        agent.kill_worker()
        assert all(int(reads) > 0 for reads in finish(readers))
        assert agent.status()["cache"]["bytes"] < 4 << 20
        agent.client.stop()
    finally:
        subprocess.run(["umount", "-l", state], check=True)


def test_a_run_directory_without_space_fails_new_opens_and_no_open_file(lab: Lab) -> None:
    source = lab.publish("debian-12", disk_bytes(4 << 20))
    run = lab.directory / "run-disk"
    run.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", run], check=True)
    try:
        agent = lab.agent(run_dir=run)
        reader = lab.reader(agent.path("debian-12"), source)
        eventually(lambda: agent.status()["images"], "the image is open")
        subprocess.run(["dd", "if=/dev/zero", f"of={run}/filler", "bs=4k"], check=False, capture_output=True)
        assert errno_of("os.stat(sys.argv[1])", agent.path("debian-12")) == "ENOSPC"
        (run / "filler").unlink()
        assert same(agent.path("debian-12"), source)
        assert int(finish([reader])[0]) > 0
        agent.client.stop()
    finally:
        subprocess.run(["umount", "-l", run], check=True)
