"""Codecs of one and two bytes: floating-point numbers whose exponents count down from
that of the largest number in their block."""

import abc
import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int32

from .._numerics import uniform, up_or_down
from .._paths import describe
from .._typing import no_type_check
from .codec import AbstractCodec, is_explicit


class _Grid(NamedTuple):
    """The numbers that the codes of one kind represent. Between two powers of two there
    are `steps` of them, evenly spaced. The code `top` represents the next power of two
    above the largest number of the block. Below the lowest power of two, a signed grid
    continues in even steps to the code 0, which is zero. An unsigned grid ends there
    with the code 1, and below that there is only zero."""

    dtype: type[np.integer[Any]]
    top: int
    steps: int
    is_signed: bool
    is_dithered: bool


# A signed grid needs powers of two at multiples of `steps`, so that its even steps to
# zero join the rest: `top` is the largest multiple of `steps` that the integer holds.
#   int8: 5 steps leave 125 = 25 * 5 <= 127, hence 25 doublings, the last one in even
#     steps to zero. 4 steps would have a range of 31 doublings and errors of a quarter,
#     6 steps only 21 doublings.
#   int16: 26 doublings, down to 2^-24 times the block's largest, next to which float32
#     would round away anything smaller. That leaves room for floor(32767 / 26) = 1260
#     steps, and 26 * 1260 = 32760.
_SIGNED = {
    8: _Grid(np.int8, 125, 5, is_signed=True, is_dithered=False),
    16: _Grid(np.int16, 32760, 1260, is_signed=True, is_dithered=True),
}
# An unsigned grid uses all codes: 254 / 6 and 65534 / 1024 steps are 42 and 63 whole
# doublings. The square roots of these numbers span 21 and 31 doublings.
_UNSIGNED = {
    8: _Grid(np.uint8, 255, 6, is_signed=False, is_dithered=False),
    16: _Grid(np.uint16, 65535, 1024, is_signed=False, is_dithered=False),
}

# The bit pattern of a positive float32, read as an integer: 8 bits of exponent, then 23
# bits of mantissa. So it grows with the number, and by 2^23 with each power of two.
_BINADE = 1 << 23
_SMALLEST = np.int32(_BINADE)  # the pattern of the smallest normal number, 2^-126
_LARGEST = np.int32(0x7F7FFFFF)  # of the largest finite number
_NOT_FINITE = 255  # the exponent of infinities and NaN


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
        """The grid for this `signed`."""


