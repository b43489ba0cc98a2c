"""A released Glance in a directory, as its own documentation runs it: a WSGI server, sqlite, files."""

import hashlib
import os
import shutil
import socket
import sqlite3
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import requests

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
[oslo_policy]
enforce_scope = false
enforce_new_defaults = false
[oslo_concurrency]
lock_path = {directory}/tmp
"""


class GlanceServer:
    """Where it answers, and a client of it."""

    def __init__(self, url: str, directory: Path) -> None:
        self._database = directory / "glance.sqlite"
        self.images = directory / "images"
        """Where it stores what is uploaded, by id."""
        self.environ = {"OS_AUTH_TYPE": "none", "OS_ENDPOINT": url, "OS_IMAGE_ENDPOINT_OVERRIDE": url}
        self._url = f"{url}/v2/images"

    def upload(self, file: Path, disk_format: str, **properties: str) -> str:
        """The id of a new image."""
        image = requests.post(
            self._url,
            timeout=30,
            json={"name": file.name, "disk_format": disk_format, "container_format": "bare", **properties},
        ).json()["id"]
        answer = requests.put(
            f"{self._url}/{image}/file",
            data=file.read_bytes(),
            headers={"Content-Type": "application/octet-stream"},
            timeout=30,
        )
        assert answer.status_code == 204, answer.text
        return str(image)

    def upload_unchecked(self, file: Path, disk_format: str) -> str:
        """As a Glance before 2025.1 took it, which did not look into what was uploaded."""
        harmless = file.with_name(f"{file.name}-harmless")
        harmless.write_bytes(bytes(4096))
        image = self.upload(harmless, "raw")
        data = file.read_bytes()
        (self.images / image).write_bytes(data)
        with closing(sqlite3.connect(self._database)) as database, database:
            database.execute(
                "UPDATE images SET os_hash_value = ?, size = ?, disk_format = ? WHERE id = ?",
                (hashlib.sha512(data).hexdigest(), len(data), disk_format, image),
            )
        return image

    def delete(self, image: str) -> None:
        assert requests.delete(f"{self._url}/{image}", timeout=30).status_code == 204


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
        yield GlanceServer(f"http://{address}", directory)
    finally:
        server.terminate()
        server.wait(20)
        log.close()
        shutil.rmtree(directory)
