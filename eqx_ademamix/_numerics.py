"""Dtypes, moving averages, bias factors, rounding, and hashing: arithmetic on arrays.

A decay rate is given by its complement, `1 - decay`, because the precision of the
complement matters: 0.9999 in float32 has only four significant digits of it.
"""

import functools as ft
import math
import zlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Inexact, Integer, UInt32

from ._sharding import is_explicit, known_sharding
from ._typing import DType


# The two words of a path's hash, as `path_words` gives them. `jit` makes them an array
# of JAX, but `jax.disable_jit` does not.
PathWords: TypeAlias = UInt32[Array | np.ndarray, "2"]
# An array of JAX or of NumPy.
AnyArray: TypeAlias = Array | np.ndarray | np.generic


#
# Dtypes
#


def complex_dtype(real: DType) -> DType:
    """The complex dtype with parts in a real dtype, at least complex64."""
    return np.dtype(np.complex128 if real == np.float64 else np.complex64)


def real_dtype(dtype: DType) -> DType:
    """The dtype of the parts of a complex dtype; a real dtype is unchanged."""
    if dtype.kind != "c":
        return dtype
    return np.dtype(np.float64 if dtype.itemsize == 16 else np.float32)


def compute_dtype(*dtypes: DType) -> DType:
    """The real dtype of the arithmetic on arrays of these dtypes: float32 or better."""
    is_wide = any(dtype.name in ("float64", "complex128") for dtype in dtypes)
    return np.dtype(np.float64 if is_wide else np.float32)


