"""One module a contestant, run in a process of its own: ``python -m bench.contestants.NAME run|tally ...``."""
