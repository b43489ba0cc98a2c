"""The namespaces that a benchmark runs in, so that it leaves nothing behind however it ends.

`isolate` moves the process into a mount and a network namespace of its own: FUSE mounts made there are seen by nobody
else, and they and all links are gone when the last process of the benchmark is. `isolate_mounts` is for benchmarks that
make a cluster, which has network namespaces of its own. Either must be called while the process has one thread.
"""

import ctypes
import os
from pathlib import Path

from vmthunder.errors import NotPermitted
from vmthunder.fuse import libc
from vmthunder.fuse.mounts import KIND, parse_mountinfo
from vmthunder.lab.namespaces import NAMED, raise_loopback, share_names

# include/uapi/linux/sched.h, include/uapi/linux/mount.h
_CLONE_NEWNS = 0x0002_0000
_CLONE_NEWNET = 0x4000_0000
_MS_PRIVATE = 1 << 18

_libc = ctypes.CDLL(None, use_errno=True)


def isolate() -> None:
    """Move this process into fresh mount and network namespaces; of the network only loopback is there.

    Raises:
        NotPermitted: not root.
    """
    isolate_mounts()
    _check(_libc.unshare(_CLONE_NEWNET), "unshare the network namespace")
    raise_loopback()


def isolate_mounts() -> None:
    """Move this process into a fresh mount namespace. Names of network namespaces stay common with everybody.

    Raises:
        NotPermitted: not root.
    """
    if os.geteuid():
        raise NotPermitted("benchmarks mount file systems and make network links; run them as root")
    share_names()
    _check(_libc.unshare(_CLONE_NEWNS), "unshare the mount namespace")
    for mounted in parse_mountinfo(Path("/proc/self/mountinfo").read_text(errors="surrogateescape")):
        if mounted.kind == KIND:
            # Our copies of other agents' mounts would keep those alive after their agents have unmounted them.
            libc.umount2(mounted.mountpoint, libc.MNT_DETACH)
        elif not Path(mounted.mountpoint).is_relative_to(NAMED):
            # Without this, mounts of the benchmark would propagate to the host on machines whose / is shared. What is
            # mounted over, or may not be seen, is refused: nothing can be mounted there either.
            _libc.mount(b"none", os.fsencode(mounted.mountpoint), None, _MS_PRIVATE, None)


def _check(result: int, what: str) -> None:
    if result:
        code = ctypes.get_errno()
        raise NotPermitted(f"cannot {what}: {os.strerror(code)}; benchmarks need root and CAP_SYS_ADMIN")
