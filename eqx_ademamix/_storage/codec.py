"""Codecs: how a moment is stored between two steps, and how it is read back."""

import abc
import functools as ft
import math
from typing import Any, NamedTuple, TypeAlias, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float, UInt32

from .._numerics import complex_dtype, compute_dtype, rounded, seed_of
from .._paths import AbstractLeaf, describe
from .._sharding import place_beside, zeros_at, zeros_beside
from .._typing import DType, DTypeLike, no_type_check


Struct: TypeAlias = jax.ShapeDtypeStruct


class Encoded(AbstractLeaf):
    """A moment as a codec stores it. In a state, it takes the place of an array.

    **Attributes:**

    - `codec`: the [`eqx_ademamix.AbstractCodec`][] that made it.
    - `real`: the arrays that the codec made from the moment, or from its real part. The
        first one has the shape of the moment.
    - `imag`: the arrays for the imaginary part of a complex moment, otherwise `None`.
    """

    codec: "AbstractCodec" = eqx.field(static=True)
    real: tuple[Array, ...]
    imag: tuple[Array, ...] | None

    # Equinox's own makes a module of each method, and an encoded moment has none.
    # Without it, a state with many leaves is flattened several times as fast.
    __getattribute__ = object.__getattribute__

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the moment."""
        return getattr(self.real[0] if self.real else None, "shape", ())

    @property
    def dtype(self) -> np.dtype[np.inexact]:
        """The dtype that decoding gives: float32 or complex64."""
        return np.dtype(np.float32 if self.imag is None else np.complex64)

    @property
    def kind(self) -> str:
        return f"{type(self.codec).__name__} moment"


# What a state holds for one moment of one parameter.
Stored: TypeAlias = Array | Encoded


class AbstractCodec(eqx.Module):
    r"""How a moment is stored.

    [`eqx_ademamix.Dense`][] stores a plain array. All other codecs store an
    [`eqx_ademamix.Encoded`][]. To write your own codec, implement `encode_real` and
    `decode_real`, for real arrays, and `for_squares`. A complex moment is stored as two
    real ones.

    !!! Example

        ```python
        import jax
        import jax.numpy as jnp
        import eqx_ademamix

        codec = eqx_ademamix.ScaledFloat16()
        stored = codec.encode(jnp.linspace(-1.0, 1.0, 512), jax.random.key(0))
        assert stored.shape == (512,) and codec.bytes_per_parameter((512,)) < 2.1
        assert jnp.allclose(codec.decode(stored)[-1], 1.0, rtol=2**-11)
        ```
    """

    @abc.abstractmethod
    def encode_real(
        self, value: Float[Array, "..."], seed: UInt32[Array, ""] | None
    ) -> tuple[Array, ...]:
        """Encodes a float32 array.

        **Arguments:**

        - `value`: float32, of any shape.
        - `seed`: the seed of random rounding, or `None` to round to nearest.

        **Returns:**

        A tuple of arrays. The first one has the shape of `value`. Arrays of zeros must
        represent a `value` of zeros.
        """

    @abc.abstractmethod
    def decode_real(self, parts: tuple[Array, ...]) -> Float[Array, "..."]:
        """Decodes what `encode_real` made.

        **Arguments:**

        - `parts`: the tuple of arrays.

        **Returns:**

        A float32 array.
        """

    @abc.abstractmethod
    def for_squares(self) -> "AbstractCodec":
        """The codec to use for `nu`, which is never negative. If a small number in it
        became zero, an update would explode.

        **Returns:**

        A codec that decodes no positive normal float32 number to zero.
        """

    @no_type_check
    def encode(self, value: Array, key: Any = None) -> Stored:
        """Encodes a moment.

        **Arguments:**

        - `value`: a real or complex array, of any shape.
        - `key`: a PRNG key, or any array of integers, which random rounding depends on:
            the same key gives the same codes. `None` rounds to nearest.

        **Returns:**

        What the state holds in place of the moment. A number that is not finite stays
        so, and may make the other numbers in its block nonfinite too.
        """
        if isinstance(self, Dense):
            return rounded(value, dense_dtype(self.dtype, value.dtype))
        seed = None if key is None else seed_of(key)
        if not jnp.iscomplexobj(value):
            return Encoded(self, self.encode_real(_as_float32(value), seed), None)
        other = None if seed is None else seed_of(seed)
        return Encoded(
            self,
            self.encode_real(_as_float32(value.real), seed),
            self.encode_real(_as_float32(value.imag), other),
        )

    @no_type_check
    def decode(self, stored: Stored) -> Array:
        """Decodes a moment.

        **Arguments:**

        - `stored`: what `encode` or `zeros` returned.

        **Returns:**

        A float32 or complex64 array. For a [`eqx_ademamix.Dense`][], the array itself.
        """
        if not isinstance(stored, Encoded):
            return stored
        real = self.decode_real(stored.real)
        if stored.imag is None:
            return real
        return lax.complex(real, self.decode_real(stored.imag))

    @no_type_check
    def zeros(self, like: Array) -> Stored:
        """A moment of zeros.

        **Arguments:**

        - `like`: an array. The moment gets its shape and its sharding.

        **Returns:**

        What the state holds in place of the moment.
        """
        if isinstance(self, Dense):
            return zeros_beside(like, dense_dtype(self.dtype, like.dtype))
        first, *rest = part_structs(self, like.shape)

        def parts() -> tuple[Array, ...]:
            codes = zeros_beside(like, first.dtype)
            if _is_sharded(like):
                return codes, *_zeros_beside(self, like)
            place = place_beside([like])
            return codes, *(zeros_at(place, x.shape, x.dtype) for x in rest)

        return Encoded(self, parts(), parts() if jnp.iscomplexobj(like) else None)

    @no_type_check
    def bytes_per_parameter(self, shape: tuple[int, ...]) -> float:
        """The bytes that a real float32 moment takes per entry, including scales.

        **Arguments:**

        - `shape`: the shape of the parameter.

        **Returns:**

        The number of bytes divided by the number of entries, NaN for an empty array.
        """
        structs = part_structs(self, tuple(shape))
        total = sum(x.size * x.dtype.itemsize for x in structs)
        size = math.prod(shape)
        return total / size if size else math.nan


class Bounds(NamedTuple):
    """Upper bounds of the magnitudes in each block of a moment, and in each block of
    the gradient that was just added to it."""

    moment: Array
    gradient: Array


class AbstractBounded(AbstractCodec):
    """A codec that encodes a moment in one pass if it gets bounds. Without them, all of
    the moment would be computed twice: first for the largest number of each block, then
    for the codes."""

    block_size: eqx.AbstractVar[int]

    @abc.abstractmethod
    def largest(self, x: Array) -> Float[Array, "..."]:
        """The largest magnitudes in the parts of each block of an array. The last axis
        has the parts."""

    @abc.abstractmethod
    def bound(self, parts: tuple[Array, ...]) -> Float[Array, "..."]:
        """The bound of each block that an array was encoded with, with one more axis of
        size one."""

    @abc.abstractmethod
    def holds_blocks(self, shape: tuple[int, ...], shard: tuple[int, ...]) -> bool:
        """Whether shards of this shape hold whole blocks."""

    @abc.abstractmethod
    def encode_bounded(
        self, value: Array, bounds: Bounds, old: tuple[Array, ...], seed: Array
    ) -> tuple[Array, ...]:
        """Encodes a float32 array. `old` is what was encoded before it."""


class Dense(AbstractCodec):
    r"""A plain array of a dtype, rounded to nearest.

    float32 is a lower bound: the moments of a float64 parameter are float64. A complex
    parameter has complex moments, at least complex64, and a real `nu`. A finite number
    stays finite when it is rounded.

    The update is computed from a moment before it is rounded, as in optax.

    !!! Example

        ```python
        import jax.numpy as jnp
        import eqx_ademamix

        dense = eqx_ademamix.Dense(jnp.bfloat16)
        assert dense.zeros(jnp.ones(3)).dtype == jnp.bfloat16
        assert eqx_ademamix.StateFormat.float32().m2 == eqx_ademamix.Dense("float32")
        ```
    """

    dtype: DType = eqx.field(static=True)

    @no_type_check
    def __init__(self, dtype: DTypeLike):
        """**Arguments:**

        - `dtype`: float16, bfloat16, float32, or float64. The last only if JAX has
            64-bit types enabled.

        **Raises:**

        - `ValueError`: for any other dtype.
        """
        self.dtype = storable("dtype", dtype)

    @no_type_check
    def encode_real(self, value: Array, seed: Array | None) -> tuple[Array, ...]:
        """See [`eqx_ademamix.AbstractCodec`][]."""
        return (rounded(value, dense_dtype(self.dtype, value.dtype)),)

    @no_type_check
    def decode_real(self, parts: tuple[Array, ...]) -> Array:
        """See [`eqx_ademamix.AbstractCodec`][]."""
        return parts[0].astype(compute_dtype(parts[0].dtype))

    @no_type_check
    def for_squares(self) -> "Dense":
        """See [`eqx_ademamix.AbstractCodec`][]."""
        return self


def dense_dtype(dtype: DType, param: DType) -> DType:
    """The dtype of the dense moments of a parameter. (A function, since Equinox makes a
    module of each bound method, which takes longer than the rest of the checks.)"""
    real = compute_dtype(param) if dtype == np.float32 else dtype
    return complex_dtype(real) if param.kind == "c" else real


_STORABLE = ("float16", "bfloat16", "float32", "float64")


def storable(name: str, value: object) -> DType:
    try:
        dtype = None if value is None else jnp.dtype(cast(Any, value))
    except TypeError:
        dtype = None
    if dtype is None or dtype.name not in _STORABLE:
        raise ValueError(
            f"`{name}` is {describe(value)}, but one of the dtypes "
            f"{', '.join(_STORABLE)} was expected."
        )
    if dtype == np.float64 and jnp.result_type(float) != dtype:
        raise ValueError(
            f"`{name}` is float64, but JAX has 64-bit types disabled. "
            'Enable them with `jax.config.update("jax_enable_x64", True)`.'
        )
    return dtype


#
# Stored leaves
#


def is_encoded(x: object) -> bool:
    return isinstance(x, Encoded)


def decode(stored: Stored) -> Array:
    """A moment as an array, however it is stored."""
    return _decode(stored) if isinstance(stored, Encoded) else stored


def encode_like(value: Array, like: Stored) -> Stored:
    """Stores a moment in the same way as another, rounded to nearest."""
    if isinstance(like, Encoded):
        return _encode(like.codec, value)
    return rounded(value, like.dtype)


# Outside of `jit`, these compile one program for each type of leaf instead of one for
# each operation.
@ft.partial(jax.jit, inline=True)
def _decode(stored: Encoded) -> Array:
    return stored.codec.decode(stored)


@ft.partial(jax.jit, static_argnums=0, inline=True)
def _encode(codec: AbstractCodec, value: Array) -> Stored:
    return codec.encode(value)


def store(
    value: Array, like: Stored, seed: UInt32[Array, ""], bounds: Bounds | None
) -> tuple[Array, Stored]:
    """Stores a moment in the same way as another. Returns what the update is computed
    from, and what is stored. `bounds` are for a codec that takes them.

    With a codec, the update uses what is read back. An update from the exact value
    would need the old codes after they are overwritten, so XLA on CPUs would copy all
    of them. With a dense array, the update uses the value before it is rounded, as in
    optax."""
    if not isinstance(like, Encoded):
        return value, rounded(value, like.dtype)
    stored = (
        like.codec.encode(value, seed)
        if bounds is None
        else _encoded_within(bounds, value, like, seed)
    )
    return _read_back(value, decode(stored).astype(value.dtype)), stored


def _encoded_within(
    bounds: Bounds, value: Array, like: Encoded, seed: UInt32[Array, ""]
) -> Encoded:
    codec = cast(AbstractBounded, like.codec)
    encode = lambda x, old, seed: codec.encode_bounded(
        _as_float32(x), bounds, old, seed
    )
    if like.imag is None:
        return Encoded(codec, encode(value, like.real, seed), None)
    return Encoded(
        codec,
        encode(value.real, like.real, seed),
        encode(value.imag, like.imag, seed_of(seed)),
    )


@jax.custom_jvp
def _read_back(value: Array, decoded: Array) -> Array:
    """The decoded value, with the derivative of the value that was encoded: the
    derivative of rounding is zero, so the update's would silently be zero too."""
    return decoded


