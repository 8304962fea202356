"""The stages: ingest, process, pack, distribute, persist. Each has one verb and calls no other back."""
