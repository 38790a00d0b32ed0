"""Blocks of entries that share a scale. They lie along the rows of an array."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Inexact, Int32

from .._sharding import is_explicit, spec_of


# The fewest entries in a row. A scale of four bytes for 64 codes of one byte adds 6%;
# for shorter rows, it would add more.
_SHORTEST_ROW = 64
# Entries in a part of a block. XLA on CPUs materializes the input of a larger
# reduction.
_PART = 32


def rows(shape: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """Splits a shape into its first axes and the length of the rows along which the
    blocks lie: the last axis, or as many of the last axes as together have 64
    entries."""
    axis = len(shape) - 1
    while axis > 0 and math.prod(shape[axis:]) < _SHORTEST_ROW:
        axis -= 1
    return shape[: max(axis, 0)], math.prod(shape[max(axis, 0) :])


def are_whole(shape: tuple[int, ...], shard: tuple[int, ...], block_size: int) -> bool:
    """Whether shards of this shape hold whole blocks."""
    lead, length = rows(shape)
    block, first = min(block_size, length) or 1, len(lead)
    if shard[first:] == shape[first:]:
        return True
    is_run = shard[first + 1 :] == shape[first + 1 :]
    return is_run and math.prod(shard[first:]) % block == 0


def partial_maxima(x: Inexact[Array, "..."], block_size: int) -> Float[Array, "..."]:
    """The largest magnitudes in the parts of each block, or NaNs for parts that have
    one. The caller takes the maximum over the last axis. Bit patterns of magnitudes,
    read as integers, have the same order as the magnitudes, with NaNs above infinities,
    and XLA on CPUs finds the maximum of integers faster.

    If aligned blocks span several devices, the devices exchange maxima, not entries.
    """
    pattern = lax.bitcast_convert_type(jnp.abs(x).astype(np.float32), np.int32)
    lead, length = rows(x.shape)
    block = min(block_size, length) or 1
    if block == length or block % _PART == 0:
        maxima = _of_aligned_blocks(pattern, lead, block)
    else:
        maxima = _of_other_blocks(pattern, lead, block)
    while maxima.shape[-1] > _PART:
        maxima = _maxima_of_parts(maxima)
    return lax.bitcast_convert_type(maxima, np.float32)


def _of_aligned_blocks(
    x: Int32[Array, "..."], lead: tuple[int, ...], block: int
) -> Int32[Array, "..."]:
    """The maxima of the parts of blocks that are whole rows, or made of whole parts. A
    device needs only the maxima of a block, so blocks come after parts."""
    maxima = _maxima_of_parts(_as_rows(x, lead, _PART))
    each = -(-block // _PART)
    maxima = _padded(maxima, -maxima.shape[-1] % each)
    maxima = _as_rows(maxima, lead, each)
    return maxima.reshape(*lead, maxima.shape[-1] // each, each)


def _of_other_blocks(
    x: Int32[Array, "..."], lead: tuple[int, ...], block: int
) -> Int32[Array, "..."]:
    """The maxima of the parts of blocks, the last of which may be shorter."""
    x = _as_rows(x, lead, block)
    count, rest = divmod(x.shape[-1], block)
    whole = x[..., : count * block].reshape(*lead, count, block)
    maxima = _maxima_of_parts(whole)
    if not rest:
        return maxima
    last = _maxima_of_parts(x[..., None, count * block :])
    last = _padded(last, maxima.shape[-1] - last.shape[-1])
    return jnp.concatenate([maxima, last], axis=-2)


def _padded(x: Array, missing: int) -> Array:
    """Adds zeros at the end of the last axis."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x


def _maxima_of_parts(x: Int32[Array, "..."]) -> Int32[Array, "..."]:
    """The maxima of parts along the last axis, the last of which may be shorter. The
    array is not padded, since XLA on CPUs would materialize that."""
    count, rest = divmod(x.shape[-1], _PART)
    whole = x[..., : count * _PART].reshape(*x.shape[:-1], count, _PART)
    maxima = jnp.max(whole, axis=-1)
    if not rest and count:
        return maxima
    last = jnp.max(x[..., count * _PART :], axis=-1, initial=0, keepdims=True)
    return jnp.concatenate([maxima, last], axis=-1)


def spread(per_block: Array, shape: tuple[int, ...], block_size: int) -> Array:
    """For each entry of an array, the value of `per_block` for its block."""
    lead, length = rows(shape)
    block = min(block_size, length) or 1
    each = jnp.broadcast_to(per_block[..., None], (*per_block.shape, block))
    whole = each.reshape(*lead, per_block.shape[-1] * block)[..., :length]
    return whole.reshape(shape)


def _as_rows(x: Array, lead: tuple[int, ...], unit: int) -> Array:
    """The rows of an array with these first axes. If the sharding is part of the type
    and splits a unit of a row, each row is first made whole on a device, since the
    array could not be reshaped otherwise."""
    first, length = len(lead), math.prod(x.shape[len(lead) :])
    typeof = getattr(jax, "typeof", None)
    sharding: Any = getattr(typeof(x), "sharding", None) if typeof else None
    if is_explicit(sharding):
        spec, mesh = spec_of(sharding, x.ndim), sharding.mesh
        count = math.prod(mesh.shape[name] for axis in spec[first:] for name in axis)
        is_run = not any(spec[first + 1 :]) and length % (unit * count) == 0
        if count > 1 and not is_run:
            whole = P(*sharding.spec[:first])
            x = jax.sharding.reshard(x, NamedSharding(mesh, whole))
    return x.reshape(*lead, length)
