"""`vmthunder boot`, `ps`, `console`, `destroy`: virtual machines of this host."""

import asyncio
import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.table import Table

from vmthunder.cli.cluster_key import cluster_key_option
from vmthunder.cli.output import console as terminal
from vmthunder.cli.output import emit, json_option, size_text
from vmthunder.cli.sizes import BYTES
from vmthunder.cli.swarm import tracker_option
from vmthunder.errors import Usage, VMThunderError
from vmthunder.node.control import AgentClient
from vmthunder.node.settings import DEFAULT_RUN_DIR, DEFAULT_STATE_DIR, control_socket
from vmthunder.vm.backing import BackingImage, NodeCounters
from vmthunder.vm.boot import BootReport, Step
from vmthunder.vm.boot import boot as boot_machine
from vmthunder.vm.console import attach
from vmthunder.vm.machine import Machines
from vmthunder.vm.ready import DEFAULT_PATTERN, ConsolePattern, GuestAgent, ReadyCheck, TcpPort
from vmthunder.vm.seed import read_ssh_keys, read_user_data
from vmthunder.vm.spec import SSH_PORT, Accel, CacheMode, Driver, Spec

PATH = click.Path(path_type=Path)
PORT = click.IntRange(1, 65535)
Command = TypeVar("Command", bound=Callable[..., Any])


def state_dir_option(command: Command) -> Command:
    return click.option(
        "--state-dir", type=PATH, default=DEFAULT_STATE_DIR, envvar="VMTHUNDER_STATE_DIR", help="Where vms are kept."
    )(command)


