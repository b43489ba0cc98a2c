"""Options of the benchmarks that boot many guests: which, replayed or real."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import click

from vmthunder.bench.boots import Guests, Real, Replayed
from vmthunder.bench.guest import KINDS, GuestDisk, build_guest
from vmthunder.cli.output import progress_console
from vmthunder.errors import Usage
from vmthunder.vm.spec import Driver

Choose: TypeAlias = Callable[[], tuple[Path, Guests]]
"""The raw disk, and what boots from it; may take minutes when it is called for the first time on a machine."""

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


def guest_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options to a command, as its argument `choose`: a `Choose`."""

    @click.option(
        "--guest",
        default="heavy",
        show_default=True,
        metavar="KIND|FOLDER",
        help="heavy or lean, built once by scripts/build-guest, or a folder that it made.",
    )
    @click.option("--image", type=_FILE, help="A raw disk image instead of a guest, with --trace.")
    @click.option("--trace", type=_FILE, help="Replay this recording.  [default: the guest's, recorded once]")
    @click.option(
        "--think-scale",
        type=click.FloatRange(min=0),
        default=0.15,
        show_default=True,
        help="Multiply think times: a guest recorded under emulation computes about 7 times as long as under KVM.",
    )
    @click.option("--replay/--real", "replays", default=True, help="Replay the recorded boot, or boot real guests.")
    @click.option("--driver", type=click.Choice([*map(str, Driver)]), default=Driver.UML.value, help="Of real guests.")
    @functools.wraps(command)
    def wrapped(
        guest: str,
        image: Path | None,
        trace: Path | None,
        think_scale: float,
        replays: bool,
        driver: str,
        **others: Any,
    ) -> None:
        real = None if replays else Driver(driver)
        command(choose=lambda: _chosen(guest, image, trace, think_scale, real), **others)

    return wrapped


def _chosen(
    guest: str, image: Path | None, trace: Path | None, think_scale: float, real: Driver | None
) -> tuple[Path, Guests]:
    say = progress_console.print
    if image is not None:
        if trace is None or real:
            raise Usage("--image is replayed: name a recording of it with --trace")
        return image, Replayed(trace, think_scale)
    if guest in KINDS:
        say(f"the {guest} guest is built, unless it was before")
    found = GuestDisk.load(build_guest(guest) if guest in KINDS else Path(guest))
    if real:
        return found.disk, Real(found, real)
    return found.disk, Replayed(trace or found.trace(say), think_scale)
