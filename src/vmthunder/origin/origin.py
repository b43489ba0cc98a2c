"""The origin: refs, manifests and packs over an object store. Holds connections, no other state; any event loop, any number
of processes.

    refs/NAME           which image a name means
    manifests/HEX       by image id
    packs/HH/HEX        by pack id, HH are its first two digits
    profiles/HEX        by image id: what boots of it touch
    locks/…             who publishes or collects (lock.py)
    damaged/HEX         packs that were found damaged (damage.py)

Manifests and packs are named by their content and never change; a profile is replaced as it is learned. Whatever the
store says went wrong becomes one of our errors here and nowhere else.
"""

import errno
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    InvalidPathError,
    NotFoundError,
    NotSupportedError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from obstore.store import HTTPStore, LocalStore, S3Store

from vmthunder.errors import (
    Conflict,
    CorruptFile,
    CorruptPack,
    InvalidName,
    NoSpace,
    NotFound,
    NotPermitted,
    OriginUnavailable,
    Usage,
    VMThunderError,
)
from vmthunder.ids import Buffer, ImageId, ImageName, PackId, digest, image_name, is_hex_digest
from vmthunder.image.manifest import Manifest
from vmthunder.image.pack import TRAILER_BYTES, PackEntry, decode_footer, decode_trailer
from vmthunder.origin.directory import put_durably
from vmthunder.origin.ref import Ref

Store: TypeAlias = HTTPStore | LocalStore | S3Store

IMAGES_KEY: Final = "images.json"
"""What our server answers with all refs, since plain HTTP cannot list."""

MAX_MANIFEST_BYTES: Final = 512 << 20
"""Of 11 million chunks: 1.3 TiB of data in chunks of 128 KiB."""
MAX_LIST_BYTES: Final = 64 << 20
"""Of 150,000 images."""
MAX_OBJECT_BYTES: Final = 4 << 20
"""Refs, profiles, and whatever else is read whole."""

_REQUEST_TIMEOUT = timedelta(seconds=30)
_CONNECT_TIMEOUT = timedelta(seconds=5)
# Whoever waits retries with a back-off of its own; one quick try here only covers a connection that was closed as idle.
_RETRY: Final[Any] = {"max_retries": 1, "retry_timeout": timedelta(seconds=10)}
_CLIENT: Final[Any] = {"timeout": _REQUEST_TIMEOUT, "connect_timeout": _CONNECT_TIMEOUT, "allow_http": True}


class PackInfo(NamedTuple):
    """A pack as the store lists it."""

    pack: PackId
    size_bytes: int
    modified_s: float


