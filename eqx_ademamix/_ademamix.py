"""AdEMAMix: the algorithm."""

import functools as ft
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from beartype import beartype
from jaxtyping import Array, Float, Inexact, Int32, PyTree, jaxtyped

from ._checks import (
    aligned,
    as_gradients,
    check_against_state,
    check_alive,
    check_counter,
    check_moments,
    check_optimizer,
    check_state_type,
    describe,
    no_type_check,
    on_device,
)
from ._encoded import Encoded
from ._formats import (
    StateFormat,
    cast,
    check_stored,
    checked_format,
    compute_dtype,
    decode,
    in_type_of,
    store,
    zeros,
)
from ._hyperparams import (
    HyperParam,
    HyperParamLike,
    HyperParamLikeOrSchedule,
    HyperParamOrSchedule,
    decay,
    finite,
    hyperparam,
    hyperparam_or_schedule,
    is_zero,
    non_negative,
    resolve,
    resolve_complement,
    resolve_decay,
)
from ._masks import as_bools, select, with_python_bools
from ._moments import abs_squared, bias_factor, moving_average, over, times
from ._optimizer import AbstractOptimizer, hash_of, next_count
from ._schedules import AlphaSchedule, Beta3Schedule


# Bools, or callables from an array to a bool; checked where it meets a model.
FilterSpec: TypeAlias = PyTree[Any]
# jaxtyping binds the names: trees annotated with "Params" must have one structure, and
# their leaves, one by one, the same shape.
# pyright: reportUndefinedVariable=false
_Arrays: TypeAlias = PyTree[Inexact[Array, "?*leaf"], "Params"]
_Moments: TypeAlias = PyTree[Inexact[Array | Encoded, "?*leaf"], "Params"]
_Squares: TypeAlias = PyTree[Float[Array | Encoded, "?*leaf"], "Params"]
_Bools: TypeAlias = PyTree[bool, "Params"]


class AdEMAMixState(eqx.Module):
    r"""The state of [`eqx_ademamix.AdEMAMix`][]. Arrays only.

    **Attributes:**

    - `count`: the number of steps taken, an int32 scalar. Drives the bias corrections
        and the schedule of the learning rate.
    - `count_m2`: the number of steps that the slow average has taken, an int32 scalar.
        Drives the schedules of `b3` and `alpha`. Both counters saturate at
        $2^{31} - 1$.
    - `m1`: the fast average of the gradients, shaped like the trained parameters, with
        `None` at all other leaves (at every leaf if `b1=0`).
    - `m2`: the slow average of the gradients, shaped as `m1`.
    - `nu`: the average of the squared magnitudes of the gradients, shaped as `m1`,
        real.
    """

    count: Int32[Array, ""]
    count_m2: Int32[Array, ""]
    m1: PyTree[None] | _Moments
    m2: _Moments
    nu: _Squares

    @no_type_check
    def __init__(
        self,
        count: Int32[Array, ""],
        count_m2: Int32[Array, ""],
        m1: PyTree[None] | _Moments,
        m2: _Moments,
        nu: _Squares,
    ):
        """**Arguments:** as the attributes.

        **Raises:**

        - `jaxtyping.TypeCheckError`: if the trees do not agree in structure, or their
            arrays in shape.
        """
        _check_fields(count, count_m2, m2, nu, m1)
        self.count, self.count_m2 = count, count_m2
        self.m1, self.m2, self.nu = m1, m2, nu


@jaxtyped(typechecker=beartype)
def _check_fields(
    count: Int32[Array, ""],
    count_m2: Int32[Array, ""],
    m2: _Moments,
    nu: _Squares,
    # After those that say what "Params" is: a tree of None would bind it to itself.
    m1: PyTree[None] | _Moments,
) -> None:
    """The types of a state's fields, which bind wherever a state is made."""


class Hyperparams(eqx.Module):
    """What [`eqx_ademamix.hyperparams`][] returns: scalars of the default float.

    **Attributes:** `learning_rate`, `b1`, `b2`, `b3`, `alpha`, `weight_decay`, each of
    shape `()`.
    """

    learning_rate: Float[Array, ""]
    b1: Float[Array, ""]
    b2: Float[Array, ""]
    b3: Float[Array, ""]
    alpha: Float[Array, ""]
    weight_decay: Float[Array, ""]


