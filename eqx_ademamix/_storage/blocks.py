"""Blocks of entries that share a scale. They lie along the rows of an array."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Inexact, Int32

from .._sharding import is_explicit


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
    on CPUs finds the maximum of integers faster.

    If blocks span several devices, they exchange the maxima of parts, and nothing else.
    """
    pattern = lax.bitcast_convert_type(jnp.abs(x).astype(np.float32), np.int32)
    lead, length = rows(x.shape)
    block = min(block_size, length) or 1
    part = _PART if block == length else _divisor(block)
    maxima = _maxima_of_parts(_as_rows(pattern, lead, part), part)
    each, count = -(-block // part), -(-length // block) or 1
    missing = count * each - maxima.shape[-1]
    if missing:
        maxima = jnp.pad(maxima, [(0, 0)] * len(lead) + [(0, missing)])
    maxima = _as_rows(maxima, lead, each).reshape(*lead, count, each)
    return lax.bitcast_convert_type(maxima, np.float32)


def _divisor(block: int) -> int:
    """The largest part into which a block can be divided."""
    return next(part for part in range(_PART, 0, -1) if block % part == 0)


def _maxima_of_parts(x: Int32[Array, "..."], part: int) -> Int32[Array, "..."]:
    """The maxima of parts along the last axis, the last of which may be shorter.
    Nothing is padded, since XLA on CPUs would materialize that."""
    count, rest = divmod(x.shape[-1], part)
    whole = x[..., : count * part].reshape(*x.shape[:-1], count, part)
    maxima = jnp.max(whole, axis=-1)
    if not rest and count:
        return maxima
    last = jnp.max(x[..., count * part :], axis=-1, initial=0, keepdims=True)
    return jnp.concatenate([maxima, last], axis=-1)


def spread(per_block: Array, shape: tuple[int, ...], block_size: int) -> Array:
    """For each entry of an array, what `per_block` has for its block."""
    lead, length = rows(shape)
    block = min(block_size, length) or 1
    each = jnp.broadcast_to(per_block[..., None], (*per_block.shape, block))
    whole = each.reshape(*lead, per_block.shape[-1] * block)[..., :length]
    return whole.reshape(shape)


def _as_rows(x: Array, lead: tuple[int, ...], unit: int) -> Array:
    """The rows of an array with these first axes. If its sharding is part of its type
    and splits a unit of a row, every row is whole on some device, since such an array
    could not be reshaped otherwise."""
    length = math.prod(x.shape[len(lead) :])
    typeof = getattr(jax, "typeof", None)
    sharding = getattr(typeof(x), "sharding", None) if typeof else None
    if is_explicit(sharding) and sharding is not None:
        names = [name for x in sharding.spec[len(lead) :] for name in _names(x)]
        count = math.prod(sharding.mesh.shape[name] for name in names)
        is_whole = x.ndim == len(lead) + 1 and length % (unit * count) == 0
        if names and not is_whole:
            x = jax.sharding.reshard(x, P(*sharding.spec[: len(lead)]))
    return x.reshape(*lead, length)


def _names(names: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if names is None else names if isinstance(names, tuple) else (names,)
