"""What is wrong with a run, from its log: `diagnose`."""

import csv
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from ._paths import describe
from ._stall import FROZEN
from ._typing import DType, DTypeLike, no_type_check


History: TypeAlias = Sequence[Mapping[str, Any]]


@no_type_check
def diagnose(
    history: History | str | os.PathLike[str], *, param_dtype: DTypeLike = "float32"
) -> list[str]:
    """Says what is wrong with a run and what to change.

    [Watching a run](../watching.md#findings) has a table of all findings. What is not
    in the log is not checked, and a healthy run gets no findings.

    **Arguments:**

    - `history`: a sequence of dictionaries, one for each logged step, or the path of a
        CSV file with these as rows. A dictionary has what [`eqx_ademamix.telemetry`][]
        returned, as arrays of shape `()` or as numbers, and `step`, counted from 1. It
        may have `loss`, and what [`eqx_ademamix.stall_report`][] returned, under keys
        such as `stalled/m2/['weight']`. Rows may be in any order. If two rows have the
        same step, as after a resume, the later one counts. Other keys, text, and
        numbers that are missing or NaN are ignored, except that a `loss` that is NaN in
        all of the last rows is reported: leave the key out where it was not logged.
    - `param_dtype`: the dtype of the parameters to which the updates are added. Leave
        it out for 16-bit parameters in an [`eqx_ademamix.Compensated`][], which loses
        nothing.

    **Returns:**

    A list of findings, empty if there are none. Each one gives the numbers from the log
    behind it.

    **Raises:**

    - `TypeError` or `ValueError`: if `history` is something else, or if `param_dtype`
        is not a floating-point dtype.

    !!! Example

        ```python
        import eqx_ademamix

        # b3 and alpha are at their final values from the start.
        history = [
            {"step": step, "alpha": 8.0, "b3": 0.9999, "loss": 2.0}
            for step in range(1, 101)
        ]
        (finding,) = eqx_ademamix.diagnose(history)
        assert finding.startswith("The warm-up of b3 is too short: ")
        ```
    """
    dtype = _float_dtype(param_dtype)
    log = _read(history)
    return [
        f"{says}: {numbers}. {cure}"
        for says, cure, find in _CHECKS
        for numbers in find(log, dtype)
    ]


#
# The log
#


class Series(NamedTuple):
    """What a log has under one key, in order of steps."""

    steps: Float[np.ndarray, " rows"]
    values: Float[np.ndarray, " rows"]

    def where(self, chosen: np.ndarray) -> "Series":
        return Series(self.steps[chosen], self.values[chosen])

    def part(self, start: float, stop: float) -> "Series":
        """The rows between two fractions of the log, at least one."""
        n = len(self.steps)
        first = min(math.floor(start * n), n - 1)
        rows = slice(first, max(math.ceil(stop * n), first + 1))
        return Series(self.steps[rows], self.values[rows])

    @property
    def median(self) -> float:
        return float(np.median(self.values))

    @property
    def last(self) -> float:
        return float(self.values[-1])


class Log:
    """A log as one series for each key."""

    def __init__(self, columns: dict[str, dict[float, float]]):
        self._columns = columns

    def raw(self, key: str) -> Series:
        """A series in which numbers may be NaN or infinite. Empty if there is none."""
        pairs = np.array(sorted(self._columns.get(key, {}).items())).reshape(-1, 2)
        return Series(pairs[:, 0], pairs[:, 1])

    def get(self, key: str) -> Series:
        """A series without the NaNs."""
        raw = self.raw(key)
        return raw.where(~np.isnan(raw.values))

    def under(self, prefix: str) -> Iterator[tuple[str, Series]]:
        """The series whose keys have a prefix, with the rest of their keys."""
        for key in self._columns:
            series = self.get(key)
            if key.startswith(prefix) and len(series.steps):
                yield key.removeprefix(prefix), series


def _read(history: object) -> Log:
    rows = jax.device_get(_rows(history))
    columns: dict[str, dict[float, float]] = {}
    has_steps = any(_number("step", row.get("step")) is not None for row in rows)
    for i, row in enumerate(rows):
        step = _number("step", row.get("step")) if has_steps else i + 1.0
        if step is None or not math.isfinite(step):
            continue
        for key, x in row.items():
            value = _number(key, x)
            if isinstance(key, str) and value is not None:
                columns.setdefault(key, {})[step] = value
    if rows and not columns:
        raise ValueError(
            "`history` has rows, but no numbers under any key. A CSV file needs a "
            "first line with the names of its columns, and commas between them."
        )
    return Log(columns)


