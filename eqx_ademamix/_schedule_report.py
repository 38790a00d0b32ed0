"""What the schedules of an optimizer do, as text and as a figure."""

import importlib
import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from ._hyperparams import positive_int, shown, wide
from ._inspection import unwrapped
from ._paths import describe, table
from ._schedules import half_life, in_words
from ._step import AbstractMomentOptimizer
from ._typing import no_type_check


_NAMES = ("learning_rate", "b1", "b2", "b3", "alpha", "weight_decay")
_DECAYS = ("b1", "b2", "b3")


@no_type_check
def schedule_report(optim: Any, *, num_steps: int) -> str:
    """Says what each hyperparameter does over a run.

    **Arguments:**

    - `optim`: an [`eqx_ademamix.AdEMAMix`][] or [`eqx_ademamix.SimplifiedAdEMAMix`][],
        alone or inside an [`eqx_ademamix.Compensated`][] or
        [`eqx_ademamix.Offloaded`][].
    - `num_steps`: the number of steps of the run.

    **Returns:**

    Human-readable text: a line for each hyperparameter that says what it does, and a
    table of the values at five steps, with the half-lives of decay rates that change.
    For a function that is not a schedule of this package, it shows the name and the
    values. Values that are unknown under `jit` are shown as their types.

    **Raises:**

    - `ValueError` or `TypeError`: if `optim` is not such an optimizer, or if
        `num_steps` is not a positive int.

    !!! Example

        ```python
        import eqx_ademamix

        optim = eqx_ademamix.AdEMAMix(
            1e-3,
            b3=eqx_ademamix.beta3_scheduler(0.9999, 0.9, warmup=256_000),
            alpha=eqx_ademamix.alpha_scheduler(8.0, warmup=256_000),
        )
        print(eqx_ademamix.schedule_report(optim, num_steps=256_000))
        ```
        ```text
        Hyperparameters over 256,000 steps:

          learning_rate: 0.001
          b1: 0.9
          b2: 0.999
          b3: 0.9 to 0.9999, linear in half-life over 256,000 steps
          alpha: 0 to 8, linear over 256,000 steps
          weight_decay: 0

          step     b3        half-life of b3  alpha
          0        0.9       6.579            0
          64,000   0.999601  1738             2
          128,000  0.9998    3469             4
          192,000  0.999867  5200             6
          256,000  0.9999    6931             8
        ```
    """
    inner, steps = _checked(optim, num_steps)
    values = {name: getattr(inner, name) for name in _names(inner)}
    lines = [f"  {name}: {_words(value)}" for name, value in values.items()]
    scheduled = {name: value for name, value in values.items() if callable(value)}
    parts = [f"Hyperparameters over {steps:,} steps:", "", *lines]
    return "\n".join([*parts, *_value_table(scheduled, steps)])


@no_type_check
def plot_schedules(optim: Any, num_steps: int, path: str | os.PathLike[str]) -> None:
    """Draws the hyperparameters of an optimizer over a run. Needs matplotlib:
    `pip install "eqx_ademamix[plot]"`.

    The figure has a panel for the learning rate, for `alpha`, for the half-lives of the
    decay rates, and for the weight decay.

    **Arguments:**

    - `optim`: as in [`eqx_ademamix.schedule_report`][].
    - `num_steps`: the number of steps of the run.
    - `path`: the file to write. Its extension determines the format: `.png`, `.svg`,
        `.pdf`.

    **Returns:**

    Nothing.

    **Raises:**

    - `ValueError` or `TypeError`: as for [`eqx_ademamix.schedule_report`][].
    - `ImportError`: without matplotlib.

    !!! Example

        ```python
        import os
        import tempfile
        import eqx_ademamix

        optim = eqx_ademamix.presets.paper("110m", total_steps=256_000)
        path = os.path.join(tempfile.mkdtemp(), "schedules.png")
        eqx_ademamix.plot_schedules(optim, 256_000, path)
        ```
    """
    inner, last = _checked(optim, num_steps)
    figure = _figure_class()(figsize=(8.0, 5.0), layout="constrained")
    axes: Sequence[Any] = figure.subplots(2, 2, sharex=True).ravel()
    steps = np.unique(np.linspace(0, last, 1001).astype(np.int64))
    panels = "learning_rate", "alpha", "", "weight_decay"
    for axis, name in zip(axes, panels, strict=True):
        if name:
            axis.plot(steps, _values(getattr(inner, name), steps))
            _finish(axis, name.replace("_", " "))
    for name, style in zip(_DECAYS, ("-", "--", ":"), strict=True):
        if hasattr(inner, name):
            half_lives = _half_lives(getattr(inner, name), steps)
            axes[2].plot(steps, half_lives, style, label=name)
    axes[2].set_yscale("symlog", linthresh=1.0)
    above = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "ncols": 3}
    axes[2].legend(**above, frameon=False)
    _finish(axes[2], "half-life in steps")
    for axis in axes[2:]:
        axis.set_xlabel("step")
    figure.savefig(path, dpi=150)


def _checked(optim: object, num_steps: object) -> tuple[Any, int]:
    inner = unwrapped(optim)
    if not isinstance(inner, AbstractMomentOptimizer):
        raise TypeError(
            f"`optim` is {describe(inner)}, but an `AdEMAMix` or a "
            "`SimplifiedAdEMAMix` was expected. Pass the one that the "
            "chain or wrapper contains."
        )
    return inner, positive_int("num_steps", num_steps)


def _names(optim: object) -> list[str]:
    return [name for name in _NAMES if hasattr(optim, name)]


def _words(value: object) -> str:
    return in_words(value) if callable(value) else shown(value)


#
# Values
#


def _value_table(scheduled: dict[str, Any], steps: int) -> list[str]:
    """The values of schedules at five steps."""
    if not scheduled:
        return []
    points = np.unique(np.linspace(0, steps, 5).astype(np.int64))
    columns = [("step", *(f"{t:,}" for t in points))]
    for name, schedule in scheduled.items():
        columns.append((name, *_texts(_values(schedule, points), "{:.6g}")))
        if name in _DECAYS:
            half_lives = _texts(_half_lives(schedule, points), "{:.4g}")
            columns.append((f"half-life of {name}", *half_lives))
    return ["", *(line.rstrip() for line in table([*zip(*columns, strict=True)]))]


def _texts(values: Array | np.ndarray, form: str) -> list[str]:
    if isinstance(values, Tracer):
        return [shown(x) for x in values]
    return [form.format(float(x)) for x in np.asarray(values)]


def _values(value: Any, steps: np.ndarray) -> Array:
    """The values at some steps. A schedule is called with a traced counter, as in a
    jitted step."""
    at: Any = value if callable(value) else lambda t: value
    return jax.vmap(lambda t: wide(at(t)))(jnp.asarray(steps, jnp.int32))


def _half_lives(value: Any, steps: np.ndarray) -> Array | np.ndarray:
    """From `1 - b` where a schedule gives it."""
    complement = getattr(value, "complement", None)
    if complement is None:
        return half_life(_values(value, steps))
    # At b = 0, the logarithm is infinite and the half-life is 0.
    return math.log(0.5) / jnp.log1p(-_values(complement, steps))


#
# The figure
#


def _figure_class() -> Any:
    try:
        return importlib.import_module("matplotlib.figure").Figure
    except ImportError as error:
        raise ImportError(
            "`plot_schedules` needs the package matplotlib. Install it with "
            '`pip install "eqx_ademamix[plot]"`.'
        ) from error


def _finish(axis: Any, title: str) -> None:
    axis.set_title(title, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]))
