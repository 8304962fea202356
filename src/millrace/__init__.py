"""Millrace: air-traffic control for ML training data."""
