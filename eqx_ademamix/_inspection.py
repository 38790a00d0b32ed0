"""What a state holds, what it costs, and where it is inside of another one."""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from ._checks import (
    check_alive,
    check_progress,
    check_state_type,
    check_supported,
)
from ._hyperparams import H, public_part
from ._paths import (
    Node,
    Path,
    children,
    describe,
    full_path_text,
    is_leaf,
    leaves_with_path,
    on_device,
    shortened,
)
from ._state import AbstractMomentState, S
from ._step import AbstractMomentOptimizer
from ._storage.codec import Encoded, Stored, Struct, decode, is_encoded
from ._storage.format import Moments
from ._typing import no_type_check


State = TypeVar("State")


@no_type_check
def hyperparams(optim: AbstractMomentOptimizer[S, H], state: S) -> H:
    """The hyperparameters as the next `update` will use them, with schedules resolved
    at the state's counters. Works inside and outside of `jit`.

    **Arguments:**

    - `optim`: an [`eqx_ademamix.AdEMAMix`][] or [`eqx_ademamix.SimplifiedAdEMAMix`][].
    - `state`: its state.

    **Returns:**

    An [`eqx_ademamix.Hyperparams`][] or [`eqx_ademamix.SimplifiedHyperparams`][], whose
    fields are arrays of shape `()` in the default float.

    **Raises:**

    - `ValueError` or `TypeError`: if the state does not belong to the optimizer, or has
        a negative counter.

    !!! Example

        ```python
        import jax.numpy as jnp
        import eqx_ademamix

        optim = eqx_ademamix.AdEMAMix(
            1e-3, alpha=eqx_ademamix.alpha_scheduler(8.0, warmup=100)
        )
        state = eqx_ademamix.init(optim, jnp.zeros(3))
        assert eqx_ademamix.hyperparams(optim, state).alpha == 0.0
        ```
    """
    check_supported(optim, AbstractMomentOptimizer)
    check_state_type(state, None, optim.state_type)
    for name, tree in {"optim": optim, "state": state}.items():
        check_alive(name, tree)
    check_progress(state)
    return public_part(optim.resolve(on_device(state)))


