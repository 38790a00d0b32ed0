"""A model and its optimizer state as a flat tuple of arrays."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias, TypeGuard

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import NamedSharding
from jaxtyping import Array, PyTree

from ._memory import is_in_host
from ._numerics import AnyArray
from ._paths import (
    Node,
    PyTreeDef,
    align,
    contrast,
    describe,
    flatten,
    path_text,
    with_article,
)
from ._sharding import Place, is_committed, is_explicit, place_beside
from ._typing import DType


NAMES = ("model", "state", "model_state")
# A number passed in and out of a compiled call without an array: JAX treats `None` as a
# node without leaves, so `n` of them are part of the structure of the arguments.
Structure: TypeAlias = tuple[None, ...]

#
# What is known about the arrays without their values
#


@dataclasses.dataclass(frozen=True)
class Type:
    """The type of an array."""

    shape: tuple[int, ...]
    dtype: DType | Any  # a PRNG key has its own kind of dtype
    weak_type: bool
    in_host: bool = False  # in host memory

    def is_like(self, other: "Type") -> bool:
        mine = (self.shape, self.dtype, self.in_host)
        return mine == (other.shape, other.dtype, other.in_host)

    def __str__(self) -> str:
        kind = f"weakly typed {self.dtype.name}" if self.weak_type else self.dtype.name
        where = " in host memory" if self.in_host else ""
        return f"{with_article(kind)} array of shape {self.shape}{where}"


def type_of(x: AnyArray | jax.ShapeDtypeStruct) -> Type:
    return Type(x.shape, x.dtype, getattr(x, "weak_type", False), is_in_host(x))


def is_array(x: Node) -> bool:
    return isinstance(x, (jax.Array, np.ndarray, np.generic))


class Placement(NamedTuple):
    """Where an array of a carry is stored."""

    is_packed: bool  # in a buffer, together with others
    sharding: NamedSharding | None  # which a step has to keep


def placement_of(x: Array, pack_below: int) -> Placement:
    sharding = x.sharding if is_concrete(x) else None
    # On a mesh with explicit axes, the types of arrays say how they are sharded.
    if not isinstance(sharding, NamedSharding) or is_explicit(sharding):
        sharding = None
    return Placement(_is_small(x, pack_below), sharding)


def as_placed(arrays: Sequence[Array], placements: Sequence[Placement]) -> list[Array]:
    """Arrays that a step has computed, sharded as they were before. Otherwise the
    compiler would choose, and the second call could compile again."""
    pairs = zip(arrays, [x.sharding for x in placements], strict=True)
    constrain = lax.with_sharding_constraint
    return [x if sharding is None else constrain(x, sharding) for x, sharding in pairs]


def strongly_typed(x: Node) -> Node:
    return x.astype(x.dtype) if is_array(x) and type_of(x).weak_type else x


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
        placements: Sequence[Placement],
    ):
        self.owner = owner
        self.as_structure: Structure = (None,) * index
        self.treedef = treedef
        self.statics = statics  # the leaves, with `ARRAY` in place of the arrays
        self.types = types
        self.placements = placements
        self.groups = _groups(types, placements)
        packed = {i for group in self.groups for i in group}
        self.rest = [i for i in range(len(types)) if i not in packed]

    def __deepcopy__(self, memo: dict[int, Any]) -> "Layout":
        return self

    def is_like(self, other: "Layout") -> bool:
        pairs = zip(self.statics, other.statics, strict=False)
        return (
            self.treedef == other.treedef
            and self.types == other.types
            and self.placements == other.placements
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

    def tree(self, leaves: Sequence[Any]) -> PyTree:
        """The model and state with these arrays."""
        arrays = iter(leaves)
        values = [next(arrays) if x is ARRAY else x for x in self.statics]
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


ARRAY = _Slot()


def statics_of(leaves: Sequence[Node]) -> list[Node]:
    return [ARRAY if is_array(x) else x for x in leaves]


def _is_same(a: Node, b: Node) -> bool:
    return a is b or (type(a) is type(b) and bool(a == b))


def _groups(types: Sequence[Type], placements: Sequence[Placement]) -> list[list[int]]:
    """The arrays that share a buffer, by dtype."""
    by_dtype: dict[Any, list[int]] = {}
    for i, (kind, placement) in enumerate(zip(types, placements, strict=True)):
        if placement.is_packed:
            by_dtype.setdefault(kind.dtype, []).append(i)
    return [group for group in by_dtype.values() if len(group) > 1]


def _is_small(x: Array, pack_below: int) -> bool:
    """Whether an array may share a buffer with others of its dtype. Not if sharing
    would lose something: a weak type, a PRNG key, a sharding, or its memory."""
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.extended)
    if is_key or type_of(x).weak_type or is_in_host(x) or x.size >= pack_below:
        return False
    return isinstance(x, Tracer) or x.sharding.is_fully_replicated


def check_stable(before: Layout, after: Layout, *, types_too: bool) -> None:
    """Checks that a step keeps the structure of a carry. A single step may change a
    dtype, as some optimizers of optax do. A loop may not."""
    if after is before:
        return
    like = flatten(before.tree(before.types))
    values, departures = align(after.tree(after.types), like)
    changes = [(path, *contrast(x, was)) for path, x, was, _ in departures]
    for path, x, was in zip(like.paths, values, like.values, strict=True):
        if not _is_stable(x, was, types_too):
            changes.append((path, described(x), described(was)))
    for path, found, was in changes[:1]:
        raise ValueError(
            f"{NAMES[path[0].idx]}{path_text(path[1:])} is {found} after a step, but "
            f"it was {was} before it. A step keeps the structure of the model and of "
            "the state, and at `steps_per_call` > 1 also every dtype and shape."
        )


def _is_stable(x: Node, was: Node, types_too: bool) -> bool:
    if isinstance(x, Type) and isinstance(was, Type):
        return not types_too or x.is_like(was)
    return _is_same(x, was)


def described(x: Node) -> str:
    if isinstance(x, jax.ShapeDtypeStruct):
        x = type_of(x)
    return str(x) if isinstance(x, Type) else describe(x)


#
# The carry
#


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


def carry_of(arrays: tuple[Array, ...], layout: Layout) -> TrainCarry:
    """Makes a carry the way Equinox unflattens a module: 15 us faster than the
    constructor."""
    carry = object.__new__(TrainCarry)
    object.__setattr__(carry, "arrays", arrays)
    object.__setattr__(carry, "layout", layout)
    return carry


#
# Copies
#


def copies_of(arrays: Sequence[AnyArray]) -> list[Array]:
    """Copies, so that none of the user's arrays is donated, and none is donated twice.

    If some arrays were explicitly put on a device or a mesh of devices, the others (the
    counters) are put there too. Otherwise the first call would do it, and the second
    would find arrays of another kind and compile again.
    """
    place = place_beside(arrays)
    return [copy_of(_placed(x, place)) for x in arrays]


def is_concrete(x: object) -> TypeGuard[Array]:
    return isinstance(x, jax.Array) and not isinstance(x, Tracer)


def _placed(x: AnyArray, place: Place) -> AnyArray:
    if place is None or isinstance(x, Tracer):
        return x
    is_there = is_committed(x) and isinstance(x.sharding, type(place))
    return x if is_there else jax.device_put(x, place)


def copy_of(x: AnyArray) -> Array:
    """A copy in the same memory. Computations run on the device, so they do not copy
    arrays in host memory."""
    if is_in_host(x) and is_concrete(x):
        return jax.device_put(x, x.sharding, may_alias=False)
    return _copy(x)


_copy = jax.jit(jnp.copy)
