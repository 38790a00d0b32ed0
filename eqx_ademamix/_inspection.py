"""What a state holds, and what it costs."""

import math
from typing import Any, TypeVar

import jax
import jax.tree_util as jtu
from jaxtyping import PyTree

from ._ademamix import AdEMAMixState
from ._checks import describe, leaves_with_path, no_type_check, on_device
from ._encoded import Encoded, is_encoded
from ._formats import decode


State = TypeVar("State")


@no_type_check
def decoded(state: State) -> State:
    """The same state with its moments as arrays: to read, plot or convert it.

    **Arguments:**

    - `state`: an [`eqx_ademamix.AdEMAMixState`][], or any tree that contains some.

    **Returns:**

    The tree with a float32 (or complex64) array in the place of each encoded moment.
    Whatever is stored as a dtype stays as it is, and shares its buffer with `state`.

    !!! Example

        ```python
        import jax.numpy as jnp
        import eqx_ademamix

        compact = eqx_ademamix.StateFormat.compact()
        optim = eqx_ademamix.AdEMAMix(1e-3, state_format=compact)
        state = eqx_ademamix.init(optim, jnp.zeros((64, 256)))
        assert eqx_ademamix.decoded(state).m2.dtype == jnp.float32
        ```
    """
    return jax.tree.map(decode, on_device(state), is_leaf=is_encoded)


@no_type_check
def state_bytes(state: PyTree[Any]) -> int:
    """The bytes that a state takes.

    **Arguments:**

    - `state`: a state, or any tree of arrays. `jax.ShapeDtypeStruct` counts as the
        array that it describes, so `eqx.filter_eval_shape(eqx_ademamix.init, optim,
        model)` shows what a state will cost before it is made.

    **Returns:**

    The sum of the arrays' sizes in bytes, over all devices if they are sharded.

    !!! Example

        ```python
        import jax.numpy as jnp
        import eqx_ademamix

        params = jnp.zeros((64, 256))
        compact = eqx_ademamix.StateFormat.compact()
        optim = eqx_ademamix.AdEMAMix(1e-3, state_format=compact)
        state = eqx_ademamix.init(optim, params)
        assert eqx_ademamix.state_bytes(state) < 4.1 * params.size
        ```
    """
    arrays = (x for x in jtu.tree_leaves(state) if hasattr(x, "dtype"))
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)


@no_type_check
def state_report(state: PyTree[Any]) -> str:
    """Says how the moments of each parameter are stored, path by path, and what they
    cost.

    **Arguments:**

    - `state`: an [`eqx_ademamix.AdEMAMixState`][], or a tree that contains one. Its
        leaves may be `jax.ShapeDtypeStruct`.

    **Returns:**

    Text for a person to read: a line for each trained array with its path, its shape,
    how `m1`, `m2` and `nu` are stored, and their bytes a parameter.

    **Raises:**

    - `ValueError`: if there is no such state or several.

    !!! Example

        ```python
        import jax.numpy as jnp
        import eqx_ademamix

        params = {"bias": jnp.zeros(256), "weight": jnp.zeros((64, 256))}
        compact = eqx_ademamix.StateFormat.compact()
        optim = eqx_ademamix.AdEMAMix(1e-3, state_format=compact)
        print(eqx_ademamix.state_report(eqx_ademamix.init(optim, params)))
        ```
        ```text
        The state takes 68,812 bytes, 4.14 a parameter.

          path        shape      m1            m2             nu            bytes
          ['bias']    (256,)     float32       float32        float32       12.00
          ['weight']  (64, 256)  ScaledFloat8  ScaledFloat16  ScaledFloat8   4.01
        ```
    """
    total, state = state_bytes(state), _only_state(state)
    m1, m2, nu = (leaves_with_path(tree) for tree in (state.m1, state.m2, state.nu))
    places = [
        place for place in zip(m2, m1, nu, strict=True) if place[0][1] is not None
    ]
    rows = [_row(path, a, b, c) for (path, b), (_, a), (_, c) in places]
    size = sum(math.prod(m2.shape) for (_, m2), *_ in places)
    rows = [("path", "shape", "m1", "m2", "nu", "bytes"), *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(6)]
    lines = [_line(row, widths) for row in rows]
    average = f", {total / size:.2f} a parameter" if size else ""
    return "\n".join([f"The state takes {total:,} bytes{average}.", "", *lines])


def _only_state(tree: Any) -> AdEMAMixState:
    is_one = lambda x: isinstance(x, AdEMAMixState)
    found = [x for x in jtu.tree_leaves(tree, is_leaf=is_one) if is_one(x)]
    if len(found) != 1:
        raise ValueError(
            f"`state` is {describe(tree)} with {len(found) or 'no'} states of AdEMAMix "
            "in it, but one was expected."
        )
    return found[0]


def _row(path: Any, m1: Any, m2: Any, nu: Any) -> tuple[str, ...]:
    size, total = math.prod(m2.shape), state_bytes((m1, m2, nu))
    each = f"{total / size:.2f}" if size else "-"
    kinds = map(_kind, (m1, m2, nu))
    return (jtu.keystr(path) or "(the tree itself)", str(m2.shape), *kinds, each)


def _kind(moment: Any) -> str:
    if isinstance(moment, Encoded):
        return type(moment.codec).__name__
    return "none" if moment is None else str(moment.dtype)


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
    return "  " + "  ".join([*cells[:-1], row[-1].rjust(widths[-1])])
