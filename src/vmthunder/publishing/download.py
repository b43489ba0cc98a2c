"""An http(s) URL into a nameless local file. Owns that file; nothing of it is left however we end. One thread.

QEMU could read a URL itself, but its curl driver (7.2) hangs for ever under a FUSE export, and would come back for
every extent. A download may be anybody's work: `formats.refuse_references` keeps it from naming files of this machine.
"""

import contextlib
import errno
import os
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.client import HTTPException
from typing import Final, TypeAlias

from vmthunder import __version__
from vmthunder.errors import Failure, NoSpace, NotFound, NotPermitted, VMThunderError

Watch: TypeAlias = Callable[[int, int | None], None]
"""Called with bytes done and bytes in all; None where the server does not say."""

Fetch: TypeAlias = Callable[[str, int, Watch | None], None]
"""Writes what a label names to a descriptor."""

TIMEOUT_S: Final = 60.0
"""Without a byte from the server."""
STEP_BYTES: Final = 1 << 20
_HOLE_BYTES: Final = 64 << 10
_ZEROS: Final = bytes(_HOLE_BYTES)


@contextlib.contextmanager
def downloaded(url: str, watch: Watch | None = None, fetch: Fetch | None = None) -> Iterator[int]:
    """A descriptor of the downloaded file, until the end of the `with`.

    `fetch` brings it instead of HTTP. The file lies in $TMPDIR or /var/tmp; zeros become holes.

    Raises:
        NotFound, NotPermitted, Failure: the server says so, or breaks off.
        NoSpace: the temporary directory is full.
    """
    directory = os.environ.get("TMPDIR", "/var/tmp")  # /tmp is often in memory
    try:
        # O_TMPFILE: no name, so nothing to clean up.
        file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115 - entered below, where errors differ
    except OSError as error:
        raise NotPermitted(f"{url} needs a temporary file in {directory}: {error.strerror}; set TMPDIR") from None
    with file:
        try:
            (fetch or _fetch)(url, file.fileno(), watch)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NoSpace(
                    f"{directory} is too small for the download of {url}; set TMPDIR to a larger one"
                ) from None
            raise _explain(url, error) from None
        except (HTTPException, ValueError) as error:  # ValueError: what urllib says of a malformed URL
            raise Failure(f"{url} cannot be downloaded: {error or type(error).__name__}") from None
        yield file.fileno()


def _fetch(url: str, fd: int, watch: Watch | None) -> None:
    request = urllib.request.Request(
        url, headers={"User-Agent": f"vmthunder/{__version__}", "Accept-Encoding": "identity"}
    )
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
        length = response.headers.get("Content-Length")
        total = int(length) if length is not None else None
        buffer = memoryview(bytearray(STEP_BYTES))
        done = 0
        while count := response.readinto(buffer):
            write_sparsely(fd, buffer[:count], done)
            done += count
            if watch is not None:
                watch(done, total)
        if total is not None and done != total:
            raise Failure(f"{url} broke off after {done} of {total} bytes; try again")
        os.ftruncate(fd, done)  # the last bytes may be a hole


def write_sparsely(fd: int, data: memoryview, offset: int) -> None:
    """Write what is not zero; the rest stays a hole. Raises OSError."""
    for at in range(0, len(data), _HOLE_BYTES):
        part = data[at : at + _HOLE_BYTES]
        if not _ZEROS.startswith(part):
            _write(fd, part, offset + at)


def _write(fd: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(fd, data, offset)
        data, offset = data[count:], offset + count


def _explain(url: str, error: OSError) -> VMThunderError:
    if isinstance(error, urllib.error.HTTPError):
        what = f"{url}: the server answers {error.code} {error.reason}"
        if error.code in (404, 410):
            return NotFound(what)
        return NotPermitted(what) if error.code in (401, 403) else Failure(what)
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    return Failure(f"{url} cannot be downloaded: {getattr(reason, 'strerror', None) or reason}")
