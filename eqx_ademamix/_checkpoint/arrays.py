"""Arrays: how they are stored, and how they are restored."""

from collections.abc import Hashable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._numerics import AnyArray
from .._paths import Node, with_article
from .._sharding import is_committed, with_devices
from .._typing import DType
from .file import DTYPES, Raw


# An array, or what takes its place in `like`.
ArrayLike: TypeAlias = AnyArray | jax.ShapeDtypeStruct


def is_array(x: Node) -> bool:
    return isinstance(x, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct))


class ArrayType(NamedTuple):
    """What an array must have in common with the one in the file."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{with_article(self.dtype)} array of shape {self.shape}"


def type_of(x: ArrayLike) -> ArrayType:
    return ArrayType(str(x.dtype) if is_key(x) else x.dtype.name, tuple(x.shape))


def is_key(x: ArrayLike) -> bool:
    return bool(jnp.issubdtype(x.dtype, jax.dtypes.prng_key))


def is_storable(x: ArrayLike) -> bool:
    """Whether it holds numbers, booleans, or PRNG keys, as JAX arrays do. A long double
    has different bits on different machines."""
    if is_key(x):
        return True
    is_added = x.dtype.isbuiltin == 2  # such as bfloat16, which is not built into NumPy
    return is_added or (x.dtype.kind in "biufc" and x.dtype.char not in "gG")


def is_enabled(x: ArrayLike) -> bool:
    """Whether JAX can make an array of that dtype: 64-bit types may be disabled."""
    return is_key(x) or jax.dtypes.canonicalize_dtype(x.dtype) == x.dtype


#
# To the file
#


def _raw_dtype(dtype: DType) -> DType:
    """How a dtype is stored: as itself or as unsigned integers with the same bits, and
    complex numbers as pairs of floats on a new last axis."""
    if dtype.kind == "c":
        return np.dtype(f"f{dtype.itemsize // 2}")
    return dtype if dtype.name in DTYPES else np.dtype(f"u{dtype.itemsize}")


def to_raw(x: Any) -> Raw:
    """An array as it is stored, on the host."""
    host = jax.device_get(jax.random.key_data(x) if is_key(x) else x)
    host = np.asarray(host, order="C")
    host = host.astype(host.dtype.newbyteorder("<"), copy=False)
    pairs = host[..., None] if host.dtype.kind == "c" else host
    return pairs.view(_raw_dtype(host.dtype))


def raw_type(like: ArrayLike) -> tuple[DType, tuple[int, ...]]:
    """The dtype and the shape of what `to_raw` returns."""
    data = jax.eval_shape(jax.random.key_data, like) if is_key(like) else like
    pair = (2,) if data.dtype.kind == "c" else ()
    return _raw_dtype(data.dtype.newbyteorder("<")), (*data.shape, *pair)


#
# From the file
#


def from_raw(raw: Raw, like: ArrayLike) -> AnyArray:
    """An array of the type of `like`, on its devices, in its own memory."""
    if is_key(like):
        keys = jax.random.wrap_key_data(jax.device_put(raw), impl=_impl_of(like))
        return jax.block_until_ready(_placed(keys, like))
    host = raw.view(like.dtype.newbyteorder("<")).reshape(like.shape)
    if isinstance(like, (np.ndarray, np.generic)):
        host = host.astype(like.dtype, copy=False)
        return host if isinstance(like, np.ndarray) else host[()]
    array = _as_weak(host) if getattr(like, "weak_type", False) else host
    return jax.block_until_ready(_placed(array, like))  # `raw` is no longer needed


def _placed(x: Any, like: Any) -> Array:
    """An array with the sharding of another one, which a jitted call may overwrite. It
    is copied, because JAX can leave an array in NumPy's memory, and donating that has
    crashed some versions."""
    sharding = with_devices(like.sharding)
    if sharding is None or _may_move(like):
        return jax.device_put(x).copy()
    array = (
        jax.device_put(x, sharding)
        if sharding.is_fully_addressable
        else jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])
    )
    return jax.device_put(
        array.copy(), sharding
    )  # a copy may have an equivalent sharding


def _may_move(x: Any) -> bool:
    """Whether JAX may move an array, for example to compute with sharded ones."""
    default = jax.device_put(np.zeros((), bool)).sharding
    return x.sharding == default and not is_committed(x)


def _as_weak(x: np.ndarray) -> AnyArray:
    """An array with a weak type, which it gets from the Python number that it
    overwrites."""
    zeros = jnp.full_like(jnp.asarray(x.dtype.type(0).item()), 0, shape=x.shape)
    return zeros.at[...].set(x) if zeros.dtype == x.dtype else x


def _impl_of(like: Any) -> Hashable:
    """The implementation of a PRNG key, or of a `jax.ShapeDtypeStruct` of keys."""
    found: list[Hashable] = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), like)
    return found[0]
