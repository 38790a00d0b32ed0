"""A new length for the warm-ups in the middle of a run."""

import dataclasses
import math
from typing import cast

import equinox as eqx
import numpy as np
from jax.core import Tracer

from .._ademamix import AdEMAMix
from .._checks import check_supported
from .._hyperparams import (
    HyperParam,
    HyperParamOrSchedule,
    hyperparam,
    non_negative,
)
from .._inspection import find
from .._paths import describe
from .._schedules import AlphaSchedule, Beta3Schedule
from .._state import AdEMAMixState
from .._typing import no_type_check
from .adopt import is_ours


@no_type_check
def extend(optim: AdEMAMix, state: AdEMAMixState, *, warmup: float) -> AdEMAMix:
    r"""Gives the warm-ups of $\alpha$ and $\beta_3$ a new length, without a jump.

    The schedules of the returned optimizer continue from their present values, linear
    in $\alpha$ and in the half-life of $\beta_3$ as before, and reach the same final
    values when `state.count_m2` reaches the new length. Use it when a run turns out to
    be longer or shorter than planned.

    **Arguments:**

    - `optim`: the optimizer, whose `alpha` or `b3` (or both) are an
        [`eqx_ademamix.alpha_scheduler`][] or [`eqx_ademamix.beta3_scheduler`][]. A
        constant does not change.
    - `state`: its state, with concrete counters: call this outside of `jit`.
    - `warmup`: the new length, counted from the beginning of the slow average, as in
        the schedules' own argument. The present values are computed in float64.

    **Returns:**

    The optimizer with its new schedules, whose starting points and length are Python
    floats, so a jitted step compiles once more. It continues with the same state.

    **Raises:**

    - `ValueError`: if there is no schedule or an unknown one, if that many steps have
        already been taken, or if the counter is traced.

    !!! Example

        ```python
        import jax.numpy as jnp
        import eqx_ademamix

        optim = eqx_ademamix.AdEMAMix(
            1e-3, alpha=eqx_ademamix.alpha_scheduler(8.0, warmup=1000)
        )
        state = eqx_ademamix.init(optim, jnp.ones(3))
        optim = eqx_ademamix.extend(optim, state, warmup=2000)
        assert optim.alpha(2000) == 8.0
        ```
    """
    check_supported(optim, AdEMAMix)
    ours = find(state, is_ours, "of AdEMAMix", name="state")
    length = _concrete("warmup", hyperparam("warmup", warmup, non_negative))
    count = int(_concrete("state.count_m2", ours.count_m2))
    if not (callable(optim.b3) or callable(optim.alpha)):
        raise ValueError(
            "`optim` has neither a schedule for `b3` nor one for `alpha`, so there is "
            "no warm-up to extend."
        )
    b3 = _extended("b3", optim.b3, count, length)
    alpha = _extended("alpha", optim.alpha, count, length)
    return eqx.tree_at(lambda o: (o.b3, o.alpha), optim, (b3, alpha))


def _concrete(name: str, value: object) -> float:
    number = cast(HyperParam, value)
    if isinstance(value, Tracer) or np.shape(number) != ():
        raise ValueError(
            f"{name} is {describe(value)}, but a concrete number was expected. Call "
            "`extend` outside of `jit` and `vmap`."
        )
    return float(number)


def _extended(
    name: str, schedule: HyperParamOrSchedule, count: int, length: float
) -> HyperParamOrSchedule:
    if not callable(schedule):
        return schedule
    if not isinstance(schedule, AlphaSchedule | Beta3Schedule):
        raise ValueError(
            f"`{name}` is {describe(schedule)}, but `extend` knows only the schedules "
            "of `alpha_scheduler` and `beta3_scheduler`. Make a schedule and insert it "
            f"with `eqx.tree_at(lambda o: o.{name}, optim, schedule)`."
        )
    for field in dataclasses.fields(schedule):
        _concrete(f"optim.{name}.{field.name}", getattr(schedule, field.name))
    now = count + float(schedule.offset)
    if length <= now:
        raise ValueError(
            f"`warmup` is {length:g}, but {now:g} steps of the warm-up of "
            f"`{name}` have already been taken. Pass a larger number, counted from the "
            "beginning of the slow average."
        )
    done = _done(schedule, now)
    if isinstance(schedule, AlphaSchedule):
        value = (1 - done) * float(schedule.alpha_start) + done * float(schedule.alpha)
        where = lambda s: (s.alpha_start, s.begin, s.warmup)
    else:
        value = _beta3(float(schedule.beta_start), float(schedule.beta_end), done)
        where = lambda s: (s.beta_start, s.begin, s.warmup)
    # Python floats, even where there were arrays: in float32, 1 - b3 would lose digits.
    begin = max(now, float(schedule.begin))
    return eqx.tree_at(where, schedule, (value, begin, length))


def _done(schedule: AlphaSchedule | Beta3Schedule, now: float) -> float:
    begin, warmup = float(schedule.begin), float(schedule.warmup)
    return 1.0 if now >= warmup else max(now - begin, 0.0) / max(warmup - begin, 1.0)


def _beta3(start: float, end: float, done: float) -> float:
    timescale = lambda beta: -1 / math.log(beta) if beta > 0 else 0.0
    if done >= 1:
        return end
    mixed = (1 - done) * timescale(start) + done * timescale(end)
    return math.exp(-1 / mixed) if mixed > 0 else 0.0
