"""Whether KVM runs a guest here, found out by running one.

`/dev/kvm` may exist, and QEMU may even start with it, on hosts where a guest then hangs or crawls: nested or partial
virtualisation. So a guest of one boot sector is run under SeaBIOS: it builds page tables, enters 64-bit mode, and ends
QEMU with an agreed exit status. Real KVM needs a twentieth of the time allowed. Blocking; the verdict is kept in a file
for as long as this kernel runs.
"""

import json
import os
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

QEMU = "qemu-system-x86_64"
PROBE_TIMEOUT_S = 2.0

BOOT_SECTOR = (
    bytes.fromhex(
        "fa 31c0 8ed8 8ec0"  # cli; ds = es = 0
        "66bf00100000 b9000c 6631c0 fc 66f3ab"  # clear 12 KiB from 0x1000: three page tables
        "66c706001003200000 66c706002003300000 66c706003083000000"  # PML4[0], PDPT[0], PD[0]: map the first 2 MiB
        "66b800100000 0f22d8"  # cr3 = PML4
        "66b820000000 0f22e0"  # cr4 = PAE
        "66b9800000c0 0f32 660d00010000 0f30"  # EFER |= LME
        "0f0116807c 66b801000080 0f22c0"  # lgdt [0x7c80]; cr0 = PG | PE
        "ea677c0800"  # far jump to 64-bit code at 0x7c67
        "31c0 0fa2"  # cpuid: an exit that the hypervisor itself must handle
        "b02a e6f4 f4"  # out 0xf4, 42: isa-debug-exit ends QEMU with status 2 × 42 + 1
        "0000000000000000 00000000009a2000"  # GDT at 0x7c70: null, 64-bit code
        "0f00 707c0000"  # its descriptor, at 0x7c80
    ).ljust(510, b"\0")
    + b"\x55\xaa"
)
GUEST_RAN_STATUS = 2 * 42 + 1


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the probe said, and for which kernel and QEMU."""

    usable: bool
    why: str
    host: str


def kvm_verdict(state_dir: Path) -> Verdict:
    """The kept verdict, or a new one."""
    kept = state_dir / "kvm.json"
    host = _host()
    try:
        verdict = Verdict(**json.loads(kept.read_text()))
        if verdict.host == host:
            return verdict
    except (OSError, ValueError, TypeError):
        pass  # none yet, or damaged: probe
    usable, why = probe()
    verdict = Verdict(usable, why, host)
    try:
        draft = kept.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps(asdict(verdict)) + "\n")
        draft.replace(kept)
    except OSError:
        pass  # the next boot probes again
    return verdict


def probe(accel: str = "kvm", cpu: str = "host") -> tuple[bool, str]:
    """Run the boot sector. Returns whether it ran to its end in time, and a phrase that says how it went."""
    if accel == "kvm" and not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False, "/dev/kvm is not there or not accessible"
    disk = os.memfd_create("boot-sector")
    try:
        os.write(disk, BOOT_SECTOR)
        done = subprocess.run(
            [
                QEMU, "-nodefaults", "-no-user-config", "-M", f"pc,accel={accel}", "-cpu", cpu, "-m", "16",
                "-display", "none", "-device", "isa-debug-exit,iobase=0xf4",
                "-drive", f"file=/proc/self/fd/{disk},format=raw,if=ide",
            ],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, pass_fds=[disk], timeout=PROBE_TIMEOUT_S,
            check=False,
        )  # fmt: skip
    except FileNotFoundError:
        return False, f"{QEMU} is not installed"
    except subprocess.TimeoutExpired:
        return False, f"a guest of one boot sector did not finish within {PROBE_TIMEOUT_S:g} s"
    finally:
        os.close(disk)
    if done.returncode == GUEST_RAN_STATUS:
        return True, "a guest ran"
    said = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[0]
    return False, said.removeprefix(f"{QEMU}: ")


def _host() -> str:
    """Changes with a reboot of the host and with another QEMU."""
    qemu = shutil.which(QEMU)
    version_ns = Path(qemu).stat().st_mtime_ns if qemu else 0
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {version_ns}"
