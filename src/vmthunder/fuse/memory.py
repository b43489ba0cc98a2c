"""Memory of a worker that may be killed in the middle of a reply.

The kernel copies a reply page by page out of our memory. When SIGKILL arrives during that copy, pages that are there
are still copied, but one that had to be faulted in first ends the request with EIO: a guest would see the death of our
process (fs/fuse/dev.c, fuse_copy_fill: get_user_pages takes its fast path only for present, ordinary pages). So
replies are made of memory that was written and is locked: never of a mapped file, never of the shared page of zeros
that untouched memory reads as.
"""

from vmthunder.fuse import libc

ZEROS = memoryview(b"\0" * (1024 * 1024))
"""One MiB of zeros in written pages (bytes.__mul__ fills with memset; `bytes(n)` would leave them untouched)."""


def prepare_worker_memory() -> None:
    """Lock what is and will be in use, from its first touch on. Call once, before the first reply. Raises OSError.

    MCL_ONFAULT, because locking untouched memory would bring every thread's whole stack in. No huge pages, because
    the daemon that forms them takes pages away for a moment.
    """
    libc.disable_huge_pages()
    libc.mlockall(libc.MCL_CURRENT | libc.MCL_FUTURE | libc.MCL_ONFAULT)
