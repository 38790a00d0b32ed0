"""Blocks of entries that share a scale. They lie along the rows of an array."""

import functools as ft
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
# Entries that one pass of a reduction combines. XLA on CPUs materializes the input of a
# reduction of more than 32.
_REDUCED = 16


def rows(shape: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """Splits a shape into its first axes, and the length of the rows along which the
    blocks lie: the last axis, or as many of the last axes as have 64 entries."""
    axis = len(shape) - 1
    while axis > 0 and math.prod(shape[axis:]) < _SHORTEST_ROW:
        axis -= 1
    return shape[: max(axis, 0)], math.prod(shape[max(axis, 0) :])


def largest(x: Inexact[Array, "..."], block_size: int) -> Float[Array, "..."]:
    """The largest magnitude in each block, or a NaN if the block has one. The bit
    patterns of magnitudes, read as integers, are ordered as the magnitudes are, with
    NaNs above infinities, and XLA on CPUs finds the maximum of integers faster."""
    pattern = lax.bitcast_convert_type(jnp.abs(x).astype(np.float32), np.int32)
    lead, length = rows(x.shape)
    block = min(block_size, length) or 1
    pattern = _with_whole_rows(pattern, block).reshape(*lead, length)
    count, rest = divmod(length, block)
    blocks = pattern[..., : count * block].reshape(*lead, count, block)
    maxima = _maximum(blocks)
    if rest or not length:
        last = _maximum(pattern[..., count * block :])
        maxima = jnp.concatenate([maxima, last[..., None]], axis=-1)
    return lax.bitcast_convert_type(maxima, np.float32)


def _maximum(x: Int32[Array, "..."]) -> Int32[Array, "..."]:
    """The maximum along the last axis. Nothing is padded, since XLA on CPUs would
    materialize that."""
    rests: list[Array] = []
    while x.shape[-1] > 2 * _REDUCED:
        whole = x.shape[-1] // _REDUCED * _REDUCED
        if whole < x.shape[-1]:
            rests.append(jnp.max(x[..., whole:], axis=-1))
        x = x[..., :whole].reshape(*x.shape[:-1], whole // _REDUCED, _REDUCED)
        x = jnp.max(x, axis=-1)
    return ft.reduce(jnp.maximum, rests, jnp.max(x, axis=-1, initial=0))


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
