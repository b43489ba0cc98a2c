"""gc, verify and the index of known chunks, over a directory."""

import asyncio
import os
import sqlite3
from pathlib import Path

import pytest

from conftest import RunCli, one_line
from vmthunder.ids import ChunkId, ImageId, digest, image_name
from vmthunder.image.chunk import encode
from vmthunder.image.manifest import ManifestBuilder
from vmthunder.image.pack import PackBuilder
from vmthunder.origin.collect import collect
from vmthunder.origin.index import KnownChunks
from vmthunder.origin.origin import Origin, pack_key
from vmthunder.origin.ref import Ref
from vmthunder.origin.verify import verify_image

pytestmark = pytest.mark.asyncio


@pytest.fixture
def origin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Origin:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Origin.open(str(tmp_path / "origin"), create=True)


async def publish(origin: Origin, name: str, first: int, count: int = 4) -> Ref:
    """An image of `count` chunks in a pack of its own, numbered from `first`."""
    builder, manifest = PackBuilder(), ManifestBuilder(count * 4096, 4096)
    for index in range(count):
        chunk_id, data = encode((first + index).to_bytes(2, "big") * 2048)
        manifest.add(index, chunk_id, len(data), 0, builder.add(chunk_id, data))
    pack, data = builder.finish()
    await origin.put_pack(pack, data)
    image_id = await origin.put_manifest(manifest.finish([pack]))
    ref = Ref(image_name(name), image_id, count * 4096, 4096, count * 4096, len(data), "2026-11-25T00:00:00+00:00")
    await origin.put_ref(ref)
    return ref


def path_of_pack(origin: Origin) -> Path:
    assert origin.directory is not None
    (path,) = origin.directory.glob("packs/*/*")
    return path


async def test_gc_removes_what_no_name_reaches_and_nothing_else(origin: Origin) -> None:
    assert origin.directory is not None
    old = await publish(origin, "a", 0)
    kept = await publish(origin, "b", 100)
    await publish(origin, "a", 200)  # republished: the old version is litter
    for ref in (old, kept):
        await origin.put_profile(ref.image_id, b"profile")
    (origin.directory / "tmp/left-by-a-crash").write_bytes(b"x")
    dry = await collect(origin, dry_run=True)
    assert (dry.packs, dry.manifests, dry.profiles, dry.kept_packs) == (1, 1, 1, 2)
    assert (len(await origin.packs()), len(await origin.profiles())) == (3, 2)
    done = await collect(origin)
    assert (done.packs, done.manifests, done.profiles, done.kept_packs) == (1, 1, 1, 2)
    assert old.image_id not in await origin.manifests()
    assert await origin.profiles() == [kept.image_id]
    assert (await verify_image(origin, kept.name)).damaged == ()
    assert (await verify_image(origin, image_name("a"))).damaged == ()
    assert not (origin.directory / "tmp").exists()
    assert (await collect(origin)).packs == 0


@pytest.mark.parametrize("damage", ["ref", "manifest", "no manifest"])
async def test_gc_removes_nothing_while_something_reachable_is_damaged(
    origin: Origin, damage: str, run_cli: RunCli
) -> None:
    ref = await publish(origin, "a", 0)
    await publish(origin, "b", 100)
    await origin.remove_ref(image_name("b"))
    if damage == "ref":
        await origin.put("refs/a", b"{}")
    elif damage == "manifest":
        await origin.put(f"manifests/{ref.image_id.hex()}", b"?")
    else:
        await origin.delete_manifest(ref.image_id)
    done = await asyncio.to_thread(run_cli, "gc", "--origin", origin.url)
    assert done.returncode in (3, 4)
    assert "image a" in one_line(done.stderr)
    assert len(await origin.packs()) == 2


async def test_verify_finds_a_flipped_bit_a_cut_pack_and_a_missing_one(origin: Origin, run_cli: RunCli) -> None:
    ref = await publish(origin, "a", 0)
    path = path_of_pack(origin)
    whole = path.read_bytes()
    rows = list((await origin.manifest(ref.image_id)).rows())

    flipped = bytearray(whole)
    flipped[rows[2].offset + 3] ^= 4
    path.write_bytes(flipped)
    assert [damage.index for damage in (await verify_image(origin, ref.name)).damaged] == [2]

    path.write_bytes(whole[: rows[1].offset + 2])
    assert [damage.index for damage in (await verify_image(origin, ref.name)).damaged] == [1, 2, 3]

    path.unlink()
    assert len((await verify_image(origin, ref.name)).damaged) == 4
    done = await asyncio.to_thread(run_cli, "verify", "a", "--origin", origin.url)
    assert done.returncode == 4
    assert "image a is damaged (4 of 4 chunks, 1 pack footers); publish it again" in one_line(done.stderr)
    assert done.stdout.count("damaged: slice") == 4


