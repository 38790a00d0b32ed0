"""The state of the optimizer that continues a run, with our own state in its place."""

from collections.abc import Iterator
from typing import Any, TypeAlias, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import PyTree

from .._checks import check_alive
from .._inspection import is_moment_state, kinds_in, of, states_in
from .._optimizer import OptaxOptimizer, init
from .._paths import Node, children, describe, is_leaf, shortened
from .._sharding import in_sharding_of
from .._state import AbstractMomentState, CompensatedState
from .adopt import copied, copies


def blank_state(optim: object, params: PyTree, cls: type) -> tuple[PyTree, Any]:
    """The initial state of an optimizer, and our own state inside it."""
    tree = init(cast(OptaxOptimizer, optim), params)  # which checks it
    found = states_in(tree, lambda x: isinstance(x, cls))
    if len(found) != 1:
        what = "of this package" if cls is AbstractMomentState else of(cls)
        raise ValueError(
            f"`optim` is {describe(optim)}, whose state has {len(found) or 'no'} "
            f"states {what}, but one was expected. Found in it: {kinds_in(tree)}. Pass "
            "an optimizer of this package, or one that contains exactly one."
        )
    return tree, found[0]


def continued(
    blank: PyTree, ours: AbstractMomentState[Any], opt_state: PyTree
) -> PyTree:
    """The state of the optimizer that continues: our own state in its place, and the
    schedules' counters and the remainders of the old state."""
    found, wanted = _by_kind(opt_state), _by_kind(blank)
    values = {
        kind: iter(_values(kind, found.get(kind, []), len(new), ours))
        for kind, new in wanted.items()
    }
    tree = _with_remainders(_with_counters(blank, values), opt_state)
    put = lambda x: ours if is_moment_state(x) else x
    tree = jax.tree.map(put, tree, is_leaf=is_moment_state)
    return jax.tree.map(_beside, tree, blank)


def _beside(x: Node, like: Node) -> Node:
    """An array of the old state with the sharding that `init` gives it, unless it is
    already split over devices."""
    if not isinstance(x, jax.Array) or not isinstance(like, jax.Array):
        return x
    is_split = not isinstance(x, Tracer) and not x.sharding.is_fully_replicated
    return x if is_split else in_sharding_of(x, like)


#
# Counters of schedules
#

# The values of counters that a state contains, in order.
_Counters: TypeAlias = dict[str, list[Any]]

# The optax classes whose states count the steps of a schedule, with the field. They are
# recognized by name, since optax does not export all of them.
_FIELDS = {
    "ScaleByScheduleState": "count",
    "InjectHyperparamsState": "count",
    "InjectStatefulHyperparamsState": "count",
    "WrappedScheduleState": "count",
    "MultiStepsState": "gradient_step",
}
# In `optax.inject_hyperparams`, the schedules of these count from the beginning of the
# slow average, as in our own optimizer.
_SLOW = ("b3", "alpha")


def _by_kind(tree: PyTree) -> _Counters:
    found: _Counters = {}
    for kind, value in _counters(tree):
        found.setdefault(kind, []).append(value)
    return found


def _counters(node: Node, key: object = None) -> Iterator[tuple[str, Any]]:
    if is_leaf(node) or is_moment_state(node):
        return
    if kind := _kind(node, key):
        yield kind, getattr(node, _FIELDS[type(node).__name__])
    for path, child in children(node)[0]:
        yield from _counters(child, getattr(path[0], "key", None))


def _with_counters(
    node: Node, values: dict[str, Iterator[Any]], key: object = None
) -> Node:
    if is_leaf(node) or is_moment_state(node):
        return node
    if kind := _kind(node, key):
        node = node._replace(**{_FIELDS[type(node).__name__]: next(values[kind])})
    items, treedef = children(node)
    return treedef.unflatten(
        [
            _with_counters(child, values, getattr(path[0], "key", None))
            for path, child in items
        ]
    )


def _kind(node: Node, key: object) -> str:
    """The name of a state's counter, empty if it has none. `key` is the key of the
    state in a dict."""
    name = type(node).__name__
    if name not in _FIELDS:
        return ""
    if name == "WrappedScheduleState" and key in _SLOW:
        return f"WrappedScheduleState.count of {' or '.join(_SLOW)}"
    # The first is the older name of the second.
    name = name.replace("InjectHyper", "InjectStatefulHyper")
    return f"{name}.{_FIELDS[type(node).__name__]}"


def _values(
    kind: str, old: list[Any], number: int, ours: AbstractMomentState[Any]
) -> list[Any]:
    """The values from which counters of one kind continue. Where the old state has
    none, it is as if our optimizer had had the schedules from the beginning."""
    for value in old:
        check_alive(f"opt_state: {kind}", value)
    if not old:
        is_slow = kind.endswith(_SLOW[-1])
        count = getattr(ours, "count_m2", ours.count) if is_slow else ours.count
        old = [count] * number
    elif len(old) != number:
        if len(old) > 1 and not _are_equal(old):
            shown = ", ".join(map(_shown, old))
            raise ValueError(
                f"`opt_state` has {len(old)} counters `{kind}` ({shortened(shown, 80)})"
                f", but the state of `optim` has {number}, so it is unclear from "
                "which number the schedules continue. Make the old ones equal with "
                "`eqx.tree_at` before the conversion, and change the new ones after it."
            )
        old = [old[0]] * number
    return [copied(value, jnp.int32) for value in old]


def _are_equal(values: list[Any]) -> bool:
    if any(isinstance(x, Tracer) for x in values):
        return all(x is values[0] for x in values)
    return all(np.array_equal(x, values[0]) for x in values)


def _shown(value: object) -> str:
    return "traced" if isinstance(value, Tracer) else str(np.asarray(value))


#
# Remainders of 16-bit parameters
#


def _with_remainders(tree: PyTree, opt_state: PyTree) -> PyTree:
    """The remainders of the old state, if they have the new one's type. With them, the
    float32 parameters continue; without them, the rounded ones."""
    old, new = (states_in(x, _is_compensated) for x in (opt_state, tree))
    if not (len(old) == len(new) == 1 and _type(old[0]) == _type(new[0])):
        return tree
    check_alive("opt_state", (old[0].remainder, old[0].count))
    kept = copies((old[0].remainder, old[0].count))
    parts = lambda state: (state.remainder, state.count)
    state = eqx.tree_at(parts, new[0], kept)
    put = lambda x: state if _is_compensated(x) else x
    return jax.tree.map(put, tree, is_leaf=_is_compensated)


def _is_compensated(x: Node) -> bool:
    return isinstance(x, CompensatedState)


def _type(state: CompensatedState) -> object:
    leaves, treedef = jax.tree.flatten(state.remainder)
    return treedef, [(x.shape, x.dtype) for x in leaves], state.dtypes
