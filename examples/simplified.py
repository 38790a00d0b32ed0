"""Trains the same networks with AdamW, AdEMAMix, and SimplifiedAdEMAMix.

To list the options, run `python examples/simplified.py --help`.
"""

import dataclasses
import functools as ft
from pathlib import Path
from typing import NamedTuple, TypeAlias

import equinox as eqx
import jax
import numpy as np
import optax
import tyro
from _digits import Batch, accuracy, mean_loss, read_digits
from _plot import save_figure, smooth
from jaxtyping import Array, Float, PyTree
from matplotlib.figure import Figure

import eqx_ademamix


@dataclasses.dataclass(frozen=True)
class Config:
    """Classifies handwritten digits with three optimizers at one learning rate."""

    steps: int = 1000
    """The number of steps for each optimizer. Every schedule spans all of them."""
    seeds: int = 5
    """The number of networks. They are trained simultaneously."""
    learning_rate: float = 1e-3
    """The peak learning rate of all three optimizers."""
    alpha: float = 10.0
    """SimplifiedAdEMAMix: the extra weight of the current gradient."""
    b1: float = 0.99
    """SimplifiedAdEMAMix: the final decay rate of the momentum."""
    out: Path = Path("runs/simplified")
    """The folder for the plot."""


Optimizer: TypeAlias = optax.GradientTransformation | eqx_ademamix.AbstractOptimizer


class Run(NamedTuple):
    """The results of one optimizer. Each array has an axis for the networks."""

    bytes_per_parameter: float
    training_losses: Float[Array, "steps seeds"]
    held_out_losses: Float[Array, " seeds"]
    accuracies: Float[Array, " seeds"]


def make_optimizers(config: Config, mask: PyTree[bool]) -> dict[str, Optimizer]:
    """All three use the same learning rates, the same b2, and the same weight decay."""
    schedule = optax.cosine_decay_schedule(config.learning_rate, config.steps)
    return {
        "AdamW": optax.adamw(schedule, b2=0.999, weight_decay=0.1, mask=lambda _: mask),
        "AdEMAMix": eqx_ademamix.AdEMAMix(
            schedule,
            b2=0.999,
            b3=eqx_ademamix.beta3_scheduler(0.99, 0.9, warmup=config.steps),
            alpha=eqx_ademamix.alpha_scheduler(5.0, warmup=config.steps),
            weight_decay=0.1,
            weight_decay_mask=mask,
        ),
        "SimplifiedAdEMAMix": eqx_ademamix.SimplifiedAdEMAMix(
            schedule,
            b1=eqx_ademamix.beta3_scheduler(
                config.b1, 0.9, warmup=config.steps, offset=1
            ),
            b2=0.999,
            alpha=config.alpha,
            weight_decay=0.1,
            weight_decay_mask=mask,
            normalize=True,  # so that AdamW's learning rate fits
        ),
    }


def train(
    optim: Optimizer, model: eqx.nn.MLP, batches: Batch
) -> tuple[eqx.nn.MLP, PyTree, Float[Array, " steps"]]:
    """Trains one network. Returns it with the state and the loss at each step."""
    step = eqx_ademamix.make_step(mean_loss, optim)
    carry, losses = jax.lax.scan(step, step.init(model), batches)
    model, state = step.unpack(carry)
    return model, state, losses


# Vectorized over the networks and their batches.
train_all = eqx.filter_jit(
    eqx.filter_vmap(train, in_axes=(None, eqx.if_array(0), eqx.if_array(0)))
)


def random_batches(data: Batch, seeds: int, steps: int) -> Batch:
    """The batches of all networks. The first two axes are the seed and the step."""
    images, labels = data
    rows = np.random.default_rng(0).integers(len(images), size=(seeds, steps, 64))
    return images[rows], labels[rows]


def run(optim: Optimizer, models: eqx.nn.MLP, batches: Batch, held_out: Batch) -> Run:
    trained, state, losses = train_all(optim, models, batches)
    over_networks = ft.partial(eqx.filter_vmap, in_axes=(eqx.if_array(0), None))
    numbers = sum(x.size for x in jax.tree.leaves(eqx.filter(models, eqx.is_array)))
    return Run(
        bytes_per_parameter=eqx_ademamix.state_bytes(state) / numbers,
        training_losses=losses.T,
        held_out_losses=over_networks(mean_loss)(trained, held_out),
        accuracies=over_networks(accuracy)(trained, held_out),
    )


def plot(path: Path, runs: dict[str, Run]) -> None:
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    colors = ("tab:gray", "tab:red", "tab:blue")
    for (name, run), color in zip(runs.items(), colors, strict=True):
        for losses in run.training_losses.T.tolist():
            axes.semilogy(*smooth(losses), color=color, linewidth=0.8, alpha=0.3)
        mean = run.training_losses.mean(axis=1).tolist()
        axes.semilogy(*smooth(mean), color=color, label=name)
    axes.set(xlabel="step", ylabel="training loss (nats)")
    axes.legend(title="mean of the networks  (thin: each)", frameon=False)
    save_figure(figure, path)


def main() -> None:
    config = tyro.cli(Config)
    digits = read_digits()
    batches = random_batches(digits.train, config.seeds, config.steps)
    make_model = lambda key: eqx.nn.MLP(64, 10, width_size=64, depth=2, key=key)
    keys = jax.random.split(jax.random.key(0), config.seeds)
    models = eqx.filter_vmap(make_model)(keys)
    mask = eqx_ademamix.decay_mask(eqx.filter(models, eqx.is_array))

    print("optimizer           bytes of state  held-out loss               accuracy")
    runs: dict[str, Run] = {}
    for name, optim in make_optimizers(config, mask).items():
        runs[name] = run(optim, models, batches, digits.held_out)
        size, _, losses, accuracies = runs[name]
        spread = f"{losses.mean():.4f}  ({losses.min():.4f} to {losses.max():.4f})"
        print(f"{name:<18}  {size:<14.2f}  {spread}  {accuracies.mean():.4f}")
    plot(config.out / "simplified.png", runs)
    print(f"\nPlot saved to {config.out / 'simplified.png'}")


if __name__ == "__main__":
    main()
