"""Use inside optax: each constructor in each wrapper, and workarounds."""
# optax uses one type for all states and all updates.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportIndexIssue=false

import dataclasses
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
    AdEMAMix,
    SimplifiedAdEMAMix,
    alpha_scheduler,
    beta3_scheduler,
)

from .helpers import COMPACT, assert_trees_close, count_traces, make_mlp, tree_type


pytestmark = pytest.mark.usefixtures("standard_promotion")


X = jax.random.normal(jax.random.key(1), (16, 3))
RATE = 3e-2


def loss_fn(model: Any) -> Any:
    return jnp.mean((jax.vmap(model)(X) - X[:, :2]) ** 2)


def schedules() -> dict[str, Any]:
    return dict(
        b3=beta3_scheduler(0.99, 0.9, warmup=30), alpha=alpha_scheduler(3.0, warmup=30)
    )


def as_function() -> Any:
    s = schedules()
    return eqx_ademamix.ademamix(
        RATE, b3_scheduler=s["b3"], alpha_scheduler=s["alpha"], weight_decay=0.01
    )


def as_class() -> Any:
    return AdEMAMix(RATE, weight_decay=0.01, **schedules())


def as_scale() -> Any:
    s = schedules()
    scale = eqx_ademamix.scale_by_ademamix(0.9, 0.999, 0.99, 3.0, s["b3"], s["alpha"])
    return optax.chain(scale, optax.scale(-RATE))


def as_compact() -> Any:
    return dataclasses.replace(as_class(), state_format=COMPACT)


def as_simplified() -> Any:
    return SimplifiedAdEMAMix(RATE, 0.9, alpha=2.0, normalize=True, weight_decay=0.01)


def as_simplified_function() -> Any:
    return eqx_ademamix.simplified_ademamix(RATE / 10, 0.9, weight_decay=0.01)


OPTIMIZERS = (
    as_function,
    as_class,
    as_scale,
    as_compact,
    as_simplified,
    as_simplified_function,
)


def by_rank(params: Any) -> Any:
    return jax.tree.map(lambda x: "matrix" if x.ndim > 1 else "vector", params)


def label_tree() -> Any:
    return by_rank(eqx.filter(make_mlp(), eqx.is_inexact_array))


def inject(make: Any) -> Any:
    if make in (as_class, as_compact):
        static = ("weight_decay_mask", "trainable", "state_format", "b3", "alpha")
        factory = optax.inject_hyperparams(AdEMAMix, static_args=static)
        return factory(RATE, state_format=make().state_format, **schedules())
    if make is as_simplified:
        static = ("weight_decay_mask", "trainable", "state_format", "normalize")
        factory = optax.inject_hyperparams(SimplifiedAdEMAMix, static_args=static)
        return factory(RATE, 0.9, alpha=2.0, normalize=True)
    if make is as_simplified_function:
        factory = optax.inject_hyperparams(eqx_ademamix.simplified_ademamix, "mask")
        return factory(RATE / 10, 0.9)
    s = schedules()
    static = ("b3_scheduler", "alpha_scheduler", "mask", "mu_dtype")
    if make is as_function:
        factory = optax.inject_hyperparams(eqx_ademamix.ademamix, static_args=static)
        return factory(RATE, b3_scheduler=s["b3"], alpha_scheduler=s["alpha"])
    factory = optax.inject_hyperparams(
        eqx_ademamix.scale_by_ademamix,
        static_args=("b3_scheduler", "alpha_scheduler", "mu_dtype"),
    )
    inner = factory(0.9, 0.999, 0.99, 3.0, s["b3"], s["alpha"])
    return optax.chain(inner, optax.scale(-RATE))


