"""The types and buffers of the state, and the transformations that it supports."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import eqx_ademamix
from eqx_ademamix import (
    AdEMAMix,
    SimplifiedAdEMAMix,
    StateFormat,
)

from .helpers import (
    COMPACT,
    SCHEDULES,
    assert_trees_close,
    buffers,
    count_traces,
    loss_of_arrays,
    make_mlp,
    make_zoo,
    tree_type,
    x64,
)


OPTIMIZERS = (
    AdEMAMix(1e-3),
    AdEMAMix(1e-3, weight_decay=0.1),
    AdEMAMix(1e-3, **SCHEDULES),
    AdEMAMix(1e-3, b1=0, **SCHEDULES),
    AdEMAMix(jnp.asarray(1e-3), b1=jnp.asarray(0.9), alpha=np.asarray(2.0)),
    AdEMAMix(lambda count: 1e-3, weight_decay=jnp.asarray(0.1)),
    AdEMAMix(
        1e-3, state_format=StateFormat(m1=jnp.bfloat16, m2=jnp.float16, nu=jnp.bfloat16)
    ),
    AdEMAMix(1e-3, state_format=COMPACT),
    SimplifiedAdEMAMix(1e-3, weight_decay=0.1),
    SimplifiedAdEMAMix(1e-3, SCHEDULES["b3"], alpha=SCHEDULES["alpha"], normalize=True),
    SimplifiedAdEMAMix(jnp.asarray(1e-3), b1=0, state_format=COMPACT),
)
DTYPES = (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64, jnp.complex64)


def mixed_params() -> dict[str, jax.Array]:
    shape = {jnp.dtype(d).name: (2, 3) for d in DTYPES}
    return {name: jnp.ones(s, name) for name, s in shape.items()}


def state_dtypes(state: Any) -> dict[str, tuple[str, ...]]:
    return {
        k: tuple(tree[k].dtype.name for tree in (state.m1, state.m2, state.nu))
        for k in state.nu
    }


@pytest.mark.parametrize("optim", OPTIMIZERS)
@pytest.mark.parametrize("with_params", (False, True))
def test_types_stay(optim: Any, with_params: bool):
    if not with_params and (
        isinstance(optim.weight_decay, jax.Array) or optim.weight_decay
    ):
        optim = AdEMAMix(1e-3)
    with x64():
        params = mixed_params()
        state = optim.init(params)
        args = (params,) if with_params else ()
        before = tree_type(state)
        for update in (optim.update, eqx.filter_jit(optim.update)):
            updates, new_state = update(params, state, *args)
            assert tree_type(new_state) == before
            assert tree_type(updates) == tree_type(params)
            assert tree_type(eqx.apply_updates(params, updates)) == tree_type(params)


def test_the_default_keeps_wider_types():
    with x64():
        assert state_dtypes(AdEMAMix(1e-3).init(mixed_params())) == {
            "float16": ("float32", "float32", "float32"),
            "bfloat16": ("float32", "float32", "float32"),
            "float32": ("float32", "float32", "float32"),
            "float64": ("float64", "float64", "float64"),
            "complex64": ("complex64", "complex64", "float32"),
        }


def test_a_chosen_format():
    fmt = StateFormat(m1=jnp.bfloat16, m2=jnp.float32, nu=jnp.float16)
    with x64():
        state = AdEMAMix(1e-3, state_format=fmt).init(mixed_params())
        assert state_dtypes(state) == {
            "float16": ("bfloat16", "float32", "float16"),
            "bfloat16": ("bfloat16", "float32", "float16"),
            "float32": ("bfloat16", "float32", "float16"),
            "float64": ("bfloat16", "float64", "float16"),
            "complex64": ("complex64", "complex64", "float16"),
        }
        wide = StateFormat(m1=jnp.float64, m2=jnp.float64, nu=jnp.float64)
        state = AdEMAMix(1e-3, state_format=wide).init(jnp.ones(2, jnp.complex64))
        assert (state.m1.dtype, state.nu.dtype) == (jnp.complex128, jnp.float64)


def test_gradients_of_another_precision():
    with x64():
        params = {k: v for k, v in mixed_params().items() if k != "complex64"}
        optim = AdEMAMix(1e-3)
        state = optim.init(params)
        for dtype in (jnp.bfloat16, jnp.float32, jnp.float64):
            grads = jax.tree.map(lambda x, d=dtype: jnp.ones_like(x, dtype=d), params)
            updates, new_state = optim.update(grads, state, params)
            assert tree_type(new_state) == tree_type(state)
            assert tree_type(updates) == tree_type(params)
            updates, new_state = optim.update(grads, state)
            assert tree_type(new_state) == tree_type(state)
            assert tree_type(updates) == tree_type(grads)


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_scan_carry_and_one_trace(optim: Any, getkey: Any):
    model = make_zoo(getkey())
    state = eqx_ademamix.init(optim, model)
    grads = eqx.filter_grad(loss_of_arrays)(model)

    def one(optim: Any, grads: Any, state: Any, model: Any) -> Any:
        return eqx_ademamix.update(optim, grads, state, model)

    counted, traces = count_traces(one)
    step = eqx.filter_jit(counted)
    looped = state
    for _ in range(3):
        _, looped = step(optim, grads, looped, model)
    assert len(traces) == 1

    def body(carry: Any, _: None) -> Any:
        return eqx_ademamix.update(optim, grads, carry, model)[1], None

    scanned, _ = jax.jit(lambda s: jax.lax.scan(body, s, None, length=3))(state)
    assert_trees_close(scanned, looped, 1e-6)
    assert scanned.count == 3
    assert all(isinstance(x, jax.Array) for x in jtu.tree_leaves(scanned))


def test_bfloat16_parameters_do_not_spoil_the_slow_average():
    """The exact value is 1 - 0.9999^20000 = 0.8647. optax's bfloat16 `m2` stops at
    0.031."""
    optim = AdEMAMix(1e-6, b3=0.9999)
    params = jnp.zeros(3, jnp.bfloat16)
    grads = jnp.ones(3, jnp.bfloat16)

    def body(carry: Any, _: None) -> Any:
        params, state = carry
        updates, state = optim.update(grads, state, params)
        return (eqx.apply_updates(params, updates), state), None

    (params, state), _ = jax.jit(
        lambda carry: jax.lax.scan(body, carry, None, length=20_000)
    )((params, optim.init(params)))
    np.testing.assert_allclose(state.m2, -np.expm1(20_000 * np.log(0.9999)), rtol=1e-3)
    np.testing.assert_allclose(state.m2, 0.8647, atol=1e-3)
    assert params.dtype == jnp.bfloat16 and state.m2.dtype == jnp.float32


@pytest.mark.parametrize("jit", (False, True))
def test_no_two_leaves_share_a_buffer(jit: bool, getkey: Any):
    model = make_zoo(getkey())
    optim = AdEMAMix(1e-3, b1=0.9, b3=0.9)  # equal decays make m1 and m2 equal
    init, update = eqx_ademamix.init, eqx_ademamix.update
    if jit:
        init, update = eqx.filter_jit(init), eqx.filter_jit(update)
    state = init(optim, model)
    assert len(set(buffers(state))) == len(buffers(state))
    _, state = update(optim, eqx.filter_grad(loss_of_arrays)(model), state, model)
    assert len(set(buffers(state))) == len(buffers(state))


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_donation(optim: Any, getkey: Any):
    @eqx.filter_jit(donate="all-except-first")
    def step(optim: Any, model: Any, state: Any) -> Any:
        grads = eqx.filter_grad(loss_of_arrays)(model)
        updates, state = eqx_ademamix.update(optim, grads, state, model)
        return eqx.apply_updates(model, updates), state

    model = make_zoo(getkey())
    state = eqx_ademamix.init(optim, model)
    for _ in range(4):
        old = [x for x in jtu.tree_leaves(state) if x.size]
        model, state = step(optim, model, state)
        assert all(x.is_deleted() for x in old)
    assert state.count == 4


def test_counters_saturate():
    optim = AdEMAMix(1e-3, b3=SCHEDULES["b3"], alpha=SCHEDULES["alpha"])
    state = optim.init(jnp.ones(2))
    last = jnp.asarray(2**31 - 1, jnp.int32)
    state = eqx.tree_at(lambda s: (s.count, s.count_m2), state, (last, last))
    for update in (optim.update, jax.jit(optim.update)):
        updates, new_state = update(jnp.ones(2), state)
        assert new_state.count == new_state.count_m2 == 2**31 - 1
        assert np.all(np.isfinite(updates))
        assert eqx_ademamix.hyperparams(optim, new_state).alpha == 5.0


def test_without_b1_eight_bytes_a_parameter():
    params = {"w": jnp.ones((100, 10)), "b": jnp.ones(10)}
    state = AdEMAMix(1e-3, b1=0).init(params)
    assert state.m1 == {"w": None, "b": None}
    size = sum(x.nbytes for x in jtu.tree_leaves((state.m1, state.m2, state.nu)))
    assert size == 8 * 1010
    state = AdEMAMix(1e-3).init(params)
    size = sum(x.nbytes for x in jtu.tree_leaves((state.m1, state.m2, state.nu)))
    assert size == 12 * 1010


def test_b1_zero_as_array_stores_m1_and_gives_the_same():
    params = make_mlp()
    grads = eqx.filter_grad(loss_of_arrays)(params)
    python, array = AdEMAMix(1e-3, b1=0), AdEMAMix(1e-3, b1=jnp.asarray(0.0))
    for _ in range(3):
        a, _ = eqx_ademamix.update(python, grads, python.init(params), params)
        b, state = eqx_ademamix.update(array, grads, array.init(params), params)
        assert_trees_close(a, b, 1e-6)
        assert_trees_close(state.m1, grads, 1e-6)


def test_sweep_of_learning_rates_is_one_program():
    model, rates = make_mlp(), jnp.linspace(1e-4, 1e-2, 16)

    def train(optim: Any, model: Any, state: Any) -> Any:
        for _ in range(3):
            grads = eqx.filter_grad(loss_of_arrays)(model)
            updates, state = eqx_ademamix.update(optim, grads, state, model)
            model = eqx.apply_updates(model, updates)
        return model, state

    def make(rate: Any) -> AdEMAMix:
        return AdEMAMix(rate, weight_decay=0.1, **SCHEDULES)

    optims = eqx.filter_vmap(make)(rates)
    states = eqx.filter_vmap(eqx_ademamix.init, in_axes=(eqx.if_array(0), None))(
        optims, model
    )
    assert states.count.shape == (16,)
    counted, traces = count_traces(train)
    in_axes = (eqx.if_array(0), None, eqx.if_array(0))
    sweep = eqx.filter_jit(eqx.filter_vmap(counted, in_axes=in_axes))
    models, states = sweep(optims, model, states)
    sweep(eqx.filter_vmap(make)(2 * rates), model, states)
    assert len(traces) == 1
    for i in (0, 7, 15):
        alone, state = train(make(rates[i]), model, make(rates[i]).init(model))
        pick = lambda x, i=i: x[i] if eqx.is_array(x) else x
        assert_trees_close(jax.tree.map(pick, models), alone, 1e-6)
        assert_trees_close(jax.tree.map(pick, states), state, 1e-6)


def test_ensemble_of_models_is_one_program():
    optim = AdEMAMix(1e-2, **SCHEDULES)
    models = eqx.filter_vmap(
        lambda key: eqx.nn.MLP(3, 2, 4, 2, key=key)
    )(jax.random.split(jax.random.key(0), 8))  # fmt: skip
    states = eqx.filter_vmap(optim.init)(models)

    def train(model: Any, state: Any) -> Any:
        grads = eqx.filter_grad(loss_of_arrays)(model)
        updates, state = eqx_ademamix.update(optim, grads, state, model)
        return eqx.apply_updates(model, updates), state

    counted, traces = count_traces(train)
    step = eqx.filter_jit(eqx.filter_vmap(counted))
    out, states = step(models, states)
    out, states = step(out, states)
    assert len(traces) == 1
    pick = lambda x: x[5] if eqx.is_array(x) else x
    alone = jax.tree.map(pick, models)
    state = optim.init(alone)
    for _ in range(2):
        alone, state = train(alone, state)
    assert_trees_close(jax.tree.map(pick, out), alone, 1e-6)


def test_state_is_sharded_as_the_parameters():
    devices = np.asarray(jax.devices())
    assert len(devices) == 8
    sharding = NamedSharding(Mesh(devices, ("data",)), PartitionSpec("data", None))
    params = {"w": jnp.arange(64.0).reshape(16, 4), "b": jnp.ones(4)}
    sharded = {"w": jax.device_put(params["w"], sharding), "b": params["b"]}
    optim = AdEMAMix(1e-2, weight_decay=0.1, **SCHEDULES)
    state, sharded_state = optim.init(params), optim.init(sharded)
    assert tree_type(state) == tree_type(sharded_state)
    step = jax.jit(optim.update)
    for _ in range(3):
        for moments in (sharded_state.m1, sharded_state.m2, sharded_state.nu):
            assert moments["w"].sharding.is_equivalent_to(sharding, 2)
            assert moments["w"].addressable_shards[0].data.shape == (2, 4)
        updates, state = step(params, state, params)
        sharded_updates, sharded_state = step(sharded, sharded_state, sharded)
        assert sharded_updates["w"].sharding.is_equivalent_to(sharding, 2)
        for a, b in zip(*map(jtu.tree_leaves, (updates, sharded_updates)), strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_two_runs_agree_bit_for_bit(getkey: Any):
    model = make_zoo(getkey())
    optim = AdEMAMix(1e-2, weight_decay=0.1, **SCHEDULES)

    def train() -> Any:
        state = eqx_ademamix.init(optim, model)
        grads = eqx.filter_grad(loss_of_arrays)(model)
        for _ in range(3):
            _, state = eqx.filter_jit(optim.update)(grads, state, model)
        return eqx.filter_jit(optim.update)(grads, state, model)

    for a, b in zip(jtu.tree_leaves(train()), jtu.tree_leaves(train()), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_serialisation(tmp_path: Any):
    model, optim = make_mlp(), AdEMAMix(1e-2, **SCHEDULES)
    grads = eqx.filter_grad(loss_of_arrays)(model)
    _, state = optim.update(grads, optim.init(model), model)
    eqx.tree_serialise_leaves(tmp_path / "state.eqx", state)
    loaded = eqx.tree_deserialise_leaves(tmp_path / "state.eqx", optim.init(model))
    assert_trees_close(loaded, state, 0.0)
    a, _ = optim.update(grads, state, model)
    b, _ = optim.update(grads, loaded, model)
    assert_trees_close(a, b, 0.0)


def test_eval_shape(getkey: Any):
    model, optim = make_zoo(getkey()), AdEMAMix(1e-2, **SCHEDULES)
    shapes = eqx.filter_eval_shape(eqx_ademamix.init, optim, model)
    state = eqx_ademamix.init(optim, model)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )


def test_a_state_of_numpy_arrays():
    """Some checkpoint libraries and `jax.device_get` return such states."""
    model, optim = make_mlp(), AdEMAMix(1e-2, **SCHEDULES)
    grads = eqx.filter_grad(loss_of_arrays)(model)
    _, state = optim.update(grads, optim.init(model), model)
    on_host = jax.device_get(state)
    assert_trees_close(
        optim.update(grads, on_host, model), optim.update(grads, state, model), 0.0
    )
    assert_trees_close(
        eqx_ademamix.hyperparams(optim, on_host),
        eqx_ademamix.hyperparams(optim, state),
        0.0,
    )


def test_plain_jit_of_the_methods():
    """`jax.jit` needs a hash, but a mask in a dict does not have one."""
    mask = {"w": True, "b": False}
    optim = AdEMAMix(1e-3, weight_decay=0.1, weight_decay_mask=mask, **SCHEDULES)
    params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
    state = jax.jit(optim.init)(params)
    updates, state = jax.jit(optim.update)(params, state, params)
    expected = optim.update(params, optim.init(params), params)
    assert_trees_close((updates, state), expected, 1e-6)
    assert hash(optim) == hash(jax.tree.map(lambda x: x, optim))


def test_no_gradient_for_a_frozen_part():
    """The gradient is `None` for a whole frozen layer. `eqx.partition` with a prefix
    produces such trees."""
    model = make_mlp()
    spec = eqx.tree_at(
        lambda m: m.layers, jax.tree.map(lambda _: False, model), (False, True, True)
    )
    optim = AdEMAMix(1e-2, trainable=spec, weight_decay=0.1)
    grads = eqx.filter_grad(loss_of_arrays)(model)
    state = eqx_ademamix.init(optim, model)
    expected = eqx_ademamix.update(optim, grads, state, model)
    pruned = eqx.tree_at(lambda m: m.layers[0], grads, None)
    assert_trees_close(eqx_ademamix.update(optim, pruned, state, model), expected, 0.0)
