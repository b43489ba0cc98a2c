"""`vmthunder bench`: measurements that anybody can repeat, each a command of its own module."""

import signal

import click

from vmthunder.cli.main import LazyGroup


@click.group(
    cls=LazyGroup,
    table={
        "read": "vmthunder.cli.bench_read:read",
        "boot": "vmthunder.cli.bench_boot:boot",
        "publish": "vmthunder.cli.bench_publish:publish",
        "storm": "vmthunder.cli.bench_storm:storm",
        "faults": "vmthunder.cli.bench_faults:faults",
        "rivals": "vmthunder.cli.bench_rivals:rivals",
        "spread": "vmthunder.cli.bench_spread:spread",
    },
)
def bench() -> None:
    """Measure reading, booting and publishing on this machine, beside the usual tools.

    Progress goes to stderr, a table to stdout; with --json the last line of stdout is one JSON object. Rounds are
    interleaved and figures are medians: machines drift, ratios of one run hold.
    """
    # Told to end, a benchmark ends what it started first.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
