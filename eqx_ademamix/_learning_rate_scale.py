"""Which learning rate each leaf gets."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, PyTree

from ._filters import by_leaf
from ._hyperparams import finite, hyperparam, wide
from ._paths import (
    Leaves,
    Node,
    Path,
    describe,
    full_path_text,
    inexact_shapes,
    is_found,
    path_text,
    shortened,
    table,
)
from ._storage.codec import Struct
from ._typing import no_type_check


# What a leaf's learning rate is multiplied by: a number, or an array whose shape is a
# prefix of the leaf's.
Scale: TypeAlias = float | Array
# A prefix tree of them. Checked against a model when used.
Scales: TypeAlias = PyTree
ScaleLike: TypeAlias = jax.typing.ArrayLike
# Generic types would make older versions of beartype fail.
RuleKey: TypeAlias = Any  # str | re.Pattern[str] | type
Rules: TypeAlias = Mapping[RuleKey, ScaleLike] | Iterable[tuple[RuleKey, ScaleLike]]


class _Rule(NamedTuple):
    text: str
    matches: Callable[[Path], bool]
    scale: Scale


@no_type_check
def path_scales(model: PyTree, rules: Rules) -> Scales:
    r"""Chooses a scale for the learning rate of each array.

    **Arguments:**

    - `model`: the model, of arrays or of `jax.ShapeDtypeStruct`s.
    - `rules`: a mapping, or a sequence of pairs. The first rule that matches an inexact
        array decides its scale. If none does, its scale is 1. Each key is one of:

        - a regular expression that `re.search` looks for in the array's path, as error
          messages print it after the tree's name (`.layers[0].weight`). Brackets and
          dots are special characters: write `r"layers\[0\]"`.
        - a type, such as `eqx.nn.Embedding`. It matches all arrays inside modules of
          that type.

        Each value is a finite real number, an array of shape `()`, or an array over the
        leading axes of the arrays it applies to: with stacked layers, one number for
        each layer.

    **Returns:**

    A tree shaped like the model with a scale at each inexact array, and `None`
    elsewhere, for `AdEMAMix(learning_rate_scale=...)`. Numbers become Python floats.
    Under `eqx.filter_jit`, they are static: changing one triggers recompilation. Arrays
    stay arrays, which are traced: changing their values does not.
    [`eqx_ademamix.learning_rate_report`][] shows what is in it.

    **Raises:**

    - `ValueError`: if a rule matches no inexact array, a regular expression is invalid,
        a number is not finite, or an array's shape is not a prefix of the shape of each
        array it applies to.
    - `TypeError`: if a key or a value has another type.

    !!! Example

        ```python
        import equinox as eqx
        import jax
        import eqx_ademamix

        model = eqx.nn.Sequential(
            [
                eqx.nn.Embedding(100, 8, key=jax.random.key(0)),
                eqx.nn.Linear(8, 100, key=jax.random.key(1)),
            ]
        )
        rules = {eqx.nn.Embedding: 0.1, r"layers\[1\]\.weight": 0.5}
        scales = eqx_ademamix.path_scales(model, rules)
        assert scales.layers[0].weight == 0.1
        assert scales.layers[1].weight == 0.5 and scales.layers[1].bias == 1.0
        ```
    """
    arrays = inexact_shapes(model)
    pairs = zip(arrays.paths, arrays.values, strict=True)
    shapes = {path: x for path, x in pairs if x is not None}
    parsed = [_rule(key, scale, model) for key, scale in _pairs(rules)]
    for rule in parsed:
        _check_used(rule, list(shapes))
    scales = {path: _chosen(parsed, path, x) for path, x in shapes.items()}
    return jtu.tree_map_with_path(lambda path, _: scales.get(path), model)


def _pairs(rules: object) -> list[tuple[Any, Any]]:
    try:
        pairs = rules.items() if isinstance(rules, Mapping) else rules
        return [(key, scale) for key, scale in cast("Iterable[Any]", pairs)]
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"`rules` is {describe(rules)}, but a mapping from regular expressions or "
            "types to scales was expected, or a sequence of such pairs."
        ) from error


def _rule(key: object, scale: object, model: PyTree) -> _Rule:
    if isinstance(key, type):
        text, matches = key.__name__, _is_inside(key, model)
    else:
        pattern = _compiled(key)
        text = f"'{pattern.pattern}'"
        matches = lambda path: is_found(pattern, jtu.keystr(path))
    text = f"rules[{shortened(text, 80)}]"
    return _Rule(text, matches, _checked(scale, text, ()))


def _compiled(key: object) -> re.Pattern[str]:
    pattern = key.pattern if isinstance(key, re.Pattern) else key
    if not isinstance(pattern, str):
        raise TypeError(
            f"`rules` has the key {shortened(repr(key), 80)}, but a regular expression "
            "or a type was expected, for example `eqx.nn.Embedding`."
        )
    try:
        return key if isinstance(key, re.Pattern) else re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"`rules` has the key {shortened(repr(key), 80)}, which is not a regular "
            f"expression ({error}). Brackets and dots in a path need a backslash."
        ) from error


def _is_inside(cls: type, model: PyTree) -> Callable[[Path], bool]:
    """Whether a path leads through an instance of a class."""
    is_one = lambda x: isinstance(x, cls)
    pairs = jtu.tree_flatten_with_path(model, is_leaf=is_one)[0]
    outermost = {path for path, x in pairs if is_one(x)}
    return lambda path: any(path[:i] in outermost for i in range(len(path) + 1))


def _check_used(rule: _Rule, paths: list[Path]) -> None:
    if any(rule.matches(path) for path in paths):
        return
    texts = [_place(path) for path in paths[:3]]
    more = ", ..." if len(paths) > 3 else ""
    raise ValueError(
        f"`{rule.text}` matches none of the model's {len(paths)} floating-point or "
        f"complex arrays: {', '.join(texts) or 'it has none'}{more}. Correct the key, "
        "or leave out the rule."
    )


def _chosen(rules: list[_Rule], path: Path, array: Array | Struct) -> Scale:
    """The scale of the first rule that matches."""
    for rule in rules:
        if rule.matches(path):
            _check_shape(rule.scale, array, rule.text, path)
            return rule.scale
    return 1.0


#
# The scales of an optimizer
#


def checked_scales(scales: Scales, name: str = "learning_rate_scale") -> Scales:
    """Checks a prefix tree of scales without its model. Numbers become Python floats
    (static under `filter_jit`), arrays become arrays of the default float (traced)."""
    return jtu.tree_map_with_path(lambda path, x: _checked(x, name, path), scales)


def _checked(scale: Node, name: str, path: Path) -> Scale:
    _check_real(scale, name, path)
    if np.ndim(scale) == 0:
        return hyperparam(f"{name}{path_text(path)}", scale, finite)
    if not isinstance(scale, Tracer):
        _check_finite(np.asarray(scale), name, path)
    return wide(scale)


def _check_real(scale: object, name: str, path: Path) -> None:
    if not _is_real(scale):
        raise TypeError(
            f"`{name}{path_text(path)}` is {describe(scale)}, but a scale was "
            "expected: a finite real number, or an array of them for the leading axes "
            "of a parameter. Leave None where the model has no arrays."
        )


def _is_real(x: object) -> bool:
    if isinstance(x, (np.ndarray, np.generic, jax.Array)):
        kinds = np.integer, np.floating
        return any(jnp.issubdtype(x.dtype, kind) for kind in kinds)
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def _check_finite(scale: np.ndarray, name: str, path: Path) -> None:
    with np.errstate(over="ignore"):
        used = scale.astype(np.float64).astype(jnp.result_type(float))
    if not np.isfinite(used).all():
        raise ValueError(
            f"`{name}{path_text(path)}` is {describe(scale)} with NaN or infinite "
            f"entries in {used.dtype}, but finite numbers were expected."
        )


def as_scales(scales: Scales, arrays: Leaves, name: str) -> list[Scale | None]:
    """Resolves a prefix tree of scales to one for each leaf of a tree of arrays and
    `None`s: `None` for `None`.

    A scale is for a whole subtree. If it is an array, its shape must be a prefix of the
    shape of each array in the subtree.
    """
    kind = "Scales are a number, an array, or a tree of numbers and arrays"
    places = zip(by_leaf(scales, arrays, name, kind), *arrays[:2], strict=True)
    return [None if x is None else _as_scale(s, x, name, p) for s, p, x in places]


def _as_scale(scale: Node, array: Array | Struct, name: str, path: Path) -> Scale:
    _check_real(scale, name, path)
    if not isinstance(scale, (np.ndarray, jax.Array)):
        return float(scale)
    _check_shape(scale, array, name, path)
    return jnp.asarray(scale)


def _check_shape(scale: Node, array: Array | Struct, name: str, path: Path) -> None:
    shape = np.shape(scale)
    if array.shape[: len(shape)] != shape:
        raise ValueError(
            f"`{name}` has shape {shape} at {_place(path)}, where the parameter has "
            f"shape {array.shape}. An array of scales must have the sizes of the "
            "parameter's first axes."
        )


def _place(path: Path) -> str:
    return path_text(path) or "(the tree itself)"


#
# The report
#


@no_type_check
def learning_rate_report(model: PyTree, scales: Scales) -> str:
    """Says what the learning rate of each array is multiplied by.

    **Arguments:**

    - `model`: the model, of arrays or of `jax.ShapeDtypeStruct`s.
    - `scales`: a prefix tree of scales, as for `AdEMAMix(learning_rate_scale=...)`: for
        example what [`eqx_ademamix.path_scales`][] returned.

    **Returns:**

    Human-readable text. Each inexact array has a line with its path, its shape, and its
    scale. An array of up to four scales is shown as a list, a longer one as its
    smallest and largest entries. Values that are unknown under `jit` are shown as
    "traced".

    **Raises:**

    - `ValueError` or `TypeError`: if the scales do not fit the model.

    !!! Example

        ```python
        import equinox as eqx
        import jax
        import eqx_ademamix

        model = eqx.nn.MLP(2, 1, width_size=8, depth=1, key=jax.random.key(0))
        scales = eqx_ademamix.path_scales(model, {r"layers\\[0\\]": 0.1})
        print(eqx_ademamix.learning_rate_report(model, scales))
        ```
        ```text
        The learning rate is scaled at 2 of 4 arrays, 24 of 33 parameters.

          .layers[0].weight  (8, 2)  0.1
          .layers[0].bias    (8,)    0.1
          .layers[1].weight  (1, 8)  1
          .layers[1].bias    (1,)    1
        ```
    """
    arrays = inexact_shapes(model)
    found = as_scales(checked_scales(scales, "scales"), arrays, "scales")
    triples = zip(*arrays[:2], found, strict=True)
    places = [(path, x.shape, s) for path, x, s in triples if s is not None]
    rows = [(full_path_text(path), str(shape), _text(s)) for path, shape, s in places]
    sizes = [math.prod(shape) for _, shape, _ in places]
    scaled = [math.prod(shape) for _, shape, s in places if _is_scaled(s)]
    summary = (
        f"The learning rate is scaled at {len(scaled)} of {len(sizes)} arrays, "
        f"{sum(scaled):,} of {sum(sizes):,} parameters."
    )
    return "\n".join([summary, "", *table(rows)])


def _is_scaled(scale: Scale) -> bool:
    return isinstance(scale, Tracer) or bool(np.any(np.asarray(scale) != 1.0))


def _text(scale: Scale) -> str:
    if isinstance(scale, Tracer):
        return "traced"
    values = np.ravel(scale).tolist()
    is_long = len(values) > 4
    shown = sorted({min(values), max(values)}) if is_long else values
    return (" to " if is_long else ", ").join(f"{x:g}" for x in shown)
