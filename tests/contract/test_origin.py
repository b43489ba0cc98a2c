"""What every kind of origin must do."""

import asyncio
import threading
from datetime import UTC, datetime
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from conftest import RunCli, one_line
from contract.conftest import Place
from vmthunder.errors import Conflict, Corrupt, CorruptFile, CorruptManifest, CorruptPack, NotFound, NotPermitted
from vmthunder.ids import ImageId, PackId, digest, image_name
from vmthunder.image.chunk import encode
from vmthunder.image.manifest import ManifestBuilder
from vmthunder.image.pack import PackBuilder
from vmthunder.origin.damage import trusted
from vmthunder.origin.origin import Origin, pack_key
from vmthunder.origin.ref import Ref
from vmthunder.origin.verify import verify_image

NAME = image_name("debian-12")
CHUNKS = [encode(bytes([n]) * 65536) for n in range(1, 6)]


async def publish(origin: Origin, name: str = NAME) -> tuple[Ref, PackId, bytes]:
    """An image of five chunks, by the origin's own methods."""
    builder = PackBuilder()
    manifest = ManifestBuilder(len(CHUNKS) * 65536, 65536)
    for index, (chunk_id, data) in enumerate(CHUNKS):
        manifest.add(index, chunk_id, len(data), 0, builder.add(chunk_id, data))
    pack, data = builder.finish()
    await origin.put_pack(pack, data)
    image_id = await origin.put_manifest(manifest.finish([pack]))
    ref = Ref(image_name(name), image_id, 5 * 65536, 65536, 5 * 65536, 100, datetime.now(UTC).isoformat())
    await origin.put_ref(ref)
    return ref, pack, data


def test_what_was_published_is_read_back(place: Place, run: asyncio.Runner) -> None:
    ref, pack, data = run.run(publish(place.open_writer()))
    origin = place.open()
    assert run.run(origin.ref(NAME)) == ref
    assert run.run(origin.refs()) == [ref]
    manifest = run.run(origin.manifest(ref.image_id))
    assert [row.chunk_id for row in manifest.rows()] == [chunk_id for chunk_id, _ in CHUNKS]
    for row, (_, encoded) in zip(manifest.rows(), CHUNKS, strict=True):
        assert bytes(run.run(origin.read_pack(row.pack, row.offset, row.encoded_bytes))) == encoded
    assert bytes(run.run(origin.read_pack(pack, 0, len(data)))) == data


def test_an_empty_origin_has_no_images(place: Place, run: asyncio.Runner) -> None:
    assert run.run(place.open().refs()) == []


def test_what_is_not_there_is_not_found(place: Place, run: asyncio.Runner) -> None:
    origin = place.open()
    with pytest.raises(NotFound, match="debian-12 is not published"):
        run.run(origin.ref(NAME))
    with pytest.raises(NotFound, match="no manifest"):
        run.run(origin.manifest(ImageId(bytes(32))))
    with pytest.raises(NotFound, match="no pack"):
        run.run(origin.read_pack(PackId(bytes(32)), 0, 10))


def test_a_name_may_mean_another_image_later(place: Place, run: asyncio.Runner) -> None:
    writer = place.open_writer()
    ref, _, _ = run.run(publish(writer))
    other = Ref(NAME, ImageId(digest(b"other")), 1, 65536, 1, 1, ref.published_at)
    run.run(writer.put_ref(other))
    assert run.run(place.open().ref(NAME)) == other


def test_reading_past_the_end_of_a_pack_is_no_short_answer(place: Place, run: asyncio.Runner) -> None:
    _, pack, data = run.run(publish(place.open_writer()))
    for offset, length in ((len(data) - 5, 10), (0, len(data) + 1)):
        with pytest.raises(CorruptPack):
            run.run(place.open().read_pack(pack, offset, length))


def test_a_manifest_that_does_not_match_its_id_is_refused(place: Place, run: asyncio.Runner) -> None:
    writer = place.open_writer()
    ref, _, _ = run.run(publish(writer))
    damaged = bytearray(run.run(writer.manifest(ref.image_id)).data)
    damaged[40] ^= 1
    run.run(writer.put(f"manifests/{ref.image_id.hex()}", bytes(damaged)))
    with pytest.raises(CorruptManifest):
        run.run(place.open().manifest(ref.image_id))


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b'"x"', b'{"version": 2}', b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_ref_is_one_clear_error(place: Place, run: asyncio.Runner, data: bytes) -> None:
    run.run(place.open_writer().put(f"refs/{NAME}", data))
    with pytest.raises(CorruptFile, match="debian-12"):
        run.run(place.open().ref(NAME))


