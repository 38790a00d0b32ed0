"""Codecs: moments in one, two or three bytes a parameter."""

import abc
import functools as ft
import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int32, UInt32

from ._checks import describe, no_type_check
from ._encoded import Encoded


class AbstractCodec(eqx.Module):
    r"""How a moment is stored in fewer bytes than float32 takes.

    A codec of one's own says in `encode_real` and `decode_real` what becomes of a real
    array. Complex moments are stored as two of them.

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
        - `seed`: what random rounding depends on, or `None` to round to nearest.

        **Returns:**

        A tuple of arrays, the first of them of the shape of `value`. Arrays of zeros
        must stand for a `value` of zeros.
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
        """The codec to use for `nu`, which is never negative, and where a small number
        that became zero would make an update explode.

        **Returns:**

        A codec that decodes no positive normal number of float32 to zero.
        """

    @no_type_check
    def encode(self, value: Array, key: Any = None) -> Encoded:
        """Encodes a moment.

        **Arguments:**

        - `value`: a real or complex array, of any shape.
        - `key`: a PRNG key, or any array of integers, which random rounding depends on:
            the same key, the same codes. `None` rounds to nearest.

        **Returns:**

        What stands in the state in the moment's place. An array that is not finite
        stays so, and may take others of its block with it.
        """
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
    def decode(self, stored: Encoded) -> Array:
        """Decodes a moment.

        **Arguments:**

        - `stored`: what `encode` or `zeros` returned.

        **Returns:**

        A float32 or complex64 array.
        """
        real = self.decode_real(stored.real)
        if stored.imag is None:
            return real
        return lax.complex(real, self.decode_real(stored.imag))

    @no_type_check
    def zeros(self, like: Array) -> Encoded:
        """A moment of zeros.

        **Arguments:**

        - `like`: an array, whose shape and sharding the moment gets.

        **Returns:**

        What stands in the state in the moment's place.
        """
        first, *rest = part_structs(self, like.shape)

        def parts() -> tuple[Array, ...]:
            codes = jnp.zeros_like(like, dtype=first.dtype)
            if _has_typed_sharding(like):
                return codes, *_zeros_beside(self, like)
            return codes, *(jnp.zeros(x.shape, x.dtype) for x in rest)

        return Encoded(self, parts(), parts() if jnp.iscomplexobj(like) else None)

    @no_type_check
    def bytes_per_parameter(self, shape: tuple[int, ...]) -> float:
        """The bytes that a real moment takes, scales and all, per entry.

        **Arguments:**

        - `shape`: the shape of the parameter.

        **Returns:**

        The number of bytes over the number of entries, NaN for an empty array.
        """
        structs = part_structs(self, tuple(shape))
        total = sum(x.size * x.dtype.itemsize for x in structs)
        size = math.prod(shape)
        return total / size if size else math.nan


def _has_typed_sharding(x: Any) -> bool:
    """Whether the sharding is a part of the array's type, in which the parts of a state
    must not change from `init` to `update`."""
    return isinstance(x, Tracer) or _is_explicit(getattr(x, "sharding", None))


def _is_explicit(sharding: Any) -> bool:
    kinds = getattr(getattr(sharding, "mesh", None), "axis_types", None)
    return any(getattr(kind, "name", "") == "Explicit" for kind in kinds or ())


@ft.partial(jax.jit, static_argnums=0)
def _zeros_beside(codec: AbstractCodec, like: Array) -> list[Array]:
    """Zeros for all parts but the first, sharded as `encode_real` shards them."""
    parts = codec.encode_real(jnp.zeros_like(like, dtype=np.float32), None)
    return [jnp.zeros_like(x) for x in parts[1:]]


@ft.cache
def part_structs(codec: AbstractCodec, shape: tuple[int, ...]) -> tuple[Any, ...]:
    """The shapes and dtypes of the arrays that a codec makes of a real array."""
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


def _as_float32(x: Array) -> Array:
    """`x` in float32. A finite number of float64 stays finite."""
    if x.dtype != np.float64:
        return x.astype(np.float32)
    largest = float(np.finfo(np.float32).max)
    return jnp.where(jnp.isinf(x), x, jnp.clip(x, -largest, largest)).astype(np.float32)


#
# Random numbers: a hash of a seed and of the position in the array, which costs less
# than a generator, asks for nothing of other devices, and repeats bit for bit.
#


def seed_of(key: Any) -> UInt32[Array, ""]:
    """A seed from a PRNG key or from integers. It is odd, hence not 0, which stands for
    no randomness."""
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.key_data(key)
    words = key if isinstance(key, tuple) else jnp.ravel(jnp.asarray(key))
    seed = jnp.zeros((), np.uint32)
    for word in words:
        seed = _mixed(seed * _GOLDEN + jnp.asarray(word).astype(np.uint32) + _GOLDEN)
    return seed | np.uint32(1)


def uniform(seed: Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Numbers in [0, 1), one for each position, as float32."""
    position = jnp.zeros(shape, np.uint32)
    for axis, stride in enumerate(_strides(shape)):
        position += lax.broadcasted_iota(np.uint32, shape, axis) * np.uint32(stride)
    word = _mixed(position * _GOLDEN + seed)
    return (word >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)


