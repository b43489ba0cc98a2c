"""From names to image ids to manifests: what the origin says now, and what this node remembers of it.

On disk, under the state directory: `refs/NAME` holds the image id that a name last had, `manifests/HEX` a manifest.
Both are only memories: a ref is replaced when the origin has another, a manifest is checked against its image id at
each load.

A name answers with what the origin says, at most REF_FRESH_S old. While the origin is away it answers with what it had
last; a name that this node never saw waits, within the lookup time-out. A guest's read waits for a manifest for ever,
whatever is wrong with the origin.

Belongs to the event loop; files are read and written in threads.
"""

import asyncio
import contextlib
import logging
import os
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar
from weakref import WeakValueDictionary

from vmthunder.errors import Corrupt, InvalidName, NotFound, OriginUnavailable, VMThunderError
from vmthunder.ids import Buffer, ImageId, ImageName, image_id, image_name, is_hex_digest
from vmthunder.image.manifest import Manifest
from vmthunder.node.backoff import delay_s

log = logging.getLogger(__name__)

REF_FRESH_S = 1.0
"""A name is not looked up again before that: a republished image is seen by then."""
KNOWN_REF_WAIT_S = 1.0
"""How long the origin may take before a name that is known answers from memory."""
MANIFESTS_IN_MEMORY = 2
"""Beside those of open images."""
MANIFESTS_KEPT_BYTES = 512 << 20
NAMES_KEPT = 4096

_WORTH_A_WAIT = OriginUnavailable
"""What may pass while somebody opens an image; the rest he is told at once."""

_T = TypeVar("_T")


class HasImageId(Protocol):
    """A ref, as far as a node reads it."""

    @property
    def image_id(self) -> ImageId: ...


class ImageOrigin(Protocol):
    """What a node needs of an origin to find images."""

    async def ref(self, name: ImageName) -> HasImageId: ...
    async def manifest(self, image_id: ImageId) -> Manifest: ...


