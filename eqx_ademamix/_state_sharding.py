"""Shardings that spread the state over devices that all hold the parameters."""

import math
from typing import Any, NamedTuple, TypeAlias

import equinox as eqx
import jax.tree_util as jtu
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, PyTree

from ._checks import check_optimizer
from ._filters import trained_arrays
from ._inspection import BLOCKS_SPAN_DEVICES
from ._memory import HOST, is_in_host
from ._optimizer import AbstractOptimizer, OptaxOptimizer, init
from ._paths import (
    Node,
    Path,
    flatten,
    full_path_text,
    path_text,
    shortened,
    table,
)
from ._sharding import Spec, partition_spec, spec_of, spec_text
from ._storage.codec import AbstractCodec, Encoded, Struct, holds_blocks
from ._typing import no_type_check


@no_type_check
def state_sharding(
    optim: AbstractOptimizer[Any] | OptaxOptimizer,
    params: PyTree,
    mesh: Mesh,
    *,
    axis: str | tuple[str, ...],
) -> PyTree[NamedSharding]:
    """Spreads the state over an axis of a mesh, although every device along that axis
    holds the same parameters. This is ZeRO-1, or optimizer state sharding
    ([arXiv:1910.02054](https://arxiv.org/abs/1910.02054), section 5.1).

    One axis of each parameter is split for all of its moments, codes, and scales: the
    largest one whose shards hold whole blocks of the codecs, otherwise the largest one
    that can be split. Axes that a parameter already splits stay split. A parameter that
    already splits an axis over `axis` gets moments with the same sharding. One with no
    axis that can be split gets a replicated state.

    **Arguments:**

    - `optim`: an optimizer of this package or of optax.
    - `params`: the model, with its arrays on the mesh or not yet on several devices.
        `jax.ShapeDtypeStruct`s, with or without a sharding, may take their place.
    - `mesh`: the mesh.
    - `axis`: the name of the data-parallel mesh axis, or a tuple of names.

    **Returns:**

    A tree shaped like `eqx_ademamix.init(optim, params)`, with a
    `jax.sharding.NamedSharding` for each array. Use it in `jax.jit(out_shardings=...)`,
    in `jax.device_put`, or in the template that Orbax restores to.

    **Raises:**

    - `ValueError`: if the mesh has no such axis, if no parameter can be split over it,
        or if a parameter is on another mesh.

    !!! Example

        ```python
        import equinox as eqx
        import jax
        import numpy as np
        from jax.sharding import Mesh
        import eqx_ademamix

        mesh = Mesh(np.array(jax.devices()), ("data",))
        model = eqx.nn.MLP(64, 64, width_size=64, depth=1, key=jax.random.key(0))
        optim = eqx_ademamix.AdEMAMix(1e-3)
        shardings = eqx_ademamix.state_sharding(optim, model, mesh, axis="data")
        state = jax.device_put(eqx_ademamix.init(optim, model), shardings)
        ```
    """
    check_optimizer(optim)
    names = _checked_names(axis, mesh)
    state, in_host = _shapes(optim, params)
    shardings = _planned(params, state, mesh, names).shardings(in_host)
    return jtu.tree_structure(state).unflatten(shardings)


@no_type_check
def sharding_report(
    optim: AbstractOptimizer[Any] | OptaxOptimizer,
    params: PyTree,
    mesh: Mesh,
    *,
    axis: str | tuple[str, ...],
) -> str:
    """Says what [`eqx_ademamix.state_sharding`][] gives each parameter.

    **Arguments:**

    - `optim`, `params`, `mesh`, `axis`: as for [`eqx_ademamix.state_sharding`][].

    **Returns:**

    Human-readable text. Each trained array has a line with its path, its shape, its own
    sharding, that of its state, the bytes of its state on each device, and a note on
    anything special.

    **Raises:**

    - `ValueError`: as in [`eqx_ademamix.state_sharding`][].

    !!! Example

        ```python
        import jax
        import jax.numpy as jnp
        import numpy as np
        from jax.sharding import Mesh
        import eqx_ademamix

        mesh = Mesh(np.array(jax.devices()), ("data",))
        params = {"bias": jnp.zeros(8), "weight": jnp.zeros((64, 256))}
        optim = eqx_ademamix.AdEMAMix(1e-3)
        print(eqx_ademamix.sharding_report(optim, params, mesh, axis="data"))
        ```
        ```text
        The state takes 196,712 bytes, 24,596 on each of 8 devices.

          path        shape      parameter  state            bytes   note
          ['bias']    (8,)       P()        P('data')        12
          ['weight']  (64, 256)  P()        P(None, 'data')  24,576
        ```
    """
    check_optimizer(optim)
    names = _checked_names(axis, mesh)
    return _planned(params, _shapes(optim, params)[0], mesh, names).report()


