"""What to watch in a run: `telemetry`."""
# The telemetry reads the derived values of the hyperparameters.
# pyright: reportPrivateUsage=false

import functools as ft
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from beartype import beartype
from jax import lax
from jaxtyping import Array, Bool, Float, Inexact, Int32, PyTree, jaxtyped

from ._checks import check_alive, checked_leaves
from ._decay_mask import Patterns, patterns
from ._filters import as_gradient
from ._hyperparams import Hyperparams, Scalar, checked_flag
from ._inspection import resolved
from ._memory import any_in_host, to_device
from ._numerics import bias_factor
from ._optimizer import AbstractOptimizer
from ._paths import Leaves, Path, align, flatten, full_path_text, is_found, path_text
from ._state import AbstractMomentState, AdEMAMixState
from ._storage.codec import Encoded, Stored, decode
from ._storage.format import Moments
from ._typing import no_type_check


Telemetry: TypeAlias = dict[str, Float[Array, ""] | Int32[Array, ""]]


@no_type_check
def telemetry(
    optim: AbstractOptimizer[Any],
    state: PyTree,
    *,
    updates: PyTree | None = None,
    params: PyTree | None = None,
    grads: PyTree | None = None,
    per_path: bool = False,
    stacked: Patterns = (),
) -> Telemetry:
    r"""The numbers that show how a run with a slow momentum is doing. Works inside and
    outside of `jit`.

    All numbers are about the state as it is. After an `update`, the hyperparameters are
    those of the next step, and the moments are those of the step just taken, $t$ =
    `count`. Below, $\operatorname{rms}(x) = \sqrt{\operatorname{mean}(|x|^2)}$ is over
    the entries of all trained arrays together.

    | key | is |
    | --- | --- |
    | `learning_rate`, `alpha`, `b3` | as [`eqx_ademamix.hyperparams`][] gives them |
    | `b3_half_life` | $\ln 0.5 / \ln \beta_3$, the steps after which a gradient has half of its weight in $m_2$ |
    | `m1_rms` | $\operatorname{rms}(\hat m_1)$ with $\hat m_1 = m_1 / (1 - \beta_1^t)$ |
    | `m2_rms` | $\operatorname{rms}(m_2)$ |
    | `slow_fast_ratio` | $\alpha \operatorname{rms}(m_2) / \operatorname{rms}(\hat m_1)$ |
    | `slow_fast_cosine` | $\operatorname{Re} \langle \hat m_1, m_2 \rangle / (\lVert \hat m_1 \rVert \lVert m_2 \rVert)$ |
    | `nu_rms` | $\operatorname{rms}(\nu)$, without bias correction |
    | `update_rms` | $\operatorname{rms}$ of `updates` |
    | `param_rms` | $\operatorname{rms}$ of `params` |
    | `update_param_ratio` | `update_rms` / `param_rms` |
    | `grad_rms` | $\operatorname{rms}$ of `grads`; not finite if an entry of `grads` is not |
    | `nonfinite_fraction` | the fraction of the entries of `grads` that are NaN or infinite |
    | `skipped` | the number of steps that `skip_nonfinite` has skipped, an int32 |

    A quotient of two zeros is 0, so there is no NaN before the first step.

    With `bias_correct_m2`, $m_2$ is the corrected one that the rule uses. With a Python
    `b1=0`, $\hat m_1$ is the gradient: its keys are there if `grads` are given. A
    [`eqx_ademamix.SimplifiedAdEMAMix`][] has no `b3`, $m_1$ and $m_2$: instead of their
    keys there is `m_rms`, $\operatorname{rms}(m)$ of its sum $m$.

    **Arguments:**

    - `optim`: an optimizer of this package, alone or inside an
        [`eqx_ademamix.Compensated`][] or [`eqx_ademamix.Offloaded`][]. For an optax
        optimizer such as a chain, pass the `AdEMAMix` inside it.
    - `state`: its state, or a tree that contains exactly one state of its kind, as for
        [`eqx_ademamix.hyperparams`][].
    - `updates`: what `update` returned, or `None`.
    - `params`: the model, or `None`. Only the arrays that are trained count.
    - `grads`: the gradients as the optimizer gets them, for example after clipping, or
        `None`.
    - `per_path`: whether to add each number for each trained array, too: for example
        `update_rms/layers/0/weight`.
    - `stacked`: regular expressions that `re.search` looks for in an array's path, as
        error messages print it (`.layers[0].weight`). With `per_path`, the arrays that
        are found get each number for each entry of their first axis, too: for example
        `update_rms/blocks/weight[3]` for the fourth of the layers that
        `eqx.filter_vmap` has stacked and `jax.lax.scan` runs.

    **Returns:**

    A dictionary of arrays of shape `()` in the default float. Without `updates`,
    `params` or `grads`, it has no keys about them, and the program does not read them.
    Each array is read once. No square overflows or underflows.

    **Raises:**

    - `ValueError` or `TypeError`: as [`eqx_ademamix.hyperparams`][]; if `updates`,
        `params` or `grads` do not fit the state; if a pattern of `stacked` finds
        nothing, or an array without axes.

    !!! Example

        ```python
        import jax.numpy as jnp
        import eqx_ademamix

        params = {"w": jnp.ones((4, 2))}
        optim = eqx_ademamix.AdEMAMix(1e-3, b3=0.99, alpha=5.0)
        state = eqx_ademamix.init(optim, params)
        updates, state = eqx_ademamix.update(optim, params, state)
        row = eqx_ademamix.telemetry(optim, state, updates=updates, params=params)
        assert abs(row["slow_fast_ratio"] - 5.0 * 0.01) < 1e-6
        assert abs(row["update_param_ratio"] - 1e-3 * (1 + 5 * 0.01)) < 1e-8
        ```
    """
    inner, found, h = resolved(optim, state)
    per_path = checked_flag("per_path", per_path)
    like = flatten(found.moments.m2)
    trees = {"updates": updates, "params": params, "grads": grads}
    given = [_given(name, tree, like) for name, tree in trees.items()]
    layered = _layered(like, per_path, stacked)
    m1 = align(found.moments.m1, like).values if inner.has_m1 else _m1(found, given[2])
    nu = align(found.moments.nu, like).values
    rows = zip(like.paths, m1, like.values, nu, *given, strict=True)
    places = [_Place(*row) for row in rows if row[2] is not None]
    sums = [_sums_of(place, place.path in layered) for place in places]
    sizes, factors = _sizes(places, layered), _factors(found, h)
    numbers = _numbers(found.names, sizes, per_path, sums, factors) if places else {}
    names = _names(places, layered) if per_path else ()
    return {**_scalars(h), **_in_order(numbers, names), **_skipped(found)}


