"""The training step, compiled once, with the model as a flat tuple between calls."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from jax import lax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from ._checks import check_alive, check_optimizer
from ._hyperparams import checked_flag
from ._numerics import DType
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


Optimizer = AbstractOptimizer[Any] | OptaxOptimizer
NAMES = ("model", "state", "model_state")
# A number that enters and leaves a compiled call without an array: JAX takes `None` for
# a node without leaves, so `n` of them are a part of the structure of the arguments.
Structure: TypeAlias = tuple[None, ...]


#
# What is known of the arrays without their values
#


class Type(NamedTuple):
    """The type of an array."""

    shape: tuple[int, ...]
    dtype: DType | Any  # a PRNG key has a dtype of its own kind
    weak_type: bool

    def __str__(self) -> str:
        weak = "weakly typed " if self.weak_type else ""
        return f"{weak}{self.dtype.name} of shape {self.shape}"


def type_of(x: Any) -> Type:
    return Type(x.shape, x.dtype, getattr(x, "weak_type", False))


def is_array(x: Node) -> bool:
    return isinstance(x, (jax.Array, np.ndarray, np.generic))


class Layout:
    """Where the arrays of a carry belong: the model and state without their arrays.

    A carry holds its layout as a static field. Layouts are compared by identity, which
    costs nothing, so a step keeps one layout for all carries that are alike.
    """

    def __init__(
        self,
        owner: object,
        index: int,
        treedef: PyTreeDef,
        statics: Sequence[Node],
        types: Sequence[Type],
        is_packed: Sequence[bool],
    ):
        self.owner = owner
        self.as_structure: Structure = (None,) * index
        self.treedef = treedef
        self.statics = statics  # `None` at the places of the arrays
        self.types = types
        self.is_packed = is_packed
        self.groups = _groups(types, is_packed)
        packed = {i for group in self.groups for i in group}
        self.rest = [i for i in range(len(types)) if i not in packed]

    def is_like(self, other: "Layout") -> bool:
        pairs = zip(self.statics, other.statics, strict=False)
        return (
            self.treedef == other.treedef
            and self.types == other.types
            and self.is_packed == other.is_packed
            and all(_is_same(a, b) for a, b in pairs)
        )

    @property
    def stored_types(self) -> list[Type]:
        """The types of what a carry holds: first the buffers, then the other arrays."""
        buffers = [
            Type((sum(map(self._size, group)),), self.types[group[0]].dtype, False)
            for group in self.groups
        ]
        return buffers + [self.types[i] for i in self.rest]

    def _size(self, i: int) -> int:
        return int(np.prod(self.types[i].shape))

    def stored(self, leaves: Sequence[Array]) -> tuple[Array, ...]:
        """What a carry holds, from the arrays in the order of the tree."""
        buffers = [
            jnp.concatenate([leaves[i].ravel() for i in group]) for group in self.groups
        ]
        return (*buffers, *(leaves[i] for i in self.rest))

    def leaves(self, stored: Sequence[Array]) -> list[Array]:
        """The arrays in the order of the tree, from what a carry holds."""
        self._check(stored)
        found = dict(zip(self.rest, stored[len(self.groups) :], strict=True))
        for group, buffer in zip(self.groups, stored, strict=False):
            start = 0
            for i in group:
                part = lax.slice_in_dim(buffer, start, start + self._size(i))
                found[i] = part.reshape(self.types[i].shape)
                start += self._size(i)
        return [found[i] for i in range(len(self.types))]

    def tree(self, leaves: Sequence[Array]) -> PyTree:
        """The model and state with these arrays."""
        arrays = iter(leaves)
        values = [next(arrays) if x is _ARRAY else x for x in self.statics]
        return self.treedef.unflatten(values)

    def _check(self, stored: Sequence[Array]) -> None:
        for i, (x, expected) in enumerate(zip(stored, self.stored_types, strict=True)):
            if type_of(x) != expected:
                raise ValueError(
                    f"carry.arrays[{i}] is {type_of(x)}, but it was {expected}. Change "
                    "the model and the state instead, and call `step.pack(model, "
                    "state)`. A batched carry needs `eqx.filter_vmap`."
                )


class _Slot:
    """Marks the place of an array among the leaves that are not arrays."""


_ARRAY = _Slot()


def _is_same(a: Node, b: Node) -> bool:
    return a is b or (type(a) is type(b) and bool(a == b))


def _groups(types: Sequence[Type], is_packed: Sequence[bool]) -> list[list[int]]:
    """The arrays that share a buffer, by dtype."""
    by_dtype: dict[Any, list[int]] = {}
    for i, (kind, flag) in enumerate(zip(types, is_packed, strict=True)):
        if flag:
            by_dtype.setdefault(kind.dtype, []).append(i)
    return [group for group in by_dtype.values() if len(group) > 1]


def _is_small(x: Array, pack_below: int) -> bool:
    """Whether an array may share a buffer with others of its dtype. Not if that would
    lose something: a weak type, a PRNG key, or a sharding."""
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.extended)
    if is_key or type_of(x).weak_type or x.size >= pack_below:
        return False
    return isinstance(x, Tracer) or x.sharding.is_fully_replicated


class TrainCarry(eqx.Module):
    """What a step from [`eqx_ademamix.make_step`][] carries from call to call: the
    model, the optimizer state, and the `model_state`, as arrays without structure.
    `step.unpack(carry)` gives it back.

    **Attributes:**

    - `arrays`: the arrays. With `pack_below`, first one buffer for each dtype.
    - `layout`: where they belong.
    """

    arrays: tuple[Array, ...]
    layout: Layout = eqx.field(static=True)


def _carry(arrays: tuple[Array, ...], layout: Layout) -> TrainCarry:
    """A carry, made as Equinox does when it unflattens a module: 15 us faster than by
    its constructor."""
    carry = object.__new__(TrainCarry)
    object.__setattr__(carry, "arrays", arrays)
    object.__setattr__(carry, "layout", layout)
    return carry


#
# Copies
#


def _copies(arrays: Sequence[Any]) -> list[Array]:
    """Copies, so that nothing of the user's is donated, and no array twice.

    Beside arrays on a mesh of devices, the others (the counters) are put on all of its
    devices. Otherwise the first call would put them there, and the second one would
    find arrays of another kind and compile again.
    """
    shardings = [getattr(x, "sharding", None) for x in arrays if _is_concrete(x)]
    meshes = [s.mesh for s in shardings if isinstance(s, NamedSharding)]
    everywhere = NamedSharding(meshes[0], PartitionSpec()) if meshes else None
    return [_copy(_placed(x, everywhere)) for x in arrays]


def _is_concrete(x: object) -> bool:
    return isinstance(x, jax.Array) and not isinstance(x, Tracer)


def _placed(x: Any, everywhere: NamedSharding | None) -> Any:
    if everywhere is None or isinstance(x, Tracer):
        return x
    is_on_mesh = _is_concrete(x) and isinstance(x.sharding, NamedSharding)
    return x if is_on_mesh else jax.device_put(x, everywhere)


_copy = jax.jit(jnp.copy)


#
# The step
#


class _Functions(NamedTuple):
    """What the user gives: the loss, the optimizer, and the transformation."""

    loss_fn: Callable[..., Any]
    optim: Any
    grad_transform: Any


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
        # the compiled call: as constants of it, they would be rounded differently.
        self._arrays, self._rest = eqx.partition(functions, is_array)
        self._has_aux = has_aux
        self._steps_per_call = steps_per_call
        self._pack_below = pack_below
        self._owner = object()
        self._layouts: list[Layout] = []
        self._constants = tuple(jtu.tree_leaves(self._arrays))
        self._compiled = jax.jit(self._call, donate_argnums=(0,) if donate else ())
        self._separate = jax.jit(self._leaves)

    @no_type_check
    def init(self, model: PyTree, *, model_state: PyTree = None) -> TrainCarry:
        """Makes the carry with which training starts.

        **Arguments:**

        - `model`: the whole model. Its arrays are copied, so the model stays yours.
        - `model_state`: what `loss_fn` reads and returns beside the model, usually an
            `eqx.nn.State`. It is copied as well.

        **Returns:**

        The carry: an [`eqx_ademamix.TrainCarry`][] with the model, a new optimizer
        state, and the `model_state`.

        **Raises:**

        - `ValueError` or `TypeError`: as [`eqx_ademamix.init`][].
        """
        return self._packed(model, self._new_state(model), model_state)

    @no_type_check
    def pack(
        self, model: PyTree, state: PyTree, *, model_state: PyTree = None
    ) -> TrainCarry:
        """Makes a carry from a model and its optimizer state, for example after a
        checkpoint, or after `unpack`.

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
        return layout.tree(leaves)

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
            used before, or if the batch or what `loss_fn` returns does not fit. All of
            these are found while compiling, at no cost later.
        """
        if type(carry) is not TrainCarry or carry.layout.owner is not self._owner:
            self._check_carry(carry)
        layout = carry.layout
        try:
            arrays, out, after = self._compiled(
                carry.arrays, self._constants, batch, layout.as_structure
            )
        except Exception:
            self._explain(carry, batch)
            raise
        return _carry(arrays, self._layouts[len(after)]), out

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
        rest = () if model_state is None else (model_state,)
        leaves, treedef = jtu.tree_flatten((model, state, *rest))
        copies = _copies([x for x in leaves if is_array(x)])
        is_packed = [_is_small(x, self._pack_below) for x in copies]
        layout = self._layout(leaves, treedef, copies, is_packed)
        return _carry(layout.stored(copies), layout)

    def _layout(
        self,
        leaves: Sequence[Node],
        treedef: PyTreeDef,
        arrays: Sequence[Array],
        is_packed: Sequence[bool],
    ) -> Layout:
        """The layout of a tree: the one that the step knows already, or a new one."""
        statics = [_ARRAY if is_array(x) else x for x in leaves]
        types = [type_of(x) for x in arrays]
        new = Layout(
            self._owner, len(self._layouts), treedef, statics, types, is_packed
        )
        for layout in self._layouts:
            if layout.is_like(new):
                return layout
        self._layouts.append(new)
        return new

    def _leaves(self, stored: tuple[Array, ...], index: Structure) -> list[Array]:
        return [jnp.copy(x) for x in self._layouts[len(index)].leaves(stored)]

    def _functions(self, constants: Sequence[Array]) -> _Functions:
        treedef = jtu.tree_structure(self._arrays)
        return eqx.combine(treedef.unflatten(constants), self._rest)

    #
    # Inside of the compiled call
    #

    def _call(
        self,
        stored: tuple[Array, ...],
        constants: tuple[Array, ...],
        batch: tuple[PyTree, ...],
        index: Structure,
    ) -> tuple[tuple[Array, ...], PyTree, Structure]:
        layout, functions = self._layouts[len(index)], self._functions(constants)
        if self._steps_per_call == 1:
            leaves, out, layout = self._one(
                functions, layout, layout.leaves(stored), batch
            )
            return layout.stored(leaves), out, layout.as_structure
        _check_stacked(batch, self._steps_per_call)

        def body(leaves: list[Array], batch: PyTree) -> tuple[list[Array], PyTree]:
            leaves, out, after = self._one(functions, layout, leaves, batch)
            _check_same_types(layout, after)
            return leaves, out

        leaves, outs = lax.scan(
            body, layout.leaves(stored), batch, length=self._steps_per_call
        )
        return layout.stored(leaves), outs, layout.as_structure

    def _one(
        self,
        functions: _Functions,
        layout: Layout,
        leaves: Sequence[Array],
        batch: tuple[PyTree, ...],
    ) -> tuple[list[Array], PyTree, Layout]:
        """One step: the arrays after it, what it returns, and where the arrays belong."""
        model, state, *rest = layout.tree(leaves)
        tree, out = self._step(functions, model, state, rest, batch)
        leaves, treedef = jtu.tree_flatten(tree)
        arrays = [x for x in leaves if is_array(x)]
        is_packed = layout.is_packed
        if len(arrays) != len(is_packed):
            is_packed = [_is_small(x, self._pack_below) for x in arrays]
        return arrays, out, self._layout(leaves, treedef, arrays, is_packed)

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

        (loss, (rest, aux)), grads = eqx.filter_value_and_grad(evaluate, has_aux=True)(
            model
        )
        extra_args = {
            "value": loss,
            "grad": grads,
            "value_fn": jtu.Partial(lambda p: evaluate(eqx.combine(p, model))[0]),
        }
        if transform is not None:
            transform_state, state = state
            grads, transform_state = _updated(
                transform, grads, transform_state, model, extra_args
            )
        updates, state = _updated(optim, grads, state, model, extra_args)
        if transform is not None:
            state = transform_state, state
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

    def _explain(self, carry: TrainCarry, batch: tuple[PyTree, ...]) -> None:
        """Raises a clear error after a call has failed, if it finds the reason."""
        _check_not_donated(carry)
        check_alive("optim", self._arrays)
        check_alive("batch", batch)
        _check_batch(batch)


def _updated(
    optim: Any, grads: PyTree, state: PyTree, model: PyTree, extra_args: dict[str, Any]
) -> tuple[PyTree, PyTree]:
    """`update`, with those extra arguments that the optimizer can be called with."""
    if not isinstance(optim, (AbstractOptimizer, optax.GradientTransformation)):
        kinds = [p.kind for p in inspect.signature(optim.update).parameters.values()]
        extra_args = extra_args if inspect.Parameter.VAR_KEYWORD in kinds else {}
    return update(optim, grads, state, model, **extra_args)


def _parted(
    out: Node, has_state: bool, has_aux: bool
) -> tuple[Array, tuple[list[PyTree], PyTree]]:
    """What the loss function returned, in its parts, once it is known to have them."""
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
                "arrays and numbers beside the loss, since it is compiled."
            )


def _is_traceable(x: Node) -> bool:
    is_numeric = is_array(x) and getattr(x.dtype, "kind", "") not in "OSUMm"
    return is_numeric or isinstance(x, (bool, int, float, complex))


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


def _check_same_types(before: Layout, after: Layout) -> None:
    """A scan keeps all types. The first place that does not is named."""
    if after is before:
        return
    paths = [jtu.tree_leaves_with_path(x.tree(x.types)) for x in (before, after)]
    del paths
    raise ValueError("TODO")


def _check_not_donated(carry: TrainCarry) -> None:
    if any(_is_concrete(x) and x.is_deleted() for x in carry.arrays):
        raise ValueError(
            "`carry` was used by an earlier call, to which its arrays were donated. "
            "Pass on the carry that this call returned, or use `donate=False`."
        )


def _check_state(state: PyTree, expected: PyTree, is_pair: bool) -> None:
    """Checks that a state has the structure and the shapes that `init` gives."""
    like = flatten(expected)
    values, departures = align(state, like)
    hint = " With `grad_transform`, `state` is the pair of both states."
    for path, found, wanted, is_static in departures:
        if not is_static and jtu.tree_leaves((found, wanted)):
            _raise_other_state(path, *contrast(found, wanted), hint if is_pair else "")
    for path, x, wanted in zip(like.paths, values, like.values, strict=True):
        if getattr(x, "shape", None) != getattr(wanted, "shape", None):
            _raise_other_state(path, describe(x), _described(wanted), "")


def _described(x: Node) -> str:
    is_struct = isinstance(x, jax.ShapeDtypeStruct)
    return f"one of shape {x.shape}" if is_struct else describe(x)


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
    """TODO"""
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
    is_int = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not is_int or value < least:
        raise ValueError(
            f"`{name}` is {describe(value)}, but an integer >= {least} was expected."
        )
    return int(value)
