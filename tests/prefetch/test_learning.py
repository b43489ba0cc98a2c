"""Boots teach each other, through a real server: what one node reads is on the next before it asks."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agents import Agent, Lab, eventually
from prefetch.test_replay import DATA, boot_set, image_of, read, replayed
from tracker_server import Server, running_server


@pytest.fixture
def source(lab: Lab) -> Path:
    return lab.publish("debian", DATA)


@pytest.fixture
def server(lab: Lab, source: Path) -> Iterator[Server]:
    with running_server(lab.directory) as server:
        yield server


def node(lab: Lab, server: Server, name: str, **settings: Any) -> Agent:
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
        },
    )


def test_a_second_node_has_what_the_first_one_booted(lab: Lab, server: Server, source: Path) -> None:
    indexes = boot_set()
    one = node(lab, server, "one")
    child = lab.holder(one.path("debian"))
    read(one, source, indexes)
    one.client.booted(image_of(lab).hex())
    eventually(lambda: one.status()["prefetch"]["boots_sent"] == 1, "the boot is told to the server")
    two = node(lab, server, "two")
    other = lab.holder(two.path("debian"))
    replayed(two)
    read(two, source, indexes)
    status = two.status()
    assert status["prefetch"]["misses"] == 0
    assert status["prefetch"]["hits"] == status["fetch"]["chunks_fetched"] == 60
    assert status["fetch"]["bytes_from_peers"] > 0
    for one_child in (child, other):
        one_child.kill()


def test_nodes_that_boot_together_tell_each_other_what_they_touch(lab: Lab, server: Server, source: Path) -> None:
    indexes = boot_set()
    one, two = node(lab, server, "one"), node(lab, server, "two")
    children = [lab.holder(agent.path("debian")) for agent in (one, two)]
    read(two, source, indexes[-1:])  # it boots, and is far behind
    read(one, source, indexes[:-1])
    # Some of it comes by on its way to the first one.
    eventually(lambda: two.status()["cache"]["chunks"] == 60, "the second is told what the first one touched")
    assert two.status()["prefetch"]["chunks"] > 0
    read(two, source, indexes)
    assert two.status()["fetch"]["chunks_fetched"] == 60
    for child in children:
        child.kill()


def test_without_the_server_boots_go_on(lab: Lab, server: Server, source: Path) -> None:
    agent = node(lab, server, "one", origin=str(lab.origin))
    server.kill()
    indexes = boot_set()
    read(agent, source, indexes)
    assert agent.status()["fetch"]["chunks_fetched"] == 60
