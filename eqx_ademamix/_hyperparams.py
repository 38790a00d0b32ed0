"""Hyperparameters: checked where they are concrete, resolved at the counters."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ._checks import describe


Schedule: TypeAlias = Callable[..., Any]
HyperParam: TypeAlias = float | Float[Array, ""]
HyperParamOrSchedule: TypeAlias = HyperParam | Schedule


class Domain(NamedTuple):
    """The set of the legal values of a hyperparameter."""

    contains: Callable[[float], bool]
    text: str


finite = Domain(np.isfinite, "a finite number")
non_negative = Domain(lambda x: 0 <= x < np.inf, "a finite number >= 0")
decay = Domain(lambda x: 0 <= x < 1, "a number in [0, 1)")


def wide(x: Any) -> Array:
    """`x` in the widest float that is enabled, with a strong type."""
    return jnp.asarray(x).astype(float)


def is_zero(value: HyperParam) -> bool:
    """Whether a hyperparameter is known to be 0."""
    return not isinstance(value, jax.core.Tracer) and float(value) == 0


def is_schedule(value: Any) -> bool:
    return callable(value)


def hyperparam(name: str, value: Any, domain: Domain) -> Any:
    """Checks a hyperparameter and makes it a Python float (static under `filter_jit`)
    or a 0-d array of the default float (traced)."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(
        value, (int, float, np.integer, np.floating, np.ndarray, jax.Array)
    ):
        raise TypeError(
            f"`{name}` is {describe(value)}, but {domain.text} was expected: a Python "
            "number or an array of shape ()."
        )
    _check_scalar(name, value)
    if domain is decay:
        check_precision(name, value)
    if isinstance(value, jax.core.Tracer):
        return wide(value)
    number = float(value)  # 64 bits, whatever is enabled
    out = wide(value) if isinstance(value, (np.ndarray, jax.Array)) else number
    if not domain.contains(float(np.asarray(number, _default_float(out)))):
        raise ValueError(f"`{name}` is {number}, but {domain.text} was expected.")
    return out


def _default_float(value: Any) -> Any:
    return getattr(value, "dtype", np.float64)


def hyperparam_or_schedule(name: str, value: Any, domain: Domain) -> Any:
    return value if is_schedule(value) else hyperparam(name, value, domain)


def _check_scalar(name: str, value: Any) -> None:
    if jnp.shape(value) != ():
        raise ValueError(
            f"`{name}` has shape {jnp.shape(value)}, but a scalar was expected. For a "
            "sweep, build the optimizer from one value under `eqx.filter_vmap`."
        )
    if not (
        jnp.issubdtype(jnp.result_type(value), jnp.floating)
        or jnp.issubdtype(jnp.result_type(value), jnp.integer)
    ):
        raise TypeError(
            f"`{name}` has dtype {jnp.result_type(value)}, but a real number was "
            "expected."
        )


def check_precision(name: str, value: Any) -> None:
    dtype = getattr(value, "dtype", None)
    if dtype in (jnp.float16, jnp.bfloat16):
        raise ValueError(
            f"`{name}` is {describe(value)}, but a decay needs at least float32: "
            f"0.9999 rounds to 1 in {dtype}. Pass a Python float or a float32 array "
            "(in `optax.inject_hyperparams`, set `hyperparam_dtype=jnp.float32`)."
        )


def resolve(name: str, value: Any, count: Array) -> Float[Array, ""]:
    """The value of a hyperparameter at a counter: a 0-d array of the widest float."""
    if not is_schedule(value):
        return wide(value)
    out = value(count)
    if isinstance(out, bool) or not isinstance(
        out, (int, float, np.number, np.ndarray, jax.Array)
    ):
        raise TypeError(
            f"the schedule `{name}` returned {describe(out)}, but a real number was "
            "expected."
        )
    _check_scalar(f"{name}(count)", out)
    return wide(out)


def resolve_complement(name: str, value: Any, count: Array) -> Float[Array, ""]:
    """`1 - value` for a decay, from the widest numbers there are: cancellation would
    cost `1 - 0.999999` all but one of its digits in float32."""
    if isinstance(value, float):
        return wide(1.0 - value)
    if hasattr(value, "complement"):
        return resolve(f"{name}.complement", value.complement, count)
    return 1.0 - resolve(name, value, count)
