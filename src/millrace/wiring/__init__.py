"""Wiring: the only reader of the environment. It builds everything once and hands it down."""
