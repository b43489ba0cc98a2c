"""The disk that the storms of tests/bench boot from, and what their boot reads of it."""

IMAGE_BYTES = 4 << 20
CHUNK_BYTES = 64 << 10
READ_BYTES = 4096
OFFSETS = range(0, IMAGE_BYTES, 2 * CHUNK_BYTES)
