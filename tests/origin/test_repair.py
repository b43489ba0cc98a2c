"""What `verify` says to do about damage, publishing again, does repair it."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import RunCli, one_line

CHUNK = 65536


def _flip(pack: Path) -> None:
    data = bytearray(pack.read_bytes())
    data[CHUNK + 7] ^= 16
    pack.write_bytes(data)


def _cut(pack: Path) -> None:
    os.truncate(pack, 2 * CHUNK)


def _spoil_footer(pack: Path) -> None:
    data = bytearray(pack.read_bytes())
    data[-30] ^= 1
    pack.write_bytes(data)


@pytest.mark.parametrize("others", [False, True], ids=["same pack", "new pack"])
@pytest.mark.parametrize("damage", [_flip, _cut, _spoil_footer, Path.unlink])
def test_publishing_again_repairs_an_image(
    damage: Callable[[Path], None], others: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_cli: RunCli
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    disk, origin = tmp_path / "disk", tmp_path / "origin"
    disk.write_bytes(os.urandom(8 * CHUNK))
    if others:  # the image's chunks are in a pack that has more, so the repair cannot be that pack again
        more = tmp_path / "more"
        more.write_bytes(disk.read_bytes() + os.urandom(8 * CHUNK))
        assert run_cli("publish", more, "more", "--origin", origin).returncode == 0
    assert run_cli("publish", disk, "it", "--origin", origin).returncode == 0
    (pack,) = origin.glob("packs/*/*")
    damage(pack)

    done = run_cli("verify", "it", "--origin", origin)
    assert done.returncode == 4
    assert one_line(done.stderr).endswith("publish it again from its source")
    assert run_cli("publish", disk, "it", "--origin", origin).returncode == 0
    done = run_cli("verify", "it", "--origin", origin)
    assert done.returncode == 0, done.stderr
    if others:
        assert run_cli("verify", "more", "--origin", origin).returncode == 4
