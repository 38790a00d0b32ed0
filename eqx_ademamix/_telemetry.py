"""What to watch in a run: `telemetry`."""
# The telemetry reads the derived values of the hyperparameters.
# pyright: reportPrivateUsage=false

import functools as ft
import math
import re
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, Int32, PyTree

from ._checks import check_alive, checked_leaves
from ._decay_mask import Patterns, patterns
from ._filters import as_gradient
from ._hyperparams import Hyperparams, Scalar, checked_flag
from ._inspection import resolved
from ._magnitudes import (
    LeafArrays,
    Magnitudes,
    leaf_magnitudes,
    quotient,
    together,
)
from ._memory import any_in_host, to_device
from ._numerics import bias_factor
from ._optimizer import AbstractOptimizer
from ._paths import Leaves, Path, align, flatten, full_path_text, is_found
from ._state import AbstractMomentState, AdEMAMixState
from ._typing import no_type_check


Telemetry: TypeAlias = dict[str, Float[Array, ""] | Int32[Array, ""]]
# Numbers by key, for several leaves or layers at once.
Table: TypeAlias = dict[str, Float[Array, "..."]]


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
    outside `jit`.

    All numbers describe the current state. After an `update`, the hyperparameters are
    those of the next step, and the moments are those of the step just taken, $t$ =
    `count`. Below, $\text{rms}(x) = \sqrt{\text{mean}(|x|^2)}$ is over the entries of
    all trained arrays together.

    - `learning_rate`, `alpha`, `b3`: as [`eqx_ademamix.hyperparams`][] gives them.
    - `b3_half_life`: $\ln \frac12 / \ln \beta_3$, the number of steps after which a
        gradient has half of its weight in $m_2$.
    - `m1_rms`: $\text{rms}(\hat m_1)$ with $\hat m_1 = m_1 / (1 - \beta_1^t)$. If `b1`
        is a schedule, the product of its values replaces $\beta_1^t$.
    - `m2_rms`: $\text{rms}(m_2)$.
    - `slow_fast_ratio`: $\text{rms}(\alpha m_2) / \text{rms}(\hat m_1)$.
    - `slow_fast_cosine`: the cosine of the angle between $\hat m_1$ and $m_2$,
        $\text{Re} \langle \hat m_1, m_2 \rangle / (\|\hat m_1\| \|m_2\|)$.
    - `nu_rms`: $\text{rms}(\nu)$, without bias correction.
    - `update_rms`, `param_rms`: $\text{rms}$ of `updates` and of `params`.
    - `update_param_ratio`: the first of these two over the second.
    - `grad_rms`: $\text{rms}$ of `grads`. It is not finite if any entry is not.
    - `nonfinite_fraction`: the fraction of the entries of `grads` that are NaN or
        infinite.
    - `skipped`: with `skip_nonfinite`, the number of steps that were skipped, an int32.

    A quotient of two zeros is 0, so there is no NaN before the first step.

    With a Python `b1=0`, the state has no $m_1$: $\hat m_1$ is the gradient, and the
    keys about it exist if `grads` are given. With `bias_correct_m2`, the ratio is that
    of the corrected $m_2$ that the rule uses. A [`eqx_ademamix.SimplifiedAdEMAMix`][]
    has no `b3`, $m_1$, or $m_2$: instead of their keys, there is `m_rms`,
    $\operatorname{rms}(m)$ of its sum $m$.

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
    - `per_path`: whether to add the numbers about arrays for each trained array too,
        for example `update_rms/layers/0/weight`.
    - `stacked`: regular expressions that `re.search` looks for in an array's path, as
        error messages print it (`.layers[0].weight`). With `per_path`, matching arrays
        also get each number for each entry of their first axis: for example
        `update_rms/blocks/weight[3]` for the fourth of the layers that
        `eqx.filter_vmap` has stacked and `jax.lax.scan` runs.

    **Returns:**

    A dictionary of arrays of shape `()` in the default float. Without `updates`,
    `params`, or `grads`, it has no keys about them. Each array is read once. Only where
    squares overflow or underflow are the arrays of that leaf read again, so that
    numbers of any magnitude are correct.

    **Raises:**

    - `ValueError` or `TypeError`: as in [`eqx_ademamix.hyperparams`][]; if `updates`,
        `params` or `grads` do not fit the state; if a pattern of `stacked` finds no
        array with an axis; if `stacked` is given without `per_path`.

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
    given = {"update": updates, "param": params, "grad": grads}
    trees = {**_moments(found, like), **_given(given, like)}
    if isinstance(found, AdEMAMixState) and not inner.has_m1 and "grad" in trees:
        trees["m1"] = trees["grad"]
    layered = _layered(like, per_path, stacked)
    leaves = [
        _leaf(path, path in layered, {name: x[i] for name, x in trees.items()})
        for i, path in enumerate(like.paths)
        if like.values[i] is not None
    ]
    numbers = _numbers(leaves, per_path, _factors(found, h)) if leaves else {}
    return {**_hyperparams(h), **numbers, **_skipped(found)}


