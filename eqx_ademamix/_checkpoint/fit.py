"""The checks: what cannot be saved, and which file does not fit which tree."""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NoReturn

import jax
import jax.tree_util as jtu
from jax.core import Tracer
from jaxtyping import PyTree

from .._checks import check_alive
from .._inspection import is_moment_state
from .._paths import Leaves, Node, describe, full_path_text, path_text
from .._sharding import is_abstract, with_devices
from .arrays import is_array, is_enabled, is_storable
from .contents import Contents
from .file import CheckpointError


#
# Trees
#


def check_names(name: str, leaves: Leaves) -> None:
    """Each leaf needs its own name in the file."""
    most = Counter(map(full_path_text, leaves.paths)).most_common(1)
    if most and most[0][1] > 1:
        raise ValueError(
            f"`{name}` has {most[0][1]} leaves with the path {most[0][0]}, but a "
            "checkpoint has one array for each path. Do two keys of a dict, or of a "
            "node of your own, print as the same text? Give them names that differ."
        )


def check_concrete(name: str, leaves: Leaves) -> None:
    for path, x in zip(leaves.paths, leaves.values, strict=True):
        if isinstance(x, Tracer):
            raise ValueError(
                f"{name}{path_text(path)} is traced, but a file can be neither read "
                "nor written while a function is traced. Call `save` and `load` "
                "outside of `jax.jit` and other transformations."
            )


def check_savable(tree: PyTree, leaves: Leaves) -> None:
    check_alive("tree", tree)
    for path, x in zip(leaves.paths, leaves.values, strict=True):
        if is_array(x):
            _check_savable(f"tree{path_text(path)}", x)


def _check_savable(where: str, x: Node) -> None:
    if isinstance(x, jax.ShapeDtypeStruct):
        raise ValueError(
            f"{where} is a `jax.ShapeDtypeStruct`, which has no numbers to save. Pass "
            "arrays to `save`."
        )
    if not is_storable(x):
        raise ValueError(
            f"{where} is {describe(x)}, but only numbers and booleans of JAX dtypes, "
            "and PRNG keys, can be saved. Convert it, or leave it out."
        )
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        raise ValueError(
            f"{where} is spread over several processes, but `save` writes one file "
            "from one process. Save such arrays with orbax (`orbax.checkpoint`)."
        )


def check_has_devices(leaves: Leaves) -> None:
    """Checks that the shardings of `like` name devices, or that `jax.set_mesh` does."""
    for path, x in zip(leaves.paths, leaves.values, strict=True):
        sharding = getattr(x, "sharding", None)
        if is_abstract(with_devices(sharding)):
            raise ValueError(
                f"like{path_text(path)} has the sharding {sharding}, which names no "
                "devices, as `jax.eval_shape` gives it for explicit mesh axes. Call "
                "`load` inside `with jax.set_mesh(mesh)`, or set the sharding: "
                "`jax.ShapeDtypeStruct(shape, dtype, sharding=...)`."
            )


def check_enabled(leaves: Leaves) -> None:
    """Checks that JAX can make the arrays of `like`."""
    for path, x in zip(leaves.paths, leaves.values, strict=True):
        is_jax = isinstance(x, (jax.Array, jax.ShapeDtypeStruct))
        if is_jax and not is_enabled(x):
            raise ValueError(
                f"like{path_text(path)} is {x.dtype.name}, but JAX has 64-bit types "
                "disabled, and would round what it loads. Enable them with "
                '`jax.config.update("jax_enable_x64", True)`.'
            )


#
# A file and a tree
#


def check_fit(path: Path, found: Contents, like: Contents, moments: set[str]) -> None:
    """Checks that a file holds what `like` does. The checks are ordered so that the
    cause is reported, not its effects: a changed setting, not the shapes that it
    changes. `moments` are the paths of all moments in `like`."""
    _check_codecs(path, found, like)
    _check_scalars(path, found, like)
    _check_paths(path, found.words(), like.words())
    _check_dtypes(path, found, like, moments)
    _check_words(path, found.words(), like.words())


def _check_codecs(path: Path, found: Contents, like: Contents) -> None:
    for where in {**found.codecs, **like.codecs}:
        pair = [_stored_as(where, x) for x in (found, like)]
        if None not in pair and pair[0] != pair[1]:
            _raise_other_format(path, where, *pair)


def _stored_as(where: str, contents: Contents) -> str | None:
    array = contents.arrays.get(where)
    return contents.codecs.get(where, None if array is None else array.dtype)


def _raise_other_format(
    path: Path, where: str, found: object, expected: object
) -> NoReturn:
    raise CheckpointError(
        f"{where} is stored as {found} in {path}, but as {expected} in `like`. Load it "
        "into a state of the `state_format` that the file has, and convert that with "
        "`change_state_format`."
    )


def _check_scalars(path: Path, found: Contents, like: Contents) -> None:
    for where, expected in like.scalars.items():
        value = found.scalars.get(where, expected)
        if value != expected:
            raise CheckpointError(
                f"{where} is the {value} in {path}, but the {expected} in `like`. "
                "Python values are compared, not loaded. Build `like` with the value "
                "of the file, or, if it may differ, save it as an array."
            )


def _check_paths(path: Path, found: Mapping[str, str], like: Mapping[str, str]) -> None:
    differences = [
        *_only_in("`like`", like, "the file", found),
        *_only_in("the file", found, "`like`", like),
    ]
    if differences:
        raise CheckpointError(
            f"{path} has another structure than `like`: {', and '.join(differences)}. "
            "Was it saved with another model, another `trainable`, or another `b1`?"
        )


def _only_in(
    name: str, these: Mapping[str, str], other: str, those: Mapping[str, str]
) -> Iterator[str]:
    extra = [where for where in these if where not in those]
    if extra:
        more = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
        first = f"{name} has {these[extra[0]]} at {extra[0]}{more}"
        yield f"{first}, which {other} does not have"


def _check_dtypes(
    path: Path, found: Contents, like: Contents, moments: set[str]
) -> None:
    """Checks that moments of the same shapes are stored as the same dtypes."""
    for where, expected in like.arrays.items():
        array = found.arrays.get(where, expected)
        is_other = array.shape == expected.shape and array != expected
        if is_other and where in moments:
            _raise_other_format(path, where, array.dtype, expected.dtype)


def _check_words(path: Path, found: Mapping[str, str], like: Mapping[str, str]) -> None:
    for where, expected in like.items():
        if found[where] != expected:
            raise CheckpointError(
                f"{where} is {found[where]} in {path}, but {expected} in `like`. Was "
                "the file saved with another model or in another precision?"
            )


def moments_in(tree: PyTree) -> set[str]:
    """The paths of the moments of all states in a tree."""
    states = jtu.tree_leaves_with_path(tree, is_leaf=is_moment_state)
    return {
        full_path_text((*path, jtu.GetAttrKey(name), *inner))
        for path, state in states
        if is_moment_state(state)
        for name in state.names
        if name is not None
        for inner, _ in jtu.tree_leaves_with_path(getattr(state, name))
    }
