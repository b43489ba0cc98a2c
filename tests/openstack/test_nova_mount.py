"""Nova's `_base` through the kernel: what its code, libvirt and an operator do to it."""

import hashlib
import os
from pathlib import Path

import pytest

from agents import Agent, Lab, alive, disk_bytes, errno_of, eventually, finish, output_of, python, same
from openstack_names import base_name
from vmthunder.fuse import mounts

IMAGE = "11111111-2222-3333-4444-555555555555"
BASE_NAME = base_name(IMAGE)
SIZE_BYTES = 3 << 20


@pytest.fixture
def source(lab: Lab) -> Path:
    """A published Glance image; the file that it was made of."""
    return lab.publish(f"nova-{BASE_NAME}", disk_bytes(SIZE_BYTES))


def nova_agent(lab: Lab, *, complete_after_s: float = 3600.0) -> Agent:
    base = lab.directory / "instances" / "_base"
    base.parent.mkdir()
    base.mkdir()
    (base / "old").write_bytes(b"there before")
    return lab.agent(mount=base, nova=True, complete_after_s=complete_after_s, lookup_timeout_s=2.0)


def test_an_image_resolves_and_is_listed_only_when_it_was_used(lab: Lab, source: Path) -> None:
    base = nova_agent(lab).mount
    assert output_of("ls", base).split() == ["old"]
    assert same(base / BASE_NAME, source)
    assert output_of("ls", base).split() == [BASE_NAME, "old"]
    for name in ("0" * 40, BASE_NAME + ".part", BASE_NAME + "_sm", "swap_64"):
        assert errno_of("os.stat(sys.argv[1])", base / name) == "ENOENT", name


def test_real_files_can_be_made_written_renamed_and_removed(lab: Lab, source: Path) -> None:
    base = nova_agent(lab).mount
    assert output_of("cat", base / "old") == "there before"
    python(
        """
base = sys.argv[1]
import mmap
os.chdir(base); base = "."; os.chmod(base, 0o777); os.setgid(12345); os.setuid(12345)
part = base + "/x.part"
with open(part, "w+b") as file:
    file.write(b"a" * 300000); file.flush(); os.fsync(file.fileno())
    file.seek(0); assert file.read() == b"a" * 300000
    os.posix_fallocate(file.fileno(), 0, 400000)
    file.truncate(350000)
assert os.stat(part).st_size == 350000 and os.stat(part).st_uid == 12345
os.chmod(part, 0o600); os.utime(part, (1, 2))
assert os.stat(part).st_mtime == 2 and os.stat(part).st_mode & 0o777 == 0o600
os.rename(part, base + "/x")
assert not os.path.exists(part)
direct = os.open(base + "/x", os.O_RDWR | os.O_DIRECT)
page = mmap.mmap(-1, 4096); page.write(b"d" * 4096)
assert os.pwrite(direct, page, 4096) == 4096
os.close(direct)
data = open(base + "/x", "rb").read()
assert data[4096:8192] == b"d" * 4096 and data[:4096] == b"a" * 4096 and data[300000:] == bytes(50000)
with open(base + "/x", "ab") as file:
    file.write(b"end")
held = open(base + "/x", "rb")
os.unlink(base + "/x")
assert os.fstat(held.fileno()).st_size == 350003 and held.read().endswith(b"end")
assert not os.path.exists(base + "/x")
""",
        base,
    )


def test_what_nova_and_libvirt_do_to_an_image_is_accepted_and_data_is_not(lab: Lab, source: Path) -> None:
    path = nova_agent(lab).mount / BASE_NAME
    python(
        """
path = sys.argv[1]
os.utime(path); assert os.stat(path).st_mtime > 1e9
os.utime(path, (5, 5)); assert os.stat(path).st_mtime == 5
os.chown(path, 64055, 64055); os.chmod(path, 0o600)
os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
""",
        path,
    )
    assert errno_of("os.open(sys.argv[1], os.O_RDWR)", path) == "EROFS"
    assert errno_of("os.truncate(sys.argv[1], 0)", path) == "EROFS"
    assert errno_of("os.getxattr(sys.argv[1], 'security.selinux')", path) in {"EOPNOTSUPP", "ENOTSUP", "ENODATA"}


def test_a_real_file_wins_over_an_image_and_the_image_comes_back(lab: Lab, source: Path) -> None:
    path = nova_agent(lab).mount / BASE_NAME
    holder = lab.holder(path)
    python("open(sys.argv[1] + '.part', 'w').write('nova'); os.rename(sys.argv[1] + '.part', sys.argv[1])", path)
    assert output_of("cat", path) == "nova"
    assert finish([holder]) == [hashlib.sha256(source.read_bytes()).hexdigest()]
    python("os.unlink(sys.argv[1])", path)
    assert same(path, source)


