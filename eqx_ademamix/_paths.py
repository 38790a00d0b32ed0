"""Trees, flattened once into leaves with paths, and the words that describe them."""

import abc
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree


# A key (such as `jtu.DictKey`) for each level. JAX exports no type for all of them.
Path: TypeAlias = tuple[Any, ...]
# The structure of a tree. JAX exports its type only as a value.
PyTreeDef: TypeAlias = Any
# Anything that may be at a leaf of a user's tree, or a subtree.
Node: TypeAlias = Any


class AbstractLeaf(eqx.Module):
    """A module that takes the place of an array in a tree: one leaf, although JAX would
    look inside."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""

    @property
    @abc.abstractmethod
    def kind(self) -> str:
        """Its name in errors, before "of shape (...)"."""


def is_entry(x: Node) -> bool:
    """Whether `x` counts as a leaf although JAX would look inside: `None`, which marks
    an absent leaf, or an encoded moment."""
    return x is None or isinstance(x, AbstractLeaf)


def is_leaf(x: Node) -> bool:
    """Whether `x` is not a PyTree node, or is one that counts as a leaf."""
    return is_entry(x) or jtu.all_leaves([x])


def is_inexact_array(x: Node) -> bool:
    """Whether `x` is a floating-point or complex array, of JAX or of NumPy. (Equinox's
    function does not count NumPy arrays of bfloat16, as Flax restores them.)"""
    return isinstance(x, (jax.Array, np.ndarray, np.generic)) and _is_inexact(x)


def is_inexact_shape(x: Node) -> bool:
    """Whether `x` is an inexact array, or a `jax.ShapeDtypeStruct` of one."""
    is_struct = isinstance(x, jax.ShapeDtypeStruct)
    return is_inexact_array(x) or (is_struct and _is_inexact(x))


def _is_inexact(x: Node) -> bool:
    return bool(jnp.issubdtype(x.dtype, jnp.inexact))


def on_device(tree: PyTree) -> PyTree:
    """A tree with NumPy arrays converted to JAX arrays, for example from a
    checkpoint."""
    is_numpy = lambda x: isinstance(x, (np.ndarray, np.generic))
    return jax.tree.map(lambda x: jnp.asarray(x) if is_numpy(x) else x, tree)


#
# Flattening
#


class Leaves(NamedTuple):
    """A tree, flattened once. `None` and encoded moments are leaves."""

    paths: list[Path]
    values: list[Node]
    treedef: PyTreeDef

    def rebuilt(self, values: Sequence[Node]) -> PyTree:
        """The tree with other leaves."""
        return self.treedef.unflatten(values)


def flatten(tree: PyTree) -> Leaves:
    pairs, treedef = jtu.tree_flatten_with_path(tree, is_leaf=is_entry)
    return Leaves([path for path, _ in pairs], [x for _, x in pairs], treedef)


def inexact_shapes(model: PyTree) -> Leaves:
    """The inexact arrays of a model, or `jax.ShapeDtypeStruct`s of them, and `None`
    elsewhere."""
    tree = flatten(model)
    return tree._replace(
        values=[x if is_inexact_shape(x) else None for x in tree.values]
    )


def leaves_with_path(tree: PyTree) -> list[tuple[Path, Node]]:
    """All leaves of a tree with their paths, including `None` and encoded moments."""
    return jtu.tree_flatten_with_path(tree, is_leaf=is_entry)[0]


def structure(tree: PyTree) -> PyTreeDef:
    """The structure of a tree, with `None` and encoded moments as leaves."""
    return jtu.tree_structure(tree, is_leaf=is_entry)


def children(node: Node) -> tuple[list[tuple[Path, Node]], PyTreeDef]:
    """The children of a node with their keys, and the structure of that one level."""
    return jtu.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)


#
# Two trees side by side
#


class Departure(NamedTuple):
    """A place where a tree has another structure than a reference: the outermost nodes
    that differ. `is_static` if they differ only in static fields."""

    path: Path
    found: Node
    expected: Node
    is_static: bool = False


class Aligned(NamedTuple):
    """A tree in the order of a reference's leaves."""

    values: list[Node]  # `None` where the tree has no leaf at the reference's path
    departures: list[Departure]


def align(tree: PyTree, like: Leaves) -> Aligned:
    """Puts the leaves of a tree in the order of another tree's leaves."""
    values, treedef = jtu.tree_flatten(tree, is_leaf=is_entry)
    if treedef == like.treedef:
        return Aligned(values, [])
    by_path = dict(leaves_with_path(tree))
    departures = list(_departures(tree, like.rebuilt(like.values)))
    return Aligned([by_path.get(path) for path in like.paths], departures)


