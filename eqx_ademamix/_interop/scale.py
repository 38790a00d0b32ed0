"""An optimizer for a run of another size: `scale_to` and `scale_report`."""

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from .._ademamix import AdEMAMix
from .._checks import check_supported
from .._hyperparams import (
    HyperParamOrSchedule,
    finite,
    hyperparam,
    is_zero,
    non_negative,
    positive,
)
from .._inspection import unwrapped
from .._optimizer import AbstractOptimizer
from .._paths import describe, table
from .._schedules import (
    AlphaCooldownSchedule,
    AlphaSchedule,
    Beta3Schedule,
    LearningRateSchedule,
    LogTimeBetaSchedule,
    PowerAlphaSchedule,
    Step,
    alpha_scheduler,
    b3_for_run,
    beta3_scheduler,
    in_words,
)
from .._typing import no_type_check


T = TypeVar("T", bound=AbstractOptimizer[Any])


class ScalingWarning(UserWarning):
    """A run is outside the range in which a published fit was made or checked. See
    [`eqx_ademamix.scale_to`][]."""


class _Run(NamedTuple):
    steps: float
    batch_tokens: float
    params: float

    @property
    def tokens(self) -> float:
        return self.steps * self.batch_tokens

    @property
    def tokens_per_param(self) -> float:
        return self.tokens / self.params


class _Bounds(NamedTuple):
    """A quantity, and the range in which a fit is known to hold."""

    name: str
    value: float
    least: float
    most: float


class _Fit(NamedTuple):
    """A value from the literature."""

    value: float
    source: str
    confidence: str
    why: str
    bounds: tuple[_Bounds, ...]


class _Row(NamedTuple):
    """How one hyperparameter changes."""

    name: str
    before: HyperParamOrSchedule
    after: HyperParamOrSchedule
    fit: _Fit | None  # `None` if it does not change


#
# The literature
#


def _learning_rate(run: _Run) -> _Fit:
    # Step Law (arXiv:2503.04715), for AdamW with the best batch size for D tokens.
    peak = 1.79 * run.params**-0.713 * run.tokens**0.307
    best_batch = 0.58 * run.tokens**0.571
    # For another batch size, the square-root rule for Adam (arXiv:2205.10287).
    share = run.batch_tokens / best_batch
    # The published learning rates of AdEMAMix are 0.42 to 0.64 of that: 1e-3, 5e-4 and
    # 3e-4 in Tables 2 to 4 of arXiv:2409.03137, and 1e-3 in arXiv:2509.01440 at 124 and
    # 720 million parameters. `tests/test_scale.py` computes the ratios. (With alpha, a
    # step where gradients agree is up to 1 + alpha times as long as that of AdamW.)
    return _Fit(
        value=0.5 * peak * math.sqrt(share),
        source="arXiv:2503.04715 (Step Law), arXiv:2205.10287 (batch size)",
        confidence="medium",
        why="a fit for AdamW, halved, within 30% of five runs of AdEMAMix",
        bounds=(
            # The models whose losses its authors published have 215 million to 1.07
            # billion parameters. The five runs have 110 million to 1.3 billion.
            _Bounds("params", run.params, 1.1e8, 1.3e9),
            _Bounds("tokens", run.tokens, 4e9, 1.01e11),
            # The five runs have 0.12 to 1.4.
            _Bounds("batch_tokens over the best", share, 0.1, 1.5),
        ),
    )


def _weight_decay(run: _Run, optim: AdEMAMix, learning_rate: float) -> _Fit:
    # The weights are an average over 1 / (lr * decay) steps of updates. As a share of
    # the run, the best one is a power of the tokens per parameter (arXiv:2505.13738).
    timescale = 1.084 * run.tokens_per_param**-0.527
    factor = 1.0 if optim.decoupled_weight_decay else learning_rate
    return _Fit(
        value=1.0 / (factor * run.steps * timescale),
        source="arXiv:2505.13738 (Power Lines)",
        confidence="low",
        why="a fit for AdamW, with a factor not checked against the paper",
        bounds=(
            _Bounds("params", run.params, 1.1e8, 3.3e9),
            _Bounds("tokens per parameter", run.tokens_per_param, 20.0, 1280.0),
        ),
    )


