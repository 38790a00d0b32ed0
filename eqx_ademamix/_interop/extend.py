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
from .._schedules import (
    AbstractSchedule,
    AlphaCooldownSchedule,
    AlphaSchedule,
    Beta3Schedule,
    LogTimeBetaSchedule,
    PowerAlphaSchedule,
)
from .._state import AdEMAMixState
from .._typing import no_type_check
from .adopt import is_ours


@no_type_check
def extend(
    optim: AdEMAMix,
    state: AdEMAMixState,
    *,
    warmup: float,
    total_steps: float | None = None,
) -> AdEMAMix:
    r"""Gives the warm-ups of $\alpha$ and $\beta_3$ a new length, without a jump.

    The schedules of the returned optimizer continue from their current values, linear
    in $\alpha$ and in the half-life of $\beta_3$ as before, and reach the same final
    values when `state.count_m2` reaches the new length. Use it when a run turns out to
    be longer or shorter than planned.

    **Arguments:**

    - `optim`: the optimizer, whose `alpha` or `b3` (or both) are an
        [`eqx_ademamix.alpha_scheduler`][] or [`eqx_ademamix.beta3_scheduler`][]. A
        constant does not change, and neither does a
        [`eqx_ademamix.log_time_beta_scheduler`][] or an
        [`eqx_ademamix.power_alpha_scheduler`][], which have no end.
    - `state`: its state, with concrete counters: call this outside `jit`.
    - `warmup`: the new length, counted from the beginning of the slow average, as in
        the schedules' own argument. The current values are computed in float64.
    - `total_steps`: the new end of an [`eqx_ademamix.alpha_cooldown_scheduler`][].
        Required if `alpha` is one. The cool-down keeps its length and must not have
        begun. The warm-up inside it gets the new length.

    **Returns:**

    The optimizer with its new schedules, whose starting points and length are Python
    floats, so a jitted step compiles once more. It continues with the same state.

    **Raises:**

    - `ValueError`: if there is no warm-up or an unknown schedule, if that many steps
        have already been taken, if there is `total_steps` without a cool-down or the
        reverse, or if the counter is traced.

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
    if not (_has_end(optim.b3) or _has_end(optim.alpha)):
        raise ValueError(
            "`optim` has neither a schedule for `b3` nor one for `alpha` that has an "
            "end, so there is no warm-up to extend."
        )
    b3 = _extended("b3", optim.b3, count, length)
    alpha = _with_new_end(optim.alpha, count, length, total_steps)
    return eqx.tree_at(lambda o: (o.b3, o.alpha), optim, (b3, alpha))


def _has_end(schedule: HyperParamOrSchedule) -> bool:
    return callable(schedule) and not isinstance(schedule, _ENDLESS)


_ENDLESS = (LogTimeBetaSchedule, PowerAlphaSchedule)


def _with_new_end(
    alpha: HyperParamOrSchedule, count: int, length: float, total_steps: object
) -> HyperParamOrSchedule:
    """A schedule of alpha with a new length of the warm-up, and a new end of the
    cool-down if it has one."""
    if isinstance(alpha, AlphaCooldownSchedule) != (total_steps is not None):
        raise ValueError(
            f"`total_steps` is {describe(total_steps)}, and `optim.alpha` is "
            f"{describe(alpha)}. Pass `total_steps` if `alpha` has a cool-down "
            "(`alpha_cooldown_scheduler`), and only then."
        )
    if not isinstance(alpha, AlphaCooldownSchedule):
        return _extended("alpha", alpha, count, length)
    total = hyperparam("total_steps", total_steps, non_negative)
    end, old = _concrete("total_steps", total), _concrete_fields("alpha", alpha)
    now = count + old["offset"]
    if now > min(old["total_steps"], end) - old["cooldown"]:
        raise ValueError(
            f"`total_steps` is {end:g}, but after {now:g} steps, the cool-down of "
            f"`alpha` over {old['cooldown']:g} steps has begun or would have begun "
            "already, so `alpha` would jump. Extend a run before its cool-down."
        )
    inner = _extended("alpha", alpha.alpha, count, length)
    return eqx.tree_at(lambda s: (s.alpha, s.total_steps), alpha, (inner, end))


def _concrete_fields(name: str, schedule: AbstractSchedule) -> dict[str, float]:
    values = {x.name: getattr(schedule, x.name) for x in dataclasses.fields(schedule)}
    return {
        field: _concrete(f"optim.{name}.{field}", value)
        for field, value in values.items()
        if not callable(value)
    }


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
    if not _has_end(schedule):
        return schedule
    if not isinstance(schedule, AlphaSchedule | Beta3Schedule):
        raise ValueError(
            f"`{name}` is {describe(schedule)}, but `extend` knows only the schedules "
            "of this package. Make a schedule and insert it with "
            f"`eqx.tree_at(lambda o: o.{name}, optim, schedule)`."
        )
    _concrete_fields(name, schedule)
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
    # A warm-up that begins later than now still begins then if it gets longer. If it
    # gets shorter, so does the time until it begins: otherwise, the value could jump.
    begin, warmup = float(schedule.begin), float(schedule.warmup)
    shrink = min((length - now) / (warmup - now), 1.0) if now < begin else 0.0
    begin = now + max(begin - now, 0.0) * shrink
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
