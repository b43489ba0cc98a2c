"""What an image is as bytes: chunks, packs, manifests. Pure: no I/O, no clock, no state; see docs/formats.md."""
