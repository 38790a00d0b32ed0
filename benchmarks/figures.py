"""Draws the figures of the reproductions page and writes the numbers that they show.

To draw all figures, run `python benchmarks/figures.py`. This takes about ten minutes on
two cores, most of it for the forgetting experiment. To draw one figure, run
`python benchmarks/figures.py figure_18`. To check that every figure can be drawn, add
`--short`, which writes to `runs/figures`.
"""

import argparse
import csv
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import precision
from _comparison import interval, plot_home, reported
from _comparison import plot as plot_comparison
from _drawing import Number
from _figures_forgetting import forgetting
from _figures_rule import past_gradients, schedules, update_norm, what_alpha_does
from _figures_toy import figure_2, figure_18, float64
from train_better import recorded


ROOT = Path(__file__).parents[1]


def train_better(path: Path, short: bool) -> list[Number]:
    """The comparison with AdamW, from the runs recorded in the docs."""
    found = recorded(ROOT / "docs/train_better.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    plot_comparison(found, path)
    plot_home(found, path.with_name("home.png"))
    plot_home(found, path.with_name("home_dark.png"), "dark_background")
    runs = {f"AdamW, {steps} steps": runs for steps, runs in found.adamw.items()}
    runs["AdEMAMix, 8000 steps"] = found.ademamix
    losses = (
        Number(f"{name}: mean loss, seeds 0 to 2", statistics.mean(reported(each)), 5)
        for name, each in runs.items()
    )
    low, high = interval(found.differences)
    return [
        *losses,
        Number("steps that AdamW needs", found.steps_needed_by_mean),
        Number(
            f"AdamW minus AdEMAMix, 8000 steps: mean of {len(found.differences)} seeds",
            statistics.mean(found.differences),
            3,
        ),
        Number("its 95% confidence interval, from", low, 2),
        Number("its 95% confidence interval, to", high, 3),
    ]


def storage_formats(path: Path, short: bool) -> list[Number]:
    """The error of the slow average in each storage format, compared with float64."""
    steps = 800 if short else 40_000
    with float64():
        outcomes = [precision.measure(s, steps, 0) for s in precision.STORAGES]
    path.parent.mkdir(parents=True, exist_ok=True)
    precision.plot(path, outcomes, steps)
    return [
        Number(f"{o.name}: error of m2 at the end", o.relative_error, 2)
        for o in outcomes
    ]


# Each function draws to a path and returns its numbers. The bool selects a short run.
FIGURES: dict[str, Callable[[Path, bool], list[Number]]] = {
    "figure_18": figure_18,
    "figure_2": figure_2,
    "past_gradients": past_gradients,
    "schedules": schedules,
    "what_alpha_does": what_alpha_does,
    "update_norm": update_norm,
    "forgetting": forgetting,
    "train_better": train_better,
    "precision": storage_formats,
}

Row = tuple[str, str, str]
HEADER: Row = ("figure", "quantity", "value")


def read_rows(path: Path) -> list[Row]:
    """The numbers in a file from earlier runs. Empty if the file does not exist."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        _, *rows = csv.reader(file)
    return [(figure, quantity, value) for figure, quantity, value in rows]


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([HEADER, *rows])


def merged(before: Sequence[Row], new: dict[str, list[Row]]) -> list[Row]:
    """The rows of all figures, in order. New rows replace the old rows of a figure."""
    old = {name: [row for row in before if row[0] == name] for name in FIGURES}
    return [row for name in FIGURES for row in new.get(name, old[name])]


def table(rows: Iterable[Row]) -> str:
    """The numbers as a Markdown table."""
    lines = [f"| {' | '.join(row)} |" for row in (HEADER, *rows)]
    return "\n".join([lines[0], "| --- | --- | --- |", *lines[1:]])


def draw(names: Iterable[str], out: Path, short: bool) -> list[Row]:
    """Draws figures to OUT/images and writes their numbers to OUT/figures.csv."""
    new: dict[str, list[Row]] = {}
    for name in names:
        path = out / "images" / f"{name}.png"
        numbers = FIGURES[name](path, short)
        new[name] = [(name, number.quantity, number.text) for number in numbers]
        print(f"{name}: saved to {path}")
    rows = merged(read_rows(out / "figures.csv"), new)
    write_rows(out / "figures.csv", rows)
    return [row for row in rows if row[0] in new]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("figures", nargs="*", help=f"any of {', '.join(FIGURES)}")
    parser.add_argument(
        "--short", action="store_true", help="short runs, under a minute"
    )
    parser.add_argument(
        "--out", type=Path, help="default: docs, or runs/figures with --short"
    )
    args = parser.parse_args()
    names = args.figures or list(FIGURES)
    if unknown := [name for name in names if name not in FIGURES]:
        parser.error(f"unknown figure {unknown[0]}; choose from {', '.join(FIGURES)}")
    out = args.out or (Path("runs/figures") if args.short else ROOT / "docs")
    print(table(draw(names, out, args.short)))


if __name__ == "__main__":
    main()
