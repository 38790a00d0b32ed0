"""Tree paths, and the checks whose messages name them.

Everything here reads only structure, shapes and dtypes, so under `jit` it runs once, at
trace time, and a compiled step pays nothing for it.
"""

import typing
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

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
        return f"{_a(x.dtype.name)} array of shape {x.shape}"
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
    return _a(f"`{type(x).__name__}`")


def _a(noun: str) -> str:
    return f"{'an' if noun.strip('`')[0] in 'AEIOUaeiou' else 'a'} {noun}"


def paired_leaves(tree: Any, reference: Any) -> Iterable[tuple[Path, Any, Any]]:
    """The leaves of two trees with their paths. Where the trees differ in structure,
    the outermost nodes that do so stand for what is below them."""
    if structure(tree) != structure(reference):
        return _pairs_by_key(tree, reference)
    pairs = zip(leaves_with_path(tree), leaves_with_path(reference), strict=True)
    return ((path, a, b) for (path, a), (_, b) in pairs)


def _pairs_by_key(
    tree: Any, reference: Any, path: Path = ()
) -> Iterator[tuple[Path, Any, Any]]:
    if is_leaf(tree) or is_leaf(reference) or not _same_keys(tree, reference):
        yield path, tree, reference
        return
    pairs = zip(children(tree)[0], children(reference)[0], strict=True)
    for (key, a), (_, b) in pairs:
        yield from _pairs_by_key(a, b, path + key)


def _same_keys(a: Any, b: Any) -> bool:
    keys_a, keys_b = ([key for key, _ in children(node)[0]] for node in (a, b))
    return type(a) is type(b) and keys_a == keys_b


def static_mismatch(tree: Any, reference: Any, path: Path = ()) -> Path | None:
    """The path of the first nodes that differ in what is no leaf: in static fields."""
    if is_leaf(tree) or is_leaf(reference):
        return None
    (items, treedef), (reference_items, reference_def) = map(
        children, (tree, reference)
    )
    if treedef != reference_def:
        return path
    pairs = zip(items, reference_items, strict=True)
    found = (static_mismatch(a, b, path + key) for (key, a), (_, b) in pairs)
    return next((x for x in found if x is not None), None)


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


def check_against_state(
    name: str, tree: Any, reference: Any, *, keep_extra: bool = False
) -> None:
    """Checks a tree of arrays leaf by leaf against a tree of the state's moments: an
    array wherever that has one (and, but for `keep_extra`, nowhere else), of the same
    shape, complex for complex."""
    for path, leaf, moment in paired_leaves(tree, reference):
        if not (keep_extra and moment is None and is_leaf(leaf)):
            _check_leaf(f"{name}{jtu.keystr(path)}", leaf, moment)
    path = static_mismatch(tree, reference)
    if path is not None:
        raise ValueError(
            f"{name}{jtu.keystr(path)} has other static fields than the optimizer "
            "state has there, though their arrays fit together. Was `init` called with "
            "another model? Make the state with the model that is trained."
        )


def _check_leaf(where: str, leaf: Any, moment: Any) -> None:
    if not (is_leaf(leaf) and is_leaf(moment)):
        raise ValueError(
            f"{where} is {describe(leaf)}, but the optimizer state has "
            f"{describe(moment)} there. Was `init` called with another model?"
        )
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
        kind = "complex" if jnp.iscomplexobj(moment) else "real"
        raise TypeError(
            f"{where} has dtype {leaf.dtype}, but the optimizer state is for a {kind} "
            "parameter there. Was `init` called with another model? Else take the real "
            "part, or make the parameter complex."
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
    if has_m1:
        _check_moment("m1", m1, "m2", m2)
    elif structure(m1) != structure(m2):
        raise ValueError(
            f"state.m1 is {describe(m1)}, but with `b1=0` it has the structure of "
            "state.m2 with None at every leaf. Pass on the state as `init` of this "
            "optimizer or the last `update` returned it."
        )


def _check_moment(name: str, tree: Any, other: str, reference: Any) -> None:
    for path, leaf, moment in paired_leaves(tree, reference):
        _check_same_shape(name, leaf, other, moment, jtu.keystr(path))
    path = static_mismatch(tree, reference)
    if path is not None:
        _check_same_shape(name, "another node", other, "a node", jtu.keystr(path))


def _check_same_shape(name: str, leaf: Any, other: str, moment: Any, key: str) -> None:
    are_leaves = is_leaf(leaf) and is_leaf(moment)
    found, expected = (getattr(x, "shape", describe(x)) for x in (leaf, moment))
    if not are_leaves or found != expected:
        raise ValueError(
            f"state.{name}{key} is {describe(leaf)}, but state.{other}{key} is "
            f"{describe(moment)}: the moments of one parameter have one shape. Pass on "
            "the state as `init` of this optimizer or the last `update` returned it."
        )