async def test_a_chunk_that_matches_its_id_but_does_not_decode_is_damage(origin: Origin) -> None:
    builder, manifest = PackBuilder(), ManifestBuilder(4096, 4096)
    chunk_id = ChunkId(digest(b"no frame"))
    manifest.add(0, chunk_id, 8, 0, builder.add(chunk_id, b"no frame"))
    pack, data = builder.finish()
    await origin.put_pack(pack, data)
    image_id = await origin.put_manifest(manifest.finish([pack]))
    await origin.put_ref(Ref(image_name("lie"), image_id, 4096, 4096, 4096, 8, ""))
    assert len((await verify_image(origin, image_name("lie"))).damaged) == 1


async def test_a_damaged_footer_is_found_and_its_pack_not_built_upon(origin: Origin) -> None:
    ref = await publish(origin, "a", 0)
    assert await known(origin, 1)
    path = path_of_pack(origin)
    damaged = bytearray(path.read_bytes())
    damaged[-20] ^= 1
    path.write_bytes(damaged)
    found = await verify_image(origin, ref.name)
    assert (found.damaged, len(found.footers), found.marked) == ((), 1, True)
    assert not await known(origin, 1)  # although the index had its footer while it was good


async def test_a_pack_found_damaged_is_not_built_upon_until_it_is_written_again(origin: Origin) -> None:
    await publish(origin, "a", 0)
    path = path_of_pack(origin)
    whole = path.read_bytes()
    path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    assert await known(origin, 1)  # its footer is good
    await verify_image(origin, image_name("a"))
    assert not await known(origin, 1)
    await collect(origin)
    assert not await known(origin, 1)  # gc keeps a mark that says something
    await publish(origin, "a", 0)
    assert await known(origin, 1)
    await collect(origin)
    assert [key async for key, _, _ in origin.list("damaged")] == []


async def known(origin: Origin, number: int) -> bool:
    async with KnownChunks.refreshed(origin) as chunks:
        return chunks.find(encode(number.to_bytes(2, "big") * 2048).chunk_id) is not None


async def test_the_index_follows_packs_that_come_and_go(origin: Origin) -> None:
    assert not await known(origin, 1)
    await publish(origin, "a", 0)
    assert await known(origin, 1)
    await origin.remove_ref(image_name("a"))
    await collect(origin)
    assert not await known(origin, 1)


async def test_a_torn_pack_is_not_believed(origin: Origin) -> None:
    await publish(origin, "a", 0)
    path = path_of_pack(origin)
    os.truncate(path, path.stat().st_size - 1)
    assert not await known(origin, 1)


async def test_a_pack_cut_after_it_was_learned_is_not_believed(origin: Origin) -> None:
    await publish(origin, "a", 0)
    assert await known(origin, 1)
    path = path_of_pack(origin)
    os.truncate(path, path.stat().st_size // 2)
    assert not await known(origin, 1)


async def test_a_damaged_index_is_made_anew(origin: Origin, tmp_path: Path) -> None:
    await publish(origin, "a", 0)
    assert await known(origin, 1)
    (file,) = (tmp_path / "cache/vmthunder").glob("*.sqlite")
    file.write_bytes(b"this is no database" * 1000)
    assert await known(origin, 1)
    with sqlite3.connect(file) as database:
        database.execute("PRAGMA user_version = 99")
    database.close()
    assert await known(origin, 1)


async def test_where_no_index_can_be_written_it_is_in_memory(
    origin: Origin, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    await publish(origin, "a", 0)
    assert await known(origin, 1)


async def test_a_pack_key_has_two_levels() -> None:
    builder = PackBuilder()
    pack, _ = builder.finish()
    assert pack_key(pack) == f"packs/{pack.hex()[:2]}/{pack.hex()}"


async def test_a_ref_is_frozen() -> None:
    ref = Ref(
        image_name("a"), ImageId(bytes(range(32))), 10 << 30, 65536, 2 << 30, 1 << 30, "2026-11-25T04:16:32+00:00"
    )
    golden = Path(__file__).parent.parent / "golden/ref-v1.json"
    assert ref.encode() == golden.read_bytes()
    assert Ref.decode(ref.name, golden.read_bytes()) == ref
