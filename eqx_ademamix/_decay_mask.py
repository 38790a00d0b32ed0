"""Which leaves are decayed, and why."""

import dataclasses
import math
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import equinox as eqx
import jax
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from ._filters import FilterSpec, as_bools, checked_bool
from ._paths import (
    Node,
    Path,
    children,
    describe,
    full_path_text,
    inexact_shapes,
    is_found,
    is_inexact_shape,
    is_leaf,
    table,
)
from ._typing import no_type_check


NORMS = (eqx.nn.LayerNorm, eqx.nn.RMSNorm, eqx.nn.GroupNorm, eqx.nn.BatchNorm)
# `bias`, `bias_ih`, `qkv_bias`, `biases`, `bias2`, `qkvBias`, but not `unbiased`.
_BIAS = re.compile(r"((^|_)[bB]ias|[a-z]Bias)(es)?\d*(_|[A-Z]|$)")


class _Place(NamedTuple):
    """An inexact array of a model, and where it sits."""

    path: Path
    leaf: Array | jax.ShapeDtypeStruct
    owners: tuple[Node, ...]  # from the root to the node that holds the leaf
    stack: tuple[int, ...]  # leading axes that come from stacking (vmapping) its layer


class _Verdict(NamedTuple):
    decayed: bool
    rule: str


Predicate: TypeAlias = Callable[[str, Any], bool | None]
_Pattern: TypeAlias = str | re.Pattern[str]
Patterns: TypeAlias = _Pattern | Sequence[_Pattern]


@no_type_check
def decay_mask(
    model: PyTree,
    *,
    predicate: Predicate | None = None,
    exclude: Patterns = (),
    include: Patterns = (),
    skip_types: type | tuple[type, ...] = NORMS,
) -> PyTree[bool]:
    r"""Chooses the leaves that weight decay acts on.

    For each inexact array, the first of these rules that applies decides:

    1. `predicate`,
    2. `exclude`: not decayed,
    3. `include`: decayed,
    4. its module, or an enclosing one, is among `skip_types` (normalization layers):
       not decayed,
    5. its field is named like a bias (`bias`, `bias_ih`, `qkv_bias`, ...): not decayed,
       whatever its rank,
    6. its rank: decayed if it is at least 2. Axes that come from stacking layers with
       `eqx.filter_vmap` do not count. A stack is recognized by the layers of `eqx.nn`
       in it, whose ranks are known, and by jaxtyping annotations of fields. A stack
       that has neither looks like a single layer: name its vectors in `exclude`.

    All other leaves (functions, integers, ...) are `False`.

    **Arguments:**

    - `model`: the model, of arrays or of `jax.ShapeDtypeStruct`s.
    - `predicate`: called with each inexact array's path, as error messages print it
        after the tree's name (`.layers[0].weight`), and with the array. Returns a bool,
        or `None` to leave the choice to the other rules.
    - `exclude`, `include`: regular expressions that `re.search` looks for in that path.
        Brackets and dots are special characters: write `r"layers\[0\]"`.
    - `skip_types`: module types whose arrays are not decayed.

    **Returns:**

    A tree of bools shaped like the model, for `AdEMAMix(weight_decay_mask=...)`.
    [`eqx_ademamix.decay_report`][] shows what is in it.

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

    excluded, included = patterns("exclude", exclude), patterns("include", include)
    _check_types(skip_types)

    def verdict(place: _Place) -> bool:
        chosen = _chosen(place, predicate, excluded, included)
        return _by_rule(place, skip_types).decayed if chosen is None else chosen

    flags = {place.path: verdict(place) for place in _places(model)}
    return jtu.tree_map_with_path(lambda path, _: flags.get(path, False), model)


def patterns(name: str, patterns: object) -> tuple[re.Pattern[str], ...]:
    is_one = isinstance(patterns, str | re.Pattern)
    several = (patterns,) if is_one else cast("Iterable[Any]", patterns)
    try:
        return tuple(re.compile(x) for x in several)
    except (TypeError, re.error) as error:
        raise ValueError(
            f"`{name}` is {patterns!r}, but a regular expression or a sequence of them "
            f"was expected ({error}). Brackets and dots in a path need a backslash."
        ) from error


def _check_types(skip_types: object) -> None:
    types: tuple[object, ...]
    types = skip_types if isinstance(skip_types, tuple) else (skip_types,)
    if not all(isinstance(cls, type) for cls in types):
        raise TypeError(
            f"`skip_types` is {describe(skip_types)}, but a class or a tuple of "
            "classes was expected, for example `(eqx.nn.LayerNorm,)`."
        )


def _chosen(
    place: _Place,
    predicate: Predicate | None,
    exclude: tuple[re.Pattern[str], ...],
    include: tuple[re.Pattern[str], ...],
) -> bool | None:
    """What the caller's own arguments decide for a leaf."""
    path = jtu.keystr(place.path)
    flag = None if predicate is None else predicate(path, place.leaf)
    if flag is not None:
        return checked_bool(flag, place.leaf, "predicate at ", place.path)
    if any(is_found(pattern, path) for pattern in exclude):
        return False
    if any(is_found(pattern, path) for pattern in include):
        return True
    return None


