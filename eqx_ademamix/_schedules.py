"""The paper's two schedules, as modules."""

import math
from numbers import Real
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Shaped

from ._hyperparams import (
    HyperParam,
    HyperParamLike,
    decay,
    decay_complement,
    finite,
    hyperparam,
    is_zero,
    non_negative,
    wide,
)
from ._paths import describe
from ._typing import no_type_check


Step: TypeAlias = (
    int
    | float
    | np.number[Any]
    | Shaped[Array, "*steps"]
    | Shaped[np.ndarray, "*steps"]
)


class AlphaSchedule(eqx.Module):
    r"""What [`eqx_ademamix.alpha_scheduler`][] returns: $\alpha$ over the steps."""

    alpha: HyperParam
    alpha_start: HyperParam
    warmup: HyperParam
    offset: HyperParam
    begin: HyperParam = 0.0

    @no_type_check
    def __call__(self, step: Step) -> Float[Array, "*steps"]:
        """**Arguments:**

        - `step`: one or more steps: an int, a NumPy or a JAX array of any shape.

        **Returns:**

        $\\alpha$ at these steps, in the default float.
        """
        done = _progress(self, step)
        return (1.0 - done) * wide(self.alpha_start) + done * wide(self.alpha)


class Beta3Schedule(eqx.Module):
    r"""What [`eqx_ademamix.beta3_scheduler`][] returns: $\beta_3$ over the steps."""

    beta_end: HyperParam
    beta_start: HyperParam
    warmup: HyperParam
    offset: HyperParam
    begin: HyperParam = 0.0

    @no_type_check
    def __call__(self, step: Step) -> Float[Array, "*steps"]:
        """**Arguments:**

        - `step`: one or more steps: an int, a NumPy or a JAX array of any shape.

        **Returns:**

        $\\beta_3$ at these steps, in the default float.
        """
        done = _progress(self, step)
        return jnp.where(done < 1.0, jnp.exp(self._log(done)), wide(self.beta_end))

    @no_type_check
    def complement(self, step: Step) -> Float[Array, "*steps"]:
        r"""$1 - \beta_3$ at these steps, without the cancellation of that subtraction.

        **Arguments:** and **Returns:** as for calling the schedule.
        """
        done = _progress(self, step)
        at_end = decay_complement("beta_end", self.beta_end)
        return jnp.where(done < 1.0, -jnp.expm1(self._log(done)), at_end)

    def _log(self, done: Array) -> Array:
        start, end = _timescale(self.beta_start), _timescale(self.beta_end)
        mixed = (1.0 - done) * start + done * end
        # Two `where`s, so that the derivative at b3 = 0 is not a NaN.
        safe = jnp.where(mixed > 0, mixed, 1.0)
        return jnp.where(mixed > 0, -1.0 / safe, -jnp.inf)


def _progress(schedule: AlphaSchedule | Beta3Schedule, step: Step) -> Array:
    """How much of the warm-up is over, from 0 to 1. Always 1 without a warm-up. The
    warm-up begins at `begin`, which is 0 except in schedules that `extend` made."""
    if isinstance(step, bool) or not isinstance(step, jax.Array | np.ndarray | Real):
        raise TypeError(
            f"`step` is {describe(step)}, but a number or an array was expected: the "
            "steps at which to evaluate the schedule."
        )
    if not isinstance(step, jax.Array):
        step = jnp.asarray(np.asarray(step, np.float64), float)
    t, begin = wide(step) + wide(schedule.offset), wide(schedule.begin)
    warmup = wide(schedule.warmup)
    share = jnp.maximum(t - begin, 0.0) / jnp.maximum(warmup - begin, 1.0)
    return jnp.where(t >= warmup, 1.0, share)


def _timescale(beta: HyperParam) -> HyperParam:
    """The number of steps after which an average with this decay keeps 1/e of what it
    held: 1.44 half-lives."""
    if isinstance(beta, float):
        return -1.0 / math.log(beta) if beta > 0 else 0.0
    beta = wide(beta)
    safe = jnp.where(beta > 0, beta, 0.5)
    return jnp.where(beta > 0, -1.0 / jnp.log(safe), 0.0)


