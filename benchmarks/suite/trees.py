"""Parameters, and the number of bytes that a step moves."""

from typing import Any

import jax
import jax.numpy as jnp


Tree = dict[str, jax.Array]


def shape_of_leaf(parameters: int, leaves: int) -> tuple[int, int]:
    """Rows of 256, a width that occurs in models and that a block of codes spans."""
    size = max(parameters // leaves, 1)
    columns = min(256, size)
    return size // columns, columns


def normal_tree(parameters: int, leaves: int, dtype: Any) -> Tree:
    """Leaves of one shape, like the layers of a transformer."""
    shape = shape_of_leaf(parameters, leaves)
    keys = jax.random.split(jax.random.key(0), leaves)
    draw = jax.jit(lambda key: jax.random.normal(key, shape).astype(dtype))
    return {f"layer{i}": draw(key) for i, key in enumerate(keys)}


def count(tree: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))


def num_bytes(tree: Any) -> int:
    arrays = [x for x in jax.tree.leaves(tree) if hasattr(x, "dtype")]
    return sum(x.size * jnp.dtype(x.dtype).itemsize for x in arrays)


def moved_bytes(params: Any, grads: Any, state: Any) -> int:
    """What a step must move: it reads everything, and writes parameters and state.

    This is 9 x 4 bytes per parameter for AdEMAMix in float32: p, g, m1, m2, nu are read
    and p, m1, m2, nu are written.
    """
    return 2 * num_bytes(params) + num_bytes(grads) + 2 * num_bytes(state)
