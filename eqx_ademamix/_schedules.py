"""Schedules, as modules, and half-lives."""

import abc
import dataclasses
import math
from collections.abc import Callable
from numbers import Real
from typing import Any, ClassVar, TypeAlias, cast, overload

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Shaped

from ._hyperparams import (
    HyperParam,
    HyperParamLike,
    HyperParamLikeOrSchedule,
    HyperParamOrSchedule,
    Purpose,
    check_schedule,
    decay,
    decay_complement,
    finite,
    fraction,
    hyperparam,
    hyperparam_or_schedule,
    is_zero,
    non_negative,
    positive,
    real_array,
    shown,
    wide,
)
from ._numerics import saturated
from ._paths import describe
from ._typing import no_type_check


Step: TypeAlias = (
    int
    | float
    | np.number[Any]
    | Shaped[Array, "*steps"]
    | Shaped[np.ndarray, "*steps"]
)


class AbstractSchedule(eqx.Module):
    """A function of the step, with numbers as fields. Array fields are leaves, so they
    can be traced and batched."""

    # Which hyperparameters it is meant for.
    purpose: ClassVar[Purpose]

    @abc.abstractmethod
    def __call__(self, step: Step) -> Float[Array, "*steps"]:
        """The value at one or more steps."""

    @abc.abstractmethod
    def describe(self) -> str:
        """What it does, in words."""

    def __repr__(self) -> str:
        """Shows numbers, where Equinox would show `f32[]`."""
        values = {x.name: getattr(self, x.name) for x in dataclasses.fields(self)}
        parts = (f"{name}={_shown(value)}" for name, value in values.items())
        return f"{type(self).__name__}({', '.join(parts)})"


def _shown(value: object) -> str:
    return repr(value) if isinstance(value, AbstractSchedule) else shown(value)


def _floats(step: Step) -> Array:
    """Steps as an array of the default float."""
    if isinstance(step, bool) or not isinstance(step, jax.Array | np.ndarray | Real):
        raise TypeError(
            f"`step` is {describe(step)}, but a number or an array was expected: the "
            "steps at which to evaluate the schedule."
        )
    if not isinstance(step, jax.Array):
        step = jnp.asarray(np.asarray(step, np.float64), float)
    return wide(step)


def _elapsed(step: Step, offset: HyperParam) -> Array:
    """The time since the start of a schedule, at least 0."""
    return jnp.maximum(_floats(step) + wide(offset), 0.0)


def _normal(x: HyperParam) -> Array:
    """A positive number that XLA does not take for 0, as it does a subnormal one."""
    x = wide(x)
    return jnp.maximum(x, jnp.finfo(x.dtype).tiny)


def _time(offset: HyperParam) -> str:
    return "t" if is_zero(offset) else f"t + {shown(offset)}"


#
# The paper's warm-ups
#


class AlphaSchedule(AbstractSchedule):
    r"""What [`eqx_ademamix.alpha_scheduler`][] returns: $\alpha$ over the steps."""

    purpose: ClassVar[Purpose] = Purpose.alpha

    alpha: HyperParam
    alpha_start: HyperParam
    warmup: HyperParam
    offset: HyperParam
    begin: HyperParam = 0.0

    @no_type_check
    def __call__(self, step: Step) -> Float[Array, "*steps"]:
        """**Arguments:**

        - `step`: one or more steps: an int, or a NumPy or JAX array of any shape.

        **Returns:**

        $\\alpha$ at these steps, in the default float.
        """
        done = _progress(self, step)
        return (1.0 - done) * wide(self.alpha_start) + done * wide(self.alpha)

    def describe(self) -> str:
        return _warmup_in_words(self, self.alpha_start, self.alpha, "linear")


