"""Batches as JAX arrays. The only module that imports ``jax``."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from millrace.feed.columns import Ragged

__all__ = ["as_jax"]


def as_jax(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with its arrays on JAX's default device. Times become whole numbers; text and objects stay lists."""
    return {name: _array(value) for name, value in batch.items()}


def _array(value: Any) -> Any:
    if isinstance(value, Ragged):
        return Ragged(_array(value.values), _array(value.offsets))
    if isinstance(value, np.ndarray):
        return jnp.asarray(value.view(np.int64) if value.dtype.kind == "M" else value)
    return value
