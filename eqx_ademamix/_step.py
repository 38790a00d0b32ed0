"""The step that all optimizers share: select, check, resolve, apply, rebuild."""
# The step reads the limit of its own hyperparameters.
# pyright: reportPrivateUsage=false

import abc
import enum
import functools as ft
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.tree_util as jtu
import numpy as np
from beartype import beartype
from jaxtyping import Array, Float, Inexact, Int32, PyTree, jaxtyped

from ._checks import (
    check_alive,
    check_not_empty,
    check_params_given,
    check_skipped,
    check_state_type,
    check_step,
    check_weights,
)
from ._filters import (
    FilterSpec,
    Selection,
    as_bools,
    select,
    trained_arrays,
)
from ._guards import Taken, chosen, is_taken, limited_rms, update_if
from ._hyperparams import (
    AbstractHyperparams,
    H,
    HyperParamOrSchedule,
    Scalar,
    in_dtype,
    wide,
)
from ._learning_rate_scale import Scales, as_scales
from ._memory import after, any_in_host, placed_as, to_device
from ._numerics import (
    PathWords,
    as_array,
    cast,
    clamped,
    clip_magnitude,
    compute_dtype,
    in_type_of,
    largest_gradient,
    path_words,
    saturated,
    seed_at,
    text_hash,
    times,
)
from ._optimizer import AbstractOptimizer, hash_of
from ._paths import Leaves, flatten, on_device
from ._sharding import in_sharding_of, scalars_beside
from ._state import AbstractMomentState, S
from ._storage.codec import (
    AbstractBounded,
    Bounds,
    Encoded,
    Stored,
    Struct,
    decode,
    store,
)
from ._storage.format import Moments, StateFormat, zeros
from ._typing import DType, no_type_check


class WeightDecay(enum.Enum):
    """How the decay of a leaf enters its update."""

    none = enum.auto()
    coupled = enum.auto()  # to the learning rate
    decoupled = enum.auto()


# The counter, and the words of the leaf's path.
Key: TypeAlias = tuple[Int32[Array, ""], PathWords]


class AbstractMomentOptimizer(AbstractOptimizer[S], Generic[S, H]):
    """An optimizer that keeps up to three moments for each parameter.

    It defines how the moments of one leaf change (`averages`) and in which direction
    the leaf moves (`direction`). The step does the rest.
    """

    learning_rate: eqx.AbstractVar[HyperParamOrSchedule]
    weight_decay: eqx.AbstractVar[HyperParamOrSchedule]
    weight_decay_mask: eqx.AbstractVar[FilterSpec]
    trainable: eqx.AbstractVar[FilterSpec]
    state_format: eqx.AbstractVar[StateFormat]
    decoupled_weight_decay: eqx.AbstractVar[bool]
    learning_rate_scale: eqx.AbstractVar[Scales]
    skip_nonfinite: eqx.AbstractVar[bool]

    @property
    @abc.abstractmethod
    def state_type(self) -> type[S]:
        """The class of the state."""

    @property
    @abc.abstractmethod
    def has_m1(self) -> bool:
        """Whether the state has `m1`."""

    @property
    @abc.abstractmethod
    def weights(self) -> tuple[str, ...]:
        """The weights in the state that this optimizer keeps."""

    @abc.abstractmethod
    def resolve(self, state: S) -> H:
        """The hyperparameters of the next step."""

    @staticmethod
    @abc.abstractmethod
    def averages(g: Array, m: Moments[Array], h: H) -> Moments[Array]:
        """The moments of one leaf after the gradient `g`."""

    @staticmethod
    @abc.abstractmethod
    def direction(g: Array, m: Moments[Array], h: H) -> Array:
        """The direction in which one leaf moves, from its new moments."""

    @no_type_check
    def init(self, params: PyTree) -> S:
        """See [`eqx_ademamix.init`][]."""
        return start(self, params, lambda moments: moments)

    @no_type_check
    def update(
        self,
        grads: PyTree,
        state: S,
        params: PyTree | None = None,
        **extra_args: object,
    ) -> tuple[PyTree, S]:
        """See [`eqx_ademamix.update`][]."""
        check_state_type(state, grads, self.state_type)
        check_params_given(self.has_decay, params)
        check_alive("optim", self)
        state = on_device(state)
        # 1. Select
        selection = select(self.trainable, grads, state.moments, params)
        # 2. Check
        fmt, has_params = self.state_format, params is not None
        check_step(selection, state, fmt, has_m1=self.has_m1, has_params=has_params)
        check_weights(state, self.weights)
        check_skipped(state, self.skip_nonfinite)
        # 3. Resolve
        h = self.resolve(state)
        plans = _plans(self, selection)
        # 4. Apply
        taken = self._taken(state, selection)
        leaves = _apply(type(self), state, selection, plans, h, taken, has_params)
        # 5. Rebuild
        like = selection.like
        updates = like.rebuilt(_spread([update for update, _ in leaves], like))
        moments = _rebuilt(like, [moments for _, moments in leaves])
        return updates, state.after(moments, h, taken)

    def __hash__(self) -> int:
        return hash_of(self)

    def _taken(self, state: S, selection: Selection) -> Taken:
        """Whether the step is taken, if this optimizer can skip one."""
        if not self.skip_nonfinite:
            return None
        pairs = ((leaf.grad, leaf.trained) for leaf in selection.leaves)
        return is_taken([g for g, x in pairs if x is not None], state.count)

    @property
    def has_decay(self) -> bool:
        """Whether there is weight decay: an array counts, since its value may
        change."""
        return not (isinstance(self.weight_decay, float) and self.weight_decay == 0.0)