class Beta3Schedule(AbstractSchedule):
    r"""What [`eqx_ademamix.beta3_scheduler`][] returns: $\beta_3$ over the steps."""

    purpose: ClassVar[Purpose] = Purpose.decay

    beta_end: HyperParam
    beta_start: HyperParam
    warmup: HyperParam
    offset: HyperParam
    begin: HyperParam = 0.0

    @no_type_check
    def __call__(self, step: Step) -> Float[Array, "*steps"]:
        """**Arguments:**

        - `step`: one or more steps: an int, or a NumPy or JAX array of any shape.

        **Returns:**

        $\\beta_3$ at these steps, in the default float.
        """
        done = _progress(self, step)
        return jnp.where(done < 1.0, jnp.exp(self._log(done)), wide(self.beta_end))

    @no_type_check
    def complement(self, step: Step) -> Float[Array, "*steps"]:
        r"""$1 - \beta_3$ at these steps, computed without cancellation.

        **Arguments:** and **Returns:** as for calling the schedule.
        """
        done = _progress(self, step)
        at_end = decay_complement("beta_end", self.beta_end)
        return jnp.where(done < 1.0, -jnp.expm1(self._log(done)), at_end)

    def describe(self) -> str:
        how = "linear in half-life"
        return _warmup_in_words(self, self.beta_start, self.beta_end, how)

    def _log(self, done: Array) -> Array:
        start, end = _timescale(self.beta_start), _timescale(self.beta_end)
        mixed = (1.0 - done) * start + done * end
        # Two `where`s, so that the derivative at b3 = 0 is not a NaN.
        safe = jnp.where(mixed > 0, mixed, 1.0)
        return jnp.where(mixed > 0, -1.0 / safe, -jnp.inf)


def _progress(schedule: AlphaSchedule | Beta3Schedule, step: Step) -> Array:
    """The fraction of the warm-up that is done, from 0 to 1. Always 1 without a
    warm-up. The warm-up begins at `begin`, which is 0 except in schedules that `extend`
    made."""
    t, begin = _floats(step) + wide(schedule.offset), wide(schedule.begin)
    warmup = wide(schedule.warmup)
    share = jnp.maximum(t - begin, 0.0) / jnp.maximum(warmup - begin, 1.0)
    return jnp.where(t >= warmup, 1.0, share)


def _warmup_in_words(
    schedule: AlphaSchedule | Beta3Schedule,
    start: HyperParam,
    end: HyperParam,
    how: str,
) -> str:
    if is_zero(schedule.warmup):
        return f"{shown(end)} at every step"
    over = f"over {_count(schedule.warmup)} steps"
    if not is_zero(schedule.begin):
        over = f"from step {_count(schedule.begin)} to {_count(schedule.warmup)}"
    offset = "" if is_zero(schedule.offset) else f", offset {shown(schedule.offset)}"
    return f"{shown(start)} to {shown(end)}, {how} {over}{offset}"


def _count(steps: HyperParam) -> str:
    """A number of steps, like 256,000."""
    return f"{steps:,.10g}" if isinstance(steps, float) else shown(steps)


