"""What a state holds, how large it is, and where it is inside another one."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn, TypeVar, overload

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.core import Tracer
from jax.sharding import NamedSharding, Sharding
from jaxtyping import PyTree

from ._checks import (
    check_alive,
    check_count,
    check_optimizer,
    check_progress,
    check_weights,
)
from ._hyperparams import AbstractHyperparams, H, public_part
from ._memory import any_in_host, is_in_host, to_device
from ._optimizer import AbstractOptimizer
from ._paths import (
    Node,
    Path,
    children,
    describe,
    full_path_text,
    is_leaf,
    leaves_with_path,
    on_device,
    shortened,
    table,
)
from ._sharding import spec_of, spec_text
from ._state import AbstractMomentState, CompensatedState, S
from ._step import AbstractMomentOptimizer
from ._storage.codec import (
    Encoded,
    Stored,
    Struct,
    decode,
    holds_blocks,
    is_encoded,
)
from ._typing import no_type_check


State = TypeVar("State")
BLOCKS_SPAN_DEVICES = "blocks span devices, which exchange scales"


@overload
def hyperparams(optim: AbstractMomentOptimizer[S, H], state: PyTree) -> H: ...
@overload
def hyperparams(optim: AbstractOptimizer[Any], state: PyTree) -> Any: ...
@no_type_check
def hyperparams(optim: AbstractOptimizer[Any], state: PyTree) -> AbstractHyperparams:
    """The hyperparameters as the next `update` will use them, with schedules resolved
    at the state's counters. Works inside and outside `jit`.

    **Arguments:**

    - `optim`: an [`eqx_ademamix.AdEMAMix`][] or [`eqx_ademamix.SimplifiedAdEMAMix`][],
        alone or inside an [`eqx_ademamix.Compensated`][] or
        [`eqx_ademamix.Offloaded`][]. For an optax optimizer such as a chain, pass the
        `AdEMAMix` inside it.
    - `state`: its state, or a tree that contains exactly one state of its kind, such as
        the state of an `optax.chain`.

    **Returns:**

    An [`eqx_ademamix.Hyperparams`][] or [`eqx_ademamix.SimplifiedHyperparams`][], whose
    fields are arrays of shape `()` in the default float.

    Inside the state of `optax.inject_hyperparams`, an injected value replaces the field
    of `optim` with the same name (`lr` is `learning_rate`). Of several such states, the
    innermost one decides. There are two exceptions:

    - If `optim` has a schedule for `b3` or `alpha`, that schedule decides, since
        [`eqx_ademamix.ademamix`][] ignores the number `b3` if it has a `b3_scheduler`.
    - If optax computes a value from a schedule, its state has the last step's value. If
        `optim` has that schedule too, you get the next step's value.

    **Raises:**

    - `ValueError` or `TypeError`: if `optim` is an optax optimizer, if there is no
        state of its kind or more than one, or if it has a negative counter.

    !!! Example

        ```python
        import jax.numpy as jnp
        import eqx_ademamix

        optim = eqx_ademamix.AdEMAMix(
            1e-3, alpha=eqx_ademamix.alpha_scheduler(8.0, warmup=100)
        )
        state = eqx_ademamix.init(optim, jnp.zeros(3))
        assert eqx_ademamix.hyperparams(optim, state).alpha == 0.0
        ```
    """
    return public_part(resolved(optim, state)[2])


def resolved(
    optim: object, state: PyTree
) -> tuple[AbstractMomentOptimizer[Any, Any], Any, Any]:
    """The optimizer of this package inside another one, its state inside a tree, and
    its hyperparameters as the next `update` will use them."""
    check_optimizer(optim)
    inner, cls = _moment_optimizer(optim)
    check_alive("optim", inner)
    found = find(state, lambda x: isinstance(x, cls), of(cls), name="state")
    for outer in _injections(state, cls):
        inner = _as_injected(inner, outer)
    check_weights(found, inner.weights)
    return inner, found, inner.resolve(found)


@no_type_check
def decoded(state: State) -> State:
    """The same state with its moments as arrays, so that you can read, plot, or convert
    them.

    **Arguments:**

    - `state`: the state of an optimizer, or any tree that contains states.

    **Returns:**

    The tree with a float32 (or complex64) array in place of each encoded moment, in
    device memory. Moments that are stored as a dtype stay as they are, and share their
    buffers with `state`. [`eqx_ademamix.change_state_format`][] encodes them again.

    **Raises:**

    - `ValueError`: if the tree contains no state of this package.

    !!! Example

        ```python
        import jax.numpy as jnp
        import eqx_ademamix

        compact = eqx_ademamix.StateFormat.compact()
        optim = eqx_ademamix.AdEMAMix(1e-3, state_format=compact)
        state = eqx_ademamix.init(optim, jnp.zeros((64, 256)))
        assert eqx_ademamix.decoded(state).m2.dtype == jnp.float32
        ```
    """
    if not states_in(state, is_moment_state):
        _raise_not_found("state", state, is_moment_state, "of AdEMAMix", "at least one")
    array = lambda x: decode(to_device(x)) if is_encoded(x) else x
    return jax.tree.map(array, on_device(state), is_leaf=is_encoded)


@no_type_check
def state_bytes(state: PyTree[Any]) -> int:
    """The size of a state in bytes.

    **Arguments:**

    - `state`: a state, or any tree of arrays. A `jax.ShapeDtypeStruct` counts as the
        array that it describes, so
        `eqx.filter_eval_shape(eqx_ademamix.init, optim, model)` gives the size of a
        state before it is made.

    **Returns:**

    The total size of the arrays in bytes, over all devices if they are sharded.

    !!! Example

        ```python
        import jax.numpy as jnp
        import eqx_ademamix

        params = jnp.zeros((64, 256))
        compact = eqx_ademamix.StateFormat.compact()
        optim = eqx_ademamix.AdEMAMix(1e-3, state_format=compact)
        state = eqx_ademamix.init(optim, params)
        assert eqx_ademamix.state_bytes(state) < 4.1 * params.size
        ```
    """
    arrays = filter(_is_sized, jtu.tree_leaves(state))
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)


def _is_sized(x: Node) -> bool:
    return hasattr(x, "dtype")


@no_type_check
def state_report(state: PyTree[Any]) -> str:
    """Says how the moments of each parameter are stored, and how many bytes they take.

    **Arguments:**

    - `state`: an [`eqx_ademamix.AdEMAMixState`][] or
        [`eqx_ademamix.SimplifiedAdEMAMixState`][], or a tree that contains one. Its
        leaves may be `jax.ShapeDtypeStruct`s.

    **Returns:**

    Human-readable text. Each trained array has a line with its path, its shape, how
    each moment is stored, and the bytes per parameter of all moments. Inside an
    [`eqx_ademamix.Compensated`][], the remainders count too. `(host)` marks a moment
    that [`eqx_ademamix.Offloaded`][] keeps in host memory. If the state is on several
    devices, the text also has the bytes on each device, the sharding of each moment,
    and whether a codec's blocks span devices, which then exchange scales in each step.

    **Raises:**

    - `ValueError`: if there is no such state, or more than one. The message lists what
        was found.

    !!! Example

        ```python
        import jax.numpy as jnp
        import eqx_ademamix

        params = {"bias": jnp.zeros(256), "weight": jnp.zeros((64, 256))}
        compact = eqx_ademamix.StateFormat.compact()
        optim = eqx_ademamix.AdEMAMix(1e-3, state_format=compact)
        print(eqx_ademamix.state_report(eqx_ademamix.init(optim, params)))
        ```
        ```text
        The state takes 69,384 bytes, 4.17 per parameter.

          path        shape      m1            m2             nu            bytes
          ['bias']    (256,)     float32       float32        float32       12.00
          ['weight']  (64, 256)  ScaledFloat8  ScaledFloat16  ScaledFloat8   4.05
        ```
    """
    inner = only(state, is_moment_state, "of AdEMAMix")
    kept, arrays = _kept(state, inner), eqx.filter(state, _is_sized)
    places = _places(inner.moments.m2, kept)
    rows = [_row(place) for place in places]
    columns = [*zip(("path", "shape", *kept, "bytes"), *rows, strict=True)]
    columns[-1] = _to_the_right(columns[-1])
    if _devices(arrays) > 1:
        columns.append(("sharding", *map(_shardings, places)))
        columns.append(("note", *map(_note, places)))
    size = sum(math.prod(place.shape) for place in places)
    lines = [line.rstrip() for line in table([*zip(*columns, strict=True)])]
    return "\n".join([_summary(arrays, size), "", *lines])


def _summary(state: PyTree, size: int) -> str:
    """The first line of a report, about the arrays of a state for `size`
    parameters."""
    total = state_bytes(state)
    facts = [f"The state takes {total:,} bytes"]
    if size:
        facts.append(f"{total / size:.2f} per parameter")
    in_host = state_bytes(eqx.filter(state, is_in_host))
    if in_host:
        facts.append(f"{in_host:,} of them in host memory")
    devices = _devices(state)
    if devices > 1:
        each = _bytes_per_device(eqx.filter(state, is_in_host, inverse=True))
        facts.append(f"{each:,} on each of {devices} devices")
    return f"{', '.join(facts)}."


class _Place(NamedTuple):
    """A trained parameter, and what the state keeps for it, in the order of the
    report's columns."""

    path: Path
    shape: tuple[int, ...]
    kept: list[Stored | None]


