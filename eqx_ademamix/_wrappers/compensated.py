"""16-bit parameters that train like float32 parameters."""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from beartype import beartype
from jax import lax
from jaxtyping import Array, Float, Int, Int32, PyTree, UInt32, jaxtyped

from .._checks import (
    check_alive,
    check_counter,
    check_gradient,
    check_optimizer,
    check_state_type,
    checked_leaves,
)
from .._filters import as_gradient, trained_arrays
from .._guards import Taken, chosen
from .._hyperparams import checked_flag
from .._inspection import is_moment_state, states_in
from .._numerics import (
    as_array,
    fingerprint,
    path_word,
    path_words,
    seed_of,
    text_hash,
    uniform,
    up_or_down,
)
from .._optimizer import AbstractOptimizer, OptaxOptimizer, hash_of, init, update
from .._paths import (
    Leaves,
    Node,
    Path,
    describe,
    flatten,
    is_entry,
    is_inexact_shape,
    on_device,
    path_text,
)
from .._sharding import in_sharding_of, scalars_beside, zeros_beside
from .._state import ArrayTree, CompensatedState, next_count
from .._storage.codec import Struct
from .._typing import DType, no_type_check


# pyright: reportUndefinedVariable=false
_Remainders: TypeAlias = PyTree[Int[Array, "?*leaf"], "Params"]


class Compensated(AbstractOptimizer[CompensatedState]):
    r"""Wraps an optimizer for parameters in bfloat16 or float16, and keeps what their
    rounding loses.

    A 16-bit parameter does not move if its step is less than half the distance to the
    next number: for bfloat16, that is 1/512 to 1/256 of the parameter, a large step.
    Here, the wrapped optimizer sees a float32 parameter: the model's $\theta$ plus a
    remainder $r$. Its update $u$ determines the update of the model and the next
    remainder:

    $$
    \begin{align*}
    t &= (\theta + r) + u \\
    u_{16} &= \text{round}_{16}(\text{round}_{16}(t) - \theta) \\
    \theta &\leftarrow \text{round}_{16}(\theta + u_{16}) \\
    r &\leftarrow t - \theta
    \end{align*}
    $$

    so nothing is lost (compensated summation, Kahan 1965). The third line is what
    `eqx.apply_updates` does. The remainder is stored as an integer, in fractions of the
    unit in the last place of $\theta$. It is usually at most half of that unit. Where a
    step is larger than the parameter, it can be many units, since $u_{16}$ has no
    digits for them. So the largest integers represent ever larger remainders. A value
    between two of them is rounded at random, so that the mean is exact where they are
    evenly spaced.

    With `bits=16`, a bfloat16 parameter and its remainder have 24 significant bits in
    four bytes, as float32 does. They take the steps of a float32 parameter bit for bit,
    except for about one in sixty, whose remainder is close to half a unit. With
    `bits=8`, they have 16 significant bits in three bytes.

    Parameters of other types are passed on unchanged.

    The remainders belong to the parameters that `eqx.apply_updates(params, updates)`
    returns. If you scale or clip the updates after `update`, or change the parameters
    in another way, the remainders are wrong, and no error is raised. Put everything
    that changes updates inside: `Compensated(optax.chain(optim, optax.scale(0.5)))`.
    With `check_params=True`, the next `update` raises an error if the parameters are
    not the result of the last one.

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

    optim: AbstractOptimizer[Any] | OptaxOptimizer
    bits: int = eqx.field(static=True)
    check_params: bool = eqx.field(static=True)

    @no_type_check
    def __init__(
        self,
        optim: AbstractOptimizer[Any] | OptaxOptimizer,
        bits: int = 16,
        *,
        check_params: bool = False,
    ):
        """**Arguments:**

        - `optim`: the optimizer, of this package or of optax.
        - `bits`: the bits of a remainder, 16 or 8.
        - `check_params`: whether `update` raises an error, with `eqx.error_if`, if the
            16-bit parameters are not exactly the result of the last `update`. The state
            then keeps a hash of them. Each step reads the parameters once more.

        **Raises:**

        - `ValueError` or `TypeError`: for anything else.
        """
        check_optimizer(optim)
        if type(bits) is not int or bits not in (8, 16):
            raise ValueError(f"`bits` is {describe(bits)}, but 8 or 16 was expected.")
        self.optim = optim
        self.bits = bits
        self.check_params = checked_flag("check_params", check_params)

    @no_type_check
    def init(self, params: PyTree) -> CompensatedState:
        """See [`eqx_ademamix.init`][]."""
        like = trained_arrays(True, flatten(params), or_structs=True)
        arrays = like.rebuilt(like.values)
        wide = eqx.combine(jax.tree.map(_wide_or_struct, arrays), params)
        inner_state = init(self.optim, wide)
        dtype = np.dtype(f"int{self.bits}")

        def remainder(p: Array | Struct | None, u: Node) -> Array | None:
            if p is None or u is None or not _is_16_bit(p):
                return None
            return zeros_beside(as_array(p), dtype)

        updates = _trained_by(self.optim, wide, inner_state)
        remainders = jax.tree.map(remainder, arrays, updates, is_leaf=is_entry)
        if jtu.tree_leaves(arrays) and not jtu.tree_leaves(remainders):
            warnings.warn(_NO_EFFECT, stacklevel=3)
        pairs = zip(like.values, flatten(remainders).values, strict=True)
        zero = scalars_beside(jtu.tree_leaves(arrays))
        return CompensatedState(
            inner_state=inner_state,
            remainder=remainders,
            count=zero(jnp.int32),
            fingerprint=zero(jnp.uint32) if self.check_params else None,
            dtypes=tuple(str(x.dtype) for x, r in pairs if r is not None),
        )

    @no_type_check
    def update(
        self,
        grads: PyTree,
        state: CompensatedState,
        params: PyTree | None = None,
        **extra_args: object,
    ) -> tuple[PyTree, CompensatedState]:
        """See [`eqx_ademamix.update`][]."""
        state, like, given = self._checked(grads, state, params)
        g = _checked_gradients(grads, like)
        r16 = [r for r in like.values if r is not None]
        before = _checked_count(state, given)
        p16 = _beside(given, r16)
        wide16 = _master(p16, r16)
        wide = eqx.combine(_in_tree(wide16, like), params)
        g = jax.tree.map(_wide, g)
        updates, inner_state = update(
            self.optim, g, state.inner_state, wide, **extra_args
        )
        u = _checked_updates(updates, params, like)
        taken = _taken(state.inner_state, inner_state)
        updates16, remainder = _split(
            [x for x, r in zip(u, like.values, strict=True) if r is not None],
            wide16,
            p16,
            r16,
            _keys(like),
            before,
            keeps_zero=taken is not None,
        )
        after = _fingerprint_after(given, updates16, state.fingerprint)
        new, old = (next_count(before), after), (before, state.fingerprint)
        count, fingerprint = chosen(taken, new, old)
        updates16 = _beside(updates16, given)
        return eqx.combine(_in_tree(updates16, like), updates), CompensatedState(
            inner_state=inner_state,
            remainder=_in_tree(remainder, like),
            count=count,
            fingerprint=fingerprint,
            dtypes=state.dtypes,
        )

    @no_type_check
    def master_params(self, params: PyTree, state: CompensatedState) -> PyTree:
        """The parameters plus their remainders, in float32: what the wrapped optimizer
        sees. Use it to evaluate the model or to save it.

        **Arguments:**

        - `params`: the model.
        - `state`: the state that belongs to it.

        **Returns:**

        The model with float32 arrays in place of the 16-bit arrays that are trained.

        **Raises:**

        - `ValueError` or `TypeError`: if model and state do not belong together.
        """
        state, like, p16 = self._checked(None, state, params)
        r16 = [r for r in like.values if r is not None]
        master = _beside(_master(_beside(p16, r16), r16), p16)
        return eqx.combine(_in_tree(master, like), params)

    def __hash__(self) -> int:
        return hash_of(self)

    def _checked(
        self, grads: PyTree, state: Any, params: PyTree | None
    ) -> tuple[CompensatedState, Leaves, list[Array]]:
        """The state, the leaves of its remainders, and the parameters that have one,
        once they are known to fit together."""
        check_state_type(state, grads, CompensatedState)
        if params is None:
            raise ValueError(
                "`params` is missing, but `Compensated` needs the parameters. Call "
                "`update(optim, grads, state, params)`."
            )
        for name, tree in {"grads": grads, "state": state, "params": params}.items():
            check_alive(name, tree)
        check_counter("count", state.count)
        state = on_device(state)
        like, p = flatten(state.remainder), _inexact(params)
        values = checked_leaves("params", p, like, other=_STATE, keep_extra=True)
        if flatten(p).treedef != like.treedef:
            raise ValueError(
                f"state.remainder is {describe(state.remainder)}, but it must have the "
                "structure of the parameters. Pass on the state as `init` of this "
                "optimizer or the last `update` returned it."
            )
        p16 = [x for x in values if x is not None]
        _check_remainders(p16, like, state.dtypes, self.bits)
        return state, like, p16


_STATE = "the optimizer state"
_CHANGED = (
    "The parameters that `Compensated` got are not those that its last update led to. "
    "Were the updates scaled or clipped before `eqx.apply_updates`, or the parameters "
    "changed in another way? Put everything that changes updates inside `Compensated`."
)
_NO_EFFECT = (
    "`Compensated` has no effect: no array that is trained has the dtype bfloat16 or "
    "float16. Cast the model before `init`, or use the wrapped optimizer by itself."
)


def _beside(arrays: list[Array], like: list[Array]) -> list[Array]:
    """Arrays with the shardings of others, where JAX knows them: remainders may be
    split over more devices than parameters."""
    return [in_sharding_of(x, y) for x, y in zip(arrays, like, strict=True)]


def _checked_count(state: CompensatedState, p16: list[Array]) -> Array:
    """The counter, with an error at run time if the 16-bit parameters are not as
    expected. (An error that belonged to the parameters would gather all of them on
    every device.)"""
    expected = state.fingerprint
    if expected is None or not p16:
        return state.count
    is_other = (expected != 0) & (fingerprint(p16) != expected)
    return eqx.error_if(state.count, is_other, _CHANGED)


def _fingerprint_after(
    p16: list[Array], updates: list[Array], before: Array | None
) -> Array | None:
    """The hash of the parameters that `eqx.apply_updates` will give."""
    if before is None:
        return None
    return fingerprint([p + u for p, u in zip(p16, updates, strict=True)])


def _taken(before: PyTree, after: PyTree) -> Taken:
    """Whether the wrapped optimizer took a step: false if all that can skip one did."""
    pairs = zip(_skipped(before), _skipped(after), strict=True)
    taken = [x == y for x, y in pairs]
    return jnp.any(jnp.stack(taken)) if taken else None


def _skipped(state: PyTree) -> list[Array]:
    """The counters of skipped steps of all states inside a state."""
    found = [x.skipped for x in states_in(state, is_moment_state)]
    return [x for x in found if x is not None]


def _trained_by(
    optim: AbstractOptimizer[Any] | OptaxOptimizer, params: PyTree, state: PyTree
) -> PyTree:
    """A tree that has `None` at each leaf that an optimizer does not train. Only our
    own optimizers choose. Their updates show the choice."""
    grads = eqx.filter(params, is_inexact_shape)
    if not isinstance(optim, AbstractOptimizer):
        return grads
    return eqx.filter_eval_shape(update, optim, grads, state, params)[0]


def _inexact(tree: PyTree) -> PyTree:
    arrays = trained_arrays(True, flatten(tree))
    return arrays.rebuilt(arrays.values)


def _in_tree(values: Sequence[Array], like: Leaves) -> PyTree:
    """The tree of remainders, with other arrays in their places."""
    rest = iter(values)
    return like.rebuilt([None if r is None else next(rest) for r in like.values])


def _places(like: Leaves) -> list[Path]:
    """The paths of the parameters that have a remainder."""
    pairs = zip(like.paths, like.values, strict=True)
    return [path for path, r in pairs if r is not None]


def _keys(like: Leaves) -> list[np.ndarray]:
    return [path_words(jtu.keystr(path)) for path in _places(like)]


def _check_remainders(
    p16: list[Array], like: Leaves, dtypes: tuple[str, ...], bits: int
) -> None:
    r16 = [r for r in like.values if r is not None]
    for path, x, r, dtype in zip(_places(like), p16, r16, dtypes, strict=False):
        if str(x.dtype) != dtype:
            raise ValueError(
                f"params{path_text(path)} has dtype {x.dtype}, but the state keeps a "
                f"remainder for {dtype} there. Cast the model before `init`, not after "
                "it."
            )
        if r.dtype != np.dtype(f"int{bits}"):
            raise ValueError(
                f"state.remainder{path_text(path)} has dtype {r.dtype}, but int{bits} "
                f"was expected at `bits={bits}`. Pass on the state as `init` of this "
                "optimizer or the last `update` returned it."
            )


def _checked_gradients(grads: PyTree, like: Leaves) -> PyTree:
    """The gradients as arrays, once they fit the parameters that have a remainder. The
    wrapped optimizer checks the others."""
    leaves = flatten(grads)
    g = leaves.rebuilt([as_gradient(x) for x in leaves.values])
    for path, x in zip(leaves.paths, flatten(g).values, strict=True):
        check_gradient(path, x)
    checked_leaves("grads", g, like, other=_STATE, keep_extra=True)
    return g


def _checked_updates(
    updates: PyTree, params: PyTree, like: Leaves
) -> list[Array | None]:
    """The updates of the wrapped optimizer, once no 16-bit parameter is trained without
    a remainder."""
    u, p = flatten(updates).values, flatten(_inexact(params)).values
    for path, x, u16, r in zip(like.paths, p, u, like.values, strict=True):
        if r is None and u16 is not None and _is_16_bit(x):
            raise ValueError(
                f"params{path_text(path)} has dtype {x.dtype}, but the state keeps no "
                "remainder for it. Cast the model before `init`, not after it."
            )
    return u


def _is_16_bit(x: Array | Struct) -> bool:
    return jnp.issubdtype(x.dtype, np.floating) and x.dtype.itemsize == 2


def _wide_or_struct(x: Array | Struct) -> Array | Struct:
    if isinstance(x, Struct) and _is_16_bit(x):
        return Struct(x.shape, np.float32, sharding=x.sharding)
    return x if isinstance(x, Struct) else _wide(x)


def _wide(x: Array) -> Array:
    return _widened(x) if _is_16_bit(x) else x


@jaxtyped(typechecker=beartype)
def _master(params: ArrayTree, remainder: _Remainders) -> ArrayTree:
    """The float32 parameters."""
    return jax.tree.map(_master_leaf, params, remainder)


@jaxtyped(typechecker=beartype)
def _split(
    updates: ArrayTree,
    wide: ArrayTree,
    params: ArrayTree,
    remainder: _Remainders,
    keys: Sequence[np.ndarray],
    count: Int32[Array, ""],
    *,
    keeps_zero: bool = False,
) -> tuple[ArrayTree, _Remainders]:
    """Splits updates into those that 16-bit parameters take, and new remainders. The
    arguments are lists of leaves, and `keys` are the words of the leaves' paths. With
    `keeps_zero`, an update of 0 changes neither the parameter nor the remainder."""
    leaves = zip(updates, wide, params, remainder, keys, strict=True)
    split = [
        _split_leaf(u, w, p, r, jnp.asarray(key), count) for u, w, p, r, key in leaves
    ]
    if keeps_zero:
        old = zip(split, updates, remainder, strict=True)
        split = [_unless_zero(u, new, r) for new, u, r in old]
    return [update for update, _ in split], [r for _, r in split]


# The functions of one leaf are jitted, so that all leaves of one type are traced and
# lowered once. Outside of `jit`, they compile one program for each type of leaf instead
# of one for each operation.


@jax.jit
def _widened(x: Array) -> Float[Array, "..."]:
    # Rounded again: if `x` is a sum, XLA may have deferred its rounding.
    return _in_precision_of(x, x.astype(np.float32))


@jax.jit
def _master_leaf(p: Array, r: Array) -> Float[Array, "..."]:
    return _wide(p) + _decode(r, p)


@jax.jit
def _unless_zero(u: Array, new: tuple[Array, Array], r: Array) -> tuple[Array, Array]:
    """A new update and remainder, or -0 and the old remainder where `u` is 0."""
    update, remainder = new
    is_zero = u == 0
    update = jnp.where(is_zero, -jnp.zeros_like(update), update)
    return update, jnp.where(is_zero, r, remainder)


@jax.jit
def _split_leaf(
    u: Array, wide: Array, p: Array, r: Array, key: Array, count: Int32[Array, ""]
) -> tuple[Array, Array]:
    seed = seed_of((count, path_word(count, key), text_hash("remainder")))
    target = wide + u.astype(np.float32)
    rounded, before = _in_precision_of(p, target), _wide(p)
    # An infinite parameter stays as it is, although infinity minus itself is a NaN.
    update = jnp.where(rounded == before, 0, _in_precision_of(p, rounded - before))
    after = _in_precision_of(p, before + update)
    return update.astype(p.dtype), _encode(target - after, after, p, r, seed)


def _in_precision_of(p: Array, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Rounds a float32 array to a 16-bit type, but leaves it as float32. XLA may remove
    a conversion to the type and back, but not this."""
    info = jnp.finfo(p.dtype)
    x16 = lax.reduce_precision(x, exponent_bits=info.nexp, mantissa_bits=info.nmant)
    if p.dtype != np.float16:
        return x16
    # `reduce_precision` flushes subnormal numbers to zero. Those of float16 lie below
    # 2^-14, and are multiples of 2^-24.
    spacing = np.float32(2.0**-24)
    return jnp.where(jnp.abs(x) < 2.0**-14, jnp.round(x / spacing) * spacing, x16)


