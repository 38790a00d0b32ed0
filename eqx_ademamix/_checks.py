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

from ._encoded import Encoded


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


def is_entry(x: Any) -> bool:
    """Whether `x` counts as a leaf though JAX would look into it: `None`, which marks
    an absent leaf, or an encoded moment."""
    return x is None or isinstance(x, Encoded)


def is_leaf(x: Any) -> bool:
    """Whether `x` is no PyTree node, or one that counts as a leaf."""
    return is_entry(x) or jtu.all_leaves([x])


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
    """All leaves of a tree with their paths, `None` and encoded moments among them."""
    return jtu.tree_flatten_with_path(tree, is_leaf=is_entry)[0]


def structure(tree: Any) -> Any:
    """The structure of a tree, with `None` and encoded moments as leaves."""
    return jtu.tree_structure(tree, is_leaf=is_entry)


def path_text(path: Path) -> str:
    """A path as error messages print it, without its middle if it is very long."""
    return shortened(jtu.keystr(path), 160)


def shortened(text: str, length: int) -> str:
    half = length // 2
    return text if len(text) <= length else f"{text[:half]}...{text[-half:]}"


def describe(x: Any) -> str:
    """Says in a few words what was found somewhere in a tree."""
    if x is None:
        return "None"
    if isinstance(x, (jax.Array, np.ndarray, np.generic)):
        return f"{_a(x.dtype.name)} array of shape {x.shape}"
    if isinstance(x, Encoded):
        return f"{_a(type(x.codec).__name__)} moment of shape {x.shape}"
    if isinstance(x, (bool, int, float, complex, str)):
        return f"the {type(x).__name__} {shortened(repr(x), 40)}"
    if isinstance(x, type):
        return f"the class `{shortened(x.__name__, 60)}`"
    if is_leaf(x) and callable(x):
        name = getattr(x, "__name__", type(x).__name__)
        return f"the function `{shortened(name, 60)}`"
    if isinstance(x, dict):
        keys = ", ".join(shortened(repr(key), 30) for key in list(x)[:4])
        return f"a dict with the keys {keys}{', ...' if len(x) > 4 else ''}"
    if type(x) in (list, tuple):
        return f"a {type(x).__name__} of length {len(x)}"
    return _a(f"`{shortened(type(x).__name__, 60)}`")