def _kept(tree: PyTree, state: AbstractMomentState[Any]) -> dict[str, PyTree]:
    """What a state keeps for each parameter, by name: its moments, and the remainder of
    a `Compensated` around it."""
    pairs = zip(state.names, state.moments, strict=True)
    kept = {name: moments for name, moments in pairs if name is not None}
    for outer in states_in(tree, _is_compensated):
        if states_in(outer, is_moment_state):
            kept["remainder"] = outer.remainder
    return kept


def _is_compensated(x: Node) -> bool:
    return isinstance(x, CompensatedState)


def _places(m2: PyTree, kept: dict[str, PyTree]) -> list[_Place]:
    by_path = [dict(leaves_with_path(tree)) for tree in kept.values()]
    return [
        _Place(path, x.shape, [leaves.get(path) for leaves in by_path])
        for path, x in leaves_with_path(m2)
        if x is not None
    ]


def _row(place: _Place) -> tuple[str, ...]:
    size, total = math.prod(place.shape), state_bytes(place.kept)
    each = f"{total / size:.2f}" if size else "-"
    kinds = map(_kind, place.kept)
    return (full_path_text(place.path), str(place.shape), *kinds, each)


def _kind(moment: Stored | Struct | None) -> str:
    if moment is None:
        return "none"
    is_code = isinstance(moment, Encoded)
    kind = type(moment.codec).__name__ if is_code else str(moment.dtype)
    return f"{kind} (host)" if any_in_host(moment) else kind


