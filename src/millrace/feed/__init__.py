"""feed: from a manifest and a seed to batches, in an order that is computed and never remembered."""
