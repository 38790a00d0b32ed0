"""Guards: they limit a step or skip it."""

from collections.abc import Sequence
from typing import TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Inexact, Int32

from ._memory import varying_axes
from ._numerics import clip_magnitude, over, saturated, times


T = TypeVar("T")
# Whether a step is taken. `None` if no step can be skipped.
Taken: TypeAlias = Bool[Array, ""] | None


#
# The slow average
#


def limited_ratio(
    m2: Inexact[Array, "..."], nu: Float[Array, "..."], ratio: Float[Array, ""]
) -> Inexact[Array, "..."]:
    r"""The slow average, clipped in magnitude to $r \sqrt{\nu}$."""
    # The derivative of a root at 0 is infinite, and here it would be multiplied by 0.
    is_positive = nu > 0
    root = jnp.sqrt(jnp.where(is_positive, nu, 1.0))
    return clip_magnitude(m2, ratio * jnp.where(is_positive, root, 0.0))


#
# The direction of a leaf
#


def limited_rms(
    u: Inexact[Array, "..."], limit: Float[Array, ""]
) -> Inexact[Array, "..."]:
    r"""$u \min(1, c / \text{RMS}(u))$ for a finite $u$. NaNs count as 0, so they do not
    spread.

    The squares of large numbers overflow, so with $s$ the largest magnitude of a part,
    it is $(u / s) \min(s, c / \text{RMS}(u / s))$. The result does not depend on $s$,
    so neither does its derivative.
    """
    if u.size == 0:
        return u
    parts = [u.real, u.imag] if jnp.iscomplexobj(u) else [u]
    parts = [jnp.where(jnp.isnan(part), 0.0, part) for part in parts]
    largest = lax.stop_gradient(_largest(parts))
    scale = jnp.where(largest > 0, largest, 1.0)
    squares = sum(jnp.mean(jnp.square(part / scale)) for part in parts)
    root = jnp.sqrt(jnp.where(largest > 0, squares, 1.0))
    target = saturated(limit / root)
    return jnp.where(largest > target, times(target, over(u, scale)), u)


def _largest(parts: list[Array]) -> Float[Array, ""]:
    first, *rest = (jnp.max(jnp.abs(part)) for part in parts)
    return jnp.maximum(first, *rest) if rest else first


#
# Steps that are skipped
#


def is_taken(
    grads: Sequence[Inexact[Array, "..."]], count: Int32[Array, ""]
) -> Bool[Array, ""]:
    """Whether all gradients are finite. Inside `jax.shard_map`, devices that share the
    step counter make the same decision, if JAX tracks what they share (`check_vma`)."""
    flag = _all_finite(list(grads))
    axes = tuple(varying_axes(flag) - varying_axes(count))
    return lax.pmin(flag.astype(jnp.int32), axes) > 0 if axes else flag


@jax.jit
def _all_finite(grads: list[Array]) -> Bool[Array, ""]:
    flags = [jnp.all(jnp.isfinite(g)) for g in grads]
    return jnp.all(jnp.stack(flags)) if flags else jnp.ones((), bool)


def chosen(taken: Taken, new: T, old: T) -> T:
    """The new value if the step is taken; otherwise the old one, bit for bit."""
    if taken is None:
        return new
    return jax.tree.map(lambda x, y: jnp.where(taken, x, y), new, old)


def update_if(taken: Taken, update: Array) -> Array:
    """The update of a leaf if the step is taken, otherwise 0. The 0 is negative: a
    positive 0 would turn a parameter of -0 into 0."""
    return update if taken is None else chosen(taken, update, -jnp.zeros_like(update))
