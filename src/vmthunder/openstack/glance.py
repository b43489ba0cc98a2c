"""Glance as a source of images: what there is, which of it Nova may get from us, and the bytes.

Owns the connection. Blocking; one thread. Credentials are found as every OpenStack client finds them (clouds.yaml, OS_*
variables); they stay on the machine that publishes.

A download is one stream that is checked against Glance's own hash. Ranges would save nothing, as all of it is read.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

from keystoneauth1.exceptions import ClientException
from openstack.exceptions import SDKException
from requests import RequestException

import openstack
from vmthunder.errors import Conflict, CorruptFile, Failure, NotFound, NotPermitted, Usage, VMThunderError
from vmthunder.publishing.download import STEP_BYTES, Watch, write_sparsely

FORMATS: Final = frozenset({"raw", "qcow2"})
_FOREIGN: Final = {
    "img_signature": "it is signed, which Nova checks when it downloads it",
    "cinder_encryption_key": "it is encrypted",
    "os_encrypt": "it is encrypted",
}
"""Beginnings of properties that leave an image to Nova."""


class GlanceImage(NamedTuple):
    """An image as Glance describes it."""

    id: str
    name: str
    status: str
    disk_format: str
    size_bytes: int
    hash_algorithm: str
    hash_value: str
    left_to_nova: str | None
    """Why it is; None: it may be published."""


class Glance:
    """One cloud's images."""

    def __init__(self, cloud: str | None) -> None:
        """The cloud of that name in clouds.yaml, or what OS_* variables say. Raises Usage, NotPermitted, Failure."""
        with _errors_of("the cloud"):
            connection = openstack.connect(cloud=cloud)
            self._api: Any = connection.image

    def images(self) -> Iterator[GlanceImage]:
        """All images that the credentials show, whatever their status. Raises NotPermitted, Failure."""
        path = "/images?limit=200&sort=updated_at:desc"
        while path:
            page = self._json(path, "images")
            yield from map(_image, page["images"])
            path = page.get("next", "").removeprefix("/v2")

    def find(self, text: str) -> GlanceImage:
        """By id, else by name. Raises NotFound, Conflict (several have that name), NotPermitted, Failure."""
        try:
            return self.image(text)
        except NotFound:
            found = [image for image in self.images() if image.name == text]
        if not found:
            raise NotFound(f"Glance has no image {text}")
        if len(found) > 1:
            raise Conflict(f"{len(found)} images of Glance are called {text}; name one by its id")
        return found[0]

    def image(self, image: str) -> GlanceImage:
        """By id. Raises NotFound, NotPermitted, Failure."""
        return _image(self._json(f"/images/{image}", f"image {image}"))

    def download(self, image: GlanceImage, fd: int, watch: Watch | None) -> None:
        """Write the image's file to `fd`, with holes where it is zero.

        Raises:
            CorruptFile: it is not what Glance says it is.
            NotFound, NotPermitted, Failure
        """
        what = f"image {image.id}"
        digest = hashlib.new(image.hash_algorithm)
        done = 0
        with _errors_of(what):
            response = self._api.get(f"/images/{image.id}/file", stream=True)
            _check(response, what)
            with response:
                for data in response.iter_content(STEP_BYTES):
                    digest.update(data)
                    write_sparsely(fd, memoryview(data), done)
                    done += len(data)
                    if watch is not None:
                        watch(done, image.size_bytes)
        os.ftruncate(fd, done)
        if done != image.size_bytes or digest.hexdigest() != image.hash_value:
            raise CorruptFile(f"{what} came from Glance with {done} bytes that are not those it was uploaded with")

    def _json(self, path: str, what: str) -> dict[str, Any]:
        with _errors_of(what):
            response = self._api.get(path)
            _check(response, what)
            answer: dict[str, Any] = response.json()
            return answer


def _image(fields: Mapping[str, Any]) -> GlanceImage:
    return GlanceImage(
        fields["id"],
        fields.get("name") or "",
        fields["status"],
        fields.get("disk_format") or "",
        fields.get("size") or 0,
        fields.get("os_hash_algo") or "",
        fields.get("os_hash_value") or "",
        _left_to_nova(fields),
    )


def _left_to_nova(fields: Mapping[str, Any]) -> str | None:
    if fields["status"] != "active":
        return f"it is {fields['status']}"
    if fields.get("disk_format") not in FORMATS or fields.get("container_format") != "bare":
        return f"its format is {fields.get('disk_format')} in {fields.get('container_format')}"
    if fields.get("os_hash_algo") not in hashlib.algorithms_available or not fields.get("size"):
        return "Glance does not say what its contents must be"
    return next((why for name, why in _FOREIGN.items() if any(key.startswith(name) for key in fields)), None)


def _check(response: Any, what: str) -> None:
    if response.status_code == 404:
        raise NotFound(f"Glance has no {what}")
    if response.status_code in (401, 403):
        raise NotPermitted(f"Glance does not give these credentials {what}; they need the role admin")
    if response.status_code not in (200, 206):
        raise Failure(f"Glance answers {response.status_code} when asked for {what}")


class _errors_of:  # noqa: N801 - reads as a statement
    """What the client library says, as ours."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, SDKException | ClientException | RequestException):
            raise _translated(error, self._what) from None


def _translated(error: Exception, what: str) -> VMThunderError:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    if getattr(error, "http_status", None) in (401, 403):
        return NotPermitted(f"the cloud refuses these credentials {what}: {line}")
    if type(error).__name__ == "ConfigException":
        return Usage(f"no cloud is configured: {line}; name one with --cloud, or set OS_AUTH_URL and its like")
    return Failure(f"{what} of Glance cannot be read: {line}")
