"""How large the arrays of a leaf are: root mean squares, accurate at any magnitude."""

import functools as ft
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from beartype import beartype
from jax import lax
from jaxtyping import Array, Bool, Float, Inexact, PyTree, jaxtyped

from ._sharding import on_every_device
from ._storage.codec import Encoded, Stored, decode


# The arrays of one leaf: "m1", "m2" (or "m"), "nu", "update", "param", "grad".
LeafArrays: TypeAlias = dict[str, Stored]
# The shape of the numbers about a leaf: () for the whole, (layers,) for its layers.
Parts: TypeAlias = tuple[int, ...]


class Magnitudes(NamedTuple):
    """Numbers about the arrays of a leaf, of each layer of a leaf, of several leaves,
    or of all of them together."""

    rms: dict[str, Float[Array, "*parts"]]  # for each array
    cosine: Float[Array, "*parts"] | None  # of the angle between m1 and m2
    nonfinite: Float[Array, "*parts"] | None  # as a fraction of the gradient


@ft.partial(jax.jit, static_argnums=0)
@jaxtyped(typechecker=beartype)
def leaf_magnitudes(
    is_layered: bool, arrays: PyTree[Inexact[Array | Encoded, "*leaf"]]
) -> tuple[Magnitudes, Magnitudes | None]:
    """The numbers of a leaf and of each of its layers. Jitted, so that all leaves of
    one type are traced, lowered, and type-checked once."""
    if not is_layered:
        return _magnitudes(arrays, ()), None
    parts = _shape(arrays)[:1]
    layers = _magnitudes(arrays, parts)
    return together(layers, [1] * parts[0]), layers


def _shape(arrays: LeafArrays) -> tuple[int, ...]:
    return next(iter(arrays.values())).shape


#
# Squares
#
# Their means are first computed directly. If one of them is not finite or is too small,
# all are computed again, from the arrays divided by their largest entries. A mean is
# too small if it is at most `tiny / eps`: a square that underflows is wrong by less
# than `tiny`, the smallest normal number. In float32, an RMS from 3e-16 to 1e19 is in
# range. In large models, `nu` can be smaller than that, so it is multiplied by 2^40
# first. Its range begins at 3e-28, the square of a gradient of 2e-14.
#


def _magnitudes(arrays: LeafArrays, parts: Parts) -> Magnitudes:
    scales = {name: jnp.ones(parts, float) for name in arrays}
    scales["nu"] = jnp.full(parts, 2.0**-40, float)
    found, are_in_range = _at_scales(arrays, scales)
    if "grad" in arrays:
        # If their squares are in range, so are the gradients.
        found = found._replace(nonfinite=jnp.zeros(parts, float))
    return lax.cond(are_in_range, lambda: found, lambda: _rescaled(arrays, parts))


def _rescaled(arrays: LeafArrays, parts: Parts) -> Magnitudes:
    largest = ft.partial(jnp.max, initial=0.0)
    scales = {
        name: _positive(_reduced(largest, jnp.abs(_read(x)), parts))
        for name, x in arrays.items()
    }
    found, _ = _at_scales(arrays, scales)
    if "grad" not in arrays:
        return found
    flags = ~jnp.isfinite(decode(arrays["grad"]))
    return found._replace(nonfinite=_mean(flags.astype(float), arrays, parts))


def _at_scales(
    arrays: LeafArrays, scales: dict[str, Float[Array, "*parts"]]
) -> tuple[Magnitudes, Bool[Array, ""]]:
    """The numbers, computed from the arrays divided by scales, and whether all squares
    were in range."""
    mean = lambda x: _mean(x, arrays, scales["nu"].shape)
    scaled = {name: _divided(_read(x), scales[name]) for name, x in arrays.items()}
    squares = {name: mean(x * x) for name, x in scaled.items()}
    roots = {name: jnp.sqrt(x) for name, x in squares.items()}
    cosine = None
    if "m1" in scaled:
        product = mean(scaled["m1"] * scaled["m2"])
        cosine = jnp.clip(quotient(product, roots["m1"] * roots["m2"]), -1.0, 1.0)
    rms = {name: root * scales[name] for name, root in roots.items()}
    return Magnitudes(rms, cosine, None), _are_in_range(jnp.stack([*squares.values()]))


def _are_in_range(squares: Float[Array, "..."]) -> Bool[Array, ""]:
    info = jnp.finfo(squares.dtype)
    return jnp.all(jnp.isfinite(squares) & (squares > float(info.tiny / info.eps)))


def _read(x: Stored) -> Float[Array, "..."]:
    """A moment or an array as real numbers. Complex numbers become pairs, whose inner
    product is the real part of the complex one."""
    x = decode(x)
    pairs = jnp.stack([x.real, x.imag], axis=-1) if jnp.iscomplexobj(x) else x
    return pairs.astype(float)


def _mean(x: Float[Array, "..."], arrays: LeafArrays, parts: Parts) -> Array:
    """The mean over the entries of each part. A pair counts as one entry."""
    size = math.prod(_shape(arrays)[len(parts) :])
    return _reduced(jnp.sum, x, parts) / max(size, 1)


def _reduced(reduce: Any, x: Array, parts: Parts) -> Float[Array, "*parts"]:
    return on_every_device(reduce(x, axis=tuple(range(len(parts), x.ndim))))


def _divided(x: Array, scale: Float[Array, "*parts"]) -> Array:
    return x / jnp.expand_dims(scale, tuple(range(scale.ndim, x.ndim)))


def _positive(largest: Array) -> Array:
    """What to divide by: 1 where the largest number is zero or not finite. Its
    reciprocal is a normal number, because XLA may multiply by that."""
    scale = jnp.where(jnp.isfinite(largest) & (largest > 0), largest, 1.0)
    return jnp.minimum(scale, 1.0 / float(jnp.finfo(scale.dtype).tiny))


def quotient(x: Array, y: Array) -> Array:
    """`x / y`, where 0 / 0 is 0."""
    return x / jnp.where((x == 0) & (y == 0), 1.0, y)


#
# Parts of a whole
#


def together(parts: Magnitudes, sizes: Sequence[int]) -> Magnitudes:
    """The numbers of a whole from those of its parts."""
    weights = jnp.asarray([size / max(sum(sizes), 1) for size in sizes], float)
    rms = {name: _rms(x, weights) for name, x in parts.rms.items()}
    cosine, nonfinite = parts.cosine, parts.nonfinite
    if cosine is not None:
        # Quotients of parts and wholes cannot overflow. Inner products could.
        m1, m2 = (quotient(parts.rms[name], rms[name]) for name in ("m1", "m2"))
        cosine = jnp.sum(weights * m1 * m2 * cosine)
    if nonfinite is not None:
        nonfinite = jnp.sum(weights * nonfinite)
    return Magnitudes(rms, cosine, nonfinite)


def _rms(x: Float[Array, "parts"], weights: Float[Array, "parts"]) -> Float[Array, ""]:
    scale = _positive(jnp.max(x, initial=0.0))
    return scale * jnp.sqrt(jnp.sum(weights * jnp.square(x / scale)))
