"""A released Glance in a directory, as its own documentation runs it: a WSGI server, sqlite, files."""

import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openstack

_CONFIGURATION = """
[DEFAULT]
enabled_backends = local:file
[database]
connection = sqlite:///{directory}/glance.sqlite
[glance_store]
default_backend = local
[local]
filesystem_store_datadir = {directory}/images/
[os_glance_staging_store]
filesystem_store_datadir = {directory}/staging/
[os_glance_tasks_store]
filesystem_store_datadir = {directory}/tasks/
[paste_deploy]
config_file = {paste}
[image_format]
require_image_format_match = false
[oslo_concurrency]
lock_path = {directory}/tmp
"""
"""Formats are not checked at upload, as older releases did not."""


class GlanceServer:
    """Where it answers, and a client of it."""

    def __init__(self, url: str, images: Path) -> None:
        self.images = images
        """Where it stores what is uploaded, by id."""
        self.environ = {"OS_AUTH_TYPE": "none", "OS_ENDPOINT": url, "OS_IMAGE_ENDPOINT_OVERRIDE": url}
        self.client: Any = openstack.connection.Connection(
            auth_type="none", endpoint=url, image_endpoint_override=url, image_api_version="2"
        ).image

    def upload(self, file: Path, disk_format: str, **properties: str) -> str:
        """The id of a new image."""
        image = self.client.post(
            "/images", json={"name": file.name, "disk_format": disk_format, "container_format": "bare", **properties}
        ).json()["id"]
        answer = self.client.put(
            f"/images/{image}/file", data=file.read_bytes(), headers={"Content-Type": "application/octet-stream"}
        )
        assert answer.status_code == 204, answer.text
        return str(image)


@contextmanager
def serving(python: Path, directory: Path) -> Iterator[GlanceServer]:
    for name in ("etc", "images", "staging", "tasks", "tmp"):
        (directory / name).mkdir(parents=True)
    paste = python.parent.parent / "etc" / "glance" / "glance-api-paste.ini"
    configuration = directory / "etc" / "glance-api.conf"
    configuration.write_text(_CONFIGURATION.format(directory=directory, paste=paste))
    subprocess.run(
        [python.parent / "glance-manage", "--config-file", configuration, "db_sync"],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    log = (directory / "log").open("wb")
    server = subprocess.Popen(
        [python.parent / "gunicorn", "-b", address, "-k", "gthread", "--threads", "4", "glance.wsgi.api:application"],
        env={"PATH": os.environ["PATH"], "OS_GLANCE_CONFIG_DIR": str(configuration.parent)},
        stdout=log, stderr=log,
    )  # fmt: skip
    try:
        deadline_s = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"http://{address}/v2/images", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline_s, (directory / "log").read_text()[-2000:]
                time.sleep(0.1)
        yield GlanceServer(f"http://{address}", directory / "images")
    finally:
        server.terminate()
        server.wait(20)
        log.close()
        shutil.rmtree(directory)
