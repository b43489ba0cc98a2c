"""Images that are brought to nodes before they are used, and images that stay there."""

import json
from pathlib import Path

import pytest

from agents import Agent, Lab, disk_bytes, eventually, run_vmthunder, same
from conftest import VMTHUNDER, one_line
from prefetch.test_learning import node, server, source
from prefetch.test_replay import CHUNK, DATA, boot_set, image_of, read, save_profile
from tracker_server import Server

__all__ = ["server", "source"]

CHUNKS = len({DATA[at : at + CHUNK] for at in range(0, len(DATA), CHUNK)} - {bytes(CHUNK)})
"""Of the whole image."""


def test_what_boots_read_is_brought_and_a_guest_fetches_nothing(lab: Lab) -> None:
    source = lab.publish("debian", DATA)
    save_profile(lab, boot_set())
    agent = lab.agent()
    report = json.loads(run_vmthunder("precache", "debian", "--run-dir", agent.run_dir, "--json"))
    assert report["bytes"] == agent.status()["cache"]["bytes"]
    assert agent.status()["cache"]["chunks"] == 60
    before = agent.status()["fetch"]["chunks_fetched"]
    read(agent, source, boot_set())
    assert agent.status()["fetch"]["chunks_fetched"] == before


def test_a_whole_image_is_brought_at_a_rate(lab: Lab) -> None:
    lab.publish("debian", DATA)
    agent = lab.agent()
    run_vmthunder("precache", "debian", "--full", "--at", "400mbit", "--run-dir", agent.run_dir)
    assert agent.status()["cache"]["chunks"] == CHUNKS
    assert agent.status()["ahead"]["orders"] == []


def test_an_order_survives_the_worker_and_who_gave_it(lab: Lab) -> None:
    lab.publish("debian", DATA)
    agent = lab.agent()
    command = ("precache", "debian", "--full", "--at", "20mbit", "--run-dir", str(agent.run_dir))
    child = lab.child(*VMTHUNDER, *command)
    eventually(lambda: agent.status()["cache"]["chunks"] > 3, "it has begun")
    child.kill()
    agent.kill_worker()
    (order,) = agent.status()["ahead"]["orders"]
    assert order["what"] == "full"
    assert order["rate_bytes_s"] == 2_500_000
    eventually(lambda: agent.status()["ahead"]["orders"] == [], "it is done")
    assert agent.status()["cache"]["chunks"] == CHUNKS


def test_an_image_nobody_booted_cannot_be_brought_in_part(lab: Lab) -> None:
    lab.publish("debian", DATA)
    agent = lab.agent()
    line = one_line(run_vmthunder("precache", "debian", "--run-dir", agent.run_dir, exit_code=3))
    assert "--full" in line


def test_an_image_that_does_not_fit_is_refused(lab: Lab) -> None:
    lab.publish("debian", DATA)
    agent = lab.agent(cache_bytes=1 << 20)
    assert "--cache-size" in one_line(
        run_vmthunder("precache", "debian", "--full", "--run-dir", agent.run_dir, exit_code=6)
    )


def test_what_is_pinned_stays_whatever_else_is_read(lab: Lab) -> None:
    source = lab.publish("debian", DATA)
    other = lab.publish("other", disk_bytes(16 << 20, seed=2))
    save_profile(lab, boot_set())
    agent = lab.agent(cache_bytes=2 << 20, decoded_bytes=0, prefetch=False)
    assert same(agent.path("other"), other)  # the cache is full of what came first
    run_vmthunder("pin", "debian", "--run-dir", agent.run_dir)
    run_vmthunder("precache", "debian", "--run-dir", agent.run_dir)
    agent.drop_page_cache()
    agent.kill_worker()  # pins are known before the cache is
    assert same(agent.path("other"), other)
    before = agent.status()["fetch"]["chunks_fetched"]
    assert agent.status()["cache"]["evicted"] > 0
    read(agent, source, boot_set())
    assert agent.status()["fetch"]["chunks_fetched"] == before
    assert agent.status()["images"][0]["pinned"] == (agent.status()["images"][0]["name"] == "debian")
    run_vmthunder("unpin", "debian", "--run-dir", agent.run_dir)
    assert agent.status()["ahead"]["pinned"] == []
    one_line(run_vmthunder("unpin", "debian", "--run-dir", agent.run_dir, exit_code=3))


def test_a_policy_is_followed_and_read_again(lab: Lab, tmp_path: Path) -> None:
    lab.publish("debian", DATA)
    policy = tmp_path / "policy.toml"
    policy.write_text('[[image]]\nname = "debian"\nwhat = "full"\n')
    agent = lab.agent(policy=policy)
    eventually(lambda: agent.status()["cache"]["chunks"] == CHUNKS, "the image is brought")
    assert agent.status()["ahead"]["pinned"] == [image_of(lab).hex()]
    policy.write_text("[[image]]\n")
    eventually(lambda: agent.log_lines("policy_not_followed"), "a mistake is told")
    assert agent.status()["ahead"]["pinned"] == [image_of(lab).hex()]
    policy.write_text("")
    eventually(lambda: agent.status()["ahead"]["pinned"] == [], "it may leave again")


@pytest.mark.parametrize(
    "text", ["[[image]]", "x = 1", "[[image]]\nname='a'\nwhat='half'", "[[image]]\nname='../a'", "[", "image = 3"]
)
def test_a_policy_with_a_mistake_is_refused_at_the_start(tmp_path: Path, text: str) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text(text)
    line = run_vmthunder("agent", "--origin", tmp_path, "--policy", policy, "--run-dir", tmp_path / "run", exit_code=2)
    assert str(policy) in one_line(line)


def test_all_nodes_are_brought_an_image_from_any_machine(lab: Lab, server: Server, source: Path) -> None:
    agents: list[Agent] = [node(lab, server, name, control_listen="127.0.0.1:0") for name in ("one", "two")]
    order = ("precache", "debian", "--full", "--tracker", server.url, "--cluster-key", server.key_file, "--json")
    eventually(lambda: len(json.loads(run_vmthunder(*order))["nodes"]) == 2, "both nodes are known")
    for agent in agents:
        assert agent.status()["cache"]["chunks"] == CHUNKS
    assert sum(agent.status()["fetch"]["bytes_from_peers"] for agent in agents) > 0
    assert "no node x" in one_line(run_vmthunder(*order, "--nodes", "x", exit_code=3))


def test_the_rest_of_an_image_follows_its_boot(lab: Lab) -> None:
    source = lab.publish("debian", DATA)
    agent = lab.agent(hydrate_bytes_s=0)
    child = lab.holder(agent.path("debian"))
    read(agent, source, boot_set())
    agent.client.booted(image_of(lab).hex())
    eventually(lambda: agent.status()["cache"]["chunks"] == CHUNKS, "the image is whole")
    child.kill()
