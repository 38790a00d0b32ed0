"""Logs the hyperparameters that each step used and the size of each update.

To list the options, run `python examples/log_hyperparameters.py --help`.
"""

import csv
import dataclasses
from pathlib import Path
from typing import TypeAlias

import equinox as eqx
import jax
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
    b3: float = 0.999
    """The final decay rate of the slow average."""
    alpha: float = 5.0
    """The final weight of the slow average."""
    seed: int = 0
    """The seed for the initial weights and the batches."""
    out: Path = Path("runs/log")
    """The folder for the log and the plot."""


Row: TypeAlias = dict[str, Float[Array, ""]]


@eqx.filter_jit(donate="all-except-first")
def train_step(
    kept: tuple[eqx_ademamix.AdEMAMix, Batch],
    model: eqx.nn.MLP,
    state: eqx_ademamix.AdEMAMixState,
) -> tuple[eqx.nn.MLP, eqx_ademamix.AdEMAMixState, Row]:
    optim, data = kept
    loss, grads = eqx.filter_value_and_grad(mean_loss)(model, data)
    used = eqx_ademamix.hyperparams(optim, state)  # before the counters advance
    updates, state = eqx_ademamix.update(optim, grads, state, model)
    row = {
        "loss": loss,
        **vars(used),
        "gradient_norm": optax.global_norm(grads),
        "update_norm": optax.global_norm(updates),
    }
    return eqx.apply_updates(model, updates), state, row


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
    state = eqx_ademamix.init(optim, model)
    digits = read_digits()
    rows: list[Row] = []  # arrays, so that the loop does not wait for each step
    for step in range(config.steps):
        data = batch(digits.train, 64, config.seed, step)
        model, state, row = train_step((optim, data), model, state)
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
        "update_norm": "norm of the update",
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
    names = ("step", "loss", "learning_rate", "b3", "alpha", "update_norm")
    print("  ".join(f"{name:>13}" for name in names))
    for row in [*rows[:: max(1, config.steps // 8)], rows[-1]]:
        print("  ".join(f"{row[name]:>13.6g}" for name in names))
    write(config.out / "log.csv", rows)
    plot(config.out / "log.png", rows)
    print(f"\n{len(rows)} rows saved to {config.out / 'log.csv'}, plot to log.png")


if __name__ == "__main__":
    main()
