"""Moment arithmetic on trees, and the function names of the JAX references."""
# optax uses one type for all states and all updates.
# pyright: reportArgumentType=false, reportCallIssue=false

import inspect
import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import pytest

import eqx_ademamix
from eqx_ademamix import (
    ademamix,
    alpha_scheduler,
    beta3_scheduler,
    scale_by_ademamix,
    tree_bias_correction,
    tree_cast,
    tree_update_moment,
    tree_update_moment_per_elem_norm,
    tree_zeros_like,
)

from .helpers import count_traces, make_zoo, tree_type, x64


def test_tree_cast(getkey: Any):
    tree = {
        "w": jnp.ones(3),
        "c": jnp.ones(2, jnp.complex64),
        "n": None,
        "i": jnp.ones(2, int),
        "numpy": np.ones(2, np.float64),
        "f": jnp.tanh,
    }
    out = tree_cast(tree, jnp.bfloat16)
    assert out["w"].dtype == out["i"].dtype == out["numpy"].dtype == jnp.bfloat16
    assert out["c"].dtype == jnp.complex64
    assert out["n"] is None and out["f"] is jnp.tanh
    assert tree_cast(tree, None) is tree
    assert tree_cast(tree, jnp.complex64)["w"].dtype == jnp.complex64
    with x64():
        assert tree_cast(tree, jnp.float64)["c"].dtype == jnp.complex128
    model = make_zoo(getkey())
    assert tree_cast(model, jnp.float16).function is model.function


def test_tree_zeros_like(getkey: Any):
    model = make_zoo(getkey())
    zeros = tree_zeros_like(model)
    arrays = eqx.filter(model, eqx.is_array)
    assert jtu.tree_structure(zeros) == jtu.tree_structure(arrays)
    assert all(not jnp.any(x) for x in jtu.tree_leaves(zeros))
    tree = {"w": jnp.ones(3), "c": jnp.ones(2, jnp.complex64), "n": None}
    zeros = tree_zeros_like(tree, jnp.bfloat16)
    assert zeros["w"].dtype == jnp.bfloat16 and zeros["c"].dtype == jnp.complex64
    assert zeros["n"] is None and tree_zeros_like(tree)["w"].dtype == jnp.float32


