"""How a moment is stored between two steps."""

import dataclasses
import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array

from ._checks import describe, leaves_with_path, no_type_check, path_text
from ._codecs import AbstractCodec, ScaledFloat8, ScaledFloat16, part_structs
from ._encoded import Encoded


_STORABLE = ("float16", "bfloat16", "float32", "float64")


class StateFormat(eqx.Module):
    r"""How the three moments are stored: each as a dtype or by a codec.

    All arithmetic is in float32 or better whatever is chosen here; only what is kept
    from one step to the next is rounded. The update is made from a moment before it is
    rounded to a dtype, as in optax, but after it was stored by a codec, so that a
    donated state is overwritten in place: see [Low precision](precision.md#memory).
    Derivatives through an update are those without this rounding, and do not go through
    a state that a codec stored.

    A dtype: float32 is a lower bound that wider parameters exceed, so a float64
    parameter has float64 moments. A complex parameter has complex `m1` and `m2`,
    complex64 at the least, and a real `nu`. A dtype of 16 bits is legal, but mind `m2`:
    at $\beta_3 = 0.9999$ a step changes it by one part in ten thousand, and bfloat16,
    rounded to nearest, does not hear a change of less than one part in 512.

    A codec: [`eqx_ademamix.ScaledFloat8`][], [`eqx_ademamix.ScaledFloat16`][],
    [`eqx_ademamix.SplitBfloat16`][] or your own [`eqx_ademamix.AbstractCodec`][].
    Arrays of fewer than `min_size` entries, which hardly count, stay float32, or the
    parameter's own wider type. Codecs round at random, which depends on nothing but the
    counter and the place in the model: a run repeats bit for bit.

    | | bytes a parameter | `m1` | `m2` | `nu` |
    | --- | --- | --- | --- | --- |
    | [`float32()`][eqx_ademamix.StateFormat.float32] | 12 | 4 | 4 | 4 |
    | [`half()`][eqx_ademamix.StateFormat.half] | 6 | 2 | 2 | 2 |
    | [`compact()`][eqx_ademamix.StateFormat.compact] | 4 | 1 | 2 | 1 |

    !!! Example

        ```python
        import jax.numpy as jnp
        import eqx_ademamix

        params = {"weight": jnp.zeros((256, 1024)), "bias": jnp.zeros(256)}
        optim = eqx_ademamix.AdEMAMix(
            learning_rate=1e-3, state_format=eqx_ademamix.StateFormat.compact()
        )
        state = eqx_ademamix.init(optim, params)
        print(eqx_ademamix.state_report(state))

        mixed = eqx_ademamix.StateFormat(
            m1=jnp.bfloat16, m2=eqx_ademamix.SplitBfloat16(), nu=jnp.float32
        )
        ```
    """

    m1: np.dtype[Any] | AbstractCodec = eqx.field(static=True)
    m2: np.dtype[Any] | AbstractCodec = eqx.field(static=True)
    nu: np.dtype[Any] | AbstractCodec = eqx.field(static=True)
    min_size: int = eqx.field(static=True)

    @no_type_check
    def __init__(self, m1: Any, m2: Any, nu: Any, *, min_size: Any = 4096):
        """**Arguments:**

        - `m1`, `m2`, `nu`: a codec, or a dtype: float16, bfloat16, float32 or float64
            (the last only where JAX has 64-bit types enabled). For `nu` a codec is
            replaced by its variant for squares, which has no sign and no underflow.
        - `min_size`: the number of entries from which on an array is encoded. Concerns
            codecs only.

        **Raises:**

        - `ValueError`: for any other dtype, for a codec without negative numbers as
            `m1` or `m2`, and if `min_size` is no integer or negative.
        """
        self.m1 = _signed_storage("m1", m1)
        self.m2 = _signed_storage("m2", m2)
        is_codec = isinstance(nu, AbstractCodec)
        self.nu = _storage("nu", nu.for_squares() if is_codec else nu)
        is_integer = isinstance(min_size, int | np.integer)
        if not is_integer or isinstance(min_size, bool) or min_size < 0:
            raise ValueError(
                f"`min_size` is {describe(min_size)}, but an integer >= 0 was "
                "expected. The default is 4096."
            )
        self.min_size = int(min_size)

    @classmethod
    def float32(cls) -> "StateFormat":
        """The default: twelve bytes a parameter, or eight if `b1=0`.

        **Returns:**

        The format.
        """
        return cls(m1=jnp.float32, m2=jnp.float32, nu=jnp.float32)

    @classmethod
    def half(cls) -> "StateFormat":
        """Six bytes a parameter: [`eqx_ademamix.ScaledFloat16`][] for all moments.

        **Returns:**

        The format.
        """
        codec = ScaledFloat16()
        return cls(m1=codec, m2=codec, nu=codec)

    @classmethod
    def compact(cls) -> "StateFormat":
        """Four bytes a parameter: [`eqx_ademamix.ScaledFloat8`][] for `m1` and `nu`,
        [`eqx_ademamix.ScaledFloat16`][] for `m2`.

        **Returns:**

        The format.
        """
        return cls(m1=ScaledFloat8(), m2=ScaledFloat16(), nu=ScaledFloat8())