@no_type_check
def decoded(state: State) -> State:
    """The same state with its moments as arrays, so that you can read, plot or convert
    them.

    **Arguments:**

    - `state`: the state of an optimizer, or any tree that contains states.

    **Returns:**

    The tree with a float32 (or complex64) array in place of each encoded moment.
    Moments that are stored as a dtype stay as they are, and share their buffers with
    `state`.

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
    of = lambda x: decode(x) if is_encoded(x) else x
    return jax.tree.map(of, on_device(state), is_leaf=is_encoded)


@no_type_check
def state_bytes(state: PyTree[Any]) -> int:
    """The bytes that a state takes.

    **Arguments:**

    - `state`: a state, or any tree of arrays. A `jax.ShapeDtypeStruct` counts as the
        array that it describes, so `eqx.filter_eval_shape(eqx_ademamix.init, optim,
        model)` shows what a state will take before it is made.

    **Returns:**

    The sum of the sizes of the arrays in bytes, over all devices if they are
    sharded.

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
    """Says how the moments of each parameter are stored, and how many bytes they take.

    **Arguments:**

    - `state`: an [`eqx_ademamix.AdEMAMixState`][] or
        [`eqx_ademamix.SimplifiedAdEMAMixState`][], or a tree that contains one. Its
        leaves may be `jax.ShapeDtypeStruct`s.

    **Returns:**

    Text for a person to read. For each trained array, a line has its path, its shape,
    how each moment is stored, and the bytes per parameter of all moments.

    **Raises:**

    - `ValueError`: if there is no such state, or more than one.

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
        The state takes 68,812 bytes, 4.14 per parameter.

          path        shape      m1            m2             nu            bytes
          ['bias']    (256,)     float32       float32        float32       12.00
          ['weight']  (64, 256)  ScaledFloat8  ScaledFloat16  ScaledFloat8   4.01
        ```
    """
    total, state = state_bytes(state), _only_state(state)
    shown = [i for i, name in enumerate(state.names) if name is not None]
    head = ("path", "shape", *(str(state.names[i]) for i in shown), "bytes")
    places = _places(state.moments)
    rows = [head, *(_row(path, moments, shown) for path, moments in places)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [_line(row, widths) for row in rows]
    size = sum(math.prod(moments.m2.shape) for _, moments in places)
    average = f", {total / size:.2f} per parameter" if size else ""
    return "\n".join([f"The state takes {total:,} bytes{average}.", "", *lines])


def _places(moments: Moments[PyTree]) -> list[tuple[Path, Moments[Stored]]]:
    """The moments of each trained leaf, with its path."""
    m2, nu = leaves_with_path(moments.m2), leaves_with_path(moments.nu)
    m1 = dict(leaves_with_path(moments.m1))
    places = [
        (path, Moments(m1.get(path), x, y))
        for (path, x), (_, y) in zip(m2, nu, strict=True)
    ]
    return [place for place in places if place[1].m2 is not None]


def _only_state(tree: PyTree) -> AbstractMomentState[Any]:
    is_one = lambda x: isinstance(x, AbstractMomentState)
    found = [x for x in jtu.tree_leaves(tree, is_leaf=is_one) if is_one(x)]
    if len(found) != 1:
        raise ValueError(
            f"`state` is {describe(tree)} with {len(found) or 'no'} states of AdEMAMix "
            "in it, but one was expected."
        )
    return found[0]


def _row(path: Path, moments: Moments[Stored], shown: list[int]) -> tuple[str, ...]:
    shape = moments.m2.shape
    size, total = math.prod(shape), state_bytes(moments)
    each = f"{total / size:.2f}" if size else "-"
    kinds = (_kind(moments[i]) for i in shown)
    return (full_path_text(path), str(shape), *kinds, each)


def _kind(moment: Stored | Struct | None) -> str:
    if isinstance(moment, Encoded):
        return type(moment.codec).__name__
    return "none" if moment is None else str(moment.dtype)


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
    return "  " + "  ".join([*cells[:-1], row[-1].rjust(widths[-1])])


#
# Finding a state inside of another one
#


def find(
    tree: PyTree,
    is_one: Callable[[Node], bool],
    of_what: str,
    name: str = "opt_state",
) -> Node:
    """The only state of a kind that a tree contains, with NumPy's arrays converted to
    JAX's."""
    found = [x for x in jtu.tree_leaves(tree, is_leaf=is_one) if is_one(x)]
    if len(found) != 1:
        kinds = ", ".join(dict.fromkeys(_kinds(tree))) or describe(tree)
        raise ValueError(
            f"`{name}` has {len(found) or 'no'} states {of_what}, but one was "
            f"expected. Found in it: {shortened(kinds, 300)}. Pass the state of the "
            "optimizer, or the part of it that you mean."
        )
    check_alive(name, found[0])
    for counter in ("count", "count_m2", "t"):
        count = getattr(found[0], counter, 0)
        # Every named tuple has a method `count`.
        if not callable(count) and jnp.shape(count) != ():
            raise ValueError(
                f"{name}.{counter} is {describe(count)}, but a scalar was expected. "
                "Convert a batch of states under `eqx.filter_vmap`."
            )
        check_count(f"{name}.{counter}", count)
    return on_device(found[0])


def _kinds(node: Node) -> list[str]:
    """The names of the classes of the states inside a state."""
    if is_leaf(node):
        return []
    inner = [child for _, child in children(node)[0] if not is_leaf(child)]
    if type(node) in (list, tuple, dict):
        return [kind for child in inner for kind in _kinds(child)]
    inner = [x for x in inner if isinstance(x, tuple) or type(x) in (list, dict)]
    return [type(node).__name__, *(kind for x in inner for kind in _kinds(x))]
