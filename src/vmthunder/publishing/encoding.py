"""Slices of a source into chunks, on all cores, in the order of the image.

Owns the threads and their buffers. A thread reads a span of the source and encodes its slices, so reading, compressing
and hashing overlap; the results come out in order, and how many spans may be under way bounds the memory.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from queue import SimpleQueue
from typing import Final, NamedTuple, TypeVar

from vmthunder.image.chunk import Encoded, encode, is_zero
from vmthunder.publishing.source import Source

SPAN_BYTES: Final = 512 << 10
"""What one thread reads and encodes at a time."""
STALL_S: Final = 120.0
"""A source that does not answer for so long is given up, if it can be."""
_LISTED_SPANS: Final = 64

Result = TypeVar("Result")


class Chunk(NamedTuple):
    """An encoded slice that is not zero."""

    slice_index: int
    slice_bytes: int
    encoded: Encoded


class Span(NamedTuple):
    """A finished part of the source: all before `end` is done."""

    end: int
    chunks: list[Chunk]


async def encode_source(source: Source, chunk_bytes: int, level: int, threads: int) -> AsyncGenerator[Span, None]:
    """Encode a source.

    Raises:
        Failure: it cannot be read.
    """
    loop = asyncio.get_running_loop()
    buffers: SimpleQueue[memoryview] = SimpleQueue()
    for _ in range(threads):
        buffers.put(memoryview(bytearray(max(SPAN_BYTES, chunk_bytes))))

    def work(begin: int, end: int) -> Span:
        buffer = buffers.get()  # never waits: there are as many as threads
        try:
            slices = buffer[: end - begin]
            source.read_into(slices, begin)
            chunks = []
            for at in range(0, end - begin, chunk_bytes):
                data = slices[at : at + chunk_bytes]
                if not is_zero(data):
                    chunks.append(Chunk((begin + at) // chunk_bytes, len(data), encode(data, level)))
            return Span(end, chunks)
        finally:
            buffers.put(buffer)

    spans = _spans(source, chunk_bytes)
    listed: deque[tuple[int, int]] = deque()
    under_way: deque[asyncio.Future[Span]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="encode")
    try:
        exhausted = False
        while True:
            while not exhausted and len(under_way) < 2 * threads:
                if not listed:
                    listed.extend(await _patiently(source, asyncio.to_thread(_take, spans)))
                    exhausted = not listed
                else:
                    under_way.append(loop.run_in_executor(pool, work, *listed.popleft()))
            if not under_way:
                return
            yield await _patiently(source, under_way.popleft())
    except BaseException:
        source.abort()  # nobody reads on; a thread that a hung daemon holds must come back
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        for future in under_way:
            future.cancel()


async def _patiently(source: Source, work: Awaitable[Result]) -> Result:
    """The result of reading from `source`, even if its daemon has to be killed for it."""
    future = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait({future}, timeout=STALL_S))[0]:
            source.abort()
        return future.result()
    finally:
        future.cancel()


def _spans(source: Source, chunk_bytes: int) -> Iterator[tuple[int, int]]:
    """Begin and end of the parts of the source that may hold data; each begins with a slice."""
    span_bytes = max(SPAN_BYTES, chunk_bytes)
    for begin, end in source.extents(chunk_bytes):
        for at in range(begin, end, span_bytes):
            yield at, min(at + span_bytes, end)


def _take(spans: Iterator[tuple[int, int]]) -> list[tuple[int, int]]:
    return list(islice(spans, _LISTED_SPANS))