Shape: TypeAlias = tuple[int, ...]


class _Part(NamedTuple):
    """An array of the state, and its sharding."""

    struct: Struct
    sharding: NamedSharding

    @property
    def bytes(self) -> int:
        """On each device."""
        shape = self.sharding.shard_shape(self.struct.shape)
        return math.prod(shape) * self.struct.dtype.itemsize


class _Choice(NamedTuple):
    """How the state of one parameter is split."""

    own: Spec  # how the parameter is split
    spec: Spec
    is_whole: bool  # whether each shard holds whole blocks


class _Plan(NamedTuple):
    mesh: Mesh
    names: tuple[str, ...]
    parameters: dict[Path, Array | Struct]
    choices: dict[Path, _Choice]
    parts: list[tuple[Path | None, list[_Part]]]  # of which parameter

    def shardings(self, in_host: list[bool]) -> list[NamedSharding]:
        """Those of all arrays of the state, in order."""
        found = [part.sharding for _, entry in self.parts for part in entry]
        pairs = zip(found, in_host, strict=True)
        return [s.with_memory_kind(HOST) if flag else s for s, flag in pairs]

    def report(self) -> str:
        parts = [part for _, entry in self.parts for part in entry]
        total = sum(math.prod(x.shape) * x.dtype.itemsize for x, _ in parts)
        each = sum(part.bytes for part in parts)
        head = ("path", "shape", "parameter", "state", "bytes", "note")
        rows = [head, *(self._row(path, n) for path, n in self._bytes().items())]
        return "\n".join(
            [
                f"The state takes {total:,} bytes, {each:,} on each of "
                f"{self.mesh.size} devices.",
                "",
                *(line.rstrip() for line in table(rows)),
            ]
        )

    def _bytes(self) -> dict[Path, int]:
        """The bytes of each parameter's state on each device."""
        found = dict.fromkeys(self.choices, 0)
        for owner, entry in self.parts:
            if owner is not None:
                found[owner] += sum(part.bytes for part in entry)
        return found

    def _row(self, path: Path, each: int) -> tuple[str, ...]:
        choice = self.choices[path]
        return (
            full_path_text(path),
            str(self.parameters[path].shape),
            spec_text(choice.own),
            spec_text(choice.spec),
            f"{each:,}",
            self._note(choice),
        )

    def _note(self, choice: _Choice) -> str:
        if not _is_over(choice.spec, self.names):
            return f"replicated: {_size(self.mesh, self.names)} divides no axis"
        return "" if choice.is_whole else BLOCKS_SPAN_DEVICES


def _planned(
    params: PyTree, state: PyTree, mesh: Mesh, names: tuple[str, ...]
) -> _Plan:
    parameters, entries = _parameters(params), flatten(state)
    pairs = zip(entries.paths, entries.values, strict=True)
    owned = [(_owner(path, x, parameters), x) for path, x in pairs]
    codecs: dict[Path, list[AbstractCodec]] = {}
    for owner, x in owned:
        if owner is not None:
            found = codecs.setdefault(owner, [])
            found += [x.codec] if isinstance(x, Encoded) else []
    choices = {
        path: _chosen(path, x, codecs[path], mesh, names)
        for path, x in parameters.items()
        if path in codecs
    }
    _check_effect(list(choices.values()), mesh, names)
    parts = [
        (owner, _parts(x, None if owner is None else choices[owner], mesh))
        for owner, x in owned
    ]
    return _Plan(mesh, names, parameters, choices, parts)


def _shapes(
    optim: AbstractOptimizer[Any] | OptaxOptimizer, params: PyTree
) -> tuple[PyTree, list[bool]]:
    """The state as shapes, and which of its arrays are in host memory, which
    shapes do not say."""
    in_host: list[bool] = []

    def start(params: PyTree) -> PyTree:
        state = init(optim, params)
        in_host.extend(map(is_in_host, jtu.tree_leaves(state)))
        return state

    return eqx.filter_eval_shape(start, params), in_host


def _parameters(params: PyTree) -> dict[Path, Array | Struct]:
    leaves = trained_arrays(True, flatten(params), or_structs=True)
    pairs = zip(leaves.paths, leaves.values, strict=True)
    return {path: x for path, x in pairs if x is not None}


def _owner(
    path: Path, entry: Node, parameters: dict[Path, Array | Struct]
) -> Path | None:
    """The path of the parameter that an entry of the state belongs to: the end of the
    entry's own path, if the shapes agree."""
    shape = getattr(entry, "shape", None)
    for start in range(len(path) + 1):
        found = parameters.get(path[start:])
        if found is not None and found.shape == shape:
            return path[start:]
    return None


