"""What a format freezes: `stall_report`."""

import functools as ft
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from beartype import beartype
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Inexact, PyTree, UInt32, jaxtyped

from ._ademamix import AdEMAMix
from ._checks import check_step
from ._filters import Leaf, select
from ._hyperparams import AbstractHyperparams, in_dtype
from ._inspection import resolved
from ._memory import any_in_host, to_device
from ._numerics import (
    cast,
    clip_magnitude,
    compute_dtype,
    largest_gradient,
    path_words,
    seed_at,
    text_hash,
)
from ._optimizer import AbstractOptimizer
from ._paths import full_path_text, is_entry
from ._state import AdEMAMixState
from ._step import Key, Rule, as_arrays, bounds_of
from ._storage.codec import (
    AbstractCodec,
    Bounds,
    Encoded,
    Stored,
    decode,
    store,
)
from ._storage.format import Moments, StateFormat
from ._typing import DType, no_type_check


StallReport: TypeAlias = dict[str, dict[str, float]]
# One for each moment; `None` for a moment that does not exist.
Fractions: TypeAlias = tuple[Float[Array, ""] | None, ...]

# A moment is frozen if more than this fraction of its entries stall: then the median
# entry does not change in a step.
FROZEN = 0.5


@no_type_check
def stall_report(
    optim: AbstractOptimizer[Any], state: PyTree, grads: PyTree
) -> StallReport:
    r"""The expected fraction of the entries of each moment that the next step does not
    change, because the format of the state rounds the change away.

    A step changes an entry $m$ of a moment by $(1 - \beta)(v - m)$, where $v$ is the
    gradient $g$ for `m1` and `m2`, and $|g|^2$ for `nu`. (For the sum `m` of
    [`eqx_ademamix.SimplifiedAdEMAMix`][], it is $g - (1 - \beta_1) m$.) The state then
    holds $R(m + (1 - \beta)(v - m))$, where $R$ is the rounding of the format. The
    entry stalls if

    $$
    \mathbb{E} \left[ R(m + (1 - \beta)(v - m)) \right] = m,
    $$

    and the report gives the fraction of entries that do. The mean is over the random
    numbers of the rounding. So what a stall means depends on the format:

    - A dtype rounds to nearest. With the spacing $\Delta(m)$ of its numbers at $m$, an
        entry stalls if $|(1 - \beta)(v - m)| < \Delta(m) / 2$. For bfloat16,
        $\Delta(m) / 2$ is between $|m| / 512$ and $|m| / 256$. The same step stalls
        again and again: the change is lost for good.
    - [`eqx_ademamix.ScaledFloat8`][], [`eqx_ademamix.ScaledFloat16`][] and
        [`eqx_ademamix.SplitBfloat16`][] round at random, or up and down
        alternately. One step may leave a code unchanged, but the mean change is
        correct, so nothing stalls, except for a `nu` below the smallest number of its
        block, which cannot decay further.
    - Your own codec is tested: if what it reads back does not depend on the key, it
        rounds to nearest. Otherwise it counts as exact in the mean, within the range of
        its numbers.

    An entry whose moment and gradient are both zero, such as one in the row of a token
    that has not occurred yet, has lost nothing and does not count as stalled.

    Topollai and Choromanska 2026 (arXiv:2603.16731) predict the probability that one
    step stalls from the spacing and from a model of the gradients. Here, you pass the
    gradients, and only the rounding is random: the fraction holds for other gradients
    of the same scale to the extent that these are typical.

    **Arguments:**

    - `optim`: an optimizer of this package, alone or inside an
        [`eqx_ademamix.Compensated`][] or [`eqx_ademamix.Offloaded`][]. For an optax
        optimizer such as a chain, pass the `AdEMAMix` inside it.
    - `state`: its state, or a tree that contains exactly one state of its kind, as for
        [`eqx_ademamix.hyperparams`][].
    - `grads`: the gradients of one step as the optimizer gets them, for example after
        clipping. With more entries, the fraction is more accurate: for `n` independent
        ones, its standard error is at most $1 / (2 \sqrt{n})$.

    **Returns:**

    A dictionary from the path of each trained leaf, as [`eqx_ademamix.state_report`][]
    prints it, to a dictionary with a fraction between 0 and 1 for each moment that the
    state has: `m1`, `m2` and `nu` (no `m1` at `b1=0`), or `m` and `nu` for
    `SimplifiedAdEMAMix`. Above 0.5, the median entry does not change.

    **Raises:**

    - `ValueError` or `TypeError`: as in [`eqx_ademamix.hyperparams`][], and if `grads`
        do not fit the state.
    - `TypeError`: under `jit`, where there are no numbers to return.

    !!! Example

        ```python
        import jax
        import jax.numpy as jnp
        import eqx_ademamix

        grads = {"w": 0.05 + jax.random.normal(jax.random.key(0), (64, 64))}
        fmt = eqx_ademamix.StateFormat("float32", "bfloat16", "float32")
        optim = eqx_ademamix.AdEMAMix(1e-3, b3=0.9999, state_format=fmt)
        state = eqx_ademamix.init(optim, grads)
        m2 = {"w": jnp.full((64, 64), 0.05, jnp.bfloat16)}
        state = eqx_ademamix.AdEMAMixState(
            state.count, state.count_m2, state.m1, m2, state.nu
        )
        stalled = eqx_ademamix.stall_report(optim, state, grads)["['w']"]
        assert stalled["m1"] == stalled["nu"] == 0.0 and stalled["m2"] > 0.5
        ```
    """
    inner, found, h = resolved(optim, state)
    moments = found.moments
    grads = _masked(grads, moments.m2)
    selection = select(inner.trainable, grads, moments, None)
    fmt, has_m1 = inner.state_format, inner.has_m1
    check_step(selection, found, fmt, has_m1=has_m1, has_params=False)
    if any(isinstance(x, Tracer) for x in jtu.tree_leaves((found, grads, h))):
        raise TypeError(
            "`stall_report` returns Python numbers, but its arguments are traced. Call "
            "it outside of `jit`."
        )
    scalars = ft.cache(ft.partial(in_dtype, h))
    leaves = [leaf for leaf in selection.leaves if leaf.trained is not None]
    stalled = [
        _fractions(type(inner), found.names, leaf, found.count, scalars)
        for leaf in leaves
    ]
    numbers = jax.device_get(stalled)  # one transfer
    return {
        full_path_text(leaf.path): _by_name(found.names, row)
        for leaf, row in zip(leaves, numbers, strict=True)
    }


