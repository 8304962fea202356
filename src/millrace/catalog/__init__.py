"""Datasets, their versions, and what keeps their replicas true."""
