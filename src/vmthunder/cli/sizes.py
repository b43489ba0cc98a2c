"""Sizes on the command line: `64KiB`, `10GiB`, `1.5G`, `4096`; suffixes are powers of 1024."""

import re

import click

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE | re.ASCII)
_SHIFT = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


class Bytes(click.ParamType[int]):
    """A number of bytes with an optional suffix."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = _SIZE.fullmatch(str(value).strip())
        if match is None:
            self.fail(f"{value!r} is not a size; write 65536, 64KiB or 10GiB", param, ctx)
        number, suffix = match.groups()
        return int(float(number) * (1 << _SHIFT[suffix.upper()]))


BYTES = Bytes()
