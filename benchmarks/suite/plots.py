"""The plots of the page. Ratios come first."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from _drawing import save, stack
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from . import cases, text
from .results import Case, Results, cases_of, series, sides_of


# One color and one marker for each side, the same in all plots.
STYLES: dict[str, dict[str, Any]] = {
    cases.BASELINE: dict(color="black", marker="o"),
    cases.FLOAT32: dict(color="tab:blue", marker="o"),
    cases.HALF: dict(color="tab:cyan", marker="s"),
    cases.COMPACT: dict(color="tab:red", marker="D"),
    cases.NO_M1: dict(color="tab:purple", marker="v"),
    cases.SIMPLIFIED: dict(color="tab:olive", marker="^"),
    cases.COMPENSATED: dict(color="tab:pink", marker="P"),
    cases.ADAMW: dict(color="tab:gray", marker="o", ls="--"),
    cases.TORCH: dict(color="tab:orange", marker="x", ls="--"),
    cases.PYTORCH_OPTIMIZER: dict(color="tab:brown", marker="x", ls="--"),
    cases.BITSANDBYTES: dict(color="goldenrod", marker="x", ls="--"),
    cases.IN_PLACE: dict(color="tab:green", marker="_", ls=":"),
    cases.C_LOOP: dict(color="darkgreen", marker="+", ls=":"),
    cases.AS_ARGUMENT: dict(color="tab:cyan", marker="s"),
    cases.FLAT: dict(color="tab:green", marker="_", ls=":"),
    cases.MAKE_STEP: dict(color="tab:red", marker="D"),
    cases.EIGHT: dict(color="tab:purple", marker="v"),
    cases.PACKED: dict(color="tab:pink", marker="P"),
    cases.PACKED_EIGHT: dict(color="tab:olive", marker="^"),
}
# Ticks for axes of ratios and of times, by the largest range that they suit.
RATIOS: dict[float, tuple[float, ...]] = {
    3: (0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.3, 1.4, 1.6, 1.8, 2),
    100: tuple(x * 10.0**k for k in range(-2, 2) for x in (1, 1.5, 2, 3, 5, 7)),
    math.inf: (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100),
}
# With small leaves, the bounds are far below optax. The tables give those numbers.
STEP_LIMITS = 0.2, 12.0
TIMES: dict[float, tuple[float, ...]] = {
    10: tuple(x * 10.0**k for k in range(-7, 4) for x in (1, 1.5, 2, 3, 5, 7)),
    math.inf: tuple(x * 10.0**k for k in range(-7, 4) for x in (1, 2, 5)),
}
RATIO = "ratio to optax.contrib.ademamix"
# The width of a figure, the height of a panel, and that of the legend, in inches.
WIDTH, PANEL, LEGEND = 5.4, 3.2, 1.0


def draw(results: Results, folder: Path) -> None:
    """Draws everything that has results."""
    for kind, plot in (("step", steps), ("host", hosts), ("compile", compiles)):
        if found := cases_of(results, kind):
            save(plot(found), folder / f"benchmarks_{kind}.png")


def steps(found: Sequence[Case]) -> Figure:
    """One panel for each number of leaves."""
    counts = sorted({case["case"]["leaves"] for case in found})
    height = PANEL * len(counts) + LEGEND
    figure, axes = stack(len(counts), WIDTH, height, sharex=True)
    for ax, count in zip(axes, counts, strict=True):
        some = [case for case in found if case["case"]["leaves"] == count]
        for side in sides_of(some):
            if side != cases.BITSANDBYTES:  # far above the limits
                plot_ratios(ax, *series(some, side, "step", "parameters"), side)
        ax.set(title=f"step time, {text.leaves(count)}", ylabel=RATIO, xscale="log")
    for ax in axes:
        ax.set_ylim(STEP_LIMITS)
        ratio_axis(ax)
    axes[-1].set_xlabel("parameters")
    legend_below(figure, axes)
    return figure


def hosts(found: Sequence[Case]) -> Figure:
    return ratios_and_times(found, "call", "host time of a training step")


def compiles(found: Sequence[Case]) -> Figure:
    return ratios_and_times(found, "all", "time to trace, lower and compile")


def ratios_and_times(found: Sequence[Case], quantity: str, title: str) -> Figure:
    """The ratios by number of leaves, and the times below them."""
    figure, (upper, lower) = stack(2, WIDTH, 2 * PANEL + LEGEND)
    for side in sides_of(found):
        counts, times = series(found, side, quantity)
        plot_ratios(upper, counts, times, side)
        lower.plot(counts, [x["median"] for x in times], ms=5, **STYLES[side])
    for ax in (upper, lower):
        leaves_axis(ax, sorted(case["case"]["leaves"] for case in found))
    ratio_axis(upper)
    time_axis(lower)
    upper.set(title=title, ylabel=RATIO)
    legend_below(figure, [upper])
    return figure


def plot_ratios(ax: Axes, x: Sequence[int], times: Sequence[Any], side: str) -> None:
    """The medians as a line, and the quartiles as bars."""
    found = [time["ratio"] for time in times]
    middle = [each["median"] for each in found]
    below = [each["median"] - each["low"] for each in found]
    above = [each["high"] - each["median"] for each in found]
    style: dict[str, Any] = dict(capsize=2, elinewidth=0.8, lw=1.4, ms=5)
    ax.errorbar(x, middle, (below, above), label=side, **style, **STYLES[side])


#
# Axes and legends
#


def ratio_axis(ax: Axes) -> None:
    ax.set_yscale("log")
    show_ticks(ax.yaxis, suitable(RATIOS, ax.get_ylim()), ax.get_ylim())
    ax.axhline(1.0, color="black", lw=0.8)


def time_axis(ax: Axes) -> None:
    ax.set(yscale="log", ylabel="time")
    show_ticks(ax.yaxis, suitable(TIMES, ax.get_ylim()), ax.get_ylim(), text.tick)


def suitable(
    choices: dict[float, tuple[float, ...]], limits: tuple[float, float]
) -> tuple[float, ...]:
    """The ticks of the first choice whose key is at least the range of the axis."""
    low, high = limits
    return next(ticks for most, ticks in choices.items() if high / low <= most)


def leaves_axis(ax: Axes, counts: Sequence[int]) -> None:
    ax.set(xscale="log", xlabel="leaves")
    show_ticks(ax.xaxis, counts, (0, max(counts)))


def show_ticks(
    axis: Axis,
    ticks: Sequence[float],
    limits: tuple[float, float],
    name: Callable[[float], str] = "{:g}".format,
) -> None:
    """Plain numbers instead of powers of ten."""
    shown = [tick for tick in ticks if limits[0] <= tick <= limits[1]]
    axis.set_ticks(shown, labels=[name(tick) for tick in shown])
    axis.set_minor_locator(NullLocator())


def legend_below(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend for all panels, outside the data."""
    found = {
        label: handle
        for ax in axes
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        list(found.values()),
        list(found),
        loc="outside lower center",
        ncols=2,
        frameon=False,
        fontsize="small",
    )
