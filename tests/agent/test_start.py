"""Starting, stopping and talking to an agent: what an operator may get wrong ends in one line and the right exit code."""

import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from agents import Lab, alive, disk_bytes, eventually, output_of, run_vmthunder, same
from conftest import VMTHUNDER, one_line
from vmthunder.errors import AgentUnavailable, Usage
from vmthunder.fuse import mounts
from vmthunder.node.control import AgentClient
from vmthunder.node.settings import AgentSettings


def test_the_socket_is_for_root_only(lab: Lab) -> None:
    lab.publish("debian-12", b"x")
    agent = lab.agent()
    assert stat.S_IMODE((agent.run_dir / "agent.sock").stat().st_mode) == 0o600


def test_status_for_people_names_images_and_sizes(lab: Lab) -> None:
    source = lab.publish("debian-12", disk_bytes(1 << 20))
    agent = lab.agent()
    assert same(agent.path("debian-12"), source)
    text = run_vmthunder("status", "--run-dir", agent.run_dir)
    assert "debian-12" in text
    assert "on demand" in text
    assert "1.0 MiB" in text


def test_stop_unmounts_and_leaves_nothing_that_runs(lab: Lab) -> None:
    lab.publish("debian-12", b"x")
    agent = lab.agent()
    status = agent.status()
    assert "unmounted" in run_vmthunder("agent", "--stop", "--run-dir", agent.run_dir)
    assert mounts.find_mount(str(agent.mount)) is None
    eventually(lambda: not any(alive(status[key]) for key in ("pid", "keeper_pid")), "the end of both processes")
    assert "no agent answers" in run_vmthunder("agent", "--stop", "--run-dir", agent.run_dir, exit_code=10)


def test_stop_under_users_says_who_loses_what(lab: Lab) -> None:
    source = lab.publish("debian-12", disk_bytes(8 << 20))
    agent = lab.agent()
    holder = lab.holder(agent.path("debian-12"))
    assert "who had debian-12 open" in run_vmthunder("agent", "--stop", "--run-dir", agent.run_dir)
    assert mounts.find_mount(str(agent.mount)) is None
    assert holder.communicate("", timeout=10)[0] == ""
    agent.start()
    assert same(agent.path("debian-12"), source)


