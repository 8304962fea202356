"""torch: the one adapter of the feed that imports it."""

from __future__ import annotations

from millrace.feed.torch.dataset import FeedDataset
from millrace.feed.torch.gathering import gather_receipts
from millrace.feed.torch.loading import FeedDataLoader

__all__ = ["FeedDataLoader", "FeedDataset", "gather_receipts"]