class Origin:
    """One origin."""

    def __init__(self, url: str, store: Store, directory: Path | None) -> None:
        """Use `Origin.open`."""
        self.url: Final = url
        self.writable: Final = not isinstance(store, HTTPStore)
        self.store: Final = store
        self.directory: Final = directory
        """Of a directory origin."""

    @classmethod
    def open(cls, url: str, *, create: bool = False, token: str | None = None) -> "Origin":
        """The origin at a directory, `file://…`, `http(s)://…` or `s3://bucket/prefix` (credentials from AWS_* variables).

        Nothing is asked yet, but a directory must be there, or is made with `create`. HTTP requests carry `token`.

        Raises:
            Usage: not an origin's URL.
            NotFound: no such directory.
            NotPermitted, NoSpace: it cannot be made.
        """
        scheme = urlsplit(url).scheme
        with _errors(url):
            if scheme in ("http", "https"):
                client = (
                    _CLIENT if token is None else _CLIENT | {"default_headers": {"Authorization": f"Bearer {token}"}}
                )
                return cls(
                    url, HTTPStore.from_url(url.rstrip("/") + "/", client_options=client, retry_config=_RETRY), None
                )
            if scheme == "s3":
                return cls(url, S3Store.from_url(url, client_options=_CLIENT, retry_config=_RETRY), None)
            if scheme not in ("", "file"):
                raise Usage(f"{url!r} is not an origin; use a directory, http(s)://… or s3://bucket/prefix")
            directory = Path(urlsplit(url).path if scheme else url).absolute()
            if create:
                directory.mkdir(parents=True, exist_ok=True)
            if not directory.is_dir():
                raise NotFound(f"no origin at {directory}: there is no such directory")
            return cls(url, LocalStore(directory), directory)

    # Refs

    async def ref(self, name: ImageName) -> Ref:
        """Which image a name means. Raises NotFound, CorruptFile."""
        return Ref.decode(name, await self.get(f"refs/{name}", f"image {name} is not published at {self.url}"))

    async def refs(self) -> list[Ref]:
        """All refs by name. Raises Usage where the origin cannot list."""
        if isinstance(self.store, HTTPStore):
            missing = (
                f"{self.url} is a plain HTTP server, which cannot list images; name one, or ask a vmthunder server"
            )
            return decode_images(await self.get(IMAGES_KEY, missing, MAX_LIST_BYTES))
        names = [key.removeprefix("refs/") async for key, _, _ in self.list("refs")]
        refs = []
        for name in sorted(names):
            try:
                refs.append(await self.ref(image_name(name)))
            except (NotFound, InvalidName):
                continue  # removed meanwhile, or not ours
        return refs

    async def put_ref(self, ref: Ref) -> None:
        """Let a name mean an image, whatever it meant before. Atomic, and durable before it returns."""
        await self.put(f"refs/{ref.name}", ref.encode())

    async def remove_ref(self, name: ImageName) -> None:
        """Forget a name. Raises NotFound."""
        await self.ref_exists(name)
        await self.delete(f"refs/{name}")

    async def ref_exists(self, name: ImageName) -> None:
        """Raises NotFound if a name is not published; a damaged ref counts as published."""
        await self.get(f"refs/{name}", f"image {name} is not published at {self.url}")

    # Manifests

    async def manifest(self, image_id: ImageId) -> Manifest:
        """Raises NotFound, CorruptManifest."""
        missing = f"no manifest of image {image_id.hex()} at {self.url}"
        data = await self.get(f"manifests/{image_id.hex()}", missing, MAX_MANIFEST_BYTES)
        return Manifest.decode(data, image_id)

    async def put_manifest(self, data: bytes) -> ImageId:
        """Store an encoded manifest. Raises Usage: it is longer than anybody would read."""
        if len(data) > MAX_MANIFEST_BYTES:
            raise Usage("the image has too many chunks; publish it with a larger --chunk-size")
        image_id = ImageId(digest(data))
        await self.put(f"manifests/{image_id.hex()}", data)
        return image_id

    async def manifests(self) -> list[ImageId]:
        """All manifests, those that no ref names too."""
        return [ImageId(found) async for found, _, _ in self._digests("manifests")]

    async def delete_manifest(self, image_id: ImageId) -> None:
        """Idempotent."""
        await self.delete(f"manifests/{image_id.hex()}")

    # Profiles, as bytes

    async def profile(self, image_id: ImageId) -> Buffer:
        """An encoded profile. Raises NotFound."""
        return await self.get(f"profiles/{image_id.hex()}", f"no profile of image {image_id.hex()} at {self.url}")

    async def put_profile(self, image_id: ImageId, data: bytes) -> None:
        """Store an encoded profile in the place of the one before."""
        await self.put(f"profiles/{image_id.hex()}", data)

    async def profiles(self) -> list[ImageId]:
        """Images that have a profile, those that are gone too."""
        return [ImageId(found) async for found, _, _ in self._digests("profiles")]

    async def delete_profile(self, image_id: ImageId) -> None:
        """Idempotent."""
        await self.delete(f"profiles/{image_id.hex()}")

    # Packs

    async def read_pack(self, pack: PackId, offset: int, length_bytes: int) -> Buffer:
        """Exactly `length_bytes` of a pack. Raises NotFound, CorruptPack (the pack is shorter)."""
        key = pack_key(pack)
        end = offset + length_bytes
        try:
            with _errors(self.url, f"no pack {pack.hex()} at {self.url}"):
                data = memoryview(await obstore.get_range_async(self.store, key, start=offset, length=length_bytes))
                size = offset + len(data)
        except OriginUnavailable:
            # Stores do not agree on what to say of a range behind the end.
            size = (await self.pack_info(pack)).size_bytes
            if size >= end:
                raise
        if size != end:
            raise CorruptPack(f"pack {pack.hex()} at {self.url} ends before byte {end}")
        return data

    async def put_pack(self, pack: PackId, data: bytes) -> None:
        """Store a pack; durable before it returns."""
        await self.put(pack_key(pack), data)

    async def packs(self) -> list[PackInfo]:
        """All packs, those that no manifest names too."""
        return [PackInfo(PackId(found), size, modified) async for found, size, modified in self._digests("packs")]

    async def pack_info(self, pack: PackId) -> PackInfo:
        """What `packs` would say of one pack, where the origin cannot list, too. Raises NotFound."""
        with _errors(self.url, f"no pack {pack.hex()} at {self.url}"):
            meta = await obstore.head_async(self.store, pack_key(pack))
        return PackInfo(pack, meta["size"], meta["last_modified"].timestamp())

    async def pack_entries(self, info: PackInfo) -> list[PackEntry]:
        """What a pack holds, from its footer. Raises CorruptPack."""
        if info.size_bytes < TRAILER_BYTES:
            raise CorruptPack(f"pack {info.pack.hex()} is cut short")
        trailer = await self.read_pack(info.pack, info.size_bytes - TRAILER_BYTES, TRAILER_BYTES)
        offset, length = decode_trailer(trailer, info.size_bytes)
        entries = decode_footer(await self.read_pack(info.pack, offset, length), info.pack)
        if sum(entry.encoded_bytes for entry in entries) != offset:
            raise CorruptPack(f"pack {info.pack.hex()} is not as long as its footer says")
        return entries

    async def delete_pack(self, pack: PackId) -> None:
        """Idempotent."""
        await self.delete(pack_key(pack))

    # Objects

    async def get(self, key: str, missing: str, most_bytes: int = MAX_OBJECT_BYTES) -> Buffer:
        """A whole object. Raises NotFound with `missing` as its line; CorruptFile: it is longer than `most_bytes`."""
        with _errors(self.url, missing):
            found = await obstore.get_async(self.store, key)
            if found.meta["size"] > most_bytes:  # before any of it is taken
                raise CorruptFile(
                    f"{key} at {self.url} has {found.meta['size']} bytes, more than the {most_bytes} that it may have"
                )
            return memoryview(await found.bytes_async())

    async def put(self, key: str, data: bytes, *, only_new: bool = False) -> None:
        """Store a whole object atomically and durably. Raises Conflict if it is there with `only_new`."""
        if not self.writable:
            raise NotPermitted(f"{self.url} can only be read; publish to the directory or bucket behind it")
        with _errors(self.url):
            if self.directory is not None:
                await put_durably(self.directory, key, data, only_new=only_new)
            else:
                await obstore.put_async(self.store, key, data, mode="create" if only_new else "overwrite")

    async def delete(self, key: str) -> None:
        """Remove an object; one that is not there is no error."""
        if not self.writable:
            raise NotPermitted(f"{self.url} can only be read; change the directory or bucket behind it")
        try:
            with _errors(self.url):
                await obstore.delete_async(self.store, key)
        except NotFound:
            pass

    async def list(self, prefix: str) -> AsyncIterator[tuple[str, int, float]]:
        """Keys below a prefix, with sizes in bytes and times of the last change in seconds since the epoch."""
        with _errors(self.url):
            async for batch in obstore.list(self.store, prefix):
                for meta in batch:
                    yield meta["path"], meta["size"], meta["last_modified"].timestamp()

    async def _digests(self, prefix: str) -> AsyncIterator[tuple[bytes, int, float]]:
        async for key, size_bytes, modified_s in self.list(prefix):
            name = key.rpartition("/")[2]
            if is_hex_digest(name):
                yield bytes.fromhex(name), size_bytes, modified_s


