"""Zeros that lie on the devices of other arrays."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from ._numerics import DTypeLike


def zeros_beside(like: Array, dtype: DTypeLike) -> Array:
    """Zeros with the shape and the sharding of an array.

    Under `jax.jit` with automatic mesh axes, JAX does not know the sharding of `like`,
    and XLA would replicate zeros. So they are computed from `like`, in a way that XLA
    does not see through: no number is both NaN and equal to itself.
    """
    if not isinstance(like, Tracer):
        return jnp.zeros_like(like, dtype=dtype)
    x = like.real
    return ((x != x) & (x == x)).astype(dtype)


def scalars_beside(
    arrays: Sequence[Array | jax.ShapeDtypeStruct],
) -> Callable[[DTypeLike], Array]:
    """A function from a dtype to a new scalar of zero, on all devices of the mesh that
    the arrays are on, if they are on one. On one device only, the first step would move
    it, and the second step would compile again."""
    concrete = [x for x in arrays if not isinstance(x, Tracer)]
    shardings = [getattr(x, "sharding", None) for x in concrete]
    meshes = [x.mesh for x in shardings if isinstance(x, NamedSharding)]
    if not meshes:
        return lambda dtype: jnp.zeros((), dtype)
    everywhere = NamedSharding(meshes[0], PartitionSpec())
    return lambda dtype: jax.device_put(jnp.zeros((), dtype), everywhere)


def is_explicit(sharding: object) -> bool:
    """Whether a sharding has explicit mesh axes. JAX before 0.5 has no such axes."""
    kinds = getattr(getattr(sharding, "mesh", None), "axis_types", None)
    return any(getattr(kind, "name", "") == "Explicit" for kind in kinds or ())
