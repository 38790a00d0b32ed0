"""Sums of weights that other optimizers do not keep, over all steps taken."""

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32

from .._hyperparams import HyperParamOrSchedule, Scalar, resolve_decay
from .._inspection import unwrapped
from .._numerics import Decay, bias_factor, moving_sum
from .._paths import describe
from .._simplified import SimplifiedAdEMAMix
from .._state import AbstractMomentState
from .._step import AbstractMomentOptimizer


Count: TypeAlias = Int32[Array, ""]


def num_after(optim: object, count: Count) -> Scalar:
    """The sum of the weights of all gradients after a number of steps."""
    b1 = _decay(optim, SimplifiedAdEMAMix, "b1", "num")
    if callable(b1):
        return _sum_after("b1", b1, count, lambda decay: jnp.ones((), float))
    _, complement = resolve_decay("b1", b1, count)
    return _weight(complement, count) / complement  # the geometric series


# The decay rate of the average that a weight belongs to.
_DECAYS = {"m1_weight": "b1", "m2_weight": "b3", "nu_weight": "b2"}


def weight_after(
    own: AbstractMomentState[Any], optim: object, weight: str, count: Count
) -> Scalar | None:
    """The weight of all values in an average after a number of steps, if our `own`
    state keeps it."""
    return None if getattr(own, weight) is None else new_weight(optim, weight, count)


def new_weight(optim: object, weight: str, count: Count) -> Scalar:
    """The weight of all values in an average of an optimizer after a number of
    steps."""
    name = _DECAYS[weight]
    decay = _decay(optim, AbstractMomentOptimizer, name, weight)
    if callable(decay):
        return _sum_after(name, decay, count, lambda decay: decay.complement)
    return _weight(resolve_decay(name, decay, count)[1], count)


def check_no_weights(
    state: AbstractMomentState[Any], names: Iterable[str] = tuple(_DECAYS)
) -> None:
    """Checks that a state has none of these weights, which optax does not keep."""
    for name in names:
        if getattr(state, name, None) is not None:
            raise ValueError(
                f"`state` has `{name}`, which optax's optimizers do not keep: their "
                "`b1` and `b2` are constant, and they do not correct `m2`. First "
                "convert the state for an `optim` like that: "
                "`state = change_state_format(state, optim, params)`."
            )


def _decay(optim: object, cls: type, name: str, weight: str) -> HyperParamOrSchedule:
    inner = unwrapped(optim)
    if not isinstance(inner, cls):
        raise ValueError(
            f"`optim` is {describe(optim)}, but `{weight}` is computed from the "
            f"`{name}` of the optimizer of this package, which cannot be read inside "
            "an optax optimizer. Convert with that optimizer itself, and put the "
            "result into the state of the optax optimizer with `eqx.tree_at`."
        )
    return getattr(inner, name)


def _weight(complement: Scalar, count: Count) -> Scalar:
    """`1 - b^t` for a constant decay rate."""
    steps = count.astype(float)
    weight = bias_factor(complement, jnp.maximum(steps, 1.0))
    return jnp.where(steps > 0, weight, 0.0)


def _sum_after(
    name: str,
    schedule: HyperParamOrSchedule,
    count: Count,
    new: Callable[[Decay], Scalar],
) -> Scalar:
    """The value of `total = b total + new` after a number of steps."""

    def step(t: Count, total: tuple[Scalar, Scalar]) -> tuple[Scalar, Scalar]:
        # The total is a sum of two floats, added without error (Knuth's TwoSum). In one
        # float32, it would stop growing when a step changes less than its last digit:
        # at b = 0.9999, five parts in ten thousand too early.
        _, complement = resolve_decay(name, schedule, t)
        b, (high, low) = Decay.of(complement), total
        kept, change = (
            b.kept * high,
            moving_sum(low, new(b) - b.pull * b.complement * high, b),
        )
        after = kept + change
        part = after - kept
        return after, (kept - (after - part)) + (change - part)

    zero = jnp.zeros((), float)
    high, low = lax.fori_loop(jnp.zeros_like(count), count, step, (zero, zero))
    return high + low
