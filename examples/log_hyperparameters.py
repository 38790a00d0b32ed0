"""Logs the hyperparameters that each step used, and the telemetry after it.

Each step averages the gradients of several batches.

To list the options, run `python examples/log_hyperparameters.py --help`.
"""

import csv
import dataclasses
from pathlib import Path
from typing import TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import tyro
from _digits import Batch, batch, mean_loss, read_digits
from _plot import save_figure
from jaxtyping import Array, Float
from matplotlib.figure import Figure

import eqx_ademamix


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains a classifier of handwritten digits and writes one log row per step."""

    steps: int = 2000
    """The number of steps. Every schedule spans all of them."""
    accumulate: int = 4
    """The number of batches whose gradients are averaged before each step."""
    b3: float = 0.999
    """The final decay rate of the slow average."""
    alpha: float = 5.0
    """The final weight of the slow average."""
    seed: int = 0
    """The seed for the initial weights and the batches."""
    out: Path = Path("runs/log")
    """The folder for the log and the plot."""


Row: TypeAlias = dict[str, Float[Array, ""]]


def accumulated(optim: eqx_ademamix.AdEMAMix, batches: int) -> optax.MultiSteps:
    """Averages the gradients of several batches before each step."""
    return optax.MultiSteps(optim, batches)  # pyright: ignore[reportArgumentType]


@eqx.filter_jit
def train_batch(
    optim: eqx_ademamix.AdEMAMix,
    accumulate: int,
    data: Batch,
    model: eqx.nn.MLP,
    state: optax.MultiStepsState,
) -> tuple[eqx.nn.MLP, optax.MultiStepsState, Row]:
    """Adds the gradients of a batch. Every `accumulate` batches, updates the model."""
    loss, grads = eqx.filter_value_and_grad(mean_loss)(model, data)
    used = eqx_ademamix.hyperparams(optim, state)  # before the counters advance
    updates, state = eqx_ademamix.update(
        accumulated(optim, accumulate), grads, state, model
    )
    telemetry = eqx_ademamix.telemetry(optim, state, updates=updates, params=model)
    row = {"loss": loss, **telemetry, **vars(used)}
    return eqx.apply_updates(model, updates), state, row


def train_step(
    optim: eqx_ademamix.AdEMAMix,
    batches: list[Batch],
    model: eqx.nn.MLP,
    state: optax.MultiStepsState,
) -> tuple[eqx.nn.MLP, optax.MultiStepsState, Row]:
    """Returns the numbers after the last batch, which updates the model, and the mean
    loss."""
    losses: list[Array] = []
    row: Row = {}
    for data in batches:
        model, state, row = train_batch(optim, len(batches), data, model, state)
        losses.append(row["loss"])
    return model, state, {**row, "loss": jnp.stack(losses).mean()}


def train(config: Config) -> list[dict[str, float]]:
    """Trains the classifier. Returns one log row per step."""
    model = eqx.nn.MLP(64, 10, width_size=64, depth=2, key=jax.random.key(config.seed))
    optim = eqx_ademamix.AdEMAMix(
        optax.warmup_cosine_decay_schedule(
            0.0, 1e-3, config.steps // 10, config.steps, end_value=1e-5
        ),
        b3=eqx_ademamix.beta3_scheduler(config.b3, 0.9, warmup=config.steps),
        alpha=eqx_ademamix.alpha_scheduler(config.alpha, warmup=config.steps),
        weight_decay=0.1,
        weight_decay_mask=eqx_ademamix.decay_mask(model),
    )
    state = eqx_ademamix.init(accumulated(optim, config.accumulate), model)
    digits = read_digits()
    rows: list[Row] = []  # arrays, so that the loop does not wait for each step
    for step in range(config.steps):
        numbers = range(step * config.accumulate, (step + 1) * config.accumulate)
        batches = [batch(digits.train, 16, config.seed, i) for i in numbers]
        model, state, row = train_step(optim, batches, model, state)
        rows.append(row)
    return [
        {"step": step, **{name: float(x) for name, x in row.items()}}
        for step, row in enumerate(rows)
    ]


def write(path: Path, rows: list[dict[str, float]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def plot(path: Path, rows: list[dict[str, float]]) -> None:
    figure = Figure(figsize=(7.2, 5.2), layout="constrained")
    panels = {
        "learning_rate": "learning rate",
        "b3": "$1 - b_3$",
        "alpha": "alpha",
        "update_param_ratio": "RMS of updates / RMS of parameters",
    }
    for axes, (name, label) in zip(
        figure.subplots(2, 2, sharex=True).flat, panels.items(), strict=True
    ):
        values = [1 - row[name] if name == "b3" else row[name] for row in rows]
        axes.plot([row["step"] for row in rows], values, color="tab:red", linewidth=1)
        axes.set_title(label, fontsize="medium")
        axes.set_yscale("log" if name == "b3" else "linear")
    for axes in figure.axes[2:]:
        axes.set_xlabel("step")
    save_figure(figure, path)


def main() -> None:
    config = tyro.cli(Config)
    rows = train(config)
    names = ("step", "loss", "learning_rate", "b3", "alpha", "slow_fast_ratio")
    print("  ".join(f"{name:>10}" for name in names))
    for row in [*rows[:: max(1, config.steps // 8)], rows[-1]]:
        cells = (f"{row[name]:>{max(10, len(name))}.5g}" for name in names)
        print("  ".join(cells))
    write(config.out / "log.csv", rows)
    plot(config.out / "log.png", rows)
    print(f"\n{len(rows)} rows saved to {config.out / 'log.csv'}, plot to log.png")


if __name__ == "__main__":
    main()
