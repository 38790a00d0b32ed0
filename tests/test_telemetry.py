"""`telemetry`: numbers to watch, compared with NumPy in float64."""

import pathlib
import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import eqx_ademamix
from eqx_ademamix import (
    AdEMAMix,
    Compensated,
    Offloaded,
    SimplifiedAdEMAMix,
    StateFormat,
    decoded,
    hyperparams,
    init,
    telemetry,
    update,
)

from .helpers import (
    COMPACT,
    HAS_HOST_MEMORY,
    SCHEDULES,
    count_traces,
    everywhere,
    loss_of_arrays,
    make_mlp,
    make_zoo,
    x64,
)


OF_STATE = {
    "learning_rate", "alpha", "b3", "b3_half_life", "m1_rms", "m2_rms",
    "slow_fast_ratio", "slow_fast_cosine", "nu_rms",
}  # fmt: skip
OF_GRADS = {"grad_rms", "nonfinite_fraction"}
KEYS = OF_STATE | OF_GRADS | {"update_rms", "param_rms", "update_param_ratio"}
OF_ARRAYS = KEYS - {"learning_rate", "alpha", "b3", "b3_half_life"}

#
# The reference
#


def wide(tree: Any) -> list[Any]:
    """The arrays of a tree in float64 or complex128."""
    arrays = [np.asarray(x) for x in jtu.tree_leaves(tree)]
    return [x.astype(complex if np.iscomplexobj(x) else float) for x in arrays]


def mean(values: list[np.ndarray]) -> float:
    return float(sum(x.sum() for x in values) / max(sum(x.size for x in values), 1))


def rms(tree: Any) -> float:
    return np.sqrt(mean([np.abs(x) ** 2 for x in wide(tree)]))


def cosine(x: Any, y: Any) -> float:
    pairs = list(zip(wide(x), wide(y), strict=True))
    dot = mean([(a * b.conj()).real for a, b in pairs])
    return dot / (rms(x) * rms(y))


def reference(optim: Any, state: Any, updates: Any, params: Any, grads: Any) -> Any:
    """What `telemetry` should be for an AdEMAMix with a constant b1."""
    h, plain = hyperparams(optim, state), decoded(state)
    b1, alpha = float(h.b1), float(h.alpha)
    b3 = optim.b3 if isinstance(optim.b3, float) else float(h.b3)
    fast, bias = plain.m1, 1 - b1 ** int(state.count)
    m1_hat, m2 = rms(fast) / bias, rms(plain.m2)
    flags = [~np.isfinite(x) for x in wide(grads)]
    return {
        "learning_rate": float(h.learning_rate),
        "alpha": alpha,
        "b3": float(h.b3),
        "b3_half_life": np.log(0.5) / np.log(b3),
        "m1_rms": m1_hat,
        "m2_rms": m2,
        "slow_fast_ratio": alpha * m2 / m1_hat,
        "slow_fast_cosine": cosine(fast, plain.m2),
        "nu_rms": rms(plain.nu),
        "update_rms": rms(updates),
        "param_rms": rms(params),
        "update_param_ratio": rms(updates) / rms(params),
        "grad_rms": rms(grads),
        "nonfinite_fraction": mean(flags),
    }


def agree(found: dict[str, Any], expected: dict[str, float], rtol: float = 1e-5):
    assert {key: (x.shape, x.dtype) for key, x in found.items()} == {
        key: ((), jnp.result_type(float)) for key in expected
    }
    for key, value in expected.items():
        np.testing.assert_allclose(float(found[key]), value, rtol, err_msg=key)


#
# Runs
#


