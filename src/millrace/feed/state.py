"""Where a feed stands: a few integers, the same on every rank, and what order they are positions of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from millrace.core.errors import UsageError
from millrace.core.model import block_digest

__all__ = ["FORMAT", "Place", "decode_state", "encode_state"]

FORMAT: Final = "millrace-feed/1"
_NAMES: Final = {
    "datasets": "the dataset version",
    "seed": "the seed",
    "shuffle": "the shuffle",
    "lanes": "the number of lanes",
    "window": "the shuffle window",
    "mix": "the mix of streams",
    "order": "the version of the order itself",
}


@dataclass(frozen=True, slots=True)
class Place:
    """A place in a feed.

    Attributes:
        epoch: Which epoch, from 0.
        position: How many of its rows were given out before it, over all ranks.
    """

    epoch: int
    position: int


def encode_state(identity: Mapping[str, Any], place: Place, *, batch_size: int) -> dict[str, Any]:
    """The state, safe for JSON.

    Args:
        identity: What decides the order: ``datasets``, ``seed``, ``shuffle``, ``lanes``, ``window``, ``order`` and
            ``mix``.
        place: Where.
        batch_size: For people; another one may go on from here.
    """
    state: dict[str, Any] = {
        "format": FORMAT,
        **identity,
        "epoch": place.epoch,
        "position": place.position,
        "batch_size": batch_size,
    }
    return {**state, "check": _check(state)}


def decode_state(state: Any, identity: Mapping[str, Any]) -> Place:
    """The place a state speaks of.

    Args:
        state: What :func:`encode_state` gave, perhaps through JSON.
        identity: Of the feed that is to go on.

    Raises:
        UsageError: it isn't a state, was edited, or is of another order; names the difference.
    """
    if not isinstance(state, Mapping) or "format" not in state:
        raise UsageError("this is not a loader's state: take what loader.state_dict() gave")
    if state["format"] != FORMAT:
        raise UsageError(f"the state has format {state['format']!r}; this Millrace reads {FORMAT!r}: upgrade it")
    plain = {str(k): v for k, v in state.items()}
    if plain.pop("check", None) != _check(plain):
        raise UsageError(
            "the state was edited or cut off: its check sum doesn't fit; take an untouched one, or begin at an epoch "
            "with loader.set_epoch(N)"
        )
    theirs = json.loads(json.dumps({k: plain.get(k) for k in _NAMES}))
    ours = json.loads(json.dumps({k: identity.get(k) for k in _NAMES}))
    for key, what in _NAMES.items():
        if theirs[key] != ours[key]:
            raise UsageError(
                f"the state is of another order: {what} is {_show(theirs[key])} there and {_show(ours[key])} here; "
                "open the same version with the same seed and shuffle, or begin at an epoch with loader.set_epoch(N)"
            )
    epoch, position = plain.get("epoch"), plain.get("position")
    if not (isinstance(epoch, int) and isinstance(position, int) and epoch >= 0 and position >= 0):
        raise UsageError("the state's epoch and position are not whole numbers: it is not one that Millrace wrote")
    return Place(epoch, position)


def _check(state: Mapping[str, Any]) -> str:
    return block_digest(json.dumps(state, sort_keys=True, separators=(",", ":"), default=str).encode())[:16]


def _show(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_show(v) for v in value)
    text = str(value)
    return text[:12] if len(text) == 64 else text