def checked_format(value: Any) -> StateFormat:
    if not isinstance(value, StateFormat):
        raise TypeError(
            f"`state_format` is {describe(value)}, but a `StateFormat` was expected, "
            "for example `StateFormat.float32()`."
        )
    return value


def _signed_storage(name: str, value: Any) -> Any:
    if isinstance(value, AbstractCodec) and not getattr(value, "signed", True):
        raise ValueError(
            f"`StateFormat({name}=...)` is {value}, which has no negative numbers. "
            "Leave out `signed=False`, which is for `nu`."
        )
    return _storage(name, value)


def _storage(name: str, value: Any) -> Any:
    if isinstance(value, AbstractCodec):
        return _checked_codec(name, value)
    return storable(f"StateFormat({name}=...)", value)


def _checked_codec(name: str, codec: AbstractCodec) -> AbstractCodec:
    if jtu.tree_leaves(codec) or not _is_hashable(codec):
        raise ValueError(
            f"`StateFormat({name}=...)` is {describe(codec)} with fields that are not "
            "static. Declare them as `eqx.field(static=True)`, and make no array one."
        )
    return codec


def _is_hashable(codec: AbstractCodec) -> bool:
    try:
        hash(tuple(getattr(codec, x.name) for x in dataclasses.fields(codec)))
    except TypeError:
        return False
    return True


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


class Storage(NamedTuple):
    """How the moments of one parameter are stored: by a codec, or as a dtype."""

    m1: Any
    m2: Any
    nu: Any


def storage(fmt: StateFormat, param: Any) -> Storage:
    """What a format means for a parameter of a shape and dtype."""
    is_encoded = math.prod(param.shape) >= fmt.min_size

    def of(entry: Any) -> Any:
        if isinstance(entry, AbstractCodec) and is_encoded:
            return entry
        is_wide = isinstance(entry, AbstractCodec) or entry == np.float32
        return compute_dtype(param.dtype) if is_wide else entry

    out = Storage(of(fmt.m1), of(fmt.m2), of(fmt.nu))
    if not jnp.issubdtype(param.dtype, jnp.complexfloating):
        return out
    return Storage(complex_dtype(out.m1), complex_dtype(out.m2), out.nu)


def zeros(fmt: StateFormat, param: Array) -> Storage:
    """Moments of zeros for a parameter."""
    kinds = storage(fmt, param)
    return Storage(
        zeros_in(kinds.m1, param),
        zeros_in(kinds.m2, param),
        zeros_in(kinds.nu, param.real),
    )


def zeros_in(kind: Any, like: Array) -> Any:
    """Zeros shaped and sharded as an array, as a codec or a dtype stores them."""
    if isinstance(kind, AbstractCodec):
        return kind.zeros(like)
    return jnp.zeros_like(like, dtype=kind)


