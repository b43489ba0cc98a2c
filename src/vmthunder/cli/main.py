"""`vmthunder`: the table of commands, and the one place where an error becomes a line and an exit code."""

import contextlib
import importlib
import os
import signal
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

import click

from vmthunder import __version__
from vmthunder.errors import VMThunderError

COMMANDS: Mapping[str, str] = {
    "publish": "vmthunder.cli.publish:publish",
    "images": "vmthunder.cli.images:images",
    "verify": "vmthunder.cli.images:verify",
    "rm": "vmthunder.cli.images:rm",
    "gc": "vmthunder.cli.images:gc",
    "profile": "vmthunder.cli.profile:profile",
    "server": "vmthunder.cli.server:server",
    "glance-sync": "vmthunder.cli.glance:glance_sync",
    "swarm": "vmthunder.cli.swarm:swarm",
    "agent": "vmthunder.cli.agent:agent",
    "nova-mount": "vmthunder.cli.nova:nova_mount",
    "status": "vmthunder.cli.agent:status",
    "materialize": "vmthunder.cli.agent:materialize",
    "dematerialize": "vmthunder.cli.agent:dematerialize",
    "precache": "vmthunder.cli.precache:precache",
    "pin": "vmthunder.cli.precache:pin",
    "unpin": "vmthunder.cli.precache:unpin",
    "boot": "vmthunder.cli.vm:boot",
    "ps": "vmthunder.cli.vm:ps",
    "console": "vmthunder.cli.vm:console",
    "destroy": "vmthunder.cli.vm:destroy",
    "lab": "vmthunder.cli.lab:lab",
    "trace": "vmthunder.cli.trace:trace",
    "bench": "vmthunder.cli.bench:bench",
    "simulate": "vmthunder.cli.simulate:simulate",
}
"""Where each command lives, in the order of the help page: `status` must not pay for a benchmark's imports."""


class LazyGroup(click.Group):
    """A group whose commands are imported when they are needed."""

    def __init__(self, *args: Any, table: Mapping[str, str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._table = table

    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return list(self._table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        del ctx
        place = self._table.get(cmd_name)
        if place is None:
            return None
        module, attribute = place.split(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command


@click.group(
    cls=LazyGroup,
    table=COMMANDS,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "auto_envvar_prefix": "VMTHUNDER",
        "show_default": True,
        "max_content_width": 100,
    },
)
@click.version_option(__version__, message="vmthunder %(version)s")
def vmthunder() -> None:
    """Boot many virtual machines at once from one image.

    \b
    On the machine that keeps the images:
      vmthunder publish debian-12.qcow2 debian-12 --origin /srv/images
      vmthunder server --root /srv/images --listen 0.0.0.0:8930
    On each compute node, with a copy of that machine's /var/lib/vmthunder/cluster.key:
      vmthunder agent --origin http://images:8930 --detach
      vmthunder boot debian-12

    Shell completion: eval "$(_VMTHUNDER_COMPLETE=bash_source vmthunder)"  (zsh_source, fish_source)

    \b
    Exit codes: 0 done · 1 failed · 2 usage · 3 not found · 4 corrupt · 5 origin unavailable · 6 no space
      7 not permitted · 8 conflict · 9 something must be installed · 10 no agent · 130 interrupted
    """


def main() -> NoReturn:
    """Run the command line; errors that an operator can do something about end in one line, bugs in a traceback."""
    code = _run()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    # Not sys.exit: a thread of the object store's runtime that still lets go of a Python object while the interpreter is
    # taken apart aborts the process (seen in one of 200 runs on a busy machine).
    os._exit(code)


def _run() -> int:
    try:
        code = vmthunder.main(standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of our output went away (`vmthunder images | head`). The default action of SIGPIPE would do, were it
        # not for sockets: a server must not die of a client that hangs up.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (click.exceptions.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return 130
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except VMThunderError as error:
        click.echo(f"vmthunder: {error}", err=True)
        return error.exit_code
    return code if isinstance(code, int) else 0
