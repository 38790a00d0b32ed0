"""From the optimizers in optax.contrib, and back."""

from typing import Any, overload

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from .._inspection import decoded, find, is_moment_state
from .._memory import to_device
from .._optimizer import AbstractOptimizer, OptaxOptimizer, State
from .._paths import Node
from .._state import AbstractMomentState, AdEMAMixState, SimplifiedAdEMAMixState
from .._typing import no_type_check
from .adopt import adopted, copied, copies
from .target import blank_state, continued
from .weights import check_no_weights, num_after, weight_after


@overload
def from_optax(
    opt_state: PyTree, optim: AbstractOptimizer[State], params: PyTree
) -> State: ...
@overload
def from_optax(opt_state: PyTree, optim: OptaxOptimizer, params: PyTree) -> Any: ...
@no_type_check
def from_optax(
    opt_state: PyTree, optim: AbstractOptimizer[Any] | OptaxOptimizer, params: PyTree
) -> Any:
    """Moves a run of `optax.contrib.ademamix` or `optax.contrib.simplified_ademamix` to
    this package, without loss.

    **Arguments:**

    - `opt_state`: the state of an optax optimizer that contains one
        `ScaleByAdemamixState` of `optax.contrib`, or one with the same fields from
        another implementation, at any depth. For a
        [`eqx_ademamix.SimplifiedAdEMAMix`][], one `ScaleBySimplifiedAdEMAMixState`.
    - `optim`: the optimizer that continues the run: one of this package, an
        [`eqx_ademamix.Compensated`][] or [`eqx_ademamix.Offloaded`][] around it, or an
        optax optimizer that contains exactly one [`eqx_ademamix.AdEMAMix`][]. (Inside
        an optax optimizer, the decay rates cannot be read. So neither a
        `SimplifiedAdEMAMix` nor an `AdEMAMix` with `bias_correct_m2` or with a schedule
        for `b1` or `b2` may be inside one.)
    - `params`: the model.

    **Returns:**

    The state of `optim`, in its own format. It shares no buffer with `opt_state`. The
    counters of schedules in `opt_state` and the remainders of a `Compensated` continue
    as in [`eqx_ademamix.from_adamw`][]. What optax does not keep (`num`, `m1_weight`,
    `m2_weight`, or `nu_weight`) is computed from `b1`, `b3`, or `b2` over all steps
    taken.

    **Raises:**

    - `ValueError`: if `opt_state` has no such state or more than one, the state of
        another model, or illegal values (such as NaN, or a negative `nu`); if `optim`
        does not contain exactly one optimizer of this package; or if it is unclear
        from which number a schedule continues.

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
    tree, blank = blank_state(optim, params, AbstractMomentState)
    if isinstance(blank, SimplifiedAdEMAMixState):
        ours = _simplified(opt_state, optim, blank)
    else:
        ours = _ademamix(opt_state, optim, blank)
    return continued(tree, ours, opt_state)


def _ademamix(opt_state: PyTree, optim: object, blank: AdEMAMixState) -> AdEMAMixState:
    found = find(opt_state, _is_ademamix, "of optax.contrib.ademamix")
    count, count_m2 = (copied(x, jnp.int32) for x in (found.count, found.count_m2))
    return AdEMAMixState(
        count=count,
        count_m2=count_m2,
        m1=adopted("opt_state.m1", found.m1, blank.m2, blank.m1),
        m2=adopted("opt_state.m2", found.m2, blank.m2, blank.m2),
        nu=adopted("opt_state.nu", found.nu, blank.m2, blank.nu, is_real=True),
        m2_weight=weight_after(blank, optim, "m2_weight", count_m2),
        m1_weight=weight_after(blank, optim, "m1_weight", count),
        nu_weight=weight_after(blank, optim, "nu_weight", count),
        skipped=blank.skipped,
    )


def _simplified(
    opt_state: PyTree, optim: object, blank: SimplifiedAdEMAMixState
) -> SimplifiedAdEMAMixState:
    of_what = "of optax.contrib.simplified_ademamix"
    found = find(opt_state, _is_simplified, of_what)
    count = copied(found.t, jnp.int32)
    return SimplifiedAdEMAMixState(
        count=count,
        num=num_after(optim, count),
        m=adopted("opt_state.m", found.m, blank.m, blank.m),
        nu=adopted("opt_state.n", found.n, blank.m, blank.nu, is_real=True),
        nu_weight=weight_after(blank, optim, "nu_weight", count),
        skipped=blank.skipped,
    )


@overload
def to_optax(state: AdEMAMixState) -> optax.contrib.ScaleByAdemamixState: ...
@overload
def to_optax(
    state: SimplifiedAdEMAMixState,
) -> optax.contrib.ScaleBySimplifiedAdEMAMixState: ...
@overload
def to_optax(state: PyTree) -> Any: ...
@no_type_check
def to_optax(
    state: PyTree,
) -> optax.contrib.ScaleByAdemamixState | optax.contrib.ScaleBySimplifiedAdEMAMixState:
    """Moves a run to `optax.contrib.ademamix` or `optax.contrib.simplified_ademamix`,
    without loss. Codes are decoded.

    **Arguments:**

    - `state`: the state of an [`eqx_ademamix.AdEMAMix`][] or
        [`eqx_ademamix.SimplifiedAdEMAMix`][], or one that contains it.

    **Returns:**

    The state of `scale_by_ademamix` or `scale_by_simplified_ademamix` in
    `optax.contrib`, which is the first element of the state of the whole optimizer
    there. It shares no buffer with `state`. At `b1=0`, its `m1` is zero: we do not
    store it, and optax's next step does not read it.

    **Raises:**

    - `ValueError`: if it is not such a state, or has a weight that optax does not keep,
        because `b1` or `b2` is a schedule or because of `bias_correct_m2`. First
        convert it with [`eqx_ademamix.change_state_format`][].

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
    found = decoded(find(state, is_moment_state, "of AdEMAMix", name="state"))
    check_no_weights(found)
    if isinstance(found, SimplifiedAdEMAMixState):
        return optax.contrib.ScaleBySimplifiedAdEMAMixState(
            t=copied(found.count), m=copies(found.m), n=copies(found.nu)
        )
    has_m1 = jax.tree.leaves(found.m1) or not jax.tree.leaves(found.m2)
    m1 = copies(found.m1) if has_m1 else jax.tree.map(_zeros_like, found.m2)
    return optax.contrib.ScaleByAdemamixState(
        count=copied(found.count),
        count_m2=copied(found.count_m2),
        m1=m1,
        m2=copies(found.m2),
        nu=copies(found.nu),
    )


def _zeros_like(m2: Array) -> Array:
    return jnp.zeros_like(to_device(m2))


# Optax's states are recognized by their fields, since other implementations have named
# tuples of the same kind.


def _is_ademamix(x: Node) -> bool:
    return getattr(x, "_fields", None) == ("count", "count_m2", "m1", "m2", "nu")


def _is_simplified(x: Node) -> bool:
    return getattr(x, "_fields", None) == ("t", "m", "n")
