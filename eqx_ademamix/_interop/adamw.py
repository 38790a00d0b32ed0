"""From AdamW to AdEMAMix in the middle of a run, and back."""

from typing import Any, overload

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from .._inspection import find
from .._memory import placed_as, to_device
from .._optimizer import AbstractOptimizer, OptaxOptimizer, State
from .._paths import Node, is_entry
from .._state import AdEMAMixState
from .._storage.codec import Encoded, Stored
from .._typing import no_type_check
from .adopt import adopted, copied, copies, our_state
from .target import blank_state, continued
from .weights import check_no_weights, weight_after


@overload
def from_adamw(
    opt_state: PyTree, optim: AbstractOptimizer[State], params: PyTree
) -> State: ...
@overload
def from_adamw(opt_state: PyTree, optim: OptaxOptimizer, params: PyTree) -> Any: ...
@no_type_check
def from_adamw(
    opt_state: PyTree, optim: AbstractOptimizer[Any] | OptaxOptimizer, params: PyTree
) -> Any:
    """Moves a run of `optax.adam` or `optax.adamw` to AdEMAMix.

    `m1`, `nu` and `count` continue from their current values. `m2` and `count_m2` start
    at 0, and so do the schedules of `b3` and `alpha`. With `alpha=0`, the run continues
    exactly as AdamW would have. If `b1` or `b2` of `optim` is a schedule, the bias of
    `m1` or `nu` is corrected as if all steps had followed that schedule.

    **Arguments:**

    - `opt_state`: the state of an optax optimizer that contains one
        `optax.ScaleByAdamState` at any depth: inside `optax.chain`,
        `optax.inject_hyperparams`, `optax.MultiSteps` (at the end of an accumulation:
        accumulated gradients are not carried over), ... (`optax.adamax` has a state of
        the same class, but with another meaning.)
    - `optim`: the optimizer that continues the run: an [`eqx_ademamix.AdEMAMix`][], an
        [`eqx_ademamix.Compensated`][] or [`eqx_ademamix.Offloaded`][] around it, or an
        optax optimizer such as `optax.chain(...)` that contains exactly one `AdEMAMix`.
    - `params`: the model.

    **Returns:**

    The state of `optim`, in its own format: what `init` returns, but with Adam's
    moments and with these parts of `opt_state`. It shares no buffer with `opt_state`.

    - The counters of optax's schedules (in `optax.scale_by_schedule`,
        `optax.inject_hyperparams`, and the `gradient_step` of `optax.MultiSteps`).
        If `opt_state` has as many counters of a kind as the new state, they are matched
        in order. If it has a different number, they must all be equal. If it has none,
        the schedules continue at Adam's `count`, and injected schedules of `b3` and
        `alpha` start at 0.
    - The remainders of a `Compensated`, if the new state has remainders with the same
        number of bits. Otherwise, the run continues from the 16-bit parameters.

    **Raises:**

    - `ValueError`: if `opt_state` has no Adam state or more than one, the state of
        another model, or illegal values (such as NaN, or a negative `nu`); if `optim`
        does not contain exactly one `AdEMAMix`; or if it is unclear from which number a
        schedule continues.

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
    tree, blank = blank_state(optim, params, AdEMAMixState)
    adam = find(opt_state, _is_adam, "of Adam or AdamW")
    m1 = adopted("opt_state.mu", adam.mu, blank.m2, blank.m1)
    nu = adopted("opt_state.nu", adam.nu, blank.m2, blank.nu, is_real=True)
    count = copied(adam.count, jnp.int32)
    ours = AdEMAMixState(
        count=count,
        count_m2=blank.count_m2,
        m1=m1,
        m2=jax.tree.map(_zeros_sharded_as, nu, blank.m2, is_leaf=is_entry),
        nu=nu,
        m2_weight=blank.m2_weight,
        m1_weight=weight_after(blank, optim, "m1_weight", count),
        nu_weight=weight_after(blank, optim, "nu_weight", count),
        skipped=blank.skipped,
    )
    return continued(tree, ours, opt_state)


@no_type_check
def to_adamw(state: AdEMAMixState) -> optax.ScaleByAdamState:
    """Moves a run back to AdamW and drops the slow average.

    **Arguments:**

    - `state`: the state of an [`eqx_ademamix.AdEMAMix`][], or one that contains it.

    **Returns:**

    The state of `optax.scale_by_adam`, which is the first element of the state of
    `optax.adamw`. It shares no buffer with `state`.

    **Raises:**

    - `ValueError`: if it is not such a state; if it has no `m1`, because `b1=0`; or if
        `b1` or `b2` is a schedule. First convert such a state with
        [`eqx_ademamix.change_state_format`][].

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
    state = our_state(state)
    check_no_weights(state, ("m1_weight", "nu_weight"))
    if jax.tree.leaves(state.m2) and not jax.tree.leaves(state.m1):
        raise ValueError(
            "`state` has no first moment, since its optimizer has `b1=0`, but Adam "
            "needs one. Adam with `b1=0` is RMSProp: use `optax.scale_by_rms`."
        )
    return optax.ScaleByAdamState(
        count=copied(state.count), mu=copies(state.m1), nu=copies(state.nu)
    )


def _is_adam(x: Node) -> bool:
    return isinstance(x, optax.ScaleByAdamState)


def _zeros_sharded_as(x: Stored | None, own: Stored | None) -> Stored | None:
    """A moment of zeros with the sharding of another moment of the parameter, which may
    differ from that of the parameter itself, and in the same memory as our own."""
    if own is None or x is None:
        return None
    like = x.real[0] if isinstance(x, Encoded) else x
    shaped = lambda part: to_device(like if part.shape == like.shape else part)
    zeros = jax.tree.map(lambda part: jnp.zeros_like(shaped(part), part.dtype), own)
    return placed_as(zeros, own)