def _b3(run: _Run) -> _Fit:
    # At 128,000 steps, 0.9999 was better than 0.999 in both papers. At 64,000, they
    # disagree. The paper's Figure 17 begins at 32,000, and its longest run is 770,000.
    is_tested = run.steps >= 128_000
    return _Fit(
        value=b3_for_run(run.steps),
        source="arXiv:2409.03137, Figure 17; arXiv:2509.01440, section D.1",
        confidence="high" if is_tested else "medium",
        why="the best of two values in both"
        if is_tested
        else "15 half-lives in the run, between two values that were tested",
        bounds=(_Bounds("steps", run.steps, 32_000.0, 770_000.0),),
    )


# The models in Tables 2 to 4 of arXiv:2409.03137, and of Apertus (arXiv:2509.14233).
_ALPHAS = {110e6: 8.0, 330e6: 8.0, 1.3e9: 5.0, 8e9: 8.0, 70e9: 8.0}


def _alpha(run: _Run) -> _Fit:
    nearest = min(_ALPHAS, key=lambda size: abs(math.log(size / run.params)))
    return _Fit(
        value=_ALPHAS[nearest],
        source="arXiv:2409.03137, Tables 2 to 4; arXiv:2509.14233",
        confidence="medium",
        why=f"that of the published model with {nearest:.3g} parameters",
        bounds=(_Bounds("params", run.params, min(_ALPHAS), max(_ALPHAS)),),
    )


def _outside(fit: _Fit) -> list[str]:
    return [
        f"{b.name} {b.value:.3g}, not {b.least:.3g} to {b.most:.3g}"
        for b in fit.bounds
        if not b.least <= b.value <= b.most
    ]


#
# The optimizer
#


@no_type_check
def scale_to(optim: T, *, steps: float, batch_tokens: float, params: float) -> T:
    r"""Adapts an optimizer to a run of another size, from published fits.

    For $S$ steps, $B$ tokens per batch, $D = S B$ tokens in total, and $N$ parameters:

    $$
    \begin{align*}
    \eta &= \tfrac12 \cdot 1.79 \, N^{-0.713} D^{0.307}
        \sqrt{B / (0.58 \, D^{0.571})} \\
    \lambda &= \frac{1}{\eta \, S \cdot 1.084 \, (D / N)^{-0.527}} \\
    \beta_3 &= \min\left(0.9999, \max(0.9, 0.5^{15 / S})\right) \\
    \alpha &= 8, \text{ or } 5 \text{ near } 1.3 \text{ billion parameters}
    \end{align*}
    $$

    - $\eta$ is that of Step Law (arXiv:2503.04715) for AdamW, whose batch is
        $0.58 \, D^{0.571}$. The root is the rule for other batches (Malladi et al.
        2022, arXiv:2205.10287). The factor of one half is ours. The formula is known to
        hold for $N$ from 1.1e8 to 1.3e9, $D$ from 4e9 to 1.01e11, and $B$ from 0.1 to
        1.5 of that batch.
    - $\lambda$ is that of Power Lines (arXiv:2505.13738) for AdamW, for $N$ from 1.1e8
        to 3.3e9 and $D / N$ from 20 to 1280. With `decoupled_weight_decay=True`, it is
        not divided by $\eta$. We know the exponent and the factor only from secondary
        sources, so the confidence is low.
    - $\beta_3$ is between the values in Figure 17 of arXiv:2409.03137 and in section
        D.1 of arXiv:2509.01440, for $S$ from 32,000 to 770,000.
    - $\alpha$ is that of the published model nearest in size: 8, 8, and 5 for 110 and
        330 million and 1.3 billion (arXiv:2409.03137, Tables 2 to 4), 8 for 8 and 70
        billion (arXiv:2509.14233). For $N$ from 1.1e8 to 7e10.

    There is no published fit of the learning rate for AdEMAMix. Half of that for AdamW
    is within 30% of five published values: those of 110 and 330 million and 1.3 billion
    parameters in arXiv:2409.03137, and of 124 and 720 million in arXiv:2509.01440. The
    fits for AdamW also disagree: DeepSeek's learning rate (arXiv:2401.02954), which is
    $0.3118 \, C^{-0.125}$ with the compute $C = 6 N D$, falls with $D$, and that of
    Step Law rises. For a billion parameters and 50 billion tokens, they give 8.6e-4 and
    1.3e-3. So treat the value as a starting point: a value that you have tuned yourself
    is better.

    All values are absolute: they do not depend on those of `optim`, except that a
    weight decay or an $\alpha$ of 0 stays 0.

    - The warm-ups of $\beta_3$ and $\alpha$ become as long as the run, as in the paper.
      A constant becomes a warm-up, from $\beta_1$ or 0. A cool-down of $\alpha$ keeps
      its fraction of the run. Log-time schedules stay as they are, since they have no
      end.
    - A schedule of the learning rate keeps its shape. Its peak becomes $\eta$, and its
      length $S$. Its current length is that of the longest schedule in `optim`.
    - Everything else stays as it is, and so do [`eqx_ademamix.Compensated`][] and
      [`eqx_ademamix.Offloaded`][] around the optimizer.

    **Arguments:**

    - `optim`: an [`eqx_ademamix.AdEMAMix`][], alone or inside our own wrappers. Its
        hyperparameters must be concrete: call this outside `jit`.
    - `steps`: $S$, the number of steps of the new run, above 0.
    - `batch_tokens`: $B$, the number of tokens in each batch, above 0.
    - `params`: $N$, the number of parameters of the new model, above 0; in a
        transformer, not counting the embeddings.

    **Returns:**

    A new optimizer for a new run. (For a run in progress, see
    [`eqx_ademamix.extend`][].) Its hyperparameters are Python numbers and schedules
    with such numbers, even where `optim` had arrays.

    **Raises:**

    - `ValueError` or `TypeError`: for a [`eqx_ademamix.SimplifiedAdEMAMix`][] or an
        optax optimizer, for which there is no fit; for arguments out of range; for a
        function for `b3`, `alpha` or `weight_decay` that this package does not know;
        for a learning rate that never rises above 0, or whose length is unknown; and if
        a hyperparameter is traced or batched.

    It also emits an [`eqx_ademamix.ScalingWarning`][] if the run is outside the range
    of a fit. [`eqx_ademamix.scale_report`][] says the same in its table.

    !!! Example

        ```python
        import eqx_ademamix

        small = eqx_ademamix.AdEMAMix(1e-3, weight_decay=0.1)
        large = eqx_ademamix.scale_to(
            small, steps=100_000, batch_tokens=500_000, params=1e9
        )
        assert large.alpha(100_000) == 5.0
        ```
    """
    run, inner = _checked_run(steps, batch_tokens, params), _checked_optim(optim)
    rows = _rows(inner, run)
    outside = {text: None for row in rows if row.fit for text in _outside(row.fit)}
    if outside:
        warnings.warn(
            "The run is outside of the range of a published fit: "
            f"{'; '.join(outside)}. `scale_report` shows which values are affected. "
            "Tune them.",
            ScalingWarning,
            stacklevel=2,
        )
    fields = [row.name for row in rows]
    where = lambda o: [getattr(o, name) for name in fields]
    scaled = eqx.tree_at(where, inner, [row.after for row in rows])
    return _around(optim, scaled)