def _timescale(beta: HyperParam) -> HyperParam:
    """The number of steps after which an average with this decay rate keeps 1/e of what
    it held: 1.44 half-lives."""
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
    r"""The linear warm-up of $\alpha$ (arXiv:2409.03137, section 3):

    $$
    \alpha(t) = (1 - \mu) \, \alpha_\text{start} + \mu \, \alpha,
    \qquad \mu = \min\left(1, \frac{\max(0, t + \text{offset})}{\text{warmup}}\right)
    $$

    Array arguments are leaves of the returned module: traced under `eqx.filter_jit`, so
    a new value does not trigger recompilation.

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
    $\log 0.5 / \log \beta_3$ (arXiv:2409.03137, section 3 and appendix A.1):

    $$
    \frac{1}{\log \beta_3(t)} = \frac{1 - \mu}{\log \beta_\text{start}}
    + \frac{\mu}{\log \beta_\text{end}},
    \qquad \mu = \min\left(1, \frac{\max(0, t + \text{offset})}{\text{warmup}}\right)
    $$

    Array arguments are leaves of the returned module: traced under `eqx.filter_jit`, so
    a new value does not trigger recompilation. The method `complement` gives
    $1 - \beta_3(t)$ without cancellation. The optimizer uses that.

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
            "without a warm-up it has no effect. Did you mean the length of the "
            "warm-up? Pass that as `warmup=...`."
        )


#
# Log-time schedules
#


class LogTimeBetaSchedule(AbstractSchedule):
    r"""What [`eqx_ademamix.log_time_beta_scheduler`][] returns: a decay rate $\beta$
    over the steps."""

    purpose: ClassVar[Purpose] = Purpose.decay

    delta: HyperParam
    offset: HyperParam

    @no_type_check
    def __call__(self, step: Step) -> Float[Array, "*steps"]:
        """**Arguments:**

        - `step`: one or more steps: an int, or a NumPy or JAX array of any shape.

        **Returns:**

        $\\beta$ at these steps, in the default float.
        """
        t = _elapsed(step, self.offset)
        return t / (_normal(self.delta) + t)

    @no_type_check
    def complement(self, step: Step) -> Float[Array, "*steps"]:
        r"""$1 - \beta$ at these steps, computed without cancellation.

        **Arguments:** and **Returns:** as for calling the schedule.
        """
        t, delta = _elapsed(step, self.offset), _normal(self.delta)
        return jnp.maximum(delta / (delta + t), jnp.finfo(t.dtype).tiny)

    def describe(self) -> str:
        delta = shown(self.delta)
        return f"1 - {delta} / ({delta} + {_time(self.offset)}), at step t"


class PowerAlphaSchedule(AbstractSchedule):
    r"""What [`eqx_ademamix.power_alpha_scheduler`][] returns: $\alpha$ over the
    steps."""

    purpose: ClassVar[Purpose] = Purpose.alpha

    kappa: HyperParam
    scale: HyperParam
    offset: HyperParam

    @no_type_check
    def __call__(self, step: Step) -> Float[Array, "*steps"]:
        """**Arguments:**

        - `step`: one or more steps: an int, or a NumPy or JAX array of any shape.

        **Returns:**

        $\\alpha$ at these steps, in the default float.
        """
        growth = (1.0 + _elapsed(step, self.offset)) ** (1.0 - wide(self.kappa))
        return saturated(wide(self.scale) * growth)

    def describe(self) -> str:
        scale = "" if _is(self.scale, 1.0) else f"{shown(self.scale)} * "
        power = f"(1 + {_time(self.offset)})^(1 - {shown(self.kappa)})"
        return f"{scale}{power}, at step t"


class LogTimeWeightDecaySchedule(AbstractSchedule):
    r"""What [`eqx_ademamix.log_time_weight_decay_scheduler`][] returns: the weight
    decay $\lambda$ over the steps."""

    purpose: ClassVar[Purpose] = Purpose.weight_decay

    omega: HyperParam
    timescale: HyperParam
    offset: HyperParam

    @no_type_check
    def __call__(self, step: Step) -> Float[Array, "*steps"]:
        """**Arguments:**

        - `step`: one or more steps: an int, or a NumPy or JAX array of any shape.

        **Returns:**

        $\\lambda$ at these steps, in the default float.
        """
        t = _elapsed(step, self.offset)
        return saturated(wide(self.omega) / (_normal(self.timescale) + t))

    def describe(self) -> str:
        since = f"{shown(self.timescale)} + {_time(self.offset)}"
        return f"{shown(self.omega)} / ({since}), at step t"


def _is(value: HyperParam, number: float) -> bool:
    return isinstance(value, float) and value == number


@no_type_check
def log_time_beta_scheduler(
    delta: HyperParamLike = 8.0, offset: HyperParamLike = 0
) -> LogTimeBetaSchedule:
    r"""A decay rate whose memory grows with time (Ferbach, Paquette, Gidel, Everett,
    Paquette 2026, "Logarithmic-time Schedules", arXiv:2602.05298):

    $$
    \beta(t) = 1 - \frac{\delta}{\delta + t}
    $$

    The average always covers about the same share of the run so far: its mean age is
    about $t / \delta$ steps. You can use this schedule for `b1`, `b2`, and `b3`. At
    step 0, $\beta = 0$: the average begins as the first gradient, so no bias remains
    from its initial zero.

    The paper uses it for $\beta_1$ and $\beta_2$ of its own optimizer. In its
    experiments with AdEMAMix, $\beta_3$ is the usual warm-up to $1 - \delta / T$ at the
    end of a run of $T$ steps, where the two schedules meet. That is
    `beta3_scheduler(1 - 8 / T, 0.9, warmup=T)`.

    **Arguments:**

    - `delta`: $\delta$, above 0. The paper uses 8 and finds that it matters little.
    - `offset`: a number that is added to the step. Optimizers call a schedule with the
        number of steps taken so far (0, 1, 2, ...). The paper's code counts 1, 2, 3,
        ..., which is `offset=1`. The sum counts as 0 while it is negative.

    **Returns:**

    A module that maps a step (int, NumPy or JAX array, traced or not) to $\beta$. Its
    method `complement` gives $1 - \beta$ without cancellation.

    **Raises:**

    - `ValueError`: for values out of range.

    !!! Example

        ```python
        import eqx_ademamix

        schedule = eqx_ademamix.log_time_beta_scheduler(8.0)
        assert schedule(0) == 0.0 and schedule(72) == 0.9
        ```
    """
    return LogTimeBetaSchedule(
        delta=hyperparam("delta", delta, positive),
        offset=hyperparam("offset", offset, finite),
    )


@no_type_check
def power_alpha_scheduler(
    kappa: HyperParamLike = 0.85,
    scale: HyperParamLike = 1.0,
    offset: HyperParamLike = 0,
) -> PowerAlphaSchedule:
    r"""An $\alpha$ that grows as a power of time (arXiv:2602.05298):

    $$
    \alpha(t) = c \, (1 + t)^{1 - \kappa}
    $$

    This is the paper's formula, times $c$. Its implementations differ: the one in
    PyTorch multiplies the momentum by $1 + (1 + t)^{1 - \kappa}$, and the one in JAX by
    $1 + \max(t, 1)^{1 - \kappa}$. In the paper's own optimizer, this 1 is the weight of
    the only average. AdEMAMix already has the fast average with weight 1, so the 1 is
    left out here. In the paper's experiments with AdEMAMix, $\alpha$ rises linearly to
    $T^{1 - \kappa}$ at the end of a run of $T$ steps: that is
    `alpha_scheduler(T**0.15, warmup=T)`.

    **Arguments:**

    - `kappa`: $\kappa$, in [0, 1]. The paper finds a value of about 0.85, and reports
        that 0.75 to 0.9 works.
    - `scale`: $c$, at least 0.
    - `offset`: a number that is added to the step, as in
        [`eqx_ademamix.log_time_beta_scheduler`][].

    **Returns:**

    A module that maps a step (int, NumPy or JAX array, traced or not) to $\alpha$.

    **Raises:**

    - `ValueError`: for values out of range.

    !!! Example

        ```python
        import eqx_ademamix

        schedule = eqx_ademamix.power_alpha_scheduler(kappa=0.5)
        assert abs(schedule(99) - 10.0) < 1e-5
        ```
    """
    return PowerAlphaSchedule(
        kappa=hyperparam("kappa", kappa, fraction),
        scale=hyperparam("scale", scale, non_negative),
        offset=hyperparam("offset", offset, finite),
    )


@no_type_check
def log_time_weight_decay_scheduler(
    omega: HyperParamLike, timescale: HyperParamLike, offset: HyperParamLike = 0
) -> LogTimeWeightDecaySchedule:
    r"""A weight decay that decreases over time (arXiv:2602.05298):

    $$
    \lambda(t) = \frac{\omega}{\tau + t}
    $$

    The paper has $\omega / t$, which would multiply the parameters by $1 - \omega$ in
    the first step. Its code has $\omega / (T / 10 + t)$ for a run of $T$ steps. This
    function has the form of the code. With `timescale=1`, it is the paper's, since the
    first step here is step 0.

    In the paper, the decay does not depend on the peak of the learning rate, but
    follows its shape $\gamma(t) = \eta(t) / \eta_\text{max}$: the parameters shrink by
    $\gamma(t) \, \lambda(t)$. `AdEMAMix` multiplies `weight_decay` by the learning rate
    $\eta(t)$, so pass $\omega / \eta_\text{max}$ as `omega`, as in the example. With
    `decoupled_weight_decay=True`, the decay does not follow the learning rate.

    **Arguments:**

    - `omega`: $\omega$, at least 0. The paper uses 4.
    - `timescale`: $\tau$, above 0, usually a tenth of the number of steps.
    - `offset`: a number that is added to the step, as in
        [`eqx_ademamix.log_time_beta_scheduler`][].

    **Returns:**

    A module that maps a step (int, NumPy or JAX array, traced or not) to $\lambda$.

    **Raises:**

    - `ValueError`: for values out of range.

    !!! Example

        ```python
        import optax
        import eqx_ademamix

        num_steps, peak = 10_000, 1e-3
        decay = eqx_ademamix.log_time_weight_decay_scheduler(
            4.0 / peak, timescale=num_steps / 10
        )
        optim = eqx_ademamix.AdEMAMix(
            optax.warmup_cosine_decay_schedule(0.0, peak, 500, num_steps),
            weight_decay=decay,
        )
        assert abs(peak * decay(0) - 0.004) < 1e-8
        ```
    """
    return LogTimeWeightDecaySchedule(
        omega=hyperparam("omega", omega, non_negative),
        timescale=hyperparam("timescale", timescale, positive),
        offset=hyperparam("offset", offset, finite),
    )


#
# A cool-down of alpha
#


class AlphaCooldownSchedule(AbstractSchedule):
    r"""What [`eqx_ademamix.alpha_cooldown_scheduler`][] returns: $\alpha$ over the
    steps."""

    purpose: ClassVar[Purpose] = Purpose.alpha

    alpha: HyperParamOrSchedule
    total_steps: HyperParam
    cooldown: HyperParam
    alpha_end: HyperParam
    offset: HyperParam

    @no_type_check
    def __call__(self, step: Step) -> Float[Array, "*steps"]:
        """**Arguments:**

        - `step`: one or more steps: an int, or a NumPy or JAX array of any shape.

        **Returns:**

        $\\alpha$ at these steps, in the default float.
        """
        left = wide(self.total_steps) - (_floats(step) + wide(self.offset))
        kept = jnp.clip(left / jnp.maximum(wide(self.cooldown), 1.0), 0.0, 1.0)
        alpha = self.alpha(step) if callable(self.alpha) else self.alpha
        return kept * wide(alpha) + (1.0 - kept) * wide(self.alpha_end)

    def describe(self) -> str:
        alpha, last = self.alpha, f"the last {_count(self.cooldown)} steps"
        before = f"{in_words(alpha)}; then " if callable(alpha) else ""
        value = "" if callable(alpha) else f"{shown(alpha)}, "
        end = f"linear to {shown(self.alpha_end)} over {last}"
        return f"{before}{value}{end} of {_count(self.total_steps)}"


@no_type_check
def alpha_cooldown_scheduler(
    alpha: HyperParamLikeOrSchedule,
    total_steps: HyperParamLike,
    cooldown: HyperParamLike,
    alpha_end: HyperParamLike = 0.0,
    offset: HyperParamLike = 0,
) -> AlphaCooldownSchedule:
    r"""An $\alpha$ that cools down at the end of the run:

    $$
    \tilde\alpha(t) = \mu \, \alpha(t) + (1 - \mu) \, \alpha_\text{end}, \qquad
    \mu = \min\left(1, \max\left(0, \frac{T - t}{C}\right)\right)
    $$

    The mean age of the gradients in $(\hat m_1 + \alpha m_2) / (1 + \alpha)$ is
    $(a_1 + \alpha a_2) / (1 + \alpha)$, where $a_1 = \beta_1 / (1 - \beta_1)$ and
    $a_2 = \beta_3 / (1 - \beta_3)$ are the mean ages of the two averages. A smaller
    $\alpha$ lowers the mean age, so the optimizer responds faster while the learning
    rate decays. In speed runs of a small GPT with Muon and a mixture of averages,
    lowering the mean age linearly until the end was better than keeping it ("annealed
    K-Maxwell momentum", KellerJordan/modded-nanogpt, pull request 357). For AdEMAMix
    itself, we know of no published result.

    **Arguments:**

    - `alpha`: $\alpha(t)$ before the cool-down, a number or a schedule, for example
        [`eqx_ademamix.alpha_scheduler`][].
    - `total_steps`: $T$, the step at which the cool-down ends.
    - `cooldown`: $C$, its length in steps. 0 switches to `alpha_end` at once.
    - `alpha_end`: $\alpha_\text{end}$, the value from step $T$ onward, at least 0.
    - `offset`: a number that is added to the step of the cool-down. `alpha` has its
        own.

    **Returns:**

    A module that maps a step (int, NumPy or JAX array, traced or not) to $\alpha$.

    **Raises:**

    - `ValueError` or `TypeError`: for values out of range, and for a schedule that is
        for another hyperparameter.

    !!! Example

        ```python
        import eqx_ademamix

        warmup = eqx_ademamix.alpha_scheduler(8.0, warmup=5000)
        schedule = eqx_ademamix.alpha_cooldown_scheduler(
            warmup, total_steps=10_000, cooldown=1000
        )
        assert schedule(9000) == 8.0 and schedule(9500) == 4.0
        ```
    """
    check_schedule("alpha", alpha, Purpose.alpha)
    return AlphaCooldownSchedule(
        alpha=hyperparam_or_schedule("alpha", alpha, non_negative),
        total_steps=hyperparam("total_steps", total_steps, non_negative),
        cooldown=hyperparam("cooldown", cooldown, non_negative),
        alpha_end=hyperparam("alpha_end", alpha_end, non_negative),
        offset=hyperparam("offset", offset, finite),
    )


#
# A learning rate
#


class LearningRateSchedule(AbstractSchedule):
    r"""The learning rate of the [presets](../recipes.md): a peak times an optax
    schedule whose own peak is 1."""

    purpose: ClassVar[Purpose] = Purpose.learning_rate

    peak: HyperParam
    shape: Callable[..., Any]
    words: str = eqx.field(static=True)

    @no_type_check
    def __call__(self, step: Step) -> Float[Array, "*steps"]:
        """**Arguments:**

        - `step`: one or more steps: an int, or a NumPy or JAX array of any shape.

        **Returns:**

        The learning rate at these steps, in the default float.
        """
        # optax's schedules mix integers and floats, which strict promotion rejects.
        return wide(self.peak) * self.shape(_floats(step))

    def describe(self) -> str:
        return f"{shown(self.peak)} times ({self.words})"


def in_words(schedule: object) -> str:
    """What a schedule does. For a callable that is not ours, only its name is known."""
    if isinstance(schedule, AbstractSchedule):
        return schedule.describe()
    named = schedule if hasattr(schedule, "__qualname__") else type(schedule)
    return f"the function `{cast(Any, named).__qualname__}`"


#
# Half-lives
#


_LOG_HALF = math.log(0.5)
_Number: TypeAlias = int | float | np.number[Any]
_Numbers: TypeAlias = _Number | Shaped[Array, "*shape"] | Shaped[np.ndarray, "*shape"]


@overload
def half_life(b: _Number) -> float: ...
@overload
def half_life(b: Shaped[Array, "*shape"]) -> Float[Array, "*shape"]: ...
@overload
def half_life(b: Shaped[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]: ...
@no_type_check
def half_life(
    b: _Numbers,
) -> float | Float[Array, "*shape"] | Float[np.ndarray, "*shape"]:
    r"""The number of steps after which an average with decay rate $\beta$ keeps half of
    what it held: $\log 0.5 / \log \beta$. The inverse of
    [`eqx_ademamix.from_half_life`][].

    **Arguments:**

    - `b`: $\beta$, in [0, 1): a number or an array of any shape.

    **Returns:**

    A Python float for a number. A NumPy array for a NumPy array, computed in float64. A
    JAX array for a JAX array, in the default float. (The float32 nearest to 0.999999
    has a half-life of 684,063. That of the Python number is 693,147.)

    **Raises:**

    - `ValueError` or `TypeError`: for values out of range, and for 16-bit arrays.

    !!! Example

        ```python
        import eqx_ademamix

        assert round(eqx_ademamix.half_life(0.9999)) == 6931
        ```
    """
    x = real_array("b", b, decay)
    if isinstance(x, float):
        return _LOG_HALF / math.log(x) if x > 0 else 0.0
    xp = jnp if isinstance(x, jax.Array) else np
    safe = xp.where(x > 0, x, 0.5)
    # Near 1, `x - 1` is exact, and its logarithm keeps all of its digits.
    return xp.where(x > 0, _LOG_HALF / xp.log1p(safe - 1.0), 0.0)


@overload
def from_half_life(steps: _Number) -> float: ...
@overload
def from_half_life(steps: Shaped[Array, "*shape"]) -> Float[Array, "*shape"]: ...
@overload
def from_half_life(
    steps: Shaped[np.ndarray, "*shape"],
) -> Float[np.ndarray, "*shape"]: ...
@no_type_check
def from_half_life(
    steps: _Numbers,
) -> float | Float[Array, "*shape"] | Float[np.ndarray, "*shape"]:
    r"""The decay rate $\beta = 0.5^{1 / \text{steps}}$ of an average that keeps half of
    what it held after a number of steps. The inverse of [`eqx_ademamix.half_life`][].

    **Arguments:**

    - `steps`: the half-life in steps, at least 0: a number or an array of any shape.

    **Returns:**

    $\beta$, as a number or array of the same kind as in [`eqx_ademamix.half_life`][].

    **Raises:**

    - `ValueError` or `TypeError`: for values out of range, and for a half-life so long
        that $\beta$ rounds to 1: above 2.3e7 steps in float32, and 1.2e16 in float64.

    !!! Example

        ```python
        import eqx_ademamix

        assert abs(eqx_ademamix.from_half_life(6931.1) - 0.9999) < 1e-8
        ```
    """
    x = real_array("steps", steps, non_negative)
    if isinstance(x, float):
        b = 0.5 ** (1.0 / x) if x > 0 else 0.0
    else:
        xp = jnp if isinstance(x, jax.Array) else np
        safe = xp.where(x > 0, x, 1.0)
        b = xp.where(x > 0, xp.exp2(-1.0 / safe), 0.0)
    return real_array("0.5 ** (1 / steps)", b, decay)


# The paper's Figure 17 (arXiv:2409.03137) implies that nine half-lives of b3 in a run
# are too few, and eighteen are enough. Fifteen is between the two.
GOOD_HALF_LIVES = 15


def b3_for_run(steps: int | float, largest: float = 0.9999) -> float:
    """The `b3` with fifteen half-lives in a run, at least 0.9 and at most the largest
    one allowed."""
    return max(0.9, min(largest, 0.5 ** (GOOD_HALF_LIVES / steps)))
