"""Which moment is stored by which codec."""

import dataclasses
import math
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeAlias, TypeVar

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array

from .._paths import describe
from .._typing import DTypeLike, no_type_check
from .codec import AbstractCodec, Dense, Stored, storable
from .scaled import ScaledFloat8, ScaledFloat16


T = TypeVar("T")
CodecLike: TypeAlias = AbstractCodec | DTypeLike


if TYPE_CHECKING:

    class Moments(NamedTuple, Generic[T]):
        """One item for each moment of a parameter, or of all parameters: an array, what
        is stored, a tree, a name. `None` for a moment that does not exist."""

        m1: T | None
        m2: T
        nu: T
else:

    class Moments(NamedTuple):
        # beartype does not support generic named tuples, so this is `Moments[T]` at run
        # time.
        m1: object
        m2: object
        nu: object

        @classmethod
        def __class_getitem__(cls, item):
            return cls


class StateFormat(eqx.Module):
    r"""How the three moments are stored: each as a dtype or by a codec.

    All arithmetic is in float32 or better, whatever you choose here. Only what is kept
    from one step to the next is rounded. The update is computed from a moment before it
    is rounded to a dtype, as in optax, but after it is stored by a codec, so that a
    donated state is overwritten in place: see [Low precision](../precision.md#memory).
    In derivatives through an update, the rounding of a codec counts as the identity
    (straight-through, Bengio et al. 2013, arXiv:1308.3432). So the derivative is that
    of the rule, evaluated at the decoded moments, which is inaccurate where its terms
    cancel: see [Low precision](../precision.md#derivatives-through-an-update).
    Derivatives do not pass through a state that a codec stored.

    A dtype is shorthand for the codec [`eqx_ademamix.Dense`][]. float32 is a lower
    bound: a float64 parameter has float64 moments. A complex parameter has complex `m1`
    and `m2`, at least complex64, and a real `nu`. A 16-bit dtype is legal, but be
    careful with `m2`: at $\beta_3 = 0.9999$, a step changes it by one part in ten
    thousand, and bfloat16, rounded to nearest, loses any change of less than one part
    in 512.

    The other codecs are [`eqx_ademamix.ScaledFloat8`][],
    [`eqx_ademamix.ScaledFloat16`][], [`eqx_ademamix.SplitBfloat16`][], and your own
    [`eqx_ademamix.AbstractCodec`][]. Arrays with fewer than `min_size` entries stay
    float32, or the parameter's own dtype if it is wider: they add little to the total
    of a large model. A small model may have no others, and then keeps twelve bytes per
    parameter. These codecs round at random. The rounding depends only on the counter,
    the name of the moment, and the path of the leaf, so a run is reproducible bit for
    bit, and freezing or adding a layer changes no bit of another.

    | | bytes per parameter | `m1` | `m2` | `nu` |
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

    m1: AbstractCodec = eqx.field(static=True)
    m2: AbstractCodec = eqx.field(static=True)
    nu: AbstractCodec = eqx.field(static=True)
    min_size: int = eqx.field(static=True)

    @no_type_check
    def __init__(
        self, m1: CodecLike, m2: CodecLike, nu: CodecLike, *, min_size: int = 4096
    ):
        """**Arguments:**

        - `m1`, `m2`, `nu`: a codec, or a dtype: float16, bfloat16, float32 or float64
            (the last only if JAX has 64-bit types enabled). For `nu`, a codec is
            replaced by its variant for squares, which has no sign and no underflow.
        - `min_size`: arrays of at least this many entries are encoded. Has no effect on
            dtypes.

        **Raises:**

        - `ValueError`: for any other dtype, for a codec without negative numbers as
            `m1` or `m2`, and if `min_size` is not an integer or is negative.
        """
        self.m1 = _signed_codec("m1", m1)
        self.m2 = _signed_codec("m2", m2)
        self.nu = _codec("nu", nu).for_squares()
        self.min_size = _checked_min_size(min_size)
        for name, codec in (("m1", self.m1), ("m2", self.m2), ("nu", self.nu)):
            _check_static(name, codec)

    @classmethod
    def float32(cls) -> "StateFormat":
        """The default: twelve bytes per parameter, or eight if `b1=0`.

        **Returns:**

        The format.
        """
        return cls(m1=jnp.float32, m2=jnp.float32, nu=jnp.float32)

    @classmethod
    def half(cls) -> "StateFormat":
        """Six bytes per parameter: [`eqx_ademamix.ScaledFloat16`][] for all moments.

        **Returns:**

        The format.
        """
        codec = ScaledFloat16()
        return cls(m1=codec, m2=codec, nu=codec)

    @classmethod
    def compact(cls) -> "StateFormat":
        """Four bytes per parameter: [`eqx_ademamix.ScaledFloat8`][] for `m1` and `nu`,
        [`eqx_ademamix.ScaledFloat16`][] for `m2`.

        **Returns:**

        The format.
        """
        return cls(m1=ScaledFloat8(), m2=ScaledFloat16(), nu=ScaledFloat8())


def _checked_min_size(value: object) -> int:
    is_integer = isinstance(value, int | np.integer)
    if not is_integer or isinstance(value, bool) or value < 0:
        raise ValueError(
            f"`min_size` is {describe(value)}, but an integer >= 0 was expected. The "
            "default is 4096."
        )
    return int(value)


def checked_format(value: object) -> StateFormat:
    if not isinstance(value, StateFormat):
        raise TypeError(
            f"`state_format` is {describe(value)}, but a `StateFormat` was expected, "
            "for example `StateFormat.float32()`."
        )
    return value


def _signed_codec(name: str, value: object) -> AbstractCodec:
    if isinstance(value, AbstractCodec) and not getattr(value, "signed", True):
        raise ValueError(
            f"`StateFormat({name}=...)` is {value}, which has no negative numbers. "
            "Leave out `signed=False`, which is for `nu`."
        )
    return _codec(name, value)


def _codec(name: str, value: object) -> AbstractCodec:
    if isinstance(value, AbstractCodec):
        return value
    return Dense(storable(f"StateFormat({name}=...)", value))


def _check_static(name: str, codec: AbstractCodec) -> None:
    if jtu.tree_leaves(codec) or not _is_hashable(codec):
        raise ValueError(
            f"`StateFormat({name}=...)` is {describe(codec)} with fields that are not "
            "static. Declare them with `eqx.field(static=True)`, and do not use arrays."
        )


def _is_hashable(codec: AbstractCodec) -> bool:
    try:
        hash(tuple(getattr(codec, x.name) for x in dataclasses.fields(codec)))
    except TypeError:
        return False
    return True


def codecs(
    fmt: StateFormat, shape: tuple[int, ...]
) -> tuple[AbstractCodec, AbstractCodec, AbstractCodec]:
    """The codecs of `m1`, `m2` and `nu` for a parameter. A small one has dense
    moments."""
    is_small = math.prod(shape) < fmt.min_size

    def of(codec: AbstractCodec) -> AbstractCodec:
        return _FLOAT32 if is_small and not isinstance(codec, Dense) else codec

    return of(fmt.m1), of(fmt.m2), of(fmt.nu)


_FLOAT32 = Dense(np.float32)


def zeros(fmt: StateFormat, param: Array) -> Moments[Stored]:
    """Moments of zeros for a parameter."""
    m1, m2, nu = codecs(fmt, param.shape)
    return Moments(m1.zeros(param), m2.zeros(param), nu.zeros(param.real))
