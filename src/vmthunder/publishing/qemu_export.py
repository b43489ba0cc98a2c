"""Any disk image as a raw read-only file: one qemu-storage-daemon with a FUSE export, for as long as it is read.

Owns the daemon and the descriptor of that file. The file has a name for a moment only: it is mounted, opened, and the
mount detached, so that a killed publish leaves no mount. It leaves no daemon either, because the daemon is told to end
with the thread that started it: use this from the main thread. Whoever reads the file hangs when the daemon does;
`Export.abort`, from any thread, ends both.
"""

import contextlib
import json
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from vmthunder.errors import Failure, MissingTool, NotPermitted, VMThunderError
from vmthunder.publishing.formats import DiskFormat, explain

START_TIMEOUT_S: Final = 30.0
"""Until the export is there. QEMU reads a few tables."""
STOP_TIMEOUT_S: Final = 5.0


class Export:
    """A disk image that a storage daemon shows as the raw file behind `fd`."""

    def __init__(self, process: subprocess.Popen[bytes], label: str) -> None:
        """Use `exported`."""
        self.fd = -1
        self._process = process
        self._label = label
        self._stalled = False

    def abort(self) -> None:
        """Kill the daemon, which ends all reads of its file. From any thread."""
        self._stalled = True
        self._process.kill()

    def failure(self) -> VMThunderError | None:
        """Why reads fail now, if it is the daemon's fault."""
        if self._stalled:
            return Failure(f"qemu-storage-daemon stopped answering while {self._label} was read")
        # A killed daemon's reads fail before it can be waited for: give that moment.
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = self._process.wait(timeout=1)
            return Failure(f"qemu-storage-daemon ended ({_ending(status)}) while {self._label} was read")
        return None


@contextlib.contextmanager
def exported(
    filename: str, disk: DiskFormat, label: str, *, pass_fds: Sequence[int] = (), alone: bool = False
) -> Iterator[Export]:
    """Show an image as a raw file until the end of the `with`; arguments as for `formats.parts`.

    Raises:
        MissingTool: no storage daemon, or it or the kernel has no FUSE.
        Conflict, CorruptFile, NotFound, NotPermitted, Usage: as `formats.explain` says.
    """
    file = {"driver": "host_device" if Path(filename).is_block_device() else "file", "filename": filename}
    node: dict[str, Any] = {"driver": disk.driver, "node-name": "disk", "read-only": True, "file": file}
    if alone and disk in (DiskFormat.QCOW2, DiskFormat.VMDK):
        node["backing"] = None  # whatever its header says
    with contextlib.ExitStack() as cleanup:
        try:
            complaints = cleanup.enter_context(tempfile.TemporaryFile())
        except OSError as error:
            raise NotPermitted(f"{label} needs a temporary directory: {error.strerror}; set TMPDIR") from None
        with tempfile.TemporaryDirectory(prefix="vmthunder-publish-") as directory:
            mountpoint = Path(directory, "disk")
            mountpoint.touch()
            command = [
                *("setpriv", "--pdeathsig", "TERM", "--"),
                *("qemu-storage-daemon", "--blockdev", json.dumps(node), "--export"),
                f"type=fuse,id=disk,node-name=disk,mountpoint={mountpoint},writable=off",
            ]
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=complaints,
                pass_fds=pass_fds,
                start_new_session=True,  # Ctrl-C is for us to act on; the daemon must outlive our last read
            )
            cleanup.callback(_stop, process)
            export = Export(process, label)
            opened = _open(export, process, mountpoint)
        if not opened:
            complaints.seek(0)
            raise _no_export(complaints.read().decode(errors="replace"), disk, label)
        cleanup.callback(_close, export.fd)
        yield export


def _open(export: Export, process: subprocess.Popen[bytes], mountpoint: Path) -> bool:
    """Wait for the mount, open its file and detach it; False if the daemon ended instead."""
    before = mountpoint.stat().st_dev
    # All that asks the daemon, from the first look at the mount on, fails when it is killed.
    watchdog = threading.Timer(START_TIMEOUT_S, export.abort)
    watchdog.start()
    try:
        while process.poll() is None:
            with contextlib.suppress(OSError):
                if mountpoint.stat().st_dev != before:
                    export.fd = os.open(mountpoint, os.O_RDONLY | os.O_CLOEXEC)
                    return True
            time.sleep(0.005)
        return False
    finally:
        watchdog.cancel()
        unmount = ["umount", "--lazy"] if os.geteuid() == 0 else ["fusermount3", "-u", "-z"]
        subprocess.run([*unmount, str(mountpoint)], stderr=subprocess.DEVNULL, check=False)


def _close(fd: int) -> None:
    with contextlib.suppress(OSError):  # a file whose daemon is dead cannot be flushed; we have only read from it
        os.close(fd)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the daemon, kindly if it listens."""
    process.terminate()
    try:
        process.wait(timeout=STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _no_export(stderr: str, disk: DiskFormat, label: str) -> VMThunderError:
    if "setpriv: failed to execute" in stderr:
        return MissingTool(
            f"qemu-storage-daemon is needed to read {label}; install it (apt install qemu-system-common), "
            "or convert the image with qemu-img convert -O raw"
        )
    if "/dev/fuse" in stderr or "fuse: device not found" in stderr or "Failed to mount FUSE" in stderr:
        return MissingTool(f"{label} cannot be shown through FUSE; load the module fuse and allow /dev/fuse")
    if "Invalid parameter 'fuse'" in stderr or "does not accept value 'fuse'" in stderr:
        return MissingTool("this qemu-storage-daemon has no FUSE; convert the image with qemu-img convert -O raw")
    if not stderr.strip():
        return Failure(f"qemu-storage-daemon did not show {label} within {START_TIMEOUT_S:.0f} s")
    return explain(stderr, disk, label)


def _ending(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"exit {status}"
