"""Tables and a plot of the finished runs of `train_better.py`."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import matplotlib.style
import numpy as np
from _drawing import GRAY, RED, legend, panels, save, shades
from _examples import TITLES, OptimizerName
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats


@dataclasses.dataclass(frozen=True)
class Result:
    """A finished run."""

    settings: Mapping[str, Any]
    losses: Sequence[Sequence[float]]
    """Triples: the step, the loss on the selection text, and the loss on the reporting
    text."""
    seconds: float

    @property
    def chosen_by(self) -> float:
        """The final loss on the selection text. Infinite if the run diverged."""
        loss = self.losses[-1][1]
        return loss if np.isfinite(loss) else float("inf")

    @property
    def reported(self) -> float:
        return self.losses[-1][2]


Tuning: TypeAlias = Mapping[OptimizerName, Mapping[float, Result]]
Repeats: TypeAlias = Mapping[OptimizerName, Sequence[Result]]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All runs of the experiment."""

    tuning: Tuning
    """By learning rate, all with the first seed."""
    repeats: Repeats
    """At the best learning rate, one run per seed."""
    longer: Mapping[int, Sequence[Result]]
    """Longer AdamW runs at the best rate, by number of steps, with the first seeds."""

    @property
    def differences(self) -> list[float]:
        """How much lower AdEMAMix ends than AdamW, for each seed."""
        pairs = zip(self.repeats["adamw"], self.repeats["ademamix"], strict=True)
        return [adamw.reported - ours.reported for adamw, ours in pairs]

    @property
    def adamw(self) -> dict[int, Sequence[Result]]:
        """The AdamW runs with the seeds of the longer runs, by number of steps."""
        runs = self.repeats["adamw"]
        shortest = {runs[0].settings["steps"]: runs[: self._num_longer]}
        return dict(sorted({**shortest, **self.longer}.items()))

    @property
    def ademamix(self) -> Sequence[Result]:
        """The AdEMAMix runs with the seeds of the longer runs."""
        return self.repeats["ademamix"][: self._num_longer]

    @property
    def _num_longer(self) -> int:
        everything = self.repeats["adamw"]
        return min(map(len, self.longer.values()), default=len(everything))

    @property
    def steps_needed(self) -> list[float]:
        """How many steps AdamW needs to reach AdEMAMix's final loss, for each seed of
        the longer runs."""
        targets = reported(self.ademamix)
        losses = zip(*map(reported, self.adamw.values()), strict=True)
        lengths = list(self.adamw)
        return [
            steps_needed(lengths, one, target)
            for one, target in zip(losses, targets, strict=True)
        ]

    @property
    def steps_needed_by_mean(self) -> float:
        means = [statistics.mean(reported(runs)) for runs in self.adamw.values()]
        target = statistics.mean(reported(self.ademamix))
        return steps_needed(list(self.adamw), means, target)


def best(results: Mapping[float, Result]) -> float:
    """The learning rate with the lowest loss on the selection text."""
    return min(results, key=lambda rate: results[rate].chosen_by)


def reported(runs: Sequence[Result]) -> list[float]:
    return [run.reported for run in runs]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95% confidence interval of the mean, by Student's t distribution."""
    if len(values) < 2:
        return float("-inf"), float("inf")
    error = _deviation(values) / len(values) ** 0.5
    half = float(stats.t.ppf(0.975, len(values) - 1)) * error
    mean = statistics.mean(values)
    return mean - half, mean + half


def steps_needed(
    lengths: Sequence[int], losses: Sequence[float], target: float
) -> float:
    """The length of a run that ends at the target loss.

    Interpolates between runs that end above and below the target, linearly in the
    logarithm of the length. Returns the shortest length if that run reaches the target,
    and infinity if no run reaches it.
    """
    if losses[0] <= target:
        return lengths[0]
    for i in range(1, len(lengths)):
        if losses[i] <= target:
            share = (losses[i - 1] - target) / (losses[i - 1] - losses[i])
            return lengths[i - 1] * (lengths[i] / lengths[i - 1]) ** share
    return float("inf")


#
# Tables
#


def summary(comparison: Comparison) -> str:
    """The tables, in Markdown."""
    seeds = [run.settings["seed"] for run in comparison.repeats["adamw"]]
    steps = comparison.repeats["adamw"][0].settings["steps"]
    shortest, longest = min(comparison.adamw), max(comparison.adamw)
    needed = [
        _length(needed, shortest, longest)
        for needed in (*comparison.steps_needed, comparison.steps_needed_by_mean)
    ]
    seed_titles = [f"seed {seed}" for seed in seeds[: len(comparison.ademamix)]]
    mean = statistics.mean(comparison.differences)
    low, high = interval(comparison.differences)
    return "\n\n".join(
        (
            f"Learning rates: final loss on the selection text, seed {seeds[0]}.",
            _table(
                ("optimizer", "learning rate", "loss", ""), _tuning_rows(comparison)
            ),
            f"At the best rate, after {steps} steps: final loss on the reporting text, "
            "in nats per byte.",
            _table(
                ("seed", "AdamW", "AdEMAMix", "difference"), _paired_rows(comparison)
            ),
            f"AdEMAMix is lower by {mean:.4f}, with a 95% confidence interval from "
            f"{low:.4f} to {high:.4f}.",
            "Longer runs of AdamW, with the first seeds.",
            _table(
                ("optimizer", "steps", *seed_titles, "mean"), _longer_rows(comparison)
            ),
            "Steps that AdamW needs to reach AdEMAMix's final loss.",
            _table((*seed_titles, "of the means"), [needed]),
        )
    )


