"""Plots the losses of one or more runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure


class Curve(NamedTuple):
    """The losses of a run."""

    label: str
    train: Sequence[float]
    """One loss per step."""
    validation: Sequence[tuple[int, float]]
    """(step, loss) pairs."""


def plot_losses(path: Path, curves: Sequence[Curve]) -> None:
    """Plots the smoothed training losses and the validation losses by step."""
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
    axes.set(xlabel="step", ylabel="loss (nats per byte)")
    axes.legend(title="validation loss  (thin: training loss)", frameon=False)
    closeup.set_title("validation loss, second half", fontsize="medium")
    save_figure(figure, path)


def plot_switch(path: Path, stayed: Curve, left: Curve, switch: int) -> None:
    """Plots the losses of two runs that are identical up to the switch."""
    figure = Figure(figsize=(9.6, 4.4), layout="constrained")
    whole, closeup = figure.subplots(1, 2, width_ratios=(5, 4))
    for curve, name, color, start in (
        (stayed, f"{stayed.label} alone", "tab:gray", 0),
        (left, f"{left.label} after the switch", "tab:red", switch),
    ):
        steps, means = smooth(curve.train)
        shown = steps >= start
        whole.plot(steps[shown], means[shown], color=color, alpha=0.4, linewidth=1)
        steps, losses = np.transpose(curve.validation)
        label = f"{name}: {losses[-1]:.4f}"
        for axes, first in ((whole, start), (closeup, switch)):
            points = steps[steps >= first], losses[steps >= first]
            axes.plot(*points, "o-", color=color, markersize=3.5, label=label)

    whole.axvline(switch, color="black", linewidth=0.8, linestyle="--", zorder=0)
    top = whole.get_xaxis_transform()  # y is a fraction of the axes height
    whole.text(switch, 0.96, "  switch", va="top", transform=top)
    highest = max(loss for _, loss in stayed.validation)
    whole.set_ylim(top=1.05 * highest)  # cuts off the first few steps
    whole.set_ylabel("loss (nats per byte)")
    whole.set_title("validation loss (thin: training loss)", fontsize="medium")
    closeup.set_title("validation loss after the switch", fontsize="medium")
    closeup.legend(frameon=False, handlelength=1.5)
    closeup.locator_params(axis="x", nbins=5)
    for axes in (whole, closeup):
        axes.set_xlabel("step")
    save_figure(figure, path)


def plot_run(path: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Plots the log of a run: the loss, the schedules, how the slow average compares
    with the fast one, and the relative size of the updates."""
    figure = Figure(figsize=(9.6, 6.4), layout="constrained")
    loss, schedules, averages, updates = figure.subplots(2, 2, sharex=True).flat
    column = lambda name: [row[name] for row in rows]
    steps = column("step")
    loss.plot(steps, column("loss"), color="tab:gray", alpha=0.4, linewidth=1)
    loss.plot(*rolling(steps, column("loss")), color="tab:red")
    loss.set_title("loss (nats per byte)", fontsize="medium")
    schedules.plot(steps, column("alpha"), color="tab:red", label="alpha")
    right = schedules.twinx()
    right.plot(steps, [1 - x for x in column("b3")], "--", color="tab:blue")
    right.set_yscale("log")
    schedules.plot([], [], "--", color="tab:blue", label="$1 - b_3$")
    schedules.set_title("alpha (left), $1 - b_3$ (right)", fontsize="medium")
    averages.plot(steps, column("slow_fast_ratio"), color="tab:red", label="ratio")
    averages.plot(steps, column("slow_fast_cosine"), color="tab:blue", label="cosine")
    averages.axhline(0, color="black", linewidth=0.8)
    averages.set_title("slow average against the fast one", fontsize="medium")
    updates.plot(steps, column("update_param_ratio"), color="tab:red", linewidth=1)
    updates.set_yscale("log")
    updates.set_title("RMS of updates over RMS of parameters", fontsize="medium")
    schedules.legend(frameon=False, loc="center right")
    averages.legend(frameon=False)
    for axes in (averages, updates):
        axes.set_xlabel("step")
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Applies the common style to all axes and saves the figure."""
    for axes in figure.findobj(Axes):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def rolling(
    steps: Sequence[float], losses: Sequence[float]
) -> tuple[Float[np.ndarray, " points"], ...]:
    """Returns the mean step and the mean loss of each window of rows."""
    width = max(1, len(losses) // 40)
    kernel = np.full(width, 1 / width)
    return tuple(np.convolve(x, kernel, mode="valid") for x in (steps, losses))


def smooth(losses: Sequence[float]) -> tuple[Float[np.ndarray, " points"], ...]:
    """Returns steps and the mean loss around each step."""
    width = max(1, len(losses) // 40)
    means = np.convolve(losses, np.full(width, 1 / width), mode="valid")
    return np.arange(len(means)) + (width + 1) / 2, means