#
# Remainders as integers
#


class _Codes(NamedTuple):
    """What the integers mean, in `parts` of a unit in the last place. Up to `single`
    each of them is one part more, up to `fourfold` four parts more, and above that
    there are `steps` of them to each doubling."""

    parts: int
    single: int
    fourfold: int
    steps: int
    top: int

    @property
    def largest(self) -> int:
        """The number of parts that the code `fourfold` represents."""
        return self.single + 4 * (self.fourfold - self.single)


# Half a unit, the largest remainder after an ordinary step, must lie below `largest`,
# with room for the rest of the codes above it.
#   16 bits: half a unit is 32768 parts. The first 32256 = 32768 (1 - 1/64) are exact,
#     so one remainder in 64 is not. The next 256 codes reach 32256 + 4 * 256 = 33280
#     parts, just above half a unit. The last 255 codes, ten to each doubling, reach
#     2^25 times that, beyond all 24 bits of float32.
#   8 bits: half a unit is 128 parts. 112 + 4 * 8 = 144, and the last seven codes, one
#     to each doubling, reach 2^7 times that.
_CODES = {
    1: _Codes(2**8, 112, 120, 1, 127),
    2: _Codes(2**16, 32256, 32512, 10, 32767),
}


def _encode(
    rest: Array, after: Array, p: Array, r: Array, seed: UInt32[Array, ""]
) -> Array:
    codes, chance = _CODES[r.dtype.itemsize], uniform(seed, p.shape)
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
    """The code of a number of parts, if codes were real numbers."""
    fourfold = codes.single + (parts - codes.single) / 4
    doubled = jnp.log2(jnp.maximum(parts, codes.largest) / codes.largest)
    above = codes.fourfold + codes.steps * doubled
    position = jnp.where(parts <= codes.single, parts, fourfold)
    return jnp.where(parts <= codes.largest, position, above)


