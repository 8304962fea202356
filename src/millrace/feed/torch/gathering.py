"""One receipt of all ranks, through ``torch.distributed``."""

from __future__ import annotations

import json
from typing import Any, Final, Protocol

import torch
import torch.distributed as dist

from millrace.core.errors import UsageError
from millrace.feed.receipt import Receipt, merge_receipts

__all__ = ["HasReceipt", "gather_receipts"]

_LARGEST: Final = 64_000_000
"""Bytes of one rank's receipt, as JSON: each quarantined row takes some two hundred."""


class HasReceipt(Protocol):
    """A loader."""

    def receipt(self) -> Receipt:
        """What this rank was given."""


def gather_receipts(loader: HasReceipt, group: Any = None) -> Receipt:
    """The receipts of all ranks, merged into one: the same on every rank. Every rank calls it, after the same step.

    What goes between ranks is JSON, not pickles. Without a process group it is this process's receipt alone.

    Args:
        loader: This rank's.
        group: A process group; default that of all ranks.

    Raises:
        UsageError: the receipts don't add up; says what is missing, or is there twice. Raised on every rank.
    """
    own = loader.receipt()
    if not (dist.is_available() and dist.is_initialized()):
        return merge_receipts([own])
    text = json.dumps(own.plain(), separators=(",", ":")).encode()
    return merge_receipts([Receipt.from_plain(json.loads(t)) for t in _all_gather(text, group)])


def _all_gather(data: bytes, group: Any) -> list[bytes]:
    """Every rank's bytes, by rank: first their lengths, then all of them filled up to the longest."""
    world = dist.get_world_size(group)
    if world <= 0:
        raise UsageError("this rank isn't in the process group that receipts were to be gathered in")
    device = _device(group)
    length = torch.tensor([len(data)], dtype=torch.int64, device=device)
    lengths = [torch.zeros_like(length) for _ in range(world)]
    dist.all_gather(lengths, length, group=group)
    sizes = [int(n) for n in lengths]
    if max(sizes) > _LARGEST:
        raise UsageError(
            f"the receipt of rank {sizes.index(max(sizes))} has {max(sizes)} bytes, more than {_LARGEST}; "
            "save loader.receipt().plain() on each rank and merge them with millrace.merge_receipts"
        )
    padded = torch.zeros(max(sizes), dtype=torch.uint8, device=device)
    padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded, group=group)
    return [part[:size].cpu().numpy().tobytes() for part, size in zip(parts, sizes, strict=True)]


def _device(group: Any) -> Any:
    """Where tensors must be for the group's backend."""
    if "nccl" in str(dist.get_backend(group)):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