class AdEMAMix(AbstractOptimizer[AdEMAMixState]):
    r"""AdamW with a second, slow average of the gradients
    (Pagliardini, Ablin, Grangier 2024, arXiv:2409.03137, Algorithm 1).

    With the gradient $g$, the parameter $\theta$ and the number of the step
    $t = 1, 2, \dots$:

    $$
    \begin{align*}
    m_1 &\leftarrow \beta_1 m_1 + (1 - \beta_1) g
        & \hat m_1 &= m_1 / (1 - \beta_1^t) \\
    m_2 &\leftarrow \beta_3(t) \, m_2 + (1 - \beta_3(t)) g \\
    \nu &\leftarrow \beta_2 \nu + (1 - \beta_2) |g|^2
        & \hat \nu &= \nu / (1 - \beta_2^t) \\
    \theta &\leftarrow \theta - \eta(t) \left(
        \frac{\hat m_1 + \alpha(t) \, m_2}
        {\sqrt{\hat \nu + \epsilon_\text{root}} + \epsilon}
        + \lambda \theta \right)
    \end{align*}
    $$

    $m_2$ is not bias-corrected: it fills slowly, while $\alpha$ and $\beta_3$ warm up.
    $\alpha = 0$ is AdamW.

    Every hyperparameter is a field. A Python number is static under `eqx.filter_jit`: a
    new one means a new compilation. An array of shape `()` is traced: a new value
    compiles nothing, and a batch of them, under `eqx.filter_vmap`, makes a sweep one
    program.

    An optimizer also stands wherever optax takes one by its `init` and `update`. In
    `optax.inject_hyperparams` what is no number, and no schedule that optax should
    resolve, must be static: `optax.inject_hyperparams(AdEMAMix, static_args=("b3",
    "alpha", "weight_decay_mask", "trainable", "state_format"))`.

    !!! Example

        ```python
        import equinox as eqx
        import jax
        import eqx_ademamix

        model = eqx.nn.MLP(2, 1, width_size=8, depth=1, key=jax.random.key(0))
        num_steps = 10_000
        optim = eqx_ademamix.AdEMAMix(
            learning_rate=1e-3,
            b3=eqx_ademamix.beta3_scheduler(0.9999, 0.9, warmup=num_steps),
            alpha=eqx_ademamix.alpha_scheduler(8.0, 0.0, warmup=num_steps),
            weight_decay=0.1,
            weight_decay_mask=eqx_ademamix.decay_mask(model),
        )
        state = eqx_ademamix.init(optim, model)
        ```
    """

    learning_rate: HyperParamOrSchedule
    b1: HyperParam
    b2: HyperParam
    b3: HyperParamOrSchedule
    alpha: HyperParamOrSchedule
    eps: HyperParam
    eps_root: HyperParam
    weight_decay: HyperParam
    weight_decay_mask: FilterSpec
    trainable: FilterSpec
    state_format: StateFormat

    @no_type_check
    def __init__(
        self,
        learning_rate: HyperParamLikeOrSchedule,
        b1: HyperParamLike = 0.9,
        b2: HyperParamLike = 0.999,
        b3: HyperParamLikeOrSchedule = 0.9999,
        alpha: HyperParamLikeOrSchedule = 5.0,
        eps: HyperParamLike = 1e-8,
        eps_root: HyperParamLike = 0.0,
        weight_decay: HyperParamLike = 0.0,
        weight_decay_mask: FilterSpec = True,
        trainable: FilterSpec = True,
        state_format: StateFormat = StateFormat.float32(),
    ):
        r"""**Arguments:**

        - `learning_rate`: $\eta$, finite; or a schedule, called with `state.count`.
        - `b1`: $\beta_1$, the decay of the fast average, in [0, 1). For a Python 0 no
            `m1` is stored, which saves a third of the state.
        - `b2`: $\beta_2$, the decay of the average of the squares, in [0, 1).
        - `b3`: $\beta_3$, the decay of the slow average, in [0, 1); or a schedule,
            called with `state.count_m2`, usually [`eqx_ademamix.beta3_scheduler`][]. A
            schedule may have a method `complement(step)` that gives $1 - \beta_3$
            without cancellation.
        - `alpha`: $\alpha$, the weight of the slow average, at least 0; or a schedule,
            called with `state.count_m2`, usually [`eqx_ademamix.alpha_scheduler`][].
        - `eps`: $\epsilon$, at least 0.
        - `eps_root`: $\epsilon_\text{root}$, at least 0. Greater than 0 if derivatives
            are to be taken through the update. Not both this and `eps` may be 0.
        - `weight_decay`: $\lambda$, at least 0. As in AdamW it is multiplied by the
            learning rate. If it is not a Python 0, `update` needs `params`.
        - `weight_decay_mask`: a filter spec that chooses, among the trained arrays,
            those that are decayed: a bool, a tree of bools (shaped like the model, like
            the filtered model, or like a prefix of these), or a callable from one array
            to a bool. Usually [`eqx_ademamix.decay_mask`][]`(model)`.
        - `trainable`: a filter spec that chooses, among the model's inexact arrays,
            those that are trained. All others have no state, and `None` for an update.
        - `state_format`: a [`eqx_ademamix.StateFormat`][]: how the moments are stored.
            By default as float32, or as the parameter's own wider type.

        Schedules are called with the number of steps taken before the present one (0,
        1, 2, ...), as in optax; the paper's $t$ is one more.

        **Raises:**

        - `ValueError` or `TypeError`: for values out of range. Traced values are left
            alone.
        """
        self.learning_rate = hyperparam_or_schedule(
            "learning_rate", learning_rate, finite
        )
        self.b1 = hyperparam("b1", b1, decay)
        self.b2 = hyperparam("b2", b2, decay)
        self.b3 = hyperparam_or_schedule("b3", b3, decay)
        self.alpha = hyperparam_or_schedule("alpha", alpha, non_negative)
        self.eps = hyperparam("eps", eps, non_negative)
        self.eps_root = hyperparam("eps_root", eps_root, non_negative)
        self.weight_decay = hyperparam("weight_decay", weight_decay, non_negative)
        self.weight_decay_mask = with_python_bools(weight_decay_mask)
        self.trainable = with_python_bools(trainable)
        self.state_format = checked_format(state_format)
        for name, other in (("b3", AlphaSchedule), ("alpha", Beta3Schedule)):
            if isinstance(getattr(self, name), other):
                raise TypeError(
                    f"`{name}` is {describe(getattr(self, name))}, which is not for "
                    "it. Were the schedules of `b3` and `alpha` swapped?"
                )
        if is_zero(self.eps) and is_zero(self.eps_root):
            raise ValueError(
                "`eps` and `eps_root` are both 0, but one must be positive: a zero "
                "gradient would give 0/0. The default is `eps=1e-8`."
            )

    @no_type_check
    def init(self, params: PyTree[Any]) -> AdEMAMixState:
        """See [`eqx_ademamix.init`][]."""
        trained = select(self.trainable, params, "trainable")
        _check_not_empty(params, trained)
        as_bools(self.weight_decay_mask, trained, "weight_decay_mask")
        blank = jax.tree.map(lambda x: zeros(self.state_format, x), trained)

        def tree(name: str) -> Any:
            return jax.tree.map(lambda _, x: getattr(x, name), trained, blank)

        return AdEMAMixState(
            count=jnp.zeros((), jnp.int32),
            count_m2=jnp.zeros((), jnp.int32),
            m1=tree("m1") if self._has_m1 else jax.tree.map(lambda _: None, trained),
            m2=tree("m2"),
            nu=tree("nu"),
        )

    @no_type_check
    def update(
        self,
        grads: PyTree[Any],
        state: AdEMAMixState,
        params: PyTree[Any] | None = None,
    ) -> tuple[PyTree[Any], AdEMAMixState]:
        """See [`eqx_ademamix.update`][]."""
        state = on_device(state)
        g, p = self._checked(grads, state, params)
        mask = self.weight_decay_mask if self._has_decay else False
        is_decayed = as_bools(mask, g if p is None else p, "weight_decay_mask")
        h = self._resolved(state)
        updates, m2, nu, m1 = _step(
            g, state.m2, state.nu, state.m1, p, is_decayed, h, state.count
        )
        return updates, AdEMAMixState(
            count=next_count(state.count),
            count_m2=next_count(state.count_m2),
            m1=m1,
            m2=m2,
            nu=nu,
        )

    def __hash__(self) -> int:
        return hash_of(self)

    @property
    def _has_m1(self) -> bool:
        return not (isinstance(self.b1, float) and self.b1 == 0.0)

    @property
    def _has_decay(self) -> bool:
        return not (isinstance(self.weight_decay, float) and self.weight_decay == 0.0)

    def _checked(self, grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        """The trained leaves of gradients and parameters, once all is known to fit."""
        check_state_type(state, grads, AdEMAMixState)
        trees = {"optim": self, "grads": grads, "state": state, "params": params}
        for name, tree in trees.items():
            check_alive(name, tree)
        check_counter("count", state.count)
        check_counter("count_m2", state.count_m2)
        check_moments(state.m1, state.m2, state.nu, has_m1=self._has_m1)
        g = as_gradients(grads)
        if params is None:
            _check_no_decay(self._has_decay)
            check_against_state("grads", g, state.m2, keep_extra=True)
            p, g = None, select(self.trainable, g, "trainable")
            check_against_state("grads", g, state.m2)
            g = aligned(g, state.m2)
        else:
            p = select(self.trainable, params, "trainable")
            check_against_state("params", p, state.m2, whole=params)
            check_against_state("grads", g, state.m2, keep_extra=True)
            p, g = aligned(p, state.m2), aligned(g, state.m2)
        check_stored(
            self.state_format,
            state.m1,
            state.m2,
            state.nu,
            like=g if p is None else p,
            exact=p is not None,
        )
        return g, p

    def _resolved(self, state: AdEMAMixState) -> "_Resolved":
        """The hyperparameters at the counters, all of shape ()."""
        count, count_m2 = state.count, state.count_m2
        t = count.astype(float) + 1.0
        complement1 = resolve_complement("b1", self.b1, count)
        complement2 = resolve_complement("b2", self.b2, count)
        return _Resolved(
            learning_rate=resolve("learning_rate", self.learning_rate, count),
            complement1=complement1,
            complement2=complement2,
            complement3=resolve_complement("b3", self.b3, count_m2),
            bias1=bias_factor(complement1, t),
            bias2=bias_factor(complement2, t),
            alpha=resolve("alpha", self.alpha, count_m2),
            eps=resolve("eps", self.eps, count),
            eps_root=resolve("eps_root", self.eps_root, count),
            weight_decay=resolve("weight_decay", self.weight_decay, count),
        )


class _Resolved(NamedTuple):
    learning_rate: Float[Array, ""]
    complement1: Float[Array, ""]  # 1 - b1
    complement2: Float[Array, ""]  # 1 - b2
    complement3: Float[Array, ""]  # 1 - b3
    bias1: Float[Array, ""]  # 1 - b1^t
    bias2: Float[Array, ""]  # 1 - b2^t
    alpha: Float[Array, ""]
    eps: Float[Array, ""]
    eps_root: Float[Array, ""]
    weight_decay: Float[Array, ""]

    def in_dtype(self, real: np.dtype[Any]) -> "_Resolved":
        h = _Resolved(*(x.astype(real) for x in self))
        # An `eps` that is 0 in this dtype must not make 0/0 of a zero gradient.
        return h._replace(eps=jnp.maximum(h.eps, jnp.finfo(real).tiny))


@jaxtyped(typechecker=beartype)
def _step(
    grads: _Arrays,
    m2: _Moments,
    nu: _Squares,
    m1: PyTree[None] | _Moments,
    params: _Arrays | None,
    is_decayed: _Bools,
    h: _Resolved,
    count: Int32[Array, ""],
) -> tuple[_Arrays, _Moments, _Squares, PyTree[None] | _Moments]:
    """The step on whole trees, whose shapes must agree leaf by leaf. Returns the
    updates and the new `m2`, `nu` and `m1`."""
    if params is None:
        params = jax.tree.map(lambda _: None, grads)
    leaf_step = ft.partial(_leaf_step, ft.cache(h.in_dtype), count)
    positions = jtu.tree_structure(grads).unflatten(range(len(jtu.tree_leaves(grads))))
    out = jax.tree.map(leaf_step, grads, m2, nu, m1, params, is_decayed, positions)

    def part(i: int) -> Any:
        return jax.tree.map(lambda _, leaf: leaf[i], grads, out)

    return part(0), part(1), part(2), part(3)


def _leaf_step(
    resolved: Callable[[np.dtype[Any]], _Resolved],
    count: Array,
    g: Array,
    m2: Array | Encoded,
    nu: Array | Encoded,
    m1: Array | Encoded | None,
    p: Array | None,
    is_decayed: bool,
    position: int,
) -> tuple[Array, Array | Encoded, Array | Encoded, Array | Encoded | None]:
    """The step on one parameter (arXiv:2409.03137, Algorithm 1)."""
    like = g if p is None else p
    real = compute_dtype(g.dtype, m2.dtype, nu.dtype, like.dtype)
    h, g = resolved(real), cast(g, real)

    new_m1 = g if m1 is None else _average(m1, g, h.complement1)
    new_m2 = _average(m2, g, h.complement3)
    new_nu = _average(nu, abs_squared(g), h.complement2)

    key = lambda i: (count, 3 * position + i)
    new_m1, stored_m1 = (new_m1, None) if m1 is None else store(new_m1, m1, key(0))
    new_m2, stored_m2 = store(new_m2, m2, key(1))
    new_nu, stored_nu = store(new_nu, nu, key(2))

    m1_hat = new_m1 if m1 is None else over(new_m1, h.bias1)
    nu_hat = over(new_nu, h.bias2)
    u = over(m1_hat + times(h.alpha, new_m2), jnp.sqrt(nu_hat + h.eps_root) + h.eps)
    if is_decayed and p is not None:
        u = u + times(h.weight_decay, cast(p, real))
    update = in_type_of(like, times(-h.learning_rate, u))
    return update, stored_m2, stored_nu, stored_m1


def _average(moment: Array | Encoded, value: Array, complement: Array) -> Array:
    real = complement.dtype
    return moving_average(cast(decode(moment), real), value, complement)


def _check_not_empty(params: Any, trained: Any) -> None:
    # A tree without leaves is legal: optax wrappers probe with such trees.
    if jax.tree.leaves(trained) or not jax.tree.leaves(params):
        return
    if any(eqx.is_inexact_array(x) for x in jax.tree.leaves(params)):
        raise ValueError(
            "`trainable` selects none of the arrays of `params`, so there is nothing "
            "to train. It should be True for at least one floating-point or complex "
            "array."
        )
    raise ValueError(
        f"`params` has {len(jax.tree.leaves(params))} leaves, but none of them is a "
        "floating-point or complex array, so there is nothing to train. The order of "
        "arguments is `init(optim, params)`; Python numbers must be made arrays."
    )


def _check_no_decay(has_decay: bool) -> None:
    if has_decay:
        raise ValueError(
            "`params` is missing, but `weight_decay` is on and needs the parameters. "
            "Call `update(optim, grads, state, params)`."
        )


@no_type_check
def hyperparams(optim: AdEMAMix, state: AdEMAMixState) -> Hyperparams:
    """The hyperparameters as the next `update` will use them, schedules resolved at the
    state's counters. Works inside and outside of `jit`.

    **Arguments:**

    - `optim`: the optimizer.
    - `state`: its state.

    **Returns:**

    A module with the fields `learning_rate`, `b1`, `b2`, `b3`, `alpha` and
    `weight_decay`: arrays of shape `()` in the default float.

    !!! Example

        ```python
        import jax.numpy as jnp
        import eqx_ademamix

        optim = eqx_ademamix.AdEMAMix(
            1e-3, alpha=eqx_ademamix.alpha_scheduler(8.0, warmup=100)
        )
        state = eqx_ademamix.init(optim, jnp.zeros(3))
        assert eqx_ademamix.hyperparams(optim, state).alpha == 0.0
        ```
    """
    check_optimizer(optim, AdEMAMix)
    check_state_type(state, None, AdEMAMixState)
    for name, tree in {"optim": optim, "state": state}.items():
        check_alive(name, tree)
    state = on_device(state)
    return Hyperparams(
        learning_rate=resolve("learning_rate", optim.learning_rate, state.count),
        b1=resolve_decay("b1", optim.b1, state.count),
        b2=resolve_decay("b2", optim.b2, state.count),
        b3=resolve_decay("b3", optim.b3, state.count_m2),
        alpha=resolve("alpha", optim.alpha, state.count_m2),
        weight_decay=resolve("weight_decay", optim.weight_decay, state.count),
    )
