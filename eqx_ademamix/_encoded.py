"""The leaf of a state where a codec stores a moment."""

from typing import Any

import equinox as eqx
import numpy as np
from jaxtyping import Array


class Encoded(eqx.Module):
    """A moment as a codec stores it. It stands in the state where else an array would.

    **Attributes:**

    - `codec`: the [`eqx_ademamix.AbstractCodec`][] that made it.
    - `real`: the arrays that the codec made of the moment, or of its real part. The
        first has the moment's own shape.
    - `imag`: those of the imaginary part of a complex moment, else `None`.
    """

    codec: Any
    real: tuple[Array, ...]
    imag: tuple[Array, ...] | None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the moment."""
        return getattr(self.real[0] if self.real else None, "shape", ())

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype that decoding gives: float32 or complex64."""
        return np.dtype(np.float32 if self.imag is None else np.complex64)


def is_encoded(x: Any) -> bool:
    return isinstance(x, Encoded)