DTYPES = (jnp.float16, jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize("moment", DTYPES)
@pytest.mark.parametrize("update", DTYPES)
@pytest.mark.parametrize("order", (1, 2, 3))
@pytest.mark.parametrize("array", (False, True))
def test_update_moment(moment: Any, update: Any, order: int, array: bool):
    g = {"w": jnp.asarray([1.0, -2.0, 0.5], update), "n": None}
    m = {"w": jnp.asarray([0.5, 0.25, -1.0], moment), "n": None}
    decay: Any = jnp.asarray(0.9) if array else 0.9
    out = jax.jit(lambda g, m: tree_update_moment(g, m, decay, order))(g, m)
    exact = 0.9 * np.asarray(m["w"], float) + 0.1 * np.asarray(g["w"], float) ** order
    assert out["n"] is None and out["w"].dtype == moment
    powers = np.asarray(g["w"], float) ** order
    # Relative to the larger of the two values that are averaged.
    size = max(np.abs(np.asarray(x, float)).max() for x in (m["w"], powers))
    atol = float(jnp.finfo(moment).eps) * size
    np.testing.assert_allclose(np.asarray(out["w"], float), exact, rtol=0, atol=atol)


def test_update_moment_near_one():
    """Uses 1 - decay without cancellation, in bfloat16 and in float32 moments."""
    for dtype, rtol in ((jnp.float32, 1e-6), (jnp.bfloat16, 4e-3)):
        m = tree_update_moment(jnp.ones(()), jnp.zeros((), dtype), 0.999999, 1)
        np.testing.assert_allclose(float(m), 1e-6, rtol=rtol)
        assert m.dtype == dtype


@pytest.mark.parametrize("order", (1, 2, 3, 4, 0.5, 2.5))
def test_norm_of_complex(order: float):
    g = jnp.asarray([3 + 4j, -1j, 0.0, -2.0], jnp.complex64)
    m = jnp.asarray([1.0, 2.0, 3.0, 4.0])
    out = tree_update_moment_per_elem_norm({"g": g}, {"g": m}, 0.75, order)["g"]
    exact = 0.75 * np.asarray(m) + 0.25 * np.abs(np.asarray(g)) ** order
    np.testing.assert_allclose(out, exact, rtol=1e-6)
    assert out.dtype == jnp.float32
    real = jnp.asarray([5.0, -1.0, 0.0, -2.0])
    out = tree_update_moment_per_elem_norm(real, m, 0.75, order)
    np.testing.assert_allclose(out, exact, rtol=1e-6)


def test_complex_moment_of_order_one():
    g = jnp.asarray([3 + 4j, -1j], jnp.complex64)
    out = tree_update_moment(g, jnp.zeros_like(g), 0.75, 1)
    np.testing.assert_allclose(out, 0.25 * g)
    assert out.dtype == jnp.complex64


@pytest.mark.parametrize("decay", (0.0, 0.5, 0.9, 0.999, 0.999999, 1 - 1e-9))
@pytest.mark.parametrize("count", (1, 2, 10, 10_000, 2**31 - 1))
def test_bias_correction(decay: float, count: int):
    exact = 1 / -np.expm1(count * np.log1p(decay - 1)) if decay else 1.0
    for n in (count, np.int64(count), jnp.asarray(count, jnp.int32)):
        out = tree_bias_correction({"m": jnp.ones(2), "n": None}, decay, n)
        np.testing.assert_allclose(out["m"], exact, rtol=1e-6)
        assert out["n"] is None
    with x64():
        out = tree_bias_correction(jnp.ones(2), decay, count)
        np.testing.assert_allclose(out, exact, rtol=1e-13)


def test_bias_correction_of_nothing():
    m = {"a": jnp.asarray([0.3, -0.1], jnp.bfloat16), "c": jnp.asarray([1 + 2j])}
    for count in (0, jnp.asarray(0)):
        for decay in (0.0, 0.9, jnp.asarray(0.999)):
            out = jax.jit(tree_bias_correction)(m, decay, count)
            assert tree_type(out) == tree_type(m)
            for x, y in zip(jtu.tree_leaves(out), jtu.tree_leaves(m), strict=True):
                np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_all_kinds_of_arguments():
    """Accepts NumPy leaves, decays, and orders, and Python integers. Skips keys."""
    g, m = {"w": np.full(3, 2.0)}, {"w": np.zeros(3, np.float32)}
    for order in (2, 2.0, np.int64(2), np.float32(2), jnp.asarray(2)):
        for decay in (0, 0.0, np.float32(0), jnp.asarray(0)):
            for update in (tree_update_moment, tree_update_moment_per_elem_norm):
                assert jnp.all(update(g, m, decay, order)["w"] == 4.0)
    key = jax.random.key(0)
    assert tree_cast({"key": key}, jnp.bfloat16)["key"] is key
    corrected = tree_bias_correction({"n": jnp.arange(3), "f": jnp.tanh}, 0.9, 1)
    assert corrected["f"] is jnp.tanh and corrected["n"][2] == 2
    mask = {"w": jnp.asarray(True), "b": jnp.asarray(False)}
    tx, p = (
        ademamix(1.0, weight_decay=0.5, mask=mask),
        {"w": jnp.ones(2), "b": jnp.ones(2)},
    )
    updates: Any = tx.update(tree_zeros_like(p), tx.init(p), p)[0]
    assert jnp.all(updates["w"] == -0.5) and jnp.all(updates["b"] == 0)


def test_against_optax():
    g = {"w": jnp.linspace(-1, 1, 12).reshape(3, 4), "c": jnp.asarray([1 + 2j, -3j])}
    m = tree_zeros_like(g)
    with jax.numpy_dtype_promotion("standard"):
        ours = tree_update_moment(g, m, 0.9, 1)
        theirs = optax.tree.update_moment(g, m, 0.9, 1)
        ours_nu = tree_update_moment_per_elem_norm(g, jax.tree.map(jnp.real, m), 0.9, 2)
        theirs_nu = optax.tree.update_moment_per_elem_norm(g, m, 0.9, 2)
        pairs = [(ours, theirs), (ours_nu, theirs_nu)]
        pairs.append(
            (
                tree_bias_correction(ours, 0.9, 3),
                optax.tree.bias_correction(theirs, 0.9, 3),
            )
        )
        for a, b in pairs:
            jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), a, b)