def normal(seed: int, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    rng, is_complex = np.random.default_rng(seed), jnp.issubdtype(dtype, complex)
    imag = 1j * rng.normal(size=shape) if is_complex else 0.0
    return jnp.asarray(rng.normal(size=shape) + imag, dtype)


SHAPES = {"a": (40, 300), "b": (3, 5, 2), "c": ()}


def make_params(dtype: Any = jnp.float32) -> dict[str, Any]:
    arrays = {key: normal(i, SHAPES[key], dtype) for i, key in enumerate(SHAPES)}
    return {"frozen": None, **arrays}


def gradient(params: Any, step: int, scale: float = 1.0) -> Any:
    """Gradients with a mean of half of their noise."""
    leaves, treedef = jtu.tree_flatten(params)
    noise = [normal(100 * step + i, x.shape) for i, x in enumerate(leaves)]
    arrays = [scale * (np.asarray(x) + 0.5) for x in noise]
    pairs = zip(arrays, leaves, strict=True)
    return treedef.unflatten([jnp.asarray(x, like.dtype) for x, like in pairs])


def run(optim: Any, params: Any, scale: float = 1.0, steps: int = 3) -> Any:
    """The state, and what `telemetry` can read besides, after some steps."""
    state, step = init(optim, params), eqx.filter_jit(update)
    grads = updates = None
    for i in range(steps):
        grads = gradient(params, i, scale)
        updates, state = step(optim, grads, state, params)
    return state, {"updates": updates, "params": params, "grads": grads}


FORMATS = {
    "float32": StateFormat.float32(),
    "half": everywhere(StateFormat.half()),
    "compact": COMPACT,
    "bfloat16": StateFormat("bfloat16", "bfloat16", "bfloat16"),
}


#
# Values
#


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.complex64])
@pytest.mark.parametrize("fmt", FORMATS)
def test_numbers_are_those_of_numpy(fmt: str, dtype: Any):
    optim = AdEMAMix(1e-3, state_format=FORMATS[fmt], **SCHEDULES)
    state, trees = run(optim, make_params(dtype))
    expected = reference(optim, state, **trees)
    assert set(expected) == KEYS
    agree(telemetry(optim, state, **trees), expected)


@pytest.mark.parametrize("fmt", ["float32", "compact"])
@pytest.mark.parametrize("scale", [1e-25, 1e-9, 1e15])
def test_squares_of_any_magnitude(scale: float, fmt: str):
    optim = AdEMAMix(1e-3, alpha=5.0, state_format=FORMATS[fmt])
    params = {key: x for key, x in make_params().items() if key != "frozen"}
    state, trees = run(optim, params, scale)
    expected = reference(optim, state, **trees)
    agree(telemetry(optim, state, **trees), expected)
    each = telemetry(optim, state, per_path=True, **trees)
    for key in params:
        of = lambda tree, key=key: {key: tree[key]}
        alone = eqx.tree_at(
            lambda s: (s.m1, s.m2, s.nu), state, tuple(map(of, state.moments))
        )
        parts = {name: of(tree) for name, tree in trees.items()}
        numbers = reference(optim, alone, **parts)
        for name in OF_ARRAYS:
            value, text = each[f"{name}/{key}"], f"{name}/{key}"
            np.testing.assert_allclose(value, numbers[name], 1e-5, err_msg=text)


def test_layers_of_different_magnitudes_are_right_each_and_together():
    scales = jnp.asarray([1e-25, 1.0, 1e12, 0.0, 1e-8])[:, None]
    params = {"w": normal(0, (5, 64)), "b": jnp.ones(3)}
    grads = {"w": scales * normal(1, (5, 64)), "b": jnp.ones(3)}
    optim = AdEMAMix(1e-3, alpha=5.0)
    state = update(optim, grads, init(optim, params))[1]
    found = telemetry(optim, state, grads=grads, per_path=True, stacked="w")
    for i in range(5):
        np.testing.assert_allclose(found[f"grad_rms/w[{i}]"], rms(grads["w"][i]), 1e-5)
        ratio = 5 * 0.0001 if i != 3 else 0.0
        np.testing.assert_allclose(found[f"slow_fast_ratio/w[{i}]"], ratio, 1e-5)
    np.testing.assert_allclose(found["grad_rms/w"], rms(grads["w"]), 1e-5)
    np.testing.assert_allclose(found["grad_rms"], rms(grads), 1e-5)
    np.testing.assert_allclose(found["slow_fast_cosine"], 1.0, 1e-5)
    np.testing.assert_allclose(found["m1_rms"], rms(grads), 1e-5)


