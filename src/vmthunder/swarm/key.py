"""The cluster key: a secret file that all nodes and the image server share, and what is derived from it.

The file holds 32 random bytes as hexadecimal digits. It may be read by its owner only. From it come the bearer token of
HTTP requests and the key that orders to nodes are signed with (here), and the key of the peers' handshake
(`peer.key.cluster_key`), so that none tells another.
"""

import os
import secrets
import stat
import tempfile
from pathlib import Path
from typing import Final, NamedTuple

from blake3 import blake3

from vmthunder.errors import CorruptFile, Failure, NotFound, NotPermitted
from vmthunder.ids import NodeId, is_hex_digest

NONCE_BYTES: Final = 32
"""Of a node's challenge to whoever gives it an order."""
DEFAULT_KEY_FILE: Final = Path("/var/lib/vmthunder/cluster.key")

_SECRET_BYTES: Final = 32
_TOKEN_CONTEXT: Final = "vmthunder 2026-11 http bearer token: cluster key"
_ORDERS_CONTEXT: Final = "vmthunder 2026-11 orders to nodes: cluster key"
_MAX_FILE_BYTES: Final = 2 * _SECRET_BYTES + 2  # and the end of the line


class ClusterKey(NamedTuple):
    """A cluster key. Not to be printed."""

    secret: bytes

    def __repr__(self) -> str:
        return "ClusterKey(…)"

    @property
    def token(self) -> str:
        """What HTTP requests carry, as `Authorization: Bearer TOKEN`."""
        return blake3(self.secret, derive_key_context=_TOKEN_CONTEXT).hexdigest()

    def order_mac(self, node: NodeId, nonce: bytes, method: str, path: str, body_digest: bytes) -> bytes:
        """What proves an order to be from somebody who has the key: to this node, in answer to its `nonce`.

        `nonce` has NONCE_BYTES, `body_digest` is the BLAKE3-256 of the body.
        """
        # Fields of fixed length first; neither a method nor a path of HTTP has a space in it.
        order = b"".join((node, nonce, body_digest, f"{method} {path}".encode()))
        return blake3(order, key=blake3(self.secret, derive_key_context=_ORDERS_CONTEXT).digest()).digest()

    @classmethod
    def load(cls, path: Path) -> "ClusterKey":
        """The key in a file.

        Raises:
            NotFound: no such file.
            NotPermitted: we may not read it, or others may.
            CorruptFile: it holds no key.
        """
        try:
            with path.open("rb") as file:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
                content = file.read(_MAX_FILE_BYTES + 1)
        except FileNotFoundError:
            raise NotFound(f"no cluster key at {path}; copy the image server's key file there") from None
        except OSError as error:
            raise NotPermitted(f"cluster key {path} cannot be read: {error.strerror}") from None
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise NotPermitted(f"cluster key {path} can be read by others; make it private: chmod 600 {path}")
        text = content.decode("ascii", "replace").strip()
        if len(content) > _MAX_FILE_BYTES or not is_hex_digest(text):
            raise CorruptFile(f"{path} holds no cluster key, which is 64 hexadecimal digits; copy it again")
        return cls(bytes.fromhex(text))

    @classmethod
    def load_or_create(cls, path: Path) -> "ClusterKey":
        """The key in a file, which is made if it is not there.

        Raises:
            NotPermitted, CorruptFile: as `load`.
            NotPermitted, Failure: it cannot be made.
        """
        try:
            return cls.load(path)
        except NotFound:
            pass
        try:
            _create(path)
        except OSError as error:
            kind = NotPermitted if isinstance(error, PermissionError) else Failure
            raise kind(f"cluster key {path} cannot be made ({error.strerror}); choose another --cluster-key") from None
        return cls.load(path)


def _create(path: Path) -> None:
    """Make a key file, whole and durable: nodes will get copies. If somebody else is faster, theirs stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=".cluster-key-")  # for us alone
    try:
        os.write(fd, f"{secrets.token_hex(_SECRET_BYTES)}\n".encode())
        os.fsync(fd)
        path.hardlink_to(temporary)
    except FileExistsError:
        pass
    finally:
        os.close(fd)
        Path(temporary).unlink()
