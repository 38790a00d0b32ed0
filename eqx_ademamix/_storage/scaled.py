"""Codecs of one and two bytes: small floating-point numbers, relative to a bound on the
numbers in their block."""

import abc
import math
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32

from .._numerics import evenly_spread, mixed, odd_numbers
from .._paths import describe
from .._typing import no_type_check
from .blocks import are_whole, partial_maxima, rows, spread
from .codec import AbstractBounded, Bounds


# The bit pattern of a positive float32, read as an integer: 8 bits of exponent, then 23
# bits of mantissa. So it grows with the number, by 2^23 from one power of two to the
# next, and in even steps in between.
_BINADE = 1 << 23
_ONE = np.int32(127 * _BINADE)  # the pattern of 1
_EXPONENT = np.int32(255 * _BINADE)  # the bits of the exponent


class AbstractScaled(AbstractBounded):
    """A codec whose codes are places on a grid of floating-point numbers, and whose
    scales are bounds on the numbers in a block."""

    block_size: eqx.AbstractVar[int]
    signed: eqx.AbstractVar[bool]

    @property
    @abc.abstractmethod
    def _grid(self) -> "_Signed | _Squares":
        """The grid for this `signed`."""

    @no_type_check
    def encode_real(self, value: Array, seed: Array | None) -> tuple[Array, ...]:
        """See [`eqx_ademamix.AbstractCodec`][]."""
        largest = self.largest(value)
        root = largest if self.signed else jnp.sqrt(largest)
        return self._encode(value, Bounds(largest, root), None, seed)

    @no_type_check
    def decode_real(self, parts: tuple[Array, ...]) -> Array:
        """See [`eqx_ademamix.AbstractCodec`][]."""
        code, scale = parts
        return self._grid.decode(code, scale, self.block_size)

    def largest(self, x: Array) -> Float[Array, "..."]:
        return partial_maxima(x, self.block_size)

    def bound(self, parts: tuple[Array, ...]) -> Float[Array, "..."]:
        return self._grid.bound(parts[1])[..., None]

    def holds_blocks(self, shape: tuple[int, ...], shard: tuple[int, ...]) -> bool:
        return are_whole(shape, shard, self.block_size)

    def encode_bounded(
        self, value: Array, bounds: Bounds, old: tuple[Array, ...], seed: Array
    ) -> tuple[Array, ...]:
        return self._encode(value, bounds, old[1], seed)

    def _encode(
        self, value: Array, bounds: Bounds, old: Array | None, seed: Array | None
    ) -> tuple[Array, ...]:
        # The maximum of each block comes last, and it is that of the patterns, which
        # have the same order as the bounds. XLA on CPUs recomputes everything else in
        # each kernel that uses it, but not a reduction.
        patterns = self._grid.scales(bounds, old, seed)
        scale = _number(jnp.max(patterns, axis=-1))
        return self._grid.encode(value, scale, seed, self.block_size), scale


