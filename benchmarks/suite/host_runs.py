"""Training loops around a small model: written by hand, and made by `make_step`."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

import eqx_ademamix

from . import cases
from .measure import Run
from .sides import SIDES, Side


STEPS_PER_CALL = 8
PACK_BELOW = 100  # above the 64 entries of the largest leaf, so all are packed


class Net(eqx.Module):
    """A given number of leaves, with eight by eight and eight entries."""

    layers: list[eqx.nn.Linear]


def make_net(leaves: int) -> Net:
    keys = jax.random.split(jax.random.key(0), leaves // 2)
    return Net([eqx.nn.Linear(8, 8, key=key) for key in keys])


def loss_fn(net: Net, scale: jax.Array) -> jax.Array:
    """Its gradient takes no time, so what is left is the host's work."""
    arrays = jax.tree.leaves(eqx.filter(net, eqx.is_inexact_array))
    return scale * jnp.sum(jnp.stack([jnp.vdot(x, x) for x in arrays]))


def copy(tree: Any) -> Any:
    """Each loop donates what it gets, so each gets its own."""
    return jax.tree.map(lambda x: x + 0 if eqx.is_array(x) else x, tree)


class Loop:
    """A training loop. `step` takes a carry and returns the next one."""

    def __init__(
        self,
        step: Callable[[Any], Any],
        carry: Any,
        every: int = 1,
        unpack: Callable[[Any], Any] = lambda carry: carry,
    ):
        self.facts: dict[str, float] = {}
        self._step, self._carry, self._every = step, carry, every
        self._unpack = unpack
        self._count = 0

    def __call__(self) -> None:
        """One step. If a call takes several steps, only the first of them makes the
        call."""
        if self._count % self._every == 0:
            self._carry = self._step(self._carry)
        self._count += 1

    def arrays(self) -> list[jax.Array]:
        """The arrays of the model and the state, the model's first."""
        leaves = jax.tree.leaves(self._unpack(self._carry))
        return [x for x in leaves if eqx.is_array(x)]

    def wait(self) -> None:
        jax.block_until_ready(jax.tree.leaves(self._carry))


def runs_of(leaves: int, names: Sequence[str] = cases.LOOPS) -> dict[str, Run]:
    net, scale = make_net(leaves), jnp.float32(0.5)
    optax_side, our_side = SIDES[cases.BASELINE](), SIDES[cases.FLOAT32]()
    several = {"steps_per_call": STEPS_PER_CALL}
    packed = {"pack_below": PACK_BELOW}
    makers: dict[str, Callable[[], Run]] = {
        cases.BASELINE: lambda: by_hand(optax_side, net, scale),
        cases.FLOAT32: lambda: by_hand(our_side, net, scale),
        cases.AS_ARGUMENT: lambda: by_hand_with_argument(net, scale),
        cases.FLAT: lambda: flat(our_side, net, scale),
        cases.MAKE_STEP: lambda: made(net, scale),
        cases.EIGHT: lambda: made(net, scale, **several),
        cases.PACKED: lambda: made(net, scale, **packed),
        cases.PACKED_EIGHT: lambda: made(net, scale, **packed, **several),
    }
    return {name: makers[name]() for name in names}


def by_hand(side: Side, net: Net, scale: jax.Array) -> Loop:
    """The loop that users write, with the optimizer in a closure."""

    @eqx.filter_jit(donate="all-except-first")
    def step(scale: Any, net: Any, state: Any) -> Any:
        loss, grads = eqx.filter_value_and_grad(loss_fn)(net, scale)
        arrays, rest = eqx.partition(net, eqx.is_inexact_array)
        arrays, state = side.step(arrays, state, grads)
        return eqx.combine(arrays, rest), state, loss

    state = side.init(eqx.filter(net, eqx.is_inexact_array))
    return Loop(lambda carry: step(scale, *carry[:2]), (copy(net), state))


def by_hand_with_argument(net: Net, scale: jax.Array) -> Loop:
    """The README's loop: the optimizer is an argument, and the model is whole."""
    optim: Any = eqx_ademamix.AdEMAMix(1e-3, b3=0.9999, alpha=5.0, weight_decay=0.1)

    @eqx.filter_jit(donate="all-except-first")
    def step(kept: Any, net: Any, state: Any) -> Any:
        optim, scale = kept
        loss, grads = eqx.filter_value_and_grad(loss_fn)(net, scale)
        updates, state = eqx_ademamix.update(optim, grads, state, net)
        return eqx.apply_updates(net, updates), state, loss

    carry = copy(net), eqx_ademamix.init(optim, net)
    return Loop(lambda carry: step((optim, scale), *carry[:2]), carry)


def flat(side: Side, net: Net, scale: jax.Array) -> Loop:
    """The same program, called with tuples of arrays: what the call itself costs."""
    arrays, rest = eqx.partition(copy(net), eqx.is_inexact_array)
    carry, treedef = jax.tree.flatten((arrays, side.init(arrays)))

    def step(scale: Any, flat: Any) -> Any:
        arrays, state = treedef.unflatten(flat)
        loss, grads = eqx.filter_value_and_grad(
            lambda arrays: loss_fn(eqx.combine(arrays, rest), scale)
        )(arrays)
        return tuple(jax.tree.leaves(side.step(arrays, state, grads))), loss

    jitted: Any = jax.jit(step, donate_argnums=1)
    return Loop(lambda carry: jitted(scale, carry[0]), (tuple(carry), None))


def made(net: Net, scale: jax.Array, **options: Any) -> Loop:
    """The loop with `make_step`."""
    optim = eqx_ademamix.AdEMAMix(1e-3, b3=0.9999, alpha=5.0, weight_decay=0.1)
    step = eqx_ademamix.make_step(loss_fn, optim, **options)
    steps = options.get("steps_per_call", 1)
    batch = scale if steps == 1 else jnp.full(steps, scale)
    return Loop(
        lambda carry: step(carry[0], batch),
        (step.init(net), None),
        every=steps,
        unpack=lambda carry: step.unpack(carry[0]),
    )