def up_or_down(x: Array, chance: Any) -> Array:
    """Rounds to an integer: up if the fraction exceeds a number in [0, 1), else down.
    Over random numbers the mean is `x`."""
    below = jnp.floor(x)
    return jnp.where(x - below > chance, below + 1, below)


def _strides(shape: tuple[int, ...]) -> list[int]:
    return [math.prod(shape[axis + 1 :]) % 2**32 for axis in range(len(shape))]


def _mixed(x: Array) -> Array:
    """The last mixing steps of MurmurHash3, in which every bit of the input acts on
    every bit of the output."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


_GOLDEN = np.uint32(0x9E3779B9)  # 2^32 over the golden ratio


#
# Floating-point numbers of 8 and 16 bits, whose exponents count down from that of the
# largest number in the block
#


class _Grid(NamedTuple):
    """The numbers that codes of one kind stand for. Between two powers of two there are
    `steps` of them, evenly spaced; the code `top` would be the next power of two above
    the largest number of the block. A signed grid goes on from its lowest power of two
    in even steps to the code 0, which is zero; an unsigned one ends there with the code
    1, below which there is nothing but zero."""

    dtype: Any
    top: int
    steps: int
    is_signed: bool
    is_dithered: bool


_SIGNED = {
    8: _Grid(np.int8, 125, 5, is_signed=True, is_dithered=False),
    16: _Grid(np.int16, 32760, 1260, is_signed=True, is_dithered=True),
}
_UNSIGNED = {
    8: _Grid(np.uint8, 255, 6, is_signed=False, is_dithered=False),
    16: _Grid(np.uint16, 65535, 1024, is_signed=False, is_dithered=False),
}

_BINADE = 1 << 23  # the float32 bit patterns from one power of two to the next
_SMALLEST = np.int32(_BINADE)  # the pattern of the smallest normal number
_LARGEST = np.int32(0x7F7FFFFF)
_INFINITY = np.int32(0x7F800000)
_NOT_FINITE = 255  # an exponent


class AbstractScaled(AbstractCodec):
    """A codec whose codes are places on a grid of floating-point numbers."""

    block_size: eqx.AbstractVar[int]
    signed: eqx.AbstractVar[bool]

    @no_type_check
    def encode_real(self, value: Array, seed: Array | None) -> tuple[Array, ...]:
        """See [`eqx_ademamix.AbstractCodec`][]."""
        return _encode_scaled(value, seed, self.block_size, self._grid)

    @no_type_check
    def decode_real(self, parts: tuple[Array, ...]) -> Array:
        """See [`eqx_ademamix.AbstractCodec`][]."""
        return _decode_scaled(parts, self.block_size, self._grid)

    @property
    @abc.abstractmethod
    def _grid(self) -> _Grid:
        """The grid, by `signed`."""


class ScaledFloat16(AbstractScaled):
    r"""Two bytes: floating-point numbers whose exponents count down from the exponent
    of the largest entry of their block, one byte a block.

    Signed, for `m1` and `m2`: an entry of at least $2^{-24}$ of its block's largest is
    kept to a relative error of 1/2520, below $2^{-11}$; a smaller one to $2^{-35}$ of
    the largest. float16 with a scale has 1024 numbers from one power of two to the
    next, this has 1260, since it spends none on exponents that do not occur. The
    rounding is dithered: a random fraction of a step is added before rounding and
    subtracted after decoding, so that the error is uniform and has mean zero whatever
    the value is (Gray and Stockham 1993, "Dithered quantizers"; within half a step of a
    power of two, where the steps double, the mean is off by up to 1/16 step). A change
    far smaller than a step is heard in the mean, where rounding to nearest does not
    hear it at all.

    Unsigned, for `nu`: 1024 numbers between powers of two, 63 powers of two below the
    largest entry of the block. Rounded up or down at random such that the mean is
    exact, and never below the smallest number unless it is zero. For one store, `nu`
    is underestimated by a factor of less than $1 + 1/1024$, and the denominator
    $\sqrt\nu$ by less than its root, 1.0005; the proof is in
    [`eqx_ademamix.ScaledFloat8`][].

    Blocks lie along the last axis. If that has fewer than 64 entries, they lie along
    as many of the last axes as together have 64.
    """

    block_size: int = eqx.field(static=True)
    signed: bool = eqx.field(static=True)

    @no_type_check
    def __init__(self, block_size: int = 256, *, signed: bool = True):
        """**Arguments:**

        - `block_size`: how many entries share a scale.
        - `signed`: whether there are negative numbers. In the place of `nu` a
            [`eqx_ademamix.StateFormat`][] makes it `False` by itself.

        **Raises:**

        - `ValueError`: if `block_size` is no positive integer.
        """
        self.block_size = _checked_block_size("ScaledFloat16", block_size)
        self.signed = bool(signed)

    @no_type_check
    def for_squares(self) -> "ScaledFloat16":
        """See [`eqx_ademamix.AbstractCodec`][]."""
        return ScaledFloat16(self.block_size, signed=False)

    @property
    def _grid(self) -> _Grid:
        return (_SIGNED if self.signed else _UNSIGNED)[16]


class ScaledFloat8(AbstractScaled):
    r"""One byte: as [`eqx_ademamix.ScaledFloat16`][], with fewer numbers, and rounded
    up or down at random such that the mean is exact.

    Signed, for `m1`: five numbers between powers of two, so an entry of at least
    $2^{-23}$ of its block's largest is kept to a fifth of itself. The average of ten
    steps that `m1` is at $\beta_1 = 0.9$ averages the errors too. Not for `m2`, whose
    errors of ten thousand steps would be larger than it is.

    Unsigned, for `nu`: six numbers between powers of two, 41 powers of two below the
    largest entry of the block, so gradients that differ by six orders of magnitude.

    For one store, `nu` is underestimated by a factor of less than 7/6, and the
    denominator $\sqrt\nu$ by less than $\sqrt{7/6} < 1.081$. *Proof.* Let $2^k \le x <
    2^{k+1}$. If $x$ is at least the smallest number of its block, it lies between two
    neighbours $a \le x \le b$ of the grid, one of which is stored. The grid has the
    point $2^k$, so $a \ge 2^k$, and $b - a = 2^k / 6$, so
    $x / a \le b / a \le 1 + 2^k / (6 a) \le 7/6$. If $x > 0$ is less than the smallest
    number, that is stored, which is no underestimate. If $x = 0$, so is what is stored.
    $\square$

    Between steps, since every power of two is on the grid and the scale is a power of
    two, a new scale moves no number: what is not changed by the gradient is stored
    again as it is, and the random rounding of a change $\delta$ on a grid of spacing
    $\Delta$ adds a variance of at most $|\delta| \Delta$. That is less than what the
    average forgets in the step, so no decay makes the errors grow without end. In a
    long run `nu` has a relative standard deviation of about $\sqrt{\Delta/2}$, a
    quarter, and the denominator half of that, whatever $\beta_2$ is.
    """

    block_size: int = eqx.field(static=True)
    signed: bool = eqx.field(static=True)

    @no_type_check
    def __init__(self, block_size: int = 256, *, signed: bool = True):
        """**Arguments:**

        - `block_size`: how many entries share a scale.
        - `signed`: whether there are negative numbers. In the place of `nu` a
            [`eqx_ademamix.StateFormat`][] makes it `False` by itself.

        **Raises:**

        - `ValueError`: if `block_size` is no positive integer.
        """
        self.block_size = _checked_block_size("ScaledFloat8", block_size)
        self.signed = bool(signed)

    @no_type_check
    def for_squares(self) -> "ScaledFloat8":
        """See [`eqx_ademamix.AbstractCodec`][]."""
        return ScaledFloat8(self.block_size, signed=False)

    @property
    def _grid(self) -> _Grid:
        return (_SIGNED if self.signed else _UNSIGNED)[8]


def _checked_block_size(name: str, block_size: Any) -> int:
    is_integer = isinstance(block_size, int | np.integer)
    if not is_integer or isinstance(block_size, bool) or block_size < 1:
        raise ValueError(
            f"`{name}(block_size=...)` is {describe(block_size)}, but a positive "
            "integer was expected. The default is 256."
        )
    return int(block_size)


def _encode_scaled(
    value: Array, seed: Array | None, block_size: int, grid: _Grid
) -> tuple[Array, ...]:
    pattern = lax.bitcast_convert_type(jnp.abs(value), np.int32)
    exponents = _exponents(pattern, block_size)
    code = _position(pattern, _spread(exponents, value.shape, block_size), grid)
    parts: tuple[Array, ...] = (exponents,)
    if grid.is_dithered:
        seed = jnp.zeros((), np.uint32) if seed is None else seed
        code, parts = jnp.round(code + _dither(seed, value.shape)), (exponents, seed)
    else:
        chance = np.float32(0.5) if seed is None else uniform(seed, value.shape)
        code = up_or_down(code, chance)
    code = jnp.clip(code, 0 if grid.is_signed else 1, grid.top).astype(grid.dtype)
    # The last operation is one on two arrays: what is one on a single array XLA on CPUs
    # computes again wherever it is used, and copies the old codes for that.
    code = jnp.where(value < 0, -code, code) if grid.is_signed else code
    return jnp.where(value == 0, jnp.zeros_like(code), code), *parts


def _decode_scaled(
    parts: tuple[Array, ...], block_size: int, grid: _Grid
) -> Float[Array, "..."]:
    code, exponents, *seed = parts
    spread = _spread(exponents, code.shape, block_size)
    wide = code.astype(np.float32)
    position = jnp.abs(wide)
    if grid.is_dithered:
        position = position - _dither(seed[0], code.shape)
    value = jnp.sign(wide) * _magnitude(position, spread, grid)
    return jnp.where(spread == _NOT_FINITE, np.float32(np.nan), value)


def _position(pattern: Array, exponent: Array, grid: _Grid) -> Float[Array, "..."]:
    """Where a number, given by its bit pattern, lies on the grid of its block: the code
    that it would have if codes were real."""
    below = _top(exponent) - pattern
    part = (below & (_BINADE - 1)).astype(np.float32) * np.float32(1 / _BINADE)
    binades = (below >> 23).astype(np.float32)
    position = grid.top - (binades + part) * np.float32(grid.steps)
    if not grid.is_signed:
        return position
    lowest = _lowest(exponent, grid)
    tail = lax.bitcast_convert_type(pattern, np.float32) / lowest * grid.steps
    return jnp.where(position < grid.steps, tail, position)


def _magnitude(position: Array, exponent: Array, grid: _Grid) -> Float[Array, "..."]:
    """The number at a position. The powers of two are split off, so that it is the same
    number whatever the block's largest is."""
    depth = grid.top - position
    binades = jnp.floor(depth * np.float32(1 / grid.steps))
    part = (depth - binades * np.float32(grid.steps)) * np.float32(_BINADE / grid.steps)
    below = binades.astype(np.int32) * _SMALLEST + jnp.round(part).astype(np.int32)
    pattern = jnp.clip(_top(exponent) - below, _SMALLEST, _LARGEST)
    value = lax.bitcast_convert_type(pattern, np.float32)
    if not grid.is_signed:
        return value
    tail = position * np.float32(1 / grid.steps) * _lowest(exponent, grid)
    return jnp.where(position < grid.steps, tail, value)


