"""Draws the picture that other sites show beside a link to the docs.

Run `python benchmarks/social_card.py`. Most sites expect 1200 by
630 pixels.
"""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Curve


ROOT = Path(__file__).parents[1]
FAST, SLOW, PAPER = "#8a8f98", "#ffb300", "#16181d"


def draw(path: Path) -> None:
    figure = Figure(figsize=(12, 6.3), dpi=100, facecolor=PAPER)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.axis("off")
    axes.set(xlim=(0, 1200), ylim=(630, 0))
    for curve, color in ((fast_average(), FAST), (slow_average(), SLOW)):
        vertices = np.asarray(curve.vertices) * 13 + (70, 130)
        patch = PathPatch(
            Curve(vertices, curve.codes),
            fill=False,
            edgecolor=color,
            linewidth=24,
            capstyle="round",
        )
        axes.add_patch(patch)
    axes.text(450, 280, "eqx_ademamix", size=54, color="white", weight="bold")
    axes.text(450, 350, "The AdEMAMix optimizer for Equinox", size=26, color="white")
    axes.text(450, 400, "typed state, accurate numerics", size=26, color=SLOW)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def fast_average() -> Curve:
    """The gray line of `docs/images/logo.svg`. The corners of smooth curves mirror the
    control points on the other side."""
    corners = [(6.5, 5), (10.5, 13), (14.5, 7), (18.5, 11), (22, 8)]
    second = [(5, 5), (9, 13), (13, 7), (17, 11), (20.5, 8)]
    first = [(3.5, 8)] + [
        (2 * x - a, 2 * y - b)
        for (x, y), (a, b) in zip(corners[:-1], second[:-1], strict=True)
    ]
    points = [
        point for three in zip(first, second, corners, strict=True) for point in three
    ]
    return Curve([(2, 20), *points], [Curve.MOVETO, *[Curve.CURVE4] * len(points)])


def slow_average() -> Curve:
    """The yellow line of `docs/images/logo.svg`."""
    return Curve(
        [(2, 20), (8, 16), (12, 10.5), (22, 9.5)], [Curve.MOVETO, *[Curve.CURVE4] * 3]
    )


if __name__ == "__main__":
    draw(ROOT / "docs/images/social_card.png")
