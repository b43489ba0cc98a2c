"""Profiles: in which order boots first touch the chunks of an image, learned, merged, kept and shared."""
