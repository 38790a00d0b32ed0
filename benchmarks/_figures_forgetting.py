"""Measures how a language model forgets a batch that it saw once.

This is the paper's forgetting experiment, scaled down. All runs of one optimizer are
identical up to a certain step. At that step, each run trains on its own batch of
held-out text. Later, the loss of each batch is compared between the run that saw it and
the runs that saw another batch instead. Each run is therefore also a control for all
other runs.
"""

import copy
import dataclasses
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
from _drawing import GRAY, RED, Number, legend, panels, save
from _examples import (
    TITLES,
    Config,
    OptimizerName,
    Run,
    Text,
    Transformer,
    Windows,
    copy_arrays,
    mean_loss,
    read_text,
    train_step,
    validation_batches,
)
from jaxtyping import Array, Float


NAMES: tuple[OptimizerName, ...] = ("adamw", "ademamix")
Losses = Float[np.ndarray, "times runs batches"]
Curve = Float[np.ndarray, " times"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """When the batches are seen, and when their losses are measured."""

    config: Config
    seen_at: int
    runs: int

    @property
    def times(self) -> list[int]:
        """The measurement times, in steps after the batch, at growing intervals."""
        last = self.config.steps - self.seen_at
        reported = {t for t in (1, 10, 100, 500, last) if t <= last}
        return sorted(reported | {round(t) for t in np.geomspace(1, last, 60)})

    def batches(self, text: Text) -> Windows:
        """One batch for each run, from held-out text."""
        windows = validation_batches(text.validation, self.config.context)
        windows = windows.reshape(-1, windows.shape[-1])
        count = self.runs * self.config.batch_size
        spread = np.linspace(0, len(windows) - 1, count).astype(int)
        return windows[spread].reshape(self.runs, self.config.batch_size, -1)


def make_plan(short: bool) -> Plan:
    if short:
        config = Config(
            steps=60, width=8, depth=1, heads=2, context=16, batch_size=2, seed=0
        )
        return Plan(config, seen_at=30, runs=2)
    return Plan(Config(steps=3000, seed=0), seen_at=1500, runs=4)


@eqx.filter_jit
def losses_of(model: Transformer, batches: Windows) -> Float[Array, " batches"]:
    return jax.lax.map(lambda windows: mean_loss(model, windows), batches)


def branch(run: Run) -> Run:
    """Copies a run and its arrays, because a training step overwrites its model."""
    other = copy.copy(run)
    other.model, other.state = copy_arrays((run.model, run.state))
    return other


def measure(plan: Plan, name: OptimizerName, text: Text) -> Losses:
    """The loss of every batch in every run, at each measurement time."""
    batches = plan.batches(text)
    trunk = Run(dataclasses.replace(plan.config, optimizer=name), text)
    for step in range(1, plan.seen_at):
        trunk.step(step)
    runs = [_follow(plan, branch(trunk), batches, i) for i in range(plan.runs)]
    return np.stack(runs, axis=1)


def _follow(
    plan: Plan, run: Run, batches: Windows, seen: int
) -> Float[np.ndarray, "times batches"]:
    run.model, run.state, _ = train_step(batches[seen], run.model, run.state, run.optim)
    found: list[Array] = []
    for time in range(1, max(plan.times) + 1):
        if time in plan.times:
            found.append(losses_of(run.model, batches))
        run.step(plan.seen_at + time)
    return np.stack([np.asarray(losses) for losses in found])


def gains(losses: Losses) -> tuple[Curve, Curve]:
    """How much lower the loss of a batch is in the run that saw it.

    Returns the mean over the batches, and its standard error.
    """
    runs = losses.shape[1]
    saw = np.diagonal(losses, axis1=1, axis2=2)
    never = (losses.sum(axis=1) - saw) / (runs - 1)
    gain = never - saw
    return gain.mean(axis=1), gain.std(axis=1, ddof=1) / np.sqrt(runs)


def forgetting(path: Path, short: bool) -> list[Number]:
    """Compares the run that saw a batch once with the runs that never saw it."""
    plan = make_plan(short)
    text = read_text(None, plan.config.context)
    figure, (absolute, relative) = panels(2)
    numbers: list[Number] = []
    for name, color in zip(NAMES, (GRAY, RED), strict=True):
        losses = measure(plan, name, text)
        saw = np.diagonal(losses, axis1=1, axis2=2).mean(axis=1)
        gain, error = gains(losses)
        title, never = TITLES[name], saw + gain
        absolute.plot(plan.times, saw, color=color, label=f"{title}, saw it")
        absolute.plot(
            plan.times, never, "--", color=color, label=f"{title}, never saw it"
        )
        relative.plot(plan.times, gain, color=color, label=title)
        relative.fill_between(
            plan.times, gain - error, gain + error, color=color, alpha=0.2, linewidth=0
        )
        numbers += _numbers(plan, title, gain, error)
    for axes in (absolute, relative):
        axes.set(xscale="log", xlabel="steps since the batch (1: right after it)")
    legend(absolute, loc="lower left", ncols=2)
    legend(relative)
    absolute.set(ylabel="loss (nats per byte)", title="loss of the batch")
    low, high = absolute.get_ylim()
    absolute.set_ylim(low - 0.2 * (high - low), high)  # room for the legend
    relative.set(ylabel="difference (nats per byte)", title="gain from having seen it")
    relative.axhline(0, color="black", linewidth=0.8)
    save(figure, path)
    return numbers


def _numbers(plan: Plan, title: str, gain: Curve, error: Curve) -> list[Number]:
    last = max(plan.times)
    return [
        Number(f"{title}: {name} after {time} steps", values[plan.times.index(time)], 3)
        for time in (1, 10, 100, 500, last)
        if time <= last
        for name, values in (("gain", gain), ("standard error of the gain", error))
    ]
