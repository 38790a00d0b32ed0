"""Arithmetic on moments: moving averages and bias correction.

Inside the package a decay is given by its complement, `1 - decay`, which is the number
that carries the precision: 0.9999 has four significant digits of it in float32.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree

from ._checks import (
    check_against_state,
    is_entry,
    leaves_with_path,
    no_type_check,
    on_device,
)
from ._encoded import is_encoded
from ._formats import cast, complex_dtype, compute_dtype, rounded
from ._hyperparams import (
    HyperParamLike,
    check_real_scalar,
    decay_complement,
    wide,
)


#
# On arrays
#


def times(factor: Array, x: Array) -> Array:
    """`factor * x` for a real factor and a real or complex `x`, of one precision."""
    return _componentwise(lambda part: factor * part, x)


def over(x: Array, divisor: Array) -> Array:
    """`x / divisor` for a real divisor and a real or complex `x`, of one precision."""
    return _componentwise(lambda part: part / divisor, x)


def _componentwise(fn: Callable[[Array], Array], x: Array) -> Array:
    if jnp.iscomplexobj(x):
        return lax.complex(fn(x.real), fn(x.imag))
    return fn(x)


def abs_squared(x: Array) -> Array:
    """$|x|^2$, real also for complex `x`. Where the square of a finite number overflows
    it is the largest finite number, since an infinite average never comes back."""
    if jnp.iscomplexobj(x):
        square = jnp.square(x.real) + jnp.square(x.imag)
    else:
        square = jnp.square(x)
    largest = jnp.asarray(jnp.finfo(square.dtype).max, square.dtype)
    return jnp.where(jnp.isfinite(x), jnp.minimum(square, largest), square)


def moving_average(average: Array, value: Array, complement: Array) -> Array:
    """`decay * average + (1 - decay) * value`, given `1 - decay`.

    For a decay near 1 this is `average + (1 - decay) * (value - average)`, the form
    that keeps small changes. For one near 0, where that would cancel, it is the plain
    form.
    """
    is_slow = (complement <= 0.5).astype(complement.dtype)
    kept = times(jnp.where(complement <= 0.5, 1.0, 1.0 - complement), average)
    return kept + times(complement, value - times(is_slow, average))


def bias_factor(complement: Array, count: Array) -> Array:
    r"""$1 - \beta^t$, given $1 - \beta$ and $t \ge 1$, without cancellation."""
    return -jnp.expm1(count * jnp.log1p(-complement))


def power(x: Array, order: int | float) -> Array:
    return x if order == 1 else x**order


def norm_power(x: Array, order: int | float) -> Array:
    """$|x|^n$, real."""
    return abs_squared(x) if order == 2 else jnp.abs(x) ** order


#
# On trees
#


@no_type_check
def tree_cast(tree: PyTree[Any], dtype: Any) -> PyTree[Any]:
    """Casts the arrays of a tree.

    **Arguments:**

    - `tree`: any tree. `None` and whatever is no array stay as they are.
    - `dtype`: the new dtype, or `None` for no change. Complex arrays stay complex: a
        real dtype means complex64 for them, float64 complex128.

    **Returns:**

    The tree with its arrays in the new dtype.

    !!! Example

        ```python
        import jax.numpy as jnp
        import eqx_ademamix

        tree = eqx_ademamix.tree_cast({"w": jnp.ones(3), "b": None}, jnp.bfloat16)
        assert tree["w"].dtype == jnp.bfloat16 and tree["b"] is None
        ```
    """
    if dtype is None:
        return tree
    return jax.tree.map(
        lambda x: (
            jnp.asarray(x).astype(_kept_complex(x, dtype)) if _is_number(x) else x
        ),
        tree,
    )


@no_type_check
def tree_zeros_like(tree: PyTree[Any], dtype: Any = None) -> PyTree[Any]:
    """Zeros in the shapes of the arrays of a tree.

    **Arguments:**

    - `tree`: any tree.
    - `dtype`: the dtype of the zeros, or `None` for that of each array. Complex arrays
        stay complex, as in [`eqx_ademamix.tree_cast`][].

    **Returns:**

    A tree with an array of zeros, on the same devices, for each array, and `None` for
    everything else.

    !!! Example

        ```python
        import jax.numpy as jnp
        import eqx_ademamix

        tree = eqx_ademamix.tree_zeros_like({"w": jnp.ones(3), "f": jnp.tanh})
        assert tree["w"].shape == (3,) and tree["f"] is None
        ```
    """
    return jax.tree.map(
        lambda x: (
            jnp.zeros_like(x, dtype=None if dtype is None else _kept_complex(x, dtype))
            if eqx.is_array(x)
            else None
        ),
        tree,
    )


@no_type_check
def tree_update_moment(
    updates: PyTree[Any], moments: PyTree[Any], decay: HyperParamLike, order: float
) -> PyTree[Any]:
    r"""One step of a moving average of powers:
    $m \leftarrow \beta m + (1 - \beta) g^n$.

    Computed in float32 or better, from $1 - \beta$ without cancellation, and rounded
    to each moment's dtype at the end.

    **Arguments:**

    - `updates`: $g$, usually gradients.
    - `moments`: $m$, a tree of the same structure and shapes.
    - `decay`: $\beta$, in [0, 1).
    - `order`: $n$.

    **Returns:**

    The new moments, each in the dtype that it had. `None` where both trees have it.

    **Raises:**

    - `ValueError` or `TypeError`: if the trees do not fit together, or if `decay` is
        out of range or a 16-bit array.

    !!! Example

        ```python
        import jax.numpy as jnp
        import eqx_ademamix

        m = eqx_ademamix.tree_update_moment(jnp.ones(2), jnp.zeros(2), 0.75, 1)
        assert (m == 0.25).all()
        ```
    """
    _check_dense("moments", moments)
    updates, moments = on_device(updates), on_device(moments)
    check_against_state("updates", updates, moments, other="`moments`")
    complement, n = decay_complement("decay", decay), _order(order)
    return _tree_average(lambda g: power(g, n), updates, moments, complement)


@no_type_check
def tree_update_moment_per_elem_norm(
    updates: PyTree[Any], moments: PyTree[Any], decay: HyperParamLike, order: float
) -> PyTree[Any]:
    r"""One step of a moving average of powers of the absolute value:
    $m \leftarrow \beta m + (1 - \beta) |g|^n$, real also for complex $g$.

    For real $g$ and even $n$ this is [`eqx_ademamix.tree_update_moment`][]. (optax
    leaves out the absolute value for real $g$: for odd $n$ its moment has a sign, for
    fractional $n$ it can be a NaN.)

    **Arguments:**

    - `updates`: $g$, usually gradients.
    - `moments`: $m$, a tree of the same structure and shapes, real.
    - `decay`: $\beta$, in [0, 1).
    - `order`: $n$, any number: even, odd or fractional.

    **Returns:**

    The new moments, each in the (real) dtype that it had. `None` where both trees have
    it.

    **Raises:**

    - `ValueError`: if the trees do not fit together, or if `decay` is out of range or a
        16-bit array.

    !!! Example

        ```python
        import jax.numpy as jnp
        import eqx_ademamix

        nu = eqx_ademamix.tree_update_moment_per_elem_norm(
            jnp.asarray(3 + 4j), jnp.zeros(()), 0.0, 2
        )
        assert nu == 25.0
        ```
    """
    _check_dense("moments", moments)
    updates, moments = on_device(updates), on_device(moments)
    check_against_state(
        "updates", updates, moments, other="`moments`", complex_too=False
    )
    real = jax.tree.map(jnp.real, moments)
    complement, n = decay_complement("decay", decay), _order(order)
    return _tree_average(lambda g: norm_power(g, n), updates, real, complement)


@no_type_check
def tree_bias_correction(
    moment: PyTree[Any], decay: HyperParamLike, count: Any
) -> PyTree[Any]:
    r"""Corrects a moving average that started at zero: $\hat m = m / (1 - \beta^t)$.

    The divisor is $-\text{expm1}(t \log \beta)$, which is exact to the last
    digits for small $t$ and for $\beta$ near 1.

    **Arguments:**

    - `moment`: $m$, a tree of arrays. What is no inexact array stays as it is.
    - `decay`: $\beta$, in [0, 1).
    - `count`: $t$, the number of steps in the average. For 0 it is returned unchanged.

    **Returns:**

    The tree of corrected moments, each in the dtype that it had.

    **Raises:**

    - `ValueError`: if `decay` is out of range or a 16-bit array.

    !!! Example

        ```python
        import jax.numpy as jnp
        import eqx_ademamix

        m = eqx_ademamix.tree_bias_correction(jnp.asarray(0.25), 0.75, 1)
        assert abs(m - 1.0) < 1e-6
        ```
    """
    _check_dense("moment", moment)
    check_real_scalar("count", count)
    t = wide(count)
    factor = bias_factor(decay_complement("decay", decay), jnp.maximum(t, 1.0))
    divisor = jnp.where(t > 0, factor, 1.0)

    def correct(m: Any) -> Any:
        if not eqx.is_inexact_array(m):
            return m
        real = compute_dtype(m.dtype)
        return rounded(over(cast(m, real), divisor.astype(real)), m.dtype)

    return jax.tree.map(correct, on_device(moment))


def _tree_average(
    of: Callable[[Array], Array], updates: Any, moments: Any, complement: Array
) -> Any:
    def average(g: Array | None, m: Array | None) -> Array | None:
        if g is None or m is None:
            return None
        real = compute_dtype(g.dtype, m.dtype)
        new = moving_average(cast(m, real), of(cast(g, real)), complement.astype(real))
        return rounded(new, m.dtype)

    return jax.tree.map(average, updates, moments, is_leaf=is_entry)


def _check_dense(name: str, tree: Any) -> None:
    encoded = [x for _, x in leaves_with_path(tree) if is_encoded(x)]
    if encoded:
        kind = type(encoded[0].codec).__name__
        raise TypeError(
            f"`{name}` has {kind} moments, but this function takes arrays. Pass "
            "those of `eqx_ademamix.decoded(state)`."
        )


def _order(order: Any) -> int | float:
    check_real_scalar("order", order)
    number = float(order)
    return int(number) if number.is_integer() else number


def _is_number(x: Any) -> bool:
    """Whether `x` is an array of numbers, which an array of PRNG keys is not."""
    return eqx.is_array(x) and not jnp.issubdtype(x.dtype, jax.dtypes.extended)


def _kept_complex(x: Any, dtype: Any) -> Any:
    wants_real = not jnp.issubdtype(dtype, jnp.complexfloating)
    if jnp.iscomplexobj(x) and wants_real:
        return complex_dtype(jnp.dtype(dtype))
    return dtype
