"""Our optimizers as optax's gradient transformations."""

import functools as ft
import warnings
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar, cast

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jaxtyping import PyTree

from .._ademamix import AdEMAMix
from .._filters import FilterSpec, as_bools, trained_arrays
from .._hyperparams import (
    H,
    HyperParamLike,
    HyperParamLikeOrSchedule,
    HyperParamOrSchedule,
    Schedule,
)
from .._paths import Node, describe, flatten, is_leaf
from .._schedules import Beta3Schedule
from .._simplified import SimplifiedAdEMAMix
from .._state import AdEMAMixState, S
from .._step import AbstractMomentOptimizer
from .._storage.codec import storable
from .._storage.format import StateFormat
from .._typing import DTypeLike, no_type_check


T = TypeVar("T")
ScaleByAdemamixState = AdEMAMixState
# A tree of bools, or a callable from the whole tree of parameters to one.
Mask: TypeAlias = PyTree | Callable[[PyTree], PyTree] | None


@no_type_check
def ademamix(
    lr: optax.ScalarOrSchedule = None,  # pyright: ignore[reportArgumentType]
    b1: HyperParamLikeOrSchedule = 0.9,
    b2: HyperParamLikeOrSchedule = 0.999,
    b3: HyperParamLikeOrSchedule = 0.9999,
    alpha: HyperParamLikeOrSchedule = 5.0,
    b3_scheduler: Schedule | None = None,
    alpha_scheduler: Schedule | None = None,
    eps: HyperParamLike = 1e-8,
    eps_root: HyperParamLike = 0.0,
    weight_decay: HyperParamLike = 0.0,
    mu_dtype: DTypeLike | None = None,
    mask: Mask = None,
    learning_rate: optax.ScalarOrSchedule = None,  # pyright: ignore[reportArgumentType]
    *,
    max_slow_ratio: HyperParamLike | None = None,
    clip_update_rms: HyperParamLike | None = None,
    skip_nonfinite: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """AdEMAMix as an `optax.GradientTransformation`, with the argument order and the
    defaults of the known JAX implementations.

    It uses the `init` and `update` of an [`eqx_ademamix.AdEMAMix`][], whose docstring
    has the mathematics. Only the argument names differ. Its state is an
    [`eqx_ademamix.AdEMAMixState`][].

    **Arguments:**

    - `lr`: the learning rate, a number or a schedule. Required, either by this name or
        as `learning_rate`.
    - `b1`, `b2`: the decay rates of the fast average and of the average of squares,
        numbers or schedules.
    - `b3`: the decay rate of the slow average, a number or a schedule.
    - `alpha`: the weight of the slow average, a number or a schedule.
    - `b3_scheduler`, `alpha_scheduler`: schedules that replace the numbers `b3` and
        `alpha`, for example [`eqx_ademamix.beta3_scheduler`][].
    - `eps`, `eps_root`: numbers added to the denominator, outside and inside the root.
    - `weight_decay`: the strength of the weight decay. As in optax, the learning rate
        multiplies it.
    - `mu_dtype`: the dtype of `m1` and `m2`: float16, bfloat16, float32 or float64.
        Complex moments stay complex, and `nu` is not affected. The dtype stays the same
        from step to step. The default is float32. As in [`eqx_ademamix.StateFormat`][],
        float32 means the parameter's own type if it is wider.
    - `mask`: as in optax: a tree of bools shaped like the parameters or a prefix of
        them, or a callable from the whole tree of parameters to such a tree. `None`
        means all. A callable module counts as a tree.
    - `learning_rate`: optax's name for `lr`.
    - `max_slow_ratio`, `clip_update_rms`, `skip_nonfinite`: as in
        [`eqx_ademamix.AdEMAMix`][].

    **Returns:**

    An `optax.GradientTransformationExtraArgs`, which ignores all extra arguments.

    **Raises:**

    - `ValueError` or `TypeError`: for values out of range, or if an argument is given
        by two names.

    Warns if `m2` cannot decay in `mu_dtype`: in bfloat16 at `b3=0.9999`, a step changes
    it by less than the spacing of its numbers.

    In `optax.inject_hyperparams`, list the arguments that are not numbers:
    `static_args=("b3_scheduler", "alpha_scheduler", "mask", "mu_dtype")`. With 16-bit
    parameters, set `hyperparam_dtype=jnp.float32` too.

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
        max_slow_ratio=max_slow_ratio,
        clip_update_rms=clip_update_rms,
        skip_nonfinite=skip_nonfinite,
    )
    if warning := _frozen_m2(mu_dtype, make().b3):
        warnings.warn(warning, stacklevel=2)
    return _transformation(make, mask)


@no_type_check
def scale_by_ademamix(
    b1: HyperParamLikeOrSchedule,
    b2: HyperParamLikeOrSchedule,
    b3: HyperParamLikeOrSchedule,
    alpha: HyperParamLikeOrSchedule,
    b3_scheduler: Schedule | None,
    alpha_scheduler: Schedule | None,
    eps: HyperParamLike = 1e-8,
    eps_root: HyperParamLike = 0.0,
    mu_dtype: DTypeLike | None = None,
    *,
    max_slow_ratio: HyperParamLike | None = None,
    clip_update_rms: HyperParamLike | None = None,
    skip_nonfinite: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""The direction of AdEMAMix as an `optax.GradientTransformation`:
    $(\hat m_1 + \alpha m_2) / (\sqrt{\hat \nu + \epsilon_\text{root}} + \epsilon)$,
    with a positive sign. Scale it by minus a learning rate.

    **Arguments:**

    - `b1`, `b2`, `b3`, `alpha`, `b3_scheduler`, `alpha_scheduler`, `eps`, `eps_root`,
        `mu_dtype`: as in [`eqx_ademamix.ademamix`][]. The two schedulers may be `None`.
    - `max_slow_ratio`, `clip_update_rms`, `skip_nonfinite`: as in
        [`eqx_ademamix.AdEMAMix`][].

    **Returns:**

    An `optax.GradientTransformationExtraArgs` whose state is an
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
        max_slow_ratio=max_slow_ratio,
        clip_update_rms=clip_update_rms,
        skip_nonfinite=skip_nonfinite,
    )
    if warning := _frozen_m2(mu_dtype, make().b3):
        warnings.warn(warning, stacklevel=2)
    return _transformation(make, mask=None)


@no_type_check
def simplified_ademamix(
    learning_rate: optax.ScalarOrSchedule,
    b1: HyperParamLikeOrSchedule = 0.99,
    b2: HyperParamLikeOrSchedule = 0.95,
    alpha: HyperParamLikeOrSchedule = 0.0,
    eps: HyperParamLike = 1e-8,
    eps_root: HyperParamLike = 0.0,
    weight_decay: HyperParamLike = 0.0,
    mask: Mask = None,
    *,
    clip_update_rms: HyperParamLike | None = None,
    skip_nonfinite: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Simplified AdEMAMix as an `optax.GradientTransformation`, with the arguments of
    `optax.contrib.simplified_ademamix`.

    It uses the `init` and `update` of an [`eqx_ademamix.SimplifiedAdEMAMix`][], whose
    docstring has the mathematics. Its state is an
    [`eqx_ademamix.SimplifiedAdEMAMixState`][].

    **Arguments:**

    - `learning_rate`: the learning rate, a number or a schedule.
    - `b1`, `b2`: the decay rates of the momentum and of the average of squares, numbers
        or schedules.
    - `alpha`: the extra weight of the current gradient, a number or a schedule.
    - `eps`, `eps_root`: numbers added to the denominator, outside and inside the root.
    - `weight_decay`: the strength of the weight decay. As in optax, the learning rate
        multiplies it.
    - `mask`: as in [`eqx_ademamix.ademamix`][].
    - `clip_update_rms`, `skip_nonfinite`: as in [`eqx_ademamix.AdEMAMix`][].

    **Returns:**

    An `optax.GradientTransformationExtraArgs`, which ignores all extra arguments.

    **Raises:**

    - `ValueError` or `TypeError`: for values out of range.

    !!! Example

        ```python
        import jax.numpy as jnp
        import optax
        import eqx_ademamix

        tx = optax.chain(
            optax.clip_by_global_norm(1.0),
            eqx_ademamix.simplified_ademamix(1e-5, alpha=10.0),
        )
        params = {"w": jnp.ones(3)}
        updates, state = tx.update(params, tx.init(params), params)
        ```
    """
    make = ft.partial(
        SimplifiedAdEMAMix,
        learning_rate=learning_rate,
        b1=b1,
        b2=b2,
        alpha=alpha,
        eps=eps,
        eps_root=eps_root,
        weight_decay=weight_decay,
        clip_update_rms=clip_update_rms,
        skip_nonfinite=skip_nonfinite,
    )
    make()  # raises errors now, not at the first step
    return _transformation(make, mask)


@no_type_check
def scale_by_simplified_ademamix(
    b1: HyperParamLikeOrSchedule = 0.99,
    b2: HyperParamLikeOrSchedule = 0.95,
    alpha: HyperParamLikeOrSchedule = 0.0,
    eps: HyperParamLike = 1e-8,
    eps_root: HyperParamLike = 0.0,
    *,
    clip_update_rms: HyperParamLike | None = None,
    skip_nonfinite: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""The direction of Simplified AdEMAMix as an `optax.GradientTransformation`:
    $(\alpha g + m) / (\sqrt{\hat \nu + \epsilon_\text{root}} + \epsilon)$, with a
    positive sign. Scale it by minus a learning rate.

    **Arguments:**

    - `b1`, `b2`, `alpha`, `eps`, `eps_root`: as in
        [`eqx_ademamix.simplified_ademamix`][].
    - `clip_update_rms`, `skip_nonfinite`: as in [`eqx_ademamix.AdEMAMix`][].

    **Returns:**

    An `optax.GradientTransformationExtraArgs` whose state is an
    [`eqx_ademamix.SimplifiedAdEMAMixState`][].

    **Raises:**

    - `ValueError` or `TypeError`: for values out of range.

    !!! Example

        ```python
        import jax.numpy as jnp
        import optax
        import eqx_ademamix

        tx = optax.chain(
            eqx_ademamix.scale_by_simplified_ademamix(0.99, 0.95, 10.0),
            optax.scale_by_learning_rate(1e-5),
        )
        params = {"w": jnp.ones(3)}
        updates, state = tx.update(params, tx.init(params), params)
        ```
    """
    return simplified_ademamix(
        -1.0,
        b1,
        b2,
        alpha,
        eps,
        eps_root,
        clip_update_rms=clip_update_rms,
        skip_nonfinite=skip_nonfinite,
    )


def _transformation(
    make: Callable[..., AbstractMomentOptimizer[S, H]], mask: Mask
) -> optax.GradientTransformationExtraArgs:
    """The `init` and `update` of an optimizer, with a mask as optax understands it."""

    def mask_of(params: PyTree) -> FilterSpec:
        tree = mask(params) if callable(mask) and is_leaf(mask) else mask
        return True if tree is None else jax.tree.map(_python_bool, tree)

    def masked(params: PyTree) -> AbstractMomentOptimizer[S, H]:
        return make(weight_decay_mask=mask_of(params))

    def init(params: PyTree) -> Any:
        trained = trained_arrays(True, flatten(params), or_structs=True)
        as_bools(mask_of(params), trained, "mask")
        return masked(params).init(params)

    def update(
        updates: PyTree, state: S, params: PyTree | None = None, **extra_args: object
    ) -> tuple[PyTree, S]:
        optim = make() if params is None else masked(params)
        return optim.update(updates, state, params)

    # optax has one type for all states, and no state's own type matches it.
    return optax.GradientTransformationExtraArgs(init, cast(Any, update))


def _python_bool(x: Node) -> Node:
    """optax also accepts 0-d arrays of bools."""
    is_concrete = isinstance(x, jax.Array) and not isinstance(x, Tracer)
    return bool(x) if is_concrete and x.dtype == bool and x.shape == () else x


def _one_of(lr: T | None, learning_rate: T | None) -> T:
    if (lr is None) == (learning_rate is None):
        given = "neither is given" if lr is None else "both are given"
        raise ValueError(
            f"`lr` and `learning_rate` are two names of one argument, but {given}. "
            "Pass one of them."
        )
    return cast("T", learning_rate if lr is None else lr)


def _scheduled(name: str, value: Any, scheduler: object) -> HyperParamLikeOrSchedule:
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
            "only one. Pass one of them."
        )
    return scheduler


def _mu_format(mu_dtype: object) -> StateFormat:
    if mu_dtype is None:
        return StateFormat.float32()
    mu = storable("mu_dtype", mu_dtype)
    return StateFormat(m1=mu, m2=mu, nu=jnp.float32)


def _frozen_m2(mu_dtype: DTypeLike | None, b3: HyperParamOrSchedule) -> str | None:
    """A warning if the dtype that stores `m2` rounds away what a step changes."""
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