def expected_m2_stall(codec: AbstractCodec, b3: float) -> float:
    """The fraction of the entries of `m2` that a typical step will leave unchanged if a
    codec stores it, before there is a state.

    Typical gradients have a mean of 0.05 times their noise, as in the experiment of
    `docs/precision.md`, and `m2` has settled: it is their mean, with a variance of
    `(1 - b3) / (1 + b3)` of theirs."""
    fmt = StateFormat(np.float32, codec, np.float32, min_size=0)
    optim = AdEMAMix(1.0, b1=0.0, b3=b3, state_format=fmt)
    settled, noise = jax.random.normal(jax.random.key(0), (2, 128, 128), np.float32)
    spread = np.float32(np.sqrt((1 - b3) / (1 + b3)))
    mean = np.float32(0.05)
    count = jnp.zeros((), np.int32)
    m2, nu = codec.encode(mean + spread * settled), jnp.ones_like(noise)
    state = AdEMAMixState(count, count, None, m2, nu)
    (stalled,) = stall_report(optim, state, mean + noise).values()
    return stalled["m2"]


def _masked(grads: PyTree, m2: PyTree) -> PyTree:
    """Gradients with the gaps that `optax.masked` and `optax.partition` leave in the
    state. A tree of another structure is returned unchanged, and is rejected later."""
    is_gap = lambda x: isinstance(x, optax.MaskedNode)
    if not any(map(is_gap, jtu.tree_leaves(m2, is_leaf=is_gap))):
        return grads
    is_place = lambda x: is_gap(x) or is_entry(x)
    try:
        return jax.tree.map(
            lambda m, g: m if is_gap(m) else g, m2, grads, is_leaf=is_place
        )
    except ValueError:
        return grads


def _by_name(names: Moments[str], row: Sequence[Any]) -> dict[str, float]:
    pairs = zip(names, row, strict=True)
    return {str(name): float(x) for name, x in pairs if x is not None}


#
# One leaf
#


def _fractions(
    rule: Rule,
    names: Moments[str],
    leaf: Leaf,
    count: Array,
    scalars: Callable[[DType], AbstractHyperparams],
) -> Fractions:
    is_in_host = any_in_host(leaf.moments)
    old = to_device(leaf.moments) if is_in_host else leaf.moments
    g, (m1, m2, nu) = leaf.grad, old
    h = scalars(compute_dtype(*(x.dtype for x in (g, m2, nu) if x is not None)))
    key = count, path_words(jtu.keystr(leaf.path))
    is_random = tuple(map(_rounds_at_random, old))
    # One program stores, and another reads back. Within one program, XLA may omit a
    # conversion to bfloat16 and back.
    after, stored = _leaf_trials(rule, names, is_random, g, m2, nu, m1, h, key)
    fractions = tuple(
        None if x is None else _fraction(random, x, y, trials)
        for random, x, y, trials in zip(is_random, old, after, stored, strict=True)
    )
    # One leaf at a time, since the moments of all leaves may not fit on the device.
    return jax.block_until_ready(fractions) if is_in_host else fractions


