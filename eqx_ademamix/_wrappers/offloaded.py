"""Moments that are in the memory of the host between two steps."""

from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu
from jaxtyping import PyTree

from .._checks import check_alive, check_state_type
from .._memory import check_host_memory, to_host
from .._optimizer import AbstractOptimizer, hash_of
from .._paths import Node, Path, describe, on_device
from .._step import AbstractMomentOptimizer, start
from .._storage.codec import Stored
from .._storage.format import Moments
from .._typing import no_type_check


class Offloaded(AbstractOptimizer[Any]):
    """Wraps an optimizer of this package, and keeps some of its moments in the memory
    of the host, so that the device has room for a larger model.
    """

    optim: AbstractMomentOptimizer[Any, Any]
    moments: tuple[str, ...] = eqx.field(static=True)

    @no_type_check
    def __init__(
        self,
        optim: AbstractMomentOptimizer[Any, Any],
        moments: tuple[str, ...] = ("m2",),
    ):
        if not isinstance(optim, AbstractMomentOptimizer):
            raise TypeError(
                f"`optim` is {describe(optim)}, but `Offloaded` wraps an `AdEMAMix` or "
                "a `SimplifiedAdEMAMix` itself. Put everything else around it: "
                "`Compensated(Offloaded(optim))`, `optax.chain(clip, "
                "Offloaded(optim))`."
            )
        self.optim = optim
        self.moments = _checked_names(optim, moments)

    @no_type_check
    def init(self, params: PyTree) -> Any:
        """See [`eqx_ademamix.init`][]."""
        check_host_memory(jtu.tree_leaves(params))
        return start(self.optim, params, self._placed)

    @no_type_check
    def update(
        self,
        grads: PyTree,
        state: Any,
        params: PyTree | None = None,
        **extra_args: object,
    ) -> tuple[PyTree, Any]:
        """See [`eqx_ademamix.update`][]."""
        check_state_type(state, grads, self.optim.state_type)
        check_alive("state", state)
        check_host_memory(jtu.tree_leaves(state))
        state = jtu.tree_map_with_path(self._put, state)
        return self.optim.update(grads, state, params, **extra_args)

    def __hash__(self) -> int:
        return hash_of(self)

    def _placed(self, moments: Moments[Stored]) -> Moments[Stored]:
        names = self.optim.state_type.names
        pairs = zip(names, moments, strict=True)
        return Moments(*(to_host(x) if name in self.moments else x for name, x in pairs))

    def _put(self, path: Path, x: Node) -> Node:
        return to_host(on_device(x)) if path[0].name in self.moments else x


def _checked_names(optim: AbstractMomentOptimizer[Any, Any], names: object) -> Any:
    return tuple(names)
