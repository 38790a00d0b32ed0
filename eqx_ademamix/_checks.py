"""The checks. Their messages say where the problem is.

Everything here reads only structure, shapes, dtypes, and the values of counters that
are not traced. So under `jit` it runs once, at trace time, and adds nothing to a
compiled step.
"""

from typing import Any, NoReturn

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, PyTree

from ._filters import Leaf, Selection
from ._numerics import complex_dtype, real_dtype
from ._paths import (
    Aligned,
    Departure,
    Leaves,
    Node,
    Path,
    align,
    contrast,
    describe,
    is_entry,
    is_inexact_array,
    is_inexact_shape,
    is_leaf,
    leaves_with_path,
    path_text,
    with_article,
)
from ._state import AbstractMomentState
from ._storage.codec import Stored, Struct, misfit
from ._storage.format import Moments, StateFormat, codecs
from ._typing import DType


#
# Arguments as a whole
#


def check_optimizer(optim: object) -> None:
    """Recognizes an optimizer by its methods, since `optax.MultiSteps` is not a
    `GradientTransformation`."""
    methods = [getattr(optim, name, None) for name in ("init", "update")]
    if isinstance(optim, type) or not all(map(callable, methods)):
        raise TypeError(
            f"`optim` is {describe(optim)}, but an optimizer of this package or of "
            "optax was expected, with the methods `init` and `update`. Check the order "
            "of the arguments: `init(optim, params)`, `update(optim, grads, state, "
            "params)`."
        )


def check_supported(optim: object, cls: type) -> None:
    """Checks the argument of a function that supports only some optimizers."""
    check_optimizer(optim)
    if not isinstance(optim, cls):
        raise TypeError(
            f"`optim` is {describe(optim)}, but this function supports only "
            f"{with_article(f'`{cls.__name__}`')}. Pass an optimizer of that class."
        )


def check_state_type(state: object, grads: PyTree, cls: type) -> None:
    if isinstance(grads, cls):
        raise TypeError(
            f"`grads` is {describe(grads)}: were `grads` and `state` swapped? The "
            "order is `update(optim, grads, state, params)`."
        )
    if not isinstance(state, cls):
        expected = with_article(f"`{cls.__name__}`")
        raise TypeError(
            f"`state` is {describe(state)}, but {expected} was expected, as "
            "`init` of this optimizer returns. Was it made by another optimizer?"
        )


def check_for_optax(grads: Aligned, params: Leaves) -> None:
    """Checks the trees that an optax optimizer gets: both have the same arrays."""
    for path, found, expected, is_static in grads.departures:
        if not is_static and jtu.tree_leaves((found, expected)):
            _raise_not_of_params(path, *contrast(found, expected))
    for path, x, p in zip(params.paths, grads.values, params.values, strict=True):
        if x is None and p is not None:
            raise ValueError(
                f"grads{path_text(path)} is None, but `params` has {describe(p)} "
                "there, and an optax optimizer trains every array that it gets. Pass "
                "the part of the model that is trained to both `init` and `update`, "
                "for example `eqx.filter(model, filter_spec)`."
            )
        shapes = [getattr(leaf, "shape", None) for leaf in (x, p)]
        if shapes[0] != shapes[1]:
            _raise_not_of_params(path, describe(x), describe(p))


def _raise_not_of_params(path: Path, found: str, expected: str) -> NoReturn:
    raise ValueError(
        f"grads{path_text(path)} is {found}, but `params` has {expected} there. Take "
        "the gradients with `eqx.filter_grad`, of the same model that you pass as "
        "`params`."
    )


def check_counter(name: str, count: object) -> None:
    shape, dtype = getattr(count, "shape", None), getattr(count, "dtype", None)
    if shape != () or dtype != jnp.int32:
        raise ValueError(
            f"state.{name} is {describe(count)}, but an int32 array of shape () was "
            "expected. A batched state needs `eqx.filter_vmap(update)`. Otherwise, "
            "pass on the state as `init` or the last `update` returned it."
        )
    _check_alive("state", (jtu.GetAttrKey(name),), count)
    check_count(f"state.{name}", count)


def check_weights(state: AbstractMomentState[Any], used: tuple[str, ...]) -> None:
    """Checks the scalars that sum weights: the state has those that the optimizer uses,
    and no others."""
    for name in state.weights:
        weight = getattr(state, name)
        if name in used and weight is not None:
            _check_weight(name, weight)
        elif name in used or weight is not None:
            expected = "one" if name in used else "none"
            raise ValueError(
                f"state.{name} is {describe(weight)}, but this optimizer keeps "
                f"{expected}. Were `bias_correct_m2`, `b1` or `b2` different when the "
                "state was created? Convert the state with `change_state_format(state, "
                "optim, params)`."
            )


