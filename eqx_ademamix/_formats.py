"""How a moment is stored between two steps."""

from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ._checks import describe, leaves_with_path, no_type_check, path_text


_STORABLE = ("float16", "bfloat16", "float32", "float64")


class StateFormat(eqx.Module):
    """The dtypes in which the three moments are stored.

    All arithmetic is in float32 or better whatever is chosen here; only what is kept
    from one step to the next is rounded. float32 is a lower bound that wider parameters
    exceed: a float64 parameter has float64 moments. A complex parameter has complex
    `m1` and `m2`, complex64 at the least, and a real `nu`.

    A dtype of 16 bits is legal, but mind `m2`: at $\\beta_3 = 0.9999$ a step changes it
    by one part in ten thousand, and bfloat16 cannot represent a change of less than one
    part in 256.

    !!! Example

        ```python
        import jax.numpy as jnp
        import eqx_ademamix

        optim = eqx_ademamix.AdEMAMix(
            learning_rate=1e-3,
            state_format=eqx_ademamix.StateFormat(
                m1=jnp.bfloat16, m2=jnp.float32, nu=jnp.float32
            ),
        )
        ```
    """

    m1: np.dtype[Any] = eqx.field(static=True)
    m2: np.dtype[Any] = eqx.field(static=True)
    nu: np.dtype[Any] = eqx.field(static=True)

    @no_type_check
    def __init__(self, m1: Any, m2: Any, nu: Any):
        """**Arguments:**

        - `m1`, `m2`, `nu`: the dtype of each moment: float16, bfloat16, float32 or
            float64 (the last only where JAX has 64-bit types enabled).

        **Raises:**

        - `ValueError`: for any other dtype.
        """
        self.m1 = storable("StateFormat(m1=...)", m1)
        self.m2 = storable("StateFormat(m2=...)", m2)
        self.nu = storable("StateFormat(nu=...)", nu)

    @classmethod
    def float32(cls) -> "StateFormat":
        """The default: twelve bytes a parameter, or eight if `b1=0`."""
        return cls(m1=jnp.float32, m2=jnp.float32, nu=jnp.float32)


def checked_format(value: Any) -> StateFormat:
    if not isinstance(value, StateFormat):
        raise TypeError(
            f"`state_format` is {describe(value)}, but a `StateFormat` was expected, "
            "for example `StateFormat.float32()`."
        )
    return value


def storable(name: str, value: Any) -> np.dtype[Any]:
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        dtype = None
    if dtype is None or value is None or dtype.name not in _STORABLE:
        raise ValueError(
            f"`{name}` is {describe(value)}, but one of the dtypes "
            f"{', '.join(_STORABLE)} was expected."
        )
    if jnp.zeros((), dtype=float).dtype != dtype and dtype == np.float64:
        raise ValueError(
            f"`{name}` is float64, but JAX has 64-bit types disabled. "
            'Enable them with `jax.config.update("jax_enable_x64", True)`.'
        )
    return dtype


class Dtypes(NamedTuple):
    """The dtypes in which the moments of one parameter are stored."""

    m1: np.dtype[Any]
    m2: np.dtype[Any]
    nu: np.dtype[Any]


def stored_dtypes(fmt: StateFormat, param: np.dtype[Any]) -> Dtypes:
    """What a format stores for a parameter of a dtype."""
    real = Dtypes(*(_or_wider(dtype, param) for dtype in (fmt.m1, fmt.m2, fmt.nu)))
    if not jnp.issubdtype(param, jnp.complexfloating):
        return real
    return Dtypes(complex_dtype(real.m1), complex_dtype(real.m2), real.nu)


def _or_wider(stored: np.dtype[Any], param: np.dtype[Any]) -> np.dtype[Any]:
    return compute_dtype(param) if stored == np.float32 else stored


def complex_dtype(real: np.dtype[Any]) -> np.dtype[Any]:
    """The complex dtype with parts in a real dtype, complex64 at the least."""
    return np.dtype(np.complex128 if real == np.float64 else np.complex64)


def compute_dtype(*dtypes: np.dtype[Any]) -> np.dtype[Any]:
    """The real dtype of the arithmetic on arrays of these dtypes: float32 or better."""
    is_wide = any(dtype.name in ("float64", "complex128") for dtype in dtypes)
    return np.dtype(np.float64 if is_wide else np.float32)


def cast(x: Array, real: np.dtype[Any]) -> Array:
    """`x` in a real dtype, or in the complex one of that precision if it is complex."""
    return x.astype(complex_dtype(real) if jnp.iscomplexobj(x) else real)


def in_type_of(like: Array, x: Array) -> Array:
    """`x` in the dtype of another array of its shape, and weakly typed if that is:
    else adding it would change a parameter's type, and the next step compile again."""
    x = x.astype(like.dtype)
    return jnp.zeros_like(like).at[...].set(x) if like.weak_type else x


def check_stored(
    fmt: StateFormat, m1: Any, m2: Any, nu: Any, like: Any, *, exact: bool
) -> None:
    """Checks the dtypes of the moments. `like` holds the parameters if `exact`, else
    the gradients, which may be narrower or wider than the parameters are."""
    moments = zip(*map(leaves_with_path, (m1, m2, nu)), strict=True)
    for (path, x), leaves in zip(leaves_with_path(like), moments, strict=True):
        if x is None:
            continue
        found = [getattr(leaf, "dtype", None) for _, leaf in leaves]
        params = [x.dtype] if exact else _precisions(x)
        differences = [_difference(found, stored_dtypes(fmt, p)) for p in params]
        if all(differences):
            name, dtype, wanted = differences[0]
            raise ValueError(
                f"state.{name}{path_text(path)} has dtype {dtype}, but {wanted} was "
                "expected for this parameter and `state_format`. Pass on the state as "
                "`init` of this optimizer or the last `update` returned it."
            )


def _precisions(x: Array) -> list[np.dtype[Any]]:
    real = [np.dtype(np.float32), np.dtype(np.float64)]
    return [complex_dtype(dtype) for dtype in real] if jnp.iscomplexobj(x) else real


def _difference(found: list[Any], expected: Dtypes) -> tuple[Any, ...]:
    """The first moment whose dtype is not the expected one."""
    for name, dtype, wanted in zip(Dtypes._fields, found, expected, strict=True):
        if dtype is not None and dtype != wanted:
            return name, dtype, wanted
    return ()


def encode(value: Array, dtype: np.dtype[Any]) -> Array:
    """Rounds a moment to what is stored. A finite one stays finite: an infinite moment
    would become a NaN at the next step."""
    if dtype.itemsize == 2:
        bound = float(jnp.finfo(dtype).max)
        value = jnp.where(jnp.isfinite(value), jnp.clip(value, -bound, bound), value)
    return value.astype(dtype)
