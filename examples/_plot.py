"""A plot of the losses of one or more runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from jaxtyping import Float


matplotlib.use("Agg")  # draws into files, without a display
import matplotlib.pyplot as plt


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
    figure, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    for curve, color in zip(curves, ("tab:blue", "tab:orange"), strict=False):
        steps, losses = smooth(curve.train)
        axes.plot(steps, losses, color=color, alpha=0.35, linewidth=1)
        steps, losses = zip(*curve.validation, strict=True)
        label = f"{curve.label}: {losses[-1]:.3f}"
        axes.plot(steps, losses, color=color, marker="o", markersize=3.5, label=label)
    axes.set(xlabel="step", ylabel="loss (nats a byte)")
    axes.grid(alpha=0.3)
    axes.legend(title="validation loss (faint: training loss)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def smooth(losses: Sequence[float]) -> tuple[Float[np.ndarray, " points"], ...]:
    """Steps, and the means of the losses around them."""
    width = max(1, len(losses) // 40)
    means = np.convolve(losses, np.full(width, 1 / width), mode="valid")
    return np.arange(len(means)) + (width + 1) / 2, means