def _lowest(exponent: Array, grid: _Grid) -> Float[Array, "..."]:
    """The lowest power of two of a signed grid."""
    pattern = _top(exponent) - (grid.top // grid.steps - 1) * _SMALLEST
    return lax.bitcast_convert_type(jnp.maximum(pattern, _SMALLEST), np.float32)


def _top(exponent: Array) -> Int32[Array, "..."]:
    """The bit pattern of the next power of two above the largest number of a block."""
    return (jnp.minimum(exponent, _NOT_FINITE - 1) + 1) * _SMALLEST


def _dither(seed: Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Numbers in [-1/2, 1/2), or zeros for the seed 0."""
    return jnp.where(seed == 0, np.float32(0), uniform(seed, shape) - np.float32(0.5))


def _exponents(pattern: Array, block_size: int) -> Array:
    """The exponent, as float32 stores it, of the largest number of each block: 0 for a
    block of zeros, 255 for one that is not finite."""
    lead, length = _rows(pattern.shape)
    block = min(block_size, length) or 1
    rows = _padded(_with_whole_rows(pattern, block).reshape(*lead, length), block)
    blocks = rows.reshape(*lead, -(-length // block), block)
    # In two stages, since XLA on CPUs writes out all that it reduces by more than 32.
    stages = _padded(blocks, 16).reshape(*blocks.shape[:-1], -(-block // 16), 16)
    return jnp.max((jnp.max(stages, axis=-1) >> 23).astype(np.uint8), axis=-1)


def _with_whole_rows(x: Array, block: int) -> Array:
    """An array whose rows no device has only a part of, if their sharding is a part of
    the type and does not divide the blocks: it could not be reshaped else."""
    sharding = (
        getattr(jax.typeof(x), "sharding", None) if hasattr(jax, "typeof") else None
    )
    lead, length = _rows(x.shape)
    if not _is_explicit(sharding) or sharding is None:
        return x
    kept = sharding.spec[: len(lead)]
    split = [name for names in sharding.spec[len(lead) :] for name in _names(names)]
    parts = math.prod(sharding.mesh.shape[name] for name in split)
    is_whole = x.ndim == len(lead) + 1 and length % (block * parts) == 0
    return x if is_whole or not split else jax.sharding.reshard(x, P(*kept))


def _names(names: Any) -> tuple[str, ...]:
    return () if names is None else names if isinstance(names, tuple) else (names,)


def _padded(x: Array, multiple: int) -> Array:
    """Pads the last axis with zeros."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % multiple)])


def _spread(
    exponents: Array, shape: tuple[int, ...], block_size: int
) -> Int32[Array, "..."]:
    """The exponent of the block of each entry."""
    lead, length = _rows(shape)
    block = min(block_size, length) or 1
    each = jnp.broadcast_to(exponents[..., None], (*exponents.shape, block))
    rows = each.reshape(*lead, exponents.shape[-1] * block)[..., :length]
    return rows.reshape(shape).astype(np.int32)


def _rows(shape: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """Splits a shape into its first axes and the length of the rows along which blocks
    lie."""
    axis = len(shape) - 1
    while axis > 0 and math.prod(shape[axis:]) < _SHORTEST_ROW:
        axis -= 1
    return shape[: max(axis, 0)], math.prod(shape[max(axis, 0) :])


_SHORTEST_ROW = 64


#
# bfloat16 and a byte
#


class SplitBfloat16(AbstractCodec):
    r"""Three bytes: a bfloat16 number, and what it lacks in a byte.

    The first 24 bits of float32: the whole range of exponents and 16 significant bits,
    so no blocks and no scales. Rounded up or down at random such that the mean is
    exact; the relative error is less than $2^{-15}$. The first of the two arrays is
    the nearest bfloat16 number to what is stored.
    """

    @no_type_check
    def encode_real(self, value: Array, seed: Array | None) -> tuple[Array, ...]:
        """See [`eqx_ademamix.AbstractCodec`][]."""
        pattern = lax.bitcast_convert_type(value, np.int32)
        size = pattern & np.int32(0x7FFFFFFF)
        rounded = jnp.minimum(size + _chance_of_256(seed, value.shape), 0x7F7F7FFF)
        size = jnp.where(size < _INFINITY, rounded, _not_finite(size))
        word = (size >> 8) | ((pattern < 0).astype(np.int32) << 23)
        high = (word + 128) >> 8
        low = (word - (high << 8)).astype(np.int8)
        return lax.bitcast_convert_type(high.astype(np.uint16), jnp.bfloat16), low

    @no_type_check
    def decode_real(self, parts: tuple[Array, ...]) -> Array:
        """See [`eqx_ademamix.AbstractCodec`][]."""
        high, low = parts
        word = lax.bitcast_convert_type(high, np.uint16).astype(np.int32) << 8
        pattern = (word + low.astype(np.int32)) << 8
        return lax.bitcast_convert_type(pattern, np.float32)

    @no_type_check
    def for_squares(self) -> "SplitBfloat16":
        """See [`eqx_ademamix.AbstractCodec`][]."""
        return self


def _not_finite(pattern: Array) -> Array:
    """The pattern of an infinity or of a NaN, which the last bits must not make out."""
    return jnp.where(pattern == _INFINITY, _INFINITY, np.int32(0x7FC00000))


def _chance_of_256(seed: Array | None, shape: tuple[int, ...]) -> Any:
    """What is added before the last eight bits are cut off."""
    if seed is None:
        return np.int32(128)
    return (uniform(seed, shape) * np.float32(256)).astype(np.int32)
