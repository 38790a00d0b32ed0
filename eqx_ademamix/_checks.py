"""Tree paths, and the checks whose messages name them.

Everything here reads only structure, shapes and dtypes, so under `jit` it runs once, at
trace time, and a compiled step pays nothing for it.
"""

import typing
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.core import Tracer


_Fn = TypeVar("_Fn", bound=Callable[..., Any])
Path = tuple[Any, ...]


def no_type_check(fn: _Fn) -> _Fn:
    """Exempts a public function from the checks of jaxtyping's import hook, whose
    messages on a whole model are too long to read: ours come first, and the jaxtyped
    core is the net behind them.

    The hook knows the decorator by this name. `typing.no_type_check` itself would make
    static type checkers forget the signature.
    """
    return typing.no_type_check(fn)


#
# Trees and their paths
#


def is_none(x: Any) -> bool:
    return x is None


def is_leaf(x: Any) -> bool:
    """Whether `x` is no PyTree node. `None`, which marks an absent leaf, is one."""
    return x is None or jtu.all_leaves([x])


def is_inexact_shape(x: Any) -> bool:
    """Whether `x` is an inexact array, or a `jax.ShapeDtypeStruct` of one."""
    is_struct = isinstance(x, jax.ShapeDtypeStruct)
    return eqx.is_inexact_array(x) or (
        is_struct and bool(jnp.issubdtype(x.dtype, jnp.inexact))
    )


def children(node: Any) -> tuple[list[tuple[Path, Any]], Any]:
    """The children of a node with their keys, and the structure of that one level."""
    return jtu.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)


def leaves_with_path(tree: Any) -> list[tuple[Path, Any]]:
    """All leaves of a tree with their paths, with `None` as a leaf."""
    return jtu.tree_flatten_with_path(tree, is_leaf=is_none)[0]


def structure(tree: Any) -> Any:
    """The structure of a tree, with `None` as a leaf."""
    return jtu.tree_structure(tree, is_leaf=is_none)


def describe(x: Any) -> str:
    """Says in a few words what was found somewhere in a tree."""
    if x is None:
        return "None"
    if isinstance(x, (jax.Array, np.ndarray, np.generic)):
        return f"a {x.dtype} array of shape {x.shape}"
    if isinstance(x, (bool, int, float, complex, str)):
        text = repr(x)
        return (
            f"the {type(x).__name__} {text if len(text) <= 40 else text[:40] + '...'}"
        )
    if is_leaf(x) and callable(x):
        return f"the function `{getattr(x, '__name__', type(x).__name__)}`"
    if isinstance(x, dict):
        keys = ", ".join(repr(key) for key in list(x)[:4])
        return f"a dict with the keys {keys}{', ...' if len(x) > 4 else ''}"
    if type(x) in (list, tuple):
        return f"a {type(x).__name__} of length {len(x)}"
    name = type(x).__name__
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} `{name}`"


class Mismatch(NamedTuple):
    """The first place at which two trees differ in structure."""

    path: Path
    found: str
    expected: str


def structure_mismatch(found: Any, expected: Any, path: Path = ()) -> Mismatch | None:
    """Looks for the first place at which two trees differ in structure."""
    if is_leaf(found) or is_leaf(expected):
        if is_leaf(found) and is_leaf(expected):
            return None
        return Mismatch(path, describe(found), describe(expected))
    (found_items, found_def), (expected_items, expected_def) = (
        children(found),
        children(expected),
    )
    if found_def != expected_def:
        return Mismatch(path, *_describe_nodes(found, expected))
    for (key, a), (_, b) in zip(found_items, expected_items, strict=True):
        mismatch = structure_mismatch(a, b, path + key)
        if mismatch is not None:
            return mismatch
    return None


def _describe_nodes(found: Any, expected: Any) -> tuple[str, str]:
    texts = describe(found), describe(expected)
    if texts[0] == texts[1]:
        return texts[0], "one with other static fields or children"
    return texts


#
# Checks
#


def check_optimizer(optim: Any, cls: type) -> None:
    if not isinstance(optim, cls):
        raise TypeError(
            f"`optim` is {describe(optim)}, but an optimizer of this package was "
            "expected. The order of arguments is `init(optim, params)` and "
            "`update(optim, grads, state, params)`; an optax optimizer has its own "
            "methods `init` and `update`."
        )


def check_state_type(state: Any, grads: Any, cls: type) -> None:
    if isinstance(grads, cls):
        raise TypeError(
            f"`grads` is {describe(grads)}: were `grads` and `state` swapped? The "
            "order is `update(optim, grads, state, params)`."
        )
    if not isinstance(state, cls):
        raise TypeError(
            f"`state` is {describe(state)}, but an `{cls.__name__}` was expected, as "
            "`init` of this optimizer returns. Was it made by another optimizer?"
        )


