"""Moments that are kept in host memory between steps."""

from typing import Any, Generic

import equinox as eqx
import jax.tree_util as jtu
from jaxtyping import PyTree

from .._checks import check_alive, check_state_type
from .._memory import HOST, check_host_memory, is_in_host, to_host
from .._optimizer import AbstractOptimizer, hash_of
from .._paths import describe, path_text, shortened
from .._state import AbstractMomentState, S
from .._step import AbstractMomentOptimizer, start
from .._storage.codec import Stored
from .._storage.format import Moments
from .._typing import no_type_check


class Offloaded(AbstractOptimizer[S], Generic[S]):
    """Wraps an optimizer of this package and keeps some of its moments in host memory
    (`pinned_host`). The device then has room for a larger model or batch, but each step
    takes longer.

    A jitted step copies these moments to the device and back, one parameter at a time.
    The copies are ordered so that the device never holds the moments of all parameters
    at once, only those of the parameter being updated and of the next one. The results
    are those of the wrapped optimizer, bit for bit, as long as XLA compiles the rest of
    the program in the same way.

    The state is that of the wrapped optimizer, with some arrays in host memory. All
    functions of this package that accept a state accept this one.

    `Offloaded` goes directly around the optimizer, and everything else around
    `Offloaded`: `Compensated(Offloaded(optim))`, or
    `optax.chain(optax.clip_by_global_norm(1.0), Offloaded(optim))`.

    It needs jax 0.10.2 or newer. [Host memory](../host-memory.md) says when it is worth
    the time, and what to know about donation.

    !!! Example

        ```python
        import jax
        import jax.numpy as jnp
        import eqx_ademamix

        params = jax.device_put({"w": jnp.ones((64, 256))}, jax.devices()[0])
        optim = eqx_ademamix.Offloaded(eqx_ademamix.AdEMAMix(1e-3))
        state = eqx_ademamix.init(optim, params)
        updates, state = jax.jit(optim.update)(params, state, params)
        assert state.m1["w"].sharding.memory_kind == "device"
        assert state.m2["w"].sharding.memory_kind == "pinned_host"
        ```
    """

    optim: AbstractMomentOptimizer[S, Any]
    moments: tuple[str, ...] = eqx.field(static=True)

    @no_type_check
    def __init__(
        self,
        optim: AbstractMomentOptimizer[S, Any],
        moments: tuple[str, ...] = ("m2",),
    ):
        """**Arguments:**

        - `optim`: an [`eqx_ademamix.AdEMAMix`][] or
            [`eqx_ademamix.SimplifiedAdEMAMix`][].
        - `moments`: the names of the moments to keep in host memory: some of `m1`,
            `m2`, and `nu` for `AdEMAMix` (there is no `m1` at `b1=0`), or of `m` and
            `nu` for `SimplifiedAdEMAMix`.

        **Raises:**

        - `ValueError` or `TypeError`: for anything else.

        `init` and `update` raise a `ValueError` if jax is too old, or if the device has
        no such memory. `update` also raises one if a moment is not where it should be,
        for example in a state that was made without `Offloaded`.
        [`eqx_ademamix.change_state_format`][] moves it there.
        """
        _check_inner(optim)
        self.optim = optim
        self.moments = _checked_names(moments, optim)

    @no_type_check
    def init(self, params: PyTree) -> S:
        """See [`eqx_ademamix.init`][]."""
        check_host_memory(jtu.tree_leaves(params))
        return start(self.optim, params, self._placed)

    @no_type_check
    def update(
        self,
        grads: PyTree,
        state: S,
        params: PyTree | None = None,
        **extra_args: object,
    ) -> tuple[PyTree, S]:
        """See [`eqx_ademamix.update`][]."""
        check_state_type(state, grads, self.optim.state_type)
        check_alive("state", state)
        check_host_memory(jtu.tree_leaves(state))
        _check_placed(state, self.moments)
        return self.optim.update(grads, state, params, **extra_args)

    def __hash__(self) -> int:
        return hash_of(self)

    def _placed(self, moments: Moments[Stored]) -> Moments[Stored]:
        """The moments of one parameter, each in its memory."""
        put = lambda name, x: to_host(x) if name in self.moments else x
        return Moments(*map(put, self.optim.state_type.names, moments))


def _check_inner(optim: object) -> None:
    if not isinstance(optim, AbstractMomentOptimizer):
        raise TypeError(
            f"`optim` is {describe(optim)}, but `Offloaded` goes directly around an "
            "`AdEMAMix` or `SimplifiedAdEMAMix`. Put everything else around "
            "`Offloaded`, for example `Compensated(Offloaded(optim))`."
        )


def _checked_names(
    names: object, optim: AbstractMomentOptimizer[Any, Any]
) -> tuple[str, ...]:
    known = [str(name) for name in optim.state_type.names if name is not None]
    if not optim.has_m1:
        known = [name for name in known if name != "m1"]
    is_sequence = isinstance(names, (tuple, list))
    if not is_sequence or not names or any(name not in known for name in names):
        found = shortened(repr(names), 80) if is_sequence else describe(names)
        raise ValueError(
            f"`moments` is {found}, but a tuple of names was expected. The moments of "
            f"this {type(optim).__name__} are {', '.join(map(repr, known))}."
        )
    return tuple(names)


def _check_placed(state: AbstractMomentState[Any], names: tuple[str, ...]) -> None:
    """Checks that the named moments are in host memory. (A step that moved them there
    would be dangerous to jit: JAX lets a result reuse the buffer of a donated array of
    its shape, and aborts the process if that is in another memory.)"""
    for name in names:
        for path, x in jtu.tree_leaves_with_path(getattr(state, name)):
            if not is_in_host(x):
                raise ValueError(
                    f"state.{name}{path_text(path)} is not in `{HOST}` memory, in "
                    f"which `Offloaded` keeps `{name}`. Move it there, outside of "
                    "`jit`: `state = eqx_ademamix.change_state_format(state, optim, "
                    "params)`."
                )