def complex_dtype(real: Any) -> Any:
    """The complex dtype with parts in a real dtype, complex64 at the least. A codec
    stores complex moments as they are."""
    if isinstance(real, AbstractCodec):
        return real
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
    """Checks how the moments are stored. `like` holds the parameters if `exact`, else
    the gradients, which may be narrower or wider than the parameters are."""
    moments = zip(*map(leaves_with_path, (m1, m2, nu)), strict=True)
    for (path, x), leaves in zip(leaves_with_path(like), moments, strict=True):
        if x is None:
            continue
        found = [leaf for _, leaf in leaves]
        params = [x] if exact else _precisions(x)
        differences = [_difference(found, p, storage(fmt, p)) for p in params]
        wrong = [difference for difference in differences if difference is not None]
        if len(wrong) == len(params):
            name, kind, wanted = wrong[0]
            raise ValueError(
                f"state.{name}{path_text(path)} is stored as {kind}, but {wanted} was "
                "expected for this parameter and `state_format`. Pass on the state as "
                "`init` of this optimizer or the last `update` returned it."
            )


def _precisions(x: Array) -> list[Any]:
    dtypes = [np.dtype(np.float32), np.dtype(np.float64)]
    dtypes = list(map(complex_dtype, dtypes)) if jnp.iscomplexobj(x) else dtypes
    return [jax.ShapeDtypeStruct(x.shape, dtype) for dtype in dtypes]


def _difference(
    found: list[Any], param: Any, expected: Storage
) -> tuple[str, str, str] | None:
    """The name of the first moment that is stored otherwise than expected, how it is
    stored, and how it should be."""
    is_complex = bool(jnp.issubdtype(param.dtype, jnp.complexfloating))
    for name, moment, kind in zip(Storage._fields, found, expected, strict=True):
        text = _kind_text(moment, is_complex and name != "nu")
        if moment is not None and text != str(kind):
            return name, text, str(kind)
    return None


def _kind_text(moment: Any, is_complex: bool) -> str:
    """How a moment is stored; with its arrays if they are not what they should be."""
    if not isinstance(moment, Encoded):
        return str(getattr(moment, "dtype", None))
    text = str(moment.codec)
    if not isinstance(moment.codec, AbstractCodec):
        return text
    arrays = _types(moment.real) + _types(moment.imag or ())
    wanted = _types(part_structs(moment.codec, moment.shape))
    if arrays == wanted * (1 + is_complex):
        return text
    return f"{text} with the arrays {', '.join(arrays)}"


def _types(arrays: Any) -> list[str]:
    shapes = [list(getattr(x, "shape", "")) for x in arrays]
    dtypes = [getattr(x, "dtype", None) for x in arrays]
    return [f"{dtype}{shape}" for dtype, shape in zip(dtypes, shapes, strict=True)]


def decode(moment: Any) -> Any:
    """A moment as an array, however it is stored."""
    return moment.codec.decode(moment) if isinstance(moment, Encoded) else moment


def encode(value: Array, like: Any, key: Any = None) -> Any:
    """Rounds a moment to what is stored, in the way in which another one is."""
    if isinstance(like, Encoded):
        return like.codec.encode(value, key)
    return rounded(value, like.dtype)


def store(value: Array, like: Any, key: Any) -> tuple[Array, Any]:
    """Rounds a moment as `encode` does. Returns what of it goes into the update, and
    what is stored.

    What a codec stored goes into the update as it is read back. An update from the
    exact value would need the old codes after they are overwritten, for which XLA on
    CPUs copies all of them. As a dtype a moment goes into the update before it is
    rounded, as in optax."""
    stored = encode(value, like, key)
    if isinstance(like, Encoded):
        value = _read_back(value, decode(stored).astype(value.dtype))
    return value, stored


@jax.custom_jvp
def _read_back(value: Array, decoded: Array) -> Array:
    """What was decoded, with the derivative of what was encoded: that of rounding is
    zero, and would make the update's a silent zero."""
    return decoded


@_read_back.defjvp
def _read_back_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    return primals[1], tangents[0]


def rounded(value: Array, dtype: np.dtype[Any]) -> Array:
    """`value` in another dtype. A finite number stays finite: an infinite moment would
    become a NaN at the next step."""
    if dtype.itemsize == 2:
        bound = float(jnp.finfo(dtype).max)
        value = jnp.where(jnp.isfinite(value), jnp.clip(value, -bound, bound), value)
    return value.astype(dtype)
