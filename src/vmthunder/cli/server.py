"""`vmthunder server`: a directory of images over HTTP, profiles of their boots, and the tracker of the nodes that use them."""

import asyncio
import ipaddress
import logging
import signal
from pathlib import Path

import click

from vmthunder.cli.cluster_key import cluster_key_option
from vmthunder.node.settings import parse_address
from vmthunder.origin.origin import Origin
from vmthunder.origin.server import make_app, serve
from vmthunder.profile.service import ProfileService
from vmthunder.swarm.access import key_holders_only
from vmthunder.swarm.key import DEFAULT_KEY_FILE, ClusterKey
from vmthunder.swarm.service import TrackerService
from vmthunder.swarm.topology import DEFAULT_FANOUT, DEFAULT_STRIPES


@click.command()
@click.option("--root", type=click.Path(path_type=Path), required=True, help="Directory that images are published to.")
@click.option("--listen", default="127.0.0.1:8930", help="ADDRESS:PORT; port 0 takes a free one.")
@cluster_key_option
@click.option("--p2p/--no-p2p", default=True, help="Whether nodes pass chunks on to each other.")
@click.option("--stripes", default=DEFAULT_STRIPES, help="Trees over the nodes of an image.")
@click.option("--fanout", default=DEFAULT_FANOUT, help="Nodes that one sends a stripe to.")
def server(root: Path, listen: str, cluster_key: Path | None, p2p: bool, stripes: int, fanout: int) -> None:
    """Serve the images of a directory over HTTP, so that a node needs only a URL; track which nodes use them, and
    learn what their boots read.

    The first line on stdout is `listening on http://…`. Ends on SIGTERM or Ctrl-C. Beyond loopback, or with
    --cluster-key, only those who have the cluster key are answered; it is made at the first start.

    `--stripes 1 --fanout 2` is a binary tree, in which few nodes send and the others only receive.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s level=%(levelname)s %(message)s")
    host, port = parse_address(listen, "--listen")
    key_file = (cluster_key or DEFAULT_KEY_FILE).absolute() if cluster_key or not _is_loopback(host) else None
    asyncio.run(_run(root, host, port, key_file, (stripes, fanout) if p2p else None))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def _run(root: Path, host: str, port: int, key_file: Path | None, shape: tuple[int, int] | None) -> None:
    """Without a key file whoever is on this machine is answered."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    app = make_app(root)
    if key_file is not None:
        app.middlewares.append(key_holders_only(ClusterKey.load_or_create(key_file).token))
    ProfileService(Origin.open(str(root))).attach(app)
    if shape is not None:
        stripes, fanout = shape
        TrackerService(stripes=stripes, fanout=fanout).attach(app)
    runner, url = await serve(app, host, port)
    try:
        if key_file is not None:
            click.echo(f"nodes need a copy of the cluster key, {key_file}", err=True)
        click.echo(f"listening on {url}")
        await stop.wait()
    finally:
        await runner.cleanup()
