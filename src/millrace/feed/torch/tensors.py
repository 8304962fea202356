"""Batches as torch tensors, without copying what was gathered."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from millrace.feed.columns import Ragged

__all__ = ["as_torch", "distributed_rank"]


def as_torch(*, pin_memory: bool = False) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What makes a batch one of tensors: they share the memory of the arrays, which nothing else uses.

    Times become whole numbers; text and objects stay lists.

    Args:
        pin_memory: Copy into page-locked memory where there is a device that gains by it.
    """
    pin = pin_memory and torch.cuda.is_available()
    from_numpy = torch.from_numpy

    def tensor(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            if value.dtype.kind == "M":
                value = value.view(np.int64)
            made = from_numpy(value)
            return made.pin_memory() if pin else made
        if isinstance(value, Ragged):
            return Ragged(tensor(value.values), tensor(value.offsets))
        return value

    def finish(batch: dict[str, Any]) -> dict[str, Any]:
        return {name: tensor(value) for name, value in batch.items()}

    return finish


def distributed_rank() -> tuple[int, int] | None:
    """Rank and world size of ``torch.distributed``; None if it isn't set up in this process."""
    if "torch.distributed" not in sys.modules or not torch.distributed.is_available():
        return None
    if not torch.distributed.is_initialized():
        return None
    return torch.distributed.get_rank(), torch.distributed.get_world_size()