def test_a_large_leaf():
    params = {"w": 1 + normal(0, (3000, 1000))}
    optim = AdEMAMix(1e-3)
    found = telemetry(optim, init(optim, params), params=params, grads=params)
    np.testing.assert_allclose(found["param_rms"], rms(params), 1e-6)


def test_before_the_first_step():
    params = make_params()
    found = telemetry(AdEMAMix(1e-3), init(AdEMAMix(1e-3), params), updates=params)
    assert all(found[key] == 0.0 for key in OF_STATE & OF_ARRAYS)


def test_half_life():
    for b3, steps in ((0.9999, 6931.1), (0.5, 1.0), (1 - 1e-7, 6931471.46), (0.0, 0.0)):
        optim = AdEMAMix(1e-3, b3=b3)
        found = telemetry(optim, init(optim, jnp.ones(3)))["b3_half_life"]
        np.testing.assert_allclose(found, steps, 1e-5)


def test_hyperparameters_are_those_of_the_next_step():
    optim = AdEMAMix(optax.linear_schedule(0.0, 1.0, 10), **SCHEDULES)
    state, _ = run(optim, make_params(), steps=4)
    found, h = telemetry(optim, state), hyperparams(optim, state)
    for name in ("learning_rate", "alpha", "b3"):
        assert found[name] == getattr(h, name)
    np.testing.assert_allclose([found["learning_rate"], found["alpha"]], [0.4, 2.0])


@pytest.mark.parametrize("fmt", ["float32", "compact"])
def test_corrected_slow_average(fmt: str):
    optim = AdEMAMix(1e-3, b3=0.999, bias_correct_m2=True, state_format=FORMATS[fmt])
    params = {"w": normal(0, (8, 64))}
    state = init(optim, params)
    for _ in range(3):  # the same gradient: both averages are the gradient
        _, state = update(optim, params, state)
    found = telemetry(optim, state)
    np.testing.assert_allclose(found["slow_fast_ratio"], 5.0, 0.02)
    np.testing.assert_allclose(found["m2_rms"], rms(decoded(state).m2), 1e-5)


def test_a_schedule_for_b1():
    optim = AdEMAMix(1e-3, b1=lambda count: 0.5 + 0.1 * count.astype(float))
    params = {"w": normal(0, (8, 64))}
    state = init(optim, params)
    for _ in range(3):  # the same gradient, which is the corrected average
        _, state = update(optim, params, state)
    np.testing.assert_allclose(telemetry(optim, state)["m1_rms"], rms(params), 1e-5)


@pytest.mark.parametrize("b1", [0.0, jnp.zeros(())])
def test_without_momentum_the_gradient_is_the_fast_average(b1: Any):
    optim = AdEMAMix(1e-3, b1=b1, b3=0.99)
    state, trees = run(optim, make_params())
    found = telemetry(optim, state, grads=trees["grads"])
    assert set(found) == OF_STATE | OF_GRADS
    g, m2 = trees["grads"], state.m2
    np.testing.assert_allclose(found["m1_rms"], rms(g), 1e-5)
    np.testing.assert_allclose(found["slow_fast_ratio"], 5 * rms(m2) / rms(g), 1e-5)
    np.testing.assert_allclose(found["slow_fast_cosine"], cosine(g, m2), 1e-5)


def test_without_momentum_and_gradients():
    optim = AdEMAMix(1e-3, b1=0.0)
    state, _ = run(optim, make_params())
    fast = {"m1_rms", "slow_fast_ratio", "slow_fast_cosine"}
    assert set(telemetry(optim, state)) == OF_STATE - fast