def _rows(history: object) -> list[Mapping[str, Any]]:
    if isinstance(history, (str, os.PathLike)):
        with open(history, newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    if not isinstance(history, Sequence):
        raise TypeError(
            f"`history` is {describe(history)}, but a list of dictionaries or the path "
            "of a CSV file was expected."
        )
    for i, row in enumerate(history):
        if not isinstance(row, Mapping):
            raise TypeError(
                f"history[{i}] is {describe(row)}, but a dictionary was expected, with "
                "what `telemetry` returned, `step` and `loss`."
            )
    return list(history)


def _number(key: object, x: object) -> float | None:
    """A number, or `None` for something that is not one."""
    if isinstance(x, str):
        try:
            return float(x)
        except ValueError:
            return None
    if not isinstance(x, (int, float, np.ndarray, np.generic)):
        return None
    if np.shape(x) != ():
        raise ValueError(
            f"`history` has {describe(x)} under {key!r}, but numbers or arrays of "
            "shape () were expected. Log single numbers, such as a mean."
        )
    dtype = np.asarray(x).dtype
    is_real = dtype.kind in "biu" or jnp.issubdtype(dtype, jnp.floating)
    return float(cast(Any, x)) if is_real else None


def _float_dtype(dtype: object) -> DType:
    try:
        found = jnp.dtype(cast(Any, dtype))
    except TypeError:
        found = None
    if dtype is None or found is None or not jnp.issubdtype(found, jnp.floating):
        raise ValueError(
            f"`param_dtype` is {describe(dtype)}, but a floating-point dtype was "
            "expected, for example 'bfloat16'."
        )
    return found


#
# Words and arithmetic
#


def _at(step: Any) -> str:
    return f"{int(step):,}"


def _ratio(x: Series, y: Series) -> Series:
    """One series divided by another, at the steps that both have, where the divisor is
    not 0."""
    steps, i, j = np.intersect1d(x.steps, y.steps, return_indices=True)
    over, under = x.values[i], y.values[j]
    whole = under != 0
    return Series(steps[whole], over[whole] / under[whole])


def _half_life(log: Log) -> Series:
    """The half-life of b3 in steps."""
    logged = log.get("b3_half_life")
    if len(logged.steps):
        return logged
    b3 = log.get("b3")
    b3 = b3.where((b3.values > 0) & (b3.values < 1))
    return Series(b3.steps, math.log(0.5) / np.log(b3.values))


def _steps_in_rates(log: Log) -> Series:
    """The RMS of the updates in units of the learning rate."""
    return _ratio(log.get("update_rms"), log.get("learning_rate"))


def _alpha_at(log: Log, step: float) -> float | None:
    """The last alpha up to a step; the first one, if there is none before it."""
    alpha = log.get("alpha")
    if not len(alpha.steps):
        return None
    before = np.searchsorted(alpha.steps, step, side="right") - 1
    return float(alpha.values[max(before, 0)])


#
# The checks. Each yields the numbers behind its findings.
#

# Fewer rows show no trend.
_FEW = 10


def _nonfinite_gradients(log: Log, _: DType) -> Iterator[str]:
    fraction = log.get("nonfinite_fraction")
    bad = fraction.where(fraction.values > 0)
    if len(bad.steps):
        yield (
            f"in {len(bad.steps)} of {len(fraction.steps)} logged steps, the first of "
            f"which is {_at(bad.steps[0])}, up to {bad.values.max():.2g} of the "
            "entries are NaN or infinite"
        )


def _skipped_steps(log: Log, _: DType) -> Iterator[str]:
    skipped = log.get("skipped")
    if len(skipped.steps) and skipped.last > 0:
        yield f"{_at(skipped.last)} of {_at(skipped.steps[-1])} steps"


def _nonfinite_loss(log: Log, _: DType) -> Iterator[str]:
    """A loss that stays NaN or infinite until the end."""
    loss = log.raw("loss")
    finite = np.flatnonzero(np.isfinite(loss.values))
    if len(loss.steps) > 1 and not len(finite):
        yield f"it is not finite in any row, beginning at step {_at(loss.steps[0])}"
    elif len(finite) and finite[-1] + 1 < len(loss.steps):
        last = loss.values[finite[-1]], loss.steps[finite[-1]]
        yield f"its last finite value is {last[0]:.3g}, at step {_at(last[1])}"


# A shorter half-life is like that of b1: 0.9 has 6.6 steps, and 0.99 has 69.
_SHORT_MEMORY = 100
# From this weight on, a full slow average moves the parameters as far as the fast one.
_HEAVY = 1.0


def _short_warm_up(log: Log, _: DType) -> Iterator[str]:
    """b3 reaches its final value before it has had time to fill the slow average.

    Half of what a full average holds comes from its last half-life. If b3 is final
    before that, the slow average consists of the gradients of the first steps, which
    are the largest and least useful, and keeps them for a half-life or more."""
    half_life = _half_life(log)
    if not len(half_life.steps) or not _SHORT_MEMORY <= half_life.last < math.inf:
        return
    final = np.flatnonzero(half_life.values >= 0.99 * half_life.last)[0]
    step = float(half_life.steps[final])
    alpha = _alpha_at(log, step)
    if step >= half_life.last or (alpha is not None and alpha < _HEAVY):
        return
    if final == 0 and _is_filled(log, half_life.last):
        return
    yield (
        f"b3 has its final half-life of {half_life.last:,.0f} steps at step {_at(step)}"
        + ("" if alpha is None else f", where alpha is {alpha:.3g}")
    )


def _is_filled(log: Log, half_life: float) -> bool:
    """Whether the log begins with a slow average from an earlier run. After t steps, a
    new one has a weight of at most 1 - b3^t. Twice that leaves room for noise."""
    filled = _ratio(log.get("m2_rms"), log.get("m1_rms"))
    if not len(filled.steps):
        return False
    weight = -math.expm1(-math.log(2) * filled.steps[0] / half_life)
    return bool(filled.values[0] > 2 * weight)


# The slow average of steady gradients is no larger than their fast average, since it
# averages out more of their noise. So the ratio is at most alpha. Twice that is a
# margin for gradients that shrink slowly, as they do while a model converges.
_OUTWEIGHS = 2.0


def _large_slow_average(log: Log, _: DType) -> Iterator[str]:
    """The ratio alone is harmless: it is large whenever a model has converged, and then
    its updates are small. If the updates are also larger than before, the slow average
    is what moves the parameters."""
    ratio, rates = log.get("slow_fast_ratio"), _steps_in_rates(log)
    if min(len(ratio.steps), len(rates.steps)) < _FEW:
        return
    limit = _OUTWEIGHS * max(_alpha_at(log, float(ratio.steps[-1])) or _HEAVY, _HEAVY)
    late, large = ratio.part(0.9, 1.0).median, np.flatnonzero(ratio.values > limit)
    if late <= limit or not len(large):
        return
    before = rates.where(rates.steps < ratio.steps[large[0]])
    now = rates.part(0.9, 1.0).median
    if len(before.steps) and now > before.median:
        yield (
            f"slow_fast_ratio is {late:.3g}, above twice alpha since step "
            f"{_at(ratio.steps[large[0]])}, and an update grew from "
            f"{before.median:.3g} to {now:.3g} learning rates"
        )


# Averages of independent gradients have a cosine near 0, and it was never below -0.06
# in healthy runs.
_OPPOSED = -0.1
# If the gradients reverse at once, the slow average is 2 b3^t - 1 times what it was, so
# it follows after one half-life. A quarter of that is long, and every reversal lasts
# that long.
_LONG = 0.25


def _opposed_averages(log: Log, _: DType) -> Iterator[str]:
    cosine, half_life = log.get("slow_fast_cosine"), _half_life(log)
    if not len(half_life.steps) or len(cosine.steps) < 5:
        return
    first, last = _longest(cosine.values < _OPPOSED)
    span = cosine.steps[last] - cosine.steps[first]
    if last - first >= 4 and span >= _LONG * half_life.last:
        mean = cosine.values[first : last + 1].mean()
        yield (
            f"slow_fast_cosine is {mean:.2f} in the mean from step "
            f"{_at(cosine.steps[first])} to {_at(cosine.steps[last])}, and b3 has a "
            f"half-life of {half_life.last:,.0f} steps"
        )


def _longest(flags: np.ndarray) -> tuple[int, int]:
    """The first and last index of the longest run of true values."""
    edges = np.flatnonzero(np.diff(np.r_[False, flags, False].astype(int)))
    runs = [(int(a), int(b) - 1) for a, b in edges.reshape(-1, 2)]
    return max(runs, key=lambda run: run[1] - run[0], default=(0, 0))


# Updates shrink while a model converges, and with the learning rate.
_GROWTH = 2.0


def _growing_updates(log: Log, _: DType) -> Iterator[str]:
    """Neither the learning rate nor the warm-up of alpha counts as growth. The sum of
    a `SimplifiedAdEMAMix` grows with its b1, which is not in the log."""
    if len(log.get("m_rms").steps):
        return
    updates, steady = log.get("update_rms"), _without_schedules(log)
    if min(len(updates.steps), len(steady.steps)) < 2 * _FEW:
        return
    # The first tenth is left out, since its updates are as long as a learning rate.
    growth = [
        series.part(0.9, 1.0).median / max(series.part(0.1, 0.5).median, 1e-300)
        for series in (updates, steady)
    ]
    if min(growth) > _GROWTH:
        late = updates.part(0.9, 1.0).median
        yield (
            f"update_rms is {late:.3g} in the last tenth of the log, {growth[0]:.3g} "
            "times as much as in its first half"
        )


def _without_schedules(log: Log) -> Series:
    """The updates in units of the longest one that steady gradients give: 1 + alpha
    learning rates."""
    rates, alpha = _steps_in_rates(log), log.get("alpha")
    return _ratio(rates, Series(alpha.steps, 1 + alpha.values))


def _lost_updates(log: Log, dtype: DType) -> Iterator[str]:
    """An entry does not move if its update is less than half the distance to the next
    number, which is between a quarter and a half of `eps` times the entry."""
    ratio = log.get("update_param_ratio")
    ratio = ratio.where(ratio.values > 0)
    limit = float(jnp.finfo(dtype).eps) / 4
    if len(ratio.steps) and ratio.median < limit:
        yield (
            f"update_param_ratio is {ratio.median:.2g} in the median, and {dtype} "
            f"rounds away an update of less than {limit:.2g} of its parameter"
        )


def _frozen_moments(log: Log, _: DType) -> Iterator[str]:
    names = ("m1", "m2", "m", "nu")
    for name in names:
        stalled = [(x.last, path) for path, x in log.under(f"stalled/{name}/")]
        frozen = sorted((x for x in stalled if x[0] > FROZEN), reverse=True)
        if frozen:
            yield (
                f"a step does not change {frozen[0][0]:.0%} of the entries of {name} "
                f"at {frozen[0][1]}, and more than half of them in {len(frozen)} of "
                f"{len(stalled)} arrays"
            )
    yield from _constant_slow_average(log)


# How much of the slow average must have been replaced in the meantime.
_REPLACED = 0.05


def _constant_slow_average(log: Log) -> Iterator[str]:
    """m2_rms does not change at all. That of a float32 m2 changes by parts in 10^6 in a
    single step, even if it has a billion entries."""
    m2, half_life = log.get("m2_rms"), _half_life(log)
    if not len(half_life.steps) or len(m2.steps) < 5:
        return
    same = (np.abs(np.diff(m2.values)) <= 1e-7 * m2.values[1:]) & (m2.values[1:] > 0)
    first, last = _longest(same)
    span = m2.steps[last + 1] - m2.steps[first]
    replaced = -math.expm1(-math.log(2) * span / half_life.last)
    if last - first >= 3 and replaced > _REPLACED:
        yield (
            f"m2_rms is {m2.values[first]:.3g} at every step from "
            f"{_at(m2.steps[first])} to {_at(m2.steps[last + 1])}, in which "
            f"{replaced:.0%} of m2 should have been replaced"
        )


class Check(NamedTuple):
    """A finding: how it begins, how it ends, and the numbers in between."""

    says: str
    cure: str
    find: Callable[[Log, DType], Iterator[str]]


# In the order in which they are reported: what ends a run comes first. The table in
# `docs/watching.md` has the same words.
_CHECKS = (
    Check(
        "Gradients are not finite",
        "Find the source with `jax_debug_nans`, or use `skip_nonfinite=True`, which "
        "skips such steps.",
        _nonfinite_gradients,
    ),
    Check(
        "Steps were skipped",
        "Their gradients were not finite: lower the learning rate, or scale the loss "
        "if the model computes in float16.",
        _skipped_steps,
    ),
    Check(
        "The loss is no longer finite",
        "Go back to a checkpoint before that step, clip the gradients, and lower the "
        "learning rate.",
        _nonfinite_loss,
    ),
    Check(
        "The warm-up of b3 is too short",
        "Let b3 and alpha warm up over the whole run, or at least over one half-life.",
        _short_warm_up,
    ),
    Check(
        "The slow average outweighs the fast one",
        "The gradients shrink faster than the slow average forgets them: set "
        "`max_slow_ratio`, or lower b3 or alpha.",
        _large_slow_average,
    ),
    Check(
        "The slow average points against the gradients",
        "If the data changed, lower b3 or begin with a new state; otherwise the run "
        "overshoots: lower alpha or the learning rate.",
        _opposed_averages,
    ),
    Check(
        "The updates grow",
        "Clip the gradients, lower alpha or the learning rate, or set "
        "`clip_update_rms`.",
        _growing_updates,
    ),
    Check(
        "The precision of the parameters loses updates",
        "Wrap the optimizer in `Compensated`, or keep the parameters in float32.",
        _lost_updates,
    ),
    Check(
        "The format freezes a moment",
        "Store that moment in float32, or as `StateFormat.half()` does.",
        _frozen_moments,
    ),
)
