"""Codecs of one and two bytes: small floating-point numbers, relative to a bound of the
numbers in their block."""

import abc
import math
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32

from .._numerics import Noise, evenly_spread, scattered
from .._paths import describe
from .._typing import no_type_check
from .blocks import largest, spread
from .codec import AbstractBounded, Bounds


# The bit pattern of a positive float32, read as an integer: 8 bits of exponent, then 23
# bits of mantissa. So it grows with the number, by 2^23 from one power of two to the
# next, and in even steps in between.
_BINADE = 1 << 23
_ONE = np.int32(127 * _BINADE)  # the pattern of 1
_EXPONENT = np.int32(255 * _BINADE)  # the bits of the exponent

_SMALLEST = np.float32(2.0**-126)  # the smallest normal number

# What a signed grid calls 1 lies this many powers of two below a block's bound.
_BELOW = np.float32(2.0**-30)
# The lowest power of two of an unsigned grid.
_LOWEST = np.int32((127 - 62) * _BINADE)
# A grid of half as many numbers from one power of two to the next, and twice as many
# powers of two, holds a block whose bound exceeds 2^30 times what the gradients usually
# add, and its unit lies this many powers of two lower.
_COARSE = np.float32(2.0**30)
_LOWER = np.float32(2.0**-63)


class AbstractScaled(AbstractBounded):
    """A codec whose codes are places on a grid of floating-point numbers."""

    block_size: eqx.AbstractVar[int]
    signed: eqx.AbstractVar[bool]

    @property
    @abc.abstractmethod
    def _grid(self) -> "_Signed | _Squares":
        """The grid for this `signed`."""

    @no_type_check
    def encode_real(self, value: Array, seed: Array | None) -> tuple[Array, ...]:
        """See [`eqx_ademamix.AbstractCodec`][]."""
        bound = self.largest(value)
        scales = (bound,) if self.signed else (bound, bound)
        noise = None if seed is None else Noise(seed, seed)
        return self._grid.encode(value, scales, noise, self.block_size)

    @no_type_check
    def decode_real(self, parts: tuple[Array, ...]) -> Array:
        """See [`eqx_ademamix.AbstractCodec`][]."""
        return self._grid.decode(parts, self.block_size)

    def largest(self, x: Array) -> Float[Array, "..."]:
        return largest(x, self.block_size)

    def bound(self, parts: tuple[Array, ...]) -> Float[Array, "..."]:
        return parts[1]

    def encode_bounded(
        self, value: Array, bounds: Bounds, old: tuple[Array, ...], noise: Noise
    ) -> tuple[Array, ...]:
        usual = () if self.signed else (_usual(old[2], bounds.newest),)
        return self._grid.encode(value, (bounds.whole, *usual), noise, self.block_size)


def _usual(old: Array, newest: Array) -> Float[Array, "..."]:
    """What the gradients usually add to the average in a block. It follows what they
    just added, by a factor of at most two a step, so a spike hardly moves it. A block
    without gradients keeps it."""
    followed = jnp.clip(newest, old * np.float32(0.5), old * np.float32(2))
    return jnp.where(newest > 0, jnp.where(old > 0, followed, newest), old)


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
    def _grid(self) -> "_Signed | _Squares":
        return _SIGNED[16] if self.signed else _SQUARES[16]


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
    def _grid(self) -> "_Signed | _Squares":
        return _SIGNED[8] if self.signed else _SQUARES[8]


def _checked_block_size(name: str, block_size: object) -> int:
    is_integer = isinstance(block_size, int | np.integer)
    if not is_integer or isinstance(block_size, bool) or block_size < 1:
        raise ValueError(
            f"`{name}(block_size=...)` is {describe(block_size)}, but a positive "
            "integer was expected. The default is 256."
        )
    return int(block_size)


