"""Nova and Glance as they are released, each in an environment of its own that is made once per machine."""

import fcntl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agents import lab
from glance_server import GlanceServer, serving

__all__ = ["lab"]

CACHE = Path("/var/tmp/vmthunder-openstack")
"""Some 700 MB, which take a minute or two to come; kept between runs."""


INSTALL_S = 900


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whoever runs first installs them, which may take longer than a test may."""
    for item in items:
        if {"nova_python", "glance_python"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.timeout(INSTALL_S))


def environment(*packages: str) -> Path:
    """The Python of an environment that holds these packages."""
    CACHE.mkdir(mode=0o755, exist_ok=True)
    directory = CACHE / packages[0].replace("==", "-")
    python = directory / "bin" / "python"
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (directory / "done").exists():
            subprocess.run([sys.executable, "-m", "venv", "--clear", directory], check=True, timeout=60)
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True, timeout=600)
            (directory / "done").touch()
    return python


@pytest.fixture(scope="session")
def nova_python() -> Path:
    """A Python that imports Nova."""
    return environment("nova==34.0.0")


@pytest.fixture(scope="session")
def glance_python() -> Path:
    """A Python that imports Glance, and a web server for it."""
    return environment("glance==33.0.0", "gunicorn")


@pytest.fixture(scope="module")
def glance(glance_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GlanceServer]:
    with serving(glance_python, tmp_path_factory.mktemp("glance") / "work") as server:
        yield server


@pytest.fixture
def cloud(glance: GlanceServer, monkeypatch: pytest.MonkeyPatch) -> GlanceServer:
    """That Glance, where our commands find it."""
    for name, value in glance.environ.items():
        monkeypatch.setenv(name, value)
    return glance
