"""The functional interface: for every optimizer of this package and of optax."""

import abc
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar, overload, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jaxtyping import Array, PyTree

from ._checks import check_for_optax, check_gradient, check_not_empty, check_optimizer
from ._filters import as_gradient, trained_arrays
from ._numerics import in_type_of
from ._paths import align, flatten
from ._typing import no_type_check


State = TypeVar("State")


class AbstractOptimizer(eqx.Module, Generic[State]):
    """The interface of an optimizer: hyperparameters in fields, two pure methods.

    You can also use an optimizer anywhere optax needs only the `init` and `update` of a
    `GradientTransformation`, for example in `optax.chain`.
    """

    @abc.abstractmethod
    def init(self, params: PyTree) -> State:
        """See [`eqx_ademamix.init`][]."""

    @abc.abstractmethod
    def update(
        self,
        grads: PyTree,
        state: State,
        params: PyTree | None = None,
        **extra_args: object,
    ) -> tuple[PyTree, State]:
        """See [`eqx_ademamix.update`][]."""


@runtime_checkable
class OptaxOptimizer(Protocol):
    """An `optax.GradientTransformation`, an `optax.MultiSteps`, or anything else with
    the same two methods."""

    @property
    def init(self) -> Callable[..., Any]: ...

    @property
    def update(self) -> Callable[..., Any]: ...


def hash_of(optim: AbstractOptimizer[Any]) -> int:
    """The hash of an optimizer. Equinox expects each class to define its own
    `__hash__`. `jax.jit(optim.update)` needs one even if a field is an array, or a mask
    in a dict."""
    leaves, treedef = jtu.tree_flatten(optim)
    types = ((x.shape, x.dtype) if eqx.is_array(x) else x for x in leaves)
    return hash((treedef, *types))


@overload
def init(optim: AbstractOptimizer[State], params: PyTree) -> State: ...
@overload
def init(optim: OptaxOptimizer, params: PyTree) -> Any: ...
@no_type_check
def init(optim: AbstractOptimizer[Any] | OptaxOptimizer, params: PyTree) -> Any:
    """Makes the initial state.

    **Arguments:**

    - `optim`: an optimizer of this package, or of optax: an
        `optax.GradientTransformation` such as `optax.chain(...)`, or an
        `optax.MultiSteps`.
    - `params`: the whole model. The inexact (floating-point or complex) arrays that
        `optim.trainable` selects get a state. An optax optimizer gets all inexact
        arrays. Functions, integers, booleans, strings, and `None` may be anywhere in
        the model and get no state. A `jax.ShapeDtypeStruct` may replace the array that
        it describes.

    **Returns:**

    The state: a PyTree of arrays of zeros, or what the optax optimizer returned.

    **Raises:**

    - `ValueError` or `TypeError`: if there is nothing to train, if `trainable` or
        `weight_decay_mask` does not fit the model, or if `optim` is not an optimizer.

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
    check_optimizer(optim)
    if isinstance(optim, AbstractOptimizer):
        return optim.init(params)
    arrays = trained_arrays(True, flatten(params), or_structs=True)
    check_not_empty(params, arrays)
    return optim.init(arrays.rebuilt(arrays.values))


@overload
def update(
    optim: AbstractOptimizer[State],
    grads: PyTree,
    state: State,
    params: PyTree | None = None,
    **extra_args: object,
) -> tuple[PyTree, State]: ...
@overload
def update(
    optim: OptaxOptimizer,
    grads: PyTree,
    state: Any,
    params: PyTree | None = None,
    **extra_args: object,
) -> tuple[PyTree, Any]: ...
@no_type_check
def update(
    optim: AbstractOptimizer[Any] | OptaxOptimizer,
    grads: PyTree,
    state: Any,
    params: PyTree | None = None,
    **extra_args: object,
) -> tuple[PyTree, Any]:
    """Takes one step.

    **Arguments:**

    - `optim`: an optimizer of this package or of optax, as in [`eqx_ademamix.init`][].
    - `grads`: the gradients, as `eqx.filter_grad` returns them: with the structure of
        the model and an array of the parameter's shape at every trained leaf. Gradients
        at leaves that are not trained are ignored.
    - `state`: the state that `init` or the last `update` returned.
    - `params`: the whole model. It is needed for weight decay and for updates in the
        parameters' dtypes. Without it, updates have the gradients' dtypes.
    - `extra_args`: extra arguments of optax. For example,
        `optax.contrib.reduce_on_plateau` needs `value=loss`. An optimizer ignores extra
        arguments that it does not use.

    **Returns:**

    A 2-tuple of the updates, for `eqx.apply_updates(model, updates)` (`None` at leaves
    that are not trained), and the next state, which has the shapes, dtypes, and tree
    structure of `state`.

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
    check_optimizer(optim)
    if isinstance(optim, AbstractOptimizer):
        return optim.update(grads, state, params, **extra_args)
    return _update_by_optax(optim, grads, state, params, extra_args)


def _update_by_optax(
    optim: OptaxOptimizer,
    grads: PyTree,
    state: Any,
    params: PyTree | None,
    extra_args: dict[str, Any],
) -> tuple[PyTree, Any]:
    """Takes a step with an optax optimizer, which gets only the arrays of the trees."""
    g = _gradients(grads)
    if isinstance(optim, optax.GradientTransformation):
        optim = optax.with_extra_args_support(optim)
    if params is None:
        return optim.update(g, state, None, **extra_args)
    arrays = trained_arrays(True, flatten(params))
    aligned = align(g, arrays)
    check_for_optax(aligned, arrays)
    g, p = (arrays.rebuilt(values) for values in (aligned.values, arrays.values))
    updates, state = optim.update(g, state, p, **extra_args)
    # optax leaves it to `optax.apply_updates` to keep the parameters' dtypes.
    return jax.tree.map(_in_dtype_of, p, updates), state


def _gradients(grads: PyTree) -> PyTree:
    leaves = flatten(grads)
    leaves = leaves._replace(values=[as_gradient(x) for x in leaves.values])
    for path, x in zip(leaves.paths, leaves.values, strict=True):
        check_gradient(path, x)
    return leaves.rebuilt(leaves.values)


def _in_dtype_of(param: Array, update: Array) -> Array:
    is_complex = [jnp.iscomplexobj(x) for x in (param, update)]
    return in_type_of(param, update) if is_complex[0] == is_complex[1] else update
