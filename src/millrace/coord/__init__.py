"""Adapters for the coordination port: a small, strongly consistent store of facts."""
