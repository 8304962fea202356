"""JAX: batches as arrays on JAX's default device, one process.

python train.py
"""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp

import millrace

STATE = Path("state.json")


@jax.jit
def step(weights: jax.Array, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One step of gradient descent on a linear model, and the loss before it."""

    def loss(w: jax.Array) -> jax.Array:
        return jnp.mean((x @ w[:3] + w[3] - y) ** 2)

    value, slope = jax.value_and_grad(loss)(weights)
    return weights - 0.05 * slope, value


def main() -> None:
    """Train two epochs; stop after the 20th step as if killed, and go on from the state."""
    jax.config.update("jax_enable_x64", True)
    ds = millrace.open("flour", cache="./cache")
    # Shapes that never change are compiled once: so the last batch of an epoch, which isn't full, is left out.
    options = {"batch_size": 32, "seed": 17, "drop_last": True, "format": "jax"}

    loader = ds.loader(**options)
    weights = jnp.zeros(4)
    done = 0
    while loader.epoch < 2:
        for batch in loader:
            weights, loss = step(weights, batch["x"], batch["y"])
            done += 1
            print(json.dumps({"step": done, "loss": float(loss)}))
            if done == 20:
                STATE.write_text(json.dumps({"loader": loader.state_dict(), "weights": weights.tolist()}))
                loader.close()
                loader = ds.loader(**options)
                saved = json.loads(STATE.read_text())
                loader.load_state_dict(saved["loader"])
                weights = jnp.array(saved["weights"])
                break
        else:
            print(f"epoch {loader.receipt().epoch}: each row once: {loader.receipt().whole}")


if __name__ == "__main__":
    main()