@no_type_check
def scale_report(
    optim: AbstractOptimizer[Any], *, steps: float, batch_tokens: float, params: float
) -> str:
    """Says what [`eqx_ademamix.scale_to`][] changes, and why.

    **Arguments:**

    - `optim`, `steps`, `batch_tokens`, `params`: those of
        [`eqx_ademamix.scale_to`][].

    **Returns:**

    A table with a row for each of the four hyperparameters: its current value, its new
    value, the source, and the confidence: high, medium, or low, and why. Outside the
    range of a fit, it is low.

    **Raises:** as in [`eqx_ademamix.scale_to`][], without the warning.

    !!! Example

        ```python
        import eqx_ademamix

        optim = eqx_ademamix.AdEMAMix(1e-3, weight_decay=0.1)
        print(
            eqx_ademamix.scale_report(
                optim, steps=100_000, batch_tokens=500_000, params=1e9
            )
        )
        ```
    """
    run, inner = _checked_run(steps, batch_tokens, params), _checked_optim(optim)
    head = (
        f"A run of {run.steps:,.10g} steps with {run.tokens:.3g} tokens, "
        f"{run.tokens_per_param:.3g} for each of {run.params:.3g} parameters. The new "
        "values are absolute: none depends on the present one."
    )
    columns = ("", "before", "after", "source", "confidence")
    return "\n".join([head, *table([columns, *map(_texts, _rows(inner, run))])])


def _texts(row: _Row) -> tuple[str, ...]:
    values = (row.name, _in_words(row.before), _in_words(row.after))
    if row.fit is None:
        return (*values, "", "unchanged")
    outside = _outside(row.fit)
    level = "low" if outside else row.fit.confidence
    why = "; ".join([row.fit.why, *(f"outside of its range: {x}" for x in outside)])
    return (*values, row.fit.source, f"{level}: {why}")


def _in_words(value: HyperParamOrSchedule) -> str:
    return in_words(value) if callable(value) else f"{float(value):.4g}"


#
# Arguments
#


