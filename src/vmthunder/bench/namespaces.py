"""Linux namespaces that a benchmark runs in, so that it leaves nothing behind however it ends.

`isolate` moves the process into a mount and a network namespace of its own: FUSE mounts made there are seen by nobody
else, and they and all links are gone when the last process of the benchmark is. Must be called while the process has
one thread. A `NetworkNamespace` has no name in the file system: it lives as long as its descriptor or a process in it.
"""

import ctypes
import os
import threading
from collections.abc import Callable
from typing import TypeVar

from pyroute2 import IPRoute

from vmthunder.errors import NotPermitted

T = TypeVar("T")

# include/uapi/linux/sched.h, include/uapi/linux/mount.h
_CLONE_NEWNS = 0x0002_0000
_CLONE_NEWNET = 0x4000_0000
_MS_REC = 1 << 14
_MS_PRIVATE = 1 << 18

_libc = ctypes.CDLL(None, use_errno=True)


def isolate() -> None:
    """Move this process into fresh mount and network namespaces; of the network only loopback is there.

    Raises:
        NotPermitted: not root.
    """
    if os.geteuid():
        raise NotPermitted("benchmarks mount file systems and make network links; run them as root")
    _check(_libc.unshare(_CLONE_NEWNS | _CLONE_NEWNET), "unshare mount and network namespaces")
    # Without this, mounts of the benchmark would propagate to the host on machines whose / is shared.
    _check(_libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None), "make mounts private")
    raise_loopback()


def raise_loopback() -> None:
    """Bring `lo` of the calling thread's network namespace up."""
    with IPRoute() as netlink:
        netlink.link("set", index=netlink.link_lookup(ifname="lo")[0], state="up")


class NetworkNamespace:
    """A fresh network namespace, with loopback up. Close it, or its links stay until the process ends."""

    def __init__(self) -> None:
        self.fd = _in_thread(_unshared_network)
        self.run(raise_loopback)

    def run(self, action: Callable[[], T]) -> T:
        """Run `action` in the namespace, on a thread of its own; processes it starts stay in the namespace."""

        def entered() -> T:
            _check(_libc.setns(self.fd, _CLONE_NEWNET), "enter network namespace")
            return action()

        return _in_thread(entered)

    def close(self) -> None:
        """Let go of the namespace; the kernel removes it and its links with its last process."""
        os.close(self.fd)


def _unshared_network() -> int:
    _check(_libc.unshare(_CLONE_NEWNET), "unshare network namespace")
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
        code = ctypes.get_errno()
        raise NotPermitted(f"cannot {what}: {os.strerror(code)}; benchmarks need root and CAP_SYS_ADMIN")