def test_keys_of_absent_trees_are_absent():
    optim = AdEMAMix(1e-3)
    state, trees = run(optim, make_params())
    assert set(telemetry(optim, state)) == OF_STATE
    one = lambda name: set(telemetry(optim, state, **{name: trees[name]})) - OF_STATE
    assert one("updates") == {"update_rms"} and one("params") == {"param_rms"}
    assert one("grads") == OF_GRADS


@pytest.mark.parametrize("fmt", ["float32", "compact"])
def test_simplified(fmt: str):
    optim = SimplifiedAdEMAMix(1e-3, alpha=3.0, state_format=FORMATS[fmt])
    state, trees = run(optim, make_params())
    found = telemetry(optim, state, per_path=True, **trees)
    plain, updates, params = decoded(state), trees["updates"], trees["params"]
    expected = {
        "learning_rate": 1e-3,
        "alpha": 3.0,
        "m_rms": rms(plain.m),
        "nu_rms": rms(plain.nu),
        "update_rms": rms(updates),
        "param_rms": rms(params),
        "update_param_ratio": rms(updates) / rms(params),
        "grad_rms": rms(trees["grads"]),
        "nonfinite_fraction": 0.0,
    }
    agree({key: x for key, x in found.items() if "/" not in key}, expected)
    np.testing.assert_allclose(found["m_rms/a"], rms(plain.m["a"]), 1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_gradients_that_are_not_finite(bad: float):
    params = {"a": jnp.ones((4, 25)), "b": jnp.ones((4, 25))}
    optim = AdEMAMix(1e-3)
    state, _ = run(optim, params)
    grads = {"a": params["a"].at[1, :3].set(bad), "b": params["b"]}
    found = telemetry(optim, state, grads=grads, per_path=True, stacked="a")
    fraction = lambda name: float(found[f"nonfinite_fraction{name}"])
    np.testing.assert_allclose(fraction(""), 3 / 200, 1e-5)
    np.testing.assert_allclose([fraction("/a"), fraction("/b")], [0.03, 0.0], 1e-5)
    np.testing.assert_allclose([fraction("/a[0]"), fraction("/a[1]")], [0, 0.12], 1e-5)
    is_finite = {key: bool(jnp.isfinite(x)) for key, x in found.items()}
    wrong = {"grad_rms", "grad_rms/a", "grad_rms/a[1]"}
    assert {key for key, flag in is_finite.items() if not flag} == wrong


@pytest.mark.parametrize("cls", [AdEMAMix, SimplifiedAdEMAMix])
def test_skipped_steps(cls: Any):
    params = {"w": normal(0, (4, 5))}
    assert "skipped" not in telemetry(cls(1e-3), init(cls(1e-3), params))
    optim = cls(1e-3, skip_nonfinite=True)
    state = init(optim, params)
    for factor in (1.0, np.nan, 1.0, np.inf):
        _, state = update(optim, {"w": factor * params["w"]}, state)
    skipped = telemetry(optim, state)["skipped"]
    assert skipped == 2 and skipped.dtype == jnp.int32 and skipped.shape == ()


#
# Names
#


def test_names_of_paths():
    model = make_mlp()
    optim = AdEMAMix(1e-3)
    state, trees = run(optim, eqx.filter(model, eqx.is_inexact_array))
    trees["params"] = model
    found = telemetry(optim, state, per_path=True, **trees)
    names = [f"layers/{i}/{kind}" for i in range(3) for kind in ("weight", "bias")]
    assert set(found) == KEYS | {f"{k}/{name}" for k in OF_ARRAYS for name in names}
    np.testing.assert_allclose(
        found["param_rms/layers/0/weight"], rms(model.layers[0].weight), 1e-5
    )


def test_names_that_would_be_equal_are_written_in_full():
    params = {"a": {"b": jnp.ones(2)}, "a/b": jnp.ones(3)}
    optim = AdEMAMix(1e-3)
    found = telemetry(optim, init(optim, params), per_path=True)
    assert {"nu_rms/['a']['b']", "nu_rms/['a/b']"} < set(found)
    alone = telemetry(optim, init(optim, jnp.ones(3)), per_path=True)
    assert "nu_rms/(the tree itself)" in alone


def test_layers_that_are_scanned_over():
    @eqx.filter_vmap
    def make(key: jax.Array) -> eqx.nn.Linear:
        return eqx.nn.Linear(4, 4, key=key)

    class Model(eqx.Module):
        blocks: eqx.nn.Linear
        head: eqx.nn.Linear

    model = Model(make(jax.random.split(jax.random.key(0), 3)), make_mlp().layers[0])
    optim = AdEMAMix(1e-3)
    state, trees = run(optim, eqx.filter(model, eqx.is_inexact_array))
    found = telemetry(
        optim, state, per_path=True, stacked=[re.compile("^blocks")], **trees
    )
    names = {key.removeprefix("update_rms/") for key in found if "update_rms/" in key}
    stacked = {"blocks/weight", "blocks/bias"}
    layers = {f"{name}[{i}]" for name in stacked for i in range(3)}
    assert names == stacked | layers | {"head/weight", "head/bias"}
    updates = trees["updates"].blocks.weight
    np.testing.assert_allclose(found["update_rms/blocks/weight"], rms(updates), 1e-5)
    for i in range(3):
        key = f"update_rms/blocks/weight[{i}]"
        np.testing.assert_allclose(found[key], rms(updates[i]), 1e-5)


#
# Optimizers around the optimizer, and programs around the call
#


def test_zoo_with_frozen_leaves():
    model = make_zoo(jax.random.key(0))
    grads = eqx.filter_grad(loss_of_arrays)(model)
    trainable = jax.tree.map(eqx.is_inexact_array, model)
    trainable = eqx.tree_at(lambda m: m.mlp, trainable, False)
    optim = AdEMAMix(1e-3, trainable=trainable)
    updates, state = update(optim, grads, init(optim, model), model)
    found = telemetry(optim, state, updates=updates, params=model, grads=grads)
    trained = eqx.filter(model, trainable)
    np.testing.assert_allclose(found["param_rms"], rms(trained), 1e-5)
    np.testing.assert_allclose(
        found["grad_rms"], rms(eqx.filter(grads, jax.tree.map(bool, trainable))), 1e-5
    )


def test_in_a_chain(standard_promotion: None):
    optim: Any = AdEMAMix(1e-3, b3=0.99)
    params = {"w": normal(0, (4, 5))}
    chain = optax.MultiSteps(optax.chain(optax.clip_by_global_norm(1.0), optim), 2)
    state, trees = run(chain, params, steps=4)
    (alone,) = [x for x in jtu.tree_leaves(state, is_leaf=is_state) if is_state(x)]
    assert alone.count == 2
    expected = reference(optim, alone, **trees)
    agree(telemetry(optim, state, **trees), expected)


def is_state(x: Any) -> bool:
    return isinstance(x, eqx_ademamix.AdEMAMixState)


def test_injected_hyperparameters(standard_promotion: None):
    make = optax.inject_hyperparams(eqx_ademamix.ademamix, hyperparam_dtype=jnp.float32)
    chain = make(learning_rate=1e-3, alpha=4.0)
    state = init(chain, jnp.ones(3))
    state.hyperparams["learning_rate"] = jnp.asarray(0.5)
    found = telemetry(AdEMAMix(1e-3), state)
    assert found["learning_rate"] == 0.5 and found["alpha"] == 4.0


def test_compensated():
    params = make_params(jnp.bfloat16)
    optim = AdEMAMix(1e-3, state_format=COMPACT)
    state, trees = run(Compensated(optim), params)
    found = telemetry(Compensated(optim), state, **trees)
    agree(found, reference(optim, state.inner_state, **trees))


if HAS_HOST_MEMORY:

    @pytest.mark.parametrize("fmt", ["float32", "compact"])
    def test_offloaded(fmt: str):
        inner = AdEMAMix(1e-3, state_format=FORMATS[fmt], **SCHEDULES)
        optim = Offloaded(inner)
        params = make_params()
        state, trees = run(optim, params)
        expected = reference(inner, run(inner, params)[0], **trees)
        agree(telemetry(optim, state, **trees), expected)
        jitted = jax.jit(lambda s, t: telemetry(optim, s, **t))
        agree(jitted(state, trees), expected)


def test_scan_and_vmap():
    optim = AdEMAMix(1e-3, **SCHEDULES)
    params = {"w": normal(0, (4, 6))}

    def step(state: Any, key: jax.Array) -> Any:
        grads = {"w": jax.random.normal(key, (4, 6), jnp.float32)}
        updates, state = update(optim, grads, state, params)
        return state, telemetry(optim, state, updates=updates, grads=grads)

    def train(key: jax.Array) -> Any:
        return jax.lax.scan(step, init(optim, params), jax.random.split(key, 5))

    keys = jax.random.split(jax.random.key(0), 3)
    states, rows = jax.jit(jax.vmap(train))(keys)
    assert {x.shape for x in rows.values()} == {(3, 5)}
    for i, key in enumerate(keys):
        state = init(optim, params)
        for j, step_key in enumerate(jax.random.split(key, 5)):
            state, row = step(state, step_key)
            for name, x in row.items():
                np.testing.assert_allclose(rows[name][i, j], x, 1e-5, 1e-6)
    assert states.count.tolist() == [5, 5, 5]


def test_one_trace_for_all_steps():
    optim = AdEMAMix(1e-3, **SCHEDULES)
    params = make_params()
    fn, traces = count_traces(lambda s, t: telemetry(optim, s, per_path=True, **t))
    jitted = jax.jit(fn)
    for steps in (1, 2, 3):
        jitted(*run(optim, params, steps=steps))
    assert len(traces) == 1


KINDS = getattr(jax.sharding, "AxisType", None)


@pytest.mark.parametrize("kind", ["Auto"] if KINDS is None else ["Auto", "Explicit"])
@pytest.mark.parametrize("fmt", ["float32", "compact"])
def test_eight_devices(fmt: str, kind: str):
    params = {"a": normal(0, (16, 512)), "b": normal(1, (8,)), "c": jnp.ones((3, 2))}
    optim = AdEMAMix(1e-3, state_format=FORMATS[fmt])
    state, trees = run(optim, params)
    expected = telemetry(optim, state, per_path=True, stacked="a", **trees)
    types: Any = {} if KINDS is None else {"axis_types": (KINDS[kind],)}
    mesh = Mesh(np.array(jax.devices()), ("data",), **types)

    def spread(x: Any) -> Any:
        is_split = x.ndim > 0 and x.shape[0] % 8 == 0
        spec = PartitionSpec("data") if is_split else PartitionSpec()
        return jax.device_put(x, NamedSharding(mesh, spec))

    sharded = jax.tree.map(spread, (state, trees))

    def call(state: Any, trees: Any) -> Any:
        return telemetry(optim, state, per_path=True, stacked="a", **trees)

    for found in (call(*sharded), jax.jit(call)(*sharded)):
        agree(found, {key: float(x) for key, x in expected.items()})


@pytest.mark.parametrize("largest", (9e37, 3e38))
def test_the_largest_magnitudes(largest: float):
    """Their reciprocals are subnormal, which XLA takes for zero."""
    optim, params = AdEMAMix(1e-3), jnp.ones(4)
    grads = jnp.asarray([1.0, 1.0, 1.0, largest])
    state = init(optim, params)
    row = telemetry(optim, state, grads=grads, params=params * largest)
    np.testing.assert_allclose(row["grad_rms"], largest / 2, rtol=1e-6)
    np.testing.assert_allclose(row["param_rms"], largest, rtol=1e-6)
    assert row["nonfinite_fraction"] == 0


@pytest.mark.parametrize("scale", [1e-170, 1.0, 1e150])
def test_float64(scale: float):
    with x64():
        params = {"a": normal(0, (40, 30), jnp.float64), "b": normal(1, (7,))}
        optim = AdEMAMix(1e-3, **SCHEDULES)
        grads = {"a": scale * params["a"], "b": params["b"]}
        updates, state = update(optim, grads, init(optim, params), params)
        found = telemetry(optim, state, updates=updates, params=params, grads=grads)
        expected = {"param_rms": rms(params), "update_rms": rms(updates)}
        for key, value in expected.items():
            assert found[key].dtype == jnp.float64
            np.testing.assert_allclose(found[key], value, 1e-7)
        each = telemetry(optim, state, grads=grads, per_path=True)
        np.testing.assert_allclose(each["grad_rms/a"], scale * rms(params["a"]), 1e-13)


#
# What is not asked for
#


def primitives(jaxpr: Any) -> list[str]:
    """The names of all operations on arrays that have axes, inner programs included."""
    found: list[str] = []
    for eqn in jaxpr.eqns:
        inner = [x for x in jtu.tree_leaves(list(eqn.params.values())) if is_jaxpr(x)]
        found += [name for x in inner for name in primitives(getattr(x, "jaxpr", x))]
        if not inner and any(getattr(x.aval, "shape", ()) for x in eqn.invars):
            found.append(eqn.primitive.name)
    return found


def is_jaxpr(x: Any) -> bool:
    return hasattr(x, "eqns")


def sums(optim: Any, state: Any, trees: Any, **kwargs: Any) -> int:
    """How often a program sums up the entries of an array of a leaf."""
    fn = lambda state, trees: telemetry(optim, state, **trees, **kwargs)
    jaxpr = jax.make_jaxpr(fn)(state, trees).jaxpr
    (leaf,) = [x for x in jaxpr.eqns if x.params.get("name") == "leaf_magnitudes"]
    inner = getattr(leaf.params["jaxpr"], "jaxpr", leaf.params["jaxpr"])
    return sum(eqn.primitive.name == "reduce_sum" for eqn in inner.eqns)


def test_what_is_not_asked_for_costs_nothing():
    params = {"w": normal(0, (4, 6))}
    optim = AdEMAMix(1e-3)
    state, trees = run(optim, params)
    # m1^2, m2^2, nu^2, and the product of m1 and m2: each is one pass.
    assert sums(optim, state, {}) == 4
    for name in trees:
        assert sums(optim, state, {name: trees[name]}) == 5
    assert sums(optim, state, trees) == sums(optim, state, trees, per_path=True) == 7
    simplified = SimplifiedAdEMAMix(1e-3)
    assert sums(simplified, run(simplified, params)[0], {}) == 2


def test_a_tree_without_leaves():
    optim = AdEMAMix(1e-3)
    found = telemetry(optim, init(optim, {}), per_path=True)
    assert set(found) == {"learning_rate", "alpha", "b3", "b3_half_life"}


def test_the_page_has_the_cosines_of_signal_and_noise():
    """The correlation of averages of gradients with the mean mu and the deviation 1."""
    page = pathlib.Path(__file__).parents[1] / "docs/watching.md"
    b1, b3 = 0.9, 0.9999
    shared = (1 - b1) * (1 - b3) / (1 - b1 * b3)
    fast, slow = ((1 - b) / (1 + b) for b in (b1, b3))
    cells = [
        f"{(mu**2 + shared) / np.sqrt((mu**2 + fast) * (mu**2 + slow)):.2f}"
        for mu in (0.0, 0.05, 1.0)
    ]
    assert f"| cosine | {' | '.join(cells)} |" in page.read_text()
    ratios = [np.sqrt((mu**2 + slow) / (mu**2 + fast)) for mu in (0.0, 0.05, 1.0)]
    texts = " | ".join(f"${x:.2f} \\alpha$" for x in ratios)
    assert f"| ratio | {texts} |" in page.read_text()
