"""16-bit parameters that train like float32 ones."""

from typing import Any, NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from beartype import beartype
from jax import lax
from jaxtyping import Array, Float, Inexact, Int, Int32, PyTree, jaxtyped

from ._checks import (
    as_gradients,
    check_against_state,
    check_alive,
    check_counter,
    check_state_type,
    describe,
    is_entry,
    leaves_with_path,
    no_type_check,
    on_device,
    paired_leaves,
    path_text,
    structure,
)
from ._codecs import seed_of, uniform, up_or_down
from ._masks import select
from ._optimizer import AbstractOptimizer, hash_of, next_count


# pyright: reportUndefinedVariable=false
_Arrays: TypeAlias = PyTree[Inexact[Array, "?*leaf"], "Params"]
_Remainders: TypeAlias = PyTree[Int[Array, "?*leaf"], "Params"]


class CompensatedState(eqx.Module):
    """The state of [`eqx_ademamix.Compensated`][].

    **Attributes:**

    - `inner_state`: the state of the wrapped optimizer.
    - `remainder`: what the 16-bit parameters lack to the wanted ones, in steps that
        depend on the parameters: int16 or int8 arrays shaped like the 16-bit parameters
        that are trained, `None` at all other leaves.
    - `count`: the number of steps taken, an int32 scalar, on which the random rounding
        of the remainders depends.
    - `dtypes`: the names of the 16-bit types that the remainders belong to, in order.
    """

    inner_state: Any
    remainder: PyTree[Int[Array, "..."] | None]
    count: Int32[Array, ""]
    dtypes: tuple[str, ...] = eqx.field(static=True)


