"""Draws the picture that other sites show beside a link to the docs.

Run `python benchmarks/social_card.py`. Most sites expect 1200 by 630 pixels.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Curve


IMAGES = Path(__file__).parents[1] / "docs/images"
DARK, AMBER = "#16181d", "#ffb300"


def draw(path: Path) -> None:
    figure = Figure(figsize=(12, 6.3), dpi=100, facecolor=DARK)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.axis("off")
    axes.set(xlim=(0, 1200), ylim=(630, 0))
    style = {"fill": False, "linewidth": 24, "capstyle": "round"}
    for color, points in logo():
        codes = [Curve.MOVETO] + [Curve.CURVE4] * (len(points) - 1)
        curve = Curve(points * 13 + (70, 130), codes)
        axes.add_patch(PathPatch(curve, edgecolor=color, **style))
    axes.text(450, 280, "eqx_ademamix", size=54, color="white", weight="bold")
    axes.text(450, 350, "The AdEMAMix optimizer for Equinox", size=26, color="white")
    axes.text(450, 400, "typed state, accurate numerics", size=26, color=AMBER)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def logo() -> Iterator[tuple[str, np.ndarray]]:
    """The color of each line of the logo, and the points of its Bézier curves."""
    for line in ElementTree.parse(IMAGES / "logo.svg").getroot():
        start, first, *smooth = re.split("[MCS]", line.attrib["d"])[1:]
        points = [*_pairs(start), *_pairs(first)]
        for curve in smooth:  # its first control point mirrors the one before
            points += [2 * points[-1] - points[-2], *_pairs(curve)]
        yield line.attrib["stroke"], np.array(points)


def _pairs(text: str) -> np.ndarray:
    return np.array(text.split(), float).reshape(-1, 2)


if __name__ == "__main__":
    draw(IMAGES / "social_card.png")
