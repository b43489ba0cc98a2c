"""`glance-sync`, and `publish glance:…`: images of a cloud."""

import logging
import signal
import threading

import click

from vmthunder.errors import MissingTool, NotPermitted, VMThunderError
from vmthunder.origin.origin import Origin
from vmthunder.publishing.download import Watch
from vmthunder.publishing.publish import Published

try:
    from vmthunder.openstack.glance import Glance
    from vmthunder.openstack.sync import Follower, follow, publish_image
except ImportError as error:
    raise MissingTool(
        f"{error.name} is not installed; images of a cloud need it: pip install 'vmthunder[openstack]'"
    ) from None

log = logging.getLogger(__name__)


def publish_from_glance(text: str, origin: Origin, watch: Watch) -> Published:
    """Publish one image of the cloud that OS_* variables name."""
    glance = Glance(None)
    return publish_image(glance, glance.find(text), origin, watch)


@click.command("glance-sync")
@click.option(
    "--origin", "origin_url", envvar="VMTHUNDER_ORIGIN", required=True, metavar="URL", help="Where to publish."
)
@click.option("--cloud", envvar="OS_CLOUD", show_default="OS_* variables", help="Name of a cloud in clouds.yaml.")
@click.option("--interval", type=click.FloatRange(min=0.1), default=10.0, help="Seconds between looks at the list.")
@click.option(
    "--grace",
    type=click.FloatRange(min=0),
    default=86400.0,
    help="Seconds from when an image is gone from Glance until it is dropped here.",
)
@click.option("--once", is_flag=True, help="Look once and end.")
def glance_sync(origin_url: str, cloud: str | None, interval: float, grace: float, once: bool) -> None:
    """Keep the images of Glance published, so that Nova's compute nodes need not download them.

    Runs beside `vmthunder server`, on the same machine or on any that can write to the origin, and is the only one that has
    the cloud's credentials (role admin, to read private images). Each image is downloaded once, checked against its hash and
    by the checks that Nova makes, and published as glance-ID; what does not pass is left to Nova, and the log says why.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s level=%(levelname)s %(message)s")
    for noisy in ("oslo_utils", "openstack", "keystoneauth", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    origin = Origin.open(origin_url, create=True)
    if not origin.writable:
        raise NotPermitted(f"{origin.url} can only be read; publish to the directory or bucket behind it")
    glance = Glance(cloud)
    follower = Follower(grace)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    while not stop.is_set():
        try:
            follow(glance, origin, follower)
        except VMThunderError as error:
            if once:
                raise
            log.warning("event=glance_unavailable reason=%s", error)
        if once:
            return
        stop.wait(interval)
