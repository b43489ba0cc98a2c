"""The checks that Nova makes of an image when it downloads it, made before the image can be had from us.

Where its base file is there already, Nova looks at it again only when it makes a qcow2 overlay; flat and LVM disks are
copied unseen (imagebackend.py). So what gets a `nova-…` name must have passed here: nova/virt/images.py,
do_image_deep_inspection, by the same inspector. Reads only.
"""

import io
from collections.abc import Callable
from typing import IO, Final, cast

from oslo_utils.imageutils import format_inspector

from vmthunder.errors import CorruptFile

STEP_BYTES: Final = 4096
"""As Nova does it; the inspectors count on small steps."""


def check_contents(read: Callable[[int], bytes], disk_format: str, label: str) -> None:
    """`read(n)` gives the next n bytes of an image, fewer at its end. Raises CorruptFile: Nova would refuse it."""
    wrapper = format_inspector.InspectWrapper(cast("IO[bytes]", _Reader(read)))
    try:
        while not wrapper.formats and wrapper.read(STEP_BYTES):
            pass
    finally:
        wrapper.close()
    try:
        inspector = wrapper.format
        if inspector is None:
            raise CorruptFile(f"{label} has no format that Nova knows")
        inspector.safety_check()
    except format_inspector.ImageFormatError as error:
        raise CorruptFile(f"{label} cannot be told to be {disk_format}: {error}") from None
    except format_inspector.SafetyCheckFailed as error:
        raise CorruptFile(f"{label} is not safe to use: {error}") from None
    found = str(inspector)
    if found != disk_format and (disk_format, found) != ("raw", "gpt"):
        raise CorruptFile(f"{label} says that it is {disk_format}, and is {found}")


class _Reader(io.RawIOBase):
    """What InspectWrapper takes for a file."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        super().__init__()
        self._read = read

    def read(self, size_bytes: int = -1) -> bytes:
        return self._read(size_bytes)