@click.command()
@click.argument("image")
@click.option("--name", help="Name of the vm, and its host name.  [default: IMAGE-1, IMAGE-2, …]")
@click.option("--memory", type=BYTES, default="256MiB", help="Memory of the guest.")
@click.option("--cpus", type=click.IntRange(1, 255), default=1, help="Virtual CPUs.")
@click.option("--disk-size", type=BYTES, help="Size of the guest's disk.  [default: that of the image]")
@click.option("--user-data", type=PATH, help="File for cloud-init: cloud-config, script, MIME archive.")
@click.option("--ssh-key", type=PATH, help="File of public keys that may log in; forwards a port to the guest's 22.")
@click.option("--forward", type=PORT, multiple=True, help="TCP port of the guest to reach from here; may be repeated.")
@click.option(
    "--driver", type=click.Choice([*map(str, Driver)]), default=Driver.QEMU.value, help="QEMU, or user-mode Linux."
)
@click.option(
    "--accel",
    type=click.Choice([*map(str, Accel)]),
    default=Accel.AUTO.value,
    help="auto: KVM where it runs a guest, else TCG.",
)
@click.option(
    "--cache",
    type=click.Choice([*map(str, CacheMode)]),
    default=CacheMode.WRITEBACK.value,
    help="QEMU's cache mode of the disk.",
)
@click.option("--kernel", type=PATH, help="Boot this kernel directly, not by firmware and boot loader.")
@click.option("--initrd", type=PATH, help="With --kernel.")
@click.option("--append", help="Kernel command line, with --kernel or user-mode Linux.")
@click.option(
    "--ready-pattern", help=f"Ready when this regular expression is on the console.  [default: {DEFAULT_PATTERN}]"
)
@click.option("--ready-agent", is_flag=True, help="Ready when the QEMU guest agent answers.")
@click.option("--ready-port", type=PORT, help="Ready when this TCP port of the guest accepts connections.")
@click.option("--timeout", "timeout_s", type=click.FloatRange(min=0.1), default=300, help="Seconds to become ready in.")
@click.option("--count", type=click.IntRange(min=1), help="Boot so many, on the nodes that have the fewest vms.")
@click.option("--per-node", type=click.IntRange(min=1), help="Boot so many on each node.")
@tracker_option
@cluster_key_option
@state_dir_option
@click.option(
    "--run-dir", type=PATH, default=DEFAULT_RUN_DIR, envvar="VMTHUNDER_RUN_DIR", help="Where the agent answers."
)
@click.option("--progress", is_flag=True, hidden=True, help="Say on stderr, in lines of JSON, how far the boot is.")
@json_option
def boot(
    image: str,
    name: str | None,
    memory: int,
    cpus: int,
    disk_size: int | None,
    user_data: Path | None,
    ssh_key: Path | None,
    forward: tuple[int, ...],
    driver: str,
    accel: str,
    cache: str,
    kernel: Path | None,
    initrd: Path | None,
    append: str | None,
    ready_pattern: str | None,
    ready_agent: bool,
    ready_port: int | None,
    timeout_s: float,
    count: int | None,
    per_node: int | None,
    tracker: str | None,
    cluster_key: Path | None,
    state_dir: Path,
    run_dir: Path,
    progress: bool,
    as_json: bool,
) -> None:
    """Boot a vm from a published IMAGE and wait until it is ready.

    Nothing is copied: the guest starts at once on an overlay of its own, and what it reads comes in through this host's
    agent. Prints where the time went, what the guest read, and what of it had to be fetched.

    With --count or --per-node, boots many at once on the nodes that the tracker knows, from any machine: NAME-1, NAME-2, ….
    A node that fails does not stop the others.
    """
    if count is not None or per_node is not None:
        if count is not None and per_node is not None:
            raise Usage("choose one of --count and --per-node")
        if kernel or initrd:
            raise Usage("--kernel and --initrd are files of this machine; boot from the image's own on other nodes")
        # Imported here: this host's vms need no HTTP.
        from vmthunder.cli.fleet import boot_many, contents, over_nodes, print_storm

        wanted = {
            "image": image,
            "memory": memory,
            "cpus": cpus,
            "disk_size": disk_size,
            "user_data": user_data and contents(user_data),
            "ssh_key": ssh_key and contents(ssh_key),
            "forward": list(forward),
            "driver": driver,
            "accel": accel,
            "cache": cache,
            "append": append,
            "ready_pattern": ready_pattern,
            "ready_agent": ready_agent,
            "ready_port": ready_port,
            "timeout": timeout_s,
        }
        given = {option: value for option, value in wanted.items() if value is not None}
        storm = over_nodes(tracker, cluster_key, lambda nodes: boot_many(nodes, name or image, count, per_node, given))
        print_storm(storm, as_json)
        return
    ports = {
        *forward,
        *([SSH_PORT] if ssh_key and driver == Driver.QEMU else []),
        *([ready_port] if ready_port else []),
    }
    spec = Spec(
        driver=Driver(driver),
        accel=Accel(accel),
        memory_bytes=memory,
        cpus=cpus,
        disk_bytes=disk_size,
        cache=CacheMode(cache),
        user_data=read_user_data(user_data) if user_data else None,
        ssh_keys=tuple(read_ssh_keys(ssh_key)) if ssh_key else (),
        kernel=kernel,
        initrd=initrd,
        append=append,
        guest_ports=frozenset(ports),
        agent_channel=ready_agent,
    )
    ready = _ready_check(ready_pattern, ready_agent, ready_port)
    agent = AgentClient(control_socket(run_dir))
    backing = BackingImage.resolve(agent, image)
    report = asyncio.run(
        boot_machine(
            Machines(state_dir),
            name,
            backing,
            spec,
            ready,
            timeout_s=timeout_s,
            counters=lambda: NodeCounters.now(agent),
            on_step=_tell if progress else lambda _: None,
        )
    )
    with contextlib.suppress(VMThunderError):  # a guest that runs needs no agent
        agent.booted(backing.image_id)
    emit(as_json, report.to_dict(), lambda: _print_report(report))


def _tell(step: Step) -> None:
    try:
        click.echo(json.dumps({"step": step}), err=True)
    except OSError:
        pass  # Who asked for it is gone. That is no reason to give the guest up.


def _ready_check(pattern: str | None, agent: bool, port: int | None) -> ReadyCheck:
    if (pattern is not None) + agent + (port is not None) > 1:
        raise Usage("choose one of --ready-pattern, --ready-agent, --ready-port")
    if agent:
        return GuestAgent()
    if port is not None:
        return TcpPort(port)
    return ConsolePattern(pattern or DEFAULT_PATTERN)


def _print_report(report: BootReport) -> None:
    vm, phases = report.machine, report.phases
    driver = vm.driver if vm.driver == vm.accel else f"{vm.driver}, {vm.accel}"
    terminal.print(f"vm [bold]{vm.name}[/] is ready after [bold]{phases.total_s:.2f} s[/] ({vm.image}, {driver})")
    table = Table.grid(padding=(0, 2))
    table.add_row("  overlay", f"{phases.overlay_s:.2f} s", "read by the guest", size_text(report.bytes_read))
    table.add_row("  start", f"{phases.start_s:.2f} s", "fetched", _size_or_dash(report.bytes_fetched))
    table.add_row("  first read", f"{phases.first_read_s:.2f} s", "from cache", _size_or_dash(report.bytes_from_cache))
    table.add_row("  ready", f"{phases.ready_s:.2f} s", "pid", str(vm.pid))
    terminal.print(table)
    for guest, host in vm.ports.items():
        ssh = f"  (ssh -p {host} USER@127.0.0.1)" if guest == SSH_PORT else ""
        terminal.print(f"  port {guest} of the guest is 127.0.0.1:{host}{ssh}")


