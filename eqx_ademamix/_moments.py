"""Arithmetic on moments: moving averages and bias correction.

Decays are always given by their complement, `1 - decay`, which is the number that
carries the precision: 0.9999 has four significant digits of it in float32.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array


def times(factor: Array, x: Array) -> Array:
    """`factor * x` for a real factor and a real or complex `x`, of one precision."""
    return _componentwise(lambda part: factor * part, x)


def over(x: Array, divisor: Array) -> Array:
    """`x / divisor` for a real divisor and a real or complex `x`, of one precision."""
    return _componentwise(lambda part: part / divisor, x)


def _componentwise(fn: Callable[[Array], Array], x: Array) -> Array:
    if jnp.iscomplexobj(x):
        return lax.complex(fn(x.real), fn(x.imag))
    return fn(x)


def abs_squared(x: Array) -> Array:
    """$|x|^2$, real also for complex `x`. Where the square of a finite number overflows
    it is the largest finite number, since an infinite average never comes back."""
    if jnp.iscomplexobj(x):
        square = jnp.square(x.real) + jnp.square(x.imag)
    else:
        square = jnp.square(x)
    largest = jnp.asarray(jnp.finfo(square.dtype).max, square.dtype)
    return jnp.where(jnp.isfinite(x), jnp.minimum(square, largest), square)


def moving_average(average: Array, value: Array, complement: Array) -> Array:
    """`decay * average + (1 - decay) * value`, given `1 - decay`."""
    return average + times(complement, value - average)


def bias_factor(complement: Array, count: Array) -> Array:
    r"""$1 - \beta^t$, given $1 - \beta$ and $t \ge 1$, without cancellation."""
    return -jnp.expm1(count * jnp.log1p(-complement))
