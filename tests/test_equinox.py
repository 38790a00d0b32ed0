"""Whole Equinox models, hyperparameters as leaves, derivatives, optax wrappers."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import pytest

from eqx_ademamix import (
    AbstractOptimizer,
    AdEMAMix,
    AdEMAMixState,
    Compensated,
    Hyperparams,
    SimplifiedAdEMAMix,
    alpha_scheduler,
    beta3_scheduler,
    decay_mask,
    hyperparams,
    init,
    make_step,
    telemetry,
    update,
)

from .helpers import (
    COMPACT,
    assert_trees_close,
    count_traces,
    loss_of_arrays,
    make_mlp,
    make_zoo,
    tree_type,
    x64,
)


def test_the_whole_model(getkey: Any):
    model = make_zoo(getkey())
    optim = AdEMAMix(1e-2, weight_decay=0.1, weight_decay_mask=decay_mask(model))
    state = init(optim, model)
    trained = jax.tree.map(lambda x: eqx.is_inexact_array(x), model)
    for tree in (state.m1, state.m2, state.nu):
        leaves = jtu.tree_leaves(tree, is_leaf=lambda x: x is None)
        flags = jtu.tree_leaves(trained, is_leaf=lambda x: x is None)
        assert [x is not None for x in leaves] == [bool(x) for x in flags]
    assert jtu.tree_leaves(state.m2.shared.pytree[1]) == []  # shared with the embedding

    before = loss_of_arrays(model)
    for _ in range(3):
        grads = eqx.filter_grad(loss_of_arrays)(model)
        updates, state = eqx.filter_jit(update)(optim, grads, state, model)
        new = eqx.apply_updates(model, updates)
        assert tree_type(new) == tree_type(model)
        assert new.function is model.function and new.flags == model.flags
        model = new
    assert loss_of_arrays(model) < before


def test_methods_and_functions_are_the_same():
    model, optim = make_mlp(), AdEMAMix(1e-2)
    grads = eqx.filter_grad(loss_of_arrays)(model)
    a = update(optim, grads, init(optim, model), model)
    b = optim.update(grads, optim.init(model), model)
    assert_trees_close(a, b, 0.0)
    assert isinstance(optim, AbstractOptimizer) and isinstance(a[1], AdEMAMixState)


@pytest.mark.parametrize("dtype", (jnp.float16, jnp.bfloat16))
def test_no_parameter_changes_its_dtype(dtype: Any):
    model = jax.tree.map(
        lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x, make_mlp()
    )
    optim = AdEMAMix(1e-2, weight_decay=0.1)
    grads = jax.tree.map(
        lambda x: x.astype(jnp.float32), eqx.filter_grad(loss_of_arrays)(model)
    )
    updates, _ = update(optim, grads, init(optim, model), model)
    assert tree_type(eqx.apply_updates(model, updates)) == tree_type(model)


def test_weakly_typed_parameters_stay_so():
    """`jnp.full` and `eqx.nn.PReLU` create such parameters. They do not cause a second
    trace."""
    params = {
        "full": jnp.full((3,), 0.5),
        "scalar": jnp.asarray(0.25),
        "x": jnp.ones(2),
    }
    assert params["full"].weak_type and params["scalar"].weak_type
    optim = AdEMAMix(1e-2, weight_decay=0.1)

    def one(params: Any, state: Any) -> Any:
        grads = jax.grad(loss_of_arrays)(params)
        updates, state = optim.update(grads, state, params)
        return eqx.apply_updates(params, updates), state

    counted, traces = count_traces(one)
    step, kind, state = jax.jit(counted), tree_type(params), optim.init(params)
    for _ in range(3):
        params, state = step(params, state)
        assert tree_type(params) == kind
    assert len(traces) == 1


def test_numpy_arrays():
    params = {"w": np.ones((2, 3), np.float32), "b": np.zeros(3, np.float32)}
    optim = AdEMAMix(1e-2, weight_decay=0.1)
    state = optim.init(params)
    updates, state = optim.update(params, state, params)
    expected, _ = optim.update(
        *jax.tree.map(jnp.asarray, (params, optim.init(params), params))
    )
    assert_trees_close(updates, expected, 0.0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("optim", [AdEMAMix(1e-2), optax.adamw(1e-2)])
def test_numpy_arrays_of_any_dtype(optim: Any, dtype: str, standard_promotion: None):
    """`np.issubdtype` does not count bfloat16 as floating-point."""
    params = {"w": jnp.ones((2, 3), dtype)}
    grads = {"w": jnp.full((2, 3), 0.5, dtype)}
    numpy = jax.tree.map(np.asarray, params)
    state = init(optim, params)
    assert_trees_close(init(optim, numpy), state, 0.0)
    expected, _ = update(optim, grads, state, params)
    found, after = update(optim, grads, state, numpy)
    assert_trees_close(found, expected, 0.0)
    assert found["w"].dtype == dtype
    if not isinstance(optim, AdEMAMix):
        return  # optax computes with NumPy states in NumPy
    restored = jax.tree.map(np.asarray, after)
    found, _ = update(optim, jax.tree.map(np.asarray, grads), restored, numpy)
    expected, _ = update(optim, grads, after, params)
    assert_trees_close(found, expected, 0.0)


@pytest.mark.parametrize(
    "optim, dtype",
    [
        (AdEMAMix(1e-2, skip_nonfinite=True), jnp.float32),
        (AdEMAMix(1e-2, state_format=COMPACT), jnp.float32),
        (SimplifiedAdEMAMix(1e-2), jnp.float32),
        (Compensated(AdEMAMix(1e-2, state_format=COMPACT), bits=8), jnp.bfloat16),
    ],
    ids=["float32", "compact", "simplified", "Compensated"],
)
def test_without_jit(optim: Any, dtype: Any):
    model = {"w": jnp.linspace(-1, 1, 320, dtype=dtype).reshape(5, 64)}
    step = make_step(lambda model: jnp.sum(model["w"].astype(float) ** 2), optim)

    def run() -> Any:
        params, state = model, init(optim, model)
        for _ in range(2):
            updates, state = update(optim, params, state, params)
            params = eqx.apply_updates(params, updates)
        numbers = telemetry(optim, state, params=params, grads=params)
        carry, loss = step(step.init(model))
        return params, state.count, numbers, step.unpack(carry)[0], loss

    compiled = run()
    with jax.disable_jit():
        interpreted = run()
    assert tree_type(interpreted) == tree_type(compiled)
    rtol = 2.0**-7 if dtype == jnp.bfloat16 else 1e-5
    for x, y in zip(*map(jtu.tree_leaves, (interpreted, compiled)), strict=True):
        np.testing.assert_allclose(np.asarray(x, float), np.asarray(y, float), rtol)


def test_float0_gradients_are_ignored():
    params = {"w": jnp.ones(3), "n": jnp.asarray(2)}
    grads = jax.grad(lambda p: jnp.sum(p["w"] ** 2), allow_int=True)(params)
    assert grads["n"].dtype == jax.dtypes.float0
    optim = AdEMAMix(1e-2)
    updates, _ = optim.update(grads, optim.init(params), params)
    assert updates["n"] is None and updates["w"].shape == (3,)


def test_trees_without_leaves():
    for empty in ({}, (), {"a": None}, optax.MaskedNode()):
        optim = AdEMAMix(1e-2, weight_decay=0.1)
        state = optim.init(empty)
        updates, state = optim.update(empty, state, empty)
        assert state.count == 1 and jtu.tree_leaves(updates) == []


#
# Hyperparameters as leaves
#


def test_new_arrays_do_not_retrace():
    model = make_mlp()
    grads = eqx.filter_grad(loss_of_arrays)(model)

    def one(optim: Any, state: Any) -> Any:
        return update(optim, grads, state, model)

    counted, traces = count_traces(one)
    step = eqx.filter_jit(counted)
    weak = jax.jit(lambda: jnp.asarray(0.5) * 4)()
    rates: Any = (
        jnp.asarray(0.1),  # weakly typed
        jnp.asarray(0.2, jnp.float32),
        np.asarray(0.3, np.float64),
        jnp.asarray(0.4, jnp.bfloat16),
        jnp.asarray(1),
        weak,
    )
    sizes = []
    for rate in rates:
        optim = AdEMAMix(rate, b1=jnp.asarray(0.9), weight_decay=np.asarray(0.0))
        assert isinstance(optim.learning_rate, jax.Array)
        assert optim.learning_rate.dtype == jnp.float32
        assert not optim.learning_rate.weak_type
        updates, _ = step(optim, init(optim, model))
        sizes.append(float(jnp.max(jnp.abs(updates.layers[0].weight))))
    assert len(traces) == 1
    assert np.all(np.diff(sizes) > 0)


def test_a_schedule_with_arrays_does_not_retrace():
    model = make_mlp()
    grads = eqx.filter_grad(loss_of_arrays)(model)
    counted, traces = count_traces(
        lambda optim, state: update(optim, grads, state, model)
    )
    step = eqx.filter_jit(counted)
    for end in (0.99, 0.999, 0.9999):
        optim = AdEMAMix(
            1e-3,
            b3=beta3_scheduler(jnp.asarray(end), 0.9, warmup=jnp.asarray(10)),
            alpha=alpha_scheduler(jnp.asarray(10 * end), warmup=jnp.asarray(10)),
        )
        step(optim, init(optim, model))
    assert len(traces) == 1


def test_python_floats_are_static():
    optim = AdEMAMix(1, b1=np.float32(0.5), alpha=np.int64(3))
    for value in (optim.learning_rate, optim.b1, optim.alpha):
        assert type(value) is float
    dynamic, _ = eqx.partition(optim, eqx.is_array)
    assert jtu.tree_leaves(dynamic) == []


def test_derivative_to_the_learning_rate():
    with x64():
        params = {"w": jnp.asarray([0.3, -0.7]), "b": jnp.asarray(0.1)}

        def final_loss(rate: Any) -> Any:
            optim = AdEMAMix(rate, eps_root=1e-6, weight_decay=0.1, b3=0.99)
            p, state = params, optim.init(params)
            for _ in range(5):
                grads = jax.grad(loss_of_arrays)(p)
                updates, state = optim.update(grads, state, p)
                p = eqx.apply_updates(p, updates)
            return loss_of_arrays(p)

        rate, h = jnp.asarray(0.05), 1e-5
        for grad in (jax.grad(final_loss), jax.jit(jax.grad(final_loss))):
            derivative = grad(rate)
            difference = (final_loss(rate + h) - final_loss(rate - h)) / (2 * h)
            assert np.isfinite(derivative)
            np.testing.assert_allclose(derivative, difference, rtol=1e-6)


def test_derivative_at_a_zero_gradient_is_finite():
    def size(rate: Any) -> Any:
        optim = AdEMAMix(rate, eps_root=1e-8)
        zeros = jnp.zeros(3)
        return jnp.sum(optim.update(zeros, optim.init(zeros))[0])

    assert jax.grad(size)(jnp.asarray(0.1)) == 0.0
    by_grads = jax.grad(
        lambda g: jnp.sum(
            AdEMAMix(0.1, eps_root=1e-8).update(g, AdEMAMix(0.1).init(g))[0]
        )
    )
    assert np.all(np.isfinite(by_grads(jnp.zeros(3))))


def test_hyperparams():
    optim: Any = AdEMAMix(
        lambda count: 0.1 * (jnp.asarray(count, float) + 1),
        b1=0.5,
        b3=beta3_scheduler(0.999, 0.9, warmup=100),
        alpha=alpha_scheduler(8.0, warmup=4),
        weight_decay=jnp.asarray(0.1),
    )
    params = jnp.ones(3)
    state = optim.init(params)
    for i in range(3):
        for read in (hyperparams, eqx.filter_jit(hyperparams)):
            now = read(optim, state)
            assert all(
                x.shape == () and x.dtype == jnp.float32 and not x.weak_type
                for x in jtu.tree_leaves(now)
            )
            np.testing.assert_allclose(now.learning_rate, 0.1 * (i + 1), rtol=1e-6)
            assert (now.b1, now.b2) == (0.5, np.float32(0.999))
            assert now.b3 == optim.b3(i) and now.alpha == 2.0 * i
            assert now.weight_decay == np.float32(0.1)
            assert len(jtu.tree_leaves(now)) == 6
        _, state = optim.update(params, state, params)


@pytest.mark.parametrize(
    "optim, text",
    (
        (
            AdEMAMix(3e-3, alpha=alpha_scheduler(5.0, warmup=2), weight_decay=0.1),
            "Hyperparams(learning_rate=0.003, b1=0.9, b2=0.999, b3=0.9999, alpha=0.0, "
            "weight_decay=0.1)",
        ),
        (
            SimplifiedAdEMAMix(1e-5, alpha=10.0),
            "SimplifiedHyperparams(learning_rate=1e-05, b1=0.99, b2=0.95, alpha=10.0, "
            "weight_decay=0.0)",
        ),
    ),
)
def test_hyperparams_print_their_numbers(optim: Any, text: str):
    h = hyperparams(optim, init(optim, jnp.ones(3)))
    assert repr(h) == str(h) == text
    assert repr(jax.device_get(h)) == text


def test_hyperparams_without_numbers_print_their_types():
    optim = AdEMAMix(jnp.asarray(0.5), weight_decay=jnp.asarray(0.25))
    state, texts = init(optim, jnp.ones(3)), []

    def read(optim: AdEMAMix) -> Hyperparams:
        h = hyperparams(optim, state)
        texts.append(repr(h))
        return h

    eqx.filter_jit(read)(optim)
    assert texts[0].startswith("Hyperparams(learning_rate=f32[], b1=")
    assert texts[0].endswith(", weight_decay=f32[])")
    h = hyperparams(optim, state)
    h.weight_decay.delete()
    assert repr(h).startswith("Hyperparams(learning_rate=0.5, b1=0.9, ")
    assert repr(h).endswith(", weight_decay=f32[])")
    assert repr(eqx.filter(h, False)).endswith(", weight_decay=None)")


def test_hyperparams_of_a_sweep_print_all_numbers():
    make = lambda rate: AdEMAMix(rate)
    read = lambda optim: hyperparams(optim, init(optim, jnp.ones(3)))
    h = eqx.filter_vmap(read)(eqx.filter_vmap(make)(jnp.asarray([0.25, 0.5])))
    assert repr(h).startswith("Hyperparams(learning_rate=[0.25 0.5 ], ")


#
# Inside optax
#


@pytest.mark.parametrize(
    "make",
    (
        lambda optim: optax.chain(optax.clip_by_global_norm(1.0), optim),
        lambda optim: optax.MultiSteps(optim, every_k_schedule=2),
        lambda optim: optax.apply_if_finite(optim, max_consecutive_errors=3),
        lambda optim: optax.chain(optim, optax.scale(0.5)),
    ),
    ids=("chain", "MultiSteps", "apply_if_finite", "chain before scale"),
)
def test_stands_where_optax_takes_an_optimizer(make: Any):
    model = make_mlp()
    schedules: Any = dict(
        b3=beta3_scheduler(0.99, 0.9, warmup=10), alpha=alpha_scheduler(5.0, warmup=10)
    )
    optim = make(
        AdEMAMix(
            3e-2, weight_decay=0.1, weight_decay_mask=decay_mask(model), **schedules
        )
    )
    x = jax.random.normal(jax.random.key(1), (16, 3))

    def loss(model: Any) -> Any:
        return jnp.mean((jax.vmap(model)(x) - x[:, :2]) ** 2)

    def one(model: Any, state: Any) -> Any:
        value, grads = eqx.filter_value_and_grad(loss)(model)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, state = optim.update(grads, state, params)
        return eqx.apply_updates(model, updates), state, value

    counted, traces = count_traces(one)
    step = eqx.filter_jit(counted)
    with jax.numpy_dtype_promotion("standard"):
        state = optim.init(eqx.filter(model, eqx.is_inexact_array))
        kind, losses = tree_type(state), []
        for _ in range(60):
            model, state, value = step(model, state)
            losses.append(float(value))
    assert tree_type(state) == kind and len(traces) == 1
    assert losses[-1] < 0.7 * losses[0]


def test_a_nan_gradient_changes_nothing_under_apply_if_finite():
    params, inner = jnp.ones(3), AdEMAMix(1e-2)
    optim: Any = optax.apply_if_finite(inner, 3)  # pyright: ignore[reportArgumentType]
    with jax.numpy_dtype_promotion("standard"):
        state = optim.init(params)
        updates, state = optim.update(jnp.asarray([1.0, jnp.nan, 0.0]), state, params)
        assert jnp.all(updates == 0) and state.inner_state.count == 0
        updates, state = optim.update(jnp.ones(3), state, params)
        assert jnp.all(updates < 0) and state.inner_state.count == 1
