"""Where images are published: refs, manifests and packs in an object store (a directory, S3, or HTTP for reading)."""
