"""How results are printed: tables for people on stdout, one JSON value for machines, progress on stderr."""

import json
from collections.abc import Callable
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

Command = TypeVar("Command", bound=Callable[..., Any])

console = Console(highlight=False, soft_wrap=True)
"""Results; as wide as they are where nobody looks at them."""
if not console.is_terminal:
    console.width = 10_000
progress_console = Console(stderr=True, highlight=False)
"""Progress and remarks; a pipe on stdout sees results only."""


def json_option(command: Command) -> Command:
    """Add `--json` to a command, as its argument `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON value.")(command)


def emit(as_json: bool, value: Any, human: Callable[[], None]) -> None:
    """Print a result once: as one line of JSON, or by calling `human`."""
    if as_json:
        click.echo(json.dumps(value, ensure_ascii=False))
    else:
        human()


def size_text(size_bytes: float) -> str:
    """A size for people: `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size_bytes) < 1024:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} TiB"


def bytes_progress() -> Progress:
    """A progress bar over bytes with rate and time left; prints nothing where stderr is no terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=progress_console,
        disable=not progress_console.is_terminal,
    )
