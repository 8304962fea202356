"""Loaders of training data, measured: batches a second, first batches, resuming, memory. See bench/README.md."""
