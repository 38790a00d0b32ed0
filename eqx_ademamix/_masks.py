"""Which leaves are trained, and which of them are decayed."""

import dataclasses
import math
import re
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.core import Tracer
from jaxtyping import PyTree

from ._checks import (
    Path,
    children,
    contrast,
    describe,
    is_inexact_shape,
    is_leaf,
    no_type_check,
    path_text,
)


#
# Filter specs
#


def with_python_bools(spec: Any) -> Any:
    """A filter spec without NumPy bools, which `eqx.filter_jit` would trace."""
    return jax.tree.map(lambda x: bool(x) if isinstance(x, np.bool_) else x, spec)


def select(spec: Any, tree: Any, name: str) -> Any:
    """The inexact arrays of a tree that a filter spec selects, `None` elsewhere."""
    arrays = jax.tree.map(
        lambda x: jnp.asarray(x) if eqx.is_inexact_array(x) else None, tree
    )
    keep = as_bools(spec, arrays, name)
    return jax.tree.map(lambda flag, x: x if flag else None, keep, arrays)


def as_bools(spec: Any, arrays: Any, name: str, path: Path = ()) -> Any:
    """Resolves a filter spec to one bool for each array of a tree (`None` where that
    has `None`).

    A spec is a bool for a whole subtree, a callable on each array of it, or a node
    whose children are specs. Where a tree has no arrays a spec may be anything: so it
    may be shaped like the whole model or like the filtered one.
    """
    if not jtu.tree_leaves(arrays):
        return arrays
    if is_leaf(spec):
        return jtu.tree_map_with_path(
            lambda key, x: _as_bool(spec, x, name, path + key), arrays
        )
    (specs, spec_def), (subtrees, treedef) = children(spec), children(arrays)
    if is_leaf(arrays) or spec_def != treedef:
        found, expected = contrast(spec, arrays)
        raise ValueError(
            f"{name}{path_text(path)} is {found}, but the parameters have {expected} "
            "there. A mask is a bool, a callable on one array, or a tree of bools "
            "shaped like the model or a prefix of it."
        )
    pairs = zip(specs, subtrees, strict=True)
    return treedef.unflatten(
        as_bools(child, sub, name, path + key) for (_, child), (key, sub) in pairs
    )


def _as_bool(spec: Any, array: Any, name: str, path: Path) -> bool:
    flag = spec(array) if callable(spec) else spec
    if isinstance(flag, (bool, np.bool_)):
        return bool(flag)
    what_to_do = (
        "Under plain `jax.jit` a mask must not be an argument: use `eqx.filter_jit`."
        if isinstance(flag, Tracer)
        else "Use True or False there, or a callable that returns one of them."
    )
    raise TypeError(
        f"{name}{path_text(path)} is {describe(flag)}, but a bool was expected for "
        f"{describe(array)}. {what_to_do}"
    )


#
# Decay masks
#

_NORMS = (eqx.nn.LayerNorm, eqx.nn.RMSNorm, eqx.nn.GroupNorm, eqx.nn.BatchNorm)
# `bias`, `bias_ih`, `qkv_bias`, `biases`, `bias2`, `qkvBias`, but not `unbiased`.
_BIAS = re.compile(r"((^|_)[bB]ias|[a-z]Bias)(es)?\d*(_|[A-Z]|$)")


class _Place(NamedTuple):
    """An inexact array of a model, and where it sits."""

    path: Path
    leaf: Any
    owners: tuple[Any, ...]  # from the root to the node that holds the leaf
    stack: tuple[int, ...]  # leading axes that come from stacking (vmapping) its layer


class _Verdict(NamedTuple):
    decayed: bool
    rule: str


Predicate: TypeAlias = Callable[[str, Any], bool | None]
_Pattern: TypeAlias = str | re.Pattern[str]
_Patterns: TypeAlias = _Pattern | Sequence[_Pattern]