def as_array(x: Array | jax.ShapeDtypeStruct) -> Array:
    """An array as it is, or an array of zeros that matches a description."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return jnp.zeros(x.shape, x.dtype, device=x.sharding)
    return x


def cast(x: Array, real: DType) -> Array:
    """`x` in a real dtype, or in the complex one of that precision if it is complex."""
    return x.astype(complex_dtype(real) if jnp.iscomplexobj(x) else real)


def in_type_of(like: Array, x: Array) -> Array:
    """`x` in the dtype of another array of its shape, and weakly typed if that one is.
    Otherwise adding it would change a parameter's type, and the next step would compile
    again."""
    x = rounded(x, like.dtype)
    return jnp.zeros_like(like).at[...].set(x) if like.weak_type else x


def rounded(value: Array, dtype: DType) -> Array:
    """`value` in another dtype. A finite number stays finite: an infinite moment would
    become a NaN at the next step."""
    if dtype.itemsize == 2:
        bound = float(jnp.finfo(dtype).max)
        value = jnp.where(jnp.isfinite(value), jnp.clip(value, -bound, bound), value)
    return value.astype(dtype)


#
# Real factors of real or complex arrays. Strict promotion does not mix the two, and the
# product of a complex infinity and a real number, computed in complex numbers, contains
# a NaN.
#


def times(
    factor: Float[Array, "..."], x: Inexact[Array, "..."]
) -> Inexact[Array, "..."]:
    """`factor * x`."""
    return _componentwise(lambda part: factor * part, x)


def over(x: Inexact[Array, "..."], divisor: Float[Array, "..."]) -> Array:
    """`x / divisor`."""
    return _componentwise(lambda part: part / divisor, x)


def _componentwise(fn: Callable[[Array], Array], x: Array) -> Array:
    if jnp.iscomplexobj(x):
        return lax.complex(fn(x.real), fn(x.imag))
    return fn(x)


def abs_squared(x: Inexact[Array, "..."]) -> Float[Array, "..."]:
    """$|x|^2$, real even for a complex `x`."""
    if jnp.iscomplexobj(x):
        return jnp.square(x.real) + jnp.square(x.imag)
    return jnp.square(x)


def power(x: Inexact[Array, "..."], order: int | float) -> Inexact[Array, "..."]:
    return x if order == 1 else x**order


def norm_power(x: Inexact[Array, "..."], order: int | float) -> Float[Array, "..."]:
    """$|x|^n$, real even for a complex `x`. Where the square of a finite number
    overflows, it is the largest finite number, since an infinite average never
    recovers."""
    if order != 2:
        return jnp.abs(x) ** order
    square = abs_squared(x)
    largest = jnp.asarray(jnp.finfo(square.dtype).max, square.dtype)
    return jnp.where(jnp.isfinite(x), jnp.minimum(square, largest), square)


#
# The range of floating-point numbers
#


def largest_gradient(*kept: DType) -> float:
    """The largest magnitude of a gradient whose square and whose averages, kept in
    these dtypes, are finite. It is three quarters of the square root of the largest
    number: a codec may store an average of such squares that is too large by half, and
    0.75^2 * 1.5 < 1."""
    narrowest = min(map(compute_dtype, kept), key=lambda dtype: dtype.itemsize)
    return 0.75 * math.sqrt(float(jnp.finfo(narrowest).max))


def clip_magnitude(x: Any, bound: float | Array, xp: ModuleType = jnp) -> Any:
    """A real or complex array with its magnitudes clipped to a bound, or to an array of
    real bounds. Infinities and NaNs pass unchanged. `xp` is the module of the array,
    NumPy or `jax.numpy`."""
    if not xp.iscomplexobj(x):
        return xp.where(xp.isinf(x), x, xp.clip(x, -bound, bound))
    # The magnitude itself may overflow, so it is `scale * norm`, and `norm` is at least
    # 1 and at most the square root of 2.
    largest = xp.maximum(xp.abs(x.real), xp.abs(x.imag))
    is_large = xp.isfinite(largest) & (largest > bound / 2)
    scale = xp.where(is_large, largest, xp.ones_like(largest))
    parts = xp.where(is_large, x, xp.ones_like(x))
    real, imag = parts.real / scale, parts.imag / scale
    clipped = bound / xp.sqrt(real * real + imag * imag)
    is_clipped = is_large & (scale > clipped)
    real = xp.where(is_clipped, clipped * real, x.real)
    imag = xp.where(is_clipped, clipped * imag, x.imag)
    return lax.complex(real, imag) if xp is jnp else real + 1j * imag


def clamped(x: Inexact[Array, "..."], bound: float) -> Inexact[Array, "..."]:
    """Like `clip_magnitude`, but the bound also replaces infinities in real arrays."""
    if jnp.iscomplexobj(x):
        return clip_magnitude(x, bound)
    top = np.asarray(bound, x.dtype)
    return lax.clamp(-top, x, top)


def saturated(x: Inexact[Array, "..."]) -> Inexact[Array, "..."]:
    """`x` with the largest finite number in place of an infinite one: an overflow times
    a learning rate of 0 would be a NaN. A NaN stays one."""
    bound = np.asarray(jnp.finfo(x.dtype).max, real_dtype(x.dtype))
    return _componentwise(lambda part: lax.clamp(-bound, part, bound), x)


#
# Moving averages
#


class Decay(NamedTuple):
    r"""A decay rate $\beta$, prepared once for all arrays.

    With the scalars below, $\beta x + y$ is `kept * x + (y - pull * x)`. For $\beta$
    near 1, this is $x + (y - (1 - \beta) x)$, which keeps small changes. For $\beta$
    near 0, where that would cancel, it is $\beta x + y$ as written.
    """

    complement: Float[Array, ""]  # 1 - beta
    kept: Float[Array, ""]  # 1 if beta >= 1/2, otherwise beta
    pull: Float[Array, ""]  # 1 if beta >= 1/2, otherwise 0

    @classmethod
    def of(cls, complement: Float[Array, ""]) -> "Decay":
        is_slow = complement <= 0.5
        kept = jnp.where(is_slow, 1.0, 1.0 - complement)
        return cls(complement, kept, is_slow.astype(complement.dtype))


def moving_average(average: Array, value: Array, decay: Decay) -> Array:
    r"""$\beta a + (1 - \beta) v$ for the average $a$ and the new value $v$."""
    difference = value - times(decay.pull, average)
    return times(decay.kept, average) + times(decay.complement, difference)


def moving_sum(total: Array, value: Array, decay: Decay) -> Array:
    r"""$\beta s + v$ for the sum $s$ and the new value $v$."""
    pulled = times(decay.pull * decay.complement, total)
    return times(decay.kept, total) + (value - pulled)


def bias_factor(complement: Float[Array, ""], count: Float[Array, ""]) -> Array:
    r"""$1 - \beta^t$ from $1 - \beta$ and $t \ge 1$, without cancellation."""
    return -jnp.expm1(count * jnp.log1p(-complement))


def bias(
    complement: Float[Array, ""],
    count: Float[Array, ""],
    weight: Float[Array, ""] | None,
) -> Array:
    """The weight of all values in an average after $t$ steps. `weight` is the weight
    before the last step, which only a varying decay rate needs."""
    if weight is None:
        return bias_factor(complement, count)
    return next_weight(weight, Decay.of(complement))


def next_weight(weight: Float[Array, ""], decay: Decay) -> Array:
    r"""The weight of all values in an average after one more step:
    $1 - \prod_i \beta(i)$. (The product itself would lose the digits of a small
    weight.)"""
    weight = weight.astype(float)
    return moving_average(weight, jnp.ones_like(weight), decay)


#
# Random numbers from a hash of a seed and of the position in the array. A hash costs
# less than a generator, needs no communication between devices, and is reproducible bit
# for bit.
#


def text_hash(text: str) -> int:
    """32 bits that depend only on a text: the same in every process and on every
    machine, unlike Python's own `hash`."""
    return zlib.crc32(text.encode())


def seed_of(key: Any) -> UInt32[Array, ""]:
    """A seed from a PRNG key, an array of integers, or a tuple of integers."""
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.key_data(key)
    words = key if isinstance(key, tuple) else jnp.ravel(jnp.asarray(key))
    seed = jnp.zeros((), np.uint32)
    for word in words:
        seed = mixed(seed * _GOLDEN + _word(word) + _GOLDEN)
    return seed