class _Signed(NamedTuple):
    """Signed numbers: `2^bits` evenly spaced ones from one power of two to the next.

    With the unit that makes the bound of a block 2^30 to 2^31, the code of `x` is a
    place between the bit patterns of 1 and of `1 + |x|`, with the sign of `x`. So the
    grid is logarithmic far from 0, even between -1 and 1, and needs no special case.
    """

    dtype: type[np.signedinteger[Any]]
    bits: int
    is_dithered: bool

    def encode(
        self, x: Array, scales: tuple[Array], noise: Noise | None, block_size: int
    ) -> tuple[Array, ...]:
        (bound,) = scales
        inverse = spread(1 / _unit(bound, _BELOW), x.shape, block_size)
        size = jnp.minimum(jnp.abs(x) * inverse, self._largest)
        place = lax.bitcast_convert_type(size + np.float32(1), np.int32) - _ONE
        place = jnp.where(x < 0, -place, place)
        chance = self._half if noise is None else self._chance(noise.seed, x.shape)
        code = ((place + chance) >> self._cut).astype(self.dtype)
        # The last operation must have two arrays as inputs. XLA on CPUs computes an
        # operation on a single array again wherever it is used, and copies the old
        # codes to do so.
        codes = jnp.where(x == 0, jnp.full_like(code, self._zero), code)
        seed = jnp.zeros((), np.uint32) if noise is None else noise.seed
        return (codes, bound, seed) if self.is_dithered else (codes, bound)

    def decode(self, parts: tuple[Array, ...], block_size: int) -> Array:
        code, bound, *seed = parts
        unit = spread(_unit(bound, _BELOW), code.shape, block_size)
        place = code.astype(np.int32) << self._cut
        if seed:
            chance = self._chance(seed[0], code.shape)
            place += self._half - jnp.where(seed[0] == 0, self._half, chance)
        size = lax.bitcast_convert_type(jnp.abs(place) + _ONE, np.float32)
        size = (size - np.float32(1)) * unit
        x = jnp.where(place < 0, -size, size)
        return jnp.where(code == self._zero, jnp.zeros_like(x), x) if seed else x

    @property
    def _cut(self) -> np.int32:
        """The bits of a pattern that codes do not have."""
        return np.int32(23 - self.bits)

    @property
    def _half(self) -> np.int32:
        """What is added before the cut to round to nearest."""
        return np.int32(1 << (22 - self.bits))

    @property
    def _zero(self) -> int:
        """The code of zero. With dither, the code 0 stands for other numbers too. (The
        smallest integer: its place is never reached.)"""
        return np.iinfo(self.dtype).min if self.is_dithered else 0

    @property
    def _largest(self) -> np.float32:
        """The number with the largest code, or with the next one below."""
        place = np.int32(np.iinfo(self.dtype).max - 1 << self._cut)
        return (place + _ONE).view(np.float32)

    def _chance(self, seed: Array, shape: tuple[int, ...]) -> Int32[Array, "..."]:
        """What is added before the cut to round at random."""
        word = scattered(seed, shape) >> np.uint32(9 + self.bits)
        return word.astype(np.int32)