class Compensated(AbstractOptimizer[CompensatedState]):
    r"""Wraps an optimizer for parameters in bfloat16 or float16, and keeps what they
    round away.

    A 16-bit parameter does not move if its step is less than half the distance to the
    next number: for bfloat16 1/512 of itself, which is a large step. Here the wrapped
    optimizer sees a float32 parameter: the model's $\theta$ plus a remainder $r$. From
    its update $u$ follow the update of the model and the next remainder:

    $$
    \begin{align*}
    t &= (\theta + r) + u \\
    u_{16} &= \text{round}_{16}(\text{round}_{16}(t) - \theta) \\
    \theta &\leftarrow \text{round}_{16}(\theta + u_{16}) \\
    r &\leftarrow t - \theta
    \end{align*}
    $$

    so nothing is lost (compensated summation, Kahan 1965); the third line is what
    `eqx.apply_updates` does. The remainder is stored as an integer in parts of the unit
    in the last place of $\theta$. Mostly it is at most half of one; where a step is
    larger than the parameter it can be many, since $u_{16}$ has no digits for them. So
    the largest integers stand for ever larger remainders. What lies between two is
    rounded at random such that the mean is exact, if the two are evenly spaced.

    With `bits=16` a bfloat16 parameter and its remainder have 24 significant bits in
    four bytes, those of float32, and take the steps of a float32 parameter bit for bit
    but for one in sixty, whose remainder is close to half a unit. With `bits=8` they
    have 16 significant bits in three bytes.

    Parameters of other types are passed on as they are.

    !!! Example

        ```python
        import equinox as eqx
        import jax
        import jax.numpy as jnp
        import eqx_ademamix

        model = eqx.nn.MLP(2, 1, width_size=8, depth=1, key=jax.random.key(0))
        arrays, rest = eqx.partition(model, eqx.is_inexact_array)
        model = eqx.combine(eqx_ademamix.tree_cast(arrays, jnp.bfloat16), rest)

        optim = eqx_ademamix.Compensated(eqx_ademamix.AdEMAMix(1e-5))
        state = eqx_ademamix.init(optim, model)
        x = jnp.ones(2, jnp.bfloat16)
        grads = eqx.filter_grad(lambda model: model(x).sum())(model)
        updates, state = eqx_ademamix.update(optim, grads, state, model)
        model = eqx.apply_updates(model, updates)
        assert optim.master_params(model, state).layers[0].weight.dtype == jnp.float32
        ```
    """

    optim: Any
    bits: int = eqx.field(static=True)

    @no_type_check
    def __init__(
        self,
        optim: AbstractOptimizer[Any] | optax.GradientTransformation,
        bits: int = 16,
    ):
        """**Arguments:**

        - `optim`: the optimizer, of this package or of optax.
        - `bits`: 16 or 8, the bits of a remainder.

        **Raises:**

        - `ValueError` or `TypeError`: for anything else.
        """
        if isinstance(optim, type) or not (
            callable(getattr(optim, "init", None))
            and callable(getattr(optim, "update", None))
        ):
            raise TypeError(
                f"`optim` is {describe(optim)}, but an optimizer with the methods "
                "`init` and `update` was expected, of this package or of optax."
            )
        if type(bits) is not int or bits not in (8, 16):
            raise ValueError(f"`bits` is {describe(bits)}, but 8 or 16 was expected.")
        self.optim = optim
        self.bits = bits

    @no_type_check
    def init(self, params: PyTree[Any]) -> CompensatedState:
        """See [`eqx_ademamix.init`][]."""
        arrays = select(True, params, "params")
        wide = self._whole(jax.tree.map(_wide, arrays), params)
        inner_state = self.optim.init(wide)
        # Which leaves are trained only the optimizer knows.
        grads = eqx.filter(wide, eqx.is_inexact_array)
        updates, _ = eqx.filter_eval_shape(self.optim.update, grads, inner_state, wide)
        dtype = np.dtype(f"int{self.bits}")

        def remainder(p: Any, u: Any) -> Any:
            if p is None or u is None or not _is_16_bit(p):
                return None
            return jnp.zeros_like(p, dtype=dtype)

        remainders = jax.tree.map(remainder, arrays, updates, is_leaf=is_entry)
        return CompensatedState(
            inner_state=inner_state,
            remainder=remainders,
            count=jnp.zeros((), jnp.int32),
            dtypes=_dtypes(arrays, remainders),
        )

    @no_type_check
    def update(
        self,
        grads: PyTree[Any],
        state: CompensatedState,
        params: PyTree[Any] | None = None,
    ) -> tuple[PyTree[Any], CompensatedState]:
        """See [`eqx_ademamix.update`][]."""
        state = on_device(state)
        p = self._checked(grads, state, params)
        g = as_gradients(grads)
        check_against_state("grads", g, state.remainder, keep_extra=True)
        p16 = _where(state.remainder, p)
        wide = eqx.combine(_master(p16, state.remainder), p)
        updates, inner_state = self.optim.update(
            jax.tree.map(_wide, g), state.inner_state, self._whole(wide, params)
        )
        _check_no_other(p, updates, state.remainder)
        u16, wide16 = _where(state.remainder, updates), _where(state.remainder, wide)
        updates16, remainder = _split(u16, wide16, p16, state.remainder, state.count)
        return eqx.combine(updates16, updates), CompensatedState(
            inner_state=inner_state,
            remainder=remainder,
            count=next_count(state.count),
            dtypes=state.dtypes,
        )

    @no_type_check
    def master_params(
        self, params: PyTree[Any], state: CompensatedState
    ) -> PyTree[Any]:
        """The parameters with their remainders, in float32: what the wrapped optimizer
        sees, to evaluate or to save it.

        **Arguments:**

        - `params`: the model.
        - `state`: the state that belongs to it.

        **Returns:**

        The model with float32 arrays in the place of its 16-bit ones that are trained.

        **Raises:**

        - `ValueError` or `TypeError`: if model and state do not belong together.
        """
        state = on_device(state)
        p = self._checked(None, state, params)
        p16 = _where(state.remainder, p)
        return eqx.combine(_master(p16, state.remainder), params)

    def __hash__(self) -> int:
        return hash_of(self)

    def _checked(self, grads: Any, state: Any, params: Any) -> Any:
        """The arrays of the parameters, once all is known to fit."""
        check_state_type(state, grads, CompensatedState)
        if params is None:
            raise ValueError(
                "`params` is missing, but `Compensated` needs the parameters. Call "
                "`update(optim, grads, state, params)`."
            )
        for name, tree in {"grads": grads, "state": state, "params": params}.items():
            check_alive(name, tree)
        check_counter("count", state.count)
        p = select(True, params, "params")
        check_against_state("params", p, state.remainder, keep_extra=True)
        if structure(p) != structure(state.remainder):
            raise ValueError(
                f"state.remainder is {describe(state.remainder)}, but it has the "
                "structure of the parameters. Pass on the state as `init` of this "
                "optimizer or the last `update` returned it."
            )
        _check_remainders(p, state, self.bits)
        return p

    def _whole(self, arrays: Any, params: Any) -> Any:
        """What the wrapped optimizer gets: ours the whole model, optax the arrays."""
        is_ours = isinstance(self.optim, AbstractOptimizer)
        return eqx.combine(arrays, params) if is_ours else arrays