def check_skipped(state: AbstractMomentState[Any], skips: bool) -> None:
    """Checks that a state counts skipped steps if the optimizer can skip steps."""
    skipped = state.skipped
    if skips and skipped is not None:
        check_counter("skipped", skipped)
    elif skips or skipped is not None:
        expected = "counts" if skips else "does not count"
        raise ValueError(
            f"state.skipped is {describe(skipped)}, but this optimizer {expected} "
            "skipped steps. Was `skip_nonfinite` different when the state was created? "
            "Convert it with `change_state_format(state, optim, params)`."
        )


def _check_weight(name: str, weight: object) -> None:
    shape, dtype = getattr(weight, "shape", None), getattr(weight, "dtype", None)
    if shape != () or dtype not in (jnp.float32, jnp.float64):
        raise ValueError(
            f"state.{name} is {describe(weight)}, but a float32 or float64 array of "
            "shape () was expected. A batched state needs `eqx.filter_vmap(update)`. "
            "Otherwise, pass on the state as `init` or the last `update` returned it."
        )
    _check_alive("state", (jtu.GetAttrKey(name),), weight)
    _check_sum(f"state.{name}", weight)


def check_progress(state: AbstractMomentState[Any]) -> None:
    """Checks the values of a state's counters and sums, where they are known."""
    for name in (*state.counters, "skipped"):
        check_count(f"state.{name}", getattr(state, name))
    for name in state.weights:
        _check_sum(f"state.{name}", getattr(state, name))


def check_count(where: str, count: object) -> None:
    value = _known(count)
    if value is not None and not value >= 0:
        raise ValueError(
            f"{where} is {value}, but a number of steps >= 0 was expected. Pass on the "
            "state as `init` or the last `update` returned it."
        )


def _check_sum(where: str, total: object) -> None:
    value = _known(total)
    if value is not None and not 0 <= value < np.inf:
        raise ValueError(
            f"{where} is {value}, but a finite sum of weights >= 0 was expected. Pass "
            "on the state as `init` or the last `update` returned it."
        )


def _known(x: object) -> float | int | None:
    """The value of a number or of a 0-d array, unless it is traced."""
    kinds = (int, float, np.number, np.ndarray, jax.Array)
    if not isinstance(x, kinds) or isinstance(x, Tracer) or np.shape(x) != ():
        return None
    return np.asarray(jax.device_get(x)).item()


def check_alive(name: str, tree: PyTree) -> None:
    for path, leaf in jtu.tree_leaves_with_path(tree):
        _check_alive(name, path, leaf)


def _check_alive(name: str, path: Path, leaf: Node) -> None:
    concrete = isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer)
    if concrete and leaf.is_deleted():
        raise ValueError(
            f"{name}{path_text(path)} has been deleted: its buffer was donated to an "
            "earlier jitted call. Use the value that this call returned instead, or do "
            "not donate it."
        )


def check_not_empty(params: PyTree, trained: Leaves) -> None:
    # A tree without leaves is legal: optax wrappers probe with such trees.
    if any(x is not None for x in trained.values) or not jtu.tree_leaves(params):
        return
    if any(is_inexact_shape(x) for x in jtu.tree_leaves(params)):
        raise ValueError(
            "`trainable` selects none of the arrays of `params`, so there is nothing "
            "to train. It must be True for at least one floating-point or complex "
            "array."
        )
    raise ValueError(
        "None of the leaves of `params` is a floating-point or complex array, so there "
        "is nothing to train. The order of arguments is `init(optim, params)`. Convert "
        "Python numbers to arrays."
    )


def check_params_given(has_decay: bool, params: PyTree | None) -> None:
    if has_decay and params is None:
        raise ValueError(
            "`params` is missing, but `weight_decay` is on and needs the parameters. "
            "Call `update(optim, grads, state, params)`."
        )


#
# The one pass of `update`
#


def check_step(
    selection: Selection,
    state: AbstractMomentState[Any],
    fmt: StateFormat,
    *,
    has_m1: bool,
    has_params: bool,
) -> None:
    """Checks that all trees of an `update` fit together, leaf by leaf."""
    names, base = state.names, "params" if has_params else "grads"
    for name in state.counters:
        check_counter(name, getattr(state, name))
    check_alive("state", state)
    if has_m1:
        _check_has_m1(state)
    _check_departures(selection, names, base, has_m1)
    for leaf in selection.leaves:
        _check_moments(leaf, names, has_m1)
        check_gradient(leaf.path, leaf.grad)
        _check_trained(leaf, base)
        _check_gradient_fits(leaf)
        _check_stored(leaf, names, fmt, has_params)
    _check_static("grads", selection.grads, "the optimizer state")
    _check_static(base, selection.trained, "the optimizer state")