@no_type_check
def decay_mask(
    model: PyTree[Any],
    *,
    predicate: Predicate | None = None,
    exclude: _Patterns = (),
    include: _Patterns = (),
    skip_types: type | tuple[type, ...] = _NORMS,
) -> PyTree[bool]:
    r"""Chooses the leaves that weight decay acts on.

    The first of these that has an opinion decides on an inexact array:

    1. `predicate`,
    2. `exclude`: not decayed,
    3. `include`: decayed,
    4. its module, or one around it, is among `skip_types` (normalisation layers): not
       decayed,
    5. its field is named as a bias (`bias`, `bias_ih`, `qkv_bias`, ...): not decayed,
       whatever its rank,
    6. its rank: decayed from 2 on. Axes that come from stacking layers with
       `eqx.filter_vmap` do not count. A stack is recognised by the layers of `eqx.nn`
       in it, whose ranks are known, and by jaxtyping annotations of fields. One that
       has neither looks like a single layer: name its vectors in `exclude`.

    Everything else (functions, integers, ...) is `False`.

    **Arguments:**

    - `model`: the model, of arrays or of `jax.ShapeDtypeStruct`s.
    - `predicate`: called with each inexact array's path, as error messages print it
        after the tree's name (`.layers[0].weight`), and with the array. Returns a bool,
        or `None` to leave the choice to the other rules.
    - `exclude`, `include`: regular expressions, looked for in that path by `re.search`.
        Mind that brackets and dots are special: `r"layers\[0\]"`.
    - `skip_types`: module types none of whose arrays is decayed.

    **Returns:**

    A tree of bools shaped like the model, for `AdEMAMix(weight_decay_mask=...)`.
    [`eqx_ademamix.decay_report`][] prints it.

    **Raises:**

    - `TypeError`: if `predicate` returns neither a bool nor `None`.

    !!! Example

        ```python
        import equinox as eqx
        import jax
        import eqx_ademamix

        model = eqx.nn.MLP(2, 1, width_size=8, depth=1, key=jax.random.key(0))
        mask = eqx_ademamix.decay_mask(model, exclude=r"layers\[0\]")
        assert mask.layers[1].weight and not mask.layers[1].bias
        assert not mask.layers[0].weight
        ```
    """

    excluded, included = _patterns("exclude", exclude), _patterns("include", include)
    _check_types(skip_types)

    def verdict(place: _Place) -> bool:
        chosen = _chosen(place, predicate, excluded, included)
        return _by_rule(place, skip_types).decayed if chosen is None else chosen

    flags = {place.path: verdict(place) for place in _places(model)}
    return jtu.tree_map_with_path(lambda path, _: flags.get(path, False), model)


def _patterns(name: str, patterns: Any) -> tuple[re.Pattern[str], ...]:
    is_one = isinstance(patterns, str | re.Pattern)
    try:
        return tuple(map(re.compile, (patterns,) if is_one else tuple(patterns)))
    except (TypeError, re.error) as error:
        raise ValueError(
            f"`{name}` is {patterns!r}, but a regular expression or a sequence of such "
            f"was expected ({error}). Brackets and dots of a path need a backslash."
        ) from error


def _check_types(skip_types: Any) -> None:
    types = skip_types if isinstance(skip_types, tuple) else (skip_types,)
    if not all(isinstance(cls, type) for cls in types):
        raise TypeError(
            f"`skip_types` is {describe(skip_types)}, but a class or a tuple of "
            "classes was expected, for example `(eqx.nn.LayerNorm,)`."
        )


def _chosen(
    place: _Place,
    predicate: Predicate | None,
    exclude: tuple[Any, ...],
    include: tuple[Any, ...],
) -> bool | None:
    """What the caller has to say on a leaf."""
    path = jtu.keystr(place.path)
    flag = None if predicate is None else predicate(path, place.leaf)
    if flag is not None:
        return _as_bool(flag, place.leaf, "predicate at ", place.path)
    if any(_found(pattern, path) for pattern in exclude):
        return False
    if any(_found(pattern, path) for pattern in include):
        return True
    return None


def _found(pattern: Any, path: str) -> bool:
    # `^` matches before and after the leading dot of `.layers[0].weight`.
    return any(re.search(pattern, text) for text in (path, path.removeprefix(".")))


def _by_rule(place: _Place, skip_types: Any) -> _Verdict:
    """What the rules say on a leaf on which the caller has no opinion."""
    skipped = [type(x).__name__ for x in place.owners if isinstance(x, skip_types)]
    if skipped:
        return _Verdict(False, f"in a {skipped[-1]}")
    if any(_BIAS.search(name) for name in _field_names(place)):
        return _Verdict(False, "a bias")
    rank = len(place.leaf.shape) - len(place.stack)
    stack = f", stacked {'x'.join(map(str, place.stack))} times" if place.stack else ""
    return _Verdict(rank >= 2, f"rank {rank}{stack}")


def _field_names(place: _Place) -> list[str]:
    """The names in a path since the innermost module: that of its field, and those of
    dictionary keys inside of it."""
    modules = [i for i, x in enumerate(place.owners) if isinstance(x, eqx.Module)]
    keys = place.path[modules[-1] if modules else 0 :]
    names = [getattr(key, "name", getattr(key, "key", None)) for key in keys]
    return [name for name in names if isinstance(name, str)]


def _places(
    node: Any,
    path: Path = (),
    owners: tuple[Any, ...] = (),
    stack: tuple[int, ...] = (),
) -> Iterator[_Place]:
    """All inexact arrays of a model, in the order of its flattening."""
    if is_inexact_shape(node):
        yield _Place(path, node, owners, _common_prefix([stack, node.shape]))
    elif not is_leaf(node):
        stack = max(stack, _stacked_axes(node), key=len)
        for key, child in children(node)[0]:
            yield from _places(child, path + key, (*owners, node), stack)


def _stacked_axes(node: Any) -> tuple[int, ...]:
    """The leading axes that all arrays of known rank below a module have in excess, and
    that all its other arrays have too: stacking a module stacks all that is in it."""
    known = list(_known_arrays(node))
    if not (isinstance(node, eqx.Module) and known):
        return ()
    excess = [x.shape[: max(len(x.shape) - rank, 0)] for x, rank in known]
    others = [x.shape for x in jtu.tree_leaves(node) if is_inexact_shape(x)]
    return _common_prefix(excess + others)