def _word(x: int | Integer[Array, ""]) -> UInt32[Array, ""]:
    return jnp.asarray(np.uint32(x) if isinstance(x, int) else x).astype(np.uint32)


def seed_at(count: Integer[Array, ""], path: PathWords) -> UInt32[Array, ""]:
    """The seed for rounding a leaf in one step, from the counter and from the path, as
    `path_words` gives it. It grows by an odd number in every step."""
    step = count.astype(np.uint32) + np.uint32(1)
    return _of_parity(path, step) + step * _GOLDEN


def path_words(path: str) -> np.ndarray:
    """The hash of a path, for even and for odd steps. On CPUs, XLA would embed a single
    number in each kernel that uses it, and so compile the kernels of equal leaves once
    for each leaf. It passes an array of two numbers to one kernel (since jax 0.7.1)."""
    word = text_hash(path)
    return np.array([word, (word + 1) % 2**32], np.uint32)


def path_word(count: Integer[Array, ""], path: PathWords) -> UInt32[Array, ""]:
    """The hash of a path, from what `path_words` gives. It is the same at any count."""
    step = count.astype(np.uint32)
    return _of_parity(path, step) - (step & np.uint32(1))


def _of_parity(path: PathWords, step: UInt32[Array, ""]) -> UInt32[Array, ""]:
    """The first number in even steps, the second in odd ones."""
    if not is_explicit(known_sharding(step)):
        return jnp.asarray(path)[step & np.uint32(1)]
    # Indexing would fail for a batch of steps that is split over an explicit mesh axis.
    # A sum is another kernel for each leaf.
    is_it = jnp.arange(2, dtype=np.uint32) == (step & np.uint32(1))
    return jnp.sum(jnp.where(is_it, jnp.asarray(path), np.uint32(0)), dtype=np.uint32)


def evenly_spread(
    start: UInt32[Array, "..."], shape: tuple[int, ...]
) -> UInt32[Array, "..."]:
    """32 bits for each position of an array. As fractions of 2^32, they are spread
    evenly over neighboring positions (a Weyl sequence). `start` is added to them."""
    return _positions(shape) * _GOLDEN + start


def odd_numbers(shape: tuple[int, ...], axis: int) -> UInt32[Array, "..."]:
    """A different odd number for each position of an array. Only the axes from `axis`
    on count."""
    return _positions(shape, axis) * np.uint32(2 * int(_GOLDEN) % 2**32) + np.uint32(1)


def uniform(seed: UInt32[Array, ""], shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Numbers in [0, 1), one for each position, as float32."""
    # The first 24 of the 32 bits: as many as float32 holds exactly.
    word = mixed(evenly_spread(seed, shape)) >> np.uint32(8)
    return word.astype(np.float32) * np.float32(2.0**-24)


def fingerprint(arrays: list[Array]) -> UInt32[Array, ""]:
    """A hash of the bits of 16-bit arrays. It is odd, hence never 0."""
    total = jnp.zeros((), np.uint32)
    for x in arrays:
        bits = lax.bitcast_convert_type(x, np.uint16).astype(np.uint32)
        words = mixed(_positions(x.shape) * _GOLDEN + bits)
        total = mixed(total + jnp.sum(words, dtype=np.uint32))
    return total | np.uint32(1)


def up_or_down(x: Float[Array, "..."], chance: Array | np.float32) -> Array:
    """Rounds to an integer: up if the fraction exceeds a number in [0, 1), otherwise
    down. If that number is random, the mean of the result is `x`."""
    below = jnp.floor(x)
    return jnp.where(x - below > chance, below + 1, below)


def _positions(shape: tuple[int, ...], first: int = 0) -> UInt32[Array, "..."]:
    """The number of each entry, in row-major order, along the axes from `first` on."""
    along = [
        lax.broadcasted_iota(np.uint32, shape, axis)
        * np.uint32(math.prod(shape[axis + 1 :]) % 2**32)
        for axis in range(first, len(shape) - 1)
    ]
    if first < len(shape):
        along.append(lax.broadcasted_iota(np.uint32, shape, len(shape) - 1))
    return ft.reduce(lax.add, along) if along else jnp.zeros(shape, np.uint32)


def mixed(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """The finalizer of MurmurHash3 for 32 bits ("fmix32", Appleby 2011). Its shifts and
    its two odd multipliers were found by a search that made each input bit flip each
    output bit with a probability close to one half. Every step is invertible, so
    different positions never collide."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


# 2^32 divided by the golden ratio, an odd number. Multiples of it, modulo 2^32, spread
# neighboring integers evenly (Knuth, The Art of Computer Programming 3, section 6.4).
_GOLDEN = np.uint32(0x9E3779B9)