def test_many_reads_at_once_each_get_their_own_bytes(place: Place, run: asyncio.Runner) -> None:
    _, pack, data = run.run(publish(place.open_writer()))
    origin = place.open()

    async def all_of_them() -> None:
        answers = await asyncio.gather(*(origin.read_pack(pack, at, 7) for at in range(100)))
        assert [bytes(answer) for answer in answers] == [data[at : at + 7] for at in range(100)]

    run.run(all_of_them())


def test_packs_and_manifests_are_listed_and_deleted(place: Place, run: asyncio.Runner) -> None:
    origin = place.open_writer()
    ref, pack, data = run.run(publish(origin))
    (info,) = run.run(origin.packs())
    assert (info.pack, info.size_bytes) == (pack, len(data))
    assert [entry.chunk_id for entry in run.run(origin.pack_entries(info))] == [chunk_id for chunk_id, _ in CHUNKS]
    assert run.run(origin.manifests()) == [ref.image_id]
    for _ in range(2):  # the second time there is nothing left
        run.run(origin.delete_pack(pack))
        run.run(origin.delete_manifest(ref.image_id))
    assert run.run(origin.packs()) == []
    assert run.run(origin.manifests()) == []
    run.run(origin.remove_ref(NAME))
    with pytest.raises(NotFound):
        run.run(origin.remove_ref(NAME))


def test_a_profile_is_stored_replaced_listed_and_deleted(place: Place, run: asyncio.Runner) -> None:
    image, origin, writer = ImageId(b"i" * 32), place.open(), place.open_writer()
    with pytest.raises(NotFound, match="no profile of image 6969"):
        run.run(origin.profile(image))
    for data in (b"first", b"second"):
        run.run(writer.put_profile(image, data))
        assert bytes(run.run(origin.profile(image))) == data
    assert run.run(writer.profiles()) == [image]
    for _ in range(2):
        run.run(writer.delete_profile(image))
    assert run.run(writer.profiles()) == []


def test_a_pack_that_was_cut_is_seen_by_its_footer(place: Place, run: asyncio.Runner) -> None:
    origin = place.open_writer()
    _, pack, data = run.run(publish(origin))
    for length in (0, 5, 20, len(data) - 1):
        run.run(origin.put(pack_key(pack), data[:length]))
        (info,) = run.run(origin.packs())
        with pytest.raises(Corrupt):
            run.run(origin.pack_entries(info))


def test_only_new_objects_are_put_where_that_is_asked(place: Place, run: asyncio.Runner) -> None:
    origin = place.open_writer()
    run.run(origin.put("locks/x", b"1", only_new=True))
    with pytest.raises(Conflict):
        run.run(origin.put("locks/x", b"2", only_new=True))
    assert bytes(run.run(origin.get("locks/x", ""))) == b"1"


def test_an_origin_for_reading_says_so(place: Place, run: asyncio.Runner) -> None:
    origin = place.open()
    if not origin.writable:
        with pytest.raises(NotPermitted, match="can only be read"):
            run.run(origin.put("refs/x", b""))
        with pytest.raises(NotPermitted, match="can only be read"):
            run.run(origin.delete("refs/x"))


def test_damage_found_where_it_can_be_written_down_is_not_built_upon(place: Place, run: asyncio.Runner) -> None:
    writer = place.open_writer()
    _, pack, data = run.run(publish(writer))
    run.run(writer.put(pack_key(pack), bytes([data[0] ^ 1]) + data[1:]))
    found = run.run(verify_image(place.open(), NAME))
    assert [damage.index for damage in found.damaged] == [0]
    assert found.footers == ()
    assert found.marked == place.open().writable
    assert run.run(trusted(writer, run.run(writer.packs()))) == ([] if found.marked else run.run(writer.packs()))


@pytest.mark.parametrize("command", [["images"], ["gc"], ["verify", "a"], ["rm", "a"]])
def test_a_bucket_that_does_not_exist_is_one_line(s3_bucket: str, command: list[str], run_cli: RunCli) -> None:
    done = run_cli(*command, "--origin", f"{s3_bucket.rpartition('/')[0]}-none/prefix")
    assert done.returncode == 3
    assert "bucket" in one_line(done.stderr)
    assert "create it first" in done.stderr


def test_a_plain_web_server_cannot_list_and_must_have_ranges(tmp_path: Path, run_cli: RunCli) -> None:
    asyncio.run(publish(Origin.open(str(tmp_path))))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_address[1]}"
        assert asyncio.run(Origin.open(url).ref(NAME)).name == NAME
        for command, code, says in ((["images"], 3, "cannot list images"), (["verify", NAME], 2, "cannot send ranges")):
            done = run_cli(*command, "--origin", url)
            assert done.returncode == code
            assert says in one_line(done.stderr)
    finally:
        server.shutdown()
        server.server_close()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass
