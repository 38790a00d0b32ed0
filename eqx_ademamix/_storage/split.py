"""The codec of three bytes: bfloat16 and one more byte."""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int32, UInt32

from .._numerics import uniform
from .._typing import no_type_check
from .codec import AbstractCodec


_INFINITY = np.int32(0x7F800000)


class SplitBfloat16(AbstractCodec):
    r"""Three bytes: a bfloat16 number, and one byte for the digits that it lacks.

    Together these are the first 24 bits of float32: its whole range of exponents and 16
    significant bits, so there are no blocks and no scales. Values are rounded up or
    down at random so that the mean is exact. The relative error is less than $2^{-15}$.
    The first of the two arrays is the bfloat16 number nearest to the stored value.
    """

    @no_type_check
    def encode_real(self, value: Array, seed: Array | None) -> tuple[Array, ...]:
        """See [`eqx_ademamix.AbstractCodec`][]."""
        pattern = lax.bitcast_convert_type(value, np.int32)
        size = pattern & np.int32(0x7FFFFFFF)
        # Capped so that the nearest bfloat16 number, 0x7F7F, is still finite.
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


def _not_finite(pattern: Int32[Array, "..."]) -> Int32[Array, "..."]:
    """The pattern of an infinity or of a NaN. The last bits get lost, so they must not
    be what distinguishes the two."""
    return jnp.where(pattern == _INFINITY, _INFINITY, np.int32(0x7FC00000))


def _chance_of_256(
    seed: UInt32[Array, ""] | None, shape: tuple[int, ...]
) -> Int32[Array, "..."] | np.int32:
    """What is added before the last eight bits are cut off: half of 256 to round to
    nearest, a random number below 256 to round at random."""
    if seed is None:
        return np.int32(128)
    return (uniform(seed, shape) * np.float32(256)).astype(np.int32)