@_read_back.defjvp
def _read_back_jvp(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    return primals[1], tangents[0]


def misfit(
    stored: Stored, codec: AbstractCodec, param: Struct
) -> tuple[str, str] | None:
    """How a moment is stored and how a codec would store it for a parameter of this
    shape and dtype, if the two are not the same."""
    if isinstance(codec, Dense):
        dtype = dense_dtype(codec.dtype, param.dtype)
        fits = not isinstance(stored, Encoded) and stored.dtype == dtype
        return None if fits else (_stored_as(stored, param), str(dtype))
    found, expected = _stored_as(stored, param), str(codec)
    return None if found == expected else (found, expected)


def _stored_as(stored: Stored, param: Struct) -> str:
    """How a moment is stored, including its arrays if they are not as they should
    be."""
    if not isinstance(stored, Encoded):
        return str(stored.dtype)
    text = str(stored.codec)
    is_complex = bool(jnp.issubdtype(param.dtype, jnp.complexfloating))
    arrays = _types(stored.real) + _types(stored.imag or ())
    wanted = _types(part_structs(stored.codec, stored.shape))
    if arrays == wanted * (1 + is_complex):
        return text
    return f"{text} with the arrays {', '.join(arrays)}"


def _types(arrays: tuple[Any, ...]) -> list[str]:
    shapes = [list(getattr(x, "shape", "")) for x in arrays]
    dtypes = [getattr(x, "dtype", None) for x in arrays]
    return [f"{dtype}{shape}" for dtype, shape in zip(dtypes, shapes, strict=True)]


@ft.cache
def part_structs(codec: AbstractCodec, shape: tuple[int, ...]) -> tuple[Struct, ...]:
    """The shapes and dtypes of the arrays that a codec makes from a real array."""
    value = jax.ShapeDtypeStruct(shape, np.float32)
    seed = jax.ShapeDtypeStruct((), np.uint32)
    parts = jax.eval_shape(codec.encode_real, value, seed)
    if not (isinstance(parts, tuple) and parts and parts[0].shape == shape):
        raise TypeError(
            f"`{type(codec).__name__}.encode_real` returned {describe(parts)} for an "
            f"array of shape {shape}, but a tuple was expected whose first array has "
            "that shape."
        )
    return parts


def holds_blocks(
    codec: AbstractCodec, shape: tuple[int, ...], shard: tuple[int, ...]
) -> bool:
    """Whether shards of this shape hold everything that their entries are encoded and
    decoded with. For a codec that does not say, this is known if all of its arrays have
    the axes that are split."""
    if isinstance(codec, AbstractBounded):
        return codec.holds_blocks(shape, shard)
    split = [
        i for i, (n, part) in enumerate(zip(shape, shard, strict=True)) if n > part
    ]
    parts = part_structs(codec, shape)
    return all(x.shape[i : i + 1] == shape[i : i + 1] for x in parts for i in split)


def _as_float32(x: Array) -> Array:
    """`x` in float32. A finite float64 number stays finite."""
    if x.dtype != np.float64:
        return x.astype(np.float32)
    largest = float(np.finfo(np.float32).max)
    return jnp.where(jnp.isinf(x), x, jnp.clip(x, -largest, largest)).astype(np.float32)


#
# Shardings
#


def _is_sharded(x: Array) -> bool:
    """Whether an array is, or may be, on several devices, in which case the parts of a
    state must not change their sharding from `init` to `update`."""
    return isinstance(x, Tracer) or len(x.sharding.device_set) > 1


@ft.partial(jax.jit, static_argnums=0)
def _zeros_beside(codec: AbstractCodec, like: Array) -> list[Array]:
    """Zeros for all parts but the first, sharded as `encode_real` shards them."""
    parts = codec.encode_real(zeros_beside(like, np.float32), None)
    return [zeros_beside(x, x.dtype) for x in parts[1:]]
