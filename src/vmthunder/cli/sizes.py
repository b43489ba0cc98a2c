"""Sizes and rates on the command line.

Sizes are `64KiB`, `10GiB`, `1.5G`, `4096`; suffixes are powers of 1024. Rates are those of links: `200mbit`, `1gbit`.
"""

import re

import click

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE | re.ASCII)
_RATE = re.compile(r"0|(\d+(?:\.\d+)?)(kbit|mbit|gbit)", re.IGNORECASE | re.ASCII)
_BITS = {"kbit": 10**3, "mbit": 10**6, "gbit": 10**9}
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


class BytesPerSecond(click.ParamType[int]):
    """A rate in bits per second, as bytes per second; 0 is none."""

    name = "rate"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = _RATE.fullmatch(str(value).strip())
        if match is None:
            self.fail(f"{value!r} is not a rate; write 200mbit, 1gbit or 0", param, ctx)
        number, suffix = match.groups()
        return int(float(number) * _BITS[suffix.lower()] / 8) if suffix else 0


BYTES = Bytes()
BYTES_PER_SECOND = BytesPerSecond()
"""The same for rates."""