#
# The choice
#


def _chosen(
    path: Path,
    param: Array | Struct,
    codecs: list[AbstractCodec],
    mesh: Mesh,
    names: tuple[str, ...],
) -> _Choice:
    own, shape = _own_spec(path, param, mesh), param.shape
    new = tuple(name for name in names if not _is_over(own, (name,)))
    is_whole = lambda spec: all(
        holds_blocks(codec, shape, _shard(shape, spec, mesh)) for codec in codecs
    )
    if not new or 0 in shape:
        return _Choice(own, own, is_whole(own))
    specs = [_extended(own, i, new) for i in range(len(shape))]
    size = dict(zip(specs, _shard(shape, own, mesh), strict=True))
    possible = [x for x in specs if size[x] % _size(mesh, new) == 0]
    # `max` takes the first of several equal axes.
    rank = lambda spec: (is_whole(spec), size[spec])
    spec = max(possible, key=rank, default=own)
    return _Choice(own, spec, is_whole(spec))


def _own_spec(path: Path, param: Array | Struct, mesh: Mesh) -> Spec:
    sharding = getattr(param, "sharding", None)
    is_named = isinstance(sharding, NamedSharding)
    if sharding is None or (not is_named and sharding.is_fully_replicated):
        return ((),) * len(param.shape)
    if not is_named or not _is_same_mesh(sharding.mesh, mesh):
        raise ValueError(
            f"params{path_text(path)} is sharded with {sharding}, but not over `mesh`: "
            f"{_mesh_text(mesh)}. Put the parameters on this mesh, or describe them "
            "with `jax.ShapeDtypeStruct`."
        )
    return spec_of(sharding, len(param.shape))


def _is_same_mesh(found: Any, mesh: Mesh) -> bool:
    """Whether a mesh, or the abstract one that `jax.eval_shape` gives, is this one."""
    return found == (mesh if isinstance(found, Mesh) else mesh.abstract_mesh)


def _mesh_text(mesh: Mesh) -> str:
    ids = [device.id for device in mesh.devices.flat]
    return f"{mesh}, with the devices {shortened(str(ids), 60)}"


def _extended(spec: Spec, axis: int, names: tuple[str, ...]) -> Spec:
    return (*spec[:axis], spec[axis] + names, *spec[axis + 1 :])


def _is_over(spec: Spec, names: tuple[str, ...]) -> bool:
    return any(name in names for axis in spec for name in axis)


def _size(mesh: Mesh, names: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[name] for name in names)


def _shard(shape: Shape, spec: Spec, mesh: Mesh) -> Shape:
    return tuple(n // _size(mesh, axis) for n, axis in zip(shape, spec, strict=True))


def _parts(entry: Node, choice: _Choice | None, mesh: Mesh) -> list[_Part]:
    """The arrays of an entry of the state, with their shardings."""
    arrays = jtu.tree_leaves(entry)
    if choice is None:
        everywhere = NamedSharding(mesh, partition_spec(()))
        return [_Part(x, everywhere) for x in arrays]
    specs = [_spec_of_part(x.shape, entry.shape, choice, mesh) for x in arrays]
    return [
        _Part(x, NamedSharding(mesh, partition_spec(spec)))
        for x, spec in zip(arrays, specs, strict=True)
    ]


def _spec_of_part(part: Shape, shape: Shape, choice: _Choice, mesh: Mesh) -> Spec:
    """Codes are split like the parameter, and scales along the same axes. An axis of
    blocks that span devices is not split."""
    return tuple(
        axis if n == whole or (choice.is_whole and n % _size(mesh, axis) == 0) else ()
        for n, whole, axis in zip(part, shape, choice.spec, strict=False)
    )


#
# Checks and words
#


def _checked_names(axis: object, mesh: Mesh) -> tuple[str, ...]:
    names: tuple[Any, ...] = axis if isinstance(axis, tuple) else (axis,)
    if not names or any(name not in mesh.axis_names for name in names):
        raise ValueError(
            f"`axis` is {axis!r}, but `mesh` has the axes "
            f"{', '.join(repr(name) for name in mesh.axis_names)}."
        )
    return names


def _check_effect(choices: list[_Choice], mesh: Mesh, names: tuple[str, ...]) -> None:
    size = _size(mesh, names)
    has_effect = size > 1 and any(_is_over(choice.spec, names) for choice in choices)
    if not has_effect and mesh.size > 1:
        raise ValueError(
            f"`axis` is {'/'.join(names)!r}, of size {size}, but none of the "
            f"{len(choices)} trained arrays has an axis that can be split {size} ways. "
            "The state would be replicated: choose another axis of the mesh."
        )
