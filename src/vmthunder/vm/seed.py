"""The cloud-init NoCloud seed of a machine: an ISO 9660 volume `cidata` with `user-data` and `meta-data`.

Format: https://docs.cloud-init.io/en/latest/reference/datasources/nocloud.html. SSH keys travel in the meta-data, so
that user-data is passed on byte for byte, be it a cloud-config, a script or a MIME archive. Blocking; no state.
"""

import json
import uuid
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import pycdlib

from vmthunder.errors import Usage

DEFAULT_USER_DATA = b"#cloud-config\n{}\n"
MAX_USER_DATA_BYTES = 16 << 20
_KEY_TYPES = ("ssh-", "ecdsa-", "sk-ssh-", "sk-ecdsa-")


def read_user_data(path: Path) -> bytes:
    """Raises Usage."""
    try:
        size_bytes = path.stat().st_size
        if size_bytes > MAX_USER_DATA_BYTES:
            raise Usage(f"user data {path} has {size_bytes} bytes; {MAX_USER_DATA_BYTES} is the most")
        return path.read_bytes()
    except OSError as error:
        raise Usage(f"user data {path}: {error.strerror}") from None


def read_ssh_keys(path: Path) -> list[str]:
    """The public keys in a file, one a line as in authorized_keys. Raises Usage."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise Usage(f"SSH key {path}: {error}") from None
    if "PRIVATE KEY" in text:
        raise Usage(f"{path} holds a private key; give the public one ({path}.pub)")
    keys = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if not keys or not all(key.startswith(_KEY_TYPES) for key in keys):
        raise Usage(f"{path} holds no SSH public key")
    return keys


def write_seed(seed: Path, name: str, user_data: bytes | None, ssh_keys: Sequence[str]) -> None:
    """Write the seed of the machine `name`, which becomes its host name. Raises OSError."""
    meta_data = json.dumps(
        # A new id each time: cloud-init then treats a clone of an image that once ran as a first boot.
        {"instance-id": f"i-{uuid.uuid4().hex}", "local-hostname": name, "public-keys": list(ssh_keys)}
    ).encode()
    iso = pycdlib.PyCdlib()
    iso.new(interchange_level=3, joliet=3, rock_ridge="1.09", vol_ident="cidata")
    try:
        for file, data in (("user-data", user_data or DEFAULT_USER_DATA), ("meta-data", meta_data)):
            short = file.upper().replace("-", "_")
            iso.add_fp(BytesIO(data), len(data), f"/{short}.;1", rr_name=file, joliet_path=f"/{file}")
        iso.write(str(seed))
    finally:
        iso.close()