if TYPE_CHECKING:
    Rule: TypeAlias = type[AbstractMomentOptimizer[Any, Any]]
else:
    Rule = type  # older versions of beartype reject the subscripted one


def start(
    optim: AbstractMomentOptimizer[S, Any],
    params: PyTree,
    place: Callable[[Moments[Stored]], Moments[Stored]],
) -> S:
    """The state before the first step. `place` puts the moments of a leaf in their
    memory. It is called for one leaf at a time."""
    trained = trained_arrays(optim.trainable, flatten(params), or_structs=True)
    check_not_empty(params, trained)
    as_bools(optim.weight_decay_mask, trained, "weight_decay_mask")
    as_scales(optim.learning_rate_scale, trained, "learning_rate_scale")
    arrays = [x for x in trained.values if x is not None]
    blank = [place(_zeros(optim.state_format, x, optim.has_m1)) for x in arrays]
    zero, moments = scalars_beside(arrays), _rebuilt(trained, blank)
    skips = optim.skip_nonfinite
    return optim.state_type.start(moments, optim.weights, skips, zero)


def _zeros(fmt: StateFormat, param: Array | Struct, has_m1: bool) -> Moments[Stored]:
    blank = zeros(fmt, as_array(param))
    return blank if has_m1 else blank._replace(m1=None)


def _rebuilt(like: Leaves, moments: Sequence[Moments[Stored]]) -> Moments[PyTree]:
    """The three trees, from the moments of the leaves that are trained."""
    trees = zip(*moments, strict=True) if moments else ((), (), ())
    return Moments(*(like.rebuilt(_spread(tree, like)) for tree in trees))


def _spread(values: Sequence[Stored | None], like: Leaves) -> list[Stored | None]:
    """One value for each leaf of a tree, and `None` where the tree has `None`."""
    rest = iter(values)
    return [None if x is None else next(rest) for x in like.values]


class Plan(NamedTuple):
    """What distinguishes the step on one leaf from that on another."""

    decay: WeightDecay
    scale: float | Array | None  # of the learning rate; `None` is 1


def _plans(
    optim: AbstractMomentOptimizer[Any, Any], selection: Selection
) -> list[Plan]:
    """One plan for each leaf that is trained."""
    arrays = [leaf.trained for leaf in selection.leaves]
    trained = selection.like._replace(values=arrays)
    mask = optim.weight_decay_mask if optim.has_decay else False
    flags = as_bools(mask, trained, "weight_decay_mask")
    scales = as_scales(optim.learning_rate_scale, trained, "learning_rate_scale")
    kind = (
        WeightDecay.decoupled if optim.decoupled_weight_decay else WeightDecay.coupled
    )
    return [
        Plan(kind if flag else WeightDecay.none, None if _is_one(scale) else scale)
        for flag, scale, x in zip(flags, scales, arrays, strict=True)
        if x is not None
    ]


def _is_one(scale: float | Array | None) -> bool:
    return isinstance(scale, float) and scale == 1.0


def _apply(
    rule: Rule,
    state: AbstractMomentState[Any],
    selection: Selection,
    plans: list[Plan],
    h: AbstractHyperparams,
    taken: Taken,
    has_params: bool,
) -> list[tuple[Array, Moments[Stored]]]:
    """Applies a rule to each trained leaf. Returns their updates and moments, in the
    same memory as before."""
    scalars = ft.cache(ft.partial(in_dtype, h))
    leaves = [leaf for leaf in selection.leaves if leaf.trained is not None]
    stepped: list[tuple[Array, Moments[Stored]]] = []
    for leaf, (decay, scale) in zip(leaves, plans, strict=True):
        g, (m1, m2, nu) = leaf.grad, leaf.moments
        is_in_host = any_in_host(leaf.moments)
        if is_in_host:
            m1, m2, nu = to_device(_in_turn(leaf.moments, stepped))
        p = leaf.trained if has_params else None
        real = compute_dtype(*(x.dtype for x in (g, p, m2, nu) if x is not None))
        key = state.count, path_words(jtu.keystr(leaf.path))
        if isinstance(scale, float):
            scale = wide(scale)  # traced: a new number triggers no recompilation
        args = g, m2, nu, m1, p, scale, scalars(real), key, taken
        update, moments = _leaf_step(rule, state.names, decay, *args)
        if is_in_host:
            moments = placed_as(moments, leaf.moments)
        stepped.append((in_sharding_of(update, g if p is None else p), moments))
    return stepped


# The moments of a leaf can be copied to the device while the step on the previous leaf
# is computed. Without a limit, XLA would first copy those of all leaves.
_IN_FLIGHT = 2


