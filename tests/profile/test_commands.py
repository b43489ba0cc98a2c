"""`vmthunder profile`: as an operator uses it."""

import asyncio
import json
import re
from pathlib import Path

import pytest

from conftest import RunCli, one_line
from made_images import CHUNK_BYTES, manifest
from vmthunder.ids import ImageId, image_name
from vmthunder.image.manifest import Manifest
from vmthunder.origin.origin import Origin
from vmthunder.origin.ref import Ref
from vmthunder.profile import store
from vmthunder.profile.profile import MAX_ENCODED_BYTES, WHOLE, Entry, Profile

IMAGE = manifest([*range(40), None])
ENTRIES = (Entry(30, 0, WHOLE, True), Entry(2, 999, 900, False), Entry(3, 2500, 700, True), Entry(9, 2600, 100, True))
PROFILE = Profile(IMAGE.image_id, CHUNK_BYTES, 5, ENTRIES)


async def publish(origin: Origin, name: str, image: Manifest) -> None:
    await origin.put_manifest(bytes(image.data))
    await origin.put_ref(Ref(image_name(name), image.image_id, image.virtual_bytes, CHUNK_BYTES, 0, 0, "2026-11-25"))


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    """Two images; boots of one are known."""

    async def fill() -> None:
        origin = Origin.open(str(tmp_path / "origin"), create=True)
        await publish(origin, "known", IMAGE)
        await publish(origin, "unknown", manifest(range(3)))
        await store.save(origin, PROFILE)

    asyncio.run(fill())
    return tmp_path / "origin"


def profile_at(origin: Path, image: ImageId = IMAGE.image_id) -> Profile | None:
    return asyncio.run(store.load(Origin.open(str(origin)), image))


def test_show_says_what_boots_read_second_by_second(origin: Path, run_cli: RunCli) -> None:
    found = json.loads(run_cli("profile", "show", "known", "--origin", origin, "--json").stdout)
    seconds = found.pop("seconds")
    assert found == {
        "name": "known",
        "image_id": IMAGE.image_id.hex(),
        "boots": 5,
        "chunks": 3,
        "rare_chunks": 1,
        "read_bytes": 3 * CHUNK_BYTES,
        "fetch_bytes": 3,
        "span_ms": 2500,
    }
    assert [(row["second"], row["chunks"], row["demand_chunks"]) for row in seconds] == [(0, 2, 1), (2, 1, 1)]
    human = run_cli("profile", "show", "known", "--origin", origin).stdout.splitlines()
    assert human[0].startswith("known: 5 boots; 3 chunks of 192.0 KiB")
    assert [line.split()[:3] for line in human[2:]] == [["0", "2", "1"], ["2", "1", "1"]]


def test_what_is_exported_is_imported(origin: Path, tmp_path: Path, run_cli: RunCli) -> None:
    file = tmp_path / "file"
    assert run_cli("profile", "export", "known", "--origin", origin, "-o", file).returncode == 0
    assert run_cli("profile", "reset", "known", "--origin", origin).returncode == 0
    assert profile_at(origin) is None
    assert run_cli("profile", "import", "known", file, "--origin", origin).returncode == 0
    assert profile_at(origin) == PROFILE


def test_of_an_image_without_a_profile_that_is_said(origin: Path, run_cli: RunCli) -> None:
    for command in ("show", "export", "plot"):
        done = run_cli("profile", command, "unknown", "--origin", origin)
        assert done.returncode == 3
        assert "nothing is known of boots of unknown" in one_line(done.stderr)
    assert "not published" in one_line(run_cli("profile", "reset", "none", "--origin", origin).stderr)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "not a profile"),
        (PROFILE.encode()[:-3], "damaged"),
        (Profile(ImageId(bytes(32)), CHUNK_BYTES, 5, ENTRIES).encode(), "of image 0000000000000000…"),
        (Profile(IMAGE.image_id, CHUNK_BYTES, 5, (Entry(99, 0, 1, True),)).encode(), "chunk 99"),
        (PROFILE.encode() + bytes(MAX_ENCODED_BYTES), "too long"),
    ],
)
def test_a_file_that_is_no_profile_of_the_image_is_refused(
    origin: Path, tmp_path: Path, run_cli: RunCli, data: bytes, why: str
) -> None:
    (tmp_path / "file").write_bytes(data)
    done = run_cli("profile", "import", "known", tmp_path / "file", "--origin", origin)
    assert done.returncode == 4
    assert why in one_line(done.stderr)
    assert profile_at(origin) == PROFILE


def test_a_damaged_profile_at_the_origin_is_one_line(origin: Path, run_cli: RunCli) -> None:
    (origin / "profiles" / IMAGE.image_id.hex()).write_bytes(b"?")
    done = run_cli("profile", "show", "known", "--origin", origin)
    assert done.returncode == 4
    one_line(done.stderr)


def test_a_page_needs_nothing_else(origin: Path, tmp_path: Path, run_cli: RunCli) -> None:
    page = tmp_path / "page.html"
    assert run_cli("profile", "plot", "known", "--origin", origin, "-o", page).returncode == 0
    text = page.read_text()
    found = re.search(r"= (\{.*\});", text)
    assert found is not None
    assert json.loads(found[1]) == {
        "chunkBytes": CHUNK_BYTES,
        "virtualBytes": IMAGE.virtual_bytes,
        "entries": [[0, 30, 1000, 1], [999, 2, 900, 0], [2500, 3, 700, 1]],
    }
    assert "http" not in text


@pytest.mark.parametrize(("suffix", "begin"), [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_a_picture_follows_its_suffix(origin: Path, tmp_path: Path, run_cli: RunCli, suffix: str, begin: bytes) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / f"picture{suffix}"
    done = run_cli("profile", "plot", "known", "--origin", origin, "-o", picture)
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(begin)


def test_where_nothing_can_be_drawn_that_is_one_line(origin: Path, tmp_path: Path, run_cli: RunCli) -> None:
    refused = run_cli("profile", "plot", "known", "--origin", origin, "-o", tmp_path / "picture.bmp")
    assert refused.returncode == 2
    assert "suffix" in one_line(refused.stderr)
    refused = run_cli("profile", "plot", "known", "--origin", origin, "-o", tmp_path / "no/such.html")
    assert refused.returncode == 1
    one_line(refused.stderr)
