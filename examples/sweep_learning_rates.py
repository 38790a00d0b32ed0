"""Tries many learning rates in one program, then more rates around the best one.

To list the options, run `python examples/sweep_learning_rates.py --help`.
"""

import dataclasses
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import tyro
from _digits import Batch, Digits, batch, mean_loss, read_digits
from _plot import save_figure
from jaxtyping import Array, Float
from matplotlib.figure import Figure

import eqx_ademamix


@dataclasses.dataclass(frozen=True)
class Config:
    """Finds a learning rate for a classifier of handwritten digits."""

    steps: int = 300
    """The number of steps in each run."""
    rates: int = 8
    """The number of learning rates in each sweep."""
    seeds: int = 4
    """The number of initial models. Each one is trained with every learning rate."""
    lowest: float = 3e-5
    """The lowest learning rate in the first sweep."""
    highest: float = 1e-1
    """The highest learning rate in the first sweep."""
    out: Path = Path("runs/sweep")
    """The folder for the plot."""


traces: list[None] = []  # one entry for each time JAX traces `train`


def make_optimizer(
    learning_rate: Float[Array, ""], steps: int
) -> eqx_ademamix.AdEMAMix:
    """The learning rate is an array, so JAX traces it and can batch it."""
    return eqx_ademamix.AdEMAMix(
        learning_rate,
        b3=eqx_ademamix.beta3_scheduler(0.99, 0.9, warmup=steps),
        alpha=eqx_ademamix.alpha_scheduler(5.0, warmup=steps),
    )


def train(
    optim: eqx_ademamix.AdEMAMix, model: eqx.nn.MLP, batches: Batch
) -> eqx.nn.MLP:
    """One run. The code does not depend on the other runs."""
    traces.append(None)
    step = eqx_ademamix.make_step(mean_loss, optim)
    carry, _ = jax.lax.scan(step, step.init(model), batches)
    return step.unpack(carry)[0]


@eqx.filter_jit
def sweep(
    rates: Float[Array, " rates"],
    models: eqx.nn.MLP,
    batches: Batch,
    held_out: Batch,
) -> Float[Array, "rates seeds"]:
    """The held-out loss of each model, trained with each learning rate."""
    optims = eqx.filter_vmap(make_optimizer, in_axes=(0, None))(rates, len(batches[1]))

    def loss(optim: eqx_ademamix.AdEMAMix, model: eqx.nn.MLP) -> Float[Array, ""]:
        return mean_loss(train(optim, model, batches), held_out)

    over_models = eqx.filter_vmap(loss, in_axes=(None, eqx.if_array(0)))
    return eqx.filter_vmap(over_models, in_axes=(eqx.if_array(0), None))(optims, models)


def stacked_batches(digits: Digits, steps: int) -> Batch:
    batches = [batch(digits.train, 64, 0, step) for step in range(steps)]
    images, labels = zip(*batches, strict=True)
    return jnp.stack(images), jnp.stack(labels)


def plot(path: Path, tries: list[tuple[Array, Array]]) -> None:
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    styles = (("tab:gray", "first sweep"), ("tab:red", "around its best"))
    for (rates, losses), (color, label) in zip(tries, styles, strict=True):
        axes.loglog(rates, losses, ".", color=color, markersize=4, alpha=0.5)
        means = losses.mean(axis=1)
        axes.loglog(rates, means, "o-", color=color, markersize=4, label=label)
    axes.set(xlabel="learning rate", ylabel="held-out loss (nats)")
    axes.legend(title="mean of the seeds  (dots: each)", frameon=False)
    save_figure(figure, path)


def main() -> None:
    config = tyro.cli(Config)
    digits = read_digits()
    batches = stacked_batches(digits, config.steps)
    make_model = lambda key: eqx.nn.MLP(64, 10, width_size=64, depth=2, key=key)
    keys = jax.random.split(jax.random.key(0), config.seeds)
    models = eqx.filter_vmap(make_model)(keys)

    rates = jnp.geomspace(config.lowest, config.highest, config.rates)
    tries: list[tuple[Array, Array]] = []
    for _ in range(2):
        losses = sweep(rates, models, batches, digits.held_out)
        tries.append((rates, losses))
        print("learning rate  held-out loss")
        for rate, row in zip(rates, losses, strict=True):
            print(
                f"{rate:<13.2e}  {row.mean():.4f}  ({row.min():.4f} to {row.max():.4f})"
            )
        best, factor = rates[jnp.nanargmin(losses.mean(axis=1))], rates[1] / rates[0]
        print(f"lowest at {best:.2e}\n")
        rates = jnp.geomspace(best / factor, best * factor, config.rates)
    plot(config.out / "sweep.png", tries)
    runs = 2 * config.rates * config.seeds
    print(f"{runs} runs. JAX traced the training {len(traces)} time(s).")
    print(f"Plot saved to {config.out / 'sweep.png'}")


if __name__ == "__main__":
    main()