def _parts(position: Array, codes: _Codes) -> Array:
    """The inverse of `_position`."""
    fourfold = codes.single + 4 * (position - codes.single)
    above = codes.largest * jnp.exp2((position - codes.fourfold) / codes.steps)
    parts = jnp.where(position <= codes.single, position, fourfold)
    return jnp.where(position <= codes.fourfold, parts, above)


def _last_place(x: Array, dtype: DType) -> Float[Array, "..."]:
    """The unit in the last place of 16-bit numbers, as a power of two. For bfloat16
    numbers below 2^-100 it is that of 2^-100, so that parts of it stay in the range of
    float32."""
    smallest = -14 if dtype == np.float16 else -100
    exponents = lax.bitcast_convert_type(jnp.abs(x), np.int32) >> 23
    exponents = jnp.maximum(exponents, smallest + 127) - jnp.finfo(dtype).nmant
    return lax.bitcast_convert_type(exponents << 23, np.float32)


def _encode_at_zero(rest: Array, r: Array, chance: Array) -> Array:
    """Zero has no last place. There, a remainder is the first bits of a float32."""
    left_out = 32 - jnp.iinfo(r.dtype).bits
    extra = (chance * np.float32(2**left_out)).astype(np.uint32)
    pattern = (lax.bitcast_convert_type(rest, np.uint32) + extra) >> left_out
    return lax.bitcast_convert_type(pattern.astype(f"uint{32 - left_out}"), r.dtype)


def _decode_at_zero(r: Array) -> Float[Array, "..."]:
    left_out = 32 - jnp.iinfo(r.dtype).bits
    pattern = r.astype(np.int32) << left_out
    return lax.bitcast_convert_type(pattern, np.float32)