def _check_remainders(params: Any, state: CompensatedState, bits: int) -> None:
    dtypes = iter(state.dtypes)
    for path, x, r in paired_leaves(params, state.remainder):
        if r is None:
            continue
        expected = next(dtypes, None)
        if str(x.dtype) != expected:
            raise ValueError(
                f"params{path_text(path)} has dtype {x.dtype}, but the state keeps a "
                f"remainder for {expected} there. Cast the model before `init`, not "
                "after it."
            )
        if r.dtype != np.dtype(f"int{bits}"):
            raise ValueError(
                f"state.remainder{path_text(path)} has dtype {r.dtype}, but int{bits} "
                f"was expected at `bits={bits}`. Pass on the state as `init` of this "
                "optimizer or the last `update` returned it."
            )


def _check_no_other(params: Any, updates: Any, remainder: Any) -> None:
    """That no 16-bit parameter is trained without a remainder."""
    found = zip(leaves_with_path(params), leaves_with_path(updates), strict=True)
    for ((path, x), (_, u)), (_, r) in zip(
        found, leaves_with_path(remainder), strict=True
    ):
        if r is None and u is not None and _is_16_bit(x):
            raise ValueError(
                f"params{path_text(path)} has dtype {x.dtype}, but the state keeps no "
                "remainder for it. Cast the model before `init`, not after it."
            )


def _dtypes(params: Any, remainder: Any) -> tuple[str, ...]:
    pairs = paired_leaves(params, remainder)
    return tuple(str(x.dtype) for _, x, r in pairs if r is not None)


def _is_16_bit(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, np.floating) and x.dtype.itemsize == 2


def _wide(x: Array) -> Array:
    # Rounded, since XLA may have put off the rounding of a sum that `x` is.
    return _in_precision_of(x, x.astype(np.float32)) if _is_16_bit(x) else x


def _where(remainder: Any, tree: Any) -> Any:
    """A tree with its leaves only where there is a remainder."""
    keep = lambda r, x: None if r is None else x
    return jax.tree.map(keep, remainder, tree, is_leaf=is_entry)


@jaxtyped(typechecker=beartype)
def _master(params: _Arrays, remainder: _Remainders) -> _Arrays:
    """The float32 parameters."""
    return jax.tree.map(lambda p, r: _wide(p) + _decode(r, p), params, remainder)


@jaxtyped(typechecker=beartype)
def _split(
    updates: _Arrays,
    wide: _Arrays,
    params: _Arrays,
    remainder: _Remainders,
    count: Int32[Array, ""],
) -> tuple[_Arrays, _Remainders]:
    """Splits updates into those that 16-bit parameters take, and new remainders."""
    positions = jtu.tree_structure(params)
    positions = positions.unflatten(range(positions.num_leaves))

    def split(u: Any, w: Any, p: Any, r: Any, i: int) -> tuple[Any, Any]:
        return _split_leaf(u, w, p, r, (count, i))

    out = jax.tree.map(split, updates, wide, params, remainder, positions)
    part = lambda i: jax.tree.map(lambda _, pair: pair[i], positions, out)
    return part(0), part(1)


def _split_leaf(u: Array, wide: Array, p: Array, r: Array, key: Any) -> Any:
    target = wide + u.astype(np.float32)
    rounded, before = _in_precision_of(p, target), _wide(p)
    # An infinite parameter stays as it is, though infinity minus itself is no number.
    update = jnp.where(rounded == before, 0, _in_precision_of(p, rounded - before))
    after = _in_precision_of(p, before + update)
    return update.astype(p.dtype), _encode(target - after, after, p, r, key)