def _size_or_dash(size_bytes: int | None) -> str:
    return "–" if size_bytes is None else size_text(size_bytes)


def _all_nodes_option(command: Command) -> Command:
    return click.option("--all-nodes", is_flag=True, help="On all nodes that the tracker knows.")(command)


@click.command()
@_all_nodes_option
@tracker_option
@cluster_key_option
@state_dir_option
@json_option
def ps(all_nodes: bool, tracker: str | None, cluster_key: Path | None, state_dir: Path, as_json: bool) -> None:
    """List the vms of this host, or of all nodes."""
    if all_nodes:
        from vmthunder.cli.fleet import list_vms, over_nodes, raise_for

        vms, refused = over_nodes(tracker, cluster_key, list_vms)
        emit(as_json, vms, lambda: _print_vms(vms))
        raise_for(refused)
        return
    machines = Machines(state_dir)
    known = {vm.name: vm for vm in machines.all()}
    broken = [name for name in machines.names() if name not in known]
    value = [vm.to_dict() for vm in known.values()]
    emit(as_json, value, lambda: _print_vms(value))
    for name in broken:
        click.echo(f"vm {name} was never started completely; `vmthunder destroy {name}` removes it", err=True)


def _print_vms(vms: Sequence[Mapping[str, Any]]) -> None:
    if not vms:
        click.echo("no vms; `vmthunder boot IMAGE` starts one")
        return
    nodes = ["NODE"] if "node" in vms[0] else []
    table = Table(box=None, header_style="bold")
    for heading in (*nodes, "NAME", "IMAGE", "STATE", "DRIVER", "MEMORY", "CPUS", "PID", "AGE", "PORTS"):
        table.add_column(heading, overflow="fold")
    for vm in vms:
        table.add_row(*([vm["node"]] if nodes else []), *_row(vm))
    terminal.print(table)


def _row(vm: Mapping[str, Any]) -> list[str]:
    age_s = int((datetime.now(UTC) - datetime.fromisoformat(vm["created_at"])).total_seconds())
    age = f"{age_s} s" if age_s < 120 else f"{age_s // 60} min" if age_s < 7200 else f"{age_s // 3600} h"
    ports = " ".join(f"{host}→{guest}" for guest, host in vm["ports"].items())
    state = "running" if vm["running"] else "stopped"
    driver = vm["driver"] if vm["driver"] == vm["accel"] else f"{vm['driver']}/{vm['accel']}"
    sizes = [size_text(vm["memory_bytes"]), str(vm["cpus"]), str(vm["pid"])]
    return [vm["name"], vm["image"], state, driver, *sizes, age, ports]


@click.command()
@click.argument("name")
@state_dir_option
def console(name: str, state_dir: Path) -> None:
    """Attach to the serial console of the vm NAME; Ctrl-] leaves."""
    machines = Machines(state_dir)
    attach(machines.load(name), machines.directory(name))


@click.command()
@click.argument("names", metavar="NAME...", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All vms.")
@_all_nodes_option
@tracker_option
@cluster_key_option
@state_dir_option
@json_option
def destroy(
    names: tuple[str, ...],
    everything: bool,
    all_nodes: bool,
    tracker: str | None,
    cluster_key: Path | None,
    state_dir: Path,
    as_json: bool,
) -> None:
    """End vms of this host, or of all nodes, and remove all they ever wrote."""
    if bool(names) == everything:
        raise Usage("name the vms to destroy, or say --all")
    if all_nodes:
        from vmthunder.cli.fleet import destroy_vms, over_nodes, raise_for

        gone, refused = over_nodes(tracker, cluster_key, lambda nodes: destroy_vms(nodes, list(dict.fromkeys(names))))
        said = " ".join(f"{vm['node']}/{vm['name']}" for vm in gone)
        emit(as_json, {"destroyed": gone}, lambda: click.echo(f"destroyed {said or 'nothing'}"))
        raise_for(refused)
        return
    machines = Machines(state_dir)
    doomed = machines.names() if everything else list(dict.fromkeys(names))
    for name in doomed:
        machines.destroy(name)
    emit(as_json, {"destroyed": doomed}, lambda: click.echo(f"destroyed {' '.join(doomed) or 'nothing'}"))
