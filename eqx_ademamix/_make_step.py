"""The training step, compiled once, with the model as a flat tuple between calls."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, PyTree

from ._carry import (
    NAMES,
    Layout,
    Placement,
    Structure,
    TrainCarry,
    as_placed,
    carry_of,
    check_stable,
    copies_of,
    copy_of,
    described,
    is_array,
    is_concrete,
    placement_of,
    statics_of,
    strongly_typed,
    type_of,
)
from ._checks import check_alive, check_optimizer
from ._hyperparams import checked_flag
from ._memory import is_in_host
from ._optimizer import AbstractOptimizer, OptaxOptimizer, init, update
from ._paths import (
    Node,
    Path,
    PyTreeDef,
    align,
    contrast,
    describe,
    flatten,
    path_text,
)
from ._typing import no_type_check


#
# The step
#


class _Functions(NamedTuple):
    """What the user passes: the loss, the optimizer, and the transformation."""

    loss_fn: Callable[..., Any]
    optim: AbstractOptimizer[Any] | OptaxOptimizer
    grad_transform: OptaxOptimizer | None


class TrainStep:
    """A compiled training step. [`eqx_ademamix.make_step`][] makes it."""

    @no_type_check
    def __init__(
        self,
        functions: _Functions,
        has_aux: bool,
        steps_per_call: int,
        pack_below: int,
        donate: bool,
    ):
        """Use [`eqx_ademamix.make_step`][] instead."""
        # The arrays of the optimizer (and of a loss that is a module) are arguments of
        # the compiled call: as constants, they would be rounded differently.
        self._arrays, self._rest = eqx.partition(functions, is_array)
        self._has_aux = has_aux
        self._steps_per_call = steps_per_call
        self._pack_below = pack_below
        self._owner = object()
        self._layouts: list[Layout] = []
        self._constants = tuple(jtu.tree_leaves(self._arrays))
        self._compiled = jax.jit(
            self._train_step, donate_argnums=(0,) if donate else ()
        )
        self._separate = jax.jit(self._leaves)

    @no_type_check
    def init(self, model: PyTree, *, model_state: PyTree = None) -> TrainCarry:
        """Makes the initial carry.

        **Arguments:**

        - `model`: the whole model. Its arrays are copied, so the model stays yours.
        - `model_state`: what `loss_fn` reads and returns besides the model, usually an
            `eqx.nn.State`. It is copied as well.

        **Returns:**

        The carry: an [`eqx_ademamix.TrainCarry`][] with the model, a new optimizer
        state, and the `model_state`.

        **Raises:**

        - `ValueError` or `TypeError`: as in [`eqx_ademamix.init`][].
        """
        return self._packed(model, self._new_state(model), model_state)

    @no_type_check
    def pack(
        self, model: PyTree, state: PyTree, *, model_state: PyTree = None
    ) -> TrainCarry:
        """Makes a carry from a model and its optimizer state, for example after loading
        a checkpoint or after `unpack`.

        **Arguments:**

        - `model`: the whole model. Everything is copied.
        - `state`: the optimizer state, as `unpack` or [`eqx_ademamix.init`][]`(optim,
            model)` returns it. With `grad_transform`, it is a pair, as for
            `optax.chain(grad_transform, optim)`.
        - `model_state`: as in `init`.

        **Returns:**

        The carry.

        **Raises:**

        - `ValueError` or `TypeError`: if the state does not fit the model and the
            optimizer. The message names the tree path.
        """
        expected = eqx.filter_eval_shape(self._new_state, model)
        _check_state(state, expected, self._rest.grad_transform is not None)
        return self._packed(model, state, model_state)

    @no_type_check
    def unpack(self, carry: TrainCarry) -> tuple[PyTree, ...]:
        """The model and the state in a carry. They are copied, so they stay valid after
        the next call.

        **Arguments:**

        - `carry`: the carry, as `init`, `pack`, or the last call returned it.

        **Returns:**

        A 2-tuple of the model and the optimizer state. If the carry was made with a
        `model_state`, a 3-tuple, with the `model_state` at the end.

        **Raises:**

        - `ValueError` or `TypeError`: if the carry is not one of this step, or if its
            arrays were donated to a call.
        """
        self._check_carry(carry)
        _check_not_donated(carry)
        layout = carry.layout
        leaves = self._separate(carry.arrays, layout.as_structure)
        return layout.tree([copy_of(x) if is_in_host(x) else x for x in leaves])

    @no_type_check
    def __call__(self, carry: TrainCarry, *batch: PyTree) -> tuple[TrainCarry, Any]:
        """Takes one step, or `steps_per_call` of them.

        **Arguments:**

        - `carry`: the carry, as `init`, `pack`, or the last call returned it. With
            `donate=True`, it can be used only once.
        - `batch`: what `loss_fn` gets after the model: trees of arrays and numbers,
            which are traced. With `steps_per_call=k`, the first axis of every array has
            size `k`, and each step gets one entry.

        **Returns:**

        A 2-tuple of the next carry and the loss before the step. With `has_aux`, of
        the next carry and the pair `(loss, aux)`. With `steps_per_call=k`, each of
        their arrays has a new first axis of size `k`.

        **Raises:**

        - `ValueError` or `TypeError`: if the carry is not one of this step or has been
            used before, or if the batch or what `loss_fn` returns does not fit. The
            batch and the loss are checked while compiling, at no cost later.
        """
        if type(carry) is not TrainCarry or carry.layout.owner is not self._owner:
            self._check_carry(carry)
        try:
            arrays, out, after = self._compiled(
                carry.arrays, self._constants, batch, carry.layout.as_structure
            )
            return carry_of(arrays, self._layouts[len(after)]), out
        except Exception as e:
            error = e
        self._explain(error, carry, batch)
        raise error

    def __deepcopy__(self, memo: dict[int, Any]) -> "TrainStep":
        """The step itself: what it keeps belongs to its compiled functions."""
        return self

    #
    # Between a carry and its trees
    #

    def _new_state(self, model: PyTree) -> PyTree:
        _, optim, transform = self._functions(self._constants)
        state = init(optim, model)
        return state if transform is None else (init(transform, model), state)

    def _packed(self, model: PyTree, state: PyTree, model_state: PyTree) -> TrainCarry:
        for name, tree in zip(NAMES, (model, state, model_state), strict=True):
            check_alive(name, tree)
            _check_has_numbers(name, tree)
        rest = () if model_state is None else (model_state,)
        # optax starts some states with weakly typed numbers, which a step makes strong.
        # Then the second call would compile again.
        states = jax.tree.map(strongly_typed, (state, *rest))
        leaves, treedef = jtu.tree_flatten((model, *states))
        copies = copies_of([x for x in leaves if is_array(x)])
        placements = [placement_of(x, self._pack_below) for x in copies]
        layout = self._layout(treedef, statics_of(leaves), copies, placements)
        return carry_of(layout.stored(copies), layout)

    def _layout(
        self,
        treedef: PyTreeDef,
        statics: Sequence[Node],
        arrays: Sequence[Array],
        placements: Sequence[Placement],
    ) -> Layout:
        """The layout of a tree: the one that the step already knows, or a new one."""
        types, index = [type_of(x) for x in arrays], len(self._layouts)
        new = Layout(self._owner, index, treedef, statics, types, placements)
        for layout in self._layouts:
            if layout.is_like(new):
                return layout
        self._layouts.append(new)
        return new

    def _leaves(self, stored: tuple[Array, ...], index: Structure) -> list[Array]:
        leaves = self._layouts[len(index)].leaves(stored)
        return [x if is_in_host(x) else jnp.copy(x) for x in leaves]

    def _functions(self, constants: Sequence[Array]) -> _Functions:
        treedef = jtu.tree_structure(self._arrays)
        return eqx.combine(treedef.unflatten(constants), self._rest)

    #
    # Inside the compiled call
    #

    def _train_step(
        self,
        stored: tuple[Array, ...],
        constants: tuple[Array, ...],
        batch: tuple[PyTree, ...],
        index: Structure,
    ) -> tuple[tuple[Array, ...], PyTree, Structure]:
        layout, functions = self._layouts[len(index)], self._functions(constants)
        if self._steps_per_call == 1:
            leaves = layout.leaves(stored)
            leaves, out, after = self._one(functions, layout, leaves, batch)
            check_stable(layout, after, types_too=False)
            return after.stored(leaves), out, after.as_structure
        _check_stacked(batch, self._steps_per_call)

        def body(leaves: list[Array], batch: PyTree) -> tuple[list[Array], PyTree]:
            leaves, out, after = self._one(functions, layout, leaves, batch)
            check_stable(layout, after, types_too=True)
            return leaves, out

        leaves, outs = lax.scan(
            body, layout.leaves(stored), batch, length=self._steps_per_call
        )
        leaves = as_placed(leaves, layout.placements)
        # The loop may have made weak types strong.
        after = self._layout(layout.treedef, layout.statics, leaves, layout.placements)
        return after.stored(leaves), outs, after.as_structure

    def _one(
        self,
        functions: _Functions,
        layout: Layout,
        leaves: Sequence[Array],
        batch: tuple[PyTree, ...],
    ) -> tuple[list[Array], PyTree, Layout]:
        """One step: the arrays after it, what it returns, and their layout."""
        model, state, *rest = layout.tree(leaves)
        tree, out = self._step(functions, model, state, rest, batch)
        leaves, treedef = jtu.tree_flatten(tree)
        arrays = [x for x in leaves if is_array(x)]
        placements = layout.placements
        if len(arrays) != len(placements):  # an error that `check_stable` raises
            placements = [placement_of(x, self._pack_below) for x in arrays]
        arrays = as_placed(arrays, placements)
        after = self._layout(treedef, statics_of(leaves), arrays, placements)
        return arrays, out, after

    def _step(
        self,
        functions: _Functions,
        model: PyTree,
        state: PyTree,
        rest: list[PyTree],
        batch: tuple[PyTree, ...],
    ) -> tuple[PyTree, PyTree]:
        """The training step that users write by hand."""
        loss_fn, optim, transform = functions
        # Equinox invalidates an `eqx.nn.State` once another one is made from it, and
        # the optimizer may evaluate the loss again. So each evaluation gets its own.
        leaves, treedef = jtu.tree_flatten(rest)

        def evaluate(model: PyTree) -> tuple[Array, tuple[list[PyTree], PyTree]]:
            out = loss_fn(model, *treedef.unflatten(leaves), *batch)
            return _parted(out, bool(rest), self._has_aux)

        grad_fn = eqx.filter_value_and_grad(evaluate, has_aux=True)
        (loss, (rest, aux)), grads = grad_fn(model)
        extra_args = {
            "value": loss,
            "grad": grads,
            "value_fn": jtu.Partial(lambda p: evaluate(eqx.combine(p, model))[0]),
        }
        if transform is None:
            updates, state = _updated(optim, grads, state, model, extra_args)
        else:
            grads, first = _updated(transform, grads, state[0], model, extra_args)
            updates, second = _updated(optim, grads, state[1], model, extra_args)
            state = first, second
        out = (loss, aux) if self._has_aux else loss
        return (eqx.apply_updates(model, updates), state, *rest), out

    #
    # Errors
    #

    def _check_carry(self, carry: object) -> None:
        if not isinstance(carry, TrainCarry):
            raise TypeError(
                f"`carry` is {describe(carry)}, but a carry was expected, as "
                "`step.init(model)` and `step.pack(model, state)` make it. A call "
                "returns the next one first: `carry, loss = step(carry, *batch)`."
            )
        if getattr(carry.layout, "owner", None) is not self._owner:
            raise ValueError(
                "`carry` was made by another step. Take it apart with the step that "
                "made it, and call `step.pack(model, state)`."
            )

    def _explain(
        self, error: Exception, carry: TrainCarry, batch: tuple[PyTree, ...]
    ) -> None:
        """Raises a clearer error after a call has failed, if the cause is one that
        would cost time if every call checked for it."""
        if "deleted" in str(error):
            _check_not_donated(carry)
            for name, tree in self._arrays._asdict().items():
                check_alive(name, tree)
            check_alive("batch", batch)
        if isinstance(error, TypeError):
            _check_batch(batch)


def _updated(
    optim: AbstractOptimizer[Any] | OptaxOptimizer,
    grads: PyTree,
    state: PyTree,
    model: PyTree,
    extra_args: dict[str, Any],
) -> tuple[PyTree, PyTree]:
    """`update`, with those extra arguments that the optimizer accepts."""
    is_plain = isinstance(optim, optax.GradientTransformation) and not isinstance(
        optim, optax.GradientTransformationExtraArgs
    )
    if not is_plain and not isinstance(optim, AbstractOptimizer):
        accepted = inspect.signature(optim.update).parameters
        kinds = [p.kind for p in accepted.values()]
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            extra_args = {k: x for k, x in extra_args.items() if k in accepted}
    return update(optim, grads, state, model, **extra_args)


def _parted(
    out: Node, has_state: bool, has_aux: bool
) -> tuple[Array, tuple[list[PyTree], PyTree]]:
    """What the loss function returned, checked and split into its parts."""
    forms = {
        (False, True): "(loss, aux)",
        (True, False): "(loss, model_state)",
        (True, True): "(loss, (model_state, aux))",
    }
    form = forms.get((has_state, has_aux))
    loss, rest = (out, None) if form is None else _pair(out, form)
    _check_loss(loss)
    if not has_state:
        model_state, aux = [], rest
    elif has_aux:
        state, aux = _pair(rest, "(model_state, aux)", "a loss and ")
        model_state = [state]
    else:
        model_state, aux = [rest], None
    _check_aux(aux)
    return loss, (model_state, aux)


def _pair(x: Node, form: str, before: str = "") -> tuple[Any, Any]:
    if not isinstance(x, tuple) or len(x) != 2:
        raise ValueError(
            f"`loss_fn` returned {before}{describe(x)}, but the pair `{form}` was "
            "expected: `aux` if `has_aux` is true, and `model_state` if the carry was "
            "made with one."
        )
    return x


def _check_loss(loss: Node) -> None:
    dtype = getattr(loss, "dtype", None)
    is_real = dtype is not None and jnp.issubdtype(dtype, jnp.floating)
    if not is_array(loss) or not is_real or loss.shape != ():
        raise ValueError(
            f"`loss_fn` returned {describe(loss)} as the loss, but a floating-point "
            "array of shape () was expected. Reduce it, for example with `jnp.mean`. "
            "If `loss_fn` returns more than the loss, pass `has_aux=True`."
        )


def _check_aux(aux: PyTree) -> None:
    for path, x in jtu.tree_leaves_with_path(aux):
        if not _is_traceable(x):
            raise TypeError(
                f"aux{path_text(path)} is {describe(x)}, but `loss_fn` can return only "
                "arrays and numbers besides the loss, since it is compiled."
            )


def _is_traceable(x: Node) -> bool:
    if isinstance(x, (np.ndarray, np.generic)):
        return x.dtype.kind not in "OSUMm"  # objects, text, and times
    return isinstance(x, (jax.Array, bool, int, float, complex))


def _check_batch(batch: tuple[PyTree, ...]) -> None:
    for path, x in jtu.tree_leaves_with_path(batch):
        if not _is_traceable(x):
            raise TypeError(
                f"batch{path_text(path)} is {describe(x)}, but a batch has only arrays "
                "and numbers, which are traced. Let `loss_fn` close over everything "
                "else."
            )


def _check_stacked(batch: tuple[PyTree, ...], steps: int) -> None:
    for path, x in jtu.tree_leaves_with_path(batch):
        if np.shape(x)[:1] != (steps,):
            raise ValueError(
                f"batch{path_text(path)} has shape {np.shape(x)}, but with "
                f"`steps_per_call={steps}` the first axis of every array has size "
                f"{steps}, one entry for each step. Stack the batches."
            )


def _check_has_numbers(name: str, tree: PyTree) -> None:
    for path, x in jtu.tree_leaves_with_path(tree):
        if isinstance(x, jax.ShapeDtypeStruct):
            raise ValueError(
                f"{name}{path_text(path)} is a `jax.ShapeDtypeStruct`, which has no "
                "numbers to train. Pass arrays."
            )


def _check_not_donated(carry: TrainCarry) -> None:
    if any(is_concrete(x) and x.is_deleted() for x in carry.arrays):
        raise ValueError(
            "`carry` was used by an earlier call, to which its arrays were donated. "
            "Pass on the carry that this call returned. If it failed, continue from an "
            "earlier `step.unpack(carry)`, or use `donate=False`."
        )


def _check_state(state: PyTree, expected: PyTree, is_pair: bool) -> None:
    """Checks that a state has the structure and the shapes that `init` gives."""
    like = flatten(expected)
    values, departures = align(state, like)
    hint = " With `grad_transform`, `state` is the pair of both states."
    for path, found, wanted, is_static in departures:
        if not is_static and jtu.tree_leaves((found, wanted)):
            texts = contrast(found, wanted)
            if isinstance(wanted, jax.ShapeDtypeStruct):
                texts = describe(found), described(wanted)
            _raise_other_state(path, *texts, hint if is_pair else "")
    for path, x, wanted in zip(like.paths, values, like.values, strict=True):
        if getattr(x, "shape", None) != getattr(wanted, "shape", None):
            _raise_other_state(path, describe(x), described(wanted), "")


def _raise_other_state(path: Path, found: str, expected: str, hint: str) -> NoReturn:
    raise ValueError(
        f"state{path_text(path)} is {found}, but for this model and optimizer it is "
        f"{expected}. Pass the state that belongs to the model.{hint}"
    )


#
# The interface
#


@no_type_check
def make_step(
    loss_fn: Callable[..., Any],
    optim: AbstractOptimizer[Any] | OptaxOptimizer,
    *,
    has_aux: bool = False,
    grad_transform: OptaxOptimizer | None = None,
    steps_per_call: int = 1,
    pack_below: int = 0,
    donate: bool = True,
) -> TrainStep:
    r"""Compiles a training step that spends little time in Python.

    It is the step that you would write by hand:

    ```python
    import equinox as eqx
    import eqx_ademamix


    @eqx.filter_jit
    def step(optim, model, state, *batch):
        loss, grads = eqx.filter_value_and_grad(loss_fn)(model, *batch)
        updates, state = eqx_ademamix.update(optim, grads, state, model)
        return eqx.apply_updates(model, updates), state, loss
    ```

    and by default it gives the same numbers, bit for bit. But `eqx.filter_jit` takes
    the model and the state apart at each call and puts them back together, which for a
    small model takes longer than the step itself. Here the model and the state are a
    flat tuple of arrays from the first call to the last: a carry.

    **Arguments:**

    - `loss_fn`: `loss_fn(model, *batch)`, which returns the loss, a real scalar. The
        gradients are with respect to all inexact arrays of the model. If the carry was
        made with a `model_state`, it is `loss_fn(model, model_state, *batch)` and
        returns `(loss, model_state)`.
    - `optim`: an optimizer of this package or of optax, as in [`eqx_ademamix.init`][].
        It also gets optax's extra arguments `value` (the loss), `grad`, and `value_fn`,
        for `optax.contrib.reduce_on_plateau` or a line search.
    - `has_aux`: whether `loss_fn` returns a second value, of arrays and numbers:
        `(loss, aux)`, or `(loss, (model_state, aux))`.
    - `grad_transform`: an optax transformation of the gradients before `optim`, such as
        `optax.clip_by_global_norm(1.0)`, or `None`. The state is then a pair of its
        state and that of `optim`, as for `optax.chain(grad_transform, optim)`.
    - `steps_per_call`: the number of steps that a call takes, in a loop inside the
        compiled program. Each array of the batch then has a first axis of this size.
    - `pack_below`: the number of entries below which arrays of one dtype share one
        buffer between calls. With many small arrays, calls are faster, and compiling
        takes longer. Results may differ by rounding.
    - `donate`: whether a call overwrites the arrays of the carry that it gets. If so, a
        carry can be used once, and only one copy of the model and the state exists.

    Arrays in the optimizer, such as a `learning_rate`, are read when you call
    `make_step`. They are inputs of the compiled program, not constants of it.

    **Returns:**

    The step, an [`eqx_ademamix.TrainStep`][]: `step.init(model)` or `step.pack(model,
    state)` makes a carry, `carry, loss = step(carry, *batch)` takes a step, and
    `model, state = step.unpack(carry)` ends or interrupts the training.

    **Raises:**

    - `ValueError` or `TypeError`: if an argument does not fit its description above.

    !!! Example

        ```python
        import equinox as eqx
        import jax
        import jax.numpy as jnp
        import optax
        import eqx_ademamix


        def loss_fn(model, x, y):
            return jnp.mean((jax.vmap(model)(x) - y) ** 2)


        model = eqx.nn.MLP(2, 1, width_size=8, depth=1, key=jax.random.key(0))
        optim = eqx_ademamix.AdEMAMix(1e-3)
        clip = optax.clip_by_global_norm(1.0)
        step = eqx_ademamix.make_step(loss_fn, optim, grad_transform=clip)

        x = jax.random.normal(jax.random.key(1), (16, 2))
        y = jnp.sum(x, axis=1, keepdims=True)
        carry = step.init(model)
        for _ in range(3):
            carry, loss = step(carry, x, y)
        model, state = step.unpack(carry)
        ```
    """
    if not callable(loss_fn):
        raise TypeError(
            f"`loss_fn` is {describe(loss_fn)}, but a function was expected. The order "
            "of arguments is `make_step(loss_fn, optim)`."
        )
    check_optimizer(optim)
    if grad_transform is not None:
        _check_transform(grad_transform)
    return TrainStep(
        _Functions(loss_fn, optim, grad_transform),
        checked_flag("has_aux", has_aux),
        _checked_int("steps_per_call", steps_per_call, 1),
        _checked_int("pack_below", pack_below, 0),
        checked_flag("donate", donate),
    )


def _check_transform(transform: object) -> None:
    methods = [getattr(transform, name, None) for name in ("init", "update")]
    if isinstance(transform, type) or not all(map(callable, methods)):
        raise TypeError(
            f"`grad_transform` is {describe(transform)}, but an optax transformation "
            "was expected, for example `optax.clip_by_global_norm(1.0)`, or None."
        )


def _checked_int(name: str, value: object, least: int) -> int:
    is_int = isinstance(value, int | np.integer)
    if not is_int or isinstance(value, bool) or value < least:
        raise ValueError(
            f"`{name}` is {describe(value)}, but an integer >= {least} was expected."
        )
    return int(value)
