"""Network namespaces, entered by one thread at a time.

A process that is started in a namespace from here shares everything else with its parent. `ip netns exec` would also give
it a mount namespace of its own, whose copies of our FUSE mounts keep those alive after they were unmounted.
"""

import ctypes
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from pyroute2 import IPRoute, netns

from vmthunder.errors import NotFound, NotPermitted

T = TypeVar("T")

NAMED: Final = Path("/run/netns")
"""Where iproute2 keeps namespaces that have a name."""

_CLONE_NEWNET = 0x4000_0000  # include/uapi/linux/sched.h
# include/uapi/linux/mount.h
_MS_BIND = 1 << 12
_MS_SHARED = 1 << 20

_libc = ctypes.CDLL(None, use_errno=True)


class NetworkNamespace:
    """A network namespace. One without a name lives as long as its descriptor or a process in it."""

    def __init__(self, fd: int) -> None:
        self.fd: Final = fd

    @classmethod
    def anonymous(cls) -> "NetworkNamespace":
        """A fresh one that nothing names, with loopback up. Raises NotPermitted."""
        created = cls(_in_thread(_unshared))
        created.run(raise_loopback)
        return created

    @classmethod
    def create(cls, name: str) -> "NetworkNamespace":
        """A fresh one that `ip netns` shows as `name`, with loopback up; stays until `remove`. Raises NotPermitted."""
        if os.geteuid():
            raise NotPermitted("making network namespaces needs root")
        netns.create(name)
        created = cls.open(name)
        created.run(raise_loopback)
        return created

    @classmethod
    def open(cls, name: str) -> "NetworkNamespace":
        """One that has a name. Raises NotFound."""
        try:
            return cls(os.open(NAMED / name, os.O_RDONLY | os.O_CLOEXEC))
        except FileNotFoundError:
            raise NotFound(f"no network namespace {name}") from None

    def run(self, action: Callable[[], T]) -> T:
        """Run `action` in the namespace, on a thread of its own; processes it starts stay in the namespace."""

        def entered() -> T:
            self.enter()
            return action()

        return _in_thread(entered)

    def enter(self) -> None:
        """Move the calling thread into the namespace. Raises NotPermitted."""
        _check(_libc.setns(self.fd, _CLONE_NEWNET), "enter a network namespace")

    def processes(self) -> list[int]:
        """Processes whose first thread is in the namespace."""
        ours = os.fstat(self.fd)
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                theirs = (entry / "ns/net").stat()
            except OSError:
                continue  # it ended, or is a zombie
            if (theirs.st_dev, theirs.st_ino) == (ours.st_dev, ours.st_ino):
                found.append(int(entry.name))
        return found

    def close(self) -> None:
        """Let go of the descriptor."""
        os.close(self.fd)


def remove(name: str) -> None:
    """Take a namespace's name away; the kernel frees it and its links with its last process."""
    netns.remove(name)


def share_names() -> None:
    """Make NAMED a shared mount, as `ip netns` does: names made in one mount namespace are then seen in others.

    Raises:
        NotPermitted: not root.
    """
    names = os.fsencode(NAMED)
    NAMED.mkdir(parents=True, exist_ok=True)
    if _libc.mount(b"none", names, None, _MS_SHARED, None):  # it is no mount yet
        _check(_libc.mount(names, names, None, _MS_BIND, None), f"mount {NAMED}")
        _check(_libc.mount(b"none", names, None, _MS_SHARED, None), f"share {NAMED}")


def raise_loopback() -> None:
    """Bring `lo` of the calling thread's network namespace up."""
    with IPRoute() as netlink:
        netlink.link("set", index=netlink.link_lookup(ifname="lo")[0], state="up")


def _unshared() -> int:
    _check(_libc.unshare(_CLONE_NEWNET), "make a network namespace")
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def _in_thread(action: Callable[[], T]) -> T:
    """Run `action` on a new thread, which alone changes namespace and then ends."""
    results: list[T] = []
    failures: list[BaseException] = []

    def body() -> None:
        try:
            results.append(action())
        except BaseException as error:  # noqa: BLE001 - raised again on the caller's thread
            failures.append(error)

    thread = threading.Thread(target=body, name="namespace")
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return results[0]


def _check(result: int, what: str) -> None:
    if result:
        raise NotPermitted(f"cannot {what}: {os.strerror(ctypes.get_errno())}; it needs root")
