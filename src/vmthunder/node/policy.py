"""Which images a node keeps ahead of time: a file that an operator writes. [pure]

[[image]]
name = "debian-12"
what = "boot-set"     # what its boots read (default), or "full"
"""

import tomllib
from enum import StrEnum
from typing import NamedTuple

from vmthunder.errors import InvalidName, Usage
from vmthunder.ids import ImageName, image_name


class Part(StrEnum):
    """How much of an image."""

    BOOT_SET = "boot-set"
    """What its boots read."""
    FULL = "full"


class Wanted(NamedTuple):
    """An image that is to be kept."""

    name: ImageName
    part: Part


def parse_policy(text: str) -> tuple[Wanted, ...]:
    """Raises Usage: what is wrong, and where."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise Usage(f"the policy is no TOML: {error}") from None
    images = table.pop("image", [])
    if table or not isinstance(images, list):
        raise Usage(f"a policy is a list of [[image]]; {next(iter(table), 'image')!r} is none")
    return tuple(_wanted(entry, number) for number, entry in enumerate(images, 1))


def _wanted(entry: object, number: int) -> Wanted:
    if not isinstance(entry, dict) or not entry.keys() <= {"name", "what"}:
        raise Usage(f"image {number} of the policy: only name and what are known")
    try:
        return Wanted(image_name(str(entry["name"])), Part(entry.get("what", Part.BOOT_SET)))
    except KeyError:
        raise Usage(f"image {number} of the policy has no name") from None
    except ValueError:
        raise Usage(f"image {number} of the policy: what is {' or '.join(Part)}, not {entry['what']!r}") from None
    except InvalidName as error:
        raise Usage(f"image {number} of the policy: {error}") from None