class _Squares(NamedTuple):
    """Numbers that are not negative: zero, and `2^bits` numbers from one power of two
    to the next, over 63 powers of two, or half as many over 126.

    With few bits, the numbers are spaced evenly in (almost) the logarithm: a pattern is
    bent before its last bits are cut off.
    """

    dtype: type[np.unsignedinteger[Any]]
    bits: int
    is_bent: bool

    def encode(
        self,
        x: Array,
        scales: tuple[Array, Array],
        noise: Noise | None,
        block_size: int,
    ) -> tuple[Array, ...]:
        to_entries = lambda per_block: spread(per_block, x.shape, block_size)
        unit, halvings = _mode(*scales)
        pattern = lax.bitcast_convert_type(x * to_entries(1 / unit), np.int32)
        place = pattern - _LOWEST
        if self.is_bent:
            place += _bend(place & (_BINADE - 1))
        place >>= to_entries(halvings)
        chance = self._half if noise is None else self._chance(noise.turn, x.shape)
        code = jnp.clip((place + chance) >> self._cut, 1, np.iinfo(self.dtype).max)
        # For the last operation, see `_Signed`.
        code = code.astype(self.dtype)
        return jnp.where(x == 0, jnp.zeros_like(code), code), *scales

    def decode(self, parts: tuple[Array, ...], block_size: int) -> Array:
        code, *scales = parts
        to_entries = lambda per_block: spread(per_block, code.shape, block_size)
        unit, halvings = _mode(*scales)
        place = code.astype(np.int32) << to_entries(halvings)
        pattern = (place << self._cut) + _LOWEST
        if self.is_bent:
            pattern += _unbent(place & 3)
        x = lax.bitcast_convert_type(pattern, np.float32) * to_entries(unit)
        return jnp.where(code == 0, jnp.zeros_like(x), x)

    @property
    def _cut(self) -> np.int32:
        """The bits of a pattern that codes do not have."""
        return np.int32(23 - self.bits)

    @property
    def _half(self) -> np.int32:
        """What is added before the cut to round to nearest."""
        return np.int32(1 << (22 - self.bits))

    def _chance(self, turn: Array, shape: tuple[int, ...]) -> Int32[Array, "..."]:
        """What is added before the cut to round in turn."""
        word = evenly_spread(turn, shape) >> np.uint32(9 + self.bits)
        return word.astype(np.int32)


def _mode(
    bound: Array, usual: Array
) -> tuple[Float[Array, "..."], Int32[Array, "..."]]:
    """The unit of each block, and how many times its places are halved."""
    is_coarse = bound > _COARSE * usual
    one = np.float32(1)
    return _unit(bound, jnp.where(is_coarse, _LOWER, one)), is_coarse.astype(np.int32)


def _unit(bound: Array, below: Array | np.float32) -> Float[Array, "..."]:
    """The power of two of a bound, times another one. So a new bound moves no number of
    a grid. A NaN where the bound is not finite."""
    pattern = lax.bitcast_convert_type(bound, np.int32) & _EXPONENT
    top = lax.bitcast_convert_type(pattern, np.float32)
    # The inverse of the unit must be a normal number too.
    unit = jnp.maximum(jnp.minimum(top, 1 / _SMALLEST) * below, _SMALLEST)
    return unit + (top - top)


# The logarithm to base 2 of 1 + f, for f from 0 to 1, is about f + c f (1 - f). With
# this c, a number that shrinks by a fixed small fraction in each step takes as many
# steps to pass the four codes of a power of two as it takes to halve.
_CURVE = 0.315


def _bend(mantissa: Int32[Array, "..."]) -> Int32[Array, "..."]:
    """What to add to a pattern whose last 23 bits are `mantissa`."""
    f = mantissa.astype(np.float32)
    slope = np.float32(_CURVE) - np.float32(_CURVE / _BINADE) * f
    return (slope * f).astype(np.int32)


def _unbent_at(quarter: int) -> np.int32:
    """What to add to a pattern that ends at a quarter of a power of two, so that, once
    bent, it ends there."""
    # The root of f + c f (1 - f) = quarter / 4.
    b = 1 + _CURVE
    f = (b - math.sqrt(b * b - _CURVE * quarter)) / (2 * _CURVE)
    return np.int32(math.ceil(f * _BINADE) - quarter * (_BINADE // 4))


_UNBENT = tuple(map(_unbent_at, range(4)))


def _unbent(quarter: Int32[Array, "..."]) -> Int32[Array, "..."]:
    added = jnp.where(quarter == 1, _UNBENT[1], np.int32(0))
    for i in (2, 3):
        added = jnp.where(quarter == i, _UNBENT[i], added)
    return added


_SIGNED = {
    8: _Signed(np.int8, 2, is_dithered=False),
    16: _Signed(np.int16, 10, is_dithered=True),
}
_SQUARES = {
    8: _Squares(np.uint8, 2, is_bent=True),
    16: _Squares(np.uint16, 10, is_bent=False),
}
