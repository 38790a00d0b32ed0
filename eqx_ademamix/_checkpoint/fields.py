"""The hyperparameters of an optimizer as text, field by field."""

import dataclasses
import functools as ft
import inspect
from collections.abc import Callable, Iterator
from types import CellType, FunctionType
from typing import Any

import jax
import jax.tree_util as jtu
import numpy as np

from .._paths import Node, is_leaf
from .arrays import is_array, to_raw, type_of
from .file import as_bytes, checksum


# Trees that follow the model: its static fields are not hyperparameters.
_SPECS = ("weight_decay_mask", "trainable", "learning_rate_scale")


def fields_of(optim: object) -> dict[str, str]:
    """A text for each field of an optimizer and of its contents, by path. Two processes
    that build the same optimizer get the same texts, so no text contains an address."""
    return {path: _text(node) for path, node in _nodes("", optim, ())}


def left_at_default(optim: object) -> set[str]:
    """The paths of the fields that have their class's defaults. A file that is older
    than such a field does not mention it, and was saved without its effect."""
    return {
        f"{path}.{name}{rest}"
        for path, node in _nodes("", optim, ())
        if dataclasses.is_dataclass(node) and not isinstance(node, type)
        for name, default in _defaults(type(node)).items()
        for rest in _same_fields(getattr(node, name), default)
    }


def _defaults(cls: type) -> dict[str, object]:
    """The defaults of the arguments that have the names of fields."""
    names = {field.name for field in dataclasses.fields(cls)}
    given = inspect.signature(cls.__init__).parameters.values()
    return {
        x.name: x.default for x in given if x.name in names and x.default is not x.empty
    }


def _same_fields(value: Node, default: Node) -> dict[str, str]:
    """The fields of a value, if they equal those of a default."""
    fields = fields_of(value)
    return fields if fields == fields_of(default) else {}


def text_of(node: object) -> str:
    """One text for a codec and its fields."""
    pairs = [f"{path[1:]}={text}" for path, text in fields_of(node).items() if path]
    return f"{_text(node)}({', '.join(pairs)})"


def _nodes(path: str, node: Node, above: tuple[int, ...]) -> Iterator[tuple[str, Node]]:
    yield path, node
    if id(node) in above:  # a function that calls itself
        return
    for name, child in _parts(node):
        yield from _nodes(path + name, child, (*above, id(node)))


def _text(x: Node) -> str:
    if x is None or isinstance(x, (bool, int, float, complex, str, bytes, np.dtype)):
        return str(x) if isinstance(x, np.dtype) else repr(x)
    if is_array(x):
        return _array_text(x)
    named = x if hasattr(x, "__qualname__") else type(x)
    return str(named.__qualname__)


def _array_text(x: Any) -> str:
    """The values of a small array, and the checksum of a large one."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return str(type_of(x))
    raw = to_raw(x)
    values = (
        raw.tolist()
        if raw.size <= 8
        else f"with the checksum {checksum(as_bytes(raw))}"
    )
    return f"{type_of(x).dtype}{list(x.shape)} {values}"


def _parts(node: Node) -> list[tuple[str, Node]]:
    """The contents of a node, with the rest of the path to each."""
    if isinstance(node, type) or is_array(node):
        return []
    if isinstance(node, ft.partial):  # including the one that is a tree
        return [
            (".func", node.func),
            (".args", node.args),
            (".keywords", node.keywords),
        ]
    if dataclasses.is_dataclass(node):
        names = [field.name for field in dataclasses.fields(node)]
        return [part for name in names for part in _field(name, getattr(node, name))]
    if not is_leaf(node):
        return _leaves(node, lambda x: x is not node and dataclasses.is_dataclass(x))
    return [(f".{name}", x) for name, x in _variables(node).items()]


def _field(name: str, value: Node) -> list[tuple[str, Node]]:
    if name in _SPECS and not is_leaf(value):
        return [(f".{name}{path}", x) for path, x in _leaves(value, None)]
    return [(f".{name}", value)]


def _leaves(
    node: Node, is_leaf: Callable[[Node], bool] | None
) -> list[tuple[str, Node]]:
    pairs = jtu.tree_leaves_with_path(node, is_leaf=is_leaf)
    return [(jtu.keystr(path), x) for path, x in pairs]


def _variables(x: Node) -> dict[str, Node]:
    """What a function was made with, such as the length of a schedule: the variables
    of the functions around it and its defaults, or the attributes of a callable."""
    if inspect.ismethod(x):
        return {"__self__": x.__self__}
    if inspect.isfunction(x):
        defaults = {"__defaults__": x.__defaults__, "__kwdefaults__": x.__kwdefaults__}
        return {**_cells(x), **{k: v for k, v in defaults.items() if v}}
    if hasattr(x, "__wrapped__"):  # for example by `jax.jit`
        return {"__wrapped__": x.__wrapped__}
    return getattr(x, "__dict__", {}) if callable(x) else {}


def _cells(function: FunctionType) -> dict[str, Node]:
    names, cells = function.__code__.co_freevars, function.__closure__ or ()
    pairs = zip(names, map(_content, cells), strict=True)
    return {name: value for name, values in pairs for value in values}


def _content(cell: CellType) -> list[Node]:
    try:
        return [cell.cell_contents]
    except ValueError:  # a variable without a value yet
        return []
