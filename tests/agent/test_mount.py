"""The image file system through the kernel, compared byte for byte with what was published."""

import time
from pathlib import Path

import pytest

from agents import Lab, disk_bytes, errno_of, eventually, finish, output_of, python, same, sha256
from vmthunder.vm.backing import BackingImage

SIZE_BYTES = (9 << 20) + 12345


@pytest.mark.parametrize("chunk_bytes", [4 << 10, 64 << 10, 1 << 20])
def test_random_and_concurrent_reads_give_the_bytes_that_were_published(lab: Lab, chunk_bytes: int) -> None:
    source = lab.publish("debian-12", disk_bytes(SIZE_BYTES), chunk_bytes=chunk_bytes)
    agent = lab.agent(decoded_bytes=2 << 20)
    assert same(agent.path("debian-12"), source)
    agent.drop_page_cache()
    readers = [lab.reader(agent.path("debian-12"), source, seed, "buffered") for seed in range(2)]
    readers += [lab.reader(agent.path("debian-12"), source, seed, "direct") for seed in range(2)]
    time.sleep(1.5)
    assert all(int(reads) > 0 for reads in finish(readers))


def test_an_image_of_one_byte_and_one_of_zeros_only(lab: Lab) -> None:
    tiny, zeros = lab.publish("tiny", b"x"), lab.publish("zeros", bytes(3 << 20))
    agent = lab.agent()
    assert same(agent.path("tiny"), tiny)
    assert same(agent.path("zeros"), zeros)
    assert agent.status()["fetch"]["chunks_fetched"] == 1


def test_names_that_are_not_images_do_not_exist(lab: Lab) -> None:
    lab.publish("debian-12", b"x" * 5000)
    agent = lab.agent()
    for name in ("nobody.raw", "debian-12", "debian-12.raw.raw", "déjà.raw", "-x.raw", ".raw", f"{'0' * 64}.raw"):
        assert errno_of("os.stat(sys.argv[1])", agent.mount / name) == "ENOENT", name
    assert errno_of("os.stat(sys.argv[1])", agent.mount / ("n" * 300)) in {"ENOENT", "ENAMETOOLONG"}
    assert errno_of("os.stat(os.fsencode(sys.argv[1]) + b'/\\xff\\xfe.raw')", agent.mount) == "ENOENT"


def test_nothing_can_be_changed(lab: Lab) -> None:
    lab.publish("debian-12", b"x" * 5000)
    path = lab.agent().path("debian-12")
    assert errno_of("os.open(sys.argv[1], os.O_RDWR)", path) == "EROFS"
    assert errno_of("os.unlink(sys.argv[1])", path) == "EROFS"
    assert errno_of("os.open(sys.argv[1] + '2', os.O_CREAT | os.O_WRONLY)", path) in {"EROFS", "ENOENT"}


def test_listing_shows_images_that_are_open_or_materialized(lab: Lab) -> None:
    for name in ("open", "local", "neither"):
        lab.publish(name, disk_bytes(200_000, seed=len(name)))
    agent = lab.agent()
    assert output_of("ls", agent.mount) == ""
    assert same(agent.path("neither"), agent.path("neither"))
    holder = lab.holder(agent.path("open"))
    agent.client.materialize("local")
    assert output_of("ls", agent.mount).split() == ["local.raw", "open.raw"]
    finish([holder])
    eventually(lambda: output_of("ls", agent.mount).split() == ["local.raw"], "the closed image leaves the listing")


def test_an_image_is_also_there_under_its_id(lab: Lab) -> None:
    source = lab.publish("debian-12", disk_bytes(300_000))
    agent = lab.agent()
    resolved = agent.client.resolve("debian-12")
    assert resolved["path"] == str(agent.path(resolved["image_id"]))
    assert resolved["virtual_bytes"] == 300_000
    assert agent.client.resolve(resolved["image_id"])["name"] == "debian-12"
    assert same(agent.path(resolved["image_id"]), source)
    inodes = python(
        "print(*{os.stat(path).st_ino for path in sys.argv[1:]})", agent.path("debian-12"), resolved["path"]
    )
    assert len(inodes.split()) == 1, "both names must share one page cache"


def test_a_machine_of_an_id_that_has_no_name_here_is_called_by_it(lab: Lab) -> None:
    lab.publish("debian-12", b"x")
    (manifest,) = (lab.origin / "manifests").iterdir()
    image = BackingImage.resolve(lab.agent().client, manifest.name)
    assert (image.name, image.image_id) == (manifest.name, manifest.name)


def test_publishing_a_name_again_changes_no_byte_of_what_is_open(lab: Lab) -> None:
    old = lab.publish("debian-12", disk_bytes(2 << 20, seed=1))
    agent = lab.agent()
    by_id = agent.client.resolve("debian-12")["path"]
    holder = lab.holder(agent.path("debian-12"))
    new = lab.publish("debian-12", disk_bytes(2 << 20, seed=2))
    eventually(lambda: same(agent.path("debian-12"), new), "the new image", deadline_s=5)
    agent.drop_page_cache()
    assert finish([holder]) == [sha256(old)]
    assert same(Path(by_id), old)


def test_what_a_read_decodes_but_did_not_ask_for_is_pushed_into_the_page_cache(lab: Lab) -> None:
    source = lab.publish("debian-12", disk_bytes(8 << 20), chunk_bytes=128 << 10)
    agent = lab.agent()
    counted = python(
        """
import mmap, random
fd = os.open(sys.argv[1], os.O_RDONLY)
os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
expected = open(sys.argv[2], "rb").read()
rng = random.Random(1)
for _ in range(4000):
    offset = rng.randrange(len(expected) // 4096) * 4096
    assert os.pread(fd, 4096, offset) == expected[offset:offset + 4096]
print(4000 * 4096)
""",
        agent.path("debian-12"),
        source,
    )
    (image,) = agent.status()["images"]
    distinct = 8 << 20
    assert image["read_bytes"] < min(int(counted), distinct) / 4, "most pages came without being asked for"
    assert agent.status()["pushed"]["bytes"] > distinct / 2


def test_eight_direct_readers_fetch_and_decode_each_chunk_once(lab: Lab) -> None:
    source = lab.publish("debian-12", disk_bytes(16 << 20))
    agent = lab.agent()
    command = ["dd", f"if={agent.path('debian-12')}", "iflag=direct", "bs=4k", "status=none"]
    readers = [lab.child("sh", "-c", f"{' '.join(command)} | sha256sum") for _ in range(8)]
    assert {line.split()[0] for line in finish(readers)} == {sha256(source)}
    fetch = agent.status()["fetch"]
    assert fetch["chunks_fetched"] == fetch["chunks_decoded"] > 100
    assert fetch["chunks_from_cache"] == 0


def test_attributes_are_those_of_a_read_only_disk(lab: Lab) -> None:
    lab.publish("debian-12", disk_bytes(SIZE_BYTES))
    agent = lab.agent()
    mode, size, links = python(
        "s = os.stat(sys.argv[1]); print(oct(s.st_mode), s.st_size, s.st_nlink)", agent.path("debian-12")
    ).split()
    assert (mode, int(size), links) == ("0o100444", SIZE_BYTES, "1")
    assert python("print(oct(os.stat(sys.argv[1]).st_mode))", agent.mount) == "0o40555"
    assert python("print(os.statvfs(sys.argv[1]).f_namemax)", agent.mount) == "255"