def _in_precision_of(p: Array, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Rounds a float32 array to a 16-bit type, but leaves it float32. XLA may leave out
    a conversion there and back, but not this."""
    info = jnp.finfo(p.dtype)
    x16 = lax.reduce_precision(x, exponent_bits=info.nexp, mantissa_bits=info.nmant)
    if p.dtype != np.float16:
        return x16
    # `reduce_precision` makes zeros of numbers that float16 has below its exponents.
    spacing = np.float32(2.0**-24)
    return jnp.where(jnp.abs(x) < 2.0**-14, jnp.round(x / spacing) * spacing, x16)


#
# Remainders as integers
#


class _Codes(NamedTuple):
    """What the integers mean, in parts of a unit in the last place: up to `single` one
    part each, up to `fourfold` four parts more each, and above that there are `steps`
    to each doubling."""

    parts: int
    single: int
    fourfold: int
    steps: int
    top: int

    @property
    def largest(self) -> int:
        """The number of parts that the code `fourfold` stands for."""
        return self.single + 4 * (self.fourfold - self.single)


_CODES = {
    1: _Codes(2**8, 112, 120, 1, 127),
    2: _Codes(2**16, 32256, 32512, 10, 32767),
}


def _encode(rest: Array, after: Array, p: Array, r: Array, key: Any) -> Array:
    codes, chance = _CODES[r.dtype.itemsize], uniform(seed_of(key), p.shape)
    parts = jnp.abs(rest) / _last_place(after, p.dtype) * codes.parts
    code = up_or_down(_position(parts, codes), chance)
    code = jnp.where(jnp.isfinite(rest), jnp.minimum(code, codes.top), 0)
    code = (jnp.sign(rest) * code).astype(r.dtype)
    return jnp.where(after == 0, _encode_at_zero(rest, r, chance), code)


def _decode(r: Array, p: Array) -> Float[Array, "..."]:
    codes, code, wide = _CODES[r.dtype.itemsize], r.astype(np.float32), _wide(p)
    parts = jnp.sign(code) * _parts(jnp.abs(code), codes)
    rest = parts / codes.parts * _last_place(wide, p.dtype)
    return jnp.where(wide == 0, _decode_at_zero(r), rest)


def _position(parts: Array, codes: _Codes) -> Array:
    """The code of a number of parts, if codes were real."""
    fourfold = codes.single + (parts - codes.single) / 4
    doubled = jnp.log2(jnp.maximum(parts, codes.largest) / codes.largest)
    above = codes.fourfold + codes.steps * doubled
    position = jnp.where(parts <= codes.single, parts, fourfold)
    return jnp.where(parts <= codes.largest, position, above)


def _parts(position: Any, codes: _Codes) -> Any:
    """The inverse of `_position`."""
    fourfold = codes.single + 4 * (position - codes.single)
    above = codes.largest * jnp.exp2((position - codes.fourfold) / codes.steps)
    parts = jnp.where(position <= codes.single, position, fourfold)
    return jnp.where(position <= codes.fourfold, parts, above)


def _last_place(x: Array, dtype: Any) -> Float[Array, "..."]:
    """The unit in the last place of 16-bit numbers, as a power of two. For bfloat16
    numbers below 2^-100 it is that of 2^-100, lest it leave the range of float32."""
    smallest = -14 if dtype == np.float16 else -100
    exponents = lax.bitcast_convert_type(jnp.abs(x), np.int32) >> 23
    exponents = jnp.maximum(exponents, smallest + 127) - jnp.finfo(dtype).nmant
    return lax.bitcast_convert_type(exponents << 23, np.float32)


def _encode_at_zero(rest: Array, r: Array, chance: Array) -> Array:
    """Zero has no last place: there a remainder is the first bits of a float32."""
    left_out = 32 - jnp.iinfo(r.dtype).bits
    extra = (chance * np.float32(2**left_out)).astype(np.uint32)
    pattern = (lax.bitcast_convert_type(rest, np.uint32) + extra) >> left_out
    return lax.bitcast_convert_type(pattern.astype(f"uint{32 - left_out}"), r.dtype)


def _decode_at_zero(r: Array) -> Float[Array, "..."]:
    left_out = 32 - jnp.iinfo(r.dtype).bits
    pattern = r.astype(np.int32) << left_out
    return lax.bitcast_convert_type(pattern, np.float32)
