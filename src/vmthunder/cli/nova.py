"""`nova-mount`: the agent of a Nova compute node."""

from pathlib import Path
from typing import Any

import click

from vmthunder.cli.agent import agent
from vmthunder.errors import Usage

LOOKUP_S = 2.0
"""Nova looks names up in a process that does everything else of this host, too."""


@click.command("nova-mount", params=[each for each in agent.params if each.name not in {"mount", "lookup_timeout"}])
@click.argument("instances_path", type=click.Path(path_type=Path))
@click.option(
    "--complete-after",
    metavar="SECONDS",
    type=click.FloatRange(min=0),
    default=30.0,
    help="How long after Nova wants an image it is brought here whole, in the background.",
)
def nova_mount(instances_path: Path, complete_after: float, **options: Any) -> None:
    """Let Nova boot from published images: run this host's agent on INSTANCES_PATH/_base.

    Real files of the directory stay what they are. The SHA-1 of a Glance image's id, which is how Nova names it there, is
    that image without a download, if `vmthunder glance-sync` has published it; otherwise Nova downloads it as ever.
    Nova is not changed and not configured. Start this before nova-compute and libvirtd.
    """
    if not instances_path.is_dir() and not (options["stop"] or options["restart"]):
        raise Usage(f"{instances_path} is not a directory; name Nova's instances_path")
    assert agent.callback is not None
    agent.callback(
        mount=instances_path / "_base", lookup_timeout=LOOKUP_S, nova=True, complete_after=complete_after, **options
    )