def _scalars(h: Any) -> Telemetry:
    scalars: Telemetry = {"learning_rate": h.learning_rate, "alpha": h.alpha}
    if isinstance(h, Hyperparams):
        # From 1 - b3, whose digits b3 itself may lack.
        log_b3 = jnp.log1p(-h._decay3.complement)
        scalars |= {"b3": h.b3, "b3_half_life": -math.log(2.0) / log_b3}
    return scalars


def _skipped(state: AbstractMomentState[Any]) -> Telemetry:
    skipped = getattr(state, "skipped", None)
    return {} if skipped is None else {"skipped": skipped}


#
# The trees that go in
#


class _Place(NamedTuple):
    """A trained leaf, and what there is about it."""

    path: Path
    m1: Stored | None
    m2: Stored
    nu: Stored
    update: Array | None
    param: Array | None
    grad: Array | None


def _given(name: str, tree: PyTree | None, like: Leaves) -> list[Array | None]:
    """The leaves of a tree at the places of the trained ones."""
    if tree is None:
        return [None] * len(like.values)
    check_alive(name, tree)
    leaves = flatten(tree)
    arrays = leaves.rebuilt([as_gradient(x) for x in leaves.values])
    other = "the optimizer state"
    return checked_leaves(name, arrays, like, other=other, keep_extra=True)


def _m1(state: AbstractMomentState[Any], grads: list[Array | None]) -> Sequence[Any]:
    """At `b1=0`, `m1` is the gradient."""
    return [None] * len(grads) if state.names.m1 is None else grads


def _layered(like: Leaves, per_path: bool, stacked: object) -> set[Path]:
    """The paths of the trained arrays that are stacks of layers."""
    pairs = zip(like.paths, like.values, strict=True)
    shapes = {path: x.shape for path, x in pairs if x is not None}
    expressions = patterns("stacked", stacked)
    if expressions and not per_path:
        raise ValueError(
            "`stacked` names arrays whose layers get numbers of their own, but "
            "`per_path` is False. Pass `per_path=True` as well."
        )
    return {path for pattern in expressions for path in _matches(pattern, shapes)}