def _in_turn(
    moments: Moments[Stored | None], stepped: list[tuple[Array, Moments[Stored]]]
) -> Moments[Stored | None]:
    """Moments in host memory, which wait there until those of an earlier
    leaf are back. A barrier returns both, so it also replaces those in `stepped`."""
    if len(stepped) < _IN_FLIGHT:
        return moments
    update, done = stepped[-_IN_FLIGHT]
    done, moments = after(done, moments)
    stepped[-_IN_FLIGHT] = update, done
    return moments


@ft.partial(jax.jit, static_argnums=(0, 1, 2))
@jaxtyped(typechecker=beartype)
def _leaf_step(
    rule: Rule,
    names: Moments[str],
    decay: WeightDecay,
    g: Inexact[Array, "*leaf"],
    m2: Inexact[Array | Encoded, "*leaf"],
    nu: Float[Array | Encoded, "*leaf"],
    m1: Inexact[Array | Encoded, "*leaf"] | None,
    p: Inexact[Array, "*leaf"] | None,
    scale: Float[Array, "..."] | None,
    h: AbstractHyperparams,
    key: Key,
    taken: Taken,
) -> tuple[Inexact[Array, "*leaf"], Moments[Stored]]:
    """The step on one leaf: decode, average, store, combine. Jitted, so that all leaves
    of one type are traced, lowered, and type-checked once."""
    old = Moments(m1, m2, nu)
    real, like = h.learning_rate.dtype, g if p is None else p
    kept = [x.dtype for x in old if x is not None]
    whole, largest = cast(g, real), largest_gradient(*kept)
    g = clip_magnitude(whole, largest)
    averages = rule.averages(g, as_arrays(old, real), h)
    averages, stored = _stored(averages, old, names, key, bounds_of(rule, g, old, h))
    # If the averages and the direction shared one clipped gradient, XLA on CPUs would
    # materialize it. Where it is infinite, so are the averages.
    u = saturated(rule.direction(clamped(whole, largest), averages, h))
    if h._clip_update_rms is not None:
        u = limited_rms(u, h._clip_update_rms)
    rate = _rate(h.learning_rate, scale, g.ndim)
    if decay is WeightDecay.none or p is None:
        update = times(-rate, u)
    elif decay is WeightDecay.coupled:
        update = times(-rate, saturated(u + times(h.weight_decay, cast(p, real))))
    else:
        update = times(-rate, u) - saturated(times(h.weight_decay, cast(p, real)))
    update = update_if(taken, in_type_of(like, saturated(update)))
    return update, chosen(taken, stored, old)


def _rate(
    learning_rate: Scalar, scale: Float[Array, "..."] | None, ndim: int
) -> Float[Array, "..."]:
    """The learning rate of one leaf. A scale may have the leaf's first axes."""
    if scale is None:
        return learning_rate
    scale = saturated(scale.astype(learning_rate.dtype))
    scale = scale.reshape(scale.shape + (1,) * (ndim - scale.ndim))
    return saturated(learning_rate * scale)


def as_arrays(old: Moments[Stored], real: DType) -> Moments[Array]:
    m1 = None if old.m1 is None else cast(decode(old.m1), real)
    return Moments(m1, cast(decode(old.m2), real), cast(decode(old.nu), real))


def bounds_of(
    rule: Rule, g: Array, old: Moments[Stored], h: AbstractHyperparams
) -> list[Bounds | None]:
    """Bounds of the new moments, for the codecs that take them: the rule itself,
    applied to the bounds of the old ones and to the largest gradient of each block."""
    real, bounded = h.learning_rate.dtype, dict[int, tuple[AbstractBounded, Array]]()
    for which, stored in enumerate(old):
        if isinstance(stored, Encoded) and isinstance(stored.codec, AbstractBounded):
            bounded[which] = stored.codec, stored.codec.bound(stored.real).astype(real)
    found: list[Bounds | None] = [None] * len(old)
    for size in {codec.block_size: None for codec, _ in bounded.values()}:
        same = {i: x for i, x in bounded.items() if x[0].block_size == size}
        (codec, _), *_ = same.values()
        top = codec.largest(g).astype(real)
        before = [same[i][1] if i in same else top for i in range(len(old))]
        after = rule.averages(top, Moments(*before), h)
        for i, x in enumerate(after):
            if i in same and x is not None:
                found[i] = Bounds(x.astype(np.float32), top.astype(np.float32))
    return found


def _stored(
    new: Moments[Array],
    old: Moments[Stored],
    names: Moments[str],
    key: Key,
    bounds: list[Bounds | None],
) -> tuple[Moments[Array], Moments[Stored]]:
    """What the direction is computed from, and what the state keeps. Random rounding
    depends on the counter, the leaf's path, and the moment's name."""
    seed = seed_at(*key)
    pairs = [
        (None, None)
        if x is None or m is None
        else store(x, m, seed + np.uint32(text_hash(str(name))), bound)
        for x, m, name, bound in zip(new, old, names, bounds, strict=True)
    ]
    (m1, m2, nu), stored = zip(*pairs, strict=True)
    return Moments(m1, m2, nu), Moments(*stored)
