"""`vmthunder lab`: a cluster of network namespaces on one machine."""

import os

import click
from rich.table import Table

from vmthunder.cli.output import console, emit, json_option, size_text
from vmthunder.errors import MissingTool, Usage
from vmthunder.lab.cluster import MAX_NODES, Cluster, clusters, remove_cluster
from vmthunder.lab.shaping import Rate

name_option = click.option("--name", default="lab", help="Name of the cluster.")


class RateType(click.ParamType[Rate]):
    """A link rate."""

    name = "rate"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Rate:
        del param, ctx
        return value if isinstance(value, Rate) else Rate.parse(str(value))


class NodeCountsType(click.ParamType[list[int]]):
    """Numbers of nodes, each for a cluster of its own: `8` or `1,4,8`."""

    name = "N,…"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        del param, ctx
        if isinstance(value, list):
            return value
        parts = str(value).split(",")
        if not all(part.isdecimal() and 1 <= int(part) <= MAX_NODES for part in parts):
            raise Usage(f"{value!r} is no list of numbers of nodes; write 8 or 1,4,8, each at most {MAX_NODES}")
        return [int(part) for part in parts]


RATE = RateType()
NODE_COUNTS = NodeCountsType()


@click.group()
def lab() -> None:
    """A cluster on this machine, to try things out and to measure.

    Hosts `origin` and `node1`, `node2`, … are network namespaces on one bridge; each link is shaped both ways. They share
    the machine's files and processes. Needs root. Nothing is in the machine's own network.

    \b
      vmthunder lab up --nodes 4 --rate 200mbit
      vmthunder lab exec origin -- vmthunder server --root /srv/images --listen 198.18.0.1:8930 &
      vmthunder lab exec node1 -- vmthunder agent --origin http://198.18.0.1:8930 --detach …
      vmthunder lab status
      vmthunder lab down
    """


@lab.command()
@click.option("--nodes", type=click.IntRange(1, 1000), default=4, help="Compute nodes.")
@click.option("--rate", type=RATE, help="Speed of each link, each way: 200mbit, 1gbit.  [default: unlimited]")
@click.option("--origin-rate", type=RATE, help="Speed of the origin's link.  [default: --rate]")
@name_option
@json_option
def up(nodes: int, rate: Rate | None, origin_rate: Rate | None, name: str, as_json: bool) -> None:
    """Make a cluster."""
    cluster = Cluster.create(name, nodes, rate, origin_rate)
    hosts = {host.name: host.address for host in cluster.hosts.values()}
    cluster.close()
    emit(
        as_json,
        {"name": name, "hosts": hosts},
        lambda: console.print(
            f"cluster {name} is up: origin at {hosts['origin']}, {nodes} nodes from {hosts['node1']} on; "
            f"`vmthunder lab exec node1 -- COMMAND` runs a command there"
        ),
    )


@lab.command(context_settings={"ignore_unknown_options": True})
@name_option
@click.argument("host")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def exec(name: str, host: str, command: tuple[str, ...]) -> None:  # noqa: A001 - it is the command's name
    """Run COMMAND on HOST; its exit code is the command's.

    HOST is `origin`, `node1`, `node2`, …; `vmthunder lab status` shows them. Options of COMMAND stand after `--`. It has
    the host's network; files, users and processes are the machine's, so give each node's agent directories of its own:

    \b
      vmthunder lab exec node1 -- vmthunder agent --origin http://198.18.0.1:8930 \\
          --state-dir /tmp/node1 --run-dir /tmp/node1/run --detach
      vmthunder lab exec node1 -- vmthunder status --run-dir /tmp/node1/run
      vmthunder lab exec node1 -- ping -c 1 198.18.0.1

    What goes on in the background ends with `vmthunder lab down`.
    """
    Cluster(name).host(host).namespace.enter()
    try:
        os.execvp(command[0], command)
    except FileNotFoundError:
        raise MissingTool(f"no command {command[0]!r} on this machine") from None


@lab.command()
@name_option
@json_option
def status(name: str, as_json: bool) -> None:
    """Show the hosts and what went over their links."""
    cluster = Cluster(name)
    counters = cluster.counters()
    processes = {host.name: len(host.namespace.processes()) for host in cluster.hosts.values()}
    rows = [
        {"host": host.name, "address": host.address, "processes": processes[host.name], **counters[host.name]._asdict()}
        for host in cluster.hosts.values()
    ]

    def human() -> None:
        table = Table("host", "address", "processes", "sent", "received")
        for host in cluster.hosts.values():
            sizes = map(size_text, counters[host.name])
            table.add_row(host.name, host.address, str(processes[host.name]), *sizes)
        console.print(table)

    emit(as_json, {"name": name, "hosts": rows}, human)


@lab.command()
@name_option
@click.option("--all", "everything", is_flag=True, help="All clusters, and whatever crashes have left of some.")
@json_option
def down(name: str, everything: bool, as_json: bool) -> None:
    """End a cluster and the processes in it; leaves nothing behind."""
    names = clusters() if everything else [name]
    ended = sum(remove_cluster(each) for each in names)
    emit(
        as_json,
        {"clusters": names, "processes": ended},
        lambda: console.print(f"ended {', '.join(names) or 'nothing'} and {ended} processes"),
    )