def _hyperparams(h: Any) -> Telemetry:
    scalars: Telemetry = {"learning_rate": h.learning_rate, "alpha": h.alpha}
    if isinstance(h, Hyperparams):
        # From 1 - b3, since b3 itself may lack its digits.
        log_b3 = jnp.log1p(-h._decay3.complement)
        scalars |= {"b3": h.b3, "b3_half_life": -math.log(2.0) / log_b3}
    return scalars


def _skipped(state: AbstractMomentState[Any]) -> Telemetry:
    return {} if state.skipped is None else {"skipped": state.skipped}


#
# The trees that go in
#


def _moments(state: AbstractMomentState[Any], like: Leaves) -> dict[str, list[Any]]:
    """The moments that a state has: without `m1`, its tree has no leaves."""
    pairs = zip(state.names, state.moments, strict=True)
    return {
        str(name): align(tree, like).values
        for name, tree in pairs
        if name is not None and jtu.tree_leaves(tree)
    }


def _given(trees: dict[str, PyTree | None], like: Leaves) -> dict[str, list[Any]]:
    """The trees that are given, at the places of the trained leaves."""
    return {
        name: _checked(f"{name}s", tree, like)
        for name, tree in trees.items()
        if tree is not None
    }


def _checked(name: str, tree: PyTree, like: Leaves) -> list[Array | None]:
    check_alive(name, tree)
    leaves = flatten(tree)
    arrays = leaves.rebuilt([as_gradient(x) for x in leaves.values])
    other = "the optimizer state"
    return checked_leaves(name, arrays, like, other=other, keep_extra=True)


def _layered(like: Leaves, per_path: bool, stacked: object) -> set[Path]:
    """The paths of the trained arrays that are stacks of layers."""
    expressions = patterns("stacked", stacked)
    if expressions and not per_path:
        raise ValueError(
            "`stacked` names arrays whose layers get numbers of their own, but "
            "`per_path` is False. Pass `per_path=True` as well."
        )
    pairs = zip(like.paths, like.values, strict=True)
    paths = [path for path, x in pairs if x is not None and x.shape]
    return {path for pattern in expressions for path in _matches(pattern, paths)}


def _matches(pattern: re.Pattern[str], paths: list[Path]) -> list[Path]:
    found = [path for path in paths if is_found(pattern, jtu.keystr(path))]
    if not found:
        texts = ", ".join(map(full_path_text, paths[:3])) or "there are none"
        more = ", ..." if len(paths) > 3 else ""
        raise ValueError(
            f"`stacked` has '{pattern.pattern}', which is found in none of the "
            f"{len(paths)} paths of trained arrays that have an axis: {texts}{more}. "
            "Correct the pattern, or leave it out."
        )
    return found


#
# The numbers that are computed from arrays
#


class _Leaf(NamedTuple):
    path: Path
    size: int
    whole: Magnitudes
    layers: Magnitudes | None


def _leaf(path: Path, is_layered: bool, arrays: LeafArrays) -> _Leaf:
    size = math.prod(arrays["nu"].shape)
    if not any_in_host(arrays):
        return _Leaf(path, size, *leaf_magnitudes(is_layered, arrays))
    numbers = leaf_magnitudes(is_layered, to_device(arrays))
    # One leaf at a time, since the moments of all leaves may not fit on the device.
    return _Leaf(path, size, *jax.block_until_ready(numbers))


