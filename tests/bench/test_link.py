import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from vmthunder.bench.link import FAR_ADDRESS, Link
from vmthunder.errors import Usage
from vmthunder.lab.namespaces import NetworkNamespace
from vmthunder.lab.shaping import Rate


@pytest.fixture
def outside() -> Iterator[NetworkNamespace]:
    """A namespace in the place of the host's, which no test may touch."""
    if os.geteuid():
        pytest.skip("needs root")
    with closing(NetworkNamespace.anonymous()) as namespace:
        yield namespace


def interfaces() -> set[str]:
    return {name for _, name in socket.if_nameindex()}


def received_mbit_s(link: Link, sent_bytes: int) -> float:
    """Speed at which the near end receives what the far end sends."""
    listener = link.far.run(lambda: socket.create_server((FAR_ADDRESS, 0)))
    with listener, socket.create_connection(listener.getsockname(), timeout=20) as near:
        far, _ = listener.accept()
        with far:
            sender = threading.Thread(target=far.sendall, args=(bytes(sent_bytes),))
            begin = time.monotonic()
            sender.start()
            left = sent_bytes
            while left:
                left -= len(near.recv(1 << 16))
            took_s = time.monotonic() - begin
            sender.join()
    return sent_bytes * 8 / took_s / 1e6


def test_a_link_carries_its_rate(outside: NetworkNamespace) -> None:
    def measure() -> float:
        with closing(Link(Rate.parse("40mbit"))) as link:
            return received_mbit_s(link, 4 << 20)

    assert 30 < outside.run(measure) < 41


def test_a_link_leaves_nothing_behind(outside: NetworkNamespace) -> None:
    host = interfaces()

    def fail_with_a_link() -> set[str]:
        with pytest.raises(ZeroDivisionError), closing(Link(Rate.parse("1gbit"))):
            assert "near" in interfaces()
            raise ZeroDivisionError
        return interfaces()

    assert outside.run(fail_with_a_link) == {"lo"}
    assert interfaces() == host


def test_what_runs_in_a_namespace_fails_to_its_caller(outside: NetworkNamespace) -> None:
    with pytest.raises(ZeroDivisionError):
        outside.run(lambda: 1 // 0)


@pytest.mark.parametrize("text", ["", "fast", "0mbit", "100", "1 gbit/s", "-1gbit", "99kbit"])
def test_what_is_not_a_rate_is_refused(text: str) -> None:
    with pytest.raises(Usage, match="not a link rate"):
        Rate.parse(text)


def test_rates_are_decimal() -> None:
    assert Rate.parse("1.5gbit").bits_s == 1_500_000_000