def _tuning_rows(comparison: Comparison) -> list[list[str]]:
    return [
        [TITLES[name], f"{rate:g}", f"{results[rate].chosen_by:.4f}", mark]
        for name, results in comparison.tuning.items()
        for rate in sorted(results)
        for mark in ["best" if rate == best(results) else ""]
    ]


def _paired_rows(comparison: Comparison) -> list[list[str]]:
    columns = [reported(comparison.repeats[name]) for name in ("adamw", "ademamix")]
    columns.append(comparison.differences)
    seeds = [str(run.settings["seed"]) for run in comparison.repeats["adamw"]]
    rows = [
        *zip(seeds, *columns, strict=True),
        ("mean", *map(statistics.mean, columns)),
        ("standard deviation", *map(_deviation, columns)),
    ]
    return [[title, *(f"{value:.4f}" for value in row)] for title, *row in rows]


def _longer_rows(comparison: Comparison) -> list[list[str]]:
    adamw = [("adamw", steps, runs) for steps, runs in comparison.adamw.items()]
    ours = comparison.ademamix
    rows = [*adamw, ("ademamix", ours[0].settings["steps"], ours)]
    return [
        [
            TITLES[name],
            str(steps),
            *(f"{loss:.4f}" for loss in reported(runs)),
            f"{statistics.mean(reported(runs)):.4f}",
        ]
        for name, steps, runs in rows
    ]


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else float("nan")


def _length(steps: float, shortest: int, longest: int) -> str:
    if steps <= shortest:
        return f"at most {shortest}"
    return f"{steps:.0f}" if steps <= longest else f"more than {longest}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = (header, ["---"] * len(header), *rows)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


#
# Plot
#


def plot(comparison: Comparison, path: Path) -> None:
    """Plots the losses by step, with their range over the seeds, and AdamW's final
    losses by length of the run."""
    figure, (over_steps, final) = panels(2, 10.5, 4.2)
    adamw = {**comparison.adamw, min(comparison.adamw): comparison.repeats["adamw"]}
    ours = comparison.repeats["ademamix"]
    colors = reversed(shades("Greys", len(adamw)))
    for color, steps in zip(colors, adamw, strict=True):
        _band(over_steps, adamw[steps], color, f"AdamW, {steps} steps")
    _band(over_steps, ours, RED, f"AdEMAMix, {ours[0].settings['steps']} steps")
    highest = max(np.mean(reported(runs)) for runs in adamw.values())
    first = np.mean([run.losses[0][2] for run in comparison.repeats["adamw"]])
    over_steps.set(
        xlabel="step",
        ylabel="validation loss (nats per byte)",
        # Cuts off the beginning, where the curves overlap.
        ylim=(None, highest + 0.5 * (first - highest)),
        title="loss over the steps: mean and range of the seeds",
    )
    legend(over_steps)
    _draw_final(final, comparison)
    save(figure, path)


# The backgrounds of the site's two palettes, and AdamW's gray on each of them.
_PALETTES = {"default": ("white", GRAY), "dark_background": ("#1e2129", "lightgray")}


def plot_home(comparison: Comparison, path: Path, style: str = "default") -> None:
    """Plots the losses of the equally long runs by step, for a narrow screen."""
    background, gray = _PALETTES[style]
    with matplotlib.style.context(style):
        figure = Figure(figsize=(5.6, 4.2), layout="constrained")
        axes = figure.subplots()
        axes.set_facecolor(background)
        colors: dict[OptimizerName, str] = {"adamw": gray, "ademamix": RED}
        for name, color in colors.items():
            runs = comparison.repeats[name]
            mean = statistics.mean(reported(runs))
            _band(axes, runs, color, f"{TITLES[name]}: {mean:.3f}")
        highest = max(run.reported for run in comparison.repeats["adamw"])
        axes.set(
            xlabel="step",
            ylabel="validation loss (nats per byte)",
            ylim=(None, highest + 0.45),
            title=f"mean and range of {len(comparison.differences)} seeds",
        )
        axes.legend(frameon=False, fontsize="large")
        save(figure, path, background)


def _band(axes: Axes, runs: Sequence[Result], color: str, label: str) -> None:
    steps = [step for step, _, _ in runs[0].losses]
    losses = np.array([[loss for _, _, loss in run.losses] for run in runs])
    axes.fill_between(
        steps, losses.min(0), losses.max(0), color=color, alpha=0.25, linewidth=0
    )
    axes.plot(steps, losses.mean(0), color=color, label=label)


def _draw_final(axes: Axes, comparison: Comparison) -> None:
    lengths = list(comparison.adamw)
    losses = np.array([reported(runs) for runs in comparison.adamw.values()])
    ours = reported(comparison.ademamix)
    axes.plot(lengths, losses, ".", color=GRAY)
    axes.plot(lengths, losses.mean(axis=1), "o-", color=GRAY, label="AdamW")
    axes.plot([lengths[0]] * len(ours), ours, ".", color=RED)
    label = f"AdEMAMix, {lengths[0]} steps"
    axes.axhline(float(np.mean(ours)), color=RED, label=label)
    axes.axhspan(min(ours), max(ours), color=RED, alpha=0.15, linewidth=0)
    axes.set(
        xlabel="steps of the run",
        ylabel="final validation loss (nats per byte)",
        xscale="log",
        xticks=lengths,
        xticklabels=lengths,
        title="steps AdamW needs to match AdEMAMix",
    )
    axes.minorticks_off()
    legend(axes)