# With four random numbers, an entry that moves with a probability of at least 7/8 stays
# where it is in all of them with a probability of at most 1/4096.
_TRIALS = 4


@ft.partial(jax.jit, static_argnums=(0, 1, 2))
@jaxtyped(typechecker=beartype)
def _leaf_trials(
    rule: Rule,
    names: Moments[str],
    is_random: tuple[bool, ...],
    g: Inexact[Array, "*leaf"],
    m2: Inexact[Array | Encoded, "*leaf"],
    nu: Float[Array | Encoded, "*leaf"],
    m1: Inexact[Array | Encoded, "*leaf"] | None,
    h: AbstractHyperparams,
    key: Key,
) -> tuple[Moments[Array], list[list[Stored]]]:
    """The moments after a step on one leaf, and what `update` would store of them. For
    random rounding, trials that show whether an entry can move."""
    old, real = Moments(m1, m2, nu), h.learning_rate.dtype
    kept = [x.dtype for x in old if x is not None]
    g = clip_magnitude(cast(g, real), largest_gradient(*kept))
    before, bounds = as_arrays(old, real), bounds_of(rule, g, old, h)
    after, seed = rule.averages(g, before, h), seed_at(*key)
    seeds = [seed + np.uint32(text_hash(str(name))) for name in names]
    return after, [
        [] if x is None or y is None or like is None else _trials(x, y, like, *rest)
        for x, y, like, *rest in zip(
            before, after, old, seeds, bounds, is_random, strict=True
        )
    ]


def _trials(
    before: Array,
    after: Array,
    like: Stored,
    seed: UInt32[Array, ""],
    bound: Bounds | None,
    is_random: bool,
) -> list[Stored]:
    if not is_random:
        return [store(after, like, seed, bound)[1]]
    far, seeds = _far(before, after), [seed + np.uint32(i) for i in range(_TRIALS)]
    return [store(far, like, seed, bound)[1] for seed in seeds]


def _far(before: Array, after: Array) -> Array:
    """A moment that is several numbers away from its old value, in the direction in
    which the step would move it; for the smallest number, seven eighths of it."""
    if jnp.iscomplexobj(before):
        return lax.complex(_far(before.real, after.real), _far(before.imag, after.imag))
    return jnp.where(jnp.abs(after) > jnp.abs(before), 8 * before, before / 8)


@ft.partial(jax.jit, static_argnums=0)
def _fraction(
    is_random: bool, stored: Stored, after: Array, trials: list[Stored]
) -> Float[Array, ""]:
    """The fraction of entries that a step does not change in the mean, although it
    should."""
    read_back = lambda x: cast(decode(x), compute_dtype(after.dtype))
    before = read_back(stored)
    parts = [_components(x) for x in (before, after, *map(read_back, trials))]
    kept = [_are_kept(is_random, *part) for part in zip(*parts, strict=True)]
    is_idle = (before == 0) & (after == 0)
    return _mean(ft.reduce(jnp.logical_and, kept) & ~is_idle)


def _components(x: Array) -> list[Array]:
    """The real and imaginary parts of a complex array, or a real array unchanged."""
    return [x.real, x.imag] if jnp.iscomplexobj(x) else [x]


def _are_kept(
    is_random: bool, before: Array, after: Array, *trials: Array
) -> Bool[Array, "..."]:
    """Which entries of a real moment a step does not change in the mean."""
    are_equal = ft.reduce(jnp.logical_and, [x == before for x in trials])
    if not is_random:
        return are_equal
    # The mean of random rounding is exact between the smallest and the largest number,
    # so an entry is out of this range if no trial moves it. Zero can always move.
    return (are_equal & (before != 0)) | (after == before)


def _mean(flags: Bool[Array, "..."]) -> Float[Array, ""]:
    """The fraction of an array that is true, or 0 if it is empty. One axis at a time: a
    float32 sum of more than 2^24 ones would be too small."""
    mean = flags.astype(np.float32)
    while mean.ndim:
        mean = jnp.sum(mean, axis=-1) / max(mean.shape[-1], 1)
    return mean


def _rounds_at_random(stored: Stored | None) -> bool:
    return isinstance(stored, Encoded) and _depends_on_seed(stored.codec)


@ft.cache
def _depends_on_seed(codec: AbstractCodec) -> bool:
    """Whether what a codec reads back depends on the seed."""
    ramp = jnp.linspace(1.0, 2.0, 1024, dtype=np.float32)
    read_back = jax.jit(lambda seed: codec.decode(codec.encode(ramp, seed)))
    first, *others = map(read_back, np.arange(_TRIALS, dtype=np.uint32))
    return any(bool((first != x).any()) for x in others)
