"""Several ways to store a moment, both from this package and from elsewhere.

Each one is a function that takes a float32 array and a key. It returns the array as
read back.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from eqx_ademamix import AbstractCodec, ScaledFloat8, ScaledFloat16, SplitBfloat16


BLOCK = 256


class Storage(NamedTuple):
    """A way to store a moment."""

    name: str
    bytes: float
    """Bytes per parameter, including scales."""
    round_trip: Callable[[Array, Array], Array]


def _ours(name: str, codec: AbstractCodec) -> Storage:
    def round_trip(x: Array, key: Array) -> Array:
        return codec.decode(codec.encode(x, key))

    return Storage(name, codec.bytes_per_parameter((4096,)), round_trip)


def _bfloat16(x: Array, key: Array) -> Array:
    return _rounded_to_bfloat16(x)


def _rounded_to_bfloat16(x: Array) -> Array:
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def _stochastic_bfloat16(x: Array, key: Array) -> Array:
    pattern = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    cut = (pattern + noise) & jnp.uint32(0xFFFF0000)
    return jax.lax.bitcast_convert_type(cut, jnp.float32)


def _in_blocks(fn: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    """Applies a function of a block and its largest magnitude to each block."""

    def round_trip(x: Array, key: Array) -> Array:
        blocks = x.reshape(-1, BLOCK)
        largest = jnp.max(jnp.abs(blocks), axis=1, keepdims=True)
        return fn(blocks, jnp.where(largest > 0, largest, 1.0)).reshape(x.shape)

    return round_trip


def _scaled_float16(blocks: Array, largest: Array) -> Array:
    scale = jnp.exp2(15 - jnp.ceil(jnp.log2(largest)))
    return (blocks * scale).astype(jnp.float16).astype(jnp.float32) / scale


def _linear(bits: int) -> Callable[[Array, Array], Array]:
    top = 2.0 ** (bits - 1) - 1
    return lambda blocks, largest: jnp.round(blocks / largest * top) * largest / top


def dynamic_map() -> Any:
    """The 256 numbers of dynamic tree quantization (Dettmers et al. 2022,
    arXiv:2110.02861, section 1.3).

    Each number has a sign, a power of ten from 1e-6 to 1, and a linear fraction between
    0.1 and 1. The fraction gets one more bit with each power. The map also contains 0
    and 1.
    """
    positive = []
    for exponent in range(7):
        edges = np.linspace(0.1, 1, 2**exponent + 1)
        positive.extend((edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6))
    positive = np.array(positive)
    return np.sort(np.concatenate([-positive, [0.0, 1.0], positive]))


def _dynamic(blocks: Array, largest: Array) -> Array:
    numbers = jnp.asarray(dynamic_map(), jnp.float32)
    middles = (numbers[:-1] + numbers[1:]) / 2
    return numbers[jnp.searchsorted(middles, blocks / largest)] * largest


_SCALE = 4 / BLOCK  # one float32 number per block

STORAGES = (
    Storage("float32", 4, lambda x, key: x),
    Storage("bfloat16, to nearest", 2, _bfloat16),
    Storage("bfloat16, stochastic", 2, _stochastic_bfloat16),
    Storage("float16, scaled, to nearest", 2 + _SCALE, _in_blocks(_scaled_float16)),
    Storage("int16, linear", 2 + _SCALE, _in_blocks(_linear(16))),
    Storage("int8, linear", 1 + _SCALE, _in_blocks(_linear(8))),
    Storage("int8, dynamic map", 1 + _SCALE, _in_blocks(_dynamic)),
    _ours("ScaledFloat8", ScaledFloat8()),
    _ours("ScaledFloat16", ScaledFloat16()),
    _ours("SplitBfloat16", SplitBfloat16()),
)
