"""The states of the optimizers."""
# A state reads the derived values of its own hyperparameters.
# pyright: reportPrivateUsage=false

import abc
from collections.abc import Callable, Hashable
from typing import Any, ClassVar, Generic, TypeAlias, TypeVar

import equinox as eqx
import jax.numpy as jnp
from beartype import beartype
from jaxtyping import Array, Float, Inexact, Int, Int32, PyTree, UInt32, jaxtyped

from ._guards import Taken, chosen
from ._hyperparams import H, Hyperparams, SimplifiedHyperparams
from ._paths import Node, flatten
from ._storage.codec import Encoded
from ._storage.format import Moments
from ._typing import no_type_check


# jaxtyping binds the names: trees annotated with "Params" must have one structure, and
# their leaves, one by one, the same shape.
# pyright: reportUndefinedVariable=false
ArrayTree: TypeAlias = PyTree[Inexact[Array, "?*leaf"], "Params"]
MomentTree: TypeAlias = PyTree[Inexact[Array | Encoded, "?*leaf"], "Params"]
SquareTree: TypeAlias = PyTree[Float[Array | Encoded, "?*leaf"], "Params"]


class AbstractMomentState(eqx.Module, Generic[H]):
    """A state with up to three moments for each parameter, and a counter of steps."""

    # What the moments are called, which fields count steps, and which sum weights.
    names: ClassVar[Moments[str]]
    counters: ClassVar[tuple[str, ...]]
    weights: ClassVar[tuple[str, ...]]

    count: eqx.AbstractVar[Int32[Array, ""]]
    skipped: eqx.AbstractVar[Int32[Array, ""] | None]

    @property
    @abc.abstractmethod
    def moments(self) -> Moments[PyTree]:
        """The trees of moments."""

    @classmethod
    @abc.abstractmethod
    def start(
        cls,
        moments: Moments[PyTree],
        weights: tuple[str, ...],
        skips: bool,
        zero: Callable[[Any], Array],
    ) -> Any:  # beartype cannot check `Self`
        """The state before the first step, from moments of zeros. `weights` names the
        state's weights that the optimizer uses, and `skips` says whether it can skip a
        step. `zero` makes a scalar of a dtype, each in its own buffer, so that all can
        be donated."""

    @abc.abstractmethod
    def after(self, moments: Moments[PyTree], h: H, taken: Taken) -> Any:
        """The state after a step, from the moments that it keeps. If the step is not
        taken, the counters and weights do not change, and `skipped` grows."""


S = TypeVar("S", bound=AbstractMomentState[Any])