@dataclass(slots=True)
class _Answer:
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by whoever asks the origin; the others find the answer when they get it."""
    image: ImageId | None = None
    """None: not published."""
    fresh_until_s: float = 0.0


class Catalogue:
    """The images that this node can name."""

    def __init__(self, origin: ImageOrigin, state_dir: Path, lookup_timeout_s: float) -> None:
        """With a time-out of 0, `find` waits for ever."""
        self._origin = origin
        self._lookup_timeout_s = lookup_timeout_s or None
        self._ref_dir = state_dir / "refs"
        self._manifest_dir = state_dir / "manifests"
        for directory in (self._ref_dir, self._manifest_dir):
            directory.mkdir(parents=True, exist_ok=True)
        self._known = _read_refs(self._ref_dir)
        """What each name last meant, as on disk."""
        self._answers: dict[ImageName, _Answer] = {}
        self._from_memory: set[ImageName] = set()
        """Names that the origin did not answer for, so that the log says it once."""
        # A manifest takes 52 bytes a chunk: 8 MB for 10 GiB. It stays while an open image holds it, and a little longer.
        self._manifests: WeakValueDictionary[ImageId, Manifest] = WeakValueDictionary()
        self._recent: deque[Manifest] = deque(maxlen=MANIFESTS_IN_MEMORY)
        self._manifest_locks: dict[ImageId, asyncio.Lock] = {}
        self._waiting: dict[str, dict[str, Any]] = {}
        self._last_failure = "the origin does not answer"

    async def find(self, text: str) -> Manifest:
        """The image that a name or 64 hexadecimal digits mean now.

        Raises:
            InvalidName, NotFound, NotPermitted, Corrupt; OriginUnavailable after the lookup time-out.
        """
        try:
            async with asyncio.timeout(self._lookup_timeout_s):
                image = image_id(text) if is_hex_digest(text) else await self._image_id(image_name(text))
                return await self._manifest(image, _WORTH_A_WAIT)
        except TimeoutError:
            raise OriginUnavailable(
                f"nobody could say for {self._lookup_timeout_s:g} s what image {text} is; last failure: {self._last_failure}"
            ) from None

    def name_of(self, image: ImageId) -> ImageName | None:
        """A name that means this image, as far as this node knows."""
        return next((name for name, known in self._known.items() if known == image), None)

    def waiting(self) -> list[dict[str, Any]]:
        """Names and manifests that wait for the origin now, in the form of `status`."""
        now_s = time.monotonic()
        return [entry | {"since_s": round(now_s - entry["since_s"], 3)} for entry in self._waiting.values()]

    async def manifest(self, image: ImageId) -> Manifest:
        """The manifest of an image that is open. Waits until the origin has it, however long that takes."""
        return self._manifests.get(image) or await self._manifest(image, VMThunderError)

    async def _manifest(self, image: ImageId, wait_after: type[VMThunderError]) -> Manifest:
        """From memory, disk or origin; goes on trying after failures of the kind `wait_after`."""
        found = self._manifests.get(image)
        if found is not None:
            self._recent.append(found)
            return found
        lock = self._manifest_locks.setdefault(image, asyncio.Lock())
        async with lock:
            found = self._manifests.get(image)
            if found is None:
                try:
                    found = self._manifests[image] = await self._load(image, wait_after)
                    self._recent.append(found)
                finally:
                    # Who already waits for this lock has it; who comes now finds the manifest, or begins anew.
                    self._manifest_locks.pop(image, None)
        return found

    async def _image_id(self, name: ImageName) -> ImageId:
        if len(self._answers) > NAMES_KEPT:
            self._answers = {key: answer for key, answer in self._answers.items() if answer.lock.locked()}
        answer = self._answers.setdefault(name, _Answer())
        async with answer.lock:
            if time.monotonic() >= answer.fresh_until_s:
                answer.image = await self._ask(name)
                answer.fresh_until_s = time.monotonic() + REF_FRESH_S
            if answer.image is None:
                raise NotFound(f"image {name} is not published at this origin")
            return answer.image

    async def _ask(self, name: ImageName) -> ImageId | None:
        known = self._known.get(name)
        found: ImageId | None
        try:
            if known is None:
                found = (await self._patiently(name, lambda: self._origin.ref(name), _WORTH_A_WAIT)).image_id
            else:
                async with asyncio.timeout(KNOWN_REF_WAIT_S):
                    found = (await self._origin.ref(name)).image_id
        except NotFound:
            found = None
        except (TimeoutError, VMThunderError) as error:
            if known is None:
                raise
            if name not in self._from_memory:
                log.warning("event=ref_from_memory image=%s reason=%s", name, error or "the origin does not answer")
                self._from_memory.add(name)
            return known
        if name in self._from_memory:
            log.info("event=ref_from_origin_again image=%s", name)
            self._from_memory.discard(name)
        if found == known:
            return found
        if found is None:
            self._known.pop(name, None)
        else:
            self._known[name] = found
        await asyncio.to_thread(_remember, self._ref_dir / name, found and found.hex().encode())
        return found

    async def _load(self, image: ImageId, wait_after: type[VMThunderError]) -> Manifest:
        path = self._manifest_dir / image.hex()
        found = await asyncio.to_thread(_read_manifest, path, image)
        if found is None:
            found = await self._patiently(image.hex(), lambda: self._origin.manifest(image), wait_after)
            await asyncio.to_thread(_remember, path, found.data)
            await asyncio.to_thread(_prune, self._manifest_dir)
        return found

    async def _patiently(self, image: str, ask: Callable[[], Awaitable[_T]], wait_after: type[VMThunderError]) -> _T:
        """Ask until the origin answers; show meanwhile who waits."""
        failures = 0
        try:
            while True:
                try:
                    return await ask()
                except wait_after as error:
                    failures += 1
                    self._last_failure = str(error)
                    if image not in self._waiting:
                        log.warning("event=origin_wait image=%s reason=%s", image, error)
                        self._waiting[image] = {"image": image, "chunk": None, "since_s": time.monotonic()}
                    self._waiting[image]["why"] = str(error)
                await asyncio.sleep(delay_s(failures, random.random))
        finally:
            if self._waiting.pop(image, None):
                log.info("event=origin_wait_over image=%s tries=%d", image, failures + 1)


def _read_refs(directory: Path) -> dict[ImageName, ImageId]:
    refs = {}
    for path in directory.iterdir():
        # A ref that was torn by a power loss is forgotten: the origin knows.
        with contextlib.suppress(OSError, ValueError, InvalidName):
            refs[image_name(path.name)] = image_id(path.read_text())
    return refs


def _read_manifest(path: Path, image: ImageId) -> Manifest | None:
    try:
        manifest = Manifest.decode(path.read_bytes(), image)
        os.utime(path)
    except FileNotFoundError:
        return None
    except (OSError, Corrupt) as error:
        log.warning("event=manifest_dropped image=%s reason=%s", image.hex(), error)
        with contextlib.suppress(OSError):
            path.unlink()
        return None
    return manifest


def _remember(path: Path, data: Buffer | None) -> None:
    """Write a file whole, or remove it; a full disk costs only the memory."""
    temporary = path.with_name(f"~{path.name}")  # No name of an image begins so.
    try:
        if data is None:
            path.unlink(missing_ok=True)
        else:
            temporary.write_bytes(data)
            temporary.replace(path)
    except OSError as error:
        log.warning("event=not_remembered file=%s reason=%s", path, error.strerror)
        with contextlib.suppress(OSError):
            temporary.unlink()


def _prune(directory: Path) -> None:
    """Keep the manifests that were used last."""
    kept_bytes = 0
    with contextlib.suppress(FileNotFoundError):  # Another lookup renames or prunes at the same time.
        for _, size_bytes, path in sorted(map(_age, directory.iterdir()), reverse=True):
            kept_bytes += size_bytes
            if kept_bytes > MANIFESTS_KEPT_BYTES:
                path.unlink()


def _age(path: Path) -> tuple[float, int, Path]:
    info = path.stat()
    return info.st_mtime, info.st_size, path