class ScaledFloat16(AbstractScaled):
    r"""Two bytes: floating-point numbers whose exponents count down from the exponent
    of the largest entry of their block, which takes one byte per block.

    Signed, for `m1` and `m2`: an entry of at least $2^{-24}$ times its block's largest
    is kept to a relative error of 1/2520, below $2^{-11}$; a smaller one to $2^{-35}$
    times the largest. float16 with a scale has 1024 numbers from one power of two to
    the next. This has 1260, since it spends none on exponents that do not occur.

    The rounding is dithered: a random fraction of a step is added before rounding and
    subtracted after decoding, so that the error is uniform and has mean zero, whatever
    the value is (Gray and Stockham 1993, "Dithered quantizers"). Within half a step of
    a power of two, where the steps double, the mean is off by up to 1/16 step. So a
    change far smaller than a step is kept in the mean, where rounding to nearest would
    lose it.

    Unsigned, for `nu`: 1024 numbers between powers of two, 63 powers of two below the
    largest entry of the block. Values are rounded up or down at random so that the mean
    is exact, and never below the smallest number unless they are zero. One store
    underestimates `nu` by a factor of less than $1 + 1/1024$, and the denominator
    $\sqrt\nu$ by less than the root of that, 1.0005. [`eqx_ademamix.ScaledFloat8`][]
    has the proof.

    Blocks lie along the last axis. If that has fewer than 64 entries, they lie along
    as many of the last axes as together have 64.
    """

    block_size: int = eqx.field(static=True)
    signed: bool = eqx.field(static=True)

    @no_type_check
    def __init__(self, block_size: int = 256, *, signed: bool = True):
        """**Arguments:**

        - `block_size`: how many entries share a scale.
        - `signed`: whether there are negative numbers. For `nu`, a
            [`eqx_ademamix.StateFormat`][] sets it to `False` for you.

        **Raises:**

        - `ValueError`: if `block_size` is not a positive integer.
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
    r"""One byte: like [`eqx_ademamix.ScaledFloat16`][], but with fewer numbers, and
    rounded up or down at random so that the mean is exact.

    Signed, for `m1`: five numbers between powers of two, so an entry of at least
    $2^{-23}$ times its block's largest is kept to a fifth of itself. At $\beta_1 =
    0.9$, `m1` averages about ten steps, and their errors too. Do not use it for `m2`:
    the errors of ten thousand steps would be larger than `m2` itself.

    Unsigned, for `nu`: six numbers between powers of two, 41 powers of two below the
    largest entry of the block, which is enough for gradients that differ by six orders
    of magnitude.

    One store underestimates `nu` by a factor of less than 7/6, and the denominator
    $\sqrt\nu$ by less than $\sqrt{7/6} < 1.081$. *Proof.* Let $2^k \le x < 2^{k+1}$.
    If $x$ is at least the smallest number of its block, it lies between two neighbors
    $a \le x \le b$ of the grid, one of which is stored. The grid has the point $2^k$,
    so $a \ge 2^k$, and $b - a = 2^k / 6$, so
    $x / a \le b / a \le 1 + 2^k / (6 a) \le 7/6$. If $x > 0$ is less than the smallest
    number, that number is stored, which is not an underestimate. If $x = 0$, zero is
    stored. $\square$

    Every power of two is on the grid, and the scale is a power of two, so a new scale
    moves no number: what the gradient does not change is stored again as it is. The
    random rounding of a change $\delta$ on a grid of spacing $\Delta$ adds a variance
    of at most $|\delta| \Delta$. In a step, the average forgets more than that, so for
    no decay do the errors grow without bound. In a long run `nu` has a relative
    standard deviation of about $\sqrt{\Delta/2}$, a quarter, and the denominator half
    of that, for any $\beta_2$.
    """

    block_size: int = eqx.field(static=True)
    signed: bool = eqx.field(static=True)

    @no_type_check
    def __init__(self, block_size: int = 256, *, signed: bool = True):
        """**Arguments:**

        - `block_size`: how many entries share a scale.
        - `signed`: whether there are negative numbers. For `nu`, a
            [`eqx_ademamix.StateFormat`][] sets it to `False` for you.

        **Raises:**

        - `ValueError`: if `block_size` is not a positive integer.
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


def _checked_block_size(name: str, block_size: object) -> int:
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
    # The last operation must have two arrays as inputs. XLA on CPUs computes an
    # operation on a single array again wherever it is used, and copies the old codes to
    # do so.
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
    """The position of a number, given by its bit pattern, on the grid of its block: the
    code that it would have if codes were real numbers."""
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
    """The number at a position. The powers of two are split off, so that the number
    does not depend on the largest of the block."""
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
    # In two stages, since XLA on CPUs materializes the input of a reduction by more
    # than 32.
    stages = _padded(blocks, 16).reshape(*blocks.shape[:-1], -(-block // 16), 16)
    return jnp.max((jnp.max(stages, axis=-1) >> 23).astype(np.uint8), axis=-1)


def _with_whole_rows(x: Array, block: int) -> Array:
    """An array with every row whole on some device, if its sharding is part of its type
    and does not divide the blocks. Such an array could not be reshaped otherwise."""
    sharding = (
        getattr(jax.typeof(x), "sharding", None) if hasattr(jax, "typeof") else None
    )
    lead, length = _rows(x.shape)
    if not is_explicit(sharding) or sharding is None:
        return x
    kept = sharding.spec[: len(lead)]
    split = [name for names in sharding.spec[len(lead) :] for name in _names(names)]
    parts = math.prod(sharding.mesh.shape[name] for name in split)
    is_whole = x.ndim == len(lead) + 1 and length % (block * parts) == 0
    return x if is_whole or not split else jax.sharding.reshard(x, P(*kept))


def _names(names: str | tuple[str, ...] | None) -> tuple[str, ...]:
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
    """Splits a shape into its first axes, and the length of the rows along which the
    blocks lie."""
    axis = len(shape) - 1
    while axis > 0 and math.prod(shape[axis:]) < _SHORTEST_ROW:
        axis -= 1
    return shape[: max(axis, 0)], math.prod(shape[max(axis, 0) :])


# One byte of scale for 64 codes of one byte adds 1.6 %; for shorter rows it would add
# more.
_SHORTEST_ROW = 64
