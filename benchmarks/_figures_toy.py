"""The two-dimensional Figures 18 and 2 of the paper, in float64."""

import contextlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _drawing import BLUE, RED, Number, legend, mosaic, panels, save, shades
from jaxtyping import Array, Float
from matplotlib.axes import Axes

import eqx_ademamix


Point = Float[Array, "2"]
Points = Float[Array, "steps 2"]
Function = Callable[[Point], Float[Array, ""]]


@contextlib.contextmanager
def float64() -> Generator[None, None, None]:
    """Enables 64-bit types in all versions of JAX."""
    before = bool(jax.config.read("jax_enable_x64"))
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


def descend(
    function: Function, optim: Any, state: Any, start: Point, steps: int
) -> Points:
    """The points that an optimizer visits, without the start."""

    def step(carry: tuple[Point, Any], _: None) -> tuple[tuple[Point, Any], Point]:
        point, state = carry
        grads = jax.grad(function)(point)
        updates, state = eqx_ademamix.update(optim, grads, state, point)
        point = eqx.apply_updates(point, updates)
        return (point, state), point

    scan = lambda carry: jax.lax.scan(step, carry, length=steps)
    return jax.jit(scan)((start, state))[1]


#
# Figure 18: two paths into one valley
#


START_18 = (0.3, -1.5)
MOMENTA_18 = ((-3.0, 0.0), (-0.8, -3.0))


def two_wells(point: Point) -> Float[Array, ""]:
    x, y = point
    return 8 * (x - 1) ** 2 * (1.3 * x**2 + 2 * x + 1) + 0.5 * (y - 4) ** 2


def figure_18_path(momentum: tuple[float, float], steps: int = 2000) -> Points:
    """The path of AdEMAMix if both averages of the gradient start at `momentum`."""
    optim = eqx_ademamix.AdEMAMix(0.1, b1=0.9, b2=0.999, b3=0.999, alpha=1.0)
    start = jnp.asarray(START_18, float)
    state = eqx.tree_at(
        lambda state: (state.m1, state.m2),
        eqx_ademamix.init(optim, start),
        (jnp.asarray(momentum, float), jnp.asarray(momentum, float)),
    )
    return descend(two_wells, optim, state, start, steps)


def figure_18(path: Path, short: bool) -> list[Number]:
    """The paper's Figure 18: the initial averages determine the path."""
    with float64():
        paths = [np.asarray(figure_18_path(m)) for m in MOMENTA_18]
    figure, (plane, heights) = panels(2, width_ratios=(5, 4))
    contours(plane, two_wells, (-1.6, 2.1), (-5, 8.5), np.geomspace(0.3, 500, 16))
    for points, momentum, color in zip(paths, MOMENTA_18, (RED, BLUE), strict=True):
        points = np.concatenate([[START_18], points])
        plane.plot(*points.T, color=color, linewidth=1.5)
        label = f"m1 = m2 = ({momentum[0]:g}, {momentum[1]:g})"
        heights.plot(two_wells(jnp.asarray(points.T)), color=color, label=label)
    plane.plot(*START_18, "ko", markersize=5)
    plane.plot(1, 4, "k*", markersize=12)
    plane.set(xlabel="x", ylabel="y", title="start (dot) and minimum (star)")
    heights.set(xlabel="step", ylabel="f", yscale="log", title="height along the path")
    legend(heights, title="at the start")
    save(figure, path)
    return [
        Number(f"{name} after 2000 steps, start {momentum}", float(value), 12)
        for points, momentum in zip(paths, MOMENTA_18, strict=True)
        for name, value in zip("xy", points[-1], strict=True)
    ]


#
# Figure 2: the Rosenbrock function
#


START_2 = (-3.0, 5.0)
ADAM_B1 = (0.9, 0.99, 0.999, 0.9999)
ADEMAMIX_B3 = (0.999, 0.9999)


class Descent(NamedTuple):
    """The points that an optimizer visited on its way to the minimum at (1, 1)."""

    label: str
    points: Float[np.ndarray, "steps 2"]

    @property
    def distances(self) -> Float[np.ndarray, " steps"]:
        return np.linalg.norm(self.points - 1.0, axis=1)


def rosenbrock(point: Point) -> Float[Array, ""]:
    x, y = point
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def figure_2_adam(b1: float, steps: int = 5000) -> Points:
    optim, start = optax.adam(0.06, b1=b1), jnp.asarray(START_2, float)
    return descend(rosenbrock, optim, eqx_ademamix.init(optim, start), start, steps)


