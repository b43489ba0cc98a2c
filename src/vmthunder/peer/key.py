"""The cluster key: what all nodes of a cluster know, and nobody else. [pure]"""

from typing import Final

from blake3 import blake3

from vmthunder.ids import Buffer

KEY_BYTES: Final = 32
_CONTEXT: Final = "vmthunder 2026-11 peer handshake: cluster key"


def cluster_key(secret: Buffer) -> bytes:
    """The key of the peers' handshake, from the content of the cluster's key file."""
    return blake3(secret, derive_key_context=_CONTEXT).digest()
