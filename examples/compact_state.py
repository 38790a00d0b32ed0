"""Trains the language model with four bytes of state per parameter and with bfloat16
parameters. Compares the result with a run that uses float32 for everything.

The four bytes are for arrays with at least 4096 entries (`min_size`). Smaller ones,
such as biases and norms, keep twelve: they add little, and their moments stay exact.

To list the options, run `python examples/compact_state.py --help`.
"""

import dataclasses
from pathlib import Path
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import optax
import tyro
from _config import Config as ModelConfig
from _plot import Curve, plot_losses
from _text import Text, Windows, read_text, training_batch, validation_batches
from _transformer import Transformer
from jaxtyping import Array, Float, PyTree
from tqdm import trange
from train_language_model import Run, clip, mean_loss, validation_loss

import eqx_ademamix
from eqx_ademamix import AdEMAMix, Compensated, StateFormat


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains a byte-level transformer in float32 and in compact formats."""

    steps: int = 2000
    """The number of steps in each run."""
    seed: int = 0
    """The seed for the initial weights and the batches."""
    out: Path = Path("runs/compact")
    """The folder for the plot."""


def cast(model: PyTree, dtype: Any) -> PyTree:
    """Returns the model with its parameters cast to another dtype."""
    arrays, rest = eqx.partition(model, eqx.is_inexact_array)
    return eqx.combine(eqx_ademamix.tree_cast(arrays, dtype), rest)


def make_small(optim: AdEMAMix, model: Transformer) -> tuple[Compensated, Transformer]:
    """Two bytes per parameter, two for its rounding error, and four for its moments
    (twelve in arrays with fewer than 4096 entries)."""
    compact = dataclasses.replace(optim, state_format=StateFormat.compact())
    return Compensated(compact, bits=16), cast(model, jnp.bfloat16)


@eqx.filter_jit(donate="all-except-first")
def train_step(
    kept: tuple[PyTree, Windows], model: Transformer, state: PyTree
) -> tuple[Transformer, PyTree, Float[Array, ""]]:
    """One step. All arithmetic is in float32, whatever the dtype of the parameters."""
    optim, windows = kept
    loss_fn = lambda model: mean_loss(cast(model, jnp.float32), windows)
    loss, grads = eqx.filter_value_and_grad(loss_fn)(model)
    grads = cast(grads, jnp.float32)
    grads, _ = eqx_ademamix.update(clip, grads, optax.EmptyState())
    updates, state = eqx_ademamix.update(optim, grads, state, model)
    return eqx.apply_updates(model, updates), state, loss


def train(
    label: str, optim: PyTree, model: Transformer, text: Text, config: ModelConfig
) -> tuple[Curve, Transformer, PyTree]:
    """Trains a model. Returns the losses, the final model, and the final state."""
    state = eqx_ademamix.init(optim, model)
    held_out = validation_batches(text.validation, config.context)
    train_losses, validation_losses = [], []
    for step in trange(1, config.steps + 1, desc=label, mininterval=5):
        windows = training_batch(
            text.train, config.batch_size, config.context, config.seed, step
        )
        model, state, loss = train_step((optim, windows), model, state)
        train_losses.append(loss)
        if step % max(1, config.steps // 8) == 0:
            loss = validation_loss(cast(model, jnp.float32), held_out)
            validation_losses.append((step, float(loss)))
    losses = [float(loss) for loss in train_losses]
    return Curve(label, losses, validation_losses), model, state


def main() -> None:
    config = tyro.cli(Config)
    settings = ModelConfig(steps=config.steps, seed=config.seed)
    text = read_text(None, settings.context)
    run = Run(settings, text)  # provides the model and the optimizer
    assert isinstance(run.optim, AdEMAMix)
    small = make_small(run.optim, run.model)
    runs = {"float32": (run.optim, run.model), "small": small}
    results = {
        label: train(label, *pair, text, settings) for label, pair in runs.items()
    }
    print(eqx_ademamix.state_report(results["small"][2]), "\n")
    print("         bytes of model and state  validation loss (nats per byte)")
    for label, (curve, *trees) in results.items():
        size = eqx_ademamix.state_bytes(trees)
        print(f"{label:<7}  {size:>24,}  {curve.validation[-1][1]:.4f}")
    plot = config.out / "compact_state.png"
    plot_losses(plot, [curve for curve, *_ in results.values()])
    print(f"Loss plot saved to {plot}")


if __name__ == "__main__":
    main()
