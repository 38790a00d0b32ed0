"""The functional interface that every optimizer of this package has."""

import abc
from typing import Any, Generic, TypeVar

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from ._checks import check_optimizer, no_type_check


State = TypeVar("State")


class AbstractOptimizer(eqx.Module, Generic[State]):
    """The interface of an optimizer: hyperparameters in fields, two pure methods.

    An optimizer also stands wherever optax takes a `GradientTransformation` by its
    `init` and `update`, for example in `optax.chain`.
    """

    @abc.abstractmethod
    def init(self, params: PyTree[Any]) -> State:
        """See [`eqx_ademamix.init`][]."""

    @abc.abstractmethod
    def update(
        self, grads: PyTree[Any], state: State, params: PyTree[Any] | None = None
    ) -> tuple[PyTree[Any], State]:
        """See [`eqx_ademamix.update`][]."""


def hash_of(optim: AbstractOptimizer[Any]) -> int:
    """A hash for the class of an optimizer to return, which Equinox asks of each class:
    `jax.jit(optim.update)` needs one also if there is a mask in a dict, or an array."""
    leaves, treedef = jtu.tree_flatten(optim)
    types = ((x.shape, x.dtype) if eqx.is_array(x) else x for x in leaves)
    return hash((treedef, *types))


def next_count(count: Array) -> Array:
    """`count + 1`, saturating: a counter that wraps would start the schedules anew."""
    return jnp.minimum(count, jnp.iinfo(jnp.int32).max - 1) + 1


@no_type_check
def init(optim: AbstractOptimizer[State], params: PyTree[Any]) -> State:
    """Makes the state with which training starts.

    **Arguments:**

    - `optim`: the optimizer.
    - `params`: the whole model. Its inexact (floating-point or complex) arrays that
        `optim.trainable` selects get a state; functions, integers, booleans, strings
        and `None` may be anywhere in it and get none.

    **Returns:**

    The state: a PyTree of arrays, zero everywhere.

    **Raises:**

    - `ValueError`: if there is nothing to train, or if `trainable` or
        `weight_decay_mask` do not fit the model.

    !!! Example

        ```python
        import equinox as eqx
        import jax
        import eqx_ademamix

        model = eqx.nn.MLP(2, 1, width_size=8, depth=1, key=jax.random.key(0))
        optim = eqx_ademamix.AdEMAMix(learning_rate=1e-3)
        state = eqx_ademamix.init(optim, model)
        ```
    """
    check_optimizer(optim, AbstractOptimizer)
    return optim.init(params)


@no_type_check
def update(
    optim: AbstractOptimizer[State],
    grads: PyTree[Any],
    state: State,
    params: PyTree[Any] | None = None,
) -> tuple[PyTree[Any], State]:
    """Takes one step.

    **Arguments:**

    - `optim`: the optimizer.
    - `grads`: the gradients, as `eqx.filter_grad` returns them: the model's own
        structure, with an array of the parameter's shape at every trained leaf. Those
        at leaves that are not trained are ignored.
    - `state`: the state that `init` or the last `update` returned.
    - `params`: the whole model. Needed for weight decay, and for the updates to have
        the parameters' dtypes (without it they have the gradients').

    **Returns:**

    A 2-tuple of the updates, which go into `eqx.apply_updates(model, updates)` (`None`
    where a leaf is not trained), and the next state, whose shapes, dtypes and tree
    structure are those of `state`.

    **Raises:**

    - `ValueError` or `TypeError`: if the trees do not fit together. The message names
        the tree path, what was found there and what was expected.

    !!! Example

        ```python
        import equinox as eqx
        import jax
        import jax.numpy as jnp
        import eqx_ademamix

        model = eqx.nn.MLP(2, 1, width_size=8, depth=1, key=jax.random.key(0))
        optim = eqx_ademamix.AdEMAMix(learning_rate=1e-3)
        state = eqx_ademamix.init(optim, model)
        grads = eqx.filter_grad(lambda m: m(jnp.ones(2)).sum())(model)
        updates, state = eqx_ademamix.update(optim, grads, state, model)
        model = eqx.apply_updates(model, updates)
        ```
    """
    check_optimizer(optim, AbstractOptimizer)
    return optim.update(grads, state, params)