def _checked_run(steps: object, batch_tokens: object, params: object) -> _Run:
    given = {"steps": steps, "batch_tokens": batch_tokens, "params": params}
    return _Run(*(_number(name, x) for name, x in given.items()))


def _number(name: str, value: object) -> float:
    return _concrete(f"`{name}`", hyperparam(name, value, positive))


def _checked_optim(optim: object) -> AdEMAMix:
    inner = unwrapped(optim)
    check_supported(inner, AdEMAMix)
    assert isinstance(inner, AdEMAMix)
    return inner


def _concrete(name: str, value: object) -> float:
    number: Any = value
    if isinstance(value, Tracer) or np.shape(number) != ():
        raise ValueError(
            f"{name} is {describe(value)}, but `scale_to` needs a concrete number. "
            "Call it outside of `jit` and `vmap`."
        )
    return float(number)


def _around(outer: Any, inner: AdEMAMix) -> Any:
    """The wrappers of an optimizer around another one."""
    if isinstance(outer, AdEMAMix):
        return inner
    return eqx.tree_at(lambda o: o.optim, outer, _around(outer.optim, inner))


#
# Rows
#


def _rows(optim: AdEMAMix, run: _Run) -> list[_Row]:
    _check_concrete(optim)
    rate = _learning_rate(run)
    decay = _weight_decay(run, optim, rate.value)
    return [
        _rate_row(optim, rate, run),
        _decay_row(optim, decay),
        _b3_row(optim, _b3(run), run),
        _alpha_row(optim, _alpha(run), run),
    ]


def _check_concrete(optim: AdEMAMix) -> None:
    for name in ("learning_rate", "b1", "b3", "alpha", "weight_decay"):
        value = getattr(optim, name)
        for leaf in jax.tree.leaves(value):
            if not callable(leaf):
                _concrete(f"`optim.{name}`", leaf)


def _rate_row(optim: AdEMAMix, fit: _Fit, run: _Run) -> _Row:
    old = optim.learning_rate
    peak = float(hyperparam("learning_rate", fit.value, finite))
    if not callable(old):
        _check_rises(float(old))
        return _Row("learning_rate", old, peak, fit)
    return _Row("learning_rate", old, _with_peak(optim, old, peak, run), fit)


def _decay_row(optim: AdEMAMix, fit: _Fit) -> _Row:
    old = optim.weight_decay
    if callable(old):
        raise ValueError(_unknown("weight_decay", old))
    if is_zero(old):
        return _Row("weight_decay", old, old, None)
    new = float(hyperparam("weight_decay", fit.value, non_negative))
    return _Row("weight_decay", old, new, fit)


def _b3_row(optim: AdEMAMix, fit: _Fit, run: _Run) -> _Row:
    old, start, offset = optim.b3, _start(optim), 0.0
    if isinstance(old, LogTimeBetaSchedule):
        return _Row("b3", old, old, None)
    if isinstance(old, Beta3Schedule):
        # Where `extend` was used, the schedule starts in the middle.
        start = float(old.beta_start) if is_zero(old.begin) else start
        offset = float(old.offset)
    elif callable(old):
        raise ValueError(_unknown("b3", old))
    new = beta3_scheduler(fit.value, start, warmup=run.steps, offset=offset)
    return _Row("b3", old, new, fit)


def _start(optim: AdEMAMix) -> float:
    return 0.9 if callable(optim.b1) else float(optim.b1)


def _alpha_row(optim: AdEMAMix, fit: _Fit, run: _Run) -> _Row:
    old = optim.alpha
    new = _new_alpha(old, fit.value, run.steps)
    return _Row("alpha", old, new, None if new is old else fit)


def _new_alpha(
    old: HyperParamOrSchedule, value: float, steps: float
) -> HyperParamOrSchedule:
    if isinstance(old, PowerAlphaSchedule):
        return old
    if isinstance(old, AlphaSchedule):
        start = float(old.alpha_start) if is_zero(old.begin) else 0.0
        return alpha_scheduler(value, start, warmup=steps, offset=float(old.offset))
    if isinstance(old, AlphaCooldownSchedule):
        share = float(old.cooldown) / max(float(old.total_steps), 1.0)
        new = _new_alpha(old.alpha, value, steps), steps, share * steps
        where = lambda s: (s.alpha, s.total_steps, s.cooldown)
        return eqx.tree_at(where, old, new)
    if callable(old):
        raise ValueError(_unknown("alpha", old))
    return old if is_zero(old) else alpha_scheduler(value, warmup=steps)


