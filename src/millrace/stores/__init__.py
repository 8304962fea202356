"""Adapters for the store port: where objects durably lie."""
