"""Measuring: metrics that layers and stages report to."""
