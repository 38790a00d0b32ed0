"""To and from optax."""

import functools as ft
import warnings
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jaxtyping import PyTree

from ._ademamix import AdEMAMix, AdEMAMixState
from ._checks import (
    aligned,
    check_against_state,
    check_alive,
    check_optimizer,
    children,
    describe,
    is_entry,
    is_leaf,
    no_type_check,
    on_device,
    shortened,
)
from ._encoded import Encoded
from ._formats import StateFormat, cast, compute_dtype, encode, storable
from ._hyperparams import HyperParamLike, HyperParamLikeOrSchedule, Schedule
from ._inspection import decoded
from ._masks import as_bools, select
from ._schedules import Beta3Schedule


ScaleByAdemamixState = AdEMAMixState


#
# As optax transformations
#


@no_type_check
def ademamix(
    lr: HyperParamLikeOrSchedule | None = None,
    b1: HyperParamLike = 0.9,
    b2: HyperParamLike = 0.999,
    b3: HyperParamLikeOrSchedule = 0.9999,
    alpha: HyperParamLikeOrSchedule = 5.0,
    b3_scheduler: Schedule | None = None,
    alpha_scheduler: Schedule | None = None,
    eps: HyperParamLike = 1e-8,
    eps_root: HyperParamLike = 0.0,
    weight_decay: HyperParamLike = 0.0,
    mu_dtype: Any = None,
    mask: PyTree[Any] | Callable[[Any], Any] | None = None,
    learning_rate: HyperParamLikeOrSchedule | None = None,
) -> optax.GradientTransformation:
    """AdEMAMix as an `optax.GradientTransformation`, with the argument order and the
    defaults of the known JAX implementations.

    It is made of the `init` and `update` of an [`eqx_ademamix.AdEMAMix`][], whose
    docstring has the mathematics: only the arguments have other names. Its state is an
    [`eqx_ademamix.AdEMAMixState`][].

    **Arguments:**

    - `lr`: the learning rate, a number or a schedule. Required, by this name or the
        last.
    - `b1`, `b2`: the decays of the fast average and of the average of squares.
    - `b3`: the decay of the slow average, a number or a schedule.
    - `alpha`: the weight of the slow average, a number or a schedule.
    - `b3_scheduler`, `alpha_scheduler`: schedules that take the place of the numbers
        `b3` and `alpha`, for example [`eqx_ademamix.beta3_scheduler`][].
    - `eps`, `eps_root`: are added to the denominator, outside and inside of the root.
    - `weight_decay`: the strength of the decoupled weight decay.
    - `mu_dtype`: the dtype of `m1` and `m2`: float16, bfloat16, float32 or float64.
        Complex moments stay complex, `nu` is not touched. It stays what it is from step
        to step. By default float32. As in [`eqx_ademamix.StateFormat`][], float32
        stands for the parameter's own type where that is wider.
    - `mask`: as in optax: a tree of bools shaped like the parameters or a prefix of
        them, or a callable from the whole tree of parameters to such a tree; `None` for
        all. A module that is callable is a tree.
    - `learning_rate`: optax's spelling of `lr`.

    **Returns:**

    An `optax.GradientTransformation`.

    **Raises:**

    - `ValueError` or `TypeError`: for values out of range, or if an argument is given
        in two spellings.

    Warns if `m2` cannot decay in `mu_dtype`: in bfloat16 at `b3=0.9999` a step changes
    it by less than the spacing of the numbers.

    In `optax.inject_hyperparams` list what is no number:
    `static_args=("b3_scheduler", "alpha_scheduler", "mask", "mu_dtype")`; with 16-bit
    parameters set `hyperparam_dtype=jnp.float32` too.

    !!! Example

        ```python
        import jax.numpy as jnp
        import optax
        import eqx_ademamix

        tx = optax.chain(
            optax.clip_by_global_norm(1.0),
            eqx_ademamix.ademamix(
                1e-3,
                b3_scheduler=eqx_ademamix.beta3_scheduler(0.9999, 0.9, warmup=1000),
                alpha_scheduler=eqx_ademamix.alpha_scheduler(8.0, warmup=1000),
            ),
        )
        params = {"w": jnp.ones(3)}
        updates, state = tx.update(params, tx.init(params), params)
        ```
    """
    make = ft.partial(
        AdEMAMix,
        learning_rate=_one_of(lr, learning_rate),
        b1=b1,
        b2=b2,
        b3=_scheduled("b3", b3, b3_scheduler),
        alpha=_scheduled("alpha", alpha, alpha_scheduler),
        eps=eps,
        eps_root=eps_root,
        weight_decay=weight_decay,
        state_format=_mu_format(mu_dtype),
    )
    if warning := _deafness(mu_dtype, make().b3):
        warnings.warn(warning, stacklevel=2)
    return _transformation(make, mask)