def contrast(found: Any, expected: Any) -> tuple[str, str]:
    """Describes two things that differ such that one sees in what."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in expected:
            if key not in found:
                text = shortened(repr(key), 30)
                return f"a dict without the key {text}", "one with it"
        for key in found:
            if key not in expected:
                text = shortened(repr(key), 30)
                return f"a dict with the key {text}", "one without it"
    if describe(found) != describe(expected):
        return describe(found), describe(expected)
    sizes = len(children(found)[0]), len(children(expected)[0])
    if sizes[0] != sizes[1]:
        return f"{describe(found)} with {sizes[0]} children", f"one with {sizes[1]}"
    return describe(found), "one with other static fields"


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
    if is_leaf(tree) or is_leaf(reference) or structure(tree) == structure(reference):
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
    if hasattr(optim, "optim") and not isinstance(optim, cls):
        raise TypeError(
            f"`optim` is {describe(optim)}, which wraps an optimizer, but that itself "
            "was expected. Pass `optim.optim`, and with it `state.inner_state`."
        )
    if not isinstance(optim, cls):
        raise TypeError(
            f"`optim` is {describe(optim)}, but an optimizer of this package was "
            "expected. Mind the order of arguments: `init(optim, params)`, "
            "`update(optim, grads, state, params)`. An optax optimizer has its own "
            "methods `init` and `update`."
        )


def check_state_type(state: Any, grads: Any, cls: type) -> None:
    if isinstance(grads, cls):
        raise TypeError(
            f"`grads` is {describe(grads)}: were `grads` and `state` swapped? The "
            "order is `update(optim, grads, state, params)`."
        )
    if not isinstance(state, cls):
        expected = _a(f"`{cls.__name__}`")
        raise TypeError(
            f"`state` is {describe(state)}, but {expected} was expected, as "
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
    for path, leaf in jtu.tree_leaves_with_path(tree):
        concrete = isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer)
        if concrete and leaf.is_deleted():
            raise ValueError(
                f"{name}{path_text(path)} has been deleted: its buffer was donated to "
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
        f"grads{path_text(path)} is {describe(leaf)}, but a gradient is an array of a "
        "floating-point or complex dtype, or None. Was the model passed as the "
        "gradients? Take them from `eqx.filter_grad` or `eqx.filter_value_and_grad`."
    )


def check_against_state(
    name: str,
    tree: Any,
    reference: Any,
    *,
    other: str = "the optimizer state",
    whole: Any = None,
    keep_extra: bool = False,
    complex_too: bool = True,
) -> None:
    """Checks a tree of arrays leaf by leaf against a tree of moments: an array wherever
    that has one (and, but for `keep_extra`, nowhere else), of the same shape, and
    complex for complex. `whole` is the tree before it was filtered."""
    for path, leaf, moment in paired_leaves(tree, reference):
        no_moments = not jtu.tree_leaves(moment)
        if no_moments and (keep_extra or not jtu.tree_leaves(leaf)):
            continue
        where = f"{name}{path_text(path)}"
        if leaf is None and whole is not None:
            unfiltered = dict(leaves_with_path(whole)).get(path)
            leaf = None if eqx.is_inexact_array(unfiltered) else unfiltered
        _check_leaf(where, leaf, other, moment)
        if complex_too:
            _check_complex(where, leaf, other, moment)
    path = static_mismatch(tree, reference)
    if path is not None:
        raise ValueError(
            f"{name}{path_text(path)} has other static fields than {other} has there, "
            "though their arrays fit together. Was `init` called with another model? "
            "Make the state with the model that is trained."
        )


def _check_leaf(where: str, leaf: Any, other: str, moment: Any) -> None:
    is_array = eqx.is_inexact_array(leaf)
    if leaf is None:
        raise ValueError(
            f"{where} is None, but {other} has {describe(moment)} there. Every leaf "
            "that `init` saw as trained needs one: was it filtered out, or has "
            "`trainable` changed since `init`?"
        )
    if moment is None and is_array:
        raise ValueError(
            f"{where} is trained ({describe(leaf)}), but {other} has no moment there. "
            "Was `init` called with another model, or with another `trainable`?"
        )
    if not (is_array and is_leaf(moment)):
        found, expected = contrast(leaf, moment)
        raise ValueError(
            f"{where} is {found}, but {other} has {expected} there. Was `init` called "
            "with another model?"
        )
    if moment is not None and leaf.shape != moment.shape:
        raise ValueError(
            f"{where} has shape {leaf.shape}, but {other} has {moment.shape} there. "
            "Was `init` called with another model?"
        )


def _check_complex(where: str, leaf: Any, other: str, moment: Any) -> None:
    is_complex = [jnp.issubdtype(x.dtype, np.complexfloating) for x in (leaf, moment)]
    if is_complex[0] != is_complex[1]:
        kind = "complex" if is_complex[1] else "real"
        raise TypeError(
            f"{where} has dtype {leaf.dtype}, but {other} is for a {kind} parameter "
            "there. Was `init` called with another model? Else take the real part, or "
            "make the parameter complex."
        )


def aligned(tree: Any, reference: Any) -> Any:
    """A checked tree in the structure of a tree of moments, with its leaves only where
    that has some."""
    leaves = dict(leaves_with_path(tree))
    return jtu.tree_map_with_path(
        lambda path, moment: None if moment is None else leaves[path],
        reference,
        is_leaf=is_entry,
    )


def on_device(tree: Any) -> Any:
    """A tree with JAX arrays in place of NumPy's, for example after a checkpoint."""
    is_numpy = lambda x: isinstance(x, (np.ndarray, np.generic))
    return jax.tree.map(lambda x: jnp.asarray(x) if is_numpy(x) else x, tree)


def check_moments(m1: Any, m2: Any, nu: Any, *, has_m1: bool) -> None:
    """Checks that the three trees of moments agree with each other leaf by leaf."""
    if not has_m1 and jtu.tree_leaves(m1):
        path = next(path for path, leaf in leaves_with_path(m1) if leaf is not None)
        raise ValueError(
            f"state.m1{path_text(path)} holds a moment, but an optimizer with `b1=0` "
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
        are_arrays = all(is_entry(x) or eqx.is_array(x) for x in (leaf, moment))
        shapes = [getattr(x, "shape", None) for x in (leaf, moment)]
        if not are_arrays or shapes[0] != shapes[1]:
            _raise_moments_differ(name, leaf, other, moment, path)
    path = static_mismatch(tree, reference)
    if path is not None:
        raise ValueError(
            f"state.{name}{path_text(path)} has other static fields than state.{other} "
            "has there. Pass on the state as `init` of this optimizer or the last "
            "`update` returned it."
        )


def _raise_moments_differ(
    name: str, leaf: Any, other: str, moment: Any, path: Path
) -> typing.NoReturn:
    found, expected = describe(leaf), describe(moment)
    raise ValueError(
        f"state.{name}{path_text(path)} is {found}, but state.{other} has {expected} "
        "there: the moments of one parameter are arrays of one shape. Pass on the "
        "state as `init` of this optimizer or the last `update` returned it."
    )
