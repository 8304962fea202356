"""Air-traffic control for ML training data. ``import millrace`` is cheap: what it offers is loaded when it is used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from millrace.client.checkpoints import checkpoints as checkpoints
    from millrace.client.dataset import Dataset as Dataset
    from millrace.client.dataset import open_dataset as open
    from millrace.client.mix import mix as mix
    from millrace.core.errors import MillraceError as MillraceError
    from millrace.feed.columns import Ragged as Ragged
    from millrace.feed.loader import Loader as Loader
    from millrace.feed.receipt import Receipt as Receipt
    from millrace.feed.receipt import merge_receipts as merge_receipts

_WHERE: Final = {
    "Dataset": ("millrace.client.dataset", "Dataset"),
    "Loader": ("millrace.feed.loader", "Loader"),
    "MillraceError": ("millrace.core.errors", "MillraceError"),
    "Ragged": ("millrace.feed.columns", "Ragged"),
    "Receipt": ("millrace.feed.receipt", "Receipt"),
    "checkpoints": ("millrace.client.checkpoints", "checkpoints"),
    "merge_receipts": ("millrace.feed.receipt", "merge_receipts"),
    "mix": ("millrace.client.mix", "mix"),
    "open": ("millrace.client.dataset", "open_dataset"),
}

__all__ = [
    "Dataset",
    "Loader",
    "MillraceError",
    "Ragged",
    "Receipt",
    "checkpoints",
    "merge_receipts",
    "mix",
    "open",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'millrace' has no attribute {name!r}")
    module, attribute = _WHERE[name]
    found = getattr(importlib.import_module(module), attribute)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