@no_type_check
def scale_by_ademamix(
    b1: HyperParamLike,
    b2: HyperParamLike,
    b3: HyperParamLikeOrSchedule,
    alpha: HyperParamLikeOrSchedule,
    b3_scheduler: Schedule | None,
    alpha_scheduler: Schedule | None,
    eps: HyperParamLike = 1e-8,
    eps_root: HyperParamLike = 0.0,
    mu_dtype: Any = None,
) -> optax.GradientTransformation:
    r"""The direction of AdEMAMix as an `optax.GradientTransformation`:
    $(\hat m_1 + \alpha m_2) / (\sqrt{\hat \nu + \epsilon_\text{root}} + \epsilon)$,
    with a positive sign, to be scaled by minus a learning rate.

    **Arguments:**

    - `b1`, `b2`, `b3`, `alpha`, `b3_scheduler`, `alpha_scheduler`, `eps`, `eps_root`,
        `mu_dtype`: as in [`eqx_ademamix.ademamix`][]. The two schedulers may be `None`.

    **Returns:**

    An `optax.GradientTransformation` whose state is an
    [`eqx_ademamix.AdEMAMixState`][].

    **Raises:**

    - `ValueError` or `TypeError`: for values out of range.

    !!! Example

        ```python
        import jax.numpy as jnp
        import optax
        import eqx_ademamix

        tx = optax.chain(
            eqx_ademamix.scale_by_ademamix(0.9, 0.999, 0.9999, 5.0, None, None),
            optax.scale_by_learning_rate(1e-3),
        )
        params = {"w": jnp.ones(3)}
        updates, state = tx.update(params, tx.init(params), params)
        ```
    """
    make = ft.partial(
        AdEMAMix,
        learning_rate=-1.0,
        b1=b1,
        b2=b2,
        b3=_scheduled("b3", b3, b3_scheduler),
        alpha=_scheduled("alpha", alpha, alpha_scheduler),
        eps=eps,
        eps_root=eps_root,
        state_format=_mu_format(mu_dtype),
    )
    if warning := _deafness(mu_dtype, make().b3):
        warnings.warn(warning, stacklevel=2)
    return _transformation(make, mask=None)


def _transformation(
    make: Callable[..., AdEMAMix], mask: Any
) -> optax.GradientTransformation:
    """The `init` and `update` of an optimizer, with a mask as optax understands it."""

    def mask_of(params: Any) -> Any:
        tree = mask(params) if callable(mask) and is_leaf(mask) else mask
        return True if tree is None else jax.tree.map(_python_bool, tree)

    def masked(params: Any) -> AdEMAMix:
        return make(weight_decay_mask=mask_of(params))

    def init(params: Any) -> Any:
        as_bools(mask_of(params), select(True, params, "mask"), "mask")
        return masked(params).init(params)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        optim = make() if params is None else masked(params)
        return optim.update(updates, state, params)

    return optax.GradientTransformation(init, update)


def _python_bool(x: Any) -> Any:
    """optax takes 0-d arrays of bools, too."""
    is_concrete = isinstance(x, jax.Array) and not isinstance(x, Tracer)
    return bool(x) if is_concrete and x.dtype == bool and x.shape == () else x


def _one_of(lr: Any, learning_rate: Any) -> Any:
    if (lr is None) == (learning_rate is None):
        given = "neither is given" if lr is None else "both are given"
        raise ValueError(
            f"`lr` and `learning_rate` are two spellings of one argument, but {given}. "
            "Give one of them."
        )
    return learning_rate if lr is None else lr


