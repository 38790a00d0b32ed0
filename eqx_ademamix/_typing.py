"""What the package's own annotations and runtime checks need."""

import typing
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import numpy as np


DType: TypeAlias = np.dtype[Any]
# Anything that names a dtype: "float32", np.dtype("float32"), jnp.float32. (JAX's own
# alias contains a protocol that beartype cannot check.)
DTypeLike: TypeAlias = str | DType | type[Any]

_Fn = TypeVar("_Fn", bound=Callable[..., Any])


def no_type_check(fn: _Fn) -> _Fn:
    """Exempts a public function from the checks of jaxtyping's import hook, whose
    messages for a whole model are too long to read. Our own checks come first, and the
    jaxtyped core is the safety net behind them.

    The hook recognizes the decorator by this name. `typing.no_type_check` itself would
    make static type checkers ignore the signature.
    """
    return typing.no_type_check(fn)
