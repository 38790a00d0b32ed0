"""Blocks of entries that share a scale. They lie along the rows of an array."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Inexact, Int32

from .codec import is_explicit


# Entries that a row has at the least. A scale of four bytes for 64 codes of one byte
# adds 6 %; for shorter rows it would add more.
_SHORTEST_ROW = 64
# Entries in a part of a block. XLA on CPUs materializes the input of a reduction of
# more.
_PART = 32


def rows(shape: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """Splits a shape into its first axes, and the length of the rows along which the
    blocks lie: the last axis, or as many of the last axes as have 64 entries."""
    axis = len(shape) - 1
    while axis > 0 and math.prod(shape[axis:]) < _SHORTEST_ROW:
        axis -= 1
    return shape[: max(axis, 0)], math.prod(shape[max(axis, 0) :])


def partial_maxima(x: Inexact[Array, "..."], block_size: int) -> Float[Array, "..."]:
    """The largest magnitudes in the parts of each block, or NaNs for parts that have
    one. The maximum over the last axis is left to do. Bit patterns of magnitudes, read
    as integers, are ordered as the magnitudes are, with NaNs above infinities, and XLA
    on CPUs finds the maximum of integers faster."""
    pattern = lax.bitcast_convert_type(jnp.abs(x).astype(np.float32), np.int32)
    lead, length = rows(x.shape)
    block = min(block_size, length) or 1
    pattern = _with_whole_rows(pattern, block).reshape(*lead, length)
    count, rest = divmod(length, block)
    whole = pattern[..., : count * block].reshape(*lead, count, block)
    maxima = _maxima_of_parts(whole)
    if rest or not length:
        last = _maxima_of_parts(pattern[..., None, count * block :])
        missing = maxima.shape[-1] - last.shape[-1]
        last = jnp.pad(last, [(0, 0)] * (last.ndim - 1) + [(0, missing)])
        maxima = jnp.concatenate([maxima, last], axis=-2)
    return lax.bitcast_convert_type(maxima, np.float32)


def _maxima_of_parts(x: Int32[Array, "..."]) -> Int32[Array, "..."]:
    """The maxima of parts along the last axis. Nothing is padded, since XLA on CPUs
    would materialize that."""
    count, rest = divmod(x.shape[-1], _PART)
    whole = x[..., : count * _PART].reshape(*x.shape[:-1], count, _PART)
    maxima = jnp.max(whole, axis=-1)
    if not rest and count:
        return maxima
    last = jnp.max(x[..., count * _PART :], axis=-1, initial=0, keepdims=True)
    return jnp.concatenate([maxima, last], axis=-1)


def spread(per_block: Array, shape: tuple[int, ...], block_size: int) -> Array:
    """For each entry of an array, what `per_block` has for its block."""
    lead, length = rows(shape)
    block = min(block_size, length) or 1
    each = jnp.broadcast_to(per_block[..., None], (*per_block.shape, block))
    whole = each.reshape(*lead, per_block.shape[-1] * block)[..., :length]
    return whole.reshape(shape)


def _with_whole_rows(x: Array, block: int) -> Array:
    """An array with every row whole on some device, if its sharding is part of its type
    and does not divide the blocks. Such an array could not be reshaped otherwise."""
    sharding = (
        getattr(jax.typeof(x), "sharding", None) if hasattr(jax, "typeof") else None
    )
    lead, length = rows(x.shape)
    if not is_explicit(sharding) or sharding is None:
        return x
    kept = sharding.spec[: len(lead)]
    split = [name for names in sharding.spec[len(lead) :] for name in _names(names)]
    parts = math.prod(sharding.mesh.shape[name] for name in split)
    is_whole = x.ndim == len(lead) + 1 and length % (block * parts) == 0
    return x if is_whole or not split else jax.sharding.reshard(x, P(*kept))


def _names(names: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if names is None else names if isinstance(names, tuple) else (names,)
