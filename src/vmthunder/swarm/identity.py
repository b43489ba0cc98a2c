"""Who this node is: 16 random bytes, made once and kept in a file. Nothing depends on it but a node's seats."""

import contextlib
import logging
import os
from pathlib import Path

from vmthunder.ids import NODE_ID_BYTES, NodeId

log = logging.getLogger(__name__)


def node_id(path: Path) -> NodeId:
    """The id in a file; a new one if there is none, or none that can be read. If it cannot be kept, that is logged."""
    with contextlib.suppress(OSError, ValueError):
        known = bytes.fromhex(path.read_text("ascii"))
        if len(known) == NODE_ID_BYTES:
            return NodeId(known)
    new = os.urandom(NODE_ID_BYTES)
    temporary = path.with_name(f"~{path.name}")
    try:
        temporary.write_text(f"{new.hex()}\n")
        temporary.replace(path)
    except OSError as error:
        log.warning("event=node_id_not_kept file=%s reason=%s", path, error.strerror)
    return NodeId(new)