def _to_the_right(column: tuple[str, ...]) -> tuple[str, ...]:
    width = max(map(len, column))
    return tuple(cell.rjust(width) for cell in column)


def _devices(state: PyTree) -> int:
    """The number of devices that a state is on, or 1 if that is unknown."""
    found = [_sharding(x) for x in jtu.tree_leaves(state)]
    return max((len(s.device_set) for s in found if s is not None), default=1)


def _sharding(x: Node) -> Sharding | None:
    """The sharding of an array, or of a moment's codes."""
    array = x.real[0] if isinstance(x, Encoded) and x.real else x
    return None if isinstance(x, Tracer) else getattr(array, "sharding", None)


def _bytes_per_device(state: PyTree) -> int:
    shards = [
        (x.shape if s is None else s.shard_shape(x.shape), x.dtype.itemsize)
        for x in jtu.tree_leaves(state)
        for s in (_sharding(x),)
    ]
    return sum(math.prod(shape) * size for shape, size in shards)


def _shardings(place: _Place) -> str:
    """The shardings of what is kept for one parameter: one text if they are all the
    same."""
    found = [_sharding(x) for x in place.kept if x is not None]
    ndim = len(place.shape)
    texts = [
        spec_text(spec_of(s, ndim)) if isinstance(s, NamedSharding) else "one device"
        for s in found
    ]
    return ", ".join(dict.fromkeys(texts))


def _note(place: _Place) -> str:
    return "" if all(map(_has_whole_blocks, place.kept)) else BLOCKS_SPAN_DEVICES


def _has_whole_blocks(x: Stored | None) -> bool:
    sharding = _sharding(x)
    if not isinstance(x, Encoded) or sharding is None:
        return True
    return holds_blocks(x.codec, x.shape, sharding.shard_shape(x.shape))


#
# Finding a state inside another one
#


def is_moment_state(x: Node) -> bool:
    return isinstance(x, AbstractMomentState)


def of(cls: type) -> str:
    """The name of a class's states in error messages."""
    return f"of {cls.__name__.removesuffix('State')}"


def states_in(tree: PyTree, is_one: Callable[[Node], bool]) -> list[Node]:
    return [x for x in jtu.tree_leaves(tree, is_leaf=is_one) if is_one(x)]


def only(
    tree: PyTree, is_one: Callable[[Node], bool], of_what: str, name: str = "state"
) -> Node:
    """The only state of a kind that a tree contains."""
    found = states_in(tree, is_one)
    if len(found) != 1:
        _raise_not_found(name, tree, is_one, of_what, "one")
    return found[0]


def find(
    tree: PyTree,
    is_one: Callable[[Node], bool],
    of_what: str,
    name: str = "opt_state",
) -> Node:
    """The only state of a kind that a tree contains, alive and not batched, with NumPy
    arrays converted to JAX arrays."""
    found = only(tree, is_one, of_what, name)
    check_alive(name, found)
    for scalar in _scalars(found):
        value = getattr(found, scalar)
        if jnp.shape(value) != ():
            raise ValueError(
                f"{name}.{scalar} is {describe(value)}, but a scalar was expected. For "
                "a batch of states, call this function under `eqx.filter_vmap`."
            )
        if not is_moment_state(found):
            check_count(f"{name}.{scalar}", value)
    if is_moment_state(found):
        check_progress(found)
    return on_device(found)


