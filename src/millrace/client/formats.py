"""What batches are given as, by name: from the arrays that are gathered to what a training loop wants."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, Final, Literal, get_args

from millrace.core.errors import UsageError

__all__ = ["FORMATS", "FormatName", "finish_for"]

FormatName = Literal["torch", "numpy", "jax", "arrow"]
FORMATS: Final[tuple[FormatName, ...]] = get_args(FormatName)


def finish_for(name: FormatName | None, *, pin_memory: bool) -> Callable[[dict[str, Any]], Any] | None:
    """What makes a batch of a dict of NumPy arrays; None for Arrow record batches.

    Args:
        name: None is torch if it is installed, else numpy.
        pin_memory: For torch.

    Raises:
        UsageError: there is no such format, or its library isn't installed.
    """
    if name is None:
        name = "torch" if importlib.util.find_spec("torch") is not None else "numpy"
    if name not in FORMATS:
        raise UsageError(f"format={name!r} is none of {', '.join(FORMATS)}")
    if name in {"torch", "jax"} and importlib.util.find_spec(name) is None:
        raise UsageError(f"format={name!r} needs {name}, which isn't installed here; install it, or use format='numpy'")
    if pin_memory and name != "torch":
        raise UsageError("pin_memory is for format='torch'")
    if name == "torch":
        from millrace.feed.torch.tensors import as_torch  # only where batches are tensors is torch there to import

        return as_torch(pin_memory=pin_memory)
    if name == "jax":
        from millrace.feed.jax import as_jax

        return as_jax
    return _as_they_are if name == "numpy" else None


def _as_they_are(batch: dict[str, Any]) -> dict[str, Any]:
    return batch