def pack_key(pack: PackId) -> str:
    """Where a pack is; two levels, so that no directory gets large."""
    name = pack.hex()
    return f"packs/{name[:2]}/{name}"


def encode_images(refs: list[Ref]) -> bytes:
    """What a server answers for IMAGES_KEY: the refs, each as it is stored, by name."""
    return b"{" + b",\n".join(b'"%s": %s' % (ref.name.encode(), ref.encode()) for ref in refs) + b"}\n"


def decode_images(data: Buffer) -> list[Ref]:
    """Refs by name, from what a server sent. Raises CorruptFile."""

    try:
        objects = json.loads(bytes(data))
        return [Ref.decode(image_name(name), json.dumps(fields).encode()) for name, fields in sorted(objects.items())]
    except (ValueError, AttributeError, RecursionError, InvalidName) as error:
        raise CorruptFile(f"the server's list of images is damaged: {error}") from None


@contextmanager
def _errors(url: str, missing: str | None = None) -> Iterator[None]:
    """The one place where what a store says becomes one of our errors."""
    try:
        yield
    except (BaseError, OSError) as error:
        raise _translated(error, url, missing) from None


def _translated(error: BaseError | OSError, url: str, missing: str | None) -> VMThunderError:
    line = _line(error)
    number = error.errno if isinstance(error, OSError) else None
    # Lists come as generic errors whatever is wrong, so that some things can be told by their text only.
    if "/169.254.169.254/" in line:
        # The cloud's own service, which is asked where no key is set. It may come back.
        return OriginUnavailable(f"no credentials for origin {url}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    if "<Code>NoSuchBucket<" in str(error):
        return NotFound(f"the bucket of origin {url} does not exist; create it first")
    if isinstance(error, NotFoundError | FileNotFoundError):
        return NotFound(missing or f"no such object at {url}")
    if isinstance(error, AlreadyExistsError | FileExistsError):
        return Conflict(f"the object exists already at {url}")
    if isinstance(error, UnauthenticatedError) and urlsplit(url).scheme in ("http", "https"):
        return NotPermitted(f"{url} wants the cluster key of that server; give it with --cluster-key")
    if (
        isinstance(error, PermissionDeniedError | UnauthenticatedError | PermissionError)
        or number == errno.EROFS
        or "status code: 403" in line
    ):
        return NotPermitted(f"origin {url} refuses: {line}")
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in line:
        return NoSpace(f"no space left at origin {url}")
    if isinstance(error, InvalidPathError):
        return Usage(f"origin {url}: {line}")
    if isinstance(error, NotSupportedError) or "Range request not supported" in line:
        return Usage(f"the web server at {url} cannot send ranges; use one that can, or `vmthunder server`")
    return OriginUnavailable(f"origin {url} does not answer as it should: {line}")


def _line(error: Exception) -> str:
    """The first line of what a store said, without the dump of structures that follows."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