def _departures(tree: Node, reference: Node, path: Path = ()) -> Iterator[Departure]:
    if structure(tree) == structure(reference):
        return
    (items, treedef), (expected, expected_def) = map(children, (tree, reference))
    keys, expected_keys = ([key for key, _ in pairs] for pairs in (items, expected))
    is_other = type(tree) is not type(reference) or keys != expected_keys
    if is_leaf(tree) or is_leaf(reference) or is_other:
        yield Departure(path, tree, reference)
        return
    for (key, a), (_, b) in zip(items, expected, strict=True):
        yield from _departures(a, b, path + key)
    if treedef != expected_def:
        yield Departure(path, tree, reference, is_static=True)


#
# Words
#


def path_text(path: Path) -> str:
    """A path as error messages print it, without the middle if it is very long."""
    return shortened(jtu.keystr(path), 160)


def full_path_text(path: Path) -> str:
    """A path as reports print it."""
    return jtu.keystr(path) or "(the tree itself)"


def is_found(pattern: re.Pattern[str], path: str) -> bool:
    """Whether a pattern is in the text of a path. `^` matches before and after the
    leading dot of `.layers[0].weight`."""
    return any(re.search(pattern, text) for text in (path, path.removeprefix(".")))


def shortened(text: str, length: int) -> str:
    half = length // 2
    return text if len(text) <= length else f"{text[:half]}...{text[-half:]}"


def describe(x: Node) -> str:
    """Says in a few words what was found somewhere in a tree."""
    if x is None:
        return "None"
    if isinstance(x, (jax.Array, np.ndarray, np.generic)):
        return f"{with_article(x.dtype.name)} array of shape {x.shape}"
    if isinstance(x, AbstractLeaf):
        return f"{with_article(x.kind)} of shape {x.shape}"
    if isinstance(x, (bool, int, float, complex, str)):
        return f"the {type(x).__name__} {shortened(repr(x), 40)}"
    if isinstance(x, type):
        return f"the class `{shortened(x.__name__, 60)}`"
    if is_leaf(x) and callable(x):
        name = getattr(x, "__name__", type(x).__name__)
        return f"the function `{shortened(name, 60)}`"
    if isinstance(x, dict):
        if not x:
            return "an empty dict"
        keys = ", ".join(shortened(repr(key), 30) for key in list(x)[:4])
        return f"a dict with the keys {keys}{', ...' if len(x) > 4 else ''}"
    if type(x) in (list, tuple):
        return f"a {type(x).__name__} of length {len(x)}"
    return with_article(f"`{shortened(type(x).__name__, 60)}`")


def contrast(found: Node, expected: Node) -> tuple[str, str]:
    """Describes two things so that the reader sees how they differ."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in expected:
            if key not in found:
                text = shortened(repr(key), 30)
                return f"a dict without the key {text}", "one with it"
        for key in found:
            if key not in expected:
                text = shortened(repr(key), 30)
                return f"a dict with the key {text}", "one without it"
    if describe(found) != describe(expected):
        return describe(found), describe(expected)
    sizes = len(children(found)[0]), len(children(expected)[0])
    if sizes[0] != sizes[1]:
        return f"{describe(found)} with {sizes[0]} children", f"one with {sizes[1]}"
    return describe(found), "one with different static fields"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table, indented by two. The last column is not padded."""
    columns = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths = [*columns[:-1], 0]
    pairs = [zip(row, widths, strict=True) for row in rows]
    return ["  " + "  ".join(x.ljust(width) for x, width in row) for row in pairs]


def with_article(noun: str) -> str:
    """`a` or `an` before a noun, by its sound: `an MLP` and `an LSTMCell`, since their
    first letters are pronounced "em" and "el", but `a Linear` and `a uint8`."""
    word = noun.strip("`")
    is_acronym = len(word) > 1 and word[:2].isupper()
    is_vowel = word[:1] in ("AEFHILMNORSX" if is_acronym else "AEIOUaeiou")
    is_vowel = is_vowel and not _SOUNDS_LIKE_YOU.match(word)
    return f"{'an' if is_vowel else 'a'} {noun}"


_SOUNDS_LIKE_YOU = re.compile("u(int|ni|se|til)", re.IGNORECASE)