def _matches(
    pattern: re.Pattern[str], shapes: dict[Path, tuple[int, ...]]
) -> list[Path]:
    found = [path for path in shapes if is_found(pattern, jtu.keystr(path))]
    if not found:
        texts = [full_path_text(path) for path in list(shapes)[:3]]
        more = ", ..." if len(shapes) > 3 else ""
        raise ValueError(
            f"`stacked` has '{pattern.pattern}', which is found in none of the "
            f"{len(shapes)} paths of trained arrays: {', '.join(texts)}{more}. Correct "
            "the pattern, or leave it out."
        )
    for path in found:
        if not shapes[path]:
            raise ValueError(
                f"`stacked` has '{pattern.pattern}', which is found in "
                f"{path_text(path) or '(the tree itself)'}, an array of shape (). It "
                "has no axis of layers: use a pattern that does not find it."
            )
    return found


#
# Names
#


def _names(places: list[_Place], layered: set[Path]) -> tuple[str, ...]:
    """What the numbers of each leaf are called, followed by those of its layers."""
    paths = [place.path for place in places]
    texts = ["/".join(map(_key_text, path)) for path in paths]
    if len(set(texts)) < len(texts) or "" in texts:
        texts = [full_path_text(path) for path in paths]
    names: list[str] = []
    for place, text in zip(places, texts, strict=True):
        layers = range(place.m2.shape[0]) if place.path in layered else ()
        names += [text, *(f"{text}[{i}]" for i in layers)]
    return tuple(names)


