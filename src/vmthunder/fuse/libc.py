"""The system calls that Python does not wrap, each as one function. Stateless; any thread may call."""

import ctypes
import os

_libc = ctypes.CDLL(None, use_errno=True)

MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_RDONLY = 2, 4, 8, 1
MNT_FORCE, MNT_DETACH = 1, 2
MCL_CURRENT, MCL_FUTURE, MCL_ONFAULT = 1, 2, 4
_PR_SET_THP_DISABLE = 41
_CLONE_FILES = 0x400
_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 1, 2
_off_t = ctypes.c_int64


def _check(result: int, path: str | None = None) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)


def mount(source: str, target: str, kind: str, flags: int, options: str) -> None:
    """mount(2). Raises OSError."""
    arguments = (os.fsencode(text) for text in (source, target, kind))
    _check(_libc.mount(*arguments, ctypes.c_ulong(flags), os.fsencode(options)), target)


def umount2(target: str, flags: int) -> None:
    """umount2(2). Raises OSError."""
    _check(_libc.umount2(os.fsencode(target), flags), target)


def fallocate(fd: int, mode: int, offset: int, length_bytes: int) -> None:
    """fallocate(2), with the modes that `os.posix_fallocate` has not. Raises OSError."""
    _check(_libc.fallocate(fd, mode, _off_t(offset), _off_t(length_bytes)))


def mlockall(flags: int) -> None:
    """mlockall(2). Raises OSError."""
    _check(_libc.mlockall(flags))


def disable_huge_pages() -> None:
    """Keep this process free of transparent huge pages. Raises OSError."""
    _check(_libc.prctl(_PR_SET_THP_DISABLE, ctypes.c_ulong(1), *[ctypes.c_ulong(0)] * 3))


def punch_hole(fd: int, offset: int, length_bytes: int) -> None:
    """Make a hole in a file, whose size stays. Raises OSError."""
    fallocate(fd, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, offset, length_bytes)


def unshare_files() -> None:
    """Give this thread a descriptor table of its own, with a copy of each descriptor. Raises OSError."""
    _check(_libc.unshare(_CLONE_FILES))