@pytest.mark.parametrize(
    "call,text",
    (
        (
            lambda: tree_update_moment({"w": None}, {"w": jnp.ones(2)}, 0.9, 1),
            r"updates\['w'\] is None, but `moments` has a float32 array",
        ),
        (
            lambda: tree_update_moment(
                {"w": jnp.ones((2, 1))}, {"w": jnp.ones(2)}, 0.9, 1
            ),
            r"updates\['w'\] has shape \(2, 1\), but `moments` has \(2,\) there",
        ),
        (
            lambda: tree_update_moment(jnp.ones(2), jnp.ones(2, complex), 0.9, 1),
            "updates has dtype float32, but `moments` is for a complex parameter",
        ),
        (
            lambda: tree_update_moment_per_elem_norm([jnp.ones(2)], (), 0.9, 2),
            "updates is a list of length 1, but `moments` has a tuple of length 0",
        ),
        (
            lambda: tree_update_moment(jnp.ones(2), jnp.ones(2), 1.0, 1),
            r"`decay` is 1.0, but a number in \[0, 1\)",
        ),
        (
            lambda: tree_bias_correction(
                jnp.ones(2), jnp.asarray(0.9, jnp.bfloat16), 1
            ),
            "`decay` is a bfloat16 array",
        ),
        (
            lambda: tree_bias_correction(jnp.ones(()), 0.9, jnp.ones(3, int)),
            r"`count` has shape \(3,\), but a scalar",
        ),
        (
            lambda: tree_update_moment(jnp.ones(2), jnp.ones(2), 0.9, "1"),  # pyright: ignore
            "`order` is the str '1', but a real number",
        ),
    ),
)
def test_errors(call: Any, text: str):
    with pytest.raises((ValueError, TypeError), match=text) as info:
        call()
    assert len(str(info.value)) < 600


#
# The names from the references
#


def test_signatures():
    empty = inspect.Parameter.empty
    common = {"b1": 0.9, "b2": 0.999, "b3": 0.9999, "alpha": 5.0}
    schedulers = {"b3_scheduler": None, "alpha_scheduler": None}
    rest = {"eps": 1e-8, "eps_root": 0.0}
    guards = {
        "max_slow_ratio": None,
        "clip_update_rms": None,
        "skip_nonfinite": False,
    }
    expected = {
        ademamix: {
            "lr": None,
            **common,
            **schedulers,
            **rest,
            "weight_decay": 0.0,
            "mu_dtype": None,
            "mask": None,
            "learning_rate": None,
            **guards,
        },
        scale_by_ademamix: {
            **dict.fromkeys((*common, *schedulers), empty),
            **rest,
            "mu_dtype": None,
            **guards,
        },
        alpha_scheduler: {"alpha": empty, "alpha_start": 0.0, "warmup": 0, "offset": 0},
        beta3_scheduler: {
            "beta_end": empty,
            "beta_start": 0.0,
            "warmup": 0,
            "offset": 0,
        },
    }
    for fn, arguments in expected.items():
        parameters = inspect.signature(fn).parameters
        assert {k: v.default for k, v in parameters.items()} == arguments
        assert list(parameters) == list(arguments)
    assert eqx_ademamix.ScaleByAdemamixState is eqx_ademamix.AdEMAMixState


def test_a_true_transformation():
    params = {"w": jnp.ones(3)}
    for tx in (
        ademamix(1e-3),
        ademamix(learning_rate=1e-3),
        scale_by_ademamix(0.9, 0.999, 0.9999, 5.0, None, None, 1e-8, 0.0, jnp.float32),
    ):
        assert isinstance(tx, optax.GradientTransformation)
        state = tx.init(params)
        assert isinstance(state, eqx_ademamix.ScaleByAdemamixState)


def test_all_ways_are_one_optimizer():
    """Arguments by position, in both spellings, and with schedules in either place."""
    params = {"w": jnp.linspace(-1, 1, 5)}
    b3, alpha = beta3_scheduler(0.99, 0.9, warmup=5), alpha_scheduler(3.0, warmup=5)
    ways = (
        ademamix(
            1e-2, 0.8, 0.99, 0.5, 7.0, b3, alpha, 1e-6, 1e-7, 0.1, jnp.float32, None
        ),
        ademamix(
            learning_rate=1e-2, b1=0.8, b2=0.99, b3=b3, alpha=alpha, eps=1e-6,
            eps_root=1e-7, weight_decay=0.1,
        ),
        eqx_ademamix.AdEMAMix(
            1e-2, b1=0.8, b2=0.99, b3=b3, alpha=alpha, eps=1e-6, eps_root=1e-7,
            weight_decay=0.1,
        ),
    )  # fmt: skip
    ends = []
    for tx in ways:
        p, state = params, tx.init(params)
        for _ in range(8):
            updates, state = tx.update(p, state, p)
            p = eqx.apply_updates(p, updates)
        ends.append(p["w"])
    np.testing.assert_array_equal(ends[0], ends[1])
    np.testing.assert_array_equal(ends[0], ends[2])


def test_scale_has_a_positive_sign():
    params = jnp.asarray([1.0, -2.0])
    tx = scale_by_ademamix(0.9, 0.999, 0.9999, 0.0, None, None)
    updates, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_allclose(updates, [1.0, -1.0], rtol=1e-5)


