"""A cluster of agents in namespaces of their own, behind an image server that tracks them."""

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from functools import partial

import pytest

from agents import Agent, Lab, eventually, run_vmthunder
from agents import lab as lab
from conftest import VMTHUNDER
from vm.conftest import GuestDisk
from vm.conftest import busybox as busybox
from vmthunder.errors import VMThunderError
from vmthunder.lab.cluster import Cluster, Host
from vmthunder.vm.machine import Machines

IMAGE = "busybox"


class Fleet:
    """The cluster; commands over all nodes run on its origin, which is no node."""

    def __init__(self, lab: Lab, nodes: int) -> None:
        self.lab = lab
        self.cluster = Cluster.create(f"f{os.getpid()}", nodes, None)
        self.key_file = lab.directory / "cluster.key"
        self.url = f"http://{self.cluster.origin.address}:8930"
        self.agents: list[Agent] = []
        self.where = ["--tracker", self.url, "--cluster-key", self.key_file]

    def start(self) -> None:
        server = self.cluster.origin.run(
            lambda: self.lab.child(
                *(*VMTHUNDER, "server", "--root", self.lab.origin, "--listen", self.url.removeprefix("http://")),
                *("--cluster-key", self.key_file),
            )
        )
        assert server.stdout is not None
        assert server.stdout.readline().startswith("listening")
        for host in self.cluster.nodes:
            host.run(partial(self._start_agent, host))
        eventually(lambda: len(json.loads(self.run("swarm", "--json"))["nodes"]) == len(self.agents), "all are known")

    def _start_agent(self, host: Host) -> None:
        base = self.lab.directory / host.name
        agent = self.lab.agent(
            self.url,
            mount=base / "images",
            state_dir=base / "state",
            run_dir=base / "run",
            cluster_key=self.key_file,
            tracker=self.url,
            control_listen="0.0.0.0:8932",
        )
        self.agents.append(agent)

    def run(self, command: str, *arguments: object, exit_code: int = 0) -> str:
        """A command over all nodes, run from the origin."""
        return self.cluster.origin.run(lambda: run_vmthunder(command, *self.where, *arguments, exit_code=exit_code))

    def machines(self) -> list[list[str]]:
        """What is on each node's disk."""
        return [Machines(agent.state_dir).names() for agent in self.agents]

    def clean_up(self) -> None:
        try:
            for agent in self.agents:
                machines = Machines(agent.state_dir)
                for name in machines.names():
                    with suppress(VMThunderError):  # its boot, which a failed test left, may remove it just now
                        machines.destroy(name)
                agent.clean_up()
        finally:
            self.cluster.remove()


@pytest.fixture
def fleet(lab: Lab, busybox: GuestDisk) -> Iterator[Fleet]:
    """Four nodes with agents, and a small guest published."""
    run_vmthunder("publish", busybox.disk, IMAGE, "--origin", lab.origin, "--format", "raw")
    fleet = Fleet(lab, 4)
    try:
        fleet.start()
        yield fleet
    finally:
        fleet.clean_up()
