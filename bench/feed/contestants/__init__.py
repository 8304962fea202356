"""One module a loader, run in processes of its own: ``python -m bench.feed.contestants.NAME STEP ...``."""
