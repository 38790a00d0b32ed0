"""Filter specs, and the leaves that they select."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, PyTree

from ._numerics import clip_magnitude
from ._paths import (
    Departure,
    Leaves,
    Node,
    Path,
    align,
    children,
    contrast,
    describe,
    flatten,
    is_inexact_array,
    is_inexact_shape,
    is_leaf,
    leaves_with_path,
    path_text,
    structure,
)
from ._storage.codec import Stored, Struct
from ._storage.format import Moments
from ._typing import DType


# Bools, or callables from an array to a bool. Checked against a model when used.
FilterSpec: TypeAlias = PyTree


def with_python_bools(spec: FilterSpec) -> FilterSpec:
    """A filter spec without NumPy bools, which `eqx.filter_jit` would trace."""
    return jax.tree.map(lambda x: bool(x) if isinstance(x, np.bool_) else x, spec)


def as_bools(spec: FilterSpec, arrays: Leaves, name: str) -> list[bool]:
    """Resolves a filter spec to one bool for each leaf of a tree of arrays and `None`s:
    `False` for `None`.

    A spec is a bool for a whole subtree, a callable applied to each array in it, or a
    node whose children are specs.
    """
    kind = "A mask is a bool, a callable on one array, or a tree of bools"
    places = zip(by_leaf(spec, arrays, name, kind), *arrays[:2], strict=True)
    return [x is not None and _as_bool(s, x, name, path) for s, path, x in places]


def by_leaf(spec: PyTree, arrays: Leaves, name: str, kind: str) -> list[Node]:
    """What a prefix tree has for each leaf of a tree of arrays and `None`s.

    A prefix tree may have anything at places without arrays, so it can be shaped either
    like the whole model or like the filtered model.
    """
    if is_leaf(spec) and not callable(spec):
        return [spec] * len(arrays.values)
    if structure(spec) == arrays.treedef:
        return [leaf for _, leaf in leaves_with_path(spec)]
    return list(_by_node(spec, arrays.rebuilt(arrays.values), name, kind))


def _by_node(
    spec: PyTree, arrays: PyTree, name: str, kind: str, path: Path = ()
) -> Iterator[Node]:
    if is_leaf(spec) or not jtu.tree_leaves(arrays):
        _check_is_for_leaves(spec, arrays, name, path)
        yield from [spec] * len(leaves_with_path(arrays))
        return
    (specs, spec_def), (subtrees, treedef) = children(spec), children(arrays)
    if is_leaf(arrays) or spec_def != treedef:
        found, expected = contrast(spec, arrays)
        raise ValueError(
            f"{name}{path_text(path)} is {found}, but the parameters have {expected} "
            f"there. {kind} shaped like the model or a prefix of it."
        )
    for (_, child), (key, subtree) in zip(specs, subtrees, strict=True):
        yield from _by_node(child, subtree, name, kind, path + key)


def _check_is_for_leaves(spec: Node, arrays: PyTree, name: str, path: Path) -> None:
    """Rejects an optax mask, which is called on a whole tree. On a single array, its
    paths are empty, so it would choose by other rules, without an error."""
    if not callable(spec) or is_leaf(arrays) or not _is_for_trees(spec, arrays):
        return
    or_else = "" if name == "trainable" else ", or use `decay_mask(model)`"
    raise TypeError(
        f"{name}{path_text(path)} is {describe(spec)}, which returns a tree of bools, "
        "as an optax mask does, but a callable gets one array at a time here: pass the "
        "tree `mask(params)` instead, with `params = eqx.filter(model, "
        f"eqx.is_inexact_array)`{or_else}."
    )


class _Nested(eqx.Module):
    child: Any


def _is_for_trees(spec: Callable[[PyTree], Any], arrays: PyTree) -> bool:
    """Whether a callable turns a tree into a tree of bools. One written for an array
    returns a single bool or raises an error: a tree has no `ndim`. One written for
    trees of another kind raises an error too, for example if it expects the keys of
    dicts in the path of each array. So it is also called on small trees."""
    nested = [
        tree
        for x in jtu.tree_leaves(arrays)[:1]
        for tree in ({"a": {"a": {"a": x}}}, [[[x]]], _Nested(_Nested(_Nested(x))))
    ]
    for tree in (arrays, *nested):
        try:
            found = spec(tree)
        except Exception:
            continue
        flags = jtu.tree_leaves(found)
        return not is_leaf(found) and bool(flags) and all(map(_is_flag, flags))
    return False


def _is_flag(x: Node) -> bool:
    is_array = isinstance(x, (jax.Array, np.ndarray))
    return isinstance(x, (bool, np.bool_)) or (is_array and x.dtype == bool)


def _as_bool(spec: Node, array: Array | Struct, name: str, path: Path) -> bool:
    return checked_bool(spec(array) if callable(spec) else spec, array, name, path)


def checked_bool(flag: object, array: Array | Struct, name: str, path: Path) -> bool:
    if isinstance(flag, (bool, np.bool_)):
        return bool(flag)
    what_to_do = (
        "Under plain `jax.jit`, a mask cannot be an argument: use `eqx.filter_jit`."
        if isinstance(flag, Tracer)
        else "Use True or False there, or a callable that returns one of them."
    )
    raise TypeError(
        f"{name}{path_text(path)} is {describe(flag)}, but a bool was expected for "
        f"{describe(array)}. {what_to_do}"
    )


#
# Selecting
#


def trained_arrays(
    trainable: FilterSpec, tree: Leaves, *, or_structs: bool = False
) -> Leaves:
    """The inexact arrays of a tree that a filter spec selects, `None` elsewhere. With
    `or_structs`, a `jax.ShapeDtypeStruct` counts as the array that it describes."""
    inexact = inexact_or_struct if or_structs else _inexact_array
    arrays = tree._replace(values=[inexact(x) for x in tree.values])
    keep = as_bools(trainable, arrays, "trainable")
    pairs = zip(arrays.values, keep, strict=True)
    return arrays._replace(values=[x if flag else None for x, flag in pairs])


def inexact_or_struct(x: Node) -> Array | Struct | None:
    is_struct = isinstance(x, Struct) and is_inexact_shape(x)
    return x if is_struct else _inexact_array(x)


def _inexact_array(x: Node) -> Array | None:
    if not is_inexact_array(x):
        return None
    return x if isinstance(x, jax.Array) else jnp.asarray(x)


class Leaf(NamedTuple):
    """One leaf of the trees that go into `update`. Nothing in it is checked yet."""

    path: Path
    grad: Node
    param: Node  # what `params` (or `grads`, without them) has there
    trained: Array | None  # the same, if it is trained
    moments: Moments[Stored | None]  # `None` where the state has none


class Selection(NamedTuple):
    """The trees that go into `update`, in the order of the leaves of `m2`. Departures
    are the places where another tree has a different structure than `m2`."""

    leaves: list[Leaf]
    like: Leaves  # the tree `m2`
    grads: list[Departure]
    trained: list[Departure]
    m1: list[Departure]
    nu: list[Departure]


def select(
    trainable: FilterSpec,
    grads: PyTree,
    moments: Moments[PyTree],
    params: PyTree | None,
) -> Selection:
    """Flattens the trees that go into `update`, and selects the leaves to train."""
    like = flatten(moments.m2)
    m1, nu, g = (align(tree, like) for tree in (moments.m1, moments.nu, grads))
    whole = grads if params is None else params
    base = flatten(whole)
    chosen = trained_arrays(trainable, base)
    trained = align(chosen.rebuilt(chosen.values), like)
    leaves = [
        Leaf(path, as_gradient(grad), param, x, Moments(*m))
        for path, grad, param, x, *m in zip(
            like.paths,
            g.values,
            align(whole, like).values,
            trained.values,
            m1.values,
            like.values,
            nu.values,
            strict=True,
        )
    ]
    missing = [_with_node(departure, base) for departure in trained.departures]
    return Selection(leaves, like, g.departures, missing, m1.departures, nu.departures)


def _with_node(departure: Departure, base: Leaves) -> Departure:
    """A departure with what is really there, where selecting left `None` instead of
    something that is not an array."""
    node = dict(zip(base.paths, base.values, strict=True)).get(departure.path)
    is_other = departure.found is None and not is_inexact_array(node)
    return departure._replace(found=node) if is_other else departure


def as_gradient(x: Node) -> Node:
    if getattr(x, "dtype", None) == jax.dtypes.float0:
        return None  # what `jax.grad(..., allow_int=True)` returns for integers
    is_numpy = isinstance(x, (np.ndarray, np.generic))
    return jnp.asarray(_in_range(x)) if is_numpy else x


def _in_range(x: np.ndarray | np.generic) -> np.ndarray | np.generic:
    """A NumPy gradient, clipped to the range of the widest float that is enabled: a
    finite number stays finite when it is converted."""
    dtype: DType = x.dtype
    widest = jnp.finfo(jnp.result_type(float))
    if dtype.kind not in "fc" or np.finfo(dtype).bits <= widest.bits:
        return x
    return clip_magnitude(x, float(widest.max), np)
