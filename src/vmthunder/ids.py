"""Names of things: digests and image names. Pure; imports nothing of ours but `errors`."""

import re
from typing import NewType, TypeAlias

from blake3 import blake3

from vmthunder.errors import InvalidName

Buffer: TypeAlias = bytes | bytearray | memoryview

ChunkId = NewType("ChunkId", bytes)
"""BLAKE3-256 of a chunk's encoded bytes: what is stored, sent and cached is what is named."""
ImageId = NewType("ImageId", bytes)
"""BLAKE3-256 of an image's manifest."""
PackId = NewType("PackId", bytes)
"""BLAKE3-256 of a pack's footer, which names every chunk in it."""
NodeId = NewType("NodeId", bytes)
"""16 random bytes that a node made once and keeps."""
ImageName = NewType("ImageName", str)
"""A checked name of an image: see `image_name`."""

DIGEST_BYTES = 32
NODE_ID_BYTES = 16
MAX_NAME_CHARS = 200

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*", re.ASCII)
_HEX_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)


def digest(data: Buffer) -> bytes:
    """BLAKE3-256 of `data` (32 bytes). Releases the GIL for inputs of a few KiB and more."""
    return blake3(data).digest()


def is_hex_digest(text: str) -> bool:
    """Whether `text` is 64 lower-case hexadecimal digits."""
    return _HEX_DIGEST.fullmatch(text) is not None


def image_name(text: str) -> ImageName:
    """Check a name that came from outside.

    A name becomes an object's key and a file's name, so it holds nothing that either could take for more than a name;
    64 hexadecimal digits are left to image ids, which appear in the same directory.

    Raises:
        InvalidName: with what is allowed.
    """
    if len(text) > MAX_NAME_CHARS:
        raise InvalidName(f"image name {text[:32]!r}… is {len(text)} characters long; {MAX_NAME_CHARS} is the most")
    if not _NAME.fullmatch(text) or ".." in text:
        raise InvalidName(
            f"{text!r} is no image name; use ASCII letters, digits, '-', '_', single '.', the first a letter or digit"
        )
    if is_hex_digest(text.lower()):
        raise InvalidName(f"{text!r} is not an image name; 64 hexadecimal digits are reserved for image ids")
    return ImageName(text)


def image_id(text: str) -> ImageId:
    """An image id from its 64 hexadecimal digits. Raises InvalidName."""
    if not is_hex_digest(text):
        raise InvalidName(f"{text[:80]!r} is not an image id; it is 64 lower-case hexadecimal digits")
    return ImageId(bytes.fromhex(text))