def _scheduled(name: str, value: Any, scheduler: Any) -> Any:
    if scheduler is None:
        return value
    if not callable(scheduler):
        raise TypeError(
            f"`{name}_scheduler` is {describe(scheduler)}, but a function of the step "
            "was expected. In `optax.inject_hyperparams` list it in `static_args`."
        )
    if callable(value):
        raise ValueError(
            f"`{name}` and `{name}_scheduler` are both schedules, but there can be "
            "only one. Give one of them."
        )
    return scheduler


def _mu_format(mu_dtype: Any) -> StateFormat:
    if mu_dtype is None:
        return StateFormat.float32()
    mu = storable("mu_dtype", mu_dtype)
    return StateFormat(m1=mu, m2=mu, nu=jnp.float32)


def _deafness(mu_dtype: Any, b3: Any) -> str | None:
    """What to warn of if `m2` does not hear a step in the dtype that stores it."""
    b3 = b3.beta_end if isinstance(b3, Beta3Schedule) else b3
    if mu_dtype is None or callable(b3) or isinstance(b3, Tracer):
        return None
    dtype = jnp.dtype(mu_dtype)
    change, spacing = 1.0 - float(b3), float(jnp.finfo(dtype).epsneg)
    if dtype.itemsize > 2 or change >= spacing:
        return None
    return (
        f"In `mu_dtype={dtype.name}` the slow average `m2` cannot decay at b3 = "
        f"{float(b3):.9g}: a step changes it by {change:.2g} of itself, but the "
        f"spacing of the numbers below 1 is {spacing:.2g}. Use the default, float32."
    )


#
# Conversions of states
#


@no_type_check
def from_adamw(opt_state: Any, optim: AdEMAMix, params: PyTree[Any]) -> AdEMAMixState:
    """Takes a run of `optax.adam` or `optax.adamw` over to AdEMAMix.

    `m1`, `nu` and `count` go on where they are; `m2` and `count_m2` start at 0, and
    with them the schedules of `b3` and `alpha`. With `alpha=0` the run continues
    exactly as AdamW would have.

    **Arguments:**

    - `opt_state`: the state of an optax optimizer that contains one
        `optax.ScaleByAdamState`, however deep: inside `optax.chain`,
        `optax.inject_hyperparams`, `optax.MultiSteps` (at the end of an accumulation:
        accumulated gradients are not taken over), ... (`optax.adamax` has a state of
        the same class but of another meaning.)
    - `optim`: the optimizer that goes on.
    - `params`: the model.

    **Returns:**

    The state of `optim`, in its own format. It shares no buffer with `opt_state`.

    **Raises:**

    - `ValueError`: if `opt_state` has no Adam state or several, or one of another
        model.

    !!! Example

        ```python
        import jax.numpy as jnp
        import optax
        import eqx_ademamix

        params = {"w": jnp.ones(3)}
        adamw = optax.adamw(1e-3)
        _, opt_state = adamw.update(params, adamw.init(params), params)

        optim = eqx_ademamix.AdEMAMix(
            1e-3, alpha=eqx_ademamix.alpha_scheduler(8.0, warmup=1000)
        )
        state = eqx_ademamix.from_adamw(opt_state, optim, params)
        assert state.count == 1 and state.count_m2 == 0
        ```
    """
    check_optimizer(optim, AdEMAMix)
    adam = find_state(opt_state, _is_adam, "of Adam or AdamW")
    blank = optim.init(params)
    m1 = _adopted("opt_state.mu", adam.mu, blank, blank.m1)
    nu = _adopted("opt_state.nu", adam.nu, blank, blank.nu, is_real=True)
    return AdEMAMixState(
        count=copied(adam.count, jnp.int32),
        count_m2=blank.count_m2,
        m1=m1,
        m2=jax.tree.map(_zeros_sharded_as, nu, blank.m2, is_leaf=is_entry),
        nu=nu,
    )