def test_touching_an_image_brings_it_here_and_removing_it_gives_the_space_back(lab: Lab, source: Path) -> None:
    agent = nova_agent(lab, complete_after_s=0.0)
    path = agent.mount / BASE_NAME
    python("os.utime(sys.argv[1])", path)
    copies = agent.state_dir / "materialized"
    eventually(lambda: [each.suffix for each in copies.iterdir()] == [".raw"], "the whole image on this host")
    # Glance forgets it: what runs here goes on, and can be started again.
    (lab.origin / "refs" / f"nova-{BASE_NAME}").unlink()
    agent.kill_worker()
    assert same(path, source)
    python("os.unlink(sys.argv[1])", path)
    assert not list(copies.iterdir())
    assert errno_of("os.stat(sys.argv[1])", path) == "ENOENT"


def test_holes_of_an_image_are_told(lab: Lab) -> None:
    data = bytes(1 << 20) + os.urandom(65536) + bytes(1 << 20)
    lab.publish(f"nova-{BASE_NAME}", data)
    path = nova_agent(lab).mount / BASE_NAME
    found = python(
        "fd = os.open(sys.argv[1], 0); a = os.lseek(fd, 0, os.SEEK_DATA); print(a, os.lseek(fd, a, os.SEEK_HOLE))", path
    )
    assert found == f"{1 << 20} {(1 << 20) + 65536}"


def test_a_killed_worker_is_not_seen_by_who_reads_an_image_or_writes_a_file(lab: Lab, source: Path) -> None:
    agent = nova_agent(lab)
    reader = lab.reader(agent.mount / BASE_NAME, source, 1, "direct")
    writer = lab.child(
        "python3",
        "-c",
        "import os, sys\n"
        "file = open(sys.argv[1], 'w+b', buffering=0); print('open', flush=True); sys.stdin.readline()\n"
        "[file.write(b'%05d' % i) for i in range(5000)]; os.fsync(file.fileno()); file.truncate(25000)\n"
        "os.rename(sys.argv[1], sys.argv[1] + '.done'); file.seek(0)\n"
        "print(file.read() == b''.join(b'%05d' % i for i in range(5000)))",
        agent.mount / "written",
    )
    assert writer.stdout is not None and writer.stdout.readline() == "open\n"
    for _ in range(3):
        agent.kill_worker()
    assert finish([writer]) == ["True"]
    assert int(finish([reader])[0]) > 0
    assert output_of("ls", agent.mount).split() == [BASE_NAME, "old", "written.done"]
    assert (agent.mount / "written.done").stat().st_size == 25000


def test_a_server_that_is_away_leaves_nova_to_its_own_download_within_two_seconds(lab: Lab, source: Path) -> None:
    with lab.server() as (_, url):
        base = lab.directory / "instances" / "_base"
        base.mkdir(parents=True)
        agent = lab.agent(url, mount=base, nova=True, lookup_timeout_s=2.0)
        assert same(base / BASE_NAME, source)
    waited = python(
        """
import time
began = time.monotonic()
assert not os.path.exists(sys.argv[1]) and not os.path.exists(sys.argv[1])
print(time.monotonic() - began)
""",
        base / ("1" * 40),
    )
    assert float(waited) < 3.5
    assert output_of("stat", "-c", "%s", base / BASE_NAME).strip() == str(SIZE_BYTES)
    assert agent.status()["restarts"] == 0


def test_without_passthrough_data_goes_through_the_agent(lab: Lab, source: Path, tmp_path: Path) -> None:
    """A file system that offers no passthrough: overlayfs is stacked already."""
    parts = [tmp_path / each for each in ("lower", "upper", "work", "instances")]
    for each in parts:
        each.mkdir()
    lower, upper, work, instances = parts
    output_of("mount", "-t", "overlay", "-o", f"lowerdir={lower},upperdir={upper},workdir={work}", "overlay", instances)
    try:
        base = instances / "_base"
        base.mkdir()
        agent = lab.agent(mount=base, nova=True, lookup_timeout_s=2.0)
        python(
            "open(sys.argv[1], 'wb').write(b'x' * 1000001); assert open(sys.argv[1], 'rb').read() == b'x' * 1000001",
            base / "file",
        )
        assert same(base / BASE_NAME, source)
        agent.clean_up()
        assert (base / "file").stat().st_size == 1000001
    finally:
        output_of("umount", "-l", instances)


def test_it_is_taken_out_under_a_running_guest_and_leaves_plain_files(lab: Lab, source: Path) -> None:
    agent = nova_agent(lab)
    path = agent.mount / BASE_NAME
    holder = lab.holder(path)
    output_of("cp", "--sparse=always", path, f"{path}.part")
    output_of("mv", f"{path}.part", path)
    output_of("umount", "--lazy", agent.mount)
    assert not mounts.find_mount(str(agent.mount))
    assert same(path, source) and path.stat().st_dev == agent.mount.parent.stat().st_dev
    assert finish([holder]) == [hashlib.sha256(source.read_bytes()).hexdigest()]
    eventually(lambda: not any(map(alive, agent.pids)), "the agent ends with the last who had an image open")
