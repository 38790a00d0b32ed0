"""Solves the heat equation with a network, in float64, with AdamW and AdEMAMix.

To list the options, run `python examples/pinn.py --help`.
"""

import dataclasses
from pathlib import Path
from typing import TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import tyro
from _plot import save_figure
from jaxtyping import Array, Float, PRNGKeyArray
from matplotlib.figure import Figure

import eqx_ademamix


@dataclasses.dataclass(frozen=True)
class Config:
    """Learns a u(x, t) with du/dt = 0.1 d2u/dx2 and with u = 0 at x = 0 and x = 1."""

    steps: int = 5000
    """The number of steps for each optimizer. Every schedule spans all of them."""
    seeds: int = 4
    """The number of networks. They are trained simultaneously."""
    learning_rate: float = 1.6e-2
    """The peak learning rate, which works well for both optimizers. Six rates from 2e-3
    to 6.4e-2 were tried, each twice the previous one. At this rate, the error of each
    optimizer is within 5 percent of its lowest."""
    alpha: float = 5.0
    """AdEMAMix: the final weight of the slow average."""
    b3: float = 0.999
    """AdEMAMix: the final decay rate of the slow average."""
    out: Path = Path("runs/pinn")
    """The folder for the plot."""

    def __post_init__(self):
        if self.steps % NUM_EVALUATIONS:
            raise ValueError(f"steps is {self.steps}, but must be a multiple of 50")


Scalar: TypeAlias = Float[Array, ""]
Errors: TypeAlias = Float[Array, "evaluations seeds"]
DIFFUSIVITY = 0.1
NUM_POINTS = 128
NUM_EVALUATIONS = 50


def exact(x: Scalar, t: Scalar) -> Scalar:
    """The exact solution: two sine waves, each with its own decay rate."""
    decay = lambda n: jnp.exp(-DIFFUSIVITY * (n * jnp.pi) ** 2 * t)
    wave = lambda n: jnp.sin(n * jnp.pi * x) * decay(n)
    return wave(1.0) + 0.5 * wave(2.0)


class Solution(eqx.Module):
    """A network that is exact by construction at t = 0, x = 0, and x = 1."""

    mlp: eqx.nn.MLP

    def __init__(self, key: PRNGKeyArray):
        self.mlp = eqx.nn.MLP(2, "scalar", 32, 3, activation=jnp.tanh, key=key)

    def __call__(self, x: Scalar, t: Scalar) -> Scalar:
        initial = exact(x, jnp.zeros_like(t))
        return initial + t * x * (1 - x) * self.mlp(jnp.stack([x, t]))


def mean_loss(model: Solution, key: PRNGKeyArray) -> Scalar:
    """The mean squared residual of the equation, at newly sampled points."""

    def residual(x: Scalar, t: Scalar) -> Scalar:
        u_t = jax.grad(model, argnums=1)(x, t)
        u_xx = jax.grad(jax.grad(model))(x, t)
        return u_t - DIFFUSIVITY * u_xx

    x, t = jax.random.uniform(key, (2, NUM_POINTS))
    return jnp.mean(jax.vmap(residual)(x, t) ** 2)


def l2_error(model: Solution) -> Scalar:
    """The L2 error on a grid, relative to the norm of the exact solution."""
    x, t = jnp.meshgrid(jnp.linspace(0, 1, 64), jnp.linspace(0, 1, 64))
    found, wanted = (jax.vmap(f)(x.ravel(), t.ravel()) for f in (model, exact))
    return jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted)


def train(
    optim: eqx_ademamix.AdEMAMix, model: Solution, steps: int
) -> Float[Array, " evaluations"]:
    """Trains one network. Returns its error after each fiftieth of the steps."""
    key = jax.random.key(1)
    loss_fn = lambda model, i: mean_loss(model, jax.random.fold_in(key, i))
    step = eqx_ademamix.make_step(loss_fn, optim)

    def fiftieth(carry: eqx_ademamix.TrainCarry, numbers: Array):
        carry, _ = jax.lax.scan(step, carry, numbers)
        return carry, l2_error(step.unpack(carry)[0])

    numbers = jnp.arange(steps).reshape(NUM_EVALUATIONS, -1)
    return jax.lax.scan(fiftieth, step.init(model), numbers)[1]


# Vectorized over the networks, so that they are trained simultaneously.
train_all = eqx.filter_jit(
    eqx.filter_vmap(train, in_axes=(None, eqx.if_array(0), None), out_axes=1)
)


def make_optimizers(config: Config) -> dict[str, eqx_ademamix.AdEMAMix]:
    """AdamW is AdEMAMix without the slow average. Neither uses weight decay here."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0,
        config.learning_rate,
        config.steps // 20,
        config.steps,
        end_value=0.01 * config.learning_rate,
    )
    return {
        "AdamW": eqx_ademamix.AdEMAMix(schedule, alpha=0.0),
        "AdEMAMix": eqx_ademamix.AdEMAMix(
            schedule,
            b3=eqx_ademamix.beta3_scheduler(config.b3, 0.9, warmup=config.steps),
            alpha=eqx_ademamix.alpha_scheduler(config.alpha, warmup=config.steps),
        ),
    }


def plot(path: Path, errors: dict[str, Errors], steps: int) -> None:
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    at = jnp.arange(1, NUM_EVALUATIONS + 1) * (steps // NUM_EVALUATIONS)
    colors = {"AdamW": "tab:gray", "AdEMAMix": "tab:red"}
    for name, curves in errors.items():
        median = jnp.median(curves, axis=1)
        axes.semilogy(at, curves, color=colors[name], linewidth=0.8, alpha=0.4)
        label = f"{name}: {median[-1]:.1e}"
        axes.semilogy(at, median, color=colors[name], label=label)
    axes.set(xlabel="step", ylabel="relative L2 error")
    axes.legend(title="median of the networks  (thin: each)", frameon=False)
    save_figure(figure, path)


def main() -> None:
    config = tyro.cli(Config)
    jax.config.update("jax_enable_x64", True)
    models = eqx.filter_vmap(Solution)(
        jax.random.split(jax.random.key(0), config.seeds)
    )
    optims = make_optimizers(config)
    errors = {name: train_all(o, models, config.steps) for name, o in optims.items()}
    print("relative L2 error of the solution")
    print("optimizer  median    best      worst")
    for name, curves in errors.items():
        row = jnp.median(curves[-1]), curves[-1].min(), curves[-1].max()
        print(f"{name:<9}", *(f"{error:.2e}" for error in row), sep="  ")
    print(f"\ncomputed in {errors['AdEMAMix'].dtype}")
    plot(config.out / "pinn.png", errors, config.steps)
    print(f"Plot saved to {config.out / 'pinn.png'}")


if __name__ == "__main__":
    main()