@no_type_check
def to_adamw(state: AdEMAMixState) -> optax.ScaleByAdamState:
    """Takes a run back to AdamW: drops the slow average.

    **Arguments:**

    - `state`: the state of an [`eqx_ademamix.AdEMAMix`][], or one that contains it.

    **Returns:**

    The state of `optax.scale_by_adam`, which is the first element of the state of
    `optax.adamw`. It shares no buffer with `state`.

    **Raises:**

    - `ValueError`: if it is no such state, or has no `m1`, because `b1=0`.

    !!! Example

        ```python
        import jax.numpy as jnp
        import optax
        import eqx_ademamix

        params = {"w": jnp.ones(3)}
        state = eqx_ademamix.init(eqx_ademamix.AdEMAMix(1e-3), params)
        adamw = optax.adamw(1e-3)
        opt_state = (eqx_ademamix.to_adamw(state), *adamw.init(params)[1:])
        ```
    """
    state = _our_state(state)
    if jax.tree.leaves(state.m2) and not jax.tree.leaves(state.m1):
        raise ValueError(
            "`state` has no first moment, since its optimizer has `b1=0`, but Adam "
            "needs one. For the RMSProp that it would be, use `optax.scale_by_rms`."
        )
    return optax.ScaleByAdamState(
        count=copied(state.count), mu=_copies(state.m1), nu=_copies(state.nu)
    )


@no_type_check
def from_optax(opt_state: Any, optim: AdEMAMix, params: PyTree[Any]) -> AdEMAMixState:
    """Takes a run of `optax.contrib.ademamix` over, without loss.

    **Arguments:**

    - `opt_state`: the state of an optax optimizer that contains one
        `optax.contrib.ScaleByAdemamixState`, or one with the same fields from another
        implementation, however deep.
    - `optim`: the optimizer that goes on.
    - `params`: the model.

    **Returns:**

    The state of `optim`, in its own format. It shares no buffer with `opt_state`.

    **Raises:**

    - `ValueError`: if `opt_state` has no such state or several, or one of another
        model.

    !!! Example

        ```python
        import jax.numpy as jnp
        import optax
        import eqx_ademamix

        params = {"w": jnp.ones(3)}
        opt_state = optax.contrib.ademamix(1e-3).init(params)
        optim = eqx_ademamix.AdEMAMix(1e-3)
        state = eqx_ademamix.from_optax(opt_state, optim, params)
        ```
    """
    check_optimizer(optim, AdEMAMix)
    found = find_state(opt_state, _is_optax, "of optax.contrib.ademamix")
    blank = optim.init(params)
    return AdEMAMixState(
        count=copied(found.count, jnp.int32),
        count_m2=copied(found.count_m2, jnp.int32),
        m1=_adopted("opt_state.m1", found.m1, blank, blank.m1),
        m2=_adopted("opt_state.m2", found.m2, blank, blank.m2),
        nu=_adopted("opt_state.nu", found.nu, blank, blank.nu, is_real=True),
    )


@no_type_check
def to_optax(state: AdEMAMixState) -> optax.contrib.ScaleByAdemamixState:
    """Takes a run to `optax.contrib.ademamix`, without loss. Codes are decoded.

    **Arguments:**

    - `state`: the state of an [`eqx_ademamix.AdEMAMix`][], or one that contains it.

    **Returns:**

    The state of `optax.contrib.scale_by_ademamix`, which is the first element of the
    state of `optax.contrib.ademamix`. It shares no buffer with `state`. At `b1=0` its
    `m1`, which we do not store and which the next step there does not read, is zero.

    !!! Example

        ```python
        import jax.numpy as jnp
        import optax
        import eqx_ademamix

        params = {"w": jnp.ones(3)}
        state = eqx_ademamix.init(eqx_ademamix.AdEMAMix(1e-3), params)
        tx = optax.contrib.ademamix(1e-3)
        opt_state = (eqx_ademamix.to_optax(state), *tx.init(params)[1:])
        ```
    """
    state = _our_state(state)
    has_m1 = jax.tree.leaves(state.m1) or not jax.tree.leaves(state.m2)
    m1 = _copies(state.m1) if has_m1 else jax.tree.map(jnp.zeros_like, state.m2)
    return optax.contrib.ScaleByAdemamixState(
        count=copied(state.count),
        count_m2=copied(state.count_m2),
        m1=m1,
        m2=_copies(state.m2),
        nu=_copies(state.nu),
    )