class ScaledFloat16(AbstractScaled):
    r"""Two bytes: floating-point numbers relative to a bound on the entries in their
    block. The bound takes four bytes per block.

    Signed, for `m1` and `m2`: 1024 numbers between powers of two. An entry of at least
    $2^{-23}$ times its block's largest is kept to a relative error of
    $2^{-11} (1 + 2^{-7})$; a smaller one to $2^{-34}$ times the largest. The range is
    that of float32 near the largest entry, not that of float16.

    The rounding is dithered: a random fraction of a step is added before rounding and
    subtracted after decoding, so that the error is uniform and has mean zero, whatever
    the value (Gray and Stockham 1993, "Dithered quantizers"). Within half a step of a
    power of two, where the steps double, the mean is off by up to 1/16 step. So a
    change far smaller than a step is kept in the mean, where rounding to nearest would
    lose it.

    Unsigned, for `nu`: 1024 numbers between powers of two, 62 powers of two below the
    bound. Values are rounded alternately up or down, and never below the smallest
    number unless they are zero. One store underestimates `nu` by a factor of less than
    $1 + 1/1024$, and the denominator $\sqrt\nu$ by less than the root of that, 1.0005.
    [`eqx_ademamix.ScaledFloat8`][] has the proof.

    In an update, the bound of a block is the result of the update rule for the old
    bound and the largest gradient in the block, since that bounds the rule's results
    for the entries. So the step reads each array only once. For an average of
    gradients, the bound is above the largest entry, for `m2` by six or seven powers of
    two. Each of these takes one power of two from the range above.

    After a spike, when the bound of `nu` is more than $2^{20}$ times the usual squares
    in its block, there are half as many numbers between powers of two, over 126 powers
    of two. So the spike does not raise the `nu` of its neighbors, which would stop
    them.

    Blocks lie along the last axis. If that has fewer than 64 entries, they lie along
    as many of the last axes as together have 64.
    """

    block_size: int = eqx.field(static=True)
    signed: bool = eqx.field(static=True)

    @no_type_check
    def __init__(self, block_size: int = 256, *, signed: bool = True):
        """**Arguments:**

        - `block_size`: how many entries share a scale. Multiples of 32 need the least
            memory during a step.
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
    r"""One byte: like [`eqx_ademamix.ScaledFloat16`][], but with fewer numbers.

    Signed, for `m1`: four numbers between powers of two, rounded up or down at random
    so that the mean is exact. An entry of at least $2^{-23}$ times its block's largest
    is kept to $(1 + 2^{-7}) / 4$ of itself. At $\beta_1 = 0.9$, `m1` averages about ten
    steps, and their errors too. Do not use it for `m2`: the errors of ten thousand
    steps would be larger than `m2` itself.

    Unsigned, for `nu`: four numbers between powers of two, spaced (almost) evenly in
    the logarithm, over 62 powers of two below the bound. That is enough for gradients
    that differ by nine orders of magnitude.

    One store underestimates `nu` by a factor of less than 6/5, and the denominator
    $\sqrt\nu$ by less than $\sqrt{6/5} < 1.096$. *Proof.* From one power of two to the
    next, the numbers are $2^k$ times 1, 1.1997, 1.4231, 1.6816 and 2, and the largest
    ratio of two neighbors is the first, which is less than 6/5. If $x$ is at least the
    smallest number of its block, one of its two neighbors is stored. If $x > 0$ is less
    than the smallest number, that number is stored, which is not an underestimate. If
    $x = 0$, zero is stored. $\square$ (With the fewer numbers after a spike, the factor
    is less than 1.43.)

    The scale is a power of two, so a new bound changes no number: what the gradient
    does not change is stored again unchanged.

    An entry of `nu` is not rounded at random but alternately: up if its fractional
    position between two numbers exceeds a threshold that moves by the golden ratio from
    step to step (modulo 1). Rounded at random, a `nu` without gradients would do a
    random walk. Rounded alternately, it decays as fast as it should. *Why.* Neighboring
    numbers have almost the same ratio. So the same small decay moves each of them to
    the next one if the threshold lies in an interval of (almost) the same length, and
    multiples of the golden ratio visit an interval at regular times, in proportion to
    its length.
    """

    block_size: int = eqx.field(static=True)
    signed: bool = eqx.field(static=True)

    @no_type_check
    def __init__(self, block_size: int = 256, *, signed: bool = True):
        """**Arguments:**

        - `block_size`: how many entries share a scale. Multiples of 32 need the least
            memory during a step.
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

    With a unit that makes the bound of a block lie between 2^30 and 2^31, the code of
    `x` is a place between the bit patterns of 1 and of `1 + |x|`, with the sign of `x`.
    So the grid is logarithmic far from 0 and even near 0, without any special case.
    """

    dtype: type[np.signedinteger[Any]]
    bits: int
    is_dithered: bool

    def bound(self, scale: Array) -> Float[Array, "..."]:
        """The bound of each block. Random last bits do not change its mean."""
        return scale * np.float32(2.0**30)

    def scales(
        self, bounds: Bounds, old: Array | None, seed: Array | None
    ) -> Int32[Array, "..."]:
        """The patterns of the scales: bounds times $2^{-30}$, whose last 13 bits are
        random. The rounding depends on these."""
        del old
        pattern = _pattern(_in_range(bounds, 2.0**-96) * np.float32(2.0**-30))
        return (pattern & _BOUND) | _random_note(seed, pattern.shape)

    def encode(
        self, x: Array, scale: Array, seed: Array | None, block_size: int
    ) -> Array:
        to_entries = lambda per_block: spread(per_block, x.shape, block_size)
        size = jnp.abs(x) * to_entries(_inverse(_unit(scale))) + np.float32(1)
        place = lax.min(_pattern(size) - _ONE, self._last(x.shape))
        is_random = self.is_dithered or seed is not None
        chance = self._chance(scale, x.shape, block_size) if is_random else self._half
        # The last operation must have two arrays as inputs. XLA on CPUs computes an
        # operation on a single array again wherever it is used, and copies the old
        # codes to do so.
        if self.is_dithered:
            place = lax.select(x < 0, -place, place)
            code = ((place + chance) >> self._cut).astype(self.dtype)
            return lax.select(x == 0, lax.full_like(code, self._zero), code)
        code = ((place + chance) >> self._cut).astype(self.dtype)
        return lax.select(x < 0, -code, code)

    def decode(self, code: Array, scale: Array, block_size: int) -> Array:
        place = code.astype(np.int32) << self._cut
        if self.is_dithered:
            place += self._half - self._chance(scale, code.shape, block_size)
        size = _number(lax.abs(place) + _ONE) - np.float32(1)
        size *= spread(_unit(scale), code.shape, block_size)
        x = lax.select(place < 0, -size, size)
        if not self.is_dithered:
            return x
        return lax.select(code == self._zero, lax.full_like(x, 0), x)

    @property
    def _cut(self) -> np.int32:
        """How many bits of a pattern the codes omit."""
        return np.int32(23 - self.bits)

    @property
    def _half(self) -> np.int32:
        """What is added before the cut to round to nearest."""
        return np.int32(1 << (22 - self.bits))

    @property
    def _zero(self) -> int:
        """The code of zero. With dither, the code 0 stands for numbers near zero, and
        zero gets a code that no other number has."""
        return np.iinfo(self.dtype).min if self.is_dithered else 0

    def _last(self, shape: tuple[int, ...]) -> Int32[Array, "..."]:
        """The second-to-last place."""
        place = (np.iinfo(self.dtype).max - 1) << int(self._cut)
        return lax.full(shape, np.int32(place))

    def _chance(
        self, scale: Array, shape: tuple[int, ...], block_size: int
    ) -> Int32[Array, "..."]:
        """What is added before the cut to round at random: the last bits of the scale,
        which are random, times an odd number that differs from entry to entry. Such a
        product takes each value once if the bits do."""
        bits = lax.bitcast_convert_type(scale, np.uint32) << np.uint32(19)
        odd = odd_numbers(shape, axis=len(rows(shape)[0]))
        word = spread(bits, shape, block_size) * odd
        return (word >> np.uint32(9 + self.bits)).astype(np.int32)


class _Squares(NamedTuple):
    """Numbers that are not negative: zero, and `2^bits` evenly spaced numbers from one
    power of two to the next, over 63 powers of two. A block whose bound is more than
    2^20 times its usual square has half as many numbers over 126 powers of two."""

    dtype: type[np.unsignedinteger[Any]]
    bits: int
    is_bent: bool

    def bound(self, scale: Array) -> Float[Array, "..."]:
        """The bound of each block."""
        return _number(_pattern(scale) & _BOUND)

    def scales(
        self, bounds: Bounds, old: Array | None, seed: Array | None
    ) -> Int32[Array, "..."]:
        """The patterns of the scales: bounds whose last 13 bits record the exponent of
        the usual square, and, in the last bit, whether the numbers are halved. A bound
        is rounded to the other bits at random, so that even a decrease of less than
        their last place takes effect on average."""
        bound = _in_range(bounds, 2.0**-63)
        usual = _exponent(jnp.square(bounds.gradient))
        if old is not None:
            usual = _followed((_pattern(old) & _NOTE)[..., None] >> np.int32(1), usual)
        is_halved = (_exponent(bound) - usual > np.int32(20)).astype(np.int32)
        note = (usual << np.int32(1)) | is_halved
        pattern = _pattern(bound)
        return ((pattern + _random_note(seed, pattern.shape)) & _BOUND) | note

    def encode(
        self, x: Array, scale: Array, seed: Array | None, block_size: int
    ) -> Array:
        to_entries = lambda per_block: spread(per_block, x.shape, block_size)
        halvings = _halvings(scale)
        size = x * to_entries(_inverse(self._unit(scale, halvings)))
        place = _pattern(size) - _LOWEST
        if self.is_bent:
            place += _bend(place & np.int32(_BINADE - 1))
        place >>= to_entries(halvings)
        code = (place + self._chance(seed, x.shape)) >> self._cut
        last = np.int32(np.iinfo(self.dtype).max)
        code = lax.clamp(np.int32(1), code, last).astype(self.dtype)
        # For the last operation, see `_Signed`.
        return lax.select(x == 0, lax.full_like(code, 0), code)

    def decode(self, code: Array, scale: Array, block_size: int) -> Array:
        to_entries = lambda per_block: spread(per_block, code.shape, block_size)
        halvings = _halvings(scale)
        place = code.astype(np.int32) << to_entries(halvings)
        pattern = (place << self._cut) + _LOWEST
        if self.is_bent:
            pattern += _unbent(place & np.int32(3))
        x = _number(pattern) * to_entries(self._unit(scale, halvings))
        return lax.select(code == 0, lax.full_like(x, 0), x)

    @property
    def _cut(self) -> np.int32:
        """How many bits of a pattern the codes omit."""
        return np.int32(23 - self.bits)

    def _unit(self, scale: Array, halvings: Array) -> Float[Array, "..."]:
        fine, coarse = lax.full_like(scale, 1), lax.full_like(scale, 2.0**-63)
        return _unit(scale) * lax.select(halvings == 0, fine, coarse)

    def _chance(
        self, seed: Array | None, shape: tuple[int, ...]
    ) -> Int32[Array, "..."] | np.int32:
        """What is added before the cut to round alternately: from step to step, the
        seed grows by a number that spreads this evenly."""
        if seed is None:
            return np.int32(1 << (22 - self.bits))
        word = evenly_spread(seed, shape) >> np.uint32(9 + self.bits)
        return word.astype(np.int32)


# The pattern of the lowest number of an unsigned grid, in units.
_LOWEST = np.int32((127 - 62) * _BINADE)
# The last bits of a scale, and the others without the sign, which a NaN may have.
_NOTE = np.int32(0x00001FFF)
_BOUND = np.int32(0x7FFFE000)


def _pattern(x: Array) -> Int32[Array, "..."]:
    return lax.bitcast_convert_type(x, np.int32)


def _number(pattern: Array) -> Float[Array, "..."]:
    return lax.bitcast_convert_type(pattern, np.float32)


def _random_note(seed: Array | None, shape: tuple[int, ...]) -> Int32[Array, "..."]:
    """Random last bits for the scale of each block."""
    if seed is None:
        return jnp.zeros((*shape[:-1], 1), np.int32)
    word = mixed(evenly_spread(seed, shape[:-1])) >> np.uint32(19)
    return word.astype(np.int32)[..., None]


def _in_range(bounds: Bounds, least: float) -> Float[Array, "..."]:
    """Bounds whose units, and the inverses of these, are normal numbers. A NaN if a
    gradient is not finite."""
    bound = lax.clamp(np.float32(least), bounds.moment, np.float32(2.0**126))
    return bound + (bounds.gradient - bounds.gradient)


def _exponent(x: Array) -> Int32[Array, "..."]:
    """The exponent of a number that is not negative, as float32 stores it: 0 for 0."""
    return _pattern(x) >> np.int32(23)


def _followed(old: Array, new: Array) -> Int32[Array, "..."]:
    """The exponent of the usual largest square of a gradient in each block. In each
    step, it moves by at most one toward that of the last gradient, so that a spike
    hardly moves it. A block without gradients keeps it."""
    near = lax.max(old - 1, lax.min(new, old + 1))
    return jnp.where(new == 0, old, jnp.where(old == 0, new, near))


def _halvings(scale: Array) -> Int32[Array, "..."]:
    """How many times the places of each block are halved: 1 or 0."""
    return _pattern(scale) & np.int32(1)


def _unit(scale: Array) -> Float[Array, "..."]:
    """The power of two of a scale. So a new bound moves no number of the grid."""
    return _number(_pattern(scale) & _EXPONENT)


def _inverse(power_of_two: Array) -> Float[Array, "..."]:
    """The inverse of a power of two, without a division: XLA on CPUs would store the
    result of a division for the blocks of each moment of each leaf."""
    return _number(2 * _ONE - _pattern(power_of_two))


# The logarithm to base 2 of 1 + f, for f from 0 to 1, is about f + c f (1 - f). With
# this c, a number that shrinks by the same small fraction in every step takes as many
# steps to pass the four codes between two powers of two as it takes to halve: each of
# the four, f, takes the inverse of 4 (1 + c (1 - 2 f)) (1 + f) times that fraction.
_CURVE = 0.315


def _bend(mantissa: Int32[Array, "..."]) -> Int32[Array, "..."]:
    """What to add to a pattern whose last 23 bits are `mantissa`, so that its logarithm
    is (almost) proportional to it."""
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
    added = lax.full_like(quarter, 0)
    for i in (1, 2, 3):
        added = lax.select(quarter == i, lax.full_like(quarter, _UNBENT[i]), added)
    return added


_SIGNED = {
    8: _Signed(np.int8, 2, is_dithered=False),
    16: _Signed(np.int16, 10, is_dithered=True),
}
_SQUARES = {
    8: _Squares(np.uint8, 2, is_bent=True),
    16: _Squares(np.uint16, 10, is_bent=False),
}
