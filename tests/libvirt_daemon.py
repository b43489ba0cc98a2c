"""A real libvirtd, run as root, which the machine does not notice.

It runs in mount, network and process namespaces of its own: configuration, state and sockets of an installed libvirtd are
hidden from it, it touches no firewall, and killing it ends its guests, too. Guests run as `libvirt-qemu`, as they do on a
compute node.
"""

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from agents import Lab, eventually, output_of

# Directories of tests are closed to others; this one is put on a path that guests' user may pass.
# No system bus in /run, so nothing is told to an init system. A distribution's package makes the user only with the services.
# The shell stays, as process 1: QEMU detaches itself, and somebody has to reap it.
_NAMESPACE = """set -e
umask 022
for directory in /run /var/lib /var/cache /var/log /etc/libvirt; do mount -t tmpfs tmpfs $directory; done
mkdir /run/lock /run/node
mount --rbind "$1" /run/node
mount -t tmpfs tmpfs "$2"
mkdir -p "$1"
mount --rbind /run/node "$1"
for file in passwd group; do cp /etc/$file /run/$file; done
grep -q ^libvirt-qemu: /run/passwd || echo libvirt-qemu:x:64055:64055::/nonexistent:/bin/false >> /run/passwd
grep -q ^libvirt-qemu: /run/group || echo libvirt-qemu:x:64055: >> /run/group
grep -q ^kvm: /run/group || echo kvm:x:64056: >> /run/group
for file in passwd group; do mount --bind /run/$file /etc/$file; done
cat > /etc/libvirt/qemu.conf <<END
security_driver = "none"
cgroup_controllers = [ ]
stdio_handler = "file"
END
cat > /etc/libvirt/libvirtd.conf <<END
auth_unix_rw = "none"
unix_sock_dir = "$1"
log_outputs = "2:file:$1/libvirtd.log"
END
libvirtd &
wait
"""


class Libvirt:
    """Where it listens."""

    def __init__(self, directory: Path) -> None:
        self._uri = f"qemu+unix:///system?socket={directory}/libvirt-sock"

    def virsh(self, *arguments: object) -> str:
        return output_of("virsh", "--quiet", "--connect", self._uri, *arguments).strip()

    def answers(self) -> bool:
        command = ["virsh", "--connect", self._uri, "version"]
        return subprocess.run(command, capture_output=True, timeout=30, check=False).returncode == 0


@contextmanager
def running(lab: Lab, directory: Path) -> Iterator[Libvirt]:
    """`directory` is all that it sees of the tests: its socket and log, disks, and the mounts that are there by now."""
    namespaces = ["--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
    daemon = lab.child("unshare", *namespaces, "sh", "-c", _NAMESPACE, "sh", directory, tempfile.gettempdir())
    try:
        libvirt = Libvirt(directory)
        eventually(lambda: libvirt.answers() or daemon.poll() is not None, "libvirtd answers")
        assert daemon.poll() is None, daemon.communicate()
        yield libvirt
    finally:
        daemon.kill()
        daemon.wait(30)