class AdEMAMixState(AbstractMomentState[Hyperparams]):
    r"""The state of [`eqx_ademamix.AdEMAMix`][]. Arrays only.

    **Attributes:**

    - `count`: the number of steps taken, an int32 scalar. The bias corrections and the
        schedules of the learning rate, `b1`, `b2`, and `weight_decay` depend on it.
    - `count_m2`: the number of steps that the slow average has taken, an int32 scalar.
        The schedules of `b3` and `alpha` depend on it. Both counters saturate at
        $2^{31} - 1$.
    - `m1`: the fast average of the gradients, shaped like the trained parameters, with
        `None` at all other leaves (at every leaf if `b1=0`).
    - `m2`: the slow average of the gradients, shaped like `m1`.
    - `nu`: the average of the squared magnitudes of the gradients, shaped like `m1`,
        real.
    - `m2_weight`: with `bias_correct_m2`, the sum of the weights of all gradients in
        `m2`, $1 - \prod_i \beta_3(i)$, a scalar of the default float. Otherwise `None`.
    - `m1_weight`, `nu_weight`: if `b1` or `b2` is a schedule, the same for `m1` or
        `nu`, used in its bias correction. Otherwise `None`.
    - `skipped`: with `skip_nonfinite`, the number of steps that were skipped, an int32
        scalar, which saturates like the counters. Otherwise `None`.
    """

    names: ClassVar[Moments[str]] = Moments("m1", "m2", "nu")
    counters: ClassVar[tuple[str, ...]] = ("count", "count_m2")
    weights: ClassVar[tuple[str, ...]] = ("m2_weight", "m1_weight", "nu_weight")

    count: Int32[Array, ""]
    count_m2: Int32[Array, ""]
    m1: PyTree[None] | MomentTree
    m2: MomentTree
    nu: SquareTree
    m2_weight: Float[Array, ""] | None
    m1_weight: Float[Array, ""] | None
    nu_weight: Float[Array, ""] | None
    skipped: Int32[Array, ""] | None

    @no_type_check
    def __init__(
        self,
        count: Int32[Array, ""],
        count_m2: Int32[Array, ""],
        m1: PyTree[None] | MomentTree,
        m2: MomentTree,
        nu: SquareTree,
        m2_weight: Float[Array, ""] | None = None,
        m1_weight: Float[Array, ""] | None = None,
        nu_weight: Float[Array, ""] | None = None,
        skipped: Int32[Array, ""] | None = None,
    ):
        """**Arguments:** the same as the attributes.

        **Raises:**

        - `jaxtyping.TypeCheckError`: if the trees do not agree in structure, or their
            arrays in shape.
        """
        _check_scalars(count, count_m2, m2_weight, m1_weight, nu_weight)
        _check_skipped(skipped)
        check_trees(m2, nu, m1)
        self.count, self.count_m2 = count, count_m2
        self.m1, self.m2, self.nu = m1, m2, nu
        self.m2_weight = m2_weight
        self.m1_weight, self.nu_weight = m1_weight, nu_weight
        self.skipped = skipped

    @property
    def moments(self) -> Moments[PyTree]:
        return Moments(self.m1, self.m2, self.nu)

    @classmethod
    def start(
        cls,
        moments: Moments[PyTree],
        weights: tuple[str, ...],
        skips: bool,
        zero: Callable[[Any], Array],
    ) -> "AdEMAMixState":
        sums = [zero(float) if name in weights else None for name in cls.weights]
        skipped = zero(jnp.int32) if skips else None
        return cls(zero(jnp.int32), zero(jnp.int32), *moments, *sums, skipped=skipped)

    def after(
        self, moments: Moments[PyTree], h: Hyperparams, taken: Taken
    ) -> "AdEMAMixState":
        counts = self.count, self.count_m2
        counts = chosen(taken, tuple(map(next_count, counts)), counts)
        m2_weight = _next_weight(self.m2_weight, h._m2_weight, taken)
        m1_weight = _next_weight(self.m1_weight, h._bias1, taken)
        nu_weight = _next_weight(self.nu_weight, h._bias2, taken)
        sums = m2_weight, m1_weight, nu_weight
        skipped = _next_skipped(self.skipped, taken)
        return AdEMAMixState(counts[0], counts[1], *moments, *sums, skipped)


class SimplifiedAdEMAMixState(AbstractMomentState[SimplifiedHyperparams]):
    r"""The state of [`eqx_ademamix.SimplifiedAdEMAMix`][]. Arrays only.

    **Attributes:**

    - `count`: the number of steps taken, an int32 scalar, which saturates at
        $2^{31} - 1$.
    - `num`: the sum of the weights of all gradients in `m`, a scalar of the default
        float. At a constant $\beta_1$ it is $(1 - \beta_1^t) / (1 - \beta_1)$.
    - `m`: the decaying sum of the gradients, shaped like the trained parameters, with
        `None` at all other leaves.
    - `nu`: the average of the squared magnitudes of the gradients, shaped like `m`,
        real.
    - `nu_weight`: if `b2` is a schedule, the sum of the weights of all squares in `nu`,
        a scalar of the default float. Otherwise `None`.
    - `skipped`: as in [`eqx_ademamix.AdEMAMixState`][].
    """

    names: ClassVar[Moments[str]] = Moments(None, "m", "nu")
    counters: ClassVar[tuple[str, ...]] = ("count",)
    weights: ClassVar[tuple[str, ...]] = ("num", "nu_weight")

    count: Int32[Array, ""]
    num: Float[Array, ""]
    m: MomentTree
    nu: SquareTree
    nu_weight: Float[Array, ""] | None
    skipped: Int32[Array, ""] | None

    @no_type_check
    def __init__(
        self,
        count: Int32[Array, ""],
        num: Float[Array, ""],
        m: MomentTree,
        nu: SquareTree,
        nu_weight: Float[Array, ""] | None = None,
        skipped: Int32[Array, ""] | None = None,
    ):
        """**Arguments:** the same as the attributes.

        **Raises:**

        - `jaxtyping.TypeCheckError`: if the trees do not agree in structure, or their
            arrays in shape.
        """
        _check_sums(count, num, nu_weight)
        _check_skipped(skipped)
        check_trees(m, nu, m)
        self.count, self.num = count, num
        self.m, self.nu = m, nu
        self.nu_weight, self.skipped = nu_weight, skipped

    @property
    def moments(self) -> Moments[PyTree]:
        return Moments(None, self.m, self.nu)

    @classmethod
    def start(
        cls,
        moments: Moments[PyTree],
        weights: tuple[str, ...],
        skips: bool,
        zero: Callable[[Any], Array],
    ) -> "SimplifiedAdEMAMixState":
        nu_weight = zero(float) if "nu_weight" in weights else None
        skipped = zero(jnp.int32) if skips else None
        counters = zero(jnp.int32), zero(float)
        return cls(*counters, moments.m2, moments.nu, nu_weight, skipped)

    def after(
        self, moments: Moments[PyTree], h: SimplifiedHyperparams, taken: Taken
    ) -> "SimplifiedAdEMAMixState":
        new = next_count(self.count), h._num.astype(self.num.dtype)
        counters = chosen(taken, new, (self.count, self.num))
        nu_weight = _next_weight(self.nu_weight, h._bias2, taken)
        skipped = _next_skipped(self.skipped, taken)
        sums = nu_weight, skipped
        return SimplifiedAdEMAMixState(*counters, moments.m2, moments.nu, *sums)


