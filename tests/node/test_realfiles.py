"""The real directory beneath a mount, without a kernel in between: what comes twice, and what a new worker knows."""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmthunder.fuse.writing import Change
from vmthunder.node.realfiles import RealFiles


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "base").mkdir()
    descriptor = os.open(tmp_path / "base", os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


def test_what_was_done_before_the_answer_got_lost_is_no_error_when_it_comes_again(
    directory: int, tmp_path: Path
) -> None:
    async def run() -> None:
        real = RealFiles(directory, tmp_path / "state.json", resume=False)
        owner = os.getuid(), os.getgid()
        for again in (False, True):
            await real.create("a", os.O_EXCL, 0o600, owner, again=again)
        with pytest.raises(FileExistsError):
            await real.create("a", os.O_EXCL, 0o600, owner, again=False)
        for again in (False, True):
            await real.rename("a", "b", again=again)
        with pytest.raises(FileNotFoundError):
            await real.rename("a", "b", again=False)
        for again in (False, True):
            await real.unlink("b", again=again)
        with pytest.raises(FileNotFoundError):
            await real.unlink("b", again=False)
        real.close()

    asyncio.run(run())


def test_a_new_worker_finds_files_by_their_numbers_also_after_a_rename(directory: int, tmp_path: Path) -> None:
    async def run() -> None:
        before = RealFiles(directory, tmp_path / "state.json", resume=False)
        entry, opened = await before.create("x.part", 0, 0o640, (os.getuid(), os.getgid()), again=False)
        await before.write(entry.node, 0, b"data")
        await before.rename("x.part", "x", again=False)
        after = RealFiles(directory, tmp_path / "state.json", resume=True)
        assert b"".join(await after.read(entry.node, 0, 10)) == b"data"
        attr, _ = await after.setattr(entry.node, Change(size_bytes=2))
        assert attr.size_bytes == 2 and attr.mode & 0o777 == 0o640
        assert (await after.open(entry.node)).fh != opened.fh
        await after.unlink("x", again=False)
        assert after.getattr(entry.node)[0].nlink == 0, "it is open, and so still there"
        for real in (before, after):
            real.close()

    asyncio.run(run())


def test_links_and_directories_are_not_shown(directory: int, tmp_path: Path) -> None:
    (tmp_path / "base" / "link").symlink_to("/etc/passwd")
    (tmp_path / "base" / "directory").mkdir()
    (tmp_path / "base" / "file").touch()
    real = RealFiles(directory, tmp_path / "state.json", resume=False)
    assert [entry.name for entry in real.entries()] == [b"file"]
    assert real.lookup("link") is None and real.lookup("directory") is None
    real.close()