def _check_has_m1(state: AbstractMomentState[Any]) -> None:
    m1, m2, _ = state.moments
    if jtu.tree_leaves(m2) and not jtu.tree_leaves(m1):
        raise ValueError(
            "state.m1 has no moments, but this optimizer has a `b1` above 0 and needs "
            "them. Was the state made by an optimizer with `b1=0`? Pass on the state "
            "as `init` of this optimizer or the last `update` returned it."
        )


def _check_departures(
    selection: Selection, names: Moments[str], base: str, has_m1: bool
) -> None:
    for path, nu, m2, is_static in selection.nu:
        if is_static:
            _raise_moments_static(names.m2, path, names.nu)
        _raise_moments_differ(names.m2, path, m2, names.nu, nu)
    for path, m1, m2, is_static in selection.m1 if names.m1 else ():
        if not has_m1:
            _raise_unwanted_m1(path, m1)
        if is_static:
            _raise_moments_static(names.m1, path, names.m2)
        _raise_moments_differ(names.m1, path, m1, names.m2, m2)
    for departure in selection.grads:
        for path, x in leaves_with_path(departure.found):
            check_gradient(departure.path + path, x)
    check_departures(base, selection.trained, keep_extra=False)
    check_departures("grads", selection.grads, keep_extra=True)


def check_departures(
    name: str,
    departures: list[Departure],
    other: str = "the optimizer state",
    *,
    keep_extra: bool,
) -> None:
    """Checks where the structure of a tree differs from another one's. It may differ
    only where the other has no arrays and, except with `keep_extra`, it has none
    either."""
    for path, found, expected, is_static in departures:
        is_extra = keep_extra or not jtu.tree_leaves(found)
        if is_static or (is_extra and not jtu.tree_leaves(expected)):
            continue
        _check_leaf(f"{name}{path_text(path)}", found, other, expected)


def _check_static(name: str, departures: list[Departure], other: str) -> None:
    for path, _, _, is_static in departures:
        if is_static:
            raise ValueError(
                f"{name}{path_text(path)} has different static fields from {other} "
                "there, although the arrays match. Was `init` called with another "
                "model? Make the state with the model that is trained."
            )


def _check_moments(leaf: Leaf, names: Moments[str], has_m1: bool) -> None:
    m1, m2, nu = leaf.moments
    _check_alike(names.m2, leaf.path, m2, names.nu, nu)
    if has_m1:
        _check_alike(names.m1, leaf.path, m1, names.m2, m2)
    elif m1 is not None:
        _raise_unwanted_m1(leaf.path, m1)


def _check_alike(
    name: str | None, path: Path, x: Node, other: str | None, y: Node
) -> None:
    are_arrays = all(is_entry(moment) or eqx.is_array(moment) for moment in (x, y))
    shapes = [getattr(moment, "shape", None) for moment in (x, y)]
    if not are_arrays or shapes[0] != shapes[1]:
        _raise_moments_differ(name, path, x, other, y)


def _raise_moments_differ(
    name: str | None, path: Path, x: Node, other: str | None, y: Node
) -> NoReturn:
    raise ValueError(
        f"state.{name}{path_text(path)} is {describe(x)}, but state.{other} has "
        f"{describe(y)} there: the moments of one parameter are arrays of one shape. "
        "Pass on the state as `init` of this optimizer or the last `update` returned "
        "it."
    )


def _raise_moments_static(name: str | None, path: Path, other: str | None) -> NoReturn:
    raise ValueError(
        f"state.{name}{path_text(path)} has different static fields from state.{other} "
        "there. Pass on the state as `init` of this optimizer or the last `update` "
        "returned it."
    )


def _raise_unwanted_m1(path: Path, m1: Node) -> NoReturn:
    for key, leaf in leaves_with_path(m1):
        if leaf is not None:
            raise ValueError(
                f"state.m1{path_text(path + key)} holds a moment, but an optimizer "
                "with `b1=0` stores no `m1`. Was `init` called with another optimizer?"
            )
    raise ValueError(
        f"state.m1 is {describe(m1)}, but with `b1=0` it must have the structure of "
        "state.m2 with None at every leaf. Pass on the state as `init` of this "
        "optimizer or the last `update` returned it."
    )


def check_gradient(path: Path, leaf: Node) -> None:
    if leaf is None or is_inexact_array(leaf):
        _check_alive("grads", path, leaf)
        return
    raise TypeError(
        f"grads{path_text(path)} is {describe(leaf)}, but a gradient is an array of a "
        "floating-point or complex dtype, or None. Was the model passed as the "
        "gradients? Take them from `eqx.filter_grad` or `eqx.filter_value_and_grad`."
    )


