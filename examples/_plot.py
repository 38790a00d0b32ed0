"""A plot of the losses of one or more runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure


class Curve(NamedTuple):
    """The losses of a run."""

    label: str
    train: Sequence[float]
    """After each step."""
    validation: Sequence[tuple[int, float]]
    """Pairs of a step and a loss."""


def plot_losses(path: Path, curves: Sequence[Curve]) -> None:
    """Draws smoothed training losses and validation losses over the steps."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    closeup = axes.inset_axes((0.52, 0.46, 0.46, 0.27))
    colors = ("tab:gray", "tab:red")[-len(curves) :]
    for curve, color in zip(curves, colors, strict=True):
        axes.plot(*smooth(curve.train), color=color, alpha=0.4, linewidth=1)
        steps, losses = zip(*curve.validation, strict=True)
        label = f"{curve.label}: {losses[-1]:.4f}"
        axes.plot(steps, losses, "o-", color=color, markersize=3.5, label=label)
        half = len(steps) // 2
        closeup.plot(steps[half:], losses[half:], "o-", color=color, markersize=3.5)

    losses = [loss for curve in curves for _, loss in curve.validation]
    axes.set_ylim(top=1.15 * max(losses))  # cuts off the first few steps
    axes.set(xlabel="step", ylabel="loss (nats a byte)")
    axes.legend(title="validation loss  (thin: training loss)", frameon=False)
    closeup.set_title("validation loss, second half", fontsize="medium")
    for each in (axes, closeup):
        each.grid(alpha=0.3)
        each.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def smooth(losses: Sequence[float]) -> tuple[Float[np.ndarray, " points"], ...]:
    """Steps, and the means of the losses around them."""
    width = max(1, len(losses) // 40)
    means = np.convolve(losses, np.full(width, 1 / width), mode="valid")
    return np.arange(len(means)) + (width + 1) / 2, means
