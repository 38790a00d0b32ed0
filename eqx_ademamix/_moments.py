"""The arithmetic of moments on trees, as public functions."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ._checks import checked_leaves
from ._hyperparams import (
    HyperParamLike,
    Scalar,
    decay_complement,
    real_scalar,
    wide,
)
from ._numerics import (
    Decay,
    bias_factor,
    cast,
    complex_dtype,
    compute_dtype,
    moving_average,
    norm_power,
    over,
    power,
    rounded,
)
from ._paths import (
    Leaves,
    Node,
    describe,
    flatten,
    is_inexact_array,
    leaves_with_path,
    on_device,
    path_text,
)
from ._storage.codec import is_encoded
from ._typing import DTypeLike, no_type_check


@no_type_check
def tree_cast(tree: PyTree, dtype: DTypeLike | None) -> PyTree:
    """Casts the arrays of a tree.

    **Arguments:**

    - `tree`: any tree. `None` and anything that is not an array are returned unchanged.
    - `dtype`: the new dtype, or `None` for no change. Complex arrays stay complex: for
        them, a real dtype means complex64, and float64 means complex128.

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
def tree_zeros_like(tree: PyTree, dtype: DTypeLike | None = None) -> PyTree:
    """Zeros in the shapes of the arrays of a tree.

    **Arguments:**

    - `tree`: any tree.
    - `dtype`: the dtype of the zeros, or `None` for each array's own. Complex arrays
        stay complex, as in [`eqx_ademamix.tree_cast`][].

    **Returns:**

    A tree with an array of zeros, on the same devices, for each array, and `None` for
    all other leaves.

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
    updates: PyTree, moments: PyTree, decay: HyperParamLike, order: float
) -> PyTree:
    r"""One step of a moving average of powers:
    $m \leftarrow \beta m + (1 - \beta) g^n$.

    It is computed in float32 or better, from $1 - \beta$ without cancellation, and
    rounded to each moment's dtype at the end.

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
    complement, n = decay_complement("decay", decay), _order(order)
    return _tree_average(lambda g: power(g, n), updates, moments, complement)


@no_type_check
def tree_update_moment_per_elem_norm(
    updates: PyTree, moments: PyTree, decay: HyperParamLike, order: float
) -> PyTree:
    r"""One step of a moving average of powers of the absolute value:
    $m \leftarrow \beta m + (1 - \beta) |g|^n$, which is real even for complex $g$.

    For real $g$ and even $n$, this is [`eqx_ademamix.tree_update_moment`][], except
    where $|g|^2$ of a finite $g$ overflows: it is the largest finite number here.
    (optax omits the absolute value for real $g$: for odd $n$, its moment has a sign,
    and for fractional $n$, it can be NaN.)

    **Arguments:**

    - `updates`: $g$, usually gradients.
    - `moments`: $m$, a tree of the same structure and shapes, real.
    - `decay`: $\beta$, in [0, 1).
    - `order`: $n$, any number: even, odd, or fractional.

    **Returns:**

    The new moments, each in the (real) dtype that it had. `None` where both trees have
    it.

    **Raises:**

    - `ValueError` or `TypeError`: if the trees do not fit together, or if `decay` is
        out of range or a 16-bit array.

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
    complement, n = decay_complement("decay", decay), _order(order)
    of = lambda g: norm_power(g, n)
    return _tree_average(of, updates, moments, complement, is_real=True)


@no_type_check
def tree_bias_correction(
    moment: PyTree, decay: HyperParamLike, count: HyperParamLike
) -> PyTree:
    r"""Corrects a moving average that started at zero: $\hat m = m / (1 - \beta^t)$.

    The divisor is computed as $-\text{expm1}(t \log \beta)$, which is accurate to the
    last digits even for small $t$ and for $\beta$ near 1.

    **Arguments:**

    - `moment`: $m$, a tree of arrays. Anything that is not an inexact array is returned
        unchanged.
    - `decay`: $\beta$, in [0, 1).
    - `count`: $t$, the number of steps in the average. For 0, the tree is returned
        unchanged.

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
    t = wide(real_scalar("count", count))
    factor = bias_factor(decay_complement("decay", decay), jnp.maximum(t, 1.0))
    divisor = jnp.where(t > 0, factor, 1.0)

    def correct(m: Node) -> Node:
        if not is_inexact_array(m):
            return m
        real = compute_dtype(m.dtype)
        return rounded(over(cast(m, real), divisor.astype(real)), m.dtype)

    return jax.tree.map(correct, on_device(moment))


def _tree_average(
    of: Callable[[Array], Array],
    updates: PyTree,
    moments: PyTree,
    complement: Scalar,
    *,
    is_real: bool = False,
) -> PyTree:
    _check_dense("moments", moments)
    like = flatten(on_device(moments))
    _check_inexact("moments", like)
    gs = checked_leaves(
        "updates",
        on_device(updates),
        like,
        other="`moments`",
        complex_too=not is_real,
    )

    def average(g: Array | None, m: Array | None) -> Array | None:
        if g is None or m is None:
            return None
        m = m.real if is_real else m
        real = compute_dtype(g.dtype, m.dtype)
        decay = Decay.of(complement.astype(real))
        return rounded(moving_average(cast(m, real), of(cast(g, real)), decay), m.dtype)

    return like.rebuilt(list(map(average, gs, like.values)))


def _check_inexact(name: str, leaves: Leaves) -> None:
    for path, x in zip(leaves.paths, leaves.values, strict=True):
        if x is not None and not is_inexact_array(x):
            raise TypeError(
                f"{name}{path_text(path)} is {describe(x)}, but a moving average must "
                "be a floating-point or complex array. Integers would round its steps "
                "away."
            )


def _check_dense(name: str, tree: PyTree) -> None:
    encoded = [x for _, x in leaves_with_path(tree) if is_encoded(x)]
    if encoded:
        kind = type(encoded[0].codec).__name__
        raise TypeError(
            f"`{name}` has {kind} moments, but this function takes arrays. Pass the "
            "moments of `eqx_ademamix.decoded(state)`."
        )


def _order(order: object) -> int | float:
    number = float(real_scalar("order", order))
    return int(number) if number.is_integer() else number


def _is_number(x: Node) -> bool:
    """Whether `x` is an array of numbers, which an array of PRNG keys is not."""
    return eqx.is_array(x) and not jnp.issubdtype(x.dtype, jax.dtypes.extended)


def _kept_complex(x: Node, dtype: DTypeLike) -> DTypeLike:
    wants_real = not jnp.issubdtype(dtype, jnp.complexfloating)
    if jnp.iscomplexobj(x) and wants_real:
        return complex_dtype(jnp.dtype(dtype))
    return dtype
