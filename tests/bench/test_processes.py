import sys
import time
from pathlib import Path

import pytest

from vmthunder.bench.processes import Process, cpu_s, finish, running
from vmthunder.errors import Failure

BURN = "import time\nwhile time.process_time() < 0.3: pass\n"


SPAWN = f"""
import signal, subprocess, sys
subprocess.run([sys.executable, "-c", {BURN!r}])
print("done", flush=True)
signal.pause()
"""


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_cpu_time_counts_children_that_have_ended(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with running("burner", [sys.executable, "-c", SPAWN], log) as process:
        process.wait_until(lambda: "done" in log.read_text(), 30)
        assert cpu_s([process.pid]) >= 0.3


def test_cpu_time_of_a_process_that_is_gone_is_nothing() -> None:
    assert cpu_s([2**22 - 1]) == 0


def test_a_program_that_ends_early_is_reported_with_its_last_words(tmp_path: Path) -> None:
    with running("server", ["sh", "-c", "echo port in use; exit 8"], tmp_path / "log") as process:  # noqa: SIM117 - not what starts it
        with pytest.raises(Failure, match="server ended with status 8 before it was ready: port in use"):
            process.wait_until(lambda: False, 30)


def test_a_program_that_never_gets_ready_is_reported(tmp_path: Path) -> None:
    with running("server", ["sleep", "60"], tmp_path / "log") as process:  # noqa: SIM117 - not what starts it
        with pytest.raises(Failure, match="not ready after 0 s: it said nothing"):
            process.wait_until(lambda: False, 0.1)


def test_a_program_that_fails_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(Failure, match="publish ended with status 3: no such image"):
        finish("publish", ["sh", "-c", "echo no such image; exit 3"], tmp_path / "log", 30)


def test_nothing_of_a_program_is_left_that_does_not_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmthunder.bench.processes._STOP_S", 0.2)
    log = tmp_path / "log"
    process = Process("stubborn", ["sh", "-c", "trap '' TERM; sleep 60 & echo $!; wait; wait"], log)
    process.wait_until(lambda: log.read_text().endswith("\n"), 30)
    child = int(log.read_text())
    process.stop()
    deadline = time.monotonic() + 10
    while is_alive(child):
        assert time.monotonic() < deadline


def test_the_operators_settings_do_not_reach_what_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMTHUNDER_ORIGIN", "http://production")
    finish("env", ["env"], tmp_path / "log", 30)
    assert "VMTHUNDER_" not in (tmp_path / "log").read_text()
