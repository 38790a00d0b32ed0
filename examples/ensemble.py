"""Trains an ensemble of networks simultaneously and shows where they disagree.

To list the options, run `python examples/ensemble.py --help`.
"""

import dataclasses
from pathlib import Path
from typing import TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from _plot import save_figure
from jaxtyping import Array, Float, PRNGKeyArray
from matplotlib.figure import Figure

import eqx_ademamix


@dataclasses.dataclass(frozen=True)
class Config:
    """Fits a function to noisy measurements from two intervals."""

    steps: int = 3000
    """The number of steps."""
    members: int = 16
    """The number of networks. Each one trains on its own resample of the points."""
    seed: int = 0
    """The seed for the initial weights and for the points that each member sees."""
    out: Path = Path("runs/ensemble")
    """The folder for the plot."""


Points: TypeAlias = tuple[Float[Array, " points"], Float[Array, " points"]]
NOISE = 0.1


def truth(x: Float[Array, " points"]) -> Float[Array, " points"]:
    return jnp.sin(2 * x)


def measured() -> Points:
    """Noisy values at 100 points x with 0.7 <= |x| <= 2.5."""
    rng = np.random.default_rng(0)
    x = rng.uniform(0.7, 2.5, 100) * np.repeat((-1, 1), 50)
    noise = NOISE * rng.standard_normal(100)
    x = jnp.asarray(x, jnp.float32)
    return x, truth(x) + jnp.asarray(noise, jnp.float32)


def make_model(key: PRNGKeyArray) -> eqx.nn.MLP:
    return eqx.nn.MLP("scalar", "scalar", 64, 2, activation=jnp.tanh, key=key)


def mean_loss(model: eqx.nn.MLP, points: Points) -> Float[Array, ""]:
    x, y = points
    return jnp.mean((jax.vmap(model)(x) - y) ** 2)


def train_step(
    optim: eqx_ademamix.AdEMAMix,
    points: Points,
    model: eqx.nn.MLP,
    state: eqx_ademamix.AdEMAMixState,
) -> tuple[eqx.nn.MLP, eqx_ademamix.AdEMAMixState]:
    """One step of one member. The code does not depend on the other members."""
    grads = eqx.filter_grad(mean_loss)(model, points)
    updates, state = eqx_ademamix.update(optim, grads, state, model)
    return eqx.apply_updates(model, updates), state


@eqx.filter_jit(donate="all-except-first")
def train_steps(
    kept: tuple[eqx_ademamix.AdEMAMix, Points],
    models: eqx.nn.MLP,
    states: eqx_ademamix.AdEMAMixState,
) -> tuple[eqx.nn.MLP, eqx_ademamix.AdEMAMixState]:
    """One step of all members. They share an optimizer, but each has its own state."""
    over_members = eqx.filter_vmap(
        train_step, in_axes=(None, eqx.if_array(0), eqx.if_array(0), eqx.if_array(0))
    )
    return over_members(*kept, models, states)


@eqx.filter_jit
def predict(
    models: eqx.nn.MLP, x: Float[Array, " points"]
) -> Float[Array, "members points"]:
    over_members = eqx.filter_vmap(
        lambda model, x: jax.vmap(model)(x), in_axes=(eqx.if_array(0), None)
    )
    return over_members(models, x)


def plot(path: Path, points: Points, models: eqx.nn.MLP) -> None:
    x = jnp.linspace(-4, 4, 401)
    predictions = predict(models, x)
    mean, spread = predictions.mean(axis=0), predictions.std(axis=0)
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.plot(x, predictions.T, color="tab:red", alpha=0.25, linewidth=0.8)
    axes.fill_between(x, mean - 2 * spread, mean + 2 * spread, color="mistyrose")
    axes.plot(x, mean, color="tab:red", label="ensemble: mean, two deviations, members")
    axes.plot(x, truth(x), "--", color="black", linewidth=1, label="truth")
    axes.plot(*points, ".", color="tab:gray", label="measured")
    axes.set(xlabel="x", ylabel="y", ylim=(-3.5, 3.5))
    axes.legend(frameon=False, loc="lower right")
    save_figure(figure, path)


def report(models: eqx.nn.MLP) -> None:
    print("x            error of a member  error of mean  disagreement")
    for low, high, place in (
        (0.7, 2.5, "measured"),
        (0, 0.7, "gap"),
        (2.5, 4, "beyond"),
    ):
        x = jnp.linspace(low, high, 101)
        x = jnp.concatenate([-x, x])
        predictions = predict(models, x)
        rms = lambda errors: float(jnp.sqrt(jnp.mean(errors**2)))
        member = rms(predictions - truth(x)[None])
        mean = rms(predictions.mean(axis=0) - truth(x))
        spread = rms(predictions.std(axis=0))
        print(f"{place:<11}  {member:<17.3f}  {mean:<13.3f}  {spread:.3f}")


def main() -> None:
    config = tyro.cli(Config)
    model_key, data_key = jax.random.split(jax.random.key(config.seed))
    make_models = eqx.filter_vmap(make_model)
    models = make_models(jax.random.split(model_key, config.members))
    optim = eqx_ademamix.AdEMAMix(
        1e-3,
        b3=eqx_ademamix.beta3_scheduler(0.999, 0.9, warmup=config.steps),
        alpha=eqx_ademamix.alpha_scheduler(5.0, warmup=config.steps),
    )
    states = eqx.filter_vmap(optim.init)(models)

    x, y = measured()
    rows = jax.random.randint(data_key, (config.members, len(x)), 0, len(x))
    for _ in range(config.steps):
        models, states = train_steps((optim, (x[rows], y[rows])), models, states)

    report(models)
    plot(config.out / "ensemble.png", (x, y), models)
    print(f"\nPlot saved to {config.out / 'ensemble.png'}")


if __name__ == "__main__":
    main()
