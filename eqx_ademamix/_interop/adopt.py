"""Moments of another optimizer, stored as our own are."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from .._checks import checked_leaves
from .._filters import trained_arrays
from .._inspection import decoded, find
from .._numerics import DTypeLike, cast, compute_dtype
from .._paths import Node, flatten
from .._state import AdEMAMixState
from .._storage.codec import Stored, encode_like


def our_state(state: PyTree) -> AdEMAMixState:
    return decoded(find(state, is_ours, "of AdEMAMix", name="state"))


def is_ours(x: Node) -> bool:
    return isinstance(x, AdEMAMixState)


def adopted(
    name: str, tree: PyTree, trained: PyTree, own: PyTree, *, is_real: bool = False
) -> PyTree:
    """Copies of a tree of another optimizer's moments, stored as our `own` are.
    `trained` is a tree of our moments that has one for every trained parameter."""
    like = flatten(trained)
    arrays = trained_arrays(True, flatten(tree))
    found = checked_leaves(
        name,
        arrays.rebuilt(arrays.values),
        like,
        other="the state of `optim`",
        keep_extra=True,
        complex_too=not is_real,
    )
    pairs = zip(found, flatten(own).values, strict=True)
    return like.rebuilt(
        [None if x is None or y is None else in_format(x, y) for x, y in pairs]
    )


def in_format(x: Array, own: Stored) -> Stored:
    """A copy of a moment, stored as our own of that parameter is."""
    if own.dtype.kind != "c":
        x = jnp.real(x)  # optax starts the `nu` of a complex parameter complex
    real = compute_dtype(x.dtype, own.dtype)
    return copies(encode_like(cast(jnp.asarray(x), real), own))


def copies(tree: PyTree) -> PyTree:
    return jax.tree.map(copied, tree)


def copied(x: Any, dtype: DTypeLike | None = None) -> Array:
    """A copy of an array (of NumPy, too) in a buffer of its own, so that either may be
    donated, with the same sharding."""
    return jnp.array(x, dtype=dtype, copy=True)