class _Factors(NamedTuple):
    """What the numbers about averages depend on besides the averages."""

    alpha: Scalar
    m1_weight: Scalar | None  # 1 - b1^t
    m2_weight: Scalar | None  # with `bias_correct_m2`


def _factors(state: AbstractMomentState[Any], h: Any) -> _Factors:
    if not isinstance(state, AdEMAMixState):
        return _Factors(h.alpha, None, None)
    t = jnp.maximum(state.count, 1).astype(float)
    bias1 = bias_factor(h._decay1.complement, t)
    weights = state.m1_weight, state.m2_weight
    m1, m2 = (None if x is None else x.astype(float) for x in weights)
    return _Factors(h.alpha, bias1 if m1 is None else m1, m2)


def _numbers(leaves: list[_Leaf], per_path: bool, factors: _Factors) -> Telemetry:
    layered = [x for x in leaves if x.layers is not None]
    sizes, wholes = tuple(x.size for x in leaves), [x.whole for x in leaves]
    layers = [x.layers for x in layered]
    total, tables = _tables(sizes, per_path, wholes, layers, factors)
    if not per_path:
        return total
    names = _names([x.path for x in leaves])
    each, *stacks = tables
    numbers = total | _flat(list(names.values()), each)
    for leaf, table in zip(layered, stacks, strict=True):
        count = len(table["nu_rms"])
        numbers |= _flat([f"{names[leaf.path]}[{i}]" for i in range(count)], table)
    return numbers


@ft.partial(jax.jit, static_argnums=(0, 1))
def _tables(
    sizes: tuple[int, ...],
    per_path: bool,
    wholes: list[Magnitudes],
    layers: list[Magnitudes],
    factors: _Factors,
) -> tuple[Telemetry, list[dict[str, list[Scalar]]]]:
    """The numbers of all leaves together, of each leaf, and of the layers of each leaf
    that has layers. Jitted, since it is many small operations."""
    leaves = jax.tree.map(lambda *numbers: jnp.stack(numbers), *wholes)
    total = _by_key(together(leaves, sizes), factors)
    tables = [_by_key(x, factors) for x in [leaves, *layers]] if per_path else []
    return total, [{key: list(x) for key, x in table.items()} for table in tables]


def _by_key(numbers: Magnitudes, factors: _Factors) -> Table:
    rms, (alpha, m1_weight, m2_weight) = numbers.rms, factors
    keys = {f"{name}_rms": x for name, x in rms.items()}
    if "update" in rms and "param" in rms:
        keys["update_param_ratio"] = quotient(rms["update"], rms["param"])
    if numbers.nonfinite is not None:
        keys["nonfinite_fraction"] = numbers.nonfinite
    if numbers.cosine is not None and m1_weight is not None:
        m1_hat, m2 = quotient(rms["m1"], m1_weight), rms["m2"]
        m2_hat = m2 if m2_weight is None else quotient(m2, m2_weight)
        keys["m1_rms"] = m1_hat
        keys["slow_fast_ratio"] = quotient(alpha * m2_hat, m1_hat)
        keys["slow_fast_cosine"] = numbers.cosine
    return keys


#
# Names
#


def _flat(names: list[str], table: dict[str, list[Scalar]]) -> Telemetry:
    pairs = ((key, zip(names, x, strict=True)) for key, x in table.items())
    return {f"{key}/{name}": x for key, column in pairs for name, x in column}


def _names(paths: list[Path]) -> dict[Path, str]:
    """The names for the numbers of each leaf. A leaf is named by its whole path if the
    short paths of two leaves are equal, or if the tree itself is the only leaf."""
    texts = ["/".join(map(_key_text, path)) for path in paths]
    if len(set(texts)) < len(texts) or "" in texts:
        texts = [full_path_text(path) for path in paths]
    return dict(zip(paths, texts, strict=True))


def _key_text(key: Any) -> str:
    """One step of a path without brackets and quotes, which TensorBoard replaces."""
    attributes = (getattr(key, name, None) for name in ("name", "key", "idx"))
    return str(next((x for x in attributes if x is not None), key))
