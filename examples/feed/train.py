"""Learns which letter follows which, in plain NumPy. Kill it at any moment and run it again: it goes on.

Whatever the interruptions, losses and proofs are those of a run that nobody disturbed.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import millrace

EPOCHS = 6
RATE = 0.3
SAVE_EVERY = 5
LETTERS = 258  # what the tokenizer `bytes` gives, with the tokens for an end and for padding
SAVED = Path("saved.npz")

Floats = npt.NDArray[np.float64]


def learn(weights: Floats, tokens: npt.NDArray[Any]) -> float:
    """One step down the gradient, in place; gives the loss before it: nats a letter."""
    before, after = tokens[:, :-1].ravel(), tokens[:, 1:].ravel()
    scores = weights[before]
    chances = np.exp(scores - scores.max(axis=1, keepdims=True))
    chances /= chances.sum(axis=1, keepdims=True)
    each = np.arange(len(after))
    loss = -np.log(chances[each, after]).mean()
    chances[each, after] -= 1.0
    np.subtract.at(weights, before, RATE * chances)
    return float(loss)


def save(weights: Floats, losses: list[float], loader: millrace.Loader, receipts: list[millrace.Receipt]) -> None:
    """Model, place in the data, and what was given so far, in one file: all of one step, or all of the one before."""
    place = {
        "loader": loader.state_dict(),
        "receipts": [receipt.plain() for receipt in (*receipts, loader.receipt())],
        "losses": losses,
    }
    partial = SAVED.with_suffix(".partial.npz")
    np.savez(partial, weights=weights, place=json.dumps(place))
    os.replace(partial, SAVED)


def train(stop_after: int | None) -> None:
    """Train to the end, or be cut off behind a step as if by a kill."""
    weights = np.zeros((LETTERS, LETTERS))
    losses: list[float] = []  # of the epoch
    receipts: list[millrace.Receipt] = []  # of the epoch, by processes that are no more
    steps = 0
    with millrace.open("verses", cache="./cache") as ds, ds.loader(batch_size=8, seed=17, format="numpy") as loader:
        if SAVED.exists():
            saved = np.load(SAVED)
            weights, place = saved["weights"], json.loads(str(saved["place"]))
            loader.load_state_dict(place["loader"])
            if loader.position:  # in the middle of an epoch
                losses = place["losses"]
                receipts = [millrace.Receipt.from_plain(plain) for plain in place["receipts"]]
            print(f"goes on at epoch {loader.epoch}, row {loader.position}")
        while (epoch := loader.epoch) < EPOCHS:
            for batch in loader:
                losses.append(learn(weights, batch["tokens"]))
                steps += 1
                if steps == stop_after:
                    raise SystemExit(f"cut off after {steps} steps")
                if steps % SAVE_EVERY == 0:
                    save(weights, losses, loader, receipts)
            receipt = millrace.merge_receipts([*receipts, loader.receipt()])
            assert receipt.complete  # every row once, or named
            print(f"epoch {epoch}: loss {np.mean(losses):.6f}, {receipt.rows} rows, proof {receipt.proof[:12]}")
            losses, receipts = [], []
            save(weights, losses, loader, receipts)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--stop-after", type=int, metavar="STEPS", help="be cut off, without saving")
    train(arguments.parse_args().stop_after)
