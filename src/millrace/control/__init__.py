"""The control loop: snapshot, decide, commit, send. It sees digests, sizes and receipts, never bytes."""
