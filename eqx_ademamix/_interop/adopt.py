"""Moments of another optimizer, stored like our own."""

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, PyTree

from .._checks import checked_leaves
from .._filters import trained_arrays
from .._inspection import decoded, find
from .._memory import placed_as, to_device
from .._numerics import AnyArray, cast, complex_dtype, compute_dtype
from .._paths import Node, flatten, path_text
from .._state import AdEMAMixState
from .._storage.codec import Stored, encode_like
from .._typing import DType, DTypeLike


def our_state(state: PyTree) -> AdEMAMixState:
    return decoded(find(state, is_ours, "of AdEMAMix", name="state"))


def is_ours(x: Node) -> bool:
    return isinstance(x, AdEMAMixState)


def adopted(
    name: str, tree: PyTree, trained: PyTree, own: PyTree, *, is_real: bool = False
) -> PyTree:
    """Copies of a tree of another optimizer's moments, stored like our `own`. `trained`
    is a tree of our moments that has one for every trained parameter."""
    like = flatten(trained)
    arrays = trained_arrays(True, flatten(tree))
    found = checked_leaves(
        name,
        arrays.rebuilt(arrays.values),
        like,
        other="the state of `optim`",
        keep_extra=True,
        complex_too=not is_real,
    )
    places = zip(like.paths, found, flatten(own).values, strict=True)
    return like.rebuilt(
        [
            None
            if x is None or y is None
            else in_format(f"{name}{path_text(path)}", x, y, is_square=is_real)
            for path, x, y in places
        ]
    )


def in_format(
    where: str, x: Array | np.ndarray, own: Stored, *, is_square: bool
) -> Stored:
    """A copy of a moment, stored like our own moment of that parameter and in the same
    memory, once its values are known to be legal. `is_square` says that it is `nu`."""
    x = to_device(x)
    _check_values(where, x, own, is_square)
    x = jnp.asarray(x)
    if own.dtype.kind != "c":
        x = jnp.real(x)  # optax starts the `nu` of a complex parameter complex
    real = compute_dtype(x.dtype, own.dtype)
    return placed_as(copies(encode_like(cast(x, real), own)), own)


def _check_values(
    where: str, x: Array | np.ndarray, own: Stored, is_square: bool
) -> None:
    """Checks that no entry is NaN or infinite, and that those of `nu` are real and not
    negative, if the values are known."""
    if isinstance(x, Tracer):
        return
    dtype = compute_dtype(own.dtype)
    flaws = _flaws(x, dtype, is_square)
    if flaws:
        numbers = "real numbers >= 0" if is_square else "finite numbers"
        raise ValueError(
            f"{where} has {flaws[0]} (in {dtype.name}), but {numbers} were expected. "
            "If the run diverged, convert a checkpoint from before that."
        )


_FLAWS = ("a NaN", "an infinite entry", "a negative entry", "a complex entry")


def _flaws(x: Array | np.ndarray, dtype: DType, is_square: bool) -> list[str]:
    if isinstance(x, np.ndarray):  # JAX may silently round float64 to float32
        found = _flaw_flags(np, dtype, is_square, x)
    else:
        # An array may be concrete inside a traced function too.
        with jax.ensure_compile_time_eval():
            found = jax.device_get(_flaw_flags_on_device(jnp, dtype, is_square, x))
    return [flaw for flaw, flag in zip(_FLAWS, found, strict=True) if flag]


def _flaw_flags(numpy: ModuleType, dtype: DType, is_square: bool, x: Any) -> list[Any]:
    """Whether a moment has each of the flaws, in the dtype of the arithmetic, where a
    large number may be infinite. (The smallest and largest entries would not be enough:
    XLA's minimum and maximum may lose a NaN.)"""
    is_complex = jnp.iscomplexobj(x)
    with np.errstate(over="ignore"):
        x = x.astype(complex_dtype(dtype) if is_complex else dtype)
    return [
        numpy.any(numpy.isnan(x)),
        numpy.any(numpy.isinf(x)),
        is_square and numpy.any(x.real < 0),
        is_square and is_complex and numpy.any(x.imag != 0),
    ]


# Jitted, so that the arrays stay on their devices and no copies of them are made.
_flaw_flags_on_device = jax.jit(_flaw_flags, static_argnums=(0, 1, 2))


def copies(tree: PyTree) -> PyTree:
    return jax.tree.map(copied, tree)


def copied(x: AnyArray, dtype: DTypeLike | None = None) -> Array:
    """A copy of an array (JAX or NumPy) in its own buffer, so that either may be
    donated, with the same sharding, in device memory."""
    return jnp.array(to_device(x), dtype=dtype, copy=True)
