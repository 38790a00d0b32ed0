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
    path_text,
)
from ._codecs import seed_of, uniform
from ._masks import select
from ._optimizer import AbstractOptimizer, next_count


# pyright: reportUndefinedVariable=false
_Arrays: TypeAlias = PyTree[Inexact[Array, "?*leaf"] | None, "Params"]
_Remainders: TypeAlias = PyTree[Int[Array, "?*leaf"] | None, "Params"]


class CompensatedState(eqx.Module):
    """The state of [`eqx_ademamix.Compensated`][].

    **Attributes:**

    - `inner_state`: the state of the wrapped optimizer.
    - `remainder`: what the 16-bit parameters lack to the wanted ones, in steps that
        depend on the parameters: int16 or int8 arrays shaped like the 16-bit parameters
        that are trained, `None` at all other leaves.
    - `count`: the number of steps taken, an int32 scalar, on which the random rounding
        of the remainders depends.
    """

    inner_state: Any
    remainder: PyTree[Int[Array, "..."] | None]
    count: Int32[Array, ""]


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
    u_{16} &= \operatorname{round}_{16}(\operatorname{round}_{16}(t) - \theta) \\
    \theta &\leftarrow \operatorname{round}_{16}(\theta + u_{16})
        && \text{which is what } \texttt{eqx.apply\_updates} \text{ computes} \\
    r &\leftarrow t - \theta
    \end{align*}
    $$

    so nothing is lost (compensated summation, Kahan 1965). The remainder is stored as
    an integer in units of the last place of $\theta$. Mostly it is at most half of one;
    where a step makes a parameter much smaller it can be many, since $u_{16}$ has no
    digits for them. So most integers divide half a unit evenly, and the last ones go up
    in a geometric series. They are rounded at random such that the mean is exact.

    With `bits=16` a bfloat16 parameter and its remainder have 24 significant bits in
    four bytes, as float32 has; with `bits=8` they have 16 in three.

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
        if isinstance(bits, bool) or bits not in (8, 16):
            raise ValueError(f"`bits` is {describe(bits)}, but 8 or 16 was expected.")
        self.optim = optim
        self.bits = int(bits)

    @no_type_check
    def init(self, params: PyTree[Any]) -> CompensatedState:
        """See [`eqx_ademamix.init`][]."""
        arrays = select(True, params, "params")
        wide = jax.tree.map(_wide, arrays)
        inner_state = self.optim.init(wide)
        # Which leaves are trained only the optimizer knows.
        updates, _ = eqx.filter_eval_shape(self.optim.update, wide, inner_state, wide)
        dtype = np.dtype(f"int{self.bits}")

        def remainder(p: Any, u: Any) -> Any:
            if p is None or u is None or not _is_16_bit(p):
                return None
            return jnp.zeros_like(p, dtype=dtype)

        return CompensatedState(
            inner_state=inner_state,
            remainder=jax.tree.map(remainder, arrays, updates, is_leaf=is_entry),
            count=jnp.zeros((), jnp.int32),
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
        g = jax.tree.map(_wide, as_gradients(grads))
        wide = _master(p, state.remainder)
        updates, inner_state = self.optim.update(g, state.inner_state, wide)
        updates, remainder = _split(updates, wide, p, state.remainder, state.count)
        return updates, CompensatedState(
            inner_state=inner_state,
            remainder=remainder,
            count=next_count(state.count),
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
        return eqx.combine(_master(p, state.remainder), params)

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
        for (path, x), (_, r) in zip(
            leaves_with_path(p), leaves_with_path(state.remainder), strict=True
        ):
            _check_remainder(path, x, r, self.bits)
        return p


def _check_remainder(path: Any, x: Any, remainder: Any, bits: int) -> None:
    if remainder is None:
        return
    if not _is_16_bit(x):
        raise ValueError(
            f"params{path_text(path)} has dtype {x.dtype}, but the state keeps a "
            "remainder for it, as it does for 16-bit parameters. Cast the model before "
            "`init`, not after it."
        )
    if remainder.dtype != np.dtype(f"int{bits}"):
        raise ValueError(
            f"state.remainder{path_text(path)} has dtype {remainder.dtype}, but "
            f"int{bits} was expected at `bits={bits}`. Pass on the state as `init` of "
            "this optimizer or the last `update` returned it."
        )


def _is_16_bit(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, np.floating) and x.dtype.itemsize == 2


def _wide(x: Array) -> Array:
    return x.astype(np.float32) if _is_16_bit(x) else x


@jaxtyped(typechecker=beartype)
def _master(params: _Arrays, remainder: _Remainders) -> _Arrays:
    """The float32 parameters."""

    def of(p: Any, r: Any) -> Any:
        return p if r is None else _wide(p) + _decode(r, p)

    return jax.tree.map(of, params, remainder, is_leaf=is_entry)


@jaxtyped(typechecker=beartype)
def _split(
    updates: _Arrays,
    wide: _Arrays,
    params: _Arrays,
    remainder: _Remainders,
    count: Int32[Array, ""],
) -> tuple[_Arrays, _Remainders]:
    """Splits updates into those that 16-bit parameters take, and new remainders."""
    positions = jtu.tree_structure(params, is_leaf=is_entry)
    positions = positions.unflatten(range(positions.num_leaves))

    def split(u: Any, w: Any, p: Any, r: Any, i: int) -> tuple[Any, Any]:
        return (u, None) if r is None else _split_leaf(u, w, p, r, (count, i))

    trees = updates, wide, params, remainder, positions
    out = jax.tree.map(split, *trees, is_leaf=is_entry)
    part = lambda i: jax.tree.map(lambda _, pair: pair[i], positions, out)
    return part(0), part(1)


def _split_leaf(u: Array, wide: Array, p: Array, r: Array, key: Any) -> Any:
    target = wide + u.astype(np.float32)
    update = _in_precision_of(p, _in_precision_of(p, target) - _wide(p))
    after = _in_precision_of(p, _wide(p) + update)
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
    """The integers up to `even` divide half a unit in the last place evenly; above them
    there are `steps` from each power of two to the next."""

    even: int
    steps: int
    top: int


_CODES = {1: _Codes(119, 1, 127), 2: _Codes(32256, 21, 32767)}


def _encode(rest: Array, after: Array, p: Array, r: Array, key: Any) -> Array:
    codes, chance = _CODES[r.dtype.itemsize], uniform(seed_of(key), p.shape)
    size = 2 * jnp.abs(rest) / _last_place(after, p.dtype)
    above = codes.even + codes.steps * jnp.log2(jnp.maximum(size, 1))
    code = jnp.floor(jnp.where(size <= 1, codes.even * size, above) + chance)
    code = jnp.where(jnp.isfinite(rest), jnp.minimum(code, codes.top), 0)
    code = jnp.where(rest < 0, -code, code).astype(r.dtype)
    return jnp.where(after == 0, _encode_at_zero(rest, r, chance), code)


def _decode(r: Array, p: Array) -> Float[Array, "..."]:
    codes, code = _CODES[r.dtype.itemsize], r.astype(np.float32)
    size = jnp.abs(code)
    above = jnp.exp2((size - codes.even) / codes.steps)
    size = jnp.where(size <= codes.even, size / codes.even, above) / 2
    wide = _wide(p)
    rest = jnp.sign(code) * size * _last_place(wide, p.dtype)
    return jnp.where(wide == 0, _decode_at_zero(r), rest)


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