@pytest.mark.parametrize(
    "call,text",
    (
        (lambda: ademamix(), "two names of one argument, but neither is given"),
        (lambda: ademamix(1e-3, learning_rate=1e-3), "but both are given"),
        (
            lambda: ademamix(1e-3, b3=lambda c: 0.9, b3_scheduler=lambda c: 0.9),
            "`b3` and `b3_scheduler` are both schedules",
        ),
        (
            lambda: ademamix(1e-3, alpha_scheduler=5.0),  # pyright: ignore
            "`alpha_scheduler` is the float 5.0, but a function",
        ),
        (lambda: ademamix(1e-3, b1=1.0), r"`b1` is 1.0, but a number in \[0, 1\)"),
        (
            lambda: ademamix(1e-3, mu_dtype=jnp.int32),
            "`mu_dtype` is .* one of the dtypes",
        ),
        (
            lambda: ademamix(1e-3, mask={"w": 3}).init({"w": jnp.ones(2)}),
            r"mask\['w'\] is the int 3, but a bool was expected",
        ),
    ),
)
def test_bad_arguments(call: Any, text: str):
    with pytest.raises((ValueError, TypeError), match=text):
        call()


@pytest.mark.parametrize("mu_dtype", (jnp.bfloat16, jnp.float16, jnp.float32))
@pytest.mark.parametrize("scheduled", (False, True))
def test_mu_dtype_stays(mu_dtype: Any, scheduled: bool):
    """In the references, the first step loses it, and the second step recompiles."""
    params = {"w": jnp.ones(3), "c": jnp.ones(2, jnp.complex64)}
    schedules: Any = {
        "b3_scheduler": beta3_scheduler(0.99, 0.9, warmup=5),
        "alpha_scheduler": alpha_scheduler(3.0, warmup=5),
    }
    tx = ademamix(1e-3, b3=0.99, mu_dtype=mu_dtype, **(schedules if scheduled else {}))
    state: Any = tx.init(params)
    kind = tree_type(state)
    assert state.m1["w"].dtype == state.m2["w"].dtype == mu_dtype
    assert state.m1["c"].dtype == jnp.complex64
    assert state.nu["w"].dtype == state.nu["c"].dtype == jnp.float32
    counted, traces = count_traces(tx.update)
    step = jax.jit(counted)
    for _ in range(3):
        _, state = step(params, state, params)
        assert tree_type(state) == kind
    assert len(traces) == 1
    body = lambda s, _: (tx.update(params, s, params)[1], None)
    assert tree_type(jax.lax.scan(body, state, None, length=2)[0]) == kind


def test_warns_once_of_a_dtype_that_cannot_decay():
    params = jnp.ones(3)
    text = (
        r"`mu_dtype=bfloat16` the slow average `m2` cannot decay at b3 = 0.9999: a "
        r"step changes it by 0.0001 of itself, but the spacing .* below 1 is 0.0039. "
        r"Use the default, float32"
    )
    with pytest.warns(UserWarning, match=text) as record:
        tx = ademamix(1e-3, mu_dtype=jnp.bfloat16)
        state = tx.init(params)
        for _ in range(3):
            _, state = tx.update(params, state, params)
    assert len(record) == 1
    with pytest.warns(UserWarning, match="at b3 = 0.9999:") as record:
        s = beta3_scheduler(0.9999, 0.9, warmup=5)
        scale_by_ademamix(0.9, 0.999, 0.5, 5.0, s, None, mu_dtype=jnp.float16)
    assert len(record) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ademamix(1e-3, b3=0.99, mu_dtype=jnp.bfloat16)
        ademamix(1e-3, b3=0.9999, mu_dtype=jnp.float32)
        ademamix(1e-3, b3=1 - 1e-9, mu_dtype=jnp.float32)
        ademamix(1e-3)
        ademamix(1e-3, b3=lambda count: 0.9999, mu_dtype=jnp.bfloat16)


def test_the_warning_is_true():
    """A bfloat16 `m2` of 1 stays 1 forever when the gradients become 0."""
    with pytest.warns(UserWarning, match="cannot decay"):
        tx = ademamix(1e-3, mu_dtype=jnp.bfloat16)
    state: Any = tx.init(jnp.ones(()))
    state = eqx.tree_at(lambda s: s.m2, state, jnp.ones((), jnp.bfloat16))
    step = jax.jit(tx.update)
    for _ in range(10):
        _, state = step(jnp.zeros(()), state, jnp.ones(()))
    assert state.m2 == 1.0