def _next_weight(
    old: Float[Array, ""] | None, new: Float[Array, ""] | None, taken: Taken
) -> Float[Array, ""] | None:
    """A sum of weights after a step, if the state keeps it."""
    if old is None or new is None:
        return None
    return chosen(taken, new.astype(old.dtype), old)


class CompensatedState(eqx.Module):
    """The state of [`eqx_ademamix.Compensated`][].

    **Attributes:**

    - `inner_state`: the state of the wrapped optimizer.
    - `remainder`: the difference between the 16-bit parameters and the intended ones,
        in steps that depend on the parameters: int16 or int8 arrays shaped like the
        16-bit parameters that are trained, `None` at all other leaves.
    - `count`: the number of steps taken, an int32 scalar. The random rounding of the
        remainders depends on this.
    - `fingerprint`: with `check_params`, a hash of the 16-bit parameters after the last
        step, a uint32 scalar; 0 before the first step. Otherwise `None`.
    - `dtypes`: the names of the 16-bit types that the remainders belong to, in order.
    """

    inner_state: PyTree
    remainder: PyTree[Int[Array, "..."] | None]
    count: Int32[Array, ""]
    fingerprint: UInt32[Array, ""] | None
    dtypes: tuple[str, ...] = eqx.field(static=True)


def next_count(count: Int32[Array, ""]) -> Int32[Array, ""]:
    """`count + 1`, saturating: a counter that wraps would restart the schedules."""
    return jnp.minimum(count, jnp.iinfo(jnp.int32).max - 1) + 1


def _next_skipped(
    skipped: Int32[Array, ""] | None, taken: Taken
) -> Int32[Array, ""] | None:
    """The number of skipped steps after a step, or `None` if none can be skipped."""
    return None if skipped is None else chosen(taken, skipped, next_count(skipped))


#
# The types of the fields, bound wherever a state is made
#


@jaxtyped(typechecker=beartype)
def _check_scalars(
    count: Int32[Array, ""],
    count_m2: Int32[Array, ""],
    m2_weight: Float[Array, ""] | None,
    m1_weight: Float[Array, ""] | None,
    nu_weight: Float[Array, ""] | None,
) -> None: ...


@jaxtyped(typechecker=beartype)
def _check_sums(
    count: Int32[Array, ""], num: Float[Array, ""], nu_weight: Float[Array, ""] | None
) -> None: ...


@jaxtyped(typechecker=beartype)
def _check_skipped(skipped: Int32[Array, ""] | None) -> None: ...


def check_trees(m2: PyTree, nu: PyTree, m1: PyTree) -> None:
    """Binds the types of all leaves, once for each distinct type of leaf. Binding them
    leaf by leaf would take longer than tracing the step."""
    trees = [flatten(tree) for tree in (m2, nu, m1)]
    if len({tree.treedef for tree in trees}) > 1:
        _check_leaves(m2, nu, m1)
        return
    places = zip(*(tree.values for tree in trees), strict=True)
    distinct = {tuple(map(_leaf_type, place)): place for place in places}
    m2, nu, m1 = zip(*distinct.values(), strict=True) if distinct else ((), (), ())
    _check_leaves(m2, nu, m1)


def _leaf_type(x: Node) -> tuple[Hashable, ...]:
    return type(x), getattr(x, "shape", None), getattr(x, "dtype", None)


@jaxtyped(typechecker=beartype)
def _check_leaves(
    m2: MomentTree,
    nu: SquareTree,
    # After those that define "Params": a tree of None would bind it to itself.
    m1: PyTree[None] | MomentTree,
) -> None: ...
