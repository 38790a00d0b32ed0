"""Another storage format in the middle of a run."""

import dataclasses
import functools as ft
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PyTree

from .._checks import check_counter
from .._hyperparams import Scalar
from .._inspection import decoded, find, of
from .._memory import placed_as
from .._numerics import cast, compute_dtype
from .._optimizer import AbstractOptimizer, OptaxOptimizer
from .._paths import Node, Path, flatten, leaves_with_path
from .._state import AbstractMomentState
from .._storage.codec import Stored
from .._typing import no_type_check
from .adopt import adopted, copies
from .target import blank_state
from .weights import new_weight, weight_after


State = TypeVar("State")


@no_type_check
def change_state_format(
    state: State, optim: AbstractOptimizer[Any] | OptaxOptimizer, params: PyTree
) -> State:
    r"""Stores the moments of a state in another format or in another memory, in the
    middle of a run.

    Use it when `state_format` changes, when an [`eqx_ademamix.Offloaded`][] is added or
    removed, or after arithmetic on the arrays of [`eqx_ademamix.decoded`][], to encode
    them again.

    **Arguments:**

    - `state`: the state of an [`eqx_ademamix.AdEMAMix`][] or
        [`eqx_ademamix.SimplifiedAdEMAMix`][], or a tree that contains exactly one, such
        as the state of a chain or of an [`eqx_ademamix.Compensated`][].
    - `optim`: the optimizer that continues the run, with the new `state_format`. It may
        be an optimizer that contains the one of this package.
    - `params`: the model.

    **Returns:**

    The same tree, with the moments stored as `optim` stores them, rounded to nearest,
    in the memory where it keeps them. Moments that are already stored that way are
    copied bit for bit. Counters and all other parts of `state` keep their values. No
    buffer is shared with `state`. If `optim` has `b1=0` and so needs no `m1`, it is
    dropped. If only one of the two has `bias_correct_m2`, then `m2_weight` is dropped,
    or computed from the `b3` of `optim` over all steps taken. The same holds for
    `m1_weight` and `nu_weight` if `b1` or `b2` is a schedule in only one of the two.
    Where one of these two is dropped, the moment is multiplied by the quotient of the
    weight that `optim` assumes, $1 - \beta^t$, and the weight that it had, so that its
    corrected value stays the same. If only one of the two has `skip_nonfinite`, then
    `skipped` is dropped, or starts at 0.

    **Raises:**

    - `ValueError` or `TypeError`: if there is no state of the kind that `optim` has, or
        more than one; if it belongs to another model; if it has no `m1`, but `optim`
        needs one; if it has illegal values (such as NaN, or a negative `nu`); or if
        arithmetic has changed the dtype of a counter.

    !!! Example

        ```python
        import jax.numpy as jnp
        import eqx_ademamix

        params = {"w": jnp.ones((64, 256))}
        state = eqx_ademamix.init(eqx_ademamix.AdEMAMix(1e-3), params)

        compact = eqx_ademamix.StateFormat.compact()
        optim = eqx_ademamix.AdEMAMix(1e-3, state_format=compact)
        state = eqx_ademamix.change_state_format(state, optim, params)
        assert eqx_ademamix.state_bytes(state) < 4.1 * params["w"].size
        ```
    """
    _, own = blank_state(optim, params, AbstractMomentState)
    cls = type(own)
    is_one = lambda x: isinstance(x, cls)
    old = find(state, is_one, of(cls), name="state")
    for name in (*old.counters, *(["skipped"] if old.skipped is not None else [])):
        check_counter(name, getattr(old, name))
    scalars = _new_weights(own, old, optim)
    if _differ(own.skipped, old.skipped):
        scalars["skipped"] = own.skipped
    ours = _in_format_of(own, old, scalars, _factors(own, old, optim))
    new = lambda x: ours if is_one(x) else _copied_if_array(x)
    return jax.tree.map(new, state, is_leaf=is_one)


