"""The node: runs granted tasks in worker threads or processes."""