def _scalars(state: Node) -> list[str]:
    """The fields of a state that count steps or sum weights."""
    if isinstance(state, AbstractMomentState):
        names = (*state.counters, *state.weights, "skipped")
        return [name for name in names if getattr(state, name) is not None]
    fields = getattr(state, "_fields", ())
    return [name for name in ("count", "count_m2", "t") if name in fields]


def _raise_not_found(
    name: str,
    tree: PyTree,
    is_one: Callable[[Node], bool],
    of_what: str,
    expected: str,
) -> NoReturn:
    raise ValueError(
        f"`{name}` has {len(states_in(tree, is_one)) or 'no'} states {of_what}, but "
        f"{expected} was expected. Found in it: {kinds_in(tree)}. Pass the state of "
        "the optimizer, or the part of it that you mean."
    )


def kinds_in(tree: PyTree) -> str:
    """The names of the classes of the states inside a state, for errors."""
    return shortened(", ".join(dict.fromkeys(_kinds(tree))) or describe(tree), 300)


def _kinds(node: Node) -> list[str]:
    if is_leaf(node):
        return []
    if is_moment_state(node):
        return [type(node).__name__]
    inner = [child for _, child in children(node)[0] if not is_leaf(child)]
    if type(node) in (list, tuple, dict):
        return [kind for child in inner for kind in _kinds(child)]
    is_inner = lambda x: isinstance(x, (tuple, AbstractMomentState))
    inner = [x for x in inner if is_inner(x) or type(x) in (list, dict)]
    return [type(node).__name__, *(kind for x in inner for kind in _kinds(x))]


#
# Optimizers inside others
#


def unwrapped(optim: object) -> object:
    """The optimizer inside our own wrappers, such as `Compensated`."""
    is_wrapper = isinstance(optim, AbstractOptimizer) and not isinstance(
        optim, AbstractMomentOptimizer
    )
    inner = getattr(optim, "optim", None) if is_wrapper else None
    return optim if inner is None else unwrapped(inner)


def _moment_optimizer(
    optim: object,
) -> tuple[AbstractMomentOptimizer[Any, Any], type]:
    inner = unwrapped(optim)
    if not isinstance(inner, AbstractMomentOptimizer):
        within = "" if inner is optim else f" around {describe(inner)}"
        raise TypeError(
            f"`optim` is {describe(optim)}{within}, but an optimizer of this package "
            "was expected. Pass the optimizer of this package that it contains, for "
            "example the `AdEMAMix` in a chain. `state` may be the state of the chain."
        )
    return inner, inner.state_type


def _injections(tree: PyTree, cls: type) -> Iterator[Any]:
    """The states of `optax.inject_hyperparams` around a state, outermost first."""
    if isinstance(tree, cls):
        return
    for outer in states_in(tree, _is_injection):
        if states_in(outer.inner_state, lambda x: isinstance(x, cls)):
            yield outer
            yield from _injections(outer.inner_state, cls)


def _is_injection(x: Node) -> bool:
    """Recognized by its fields, since optax has two classes for it."""
    fields = getattr(x, "_fields", ())
    return "inner_state" in fields and isinstance(getattr(x, "hyperparams", None), dict)


# The fields of an optimizer that are not numbers.
_NOT_INJECTED = (
    "weight_decay_mask",
    "trainable",
    "state_format",
    "learning_rate_scale",
)


def _as_injected(
    optim: AbstractMomentOptimizer[Any, Any], outer: Any
) -> AbstractMomentOptimizer[Any, Any]:
    """The optimizer with the values that a state of `optax.inject_hyperparams` has."""
    check_alive("state.hyperparams", outer.hyperparams)
    fields = {x.name for x in dataclasses.fields(optim) if not x.metadata.get("static")}
    schedules = getattr(outer, "hyperparams_states", {})
    for key, value in outer.hyperparams.items():
        name = "learning_rate" if key == "lr" else key
        if name in fields.difference(_NOT_INJECTED):
            own = getattr(optim, name)
            used = _used(name, own, value, schedules.get(key))
            where = lambda o, name=name: getattr(o, name)
            # A guard that is off is None.
            optim = eqx.tree_at(where, optim, used, is_leaf=lambda x: x is None)
    return optim


def _used(name: str, own: object, injected: object, schedule: object) -> object:
    """What the next step will use: the optimizer's own value or the injected one."""
    if not callable(own):
        return injected
    count = getattr(schedule, "count", None)
    if count is not None and not callable(count):  # tuples have a method `count`
        # Computed from a schedule that `optim` has too: one step ahead of `injected`.
        return own(count)
    return own if name in ("b3", "alpha") else injected