def _new_weights(
    own: AbstractMomentState[Any], old: AbstractMomentState[Any], optim: object
) -> dict[str, Any]:
    """The sums of weights that only one of the two states keeps."""
    counts = {"m2_weight": getattr(old, "count_m2", old.count)}
    return {
        name: weight_after(own, optim, name, counts.get(name, old.count))
        for name in own.weights
        if _differ(getattr(own, name), getattr(old, name))
    }


# The averages whose corrections divide by a weight in every optimizer.
_CORRECTED = {"m1_weight": "m1", "nu_weight": "nu"}


def _factors(
    own: AbstractMomentState[Any], old: AbstractMomentState[Any], optim: object
) -> dict[str, Scalar]:
    """What keeps the corrected values of moments whose weights are dropped."""
    weights = {
        moment: (name, getattr(old, name))
        for name, moment in _CORRECTED.items()
        if name in own.weights
        and getattr(own, name) is None
        and getattr(old, name) is not None
        and jtu.tree_leaves(getattr(own, moment))
    }
    return {
        moment: _ratio(new_weight(optim, name, old.count), weight)
        for moment, (name, weight) in weights.items()
    }


def _ratio(new: Scalar, old: Scalar) -> Scalar:
    return jnp.where(old > 0, new / jnp.where(old > 0, old, 1.0), 1.0)


def _in_format_of(
    own: AbstractMomentState[Any],
    old: AbstractMomentState[Any],
    scalars: dict[str, Any],
    factors: dict[str, Scalar],
) -> AbstractMomentState[Any]:
    """A copy of an old state, with its moments, multiplied by factors, stored like
    those of our `own`, and with these scalars."""
    _check_m1(own, old)
    arrays, moments = decoded(old), {}
    for name in [name for name in own.names if name is not None]:
        like = getattr(own, name)
        if name == "m1" and not jtu.tree_leaves(like):
            moments[name] = like
            continue
        values = getattr(arrays, name)
        if name in factors:
            values = jax.tree.map(ft.partial(_times, factors[name]), values)
        new = adopted(
            f"state.{name}", values, own.moments.m2, like, is_real=name == "nu"
        )
        if name not in factors:
            new = _same_where_alike(getattr(old, name), new)
        moments[name] = new
    kept = {
        field.name: copies(getattr(old, field.name))
        for field in dataclasses.fields(old)
        if field.name not in (*moments, *scalars)
    }
    return type(old)(**kept, **moments, **scalars)


def _times(factor: Scalar, x: Array) -> Array:
    real = compute_dtype(x.dtype)
    return cast(x, real) * factor.astype(real)


def _differ(x: object, y: object) -> bool:
    return (x is None) != (y is None)


def _check_m1(own: AbstractMomentState[Any], old: AbstractMomentState[Any]) -> None:
    has_m1, needs_m1 = (bool(jtu.tree_leaves(x.moments.m1)) for x in (old, own))
    if needs_m1 and not has_m1:
        raise ValueError(
            "`state` has no `m1`, since its optimizer has `b1=0`, but `optim` needs "
            "one. Pass an optimizer with `b1=0`, or start a new state with `init`."
        )


def _same_where_alike(old: PyTree, new: PyTree) -> PyTree:
    """Copies of the old moments wherever they already have the new format: if codes
    were decoded and encoded again, they could change."""
    before: dict[Path, Any] = dict(leaves_with_path(old))
    leaves = flatten(new)
    values: list[Stored | None] = []
    for path, x in zip(leaves.paths, leaves.values, strict=True):
        is_same = x is not None and _type(before[path]) == _type(x)
        values.append(placed_as(copies(before[path]), x) if is_same else x)
    return leaves.rebuilt(values)


def _type(stored: Stored) -> object:
    leaves, treedef = jtu.tree_flatten(stored)
    return treedef, [(x.shape, x.dtype) for x in leaves]


def _copied_if_array(x: Node) -> Node:
    is_array = eqx.is_array(x) or isinstance(x, (np.ndarray, np.generic))
    return copies(x) if is_array else x