def check_counter(name: str, count: Any) -> None:
    shape, dtype = getattr(count, "shape", None), getattr(count, "dtype", None)
    if shape != () or dtype != jnp.int32:
        raise ValueError(
            f"state.{name} is {describe(count)}, but an int32 array of shape () was "
            "expected. A batched state needs `eqx.filter_vmap(update)`; otherwise pass "
            "on the state as `init` or the last `update` returned it."
        )


def check_alive(name: str, tree: Any) -> None:
    for path, leaf in leaves_with_path(tree):
        concrete = isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer)
        if concrete and leaf.is_deleted():
            raise ValueError(
                f"{name}{jtu.keystr(path)} has been deleted: its buffer was donated to "
                "an earlier jitted call. Use the value that this call returned in its "
                "place, or do not donate it."
            )


def check_same_structure(name: str, tree: Any, other: str, reference: Any) -> None:
    """Checks that two trees have the same nodes, wherever their leaves are `None`."""
    if structure(tree) == structure(reference):
        return
    mismatch = structure_mismatch(tree, reference)
    path, found, expected = mismatch or Mismatch((), "another tree", "its own")
    raise ValueError(
        f"{name}{jtu.keystr(path)} is {found}, but {other} has {expected} there. "
        "Was `init` called with another model?"
    )


def as_gradients(grads: Any) -> Any:
    """The gradients' inexact arrays, with `None` elsewhere. Anything that no gradient
    can be is an error."""
    return jtu.tree_map_with_path(_as_gradient, grads)


def _as_gradient(path: Path, leaf: Any) -> Any:
    if eqx.is_inexact_array(leaf):
        return jnp.asarray(leaf)
    if getattr(leaf, "dtype", None) == jax.dtypes.float0:
        return None  # what `jax.grad(..., allow_int=True)` returns for integers
    raise TypeError(
        f"grads{jtu.keystr(path)} is {describe(leaf)}, but a gradient is an array of a "
        "floating-point or complex dtype, or None. Was the model passed as the "
        "gradients? Take them from `eqx.filter_grad` or `eqx.filter_value_and_grad`."
    )


def check_against_state(name: str, tree: Any, reference: Any) -> None:
    """Checks a tree of arrays leaf by leaf against a tree of the state's moments: an
    array wherever that has one, of the same shape, complex for complex."""
    check_same_structure(name, tree, "the optimizer state", reference)
    pairs = zip(leaves_with_path(tree), leaves_with_path(reference), strict=True)
    for (path, leaf), (_, moment) in pairs:
        _check_leaf(f"{name}{jtu.keystr(path)}", leaf, moment)


def _check_leaf(where: str, leaf: Any, moment: Any) -> None:
    if leaf is None and moment is not None:
        raise ValueError(
            f"{where} is None, but the optimizer state has {describe(moment)} there. "
            "Every leaf that `init` saw as trained needs one: was it filtered out, or "
            "has `trainable` changed since `init`?"
        )
    if leaf is not None and moment is None:
        raise ValueError(
            f"{where} is trained ({describe(leaf)}), but the optimizer state has no "
            "moment there. Was `init` called with another model, or with another "
            "`trainable`?"
        )
    if leaf is None or moment is None:
        return
    if leaf.shape != moment.shape:
        raise ValueError(
            f"{where} has shape {leaf.shape}, but the optimizer state has "
            f"{moment.shape} there. Was `init` called with another model?"
        )
    if jnp.iscomplexobj(leaf) != jnp.iscomplexobj(moment):
        kind = {True: "complex", False: "real"}
        raise TypeError(
            f"{where} has dtype {leaf.dtype}, but the optimizer state is for a "
            f"{kind[jnp.iscomplexobj(moment)]} parameter there. Was `init` called with "
            "another model? Take the real part, or make the parameter complex."
        )


def check_moments(m1: Any, m2: Any, nu: Any, *, has_m1: bool) -> None:
    """Checks that the three trees of moments agree with each other leaf by leaf."""
    if not has_m1 and jtu.tree_leaves(m1):
        path = next(path for path, leaf in leaves_with_path(m1) if leaf is not None)
        raise ValueError(
            f"state.m1{jtu.keystr(path)} holds a moment, but an optimizer with `b1=0` "
            "stores no `m1`. Was `init` called with another optimizer?"
        )
    _check_moment("m2", m2, "nu", nu)
    _check_moment("m1", m1, "m2", m2, absent=not has_m1)


def _check_moment(
    name: str, tree: Any, other: str, reference: Any, *, absent: bool = False
) -> None:
    check_same_structure(f"state.{name}", tree, f"state.{other}", reference)
    if absent:
        return
    pairs = zip(leaves_with_path(tree), leaves_with_path(reference), strict=True)
    for (path, leaf), (_, moment) in pairs:
        found, expected = getattr(leaf, "shape", None), getattr(moment, "shape", None)
        if found != expected:
            key = jtu.keystr(path)
            raise ValueError(
                f"state.{name}{key} is {describe(leaf)}, but state.{other}{key} is "
                f"{describe(moment)}: the moments of one parameter have one shape. "
                "Pass on the state as `init` of this optimizer or the last `update` "
                "returned it."
            )
