"""Agents find each other through the tracker, and do without it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agents import Agent, Lab, disk_bytes, eventually, finish, run_vmthunder, same
from tracker_server import Server, running_server

DATA = disk_bytes(1 << 20)


@pytest.fixture
def server(lab: Lab) -> Iterator[Server]:
    lab.publish("debian", DATA)
    with running_server(lab.directory) as server:
        yield server


def agent_of(lab: Lab, server: Server, name: str, **settings: Any) -> Agent:
    base = lab.directory / name
    return lab.agent(
        **{
            "origin": server.url,
            "mount": base / "images",
            "state_dir": base / "state",
            "run_dir": base / "run",
            "cluster_key": server.key_file,
            "tracker": server.url,
            "peer_listen": "127.0.0.1:0",
            **settings,
        }
    )


def source(lab: Lab) -> Path:
    return next(lab.directory.glob("debian-*.raw"))


def swarms(server: Server) -> list[dict[str, Any]]:
    found = run_vmthunder("swarm", "--tracker", server.url, "--cluster-key", server.key_file, "--json")
    result: list[dict[str, Any]] = json.loads(found)["swarms"]
    return result


def node_ids(server: Server) -> list[str]:
    return [member[0] for found in swarms(server) for member in found["members"]]


def test_an_agent_is_in_the_swarm_of_what_it_reads_until_it_is_stopped(lab: Lab, server: Server) -> None:
    one, two = agent_of(lab, server, "a", rack="r1"), agent_of(lab, server, "b")
    assert one.status()["swarm"]["swarms"] == []
    for agent in (one, two):
        assert same(agent.path("debian"), source(lab))
    ids = [agent.status()["swarm"]["node_id"] for agent in (one, two)]
    assert node_ids(server) == ids
    assert one.status()["swarm"]["peers"]["sent_bytes"] > 0
    eventually(lambda: one.status()["swarm"]["swarms"][0]["members"] == 2, "the first sees the second")
    assert "2 nodes" in run_vmthunder("status", "--run-dir", one.run_dir)
    one.client.stop()
    assert node_ids(server) == ids[1:]


def test_a_worker_that_dies_keeps_its_place(lab: Lab, server: Server) -> None:
    agent = agent_of(lab, server, "a")
    child = lab.holder(agent.path("debian"))
    before = eventually(lambda: node_ids(server), "the agent joins when the image is opened")
    agent.kill_worker()
    eventually(lambda: agent.status()["swarm"]["swarms"], "the successor is in the swarm")
    assert node_ids(server) == before
    finish([child])


def test_an_agent_without_its_tracker_reads_from_the_origin(lab: Lab, server: Server) -> None:
    server.kill()
    agent = agent_of(lab, server, "a", origin=str(lab.origin))
    assert same(agent.path("debian"), source(lab))
    assert agent.status()["swarm"]["tracker_reachable"] is False
    assert len(agent.log_lines("tracker_away")) == 1


def test_an_agent_whose_key_file_went_away_goes_on_with_what_it_has(lab: Lab, server: Server) -> None:
    agent = agent_of(lab, server, "a")
    assert same(agent.path("debian"), source(lab))
    child = lab.holder(agent.path("debian"))
    key = server.key_file.rename(lab.directory / "moved")
    agent.kill_worker()
    agent.drop_page_cache()
    finish([child])
    assert agent.status()["swarm"] is None
    assert len(agent.log_lines("cluster_key_lost")) == 1
    key.rename(server.key_file)
    agent.client.restart()
    assert agent.status()["swarm"] is not None


def test_without_a_key_an_agent_is_in_no_swarm(lab: Lab) -> None:
    lab.publish("debian", DATA)
    with lab.server() as (_, url):
        agent = lab.agent(url)
        assert same(agent.path("debian"), source(lab))
        assert agent.status()["swarm"] is None


def test_a_worker_has_no_http_library(lab: Lab, server: Server) -> None:
    agent = agent_of(lab, server, "a")
    assert same(agent.path("debian"), source(lab))
    assert "aiohttp" not in Path(f"/proc/{agent.status()['pid']}/maps").read_text()


@pytest.mark.parametrize(
    ("options", "code", "line"),
    [
        (["--tracker", "http://127.0.0.1:9"], 2, "give it with --cluster-key, or use --no-p2p"),
        (["--cluster-key", "/nonexistent"], 3, "no cluster key at /nonexistent"),
        (["--peer-listen", "here"], 2, "--peer-listen 'here' is not ADDRESS:PORT"),
        (["--upload-limit", "fast"], 2, "is not a rate"),
    ],
)
def test_settings_that_make_no_sense_are_refused(lab: Lab, options: list[str], code: int, line: str) -> None:
    lab.origin.mkdir()
    places = ["--origin", lab.origin, "--state-dir", lab.directory, "--run-dir", lab.directory]
    assert line in run_vmthunder("agent", *places, *options, "--detach", exit_code=code)