@no_type_check
def alpha_scheduler(
    alpha: HyperParamLike,
    alpha_start: HyperParamLike = 0.0,
    warmup: HyperParamLike = 0,
    offset: HyperParamLike = 0,
) -> AlphaSchedule:
    r"""The linear warm-up of $\alpha$ (arXiv:2409.03137, section 3, "schedulers"):

    $$
    \alpha(t) = (1 - \mu) \, \alpha_\text{start} + \mu \, \alpha,
    \qquad \mu = \min\left(1, \frac{t + \text{offset}}{\text{warmup}}\right)
    $$

    Array arguments are leaves of the returned module: traced under `eqx.filter_jit`, so
    a new value does not retrace.

    **Arguments:**

    - `alpha`: $\alpha$, the final value, at least 0.
    - `alpha_start`: $\alpha_\text{start}$, the value at step 0, at least 0.
    - `warmup`: the number of steps until the final value, usually the number of steps
        of the run. 0 gives the final value at once.
    - `offset`: a number that is added to the step. Optimizers call a schedule with the
        number of steps taken so far (0, 1, 2, ...). The paper counts 1, 2, 3, ...,
        which is `offset=1`.

    **Returns:**

    A module that maps a step (int, NumPy or JAX array, traced or not) to $\alpha$.

    **Raises:**

    - `ValueError`: for values out of range, and for a start above the end without a
        warm-up.

    !!! Example

        ```python
        import eqx_ademamix

        schedule = eqx_ademamix.alpha_scheduler(8.0, warmup=1000)
        assert schedule(250) == 2.0
        ```
    """
    schedule = AlphaSchedule(
        alpha=hyperparam("alpha", alpha, non_negative),
        alpha_start=hyperparam("alpha_start", alpha_start, non_negative),
        warmup=hyperparam("warmup", warmup, non_negative),
        offset=hyperparam("offset", offset, finite),
    )
    _check_start("alpha_start", schedule.alpha_start, schedule.alpha, schedule.warmup)
    return schedule


@no_type_check
def beta3_scheduler(
    beta_end: HyperParamLike,
    beta_start: HyperParamLike = 0.0,
    warmup: HyperParamLike = 0,
    offset: HyperParamLike = 0,
) -> Beta3Schedule:
    r"""The warm-up of $\beta_3$ that is linear in the half-life
    $\log 0.5 / \log \beta_3$ (arXiv:2409.03137, section 3, "schedulers", and
    appendix A.1):

    $$
    \frac{1}{\log \beta_3(t)} = \frac{1 - \mu}{\log \beta_\text{start}}
    + \frac{\mu}{\log \beta_\text{end}},
    \qquad \mu = \min\left(1, \frac{t + \text{offset}}{\text{warmup}}\right)
    $$

    Array arguments are leaves of the returned module: traced under `eqx.filter_jit`, so
    a new value does not retrace. The method `complement` gives $1 - \beta_3(t)$
    without cancellation. The optimizer uses that.

    **Arguments:**

    - `beta_end`: $\beta_\text{end}$, the final value, in [0, 1).
    - `beta_start`: $\beta_\text{start}$, the value at step 0, in [0, 1): usually `b1`.
    - `warmup`: the number of steps until the final value, usually the number of steps
        of the run. 0 gives the final value at once.
    - `offset`: a number that is added to the step. Optimizers call a schedule with the
        number of steps taken so far (0, 1, 2, ...). The paper counts 1, 2, 3, ...,
        which is `offset=1`.

    **Returns:**

    A module that maps a step (int, NumPy or JAX array, traced or not) to $\beta_3$.

    **Raises:**

    - `ValueError`: for values out of range, and for a start above the end without a
        warm-up.

    !!! Example

        ```python
        import eqx_ademamix

        schedule = eqx_ademamix.beta3_scheduler(0.9999, 0.9, warmup=256_000)
        assert abs(schedule(1000) - 0.9795986695231871) < 2e-7
        ```
    """
    schedule = Beta3Schedule(
        beta_end=hyperparam("beta_end", beta_end, decay),
        beta_start=hyperparam("beta_start", beta_start, decay),
        warmup=hyperparam("warmup", warmup, non_negative),
        offset=hyperparam("offset", offset, finite),
    )
    _check_start("beta_start", schedule.beta_start, schedule.beta_end, schedule.warmup)
    return schedule


def _check_start(
    name: str, start: HyperParam, end: HyperParam, warmup: HyperParam
) -> None:
    if any(isinstance(x, Tracer) for x in (start, end, warmup)):
        return
    if is_zero(warmup) and float(start) > float(end):
        raise ValueError(
            f"`{name}` is {float(start):g}, above the final value {float(end):g}, but "
            "without a warm-up it has no effect. Was the length of the warm-up meant? "
            "Pass that as `warmup=...`."
        )