def _by_rule(place: _Place, skip_types: type | tuple[type, ...]) -> _Verdict:
    """What the rules decide for a leaf when the caller's arguments do not."""
    skipped = [type(x).__name__ for x in place.owners if isinstance(x, skip_types)]
    if skipped:
        return _Verdict(False, f"in a {skipped[-1]}")
    if any(_BIAS.search(name) for name in _field_names(place)):
        return _Verdict(False, "a bias")
    rank = len(place.leaf.shape) - len(place.stack)
    stack = f", stacked {'x'.join(map(str, place.stack))} times" if place.stack else ""
    return _Verdict(rank >= 2, f"rank {rank}{stack}")


def _field_names(place: _Place) -> list[str]:
    """The names in a path after the innermost module: the name of its field, and the
    dictionary keys inside."""
    modules = [i for i, x in enumerate(place.owners) if isinstance(x, eqx.Module)]
    keys = place.path[modules[-1] if modules else 0 :]
    names = [getattr(key, "name", getattr(key, "key", None)) for key in keys]
    return [name for name in names if isinstance(name, str)]


def _places(
    node: Node,
    path: Path = (),
    owners: tuple[Node, ...] = (),
    stack: tuple[int, ...] = (),
) -> Iterator[_Place]:
    """All inexact arrays of a model, in the order of its flattening."""
    if is_inexact_shape(node):
        yield _Place(path, node, owners, _common_prefix([stack, node.shape]))
    elif not is_leaf(node):
        stack = max(stack, _stacked_axes(node), key=len)
        for key, child in children(node)[0]:
            yield from _places(child, path + key, (*owners, node), stack)


def _stacked_axes(node: Node) -> tuple[int, ...]:
    """The extra leading axes that all arrays of known rank below a module share, and
    that all its other arrays have too: stacking a module stacks everything in it."""
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


def _known_arrays(node: Node) -> Iterator[tuple[Array, int]]:
    """The arrays below a node whose rank in a single layer is known."""
    if is_leaf(node):
        return
    for name, rank in {**_declared_ranks(node), **_layer_ranks(node)}.items():
        leaf: Node = getattr(node, name, None)
        if is_inexact_shape(leaf):
            yield leaf, rank
    for _, child in children(node)[0]:
        yield from _known_arrays(child)


def _layer_ranks(node: Node) -> dict[str, int]:
    """The ranks of the arrays in the layers of `eqx.nn`."""
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


def _declared_ranks(node: Node) -> dict[str, int]:
    """The ranks that a module's own jaxtyping annotations declare."""
    fields = dataclasses.fields(node) if dataclasses.is_dataclass(node) else ()
    ranks = {field.name: _declared_rank(field.type) for field in fields}
    return {name: rank for name, rank in ranks.items() if rank is not None}


def _declared_rank(annotation: object) -> int | None:
    """The rank that an annotation such as `Float[Array, "dim"] | None` declares."""
    hints = (annotation, *typing.get_args(annotation))
    dims = [getattr(hint, "dim_str", None) for hint in hints]
    texts = [text for text in dims if text is not None]
    is_open = any("*" in text or "..." in text for text in texts)
    ranks = {len(text.split()) for text in texts}
    return ranks.pop() if len(ranks) == 1 and not is_open else None


#
# The report
#


@no_type_check
def decay_report(model: PyTree, mask: FilterSpec) -> str:
    """Says what a mask decides for each array, and by which rule.

    **Arguments:**

    - `model`: the model.
    - `mask`: a filter spec, for example what [`eqx_ademamix.decay_mask`][] returned.

    **Returns:**

    Human-readable text. Each inexact array has a line with its path, its shape, and the
    rule of `decay_mask` that gives the mask's value. It says "chosen" where the rules
    alone give the opposite (because of `predicate`, `exclude`, `include`, or a mask
    made by hand).

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
    arrays = inexact_shapes(model)
    pairs = zip(as_bools(mask, arrays, "mask"), arrays.values, strict=True)
    flags = [flag for flag, x in pairs if x is not None]
    places = list(_places(model))
    lines = table([_row(x, flag) for x, flag in zip(places, flags, strict=True)])

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
    by_rule = _by_rule(place, NORMS)
    rule = by_rule.rule if by_rule.decayed == flag else f"chosen ({by_rule.rule})"
    return full_path_text(place.path), str(place.leaf.shape), rule
