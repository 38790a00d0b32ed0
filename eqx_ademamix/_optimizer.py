"""The functional interface that every optimizer of this package has."""

import abc
from typing import Any, Generic, TypeVar

import equinox as eqx
import jax.tree_util as jtu
from jaxtyping import PyTree

from ._checks import check_optimizer
from ._typing import no_type_check


State = TypeVar("State")


class AbstractOptimizer(eqx.Module, Generic[State]):
    """The interface of an optimizer: hyperparameters in fields, two pure methods.

    You can also use an optimizer anywhere optax accepts a `GradientTransformation` by
    its `init` and `update`, for example in `optax.chain`.
    """

    @abc.abstractmethod
    def init(self, params: PyTree) -> State:
        """See [`eqx_ademamix.init`][]."""

    @abc.abstractmethod
    def update(
        self, grads: PyTree, state: State, params: PyTree | None = None
    ) -> tuple[PyTree, State]:
        """See [`eqx_ademamix.update`][]."""


def hash_of(optim: AbstractOptimizer[Any]) -> int:
    """The hash of an optimizer. Equinox wants each class to define its own `__hash__`.
    `jax.jit(optim.update)` needs one even if a field is an array, or a mask in a
    dict."""
    leaves, treedef = jtu.tree_flatten(optim)
    types = ((x.shape, x.dtype) if eqx.is_array(x) else x for x in leaves)
    return hash((treedef, *types))


@no_type_check
def init(optim: AbstractOptimizer[State], params: PyTree) -> State:
    """Makes the state with which training starts.

    **Arguments:**

    - `optim`: the optimizer.
    - `params`: the whole model. Those of its inexact (floating-point or complex) arrays
        that `optim.trainable` selects get a state. Functions, integers, booleans,
        strings and `None` may be anywhere in it, and get none.

    **Returns:**

    The state: a PyTree of arrays of zeros.

    **Raises:**

    - `ValueError`: if there is nothing to train, or if `trainable` or
        `weight_decay_mask` does not fit the model.

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
    grads: PyTree,
    state: State,
    params: PyTree | None = None,
) -> tuple[PyTree, State]:
    """Takes one step.

    **Arguments:**

    - `optim`: the optimizer.
    - `grads`: the gradients, as `eqx.filter_grad` returns them: the structure of the
        model, with an array of the parameter's shape at every trained leaf. Gradients
        at leaves that are not trained are ignored.
    - `state`: the state that `init` or the last `update` returned.
    - `params`: the whole model. It is needed for weight decay, and for updates in the
        parameters' dtypes. Without it, updates have the gradients' dtypes.

    **Returns:**

    A 2-tuple of the updates, which go into `eqx.apply_updates(model, updates)` (`None`
    at leaves that are not trained), and the next state, which has the shapes, dtypes
    and tree structure of `state`.

    **Raises:**

    - `ValueError` or `TypeError`: if the trees do not fit together. The message names
        the tree path, what was found there, and what was expected.

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