WRAPPERS: dict[str, Any] = {
    "alone": lambda make: make(),
    "chain, clip": lambda make: optax.chain(optax.clip_by_global_norm(1.0), make()),
    "MultiSteps": lambda make: optax.MultiSteps(make(), every_k_schedule=2),
    "apply_if_finite": lambda make: optax.apply_if_finite(make(), 3),
    "inject_hyperparams": inject,
    "masked, tree": lambda make: optax.chain(
        optax.masked(make(), jax.tree.map(lambda x: x == "matrix", label_tree())),
        optax.masked(
            optax.scale(-RATE), jax.tree.map(lambda x: x == "vector", label_tree())
        ),
    ),
    "masked, function": lambda make: optax.chain(
        optax.masked(make(), lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
        optax.masked(
            optax.scale(-RATE), lambda p: jax.tree.map(lambda x: x.ndim < 2, p)
        ),
    ),
    "partition, label function": lambda make: optax.partition(
        {"matrix": make(), "vector": optax.sgd(RATE)}, by_rank
    ),
    "partition, a label that no leaf has": lambda make: optax.partition(
        {"matrix": make(), "vector": optax.sgd(RATE), "none": make()}, by_rank
    ),
    "multi_transform, label tree": lambda make: optax.multi_transform(
        {"matrix": make(), "vector": optax.sgd(RATE)}, lambda _: label_tree()
    ),
    "freeze by set_to_zero": lambda make: optax.partition(
        {"matrix": make(), "vector": optax.set_to_zero()}, by_rank
    ),
    "ema of the updates": lambda make: optax.chain(make(), optax.ema(0.5)),
    "flatten": lambda make: optax.flatten(make()),
    "with_extra_args_support": lambda make: optax.with_extra_args_support(make()),
}


@pytest.mark.parametrize("make", OPTIMIZERS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("wrapper", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_trains_inside(make: Any, wrapper: Any):
    model = make_mlp()
    optim = wrapper(make)

    def one(model: Any, state: Any) -> Any:
        loss, grads = eqx.filter_value_and_grad(loss_fn)(model)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, state = optim.update(grads, state, params)
        return eqx.apply_updates(model, updates), state, loss

    counted, traces = count_traces(one)
    step = eqx.filter_jit(counted)
    state = optim.init(eqx.filter(model, eqx.is_inexact_array))
    kind, losses = tree_type(state), []
    for _ in range(60):
        model, state, loss = step(model, state)
        losses.append(float(loss))
    assert tree_type(state) == kind and len(traces) == 1
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("make", OPTIMIZERS, ids=lambda make: make.__name__)
def test_lookahead(make: Any):
    """Lookahead keeps its own slow parameters."""
    optim = optax.lookahead(make(), sync_period=3, slow_step_size=0.5)
    model = eqx.filter(make_mlp(), eqx.is_inexact_array)
    params = optax.LookaheadParams.init_synced(model)
    static = eqx.filter(make_mlp(), eqx.is_inexact_array, inverse=True)
    state, losses = optim.init(params), []

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        of = lambda fast: loss_fn(eqx.combine(fast, static))
        loss, grads = jax.value_and_grad(of)(params.fast)
        updates, state = optim.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    for _ in range(60):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("make", OPTIMIZERS, ids=lambda make: make.__name__)
def test_multi_steps_is_one_step_on_the_mean(make: Any):
    params = {"w": jnp.ones((2, 3)), "b": jnp.zeros(3)}
    grads = [
        jax.tree.map(
            lambda x, k=k: jax.random.normal(jax.random.key(k), x.shape), params
        )
        for k in range(3)
    ]
    steps = optax.MultiSteps(make(), every_k_schedule=3)
    state, updates = steps.init(params), None
    for g in grads:
        updates, state = steps.update(g, state, params)
    mean = jax.tree.map(lambda *xs: sum(xs) / 3, *grads)
    expected, _ = make().update(mean, make().init(params), params)
    assert_trees_close(updates, expected, 1e-5)


@pytest.mark.parametrize("make", OPTIMIZERS, ids=lambda make: make.__name__)
def test_apply_if_finite(make: Any):
    optim, params = optax.apply_if_finite(make(), 3), jnp.ones(3)
    state = optim.init(params)
    updates, after = optim.update(jnp.asarray([1.0, jnp.nan, 0.0]), state, params)
    assert jnp.all(updates == 0)
    assert_trees_close(after.inner_state, state.inner_state, 0.0)
    updates, after = optim.update(jnp.ones(3), after, params)
    expected, _ = make().update(jnp.ones(3), make().init(params), params)
    assert_trees_close(updates, expected, 1e-6)


@pytest.mark.parametrize("make", (as_function, as_class), ids=lambda m: m.__name__)
def test_a_new_learning_rate_between_steps(make: Any):
    optim, params = inject(make), jnp.ones(3)
    state = optim.init(params)
    counted, traces = count_traces(optim.update)
    step, sizes = jax.jit(counted), []
    for rate in (RATE, 2 * RATE, 0.0):
        key = "lr" if make is as_function else "learning_rate"
        state.hyperparams[key] = jnp.asarray(rate, jnp.float32)
        updates, _ = step(jnp.ones(3), state, params)
        sizes.append(updates)
    assert len(traces) == 1
    np.testing.assert_allclose(sizes[1], 2 * sizes[0], rtol=1e-6)
    np.testing.assert_array_equal(sizes[2], 0.0)


def test_injected_schedules_of_numbers():
    """`inject_hyperparams` evaluates anything that it regards as a schedule."""
    factory = optax.inject_hyperparams(
        eqx_ademamix.ademamix,
        static_args=("b3_scheduler", "alpha_scheduler", "mask", "mu_dtype"),
    )
    optim = factory(
        learning_rate=optax.linear_schedule(0.1, 0.0, 10), alpha=schedules()["alpha"]
    )
    params = jnp.ones(3)
    state = optim.init(params)
    for i in range(3):
        _, state = jax.jit(optim.update)(params, state, params)
        np.testing.assert_allclose(
            state.hyperparams["learning_rate"], 0.1 - 0.01 * i, rtol=1e-6
        )
        np.testing.assert_allclose(state.hyperparams["alpha"], 0.1 * i, rtol=1e-6)


def test_injected_into_16_bit_parameters():
    params = jnp.ones(3, jnp.bfloat16)
    static = ("b3_scheduler", "alpha_scheduler", "mask", "mu_dtype")
    kwargs: Any = dict(inner_factory=eqx_ademamix.ademamix, static_args=static)
    with pytest.raises(ValueError, match="hyperparam_dtype="):
        optax.inject_hyperparams(**kwargs)(RATE).init(params)
    optim = optax.inject_hyperparams(**kwargs, hyperparam_dtype=jnp.float32)(RATE)
    updates, _ = optim.update(params, optim.init(params), params)
    assert updates.dtype == jnp.bfloat16


def test_injected_scheduler_that_is_not_static():
    factory = optax.inject_hyperparams(eqx_ademamix.ademamix)
    optim = factory(RATE, b3_scheduler=schedules()["b3"])
    with pytest.raises(
        TypeError, match=r"`b3_scheduler` is .* list it in `static_args`"
    ):
        optim.init(jnp.ones(3))


@pytest.mark.parametrize("make", OPTIMIZERS, ids=lambda make: make.__name__)
def test_map_params(make: Any):
    """`optax.tree.map_params` finds the moments and nothing else."""
    optim, params = make(), {"w": jnp.ones((2, 3)), "b": jnp.zeros(3)}
    state = optim.init(params)
    doubled = optax.tree.map_params(
        optim, lambda x: x + 1, state, transform_non_params=lambda x: x
    )
    ours = doubled[0] if isinstance(doubled, tuple) else doubled
    for moments in ours.moments:
        assert all(jnp.all(x == 1) for x in jtu.tree_leaves(moments))
    scalars = [getattr(ours, name) for name in ours.counters + ours.weights]
    assert all(x is None or x == 0 for x in scalars)


@pytest.mark.parametrize("make", OPTIMIZERS, ids=lambda make: make.__name__)
def test_schedule_free(make: Any):
    """Schedule-free also keeps its own parameters. The evaluation parameters hold the
    result of training."""
    optim = optax.contrib.schedule_free(make(), learning_rate=RATE, b1=0.9)
    params, static = eqx.partition(make_mlp(), eqx.is_inexact_array)
    of = lambda params: loss_fn(eqx.combine(params, static))
    state, start = optim.init(params), of(params)
    counted, traces = count_traces(
        lambda params, state: optim.update(jax.grad(of)(params), state, params)
    )
    step = jax.jit(counted)
    for _ in range(100):
        updates, state = step(params, state)
        params = optax.apply_updates(params, updates)
    assert len(traces) == 1
    assert of(optax.contrib.schedule_free_eval_params(state, params)) < 0.8 * start


def test_a_callable_module_as_labels():
    """optax checks `callable(...)`, and Equinox models are callable. Use a lambda."""
    params = eqx.filter(make_mlp(), eqx.is_inexact_array)
    transforms: Any = {"matrix": as_class(), "vector": optax.sgd(RATE)}
    with pytest.raises(TypeError, match=r"unsupported operand type.* for @: 'str'"):
        optax.partition(transforms, by_rank(params)).init(params)
    state = optax.partition(transforms, lambda _: by_rank(params)).init(params)
    inner: Any = state.inner_states["matrix"].inner_state
    assert len(jtu.tree_leaves(inner.m2)) == 3


def test_a_callable_module_as_mask_of_ours():
    """Our optimizers treat a module as a tree, and accept a function of the tree."""
    params = eqx.filter(make_mlp(), eqx.is_inexact_array)
    mask = jax.tree.map(lambda x: x.ndim > 1, params)
    grads = jax.tree.map(jnp.zeros_like, params)
    for form in (mask, lambda p: jax.tree.map(lambda x: x.ndim > 1, p)):
        tx = eqx_ademamix.ademamix(RATE, weight_decay=0.1, mask=form)
        updates: Any = tx.update(grads, tx.init(params), params)[0]
        assert updates.layers[0].weight.any() and not updates.layers[0].bias.any()


def test_the_whole_model_in_wrappers_that_need_arrays():
    """AdEMAMix accepts the whole model, but wrappers need a filtered model."""
    model = make_mlp()
    with pytest.raises(TypeError, match="zeros_like requires ndarray or scalar"):
        optax.MultiSteps(as_class(), 2).init(model)
    state = optax.MultiSteps(as_class(), 2).init(
        eqx.filter(model, eqx.is_inexact_array)
    )
    assert state.mini_step == 0


def test_reading_and_setting_inside_a_state():
    """`optax.tree.get` only searches NamedTuples. Attributes and `eqx.tree_at` work."""
    optim = optax.chain(optax.clip_by_global_norm(1.0), as_class())
    state: Any = optim.init(jnp.ones(3))
    assert optax.tree.get(state, "count_m2") is None
    assert state[1].count_m2 == 0
    seven = jnp.asarray(7, jnp.int32)
    state = eqx.tree_at(lambda s: s[1].count_m2, state, seven)
    assert state[1].count_m2 == 7
    _, state = optim.update(jnp.ones(3), state, jnp.ones(3))
    assert state[1].count_m2 == 8


#
# What only a named tuple can do
#


@pytest.mark.parametrize("make", (as_class, lambda: SimplifiedAdEMAMix(RATE)))
def test_a_module_is_not_a_named_tuple(make: Any):
    """`docs/optax.md` names both cases, and what to use instead."""
    optim = make()
    assert not isinstance(optim, optax.GradientTransformation)
    name = type(optim).__name__
    with pytest.raises(TypeError, match=f"cannot unpack non-iterable {name} object"):
        _init, _update = optim

    wrapped = optax.GradientTransformationExtraArgs(optim.init, optim.update)
    model = make_mlp()
    grads = eqx.filter_grad(loss_fn)(model)
    init, update = wrapped
    updates, _ = update(grads, init(model), model)
    expected, _ = optim.update(grads, optim.init(model), model)
    assert eqx.tree_equal(updates, expected)


@pytest.mark.parametrize(
    "make", (as_function, lambda: eqx_ademamix.simplified_ademamix(RATE))
)
def test_the_functions_return_named_tuples(make: Any):
    init, update = optim = make()
    assert isinstance(optim, optax.GradientTransformation)
    params = eqx.filter(make_mlp(), eqx.is_inexact_array)
    updates, _ = update(params, init(params), params)
    assert jtu.tree_structure(updates) == jtu.tree_structure(params)