def _check_trained(leaf: Leaf, base: str) -> None:
    moment, found = leaf.moments.m2, leaf.trained
    _check_alive("params", leaf.path, leaf.param)
    if moment is None and found is None:
        return
    where = f"{base}{path_text(leaf.path)}"
    if found is None and not is_inexact_array(leaf.param):
        found = leaf.param  # to say what is there instead of an array
    check_leaf(where, found, "the optimizer state", moment)


def _check_gradient_fits(leaf: Leaf) -> None:
    if leaf.moments.m2 is None:
        return  # a gradient of a leaf that is not trained is ignored
    where = f"grads{path_text(leaf.path)}"
    check_leaf(where, leaf.grad, "the optimizer state", leaf.moments.m2)


def check_leaf(
    where: str, leaf: Node, other: str, moment: Stored | None, complex_too: bool = True
) -> None:
    """Checks a leaf against a moment: an array if the moment is one, of the same shape,
    and complex if the moment is."""
    _check_leaf(where, leaf, other, moment)
    if complex_too and moment is not None:
        _check_complex(where, leaf, other, moment)


def _check_leaf(where: str, leaf: Node, other: str, moment: Node) -> None:
    is_array = is_inexact_array(leaf)
    if leaf is None:
        raise ValueError(
            f"{where} is None, but {other} has {describe(moment)} there. Every leaf "
            "that was trained when `init` was called needs an array: was it filtered "
            "out, or has `trainable` changed since then? To freeze leaves, make the "
            "optimizer with `trainable=filter_spec` before `init`."
        )
    if moment is None and is_array:
        raise ValueError(
            f"{where} is trained ({describe(leaf)}), but {other} has no moment there. "
            "Was `init` called with another model, or with another `trainable`? To "
            "freeze leaves, make the optimizer with `trainable=filter_spec`, and pass "
            "the whole model to `init` and `update`."
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


def _check_complex(where: str, leaf: Array, other: str, moment: Stored) -> None:
    is_complex = [x.dtype.kind == "c" for x in (leaf, moment)]
    if is_complex[0] != is_complex[1]:
        kind = "complex" if is_complex[1] else "real"
        raise TypeError(
            f"{where} has dtype {leaf.dtype}, but {other} is for a {kind} parameter "
            "there. Was `init` called with another model? If not, take the real part, "
            "or make the parameter complex."
        )


def _check_stored(
    leaf: Leaf, names: Moments[str], fmt: StateFormat, has_params: bool
) -> None:
    """Checks how the moments are stored. Without the parameters, only their shapes are
    known: the gradients may be narrower or wider."""
    if leaf.moments.m2 is None or leaf.trained is None:
        return
    x = leaf.trained
    dtypes = [x.dtype] if has_params else _precisions(x.dtype)
    found = [_first_misfit(leaf, fmt, Struct(x.shape, dtype)) for dtype in dtypes]
    wrong = [misfit for misfit in found if misfit is not None]
    if len(wrong) == len(dtypes):
        place, kind, expected = wrong[0]
        raise ValueError(
            f"state.{names[place]}{path_text(leaf.path)} is stored as {kind}, but "
            f"{expected} was expected for this parameter and `state_format`. Pass on "
            "the state as `init` of this optimizer or the last `update` returned it."
        )


def _precisions(dtype: DType) -> list[DType]:
    real = [np.dtype(np.float32), np.dtype(np.float64)]
    return [complex_dtype(x) for x in real] if dtype.kind == "c" else real


def _first_misfit(
    leaf: Leaf, fmt: StateFormat, param: Struct
) -> tuple[int, str, str] | None:
    """The first moment that is stored differently than expected: its place among the
    moments, how it is stored, and how it should be."""
    real = Struct(param.shape, real_dtype(param.dtype))
    expected = codecs(fmt, param.shape)
    for place, (stored, codec) in enumerate(zip(leaf.moments, expected, strict=True)):
        if stored is None:
            continue
        wrong = misfit(stored, codec, real if place == 2 else param)
        if wrong is not None:
            return place, *wrong
    return None


#
# Trees of moments on their own
#


def checked_leaves(
    name: str,
    tree: PyTree,
    like: Leaves,
    *,
    other: str,
    keep_extra: bool = False,
    complex_too: bool = True,
) -> list[Array | None]:
    """The leaves of a tree of arrays in the order of a tree of moments, once they are
    known to fit: an array wherever there is a moment (and, except with `keep_extra`,
    nowhere else), of the same shape, and complex where the moment is."""
    values, departures = align(tree, like)
    check_departures(name, departures, other, keep_extra=keep_extra)
    for path, leaf, moment in zip(like.paths, values, like.values, strict=True):
        if moment is None and (keep_extra or leaf is None):
            continue
        check_leaf(f"{name}{path_text(path)}", leaf, other, moment, complex_too)
    _check_static(name, departures, other)
    pairs = zip(values, like.values, strict=True)
    return [None if moment is None else x for x, moment in pairs]