def _unknown(name: str, schedule: object) -> str:
    return (
        f"`{name}` is {describe(schedule)}, but there is no published fit for such a "
        f"schedule. Scale the optimizer with a number for `{name}`, and insert a "
        f"schedule of the new length with `eqx.tree_at(lambda o: o.{name}, optim, "
        "schedule)`."
    )


#
# Schedules of the learning rate
#


class _Stretched(eqx.Module):
    """A schedule that takes a different number of steps, times a factor."""

    schedule: Callable[..., Any]
    speed: float = eqx.field(static=True)
    factor: float = eqx.field(static=True)

    def __call__(self, step: Step) -> Array:
        return self.factor * jnp.asarray(self.schedule(step * self.speed))


def _with_peak(
    optim: AdEMAMix, old: Callable[..., Any], peak: float, run: _Run
) -> LearningRateSchedule:
    length = _length(optim, old, run)
    if isinstance(old, LearningRateSchedule):
        shape, words, factor = old.shape, old.words, 1.0
        _check_rises(float(old.peak))
    else:
        shape, words = old, f"the shape of {in_words(old)}"
        factor = 1.0 / _check_rises(_peak(old, length))
    if length != run.steps:
        words = f"{words}, stretched from {length:,.0f} to {run.steps:,.0f} steps"
    stretched = _Stretched(shape, length / run.steps, factor)
    return LearningRateSchedule(peak, stretched, words)


def _check_rises(peak: float) -> float:
    if peak > 0:
        return peak
    raise ValueError(
        f"The largest learning rate of `optim` is {peak:g}, but a positive number was "
        "expected, which the new learning rate replaces."
    )


def _length(optim: AdEMAMix, schedule: Callable[..., Any], run: _Run) -> float:
    """The number of steps for which an optimizer was made: the end of the schedule that
    ends last."""
    length = max(_end(schedule), *map(_own_length, (optim.b3, optim.alpha)))
    if length > 0:
        return length
    if np.ptp(_values(schedule, _POWERS)) == 0:
        return run.steps  # a constant
    raise ValueError(
        f"`learning_rate` is {describe(schedule)}, and no schedule of `optim` says how "
        "long its run is. Scale the optimizer with a number for `learning_rate`, and "
        "insert a schedule of the new length with "
        "`eqx.tree_at(lambda o: o.learning_rate, optim, schedule)`."
    )


def _own_length(schedule: HyperParamOrSchedule) -> float:
    if isinstance(schedule, AlphaSchedule | Beta3Schedule):
        return float(schedule.warmup)
    if isinstance(schedule, AlphaCooldownSchedule):
        return float(schedule.total_steps)
    return 0.0


# Steps at which a schedule is sampled, up to 1.07e9.
_POWERS = np.array([0, *(2**k for k in range(31))])


def _values(schedule: Callable[..., Any], steps: np.ndarray) -> np.ndarray:
    # optax's own schedules mix integers and floats.
    with jax.ensure_compile_time_eval(), jax.numpy_dtype_promotion("standard"):
        values = jax.vmap(schedule)(jnp.asarray(steps, jnp.int32))
        return np.asarray(values, np.float64)


def _end(schedule: Callable[..., Any]) -> float:
    """The step from which a learning rate is constant and below its peak. 0 if there is
    no such step, or if it is constant only because the numbers become too small."""
    values = _values(schedule, _POWERS)
    last, changes = values[-1], np.flatnonzero(values != values[-1])
    if changes.size == 0 or changes[-1] == len(_POWERS) - 2:
        return 0.0
    before, after = map(int, _POWERS[changes[-1] : changes[-1] + 2])
    while after - before > 1:
        steps = _grid(before, after, 1024)
        i = np.flatnonzero(_values(schedule, steps) != last)[-1]
        before, after = map(int, steps[i : i + 2])
    peak, late = (
        _peak(schedule, float(after)),
        _values(schedule, np.array([0.9 * after]))[0],
    )
    return float(after) if last < (1 - 1e-6) * peak and late > 1e-6 * peak else 0.0


def _peak(schedule: Callable[..., Any], length: float) -> float:
    steps = _grid(0, int(length), 4096)
    i = int(np.argmax(_values(schedule, steps)))
    first, last = map(int, steps[[max(i - 1, 0), min(i + 1, len(steps) - 1)]])
    return float(_values(schedule, _grid(first, last, 2**20)).max())


def _grid(first: int, last: int, size: int) -> np.ndarray:
    """Whole steps from the first to the last one, at most `size + 1`."""
    return np.unique(np.linspace(first, last, size + 1).astype(np.int64))
