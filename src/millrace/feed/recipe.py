"""All that makes a loader what it is, resolved: what a user's options become."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from millrace.feed.blocks import BlockSource
from millrace.feed.columns import Column
from millrace.feed.order import Order
from millrace.feed.share import Sharing

__all__ = ["Recipe"]


@dataclass(frozen=True)
class Recipe:
    """All that makes a loader what it is, resolved.

    Attributes:
        sources: The streams.
        labels: What people call them: ``name@3``.
        schema: Of all of them.
        columns: What batches have.
        decode: Column name to what makes a value of a row's.
        order: From an epoch to its order.
        identity: What decides the order, safe for JSON; see ``state.encode_state``.
        sharing: Which rows are this rank's.
        finish: From a dict of NumPy arrays, ``Ragged`` and lists to what the user gets; None gives Arrow batches.
        in_place: Whether batches that lie together in one block are given as views of it.
        window_rows: About how many consecutive rows of this rank need one set of blocks; bounds spans.
        memory_bytes: For blocks in memory.
        ahead_bytes: For blocks on their way into the cache, or waiting there to be loaded for the first time.
        quarantine: Share of an epoch's rows that may be set aside.
    """

    sources: tuple[BlockSource, ...]
    labels: tuple[str, ...]
    schema: pa.Schema
    columns: tuple[Column, ...]
    decode: Mapping[str, Callable[[Any], Any]]
    order: Callable[[int], Order]
    identity: Mapping[str, Any]
    sharing: Sharing
    finish: Callable[[dict[str, Any]], Any] | None
    in_place: bool
    window_rows: int
    memory_bytes: int
    ahead_bytes: int
    quarantine: float