def figure_2_ademamix(b3: float, corrected: bool, steps: int = 5000) -> Points:
    """AdEMAMix with the slow average as in Algorithm 1, or corrected for its bias."""
    optim = eqx_ademamix.AdEMAMix(0.006, b3=b3, alpha=9.0, bias_correct_m2=corrected)
    start = jnp.asarray(START_2, float)
    return descend(rosenbrock, optim, eqx_ademamix.init(optim, start), start, steps)


def figure_2(path: Path, short: bool) -> list[Number]:
    """The paper's Figure 2, and the distances in longer runs."""
    steps = 5000 if short else 15_000
    with float64():
        adam = [_adam_run(b1) for b1 in ADAM_B1]
        corrected, published = (
            [_ademamix_run(b3, is_corrected, steps) for b3 in ADEMAMIX_B3]
            for is_corrected in (True, False)
        )
    _draw_figure_2(path, adam, corrected, published)
    runs = (*adam, *corrected, *published)
    return [number for run in runs for number in _numbers_2(run)]


def _adam_run(b1: float) -> Descent:
    return Descent(f"Adam, b1 = {b1}", np.asarray(figure_2_adam(b1)))


def _ademamix_run(b3: float, corrected: bool, steps: int) -> Descent:
    label = f"AdEMAMix, b3 = {b3}, m2 {'corrected' if corrected else 'as published'}"
    return Descent(label, np.asarray(figure_2_ademamix(b3, corrected, steps)))


def _numbers_2(run: Descent) -> Iterator[Number]:
    distances = run.distances
    yield Number(f"{run.label}: distance after 5000 steps", distances[4999], 5)
    if len(distances) > 5000:
        end = f"{run.label}: distance after {len(distances)} steps"
        yield Number(end, distances[-1], 1)
        step = first_pass(distances)
        yield Number(f"{run.label}: first pass of the minimum, step", step, 6)
        yield Number(f"{run.label}: distance then", distances[step - 1], 2)
        yield Number(f"{run.label}: largest distance after it", distances[step:].max())


def first_pass(distances: Float[np.ndarray, " steps"]) -> int:
    """The first step that is within 1 of the minimum and closer than the next step."""
    is_pass = (distances[:-1] < 1) & (distances[:-1] < distances[1:])
    return int(np.flatnonzero(is_pass)[0]) + 1


def _draw_figure_2(
    path: Path,
    adam: list[Descent],
    corrected: list[Descent],
    published: list[Descent],
) -> None:
    figure, axes = mosaic("pf;pl", 9.6, 6.6)
    plane, first, longer = axes["p"], axes["f"], axes["l"]
    contours(plane, rosenbrock, (-3.2, 3.2), (-3.5, 9), np.geomspace(1, 2e4, 14))
    colors = [*shades("Greys", len(adam)), RED, BLUE]
    for run, color in zip([*adam, *corrected], colors, strict=True):
        points = np.concatenate([[START_2], run.points[:5000]])
        plane.plot(*points.T, color=color, linewidth=1.2)
        label = run.label.removesuffix(", m2 corrected")
        first.plot(run.distances[:5000], color=color, linewidth=1.2, label=label)
    for runs, style in ((corrected, "-"), (published, "--")):
        for run, color in zip(runs, (RED, BLUE), strict=True):
            label = run.label.removeprefix("AdEMAMix, ")
            longer.plot(run.distances, style, color=color, linewidth=1.2, label=label)
    longer.axvline(5000, color="black", linewidth=0.8, linestyle=":")
    plane.plot(*START_2, "ko", markersize=5)
    plane.plot(1, 1, "k*", markersize=12, zorder=5)
    plane.set(xlabel="x", ylabel="y", title="5000 steps from the dot; minimum: star")
    first.set_title("distance to the minimum")
    longer.set(title="distance in longer runs", ylim=(1e-5, 30))
    for each in (first, longer):
        each.set(xlabel="step", yscale="log")
        legend(each, loc="lower left", fontsize="x-small")
    save(figure, path)


def contours(
    axes: Axes,
    function: Function,
    x: tuple[float, float],
    y: tuple[float, float],
    levels: Any,
) -> None:
    """Draws contour lines of a function in the given window."""
    grid: Any = np.meshgrid(np.linspace(*x, 300), np.linspace(*y, 300))
    heights = function(grid)
    axes.contour(*grid, heights, levels, colors="tab:olive", linewidths=0.5, alpha=0.7)
    axes.set(xlim=x, ylim=y)
