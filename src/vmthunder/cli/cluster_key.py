"""The option `--cluster-key`, and what commands do with it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from vmthunder.origin.origin import Origin
from vmthunder.swarm.key import DEFAULT_KEY_FILE, ClusterKey

HTTP: Final = ("http://", "https://")
"""How the URLs of servers begin."""

Command = TypeVar("Command", bound=Callable[..., Any])


def cluster_key_option(command: Command) -> Command:
    """`--cluster-key`, or VMTHUNDER_CLUSTER_KEY, as the argument `cluster_key`."""
    return click.option(
        "--cluster-key",
        metavar="FILE",
        type=click.Path(path_type=Path),
        envvar="VMTHUNDER_CLUSTER_KEY",
        show_envvar=True,
        show_default=str(DEFAULT_KEY_FILE),
        help="What lets nodes talk to each other and to the image server.",
    )(command)


def find_key_file(given: Path | None) -> Path | None:
    """The file that was given, or the default one if it is there and ours to read. It is not read."""
    if given is not None:
        return given.absolute()
    try:
        with DEFAULT_KEY_FILE.open("rb"):
            return DEFAULT_KEY_FILE
    except OSError:
        return None


def load_key(given: Path | None) -> ClusterKey | None:
    """The key, if there is one. Raises what `ClusterKey.load` raises."""
    path = find_key_file(given)
    return None if path is None else ClusterKey.load(path)


def open_origin(url: str, cluster_key: Path | None) -> Origin:
    """An origin to read from, with the cluster key if it is a server's. Raises what the two raise."""
    key = load_key(cluster_key) if url.startswith(HTTP) else None
    return Origin.open(url, token=key and key.token)
