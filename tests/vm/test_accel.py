"""The KVM probe: its guest is real, whatever runs it."""

import json
from pathlib import Path

import pytest

from vmthunder.errors import NotPermitted
from vmthunder.vm import accel
from vmthunder.vm.qemu import choose_accel
from vmthunder.vm.spec import Accel


def test_the_boot_sector_reaches_64_bit_mode_and_says_so() -> None:
    assert accel.probe("tcg", "qemu64") == (True, "a guest ran")


def test_a_guest_that_hangs_is_no_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    endless_loop = b"\xeb\xfe".ljust(510, b"\0") + b"\x55\xaa"
    monkeypatch.setattr(accel, "BOOT_SECTOR", endless_loop)
    usable, why = accel.probe("tcg", "qemu64")
    assert not usable
    assert "did not finish" in why


def test_qemus_own_words_say_why_not() -> None:
    usable, why = accel.probe("tcg", "no-such-cpu")
    assert not usable
    assert "no-such-cpu" in why


def test_the_verdict_is_kept_for_this_boot_of_the_host_only(tmp_path: Path) -> None:
    verdict = accel.kvm_verdict(tmp_path)
    kept = tmp_path / "kvm.json"
    kept.write_text(json.dumps({**json.loads(kept.read_text()), "why": "as kept"}))
    assert accel.kvm_verdict(tmp_path).why == "as kept"
    kept.write_text(json.dumps({**json.loads(kept.read_text()), "host": "before the reboot"}))
    assert accel.kvm_verdict(tmp_path) == verdict


@pytest.mark.parametrize("damage", [b"", b"[]", b'{"usable": true}', b"\xff"])
def test_a_damaged_verdict_is_found_out_anew(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "kvm.json").write_bytes(damage)
    assert accel.kvm_verdict(tmp_path).host


def test_kvm_is_chosen_exactly_where_it_runs_a_guest(tmp_path: Path) -> None:
    verdict = accel.kvm_verdict(tmp_path)
    assert choose_accel(Accel.AUTO, tmp_path) == ("kvm" if verdict.usable else "tcg")
    assert choose_accel(Accel.TCG, tmp_path) == "tcg"
    if not verdict.usable:
        with pytest.raises(NotPermitted, match="--accel tcg"):
            choose_accel(Accel.KVM, tmp_path)
