"""What every test may use, and two guards: no test is skipped in CI, and no test outlives its time."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

# Machines that run these tests are shared: how long one example takes says nothing.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

VMTHUNDER = (sys.executable, "-m", "vmthunder")
IN_CI = os.environ.get("CI") == "true"

RunCli = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run_cli() -> RunCli:
    """Run `vmthunder` as a process: `run_cli("images", "--origin", url)`; keyword arguments go to subprocess.run."""

    def run(*args: object, timeout: float = 60, **kwargs: object) -> "subprocess.CompletedProcess[str]":
        kwargs.setdefault("stdin", subprocess.DEVNULL)
        return subprocess.run(  # type: ignore[call-overload, no-any-return]
            [*VMTHUNDER, *map(str, args)], capture_output=True, text=True, timeout=timeout, check=False, **kwargs
        )

    return run


def one_line(text: str) -> str:
    """The only line of `text`; fails where there are more, or a traceback."""
    lines = text.strip().splitlines()
    assert len(lines) == 1, text
    assert "Traceback" not in text
    return lines[0]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: "pytest.CallInfo[None]") -> object:
    """In CI everything that a test needs is installed by the set-up: a skip there is a test that silently went away."""
    outcome = yield
    report = outcome.get_result()
    if IN_CI and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped in CI: {report.longrepr}"
    return report


def repository() -> Path:
    """The checkout that these tests belong to."""
    return Path(__file__).resolve().parent.parent
