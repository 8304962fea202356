"""Adapters for the store port: where objects durably lie.

:func:`millrace.stores.open.open` gives one for a URL.
"""
