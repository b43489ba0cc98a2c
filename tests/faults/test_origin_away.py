"""The origin goes away and comes back: reads wait, nobody gets an error, the operator is told."""

import json
import signal
import time
from urllib.parse import urlsplit

from agents import Lab, disk_bytes, errno_of, eventually, finish, run_vmthunder, same
from vmthunder.fuse import mounts


def test_reads_wait_while_the_origin_is_away_and_the_log_says_so_once(lab: Lab) -> None:
    source = lab.publish("debian-12", disk_bytes(8 << 20))
    with lab.server() as (server, url):
        agent = lab.agent(url)
        assert same_start(lab, agent.path("debian-12"), source)
        server.send_signal(signal.SIGKILL)
        server.wait()
        reader = lab.child("cmp", agent.path("debian-12"), source)
        waiting = eventually(lambda: agent.status()["waiting"], "somebody waits")
        assert waiting[0]["since_s"] >= 0
        assert waiting[0]["why"]
        assert "waiting" in run_vmthunder("status", "--run-dir", agent.run_dir)
        time.sleep(2)
        assert reader.poll() is None
    with lab.server(port=urlsplit(url).port or 0):
        finish([reader])
        assert agent.status()["waiting"] == []
    assert len([line for line in agent.log.splitlines() if "ERROR" in line]) == 1
    assert len([line for line in agent.log.splitlines() if "origin is back" in line]) == 1


def test_a_known_image_opens_while_the_origin_is_away(lab: Lab) -> None:
    source = lab.publish("debian-12", disk_bytes(500_000))
    with lab.server() as (_, url):
        agent = lab.agent(url)
        assert same(agent.path("debian-12"), source)
    agent.client.restart()
    agent.drop_page_cache()
    assert same(agent.path("debian-12"), source), "all of it is in the chunk cache"
    assert agent.client.resolve("debian-12")["name"] == "debian-12"
    assert len(agent.log_lines("ref_from_memory")) == 1


def test_opening_an_image_that_nobody_knows_gives_up_after_the_time_the_operator_set(lab: Lab) -> None:
    lab.publish("debian-12", b"x")
    with lab.server() as (_, url):
        agent = lab.agent(url, lookup_timeout_s=0.7)
    start_s = time.monotonic()
    assert errno_of("os.stat(sys.argv[1])", agent.path("debian-12")) == "ETIMEDOUT"
    assert time.monotonic() - start_s < 10
    assert "debian-12" in run_vmthunder("materialize", "debian-12", "--run-dir", agent.run_dir, exit_code=5)


def test_opening_waits_for_an_origin_that_comes_back_in_time(lab: Lab) -> None:
    source = lab.publish("debian-12", disk_bytes(100_000))
    with lab.server() as (_, url):
        agent = lab.agent(url)
    comparing = lab.child("cmp", agent.path("debian-12"), source)
    eventually(lambda: any(entry["image"] == "debian-12" for entry in agent.status()["waiting"]), "the lookup waits")
    with lab.server(port=urlsplit(url).port or 0):
        finish([comparing])


def test_a_worker_killed_while_reads_wait_leaves_them_to_its_successor(lab: Lab) -> None:
    source = lab.publish("debian-12", disk_bytes(4 << 20))
    with lab.server() as (_, url):
        agent = lab.agent(url)
        assert same_start(lab, agent.path("debian-12"), source)
    reader = lab.child("cmp", agent.path("debian-12"), source)
    eventually(lambda: agent.status()["waiting"], "somebody waits")
    agent.kill_worker()
    eventually(lambda: agent.status()["waiting"], "somebody waits again")
    agent.client.restart()
    eventually(lambda: agent.status()["waiting"], "somebody waits once more")
    assert reader.poll() is None
    with lab.server(port=urlsplit(url).port or 0):
        finish([reader])


def test_an_agent_with_waiting_reads_stops_and_a_killed_reader_is_let_go(lab: Lab) -> None:
    source = lab.publish("debian-12", disk_bytes(4 << 20))
    with lab.server() as (_, url):
        agent = lab.agent(url)
        assert same_start(lab, agent.path("debian-12"), source)
    killed, left = (lab.child("cmp", agent.path("debian-12"), source) for _ in range(2))
    eventually(lambda: agent.status()["waiting"], "somebody waits")
    killed.kill()
    assert killed.wait(10) == -signal.SIGKILL
    run_vmthunder("agent", "--stop", "--run-dir", agent.run_dir)
    assert left.wait(10) != 0
    assert mounts.find_mount(str(agent.mount)) is None


def test_an_agent_starts_while_its_origin_is_away(lab: Lab) -> None:
    source = lab.publish("debian-12", disk_bytes(100_000))
    with lab.server() as (_, url):
        pass
    agent = lab.agent(url)
    with lab.server(port=urlsplit(url).port or 0):
        assert same(agent.path("debian-12"), source)


def test_a_damaged_ref_is_an_error_at_once_and_names_the_ref(lab: Lab) -> None:
    lab.publish("debian-12", b"x")
    agent = lab.agent()
    ref = lab.origin / "refs" / "debian-12"
    ref.write_text(json.dumps({"nonsense": True}))
    start_s = time.monotonic()
    assert errno_of("os.stat(sys.argv[1])", agent.path("debian-12")) == "EIO"
    assert "debian-12" in run_vmthunder("materialize", "debian-12", "--run-dir", agent.run_dir, exit_code=4)
    assert time.monotonic() - start_s < 10


def same_start(lab: Lab, path: object, source: object) -> bool:
    """Whether the first pages are right: makes the image known, and little more than that."""
    child = lab.child("cmp", "-n", "4096", path, source)
    child.communicate(timeout=30)
    return child.returncode == 0