def _common_prefix(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    equal = [len(set(sizes)) == 1 for sizes in zip(*shapes, strict=False)]
    length = equal.index(False) if False in equal else len(equal)
    return shapes[0][:length] if shapes else ()


def _known_arrays(node: Any) -> Iterator[tuple[Any, int]]:
    """The arrays below a node of which it is known what rank they have in one layer."""
    if is_leaf(node):
        return
    for name, rank in {**_declared_ranks(node), **_layer_ranks(node)}.items():
        leaf = getattr(node, name, None)
        if is_inexact_shape(leaf):
            yield leaf, rank
    for _, child in children(node)[0]:
        yield from _known_arrays(child)


def _layer_ranks(node: Any) -> dict[str, int]:
    """The ranks of the arrays of the layers of `eqx.nn`."""
    nn = eqx.nn
    if isinstance(node, nn.Linear | nn.Embedding):
        return {"weight": 2}
    if isinstance(node, nn.Conv | nn.ConvTranspose):
        return {"weight": node.num_spatial_dims + 2}
    if isinstance(node, nn.GRUCell | nn.LSTMCell):
        return {"weight_ih": 2, "weight_hh": 2}
    if isinstance(node, nn.LayerNorm | nn.RMSNorm):
        return {"weight": len(node.shape)}
    if isinstance(node, nn.GroupNorm | nn.BatchNorm):
        return {"weight": 1}
    if isinstance(node, nn.PReLU):
        return {"negative_slope": 0}
    return {}


def _declared_ranks(node: Any) -> dict[str, int]:
    """The ranks that a module's own jaxtyping annotations declare."""
    fields = dataclasses.fields(node) if dataclasses.is_dataclass(node) else ()
    ranks = {field.name: _declared_rank(field.type) for field in fields}
    return {name: rank for name, rank in ranks.items() if rank is not None}


def _declared_rank(annotation: Any) -> int | None:
    """The rank that an annotation such as `Float[Array, "dim"] | None` stands for."""
    hints = (annotation, *typing.get_args(annotation))
    dims = [hint.dim_str for hint in hints if hasattr(hint, "dim_str")]
    is_open = any("*" in text or "..." in text for text in dims)
    ranks = {len(text.split()) for text in dims}
    return ranks.pop() if len(ranks) == 1 and not is_open else None


#
# The report
#


@no_type_check
def decay_report(model: PyTree[Any], mask: Any) -> str:
    """Says what a mask decides, path by path, and by which rule.

    **Arguments:**

    - `model`: the model.
    - `mask`: a filter spec, for example what [`eqx_ademamix.decay_mask`][] returned.

    **Returns:**

    Text for a person to read: a line for each inexact array with its path, shape and
    the rule of `decay_mask` that gives the mask's value, or "chosen" where the rules by
    themselves give the opposite (by `predicate`, `exclude`, `include`, or by hand).

    **Raises:**

    - `ValueError` or `TypeError`: if the mask does not fit the model.

    !!! Example

        ```python
        import equinox as eqx
        import jax
        import eqx_ademamix

        model = eqx.nn.MLP(2, 1, width_size=8, depth=1, key=jax.random.key(0))
        print(eqx_ademamix.decay_report(model, eqx_ademamix.decay_mask(model)))
        ```
        ```text
        Weight decay acts on 2 of 4 arrays, 24 of 33 parameters.

        decayed:
          .layers[0].weight  (8, 2)  rank 2
          .layers[1].weight  (1, 8)  rank 2

        not decayed:
          .layers[0].bias    (8,)    a bias
          .layers[1].bias    (1,)    a bias
        ```
    """
    arrays = jax.tree.map(lambda x: x if is_inexact_shape(x) else None, model)
    flags = jtu.tree_leaves(as_bools(mask, arrays, "mask"))
    places = list(_places(model))
    rows = [_row(place, flag) for place, flag in zip(places, flags, strict=True)]
    widths = [max((len(row[i]) for row in rows), default=0) for i in (0, 1)]
    lines = [f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows]

    def section(wanted: bool) -> list[str]:
        found = [
            line for line, flag in zip(lines, flags, strict=True) if flag == wanted
        ]
        return found or ["  nothing"]

    sizes = [math.prod(place.leaf.shape) for place in places]
    decayed = sum(size for size, flag in zip(sizes, flags, strict=True) if flag)
    summary = (
        f"Weight decay acts on {sum(flags)} of {len(flags)} arrays, "
        f"{decayed:,} of {sum(sizes):,} parameters."
    )
    groups = ["", "decayed:", *section(True), "", "not decayed:", *section(False)]
    return "\n".join([summary, *groups])


def _row(place: _Place, flag: bool) -> tuple[str, str, str]:
    by_rule = _by_rule(place, _NORMS)
    rule = by_rule.rule if by_rule.decayed == flag else f"chosen ({by_rule.rule})"
    return jtu.keystr(place.path) or "(the tree itself)", str(place.leaf.shape), rule
