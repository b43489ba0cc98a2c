"""`vmthunder server`: a directory of images over HTTP."""

import asyncio
import signal
from pathlib import Path

import click

from vmthunder.errors import Usage
from vmthunder.origin.server import make_app, serve


@click.command()
@click.option("--root", type=click.Path(path_type=Path), required=True, help="Directory that images are published to.")
@click.option("--listen", default="127.0.0.1:8930", help="ADDRESS:PORT; port 0 takes a free one.")
def server(root: Path, listen: str) -> None:
    """Serve the images of a directory over HTTP, so that a node needs only a URL.

    The first line on stdout is `listening on http://…`. Ends on SIGTERM or Ctrl-C.
    """
    host, port = parse_listen(listen)
    asyncio.run(_run(root, host, port))


def parse_listen(text: str) -> tuple[str, int]:
    """Address and port. Raises Usage."""
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:
        raise Usage(f"--listen {text!r} is not ADDRESS:PORT, such as 127.0.0.1:8930 or 0.0.0.0:8930")
    return host.strip("[]") or "0.0.0.0", int(port)


async def _run(root: Path, host: str, port: int) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    runner, url = await serve(make_app(root), host, port)
    try:
        click.echo(f"listening on {url}")
        await stop.wait()
    finally:
        await runner.cleanup()
