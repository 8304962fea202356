"""torch: the one adapter of the feed that imports it."""
