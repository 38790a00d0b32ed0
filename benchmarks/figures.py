"""Draws the figures of the reproductions page, and writes the numbers that they show.

All of them: `python benchmarks/figures.py` (about ten minutes on two cores, most of
them for the forgetting experiment). One: `python benchmarks/figures.py figure_18`. Only
to see that all can be drawn: `--short`, which writes to `runs/figures`.
"""

import argparse
import csv
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from _drawing import Number
from _figures_forgetting import forgetting
from _figures_rule import past_gradients, schedules, update_norm, what_alpha_does
from _figures_toy import figure_2, figure_18


ROOT = Path(__file__).parents[1]
# Each draws to a path, at a short length if asked to, and returns its numbers.
FIGURES: dict[str, Callable[[Path, bool], list[Number]]] = {
    "figure_18": figure_18,
    "figure_2": figure_2,
    "past_gradients": past_gradients,
    "schedules": schedules,
    "what_alpha_does": what_alpha_does,
    "update_norm": update_norm,
    "forgetting": forgetting,
}

Row = tuple[str, str, str]
HEADER: Row = ("figure", "quantity", "value")


def read_rows(path: Path) -> list[Row]:
    """The numbers in a file of earlier runs, none if there is no such file."""
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
    """The rows of all figures in order: the new ones if there are any, else the old."""
    old = {name: [row for row in before if row[0] == name] for name in FIGURES}
    return [row for name in FIGURES for row in new.get(name, old[name])]


def table(rows: Iterable[Row]) -> str:
    """The numbers in Markdown, as they stand on the page."""
    lines = [f"| {' | '.join(row)} |" for row in (HEADER, *rows)]
    return "\n".join([lines[0], "| --- | --- | --- |", *lines[1:]])


def draw(names: Iterable[str], out: Path, short: bool) -> list[Row]:
    """Draws figures to OUT/images, and puts their numbers into OUT/figures.csv."""
    new: dict[str, list[Row]] = {}
    for name in names:
        path = out / "images" / f"{name}.png"
        numbers = FIGURES[name](path, short)
        new[name] = [(name, number.quantity, number.text) for number in numbers]
        print(f"{name}: drawn in {path}")
    rows = merged(read_rows(out / "figures.csv"), new)
    write_rows(out / "figures.csv", rows)
    return [row for row in rows if row[0] in new]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("figures", nargs="*", help=f"of {', '.join(FIGURES)}")
    parser.add_argument("--short", action="store_true", help="under a minute in all")
    parser.add_argument("--out", type=Path, help="docs, or with --short runs/figures")
    args = parser.parse_args()
    names = args.figures or list(FIGURES)
    if unknown := [name for name in names if name not in FIGURES]:
        parser.error(f"no figure {unknown[0]}, choose from {', '.join(FIGURES)}")
    out = args.out or (Path("runs/figures") if args.short else ROOT / "docs")
    print(table(draw(names, out, args.short)))


if __name__ == "__main__":
    main()
