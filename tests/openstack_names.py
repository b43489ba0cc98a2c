"""How Nova names a Glance image in `_base`."""

import hashlib


def base_name(image: str) -> str:
    return hashlib.sha1(image.encode()).hexdigest()
