"""Hyperparameters: checked where they are concrete, resolved at the counters."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Real

from ._checks import describe


Schedule: TypeAlias = Callable[..., Any]
HyperParam: TypeAlias = float | Float[Array, ""]
HyperParamOrSchedule: TypeAlias = HyperParam | Schedule
# What is accepted for them.
HyperParamLike: TypeAlias = (
    float | np.number[Any] | Real[Array, ""] | Real[np.ndarray, ""]
)
HyperParamLikeOrSchedule: TypeAlias = HyperParamLike | Schedule


class Domain(NamedTuple):
    """The set of the legal values of a hyperparameter."""

    contains: Callable[[float], bool]
    text: str


finite = Domain(math.isfinite, "a finite number")
non_negative = Domain(lambda x: 0 <= x < np.inf, "a finite number >= 0")
decay = Domain(lambda x: 0 <= x < 1, "a number in [0, 1)")


def wide(x: Any) -> Array:
    """`x` in the widest float that is enabled, with a strong type."""
    return jnp.asarray(x).astype(float)


def is_zero(value: HyperParam) -> bool:
    """Whether a hyperparameter is known to be 0."""
    return not isinstance(value, Tracer) and float(value) == 0


def is_schedule(value: Any) -> bool:
    return callable(value)


def hyperparam(name: str, value: Any, domain: Domain) -> Any:
    """Checks a hyperparameter and makes it a Python float (static under `filter_jit`)
    or a 0-d array of the default float (traced)."""
    check_real_scalar(name, value, domain.text)
    if domain is decay:
        _check_precision(name, value)
    if isinstance(value, Tracer):
        return wide(value)
    is_array = isinstance(value, (np.ndarray, jax.Array))
    number, used = _number(value), _number(value, jnp.result_type(float))
    # What counts is the value as it will be used: 1e39 is infinite in float32, and
    # 1 - 1e-9 is 1. But of a Python number for a decay, `1 - decay` is used.
    if not domain.contains(number if domain is decay and not is_array else used):
        is_rounding = domain.contains(number)
        as_used = f" ({used} in {jnp.result_type(float)})" if is_rounding else ""
        raise ValueError(
            f"`{name}` is {number}{as_used}, but {domain.text} was expected. Pass a "
            "value in that range."
        )
    return wide(value) if is_array else number


def _number(value: Any, dtype: Any = np.float64) -> float:
    with np.errstate(over="ignore"):
        try:
            return float(np.asarray(value, np.float64).astype(dtype))
        except OverflowError:  # of a Python int
            return math.inf


def hyperparam_or_schedule(name: str, value: Any, domain: Domain) -> Any:
    return value if is_schedule(value) else hyperparam(name, value, domain)


def resolve(name: str, value: Any, count: Array) -> Float[Array, ""]:
    """The value of a hyperparameter at a counter: a 0-d array of the widest float."""
    out = value(count) if is_schedule(value) else value
    check_real_scalar(f"{name}(count)" if is_schedule(value) else name, out)
    return wide(out)


def resolve_complement(name: str, value: Any, count: Array) -> Float[Array, ""]:
    """`1 - value` for a decay, from the widest numbers there are: cancellation would
    cost `1 - 0.999999` all but one of its digits in float32."""
    if hasattr(value, "complement"):
        return resolve(f"{name}.complement", value.complement, count)
    out = value(count) if is_schedule(value) else value
    if isinstance(out, float):
        return wide(1.0 - out)
    return 1.0 - _resolved_decay(name, value, out)


def resolve_decay(name: str, value: Any, count: Array) -> Float[Array, ""]:
    """As `resolve`, for a decay, which must not have been rounded to 16 bits."""
    return _resolved_decay(name, value, value(count) if is_schedule(value) else value)


def _resolved_decay(name: str, value: Any, out: Any) -> Float[Array, ""]:
    name = f"{name}(count)" if is_schedule(value) else name
    _check_precision(name, out)
    check_real_scalar(name, out)
    return wide(out)


def decay_complement(name: str, value: Any) -> Float[Array, ""]:
    """`1 - value` for a decay that a caller gives as it is, checked."""
    checked = hyperparam(name, value, decay)
    return wide(1.0 - checked if isinstance(checked, float) else 1.0 - wide(checked))


_REAL = (int, float, np.integer, np.floating, np.ndarray, jax.Array)


def check_real_scalar(name: str, value: Any, expected: str = "a real number") -> None:
    is_bool = isinstance(value, (bool, np.bool_))
    if is_bool or not isinstance(value, _REAL):
        raise TypeError(
            f"`{name}` is {describe(value)}, but {expected} was expected: a Python "
            "number or an array of shape ()."
        )
    if not isinstance(value, (np.ndarray, jax.Array)):
        return
    if value.shape != ():
        raise ValueError(
            f"`{name}` has shape {value.shape}, but a scalar was expected. For a "
            "sweep, build and use the optimizer under `eqx.filter_vmap`."
        )
    if not any(jnp.issubdtype(value.dtype, kind) for kind in (np.integer, np.floating)):
        raise TypeError(
            f"`{name}` has dtype {value.dtype}, but a real number was expected: pass a "
            "floating-point array."
        )


def _check_precision(name: str, value: Any) -> None:
    dtype = getattr(value, "dtype", None)
    is_float = dtype is not None and jnp.issubdtype(dtype, jnp.floating)
    if is_float and jnp.finfo(dtype).bits < 32:
        raise ValueError(
            f"`{name}` is {describe(value)}, but a decay needs at least float32: "
            f"0.9999 rounds to 1 in {dtype}. Pass a Python float or a float32 array "
            "(in `optax.inject_hyperparams`, set `hyperparam_dtype=jnp.float32`)."
        )
