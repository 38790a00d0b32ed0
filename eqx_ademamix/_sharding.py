"""How arrays are split over devices, and where to put new arrays next to others."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jaxtyping import Array

from ._typing import DTypeLike


# For each axis of an array, the mesh axes that it is split over.
Spec: TypeAlias = tuple[tuple[str, ...], ...]


def spec_of(sharding: NamedSharding, ndim: int) -> Spec:
    axes = tuple(_names(axis) for axis in sharding.spec)
    return axes + ((),) * (ndim - len(axes))


def partition_spec(spec: Spec) -> PartitionSpec:
    while spec and not spec[-1]:
        spec = spec[:-1]
    return PartitionSpec(*(x[0] if len(x) == 1 else x or None for x in spec))


def spec_text(spec: Spec) -> str:
    """A spec as reports print it."""
    return f"P({', '.join(map(repr, partition_spec(spec)))})"


def _names(axis: object) -> tuple[str, ...]:
    if isinstance(axis, str):
        return (axis,)
    return axis if isinstance(axis, tuple) else ()


def zeros_beside(like: Array, dtype: DTypeLike) -> Array:
    """Zeros with the shape and the sharding of an array.

    Under `jax.jit` with automatic mesh axes, JAX does not know the sharding of `like`,
    and XLA would replicate zeros. So they are computed from `like`, in a way that XLA
    does not see through: no number is both NaN and equal to itself.
    """
    if not isinstance(like, Tracer):
        return jnp.zeros_like(like, dtype=dtype)
    x = like.real
    if not jnp.issubdtype(x.dtype, jnp.floating):
        x = x.astype(np.float32)  # no integer is NaN, which XLA sees
    return ((x != x) & (x == x)).astype(dtype)


def scalars_beside(
    arrays: Sequence[Array | jax.ShapeDtypeStruct],
) -> Callable[[DTypeLike], Array]:
    """A function from a dtype to a new zero scalar, placed where a step on the arrays
    will put it. Otherwise the first step would move it, and the second step would
    compile again."""
    place = place_beside(arrays)
    return lambda dtype: zeros_at(place, (), dtype)


Place: TypeAlias = NamedSharding | SingleDeviceSharding | None


def zeros_at(place: Place, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    x = jnp.zeros(shape, dtype)
    return x if place is None else jax.device_put(x, place)


def place_beside(arrays: Iterable[object]) -> Place:
    """Where a step puts scalars: on all devices of the mesh that the arrays are on, or
    on the device that they were explicitly put on. `None` if there is no such place."""
    known = [x for x in arrays if not isinstance(x, Tracer)]
    for sharding in (getattr(x, "sharding", None) for x in known):
        if isinstance(sharding, NamedSharding):
            return NamedSharding(sharding.mesh, PartitionSpec())
    devices = {d for x in known if is_committed(x) for d in x.sharding.device_set}
    return SingleDeviceSharding(*devices) if len(devices) == 1 else None


def is_committed(x: object) -> TypeGuard[Array]:
    """Whether an array was explicitly put on its device, or computed from one that was.
    JAX may move any other."""
    # Before JAX 0.4.31, the attribute was private.
    return bool(getattr(x, "committed", getattr(x, "_committed", False)))


def in_sharding_of(x: Array, like: Array) -> Array:
    """`x` with the sharding of `like`, where JAX knows both: outside `jit`, and with
    explicit mesh axes."""
    if not isinstance(x, Tracer):
        known = not isinstance(like, Tracer) and isinstance(
            like.sharding, NamedSharding
        )
        moves = known and not x.sharding.is_equivalent_to(like.sharding, x.ndim)
        return jax.device_put(x, like.sharding) if moves else x
    sharding = known_sharding(like)
    if not is_explicit(sharding) or known_sharding(x) == sharding:
        return x
    return jax.sharding.reshard(x, sharding)


def on_every_device(x: Array) -> Array:
    """A small array with a copy on every device, where it is split over explicit mesh
    axes."""
    sharding = known_sharding(x)
    if not is_explicit(sharding) or not any(sharding.spec):
        return x
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec()))


def with_devices(sharding: Any) -> Any:
    """A sharding over the mesh of `jax.set_mesh` in place of the abstract mesh of a
    `jax.eval_shape`, if they are alike. Others are returned as they are."""
    if not is_abstract(sharding):
        return sharding
    get_mesh = getattr(jax.sharding, "get_mesh", None)
    mesh = get_mesh() if get_mesh else None
    if mesh is None or mesh.empty or mesh.abstract_mesh != sharding.mesh:
        return sharding
    return NamedSharding(mesh, sharding.spec, memory_kind=sharding.memory_kind)


def is_abstract(sharding: object) -> bool:
    """Whether a sharding has no devices, as `jax.eval_shape` gives it for arrays with
    explicit mesh axes."""
    return isinstance(sharding, NamedSharding) and not isinstance(sharding.mesh, Mesh)


def known_sharding(x: Array) -> Any:
    """The sharding in the type of an array. Inside `jit`, it has only explicit axes.
    `None` before JAX 0.6, where types have no shardings."""
    typeof = getattr(jax, "typeof", None)
    return getattr(typeof(x), "sharding", None) if typeof else None


def is_explicit(sharding: Any) -> bool:
    """Whether a sharding has explicit mesh axes. JAX before 0.5 has no such axes."""
    kinds = getattr(getattr(sharding, "mesh", None), "axis_types", None)
    return any(getattr(kind, "name", "") == "Explicit" for kind in kinds or ())
