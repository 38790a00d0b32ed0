"""What all figures share: the type of their numbers and their style."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure


GRAY, RED, BLUE, ORANGE, GREEN = (
    f"tab:{name}" for name in ("gray", "red", "blue", "orange", "green")
)


class Number(NamedTuple):
    """A number that a figure shows, for `docs/figures.csv`."""

    quantity: str
    value: float
    digits: int = 4

    @property
    def text(self) -> str:
        """The value, rounded to `digits` significant digits."""
        return f"{self.value:.{self.digits}g}"


def panels(count: int, width: float = 9.6, height: float = 4.0, **kwargs: Any) -> Any:
    """A figure and a row of axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False, **kwargs)[0]


def stack(count: int, width: float, height: float, **kwargs: Any) -> Any:
    """A figure and a column of axes. If it is narrow, a phone hardly shrinks it."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(count, 1, squeeze=False, **kwargs)[:, 0]


def mosaic(layout: str, width: float, height: float) -> Any:
    """A figure and its axes, keyed by the letters of the layout."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplot_mosaic(layout)


def legend(axes: Axes, **kwargs: Any) -> None:
    axes.legend(**{"frameon": False, "fontsize": "small", **kwargs})


def shades(color_map: str, count: int) -> Sequence[Any]:
    """Colors from light to dark. All of them are visible on white."""
    from matplotlib import colormaps

    return [
        colormaps[color_map](0.35 + 0.6 * i / max(1, count - 1)) for i in range(count)
    ]


def save(figure: Figure, path: Path, background: str = "white") -> None:
    """Applies the common style to all axes and saves the figure."""
    for axes in figure.findobj(Axes):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(axes.get_title(), fontsize="medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, facecolor=background)