def _key_text(key: Any) -> str:
    """One step of a path without brackets and quotes: TensorBoard replaces those."""
    for attribute in ("name", "key", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def _sizes(places: list[_Place], layered: set[Path]) -> tuple[tuple[int, ...], ...]:
    """The number of entries of each leaf, followed by those of its layers."""
    sizes: list[tuple[int, ...]] = []
    for place in places:
        shape = place.m2.shape
        layers = shape[0] if place.path in layered else 0
        sizes.append((math.prod(shape), *[math.prod(shape[1:])] * layers))
    return tuple(sizes)


#
# One leaf
#


# The sums of one leaf, in the columns of the last axis: of all entries, then of each
# layer.
_Columns: TypeAlias = Float[Array, "... columns"]


class _Sums(NamedTuple):
    """The sums over the entries of a leaf. Those of products are over three windows."""

    m1: Float[Array, "3 columns"] | None
    m2: Float[Array, "3 columns"]
    nu: Float[Array, "3 columns"]
    update: Float[Array, "3 columns"] | None
    param: Float[Array, "3 columns"] | None
    grad: Float[Array, "3 columns"] | None
    dot: Float[Array, "3 columns"] | None
    nonfinite: Float[Array, " columns"] | None


def _sums_of(place: _Place, is_layered: bool) -> _Sums:
    _, m1, m2, nu, update, param, grad = place
    if not any_in_host((m1, m2, nu)):
        return _leaf_sums(is_layered, m2, nu, m1, update, param, grad)
    m1, m2, nu = to_device((m1, m2, nu))
    sums = _leaf_sums(is_layered, m2, nu, m1, update, param, grad)
    # One leaf after the other, since the device may lack room for the moments of all.
    return jax.block_until_ready(sums)


@ft.partial(jax.jit, static_argnums=0)
@jaxtyped(typechecker=beartype)
def _leaf_sums(
    is_layered: bool,
    m2: Inexact[Array | Encoded, "*leaf"],
    nu: Float[Array | Encoded, "*leaf"],
    m1: Inexact[Array | Encoded, "*leaf"] | None,
    update: Inexact[Array, "*leaf"] | None,
    param: Inexact[Array, "*leaf"] | None,
    grad: Inexact[Array, "*leaf"] | None,
) -> _Sums:
    """All sums over one leaf. It is jitted, so that all leaves of one type are traced,
    lowered and type-checked once."""
    square = lambda x: None if x is None else _sums([(x, x)], is_layered)[0]
    fast, slow = None if m1 is None else decode(m1), decode(m2)
    pairs = [] if fast is None else [(fast, fast), (fast, slow)]
    m2_sums, *m1_sums = _sums([(slow, slow), *pairs], is_layered)
    m1_sum, dot = m1_sums or (None, None)
    squares = m1_sum, m2_sums, square(decode(nu)), square(update), square(param)
    if grad is None:
        return _Sums(*squares, None, dot, None)
    grad_sums, flags = _sums([(grad, grad)], is_layered, ~jnp.isfinite(grad))
    return _Sums(*squares, grad_sums, dot, flags)


#
# Products of any magnitude. Each sum of products is computed three times: of numbers
# scaled up by a power of two, as they are, and scaled down. The first of these windows
# up, middle, down that did not overflow is right:
#
# With the scale 2^80 of float32, a window ends where a sum reaches 2^128. If "up" did,
# the sum of the unscaled products is at least 2^(128 - 160) = 2^-32, and "middle" lacks
# only products below 2^-126: of 2^40 entries, less than 2^-54 of the sum. The same holds
# for "down" after "middle". "Up" holds the squares of all normal numbers, and "down"
# those of up to 2^32 of the largest ones. (To scale by the largest entry instead, all
# arrays would have to be read twice.)
#


def _scale() -> float:
    """2^80 for float32, 2^640 for float64."""
    return 2.0 ** (5 * jnp.finfo(jnp.result_type(float)).maxexp // 8)


def _sums(
    pairs: list[tuple[Array, Array]], is_layered: bool, *flags: Bool[Array, "..."]
) -> list[Float[Array, "..."]]:
    """For each pair `x, y` of arrays of one shape, the sums of the real part of `x`
    times the conjugate of `y`, in three windows. For each array of flags, the number of
    those that are set. All arrays are read once."""
    scales = _scale(), 1.0, 1 / _scale()
    products = [_product(x, y, scale) for x, y in pairs for scale in scales]
    totals = _totals([*products, *(x.astype(float) for x in flags)], is_layered)
    windows = [totals[i : i + 3] for i in range(0, len(products), 3)]
    return [*windows, *totals[len(products) :]]


def _product(x: Array, y: Array, scale: float) -> Float[Array, "..."]:
    if jnp.iscomplexobj(x):
        return _product(x.real, y.real, scale) + _product(x.imag, y.imag, scale)
    return (scale * x.astype(float)) * (scale * y.astype(float))


def _totals(
    arrays: list[Float[Array, "*leaf"]], is_layered: bool
) -> Float[Array, "arrays columns"]:
    """The sums of arrays of one shape, followed by those of their layers."""
    blocks = [_blocks(jnp.atleast_1d(x), is_layered) for x in arrays]
    zeros = [np.zeros((), x.dtype)[()] for x in blocks]
    add = lambda x, y: tuple(a + b for a, b in zip(x, y, strict=True))
    # One reduction of several arrays, in which XLA computes what they share once.
    partial = lax.reduce(tuple(blocks), tuple(zeros), add, (blocks[0].ndim - 1,))
    partials = jnp.stack(partial)
    if not is_layered:
        return jnp.sum(partials, axis=tuple(range(1, partials.ndim)))[:, None]
    layers = jnp.sum(partials, axis=tuple(range(2, partials.ndim)))
    return jnp.concatenate([jnp.sum(layers, axis=1)[:, None], layers], axis=1)


# XLA on CPUs adds the entries of such a reduction one by one. Of so few numbers of one
# sign, the relative error is at most 128 * 2^-24 = 7.6e-6, half of that in a root, and
# that of random ones is a tenth of it. The sums of all blocks are added in pairs.
_BLOCK = 128


def _blocks(x: Float[Array, "..."], is_layered: bool) -> Float[Array, "..."]:
    """An array with blocks of entries in its last axis."""
    x = x[:, None] if is_layered and x.ndim == 1 else x
    size = x.shape[-1]
    if size <= _BLOCK:
        return x
    if size % _BLOCK:
        x = jnp.pad(x, [*[(0, 0)] * (x.ndim - 1), (0, -size % _BLOCK)])
    return x.reshape(*x.shape[:-1], -1, _BLOCK)


def _first_finite(windows: Float[Array, "3 columns"]) -> tuple[_Columns, _Columns]:
    """The sums in the first window that did not overflow, and the factor by which their
    numbers were scaled."""
    up, middle, down = windows
    is_up, is_middle = jnp.isfinite(up), jnp.isfinite(middle)
    sums = jnp.where(is_up, up, jnp.where(is_middle, middle, down))
    factors = jnp.where(is_middle, 1.0, 1 / _scale())
    return sums, jnp.where(is_up, _scale(), factors)


def _rms(windows: Float[Array, "3 columns"], sizes: _Columns) -> _Columns:
    sums, factors = _first_finite(windows)
    return jnp.sqrt(sums / sizes) / factors


def _cosine(
    dot: Float[Array, "3 columns"], sizes: _Columns, x_rms: _Columns, y_rms: _Columns
) -> _Columns:
    sums, factors = _first_finite(dot)
    # One divisor after the other: their product may overflow, each quotient does not.
    part = _quotient(_quotient(sums / sizes, factors * x_rms), factors * y_rms)
    return jnp.clip(part, -1.0, 1.0)


def _quotient(x: Array, y: Array) -> Array:
    """`x / y`, where 0 / 0 is 0."""
    return x / jnp.where((x == 0) & (y == 0), 1.0, y)


#
# All leaves
#


class _Factors(NamedTuple):
    """By what the averages of the state are scaled in the rule."""

    alpha: Scalar
    bias1: Scalar | None  # 1 - b1^t
    m2_weight: Scalar | None


def _factors(state: AbstractMomentState[Any], h: Any) -> _Factors:
    if not isinstance(state, AdEMAMixState):
        return _Factors(h.alpha, None, None)
    t = jnp.maximum(state.count, 1).astype(float)
    bias1 = bias_factor(h._decay1.complement, t)
    weight = None if h._m2_weight is None else state.m2_weight
    return _Factors(h.alpha, bias1, None if weight is None else weight.astype(float))


@ft.partial(jax.jit, static_argnums=(0, 1, 2))
def _numbers(
    names: Moments[str],
    sizes: tuple[tuple[int, ...], ...],
    per_path: bool,
    sums: list[_Sums],
    factors: _Factors,
) -> dict[str, list[Array]]:
    """All numbers that are computed from arrays: of all leaves together, then, with
    `per_path`, of each column."""
    whole = np.cumsum([0, *map(len, sizes)])[:-1]
    table = _Sums(*(_joined(rows, whole, per_path) for rows in zip(*sums, strict=True)))
    counts = [sum(row[0] for row in sizes)]
    counts += [n for row in sizes for n in row] if per_path else []
    found = _by_name(names, table, jnp.asarray(np.maximum(counts, 1), float), factors)
    return {name: list(columns) for name, columns in found.items()}


def _joined(
    rows: Sequence[Array | None], whole: np.ndarray, per_path: bool
) -> Array | None:
    """The columns of all leaves, after one for all of them together."""
    arrays = [x for x in rows if x is not None]
    if not arrays:
        return None
    columns = jnp.concatenate(arrays, axis=-1)
    total = jnp.sum(columns[..., whole], axis=-1, keepdims=True)
    return jnp.concatenate([total, columns], axis=-1) if per_path else total


def _by_name(
    names: Moments[str], table: _Sums, sizes: _Columns, factors: _Factors
) -> dict[str, _Columns]:
    rms = _Sums(*(None if x is None else _rms(x, sizes) for x in table[:6]), None, None)
    weight = factors.m2_weight
    m2 = rms.m2 if weight is None else _quotient(rms.m2, weight)
    found = {f"{names.m2}_rms": m2, "nu_rms": rms.nu}
    if rms.m1 is not None and table.dot is not None and factors.bias1 is not None:
        m1_hat = rms.m1 / factors.bias1
        found["m1_rms"] = m1_hat
        found["slow_fast_ratio"] = _quotient(factors.alpha * m2, m1_hat)
        found["slow_fast_cosine"] = _cosine(table.dot, sizes, rms.m1, rms.m2)
    given = {"update": rms.update, "param": rms.param, "grad": rms.grad}
    found |= {f"{name}_rms": x for name, x in given.items() if x is not None}
    if rms.update is not None and rms.param is not None:
        found["update_param_ratio"] = _quotient(rms.update, rms.param)
    if table.nonfinite is not None:
        found["nonfinite_fraction"] = table.nonfinite / sizes
    return found


# The order of the keys.
_KEYS = (
    "m1_rms",
    "m2_rms",
    "m_rms",
    "slow_fast_ratio",
    "slow_fast_cosine",
    "nu_rms",
    "update_rms",
    "param_rms",
    "update_param_ratio",
    "grad_rms",
    "nonfinite_fraction",
)


def _in_order(numbers: dict[str, list[Array]], names: Sequence[str]) -> Telemetry:
    keys = [key for key in _KEYS if key in numbers]
    whole = {key: numbers[key][0] for key in keys}
    pairs = ((key, zip(names, numbers[key][1:], strict=True)) for key in keys)
    parts = {f"{key}/{name}": x for key, columns in pairs for name, x in columns}
    return {**whole, **parts}
