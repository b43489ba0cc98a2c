"""`vmthunder trace`: boots recorded as the reads they made, and replayed against any file."""

from pathlib import Path

import click

from vmthunder.cli.output import console, emit, json_option, size_text
from vmthunder.cli.sizes import BYTES
from vmthunder.lab.record import record as record_boot
from vmthunder.lab.replay import replay as replay_trace
from vmthunder.lab.trace import distinct_bytes, plan, read_csv, write_csv
from vmthunder.node.control import AgentClient
from vmthunder.node.settings import DEFAULT_RUN_DIR, control_socket
from vmthunder.vm.backing import BackingImage
from vmthunder.vm.ready import DEFAULT_PATTERN, ConsolePattern
from vmthunder.vm.spec import Accel, Spec

PATH = click.Path(path_type=Path, dir_okay=False)


@click.group()
def trace() -> None:
    """Record the reads of a boot, and replay them against any file.

    A trace is CSV: issue_s, completion_s, offset, length_bytes. A replay keeps think times (from the completion of the
    read that a read waited for to its issue) and overlaps.

    \b
      vmthunder trace record debian-12                               debian-12.csv: one boot, on this host's agent
      vmthunder trace replay /var/lib/vmthunder/images/debian-12.raw debian-12.csv
      vmthunder trace replay /srv/debian-12.raw debian-12.csv --think-scale 0.15

    Compare the total of two files, or of one when cold and warm; `stall` is the time that the boot waited for reads.
    """


@trace.command()
@click.argument("image")
@click.option("--output", "-o", type=PATH, help="Trace file to write.  [default: IMAGE.csv]")
@click.option("--memory", type=BYTES, default="256MiB", help="Memory of the guest.")
@click.option(
    "--accel",
    type=click.Choice([*map(str, Accel)]),
    default=Accel.AUTO.value,
    help="auto: KVM where it runs a guest, else TCG.",
)
@click.option("--ready-pattern", default=DEFAULT_PATTERN, help="Ready when this is on the console.")
@click.option("--timeout", "timeout_s", type=click.FloatRange(min=0.1), default=300, help="Seconds to become ready in.")
@click.option("--run-dir", type=click.Path(path_type=Path), default=DEFAULT_RUN_DIR, envvar="VMTHUNDER_RUN_DIR")
@json_option
def record(
    image: str,
    output: Path | None,
    memory: int,
    accel: str,
    ready_pattern: str,
    timeout_s: float,
    run_dir: Path,
    as_json: bool,
) -> None:
    """Boot IMAGE once on this host's agent and record what the guest asks of its disk.

    The requests are taken between guest and page cache, so the trace does not depend on what this host has read before.
    """
    backing = BackingImage.resolve(AgentClient(control_socket(run_dir)), image)
    reads, report = record_boot(
        backing, Spec(memory_bytes=memory, accel=Accel(accel)), ConsolePattern(ready_pattern), timeout_s
    )
    path = output or Path(f"{image}.csv")
    with path.open("w") as file:
        write_csv(reads, file)
    result = {
        "trace": str(path),
        "reads": len(reads),
        "distinct_bytes": distinct_bytes(reads),
        "ready_s": report.phases.total_s,
        "accel": report.machine.accel,
    }
    emit(
        as_json,
        result,
        lambda: console.print(
            f"{path}: {len(reads)} reads of {size_text(distinct_bytes(reads))}, ready after {report.phases.total_s:.2f} s"
        ),
    )


@trace.command()
@click.argument("file", type=PATH)
@click.argument("trace_file", metavar="TRACE", type=PATH)
@click.option(
    "--think-scale",
    type=click.FloatRange(min=0),
    default=1.0,
    help="Multiply think times: 0.15 makes a guest recorded under TCG about as fast as under KVM.",
)
@json_option
def replay(file: Path, trace_file: Path, think_scale: float, as_json: bool) -> None:
    """Replay TRACE against FILE, which may be a file of the agent's mount or any other.

    Tells how long it took, how much of that was waiting for reads (stall), and their latencies. Nothing is dropped from
    caches before: a second replay shows what a second guest would find.
    """
    try:
        with trace_file.open() as lines:
            reads = read_csv(lines, str(trace_file))
    except (FileNotFoundError, IsADirectoryError):
        raise click.BadParameter(f"no file {trace_file}", param_hint="TRACE") from None
    done = replay_trace(file, plan(reads), think_scale)
    recorded_s = max((read.completion_s for read in reads), default=0.0)
    result = {
        "reads": len(reads),
        "read_bytes": done.read_bytes,
        "recorded_s": recorded_s,
        "think_scale": think_scale,
        "total_s": done.total_s,
        "stall_s": done.stall_s,
        "latency_s": {f"p{percent:g}": done.latency_s(percent) for percent in (50, 90, 99, 100)},
    }

    def human() -> None:
        console.print(
            f"{len(reads)} reads, {size_text(done.read_bytes)}, in {done.total_s:.2f} s ({recorded_s:.2f} s recorded)"
        )
        console.print(f"stall {done.stall_s:.2f} s, think times × {think_scale:g}")
        parts = (f"{name} {value * 1000:.2f} ms" for name, value in result["latency_s"].items())  # type: ignore[attr-defined]
        console.print(f"latency {', '.join(parts)}")

    emit(as_json, result, human)