def _our_state(state: Any) -> AdEMAMixState:
    return decoded(find_state(state, is_ours, "of AdEMAMix", name="state"))


def is_ours(x: Any) -> bool:
    return isinstance(x, AdEMAMixState)


def _is_adam(x: Any) -> bool:
    return isinstance(x, optax.ScaleByAdamState)


def _is_optax(x: Any) -> bool:
    # By its fields, since there are several named tuples of this kind: optax's, and
    # those of the implementations that it comes from.
    return getattr(x, "_fields", None) == optax.contrib.ScaleByAdemamixState._fields


def find_state(
    opt_state: Any, is_one: Callable[[Any], bool], of_what: str, name: str = "opt_state"
) -> Any:
    """The one state of a kind that another contains, alive and with NumPy's arrays made
    JAX's."""
    found = [x for x in jax.tree.leaves(opt_state, is_leaf=is_one) if is_one(x)]
    if len(found) != 1:
        kinds = ", ".join(dict.fromkeys(_kinds(opt_state))) or describe(opt_state)
        raise ValueError(
            f"`{name}` has {len(found) or 'no'} states {of_what}, but one was "
            f"expected. Found in it: {shortened(kinds, 300)}. Pass the state of the "
            "optimizer, or the one part of it that is meant."
        )
    check_alive(name, found[0])
    for counter in ("count", "count_m2"):
        count = getattr(found[0], counter, jnp.zeros((), int))
        if jnp.shape(count) != ():
            raise ValueError(
                f"{name}.{counter} is {describe(count)}, but a scalar was expected. "
                "Convert a batch of states under `eqx.filter_vmap`."
            )
    return on_device(found[0])


def _kinds(node: Any) -> list[str]:
    """The names of the classes of the states inside a state."""
    if is_leaf(node):
        return []
    inner = [child for _, child in children(node)[0] if not is_leaf(child)]
    if type(node) in (list, tuple, dict):
        return [kind for child in inner for kind in _kinds(child)]
    inner = [x for x in inner if isinstance(x, tuple) or type(x) in (list, dict)]
    return [type(node).__name__, *(kind for x in inner for kind in _kinds(x))]


def _adopted(
    name: str, tree: Any, blank: AdEMAMixState, like: Any, *, is_real: bool = False
) -> Any:
    """Copies of a foreign tree of moments, stored as our own are."""
    tree = eqx.filter(tree, eqx.is_inexact_array)
    check_against_state(
        name,
        tree,
        blank.m2,
        other="the state of `optim`",
        keep_extra=True,
        complex_too=not is_real,
    )
    return jax.tree.map(
        lambda own, x: None if own is None else in_format(x, own),
        like,
        aligned(tree, blank.m2),
        is_leaf=is_entry,
    )


def in_format(x: Any, own: Any) -> Any:
    """A copy of a moment, stored as our own of that parameter is."""
    if not jnp.issubdtype(own.dtype, np.complexfloating):
        x = jnp.real(x)  # optax starts the `nu` of a complex parameter complex
    real = compute_dtype(x.dtype, own.dtype)
    return _copies(encode(cast(jnp.asarray(x), real), own))


def _zeros_sharded_as(x: Any, own: Any) -> Any:
    """A moment of zeros, sharded as another moment of its parameter, which need not be
    sharded as the parameter is."""
    if own is None:
        return None
    like = x.real[0] if isinstance(x, Encoded) else x
    shaped = lambda part: like if part.shape == like.shape else part
    return jax.tree.map(lambda part: jnp.zeros_like(shaped(part), part.dtype), own)


def _copies(tree: Any) -> Any:
    return jax.tree.map(copied, tree)


def copied(x: Any, dtype: Any = None) -> Any:
    """A copy in a buffer of its own, so that either may be donated, sharded alike."""
    return jnp.array(x, dtype=dtype, copy=True)
