"""What a node remembers of an origin: a real directory origin, no mount."""

import asyncio
import gc
import os
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

from agents import Lab
from vmthunder.errors import InvalidName, NotFound, OriginUnavailable
from vmthunder.node import catalogue as catalogue_module
from vmthunder.node.catalogue import MANIFESTS_IN_MEMORY, Catalogue
from vmthunder.origin.origin import Origin

NAMES = ["a", "b", "c", "d"]


@pytest.fixture
def published(tmp_path: Path) -> Iterator[Lab]:
    lab = Lab(tmp_path)
    for name in NAMES:
        lab.publish(name, name.encode() * 10_000)
    yield lab


def catalogue_of(lab: Lab, lookup_timeout_s: float = 5.0) -> Catalogue:
    return Catalogue(Origin.open(str(lab.origin)), lab.directory / "state", lookup_timeout_s)


def test_manifests_that_nobody_holds_leave_the_memory(published: Lab) -> None:
    async def run() -> None:
        catalogue = catalogue_of(published)
        held = await catalogue.find("a")
        others = [weakref.ref(await catalogue.find(name)) for name in NAMES[1:]]
        gc.collect()
        assert sum(other() is not None for other in others) == MANIFESTS_IN_MEMORY
        assert await catalogue.find("a") is held

    asyncio.run(run())


def test_a_manifest_is_asked_for_once_however_many_look(published: Lab) -> None:
    class Counting:
        def __init__(self) -> None:
            self.origin = Origin.open(str(published.origin))
            self.refs = self.manifests = 0

        async def ref(self, name: object) -> object:
            self.refs += 1
            return await self.origin.ref(name)  # type: ignore[arg-type]

        async def manifest(self, image: object) -> object:
            self.manifests += 1
            return await self.origin.manifest(image)  # type: ignore[arg-type]

    async def run() -> None:
        origin = Counting()
        catalogue = Catalogue(origin, published.directory / "state", 5)  # type: ignore[arg-type]
        found = await asyncio.gather(*(catalogue.find("a") for _ in range(20)))
        assert len({manifest.image_id for manifest in found}) == 1
        assert (origin.refs, origin.manifests) == (1, 1)
        # The next process has both on its disk.
        heir = Catalogue(origin, published.directory / "state", 5)  # type: ignore[arg-type]
        await heir.find("a")
        assert origin.manifests == 1

    asyncio.run(run())


def test_a_lookup_that_is_cancelled_hinders_nobody(published: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        catalogue = catalogue_of(published, lookup_timeout_s=0)
        gate = asyncio.Event()
        real = catalogue._load

        async def slow(*arguments: object) -> object:
            await gate.wait()
            return await real(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(catalogue, "_load", slow)
        first, second = (asyncio.create_task(catalogue.find("a")) for _ in range(2))
        await asyncio.sleep(0.05)
        first.cancel()
        gate.set()
        assert (await second).virtual_bytes == 10_000
        with pytest.raises(asyncio.CancelledError):
            await first

    asyncio.run(run())


def test_an_image_that_was_removed_is_gone_and_its_name_forgotten(
    published: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogue_module, "REF_FRESH_S", 0.0)

    async def run() -> None:
        catalogue = catalogue_of(published)
        image = (await catalogue.find("a")).image_id
        assert catalogue.name_of(image) == "a"
        (published.origin / "refs" / "a").unlink()
        with pytest.raises(NotFound, match="a is not published"):
            await catalogue.find("a")
        assert catalogue.name_of(image) is None
        assert not (published.directory / "state" / "refs" / "a").exists()
        assert (await catalogue.find(image.hex())).image_id == image, "guests that have it by its id keep it"

    asyncio.run(run())


def test_names_of_no_image_are_told_apart(published: Lab) -> None:
    async def run() -> None:
        catalogue = catalogue_of(published)
        for text, error in (("../a", InvalidName), ("", InvalidName), ("nobody", NotFound), ("0" * 64, NotFound)):
            with pytest.raises(error):
                await catalogue.find(text)

    asyncio.run(run())


def test_who_waits_for_the_origin_is_shown_and_told_why_in_the_end(tmp_path: Path) -> None:
    class Away:
        async def ref(self, name: object) -> object:
            raise OriginUnavailable("nobody listens at port 9")

    async def run() -> None:
        catalogue = Catalogue(Away(), tmp_path, 0.3)  # type: ignore[arg-type]
        task = asyncio.create_task(catalogue.find("debian-12"))
        await asyncio.sleep(0.1)
        (waiting,) = catalogue.waiting()
        assert (waiting["image"], waiting["why"]) == ("debian-12", "nobody listens at port 9")
        with pytest.raises(OriginUnavailable, match="nobody listens at port 9"):
            await task
        assert catalogue.waiting() == []

    asyncio.run(run())


def test_the_manifests_that_were_used_last_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for age, name in enumerate(("young", "middle", "old")):
        (tmp_path / name).write_bytes(b"x" * 100)
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    monkeypatch.setattr(catalogue_module, "MANIFESTS_KEPT_BYTES", 250)
    catalogue_module._prune(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["middle", "young"]
