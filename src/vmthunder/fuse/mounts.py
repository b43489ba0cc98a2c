"""Mount, unmount, and find out what is mounted. Stateless; blocking calls, for the keeper and for command lines.

No function here asks the mounted file system anything from this process: who looks into a mount whose worker is gone
waits until there is a new one.
"""

import errno
import os
import re
import time
from typing import NamedTuple

from vmthunder.errors import Conflict, Failure, MissingTool, NotFound, NotPermitted, VMThunderError
from vmthunder.fuse import libc

KIND = "fuse.vmthunder"
CONNECTIONS = "/sys/fs/fuse/connections"
_PROBE_TIMEOUT_S = 5.0


class Mount(NamedTuple):
    """One line of /proc/self/mountinfo (proc_pid_mountinfo(5))."""

    mountpoint: str
    kind: str
    device: str
    """`major:minor`. The minor number is also the number of the FUSE connection."""

    @property
    def connection(self) -> int:
        return int(self.device.partition(":")[2])


def parse_mountinfo(text: str) -> list[Mount]:
    """Every mount, in the order of mounting: of several at one place the last is the visible one."""
    mounts = []
    for line in text.splitlines():
        fields, _, after = line.partition(" - ")
        device, _, mountpoint = fields.split(" ")[2:5]
        plain = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), mountpoint)
        mounts.append(Mount(plain, after.partition(" ")[0], device))
    return mounts


def find_mount(mountpoint: str) -> Mount | None:
    """What is mounted exactly at `mountpoint` (an absolute path without symbolic links), if anything is."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mountinfo:
        found = [mount for mount in parse_mountinfo(mountinfo.read()) if mount.mountpoint == mountpoint]
    return found[-1] if found else None


def mount(fuse_fd: int, mountpoint: str, *, writable: bool = False) -> Mount:
    """Mount the file system that answers on `fuse_fd` for all users; the kernel checks their permissions.

    Raises:
        NotFound: no such directory.
        NotPermitted: not root.
        MissingTool: the kernel has no FUSE.
    """
    options = f"fd={fuse_fd},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions"
    flags = libc.MS_NOSUID | libc.MS_NODEV | libc.MS_NOEXEC
    if not writable:
        flags |= libc.MS_RDONLY
    try:
        libc.mount("vmthunder", mountpoint, KIND, flags, options)
    except OSError as error:
        raise _mount_error(error, mountpoint) from error
    mounted = find_mount(mountpoint)
    if mounted is None:
        raise Failure(f"{mountpoint} disappeared from the mount table as soon as it was mounted")
    return mounted


def unmount(mounted: Mount) -> None:
    """Take away `mounted`, also from under its users: their reads fail from now on. Nothing to do if it is gone."""
    if find_mount(mounted.mountpoint) != mounted:
        return  # somebody was quicker, and what is there now is not ours
    try:
        libc.umount2(mounted.mountpoint, 0)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        # FORCE ends the requests that still wait: a thread that hangs in one could keep the connection open for ever.
        libc.umount2(mounted.mountpoint, libc.MNT_FORCE | libc.MNT_DETACH)


def clear_stale(mountpoint: str) -> bool:
    """Remove a mount of ours that nobody serves any more; True if there was one.

    Raises:
        Conflict: it is served.
    """
    mounted = find_mount(mountpoint)
    if mounted is None or mounted.kind != KIND:
        return False
    if _answers(mountpoint):
        raise Conflict(f"{mountpoint} is served by a running agent; stop that one first")
    libc.umount2(mountpoint, libc.MNT_FORCE | libc.MNT_DETACH)
    return True


def abort(connection: int) -> None:
    """End every request of a connection with an error, and the connection. Raises OSError."""
    with open(f"{CONNECTIONS}/{connection}/abort", "w", encoding="ascii") as control:
        control.write("1")


def set_readahead(mounted: Mount, readahead_bytes: int) -> None:
    """Read ahead further than INIT allows: there the kernel takes the smaller of our figure and 128 KiB.

    Raises:
        OSError: no sysfs, or one that is read-only.
    """
    with open(f"/sys/class/bdi/{mounted.device}/read_ahead_kb", "w", encoding="ascii") as setting:
        setting.write(str(readahead_bytes // 1024))


def _answers(mountpoint: str) -> bool:
    """Whether somebody serves a mount, or may: only ENOTCONN says that nobody does.

    A child asks, because who asks a file system whose worker hangs can only be killed.
    """
    child = os.fork()
    if child == 0:
        try:
            os.statvfs(mountpoint)  # not stat: what that shows the kernel may have cached
        except OSError as error:
            os._exit(error.errno or 0)
        os._exit(0)
    deadline_s = time.monotonic() + _PROBE_TIMEOUT_S
    while time.monotonic() < deadline_s:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status) != errno.ENOTCONN
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return True


def _mount_error(error: OSError, mountpoint: str) -> VMThunderError:
    if error.errno == errno.EPERM:
        return NotPermitted(f"mounting {mountpoint} takes root")
    if error.errno == errno.ENODEV:
        return MissingTool("this kernel has no FUSE; load it with `modprobe fuse`")
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return NotFound(f"{mountpoint} is not a directory; make it first")
    return Failure(f"cannot mount {mountpoint}: {error.strerror}")
