"""What a tree holds besides its numbers, and how a file records it."""

import json
from typing import NamedTuple

import equinox as eqx
import jax
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

from .._inspection import is_moment_state, states_in
from .._paths import Leaves, full_path_text
from .._storage.codec import is_encoded
from .._version import __version__
from .arrays import ArrayType, is_array, type_of
from .fields import fields_of, text_of
from .file import FORMAT, FORMAT_VERSION


_SCALARS = (bool, int, float, complex, str, bytes)


class Contents(NamedTuple):
    """What a tree holds besides its numbers, by path as errors print it."""

    arrays: dict[str, ArrayType]
    scalars: dict[str, str]  # Python's
    codecs: dict[str, str]  # of the encoded moments
    fields: dict[str, str] | None  # of the optimizer, if there is one

    def words(self) -> dict[str, str]:
        """What is at each path, in words."""
        arrays = {path: str(x) for path, x in self.arrays.items()}
        return arrays | {path: f"the {x}" for path, x in self.scalars.items()}


def all_leaves(tree: PyTree) -> Leaves:
    """The leaves of a tree as JAX sees them, including those inside encoded moments."""
    pairs, treedef = jtu.tree_flatten_with_path(tree)
    return Leaves([path for path, _ in pairs], [x for _, x in pairs], treedef)


def contents_of(tree: PyTree, leaves: Leaves, optim: object) -> Contents:
    pairs = list(zip(map(full_path_text, leaves.paths), leaves.values, strict=True))
    nodes = jtu.tree_leaves_with_path(tree, is_leaf=is_encoded)
    return Contents(
        arrays={path: type_of(x) for path, x in pairs if is_array(x)},
        scalars={path: _scalar_text(x) for path, x in pairs if _is_scalar(x)},
        codecs={
            full_path_text(path): text_of(x.codec) for path, x in nodes if is_encoded(x)
        },
        fields=None if optim is None else fields_of(optim),
    )


def _is_scalar(x: object) -> bool:
    return isinstance(x, _SCALARS) and not is_array(x)  # NumPy's floats are both


def _scalar_text(x: object) -> str:
    return f"{type(x).__name__} {x!r}"


#
# As the metadata of a file, which is text only
#


def to_metadata(
    contents: Contents, step: int | None, checksums: dict[str, str]
) -> dict[str, str]:
    """`checksums` are those of the arrays, by path."""
    arrays = {
        path: {"dtype": x.dtype, "shape": x.shape, "crc32": checksums[path]}
        for path, x in contents.arrays.items()
    }
    parts = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "versions": _VERSIONS,
        "optimizer": contents.fields,
        "codecs": contents.codecs,
        "scalars": contents.scalars,
        "arrays": arrays,
    }
    return {"format": FORMAT, **{name: json.dumps(x) for name, x in parts.items()}}


_VERSIONS = {
    "eqx_ademamix": __version__,
    **{x.__name__: x.__version__ for x in (jax, eqx, np)},
}


def step_of(tree: PyTree) -> int | None:
    """The step that the only state in a tree has reached."""
    counts = [state.count for state in states_in(tree, is_moment_state)]
    is_one = len(counts) == 1 and np.shape(counts[0]) == ()
    return int(jax.device_get(counts[0])) if is_one else None


def from_metadata(metadata: dict[str, str]) -> tuple[Contents, dict[str, str]]:
    """The contents and the checksums of the arrays."""
    names = ("arrays", "scalars", "codecs", "optimizer")
    arrays, scalars, codecs, fields = (json.loads(metadata[name]) for name in names)
    types = {
        path: ArrayType(x["dtype"], tuple(x["shape"])) for path, x in arrays.items()
    }
    fields = None if fields is None else dict(fields)
    contents = Contents(types, dict(scalars), dict(codecs), fields)
    return contents, {path: x["crc32"] for path, x in arrays.items()}