def test_restart_hands_the_mount_over_and_keeps_the_counters_of_restarts(lab: Lab) -> None:
    lab.publish("debian-12", b"x")
    agent = lab.agent()
    before = agent.status()
    assert str(agent.mount) in run_vmthunder("agent", "--restart", "--run-dir", agent.run_dir)
    after = agent.status()
    assert after["restarts"] == before["restarts"] + 1
    assert (after["keeper_pid"], after["pid"] != before["pid"]) == (before["keeper_pid"], True)
    assert after["uptime_s"] >= before["uptime_s"]
    assert "CRITICAL" not in agent.log
    assert "event=leaving how=handover" in agent.log


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_an_agent_in_the_foreground_stops_on_a_signal(lab: Lab, name: signal.Signals) -> None:
    lab.publish("debian-12", b"x")
    agent = lab.idle_agent()
    keeper = subprocess.Popen(
        [*VMTHUNDER, "agent", *agent.arguments], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    eventually((agent.run_dir / "agent.sock").exists, "the socket")
    assert agent.status()["keeper_pid"] == keeper.pid, "the keeper takes the place of the command"
    # As a terminal does it: to the whole group.
    os.killpg(keeper.pid, name)
    errors = keeper.communicate(timeout=20)[1]
    assert keeper.returncode == 0, errors
    assert mounts.find_mount(str(agent.mount)) is None


def test_an_agent_in_the_foreground_ends_with_the_worker_s_exit_code(lab: Lab) -> None:
    agent = lab.idle_agent("/nonexistent/origin")
    assert "/nonexistent/origin" in run_vmthunder("agent", *agent.arguments, exit_code=3).splitlines()[-1]
    assert mounts.find_mount(str(agent.mount)) is None


def test_bad_starts_end_in_one_line_and_the_right_exit_code(lab: Lab) -> None:
    lab.publish("debian-12", b"x")
    running = lab.agent()
    file = lab.directory / "file"
    file.write_text("")
    free = lab.idle_agent(**{key: lab.directory / "free" / key for key in ("mount", "state_dir", "run_dir")})

    def fails(exit_code: int, *options: object) -> str:
        return one_line(run_vmthunder("agent", "--detach", *free.arguments, *options, exit_code=exit_code))

    assert "already runs" in fails(8, "--run-dir", running.run_dir)
    assert "another agent uses" in fails(8, "--state-dir", running.state_dir)
    assert "running agent" in fails(8, "--mount", running.mount)
    assert "already mounted at /proc" in fails(8, "--mount", "/proc")
    assert "not a directory" in fails(2, "--mount", file)
    assert "not a directory" in fails(2, "--state-dir", file)
    assert "not a directory" in fails(2, "--run-dir", file / "below")
    assert "too long" in fails(2, "--run-dir", lab.directory / ("r" * 120))
    assert "no-such-origin" in fails(3, "--origin", lab.directory / "no-such-origin")
    assert "gopher" in fails(2, "--origin", "gopher://images")
    assert "exclude each other" in run_vmthunder("agent", "--stop", "--restart", exit_code=2)
    for order in ("--restart", "--stop"):
        said = run_vmthunder("agent", order, "--run-dir", running.run_dir, "--cache-size", "1GiB", exit_code=2)
        assert f"{order} leaves the settings as they are; without --cache-size" in one_line(said)
    assert "--origin" in run_vmthunder("agent", "--detach", exit_code=2)
    assert mounts.find_mount(str(free.mount)) is None
    assert running.status()["restarts"] == 0


def test_an_agent_needs_root(lab: Lab) -> None:
    command = [sys.executable, "-c", _AS_NOBODY, "agent", *lab.idle_agent().arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 7, done.stderr
    assert "as root" in one_line(done.stderr)


_AS_NOBODY = """
import os
import vmthunder.cli.agent, vmthunder.node.agent
from vmthunder.cli.main import main
os.setresuid(65534, 65534, 65534)
main()
"""
"""Imports first: nobody may perhaps not read them."""


def test_what_a_killed_agent_left_behind_does_not_hinder_the_next(lab: Lab) -> None:
    source = lab.publish("debian-12", disk_bytes(100_000))
    agent = lab.agent()
    status = agent.status()
    output_of("ls", "-l", agent.mount)  # the kernel remembers the root's attributes, and shows them after our death
    # The keeper first: it would start another worker.
    for key in ("keeper_pid", "pid"):
        os.kill(status[key], signal.SIGKILL)
    eventually(lambda: not alive(status["pid"]), "the death of the worker")
    assert (agent.run_dir / "agent.sock").exists()
    with pytest.raises(AgentUnavailable, match="vmthunder agent"):
        agent.client.status()
    agent.start()
    assert same(agent.path("debian-12"), source)


def test_without_an_agent_there_is_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    for command in (
        ["status"],
        ["materialize", "x"],
        ["dematerialize", "x"],
        ["agent", "--stop"],
        ["agent", "--restart"],
    ):
        assert "`vmthunder agent`" in one_line(run_vmthunder(*command, "--run-dir", tmp_path, exit_code=10))


def test_nonsense_on_the_socket_is_refused_and_harms_nobody(lab: Lab) -> None:
    lab.publish("debian-12", b"x")
    agent = lab.agent()
    for request in (b"", b"\n", b"{}\n", b"[1]\n", b'{"do": "explode"}\n', b"\xff\xfe\n", b"x" * 200_000):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(agent.run_dir / "agent.sock"))
            connection.settimeout(10)
            try:
                connection.sendall(request)
                connection.shutdown(socket.SHUT_WR)
                answer = connection.recv(1000)
            except ConnectionError:
                answer = b""
            assert answer == b"" or b'"exit_code": 2' in answer
    status = agent.status()
    assert status["restarts"] == 0
    assert "CRITICAL" not in agent.log


def test_a_client_waits_for_the_successor_of_a_killed_worker(lab: Lab) -> None:
    lab.publish("debian-12", b"x")
    agent = lab.agent()
    pid = agent.status()["pid"]
    seen: list[int] = []
    thread = threading.Thread(
        target=lambda: [seen.append(AgentClient(agent.run_dir / "agent.sock").status()["pid"]) for _ in range(200)]
    )
    thread.start()
    os.kill(pid, signal.SIGKILL)
    thread.join(30)
    assert len(seen) == 200
    assert seen[-1] != pid


def test_settings_survive_the_way_to_the_worker() -> None:
    settings = AgentSettings("s3://bucket/prefix", Path("/m"), Path("/s"), Path("/r"), 1, 2, 0.5)
    assert AgentSettings.from_json(settings.to_json()) == settings
    for text in ("", "[]", "{}", '{"origin": 1}'):
        with pytest.raises(Usage):
            AgentSettings.from_json(text)
    with pytest.raises(Usage, match="absolute"):
        AgentSettings("o", Path("m"), Path("/s"), Path("/r"))
