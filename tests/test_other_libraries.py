"""Optimizers of this package in other libraries, as `docs/other-libraries.md` shows it.

`tests/test_docs.py` runs the page. These tests compare the numbers.
"""
# optax uses one type for all optimizers.
# pyright: reportArgumentType=false

import importlib
import importlib.util
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eqx_ademamix
from eqx_ademamix import AdEMAMix, Compensated, SimplifiedAdEMAMix

from .helpers import COMPACT, assert_trees_close, count_traces


pytestmark = [
    pytest.mark.usefixtures("standard_promotion"),
    # Some of these libraries use what newer versions of Flax or JAX warn about.
    pytest.mark.filterwarnings("default"),
]


HAS = {
    name: importlib.util.find_spec(name) is not None
    for name in ("flax", "haiku", "optimistix", "flowjax")
}
OPTIMS = {
    "AdEMAMix": AdEMAMix(1e-2, weight_decay=0.1),
    "ademamix": eqx_ademamix.ademamix(1e-2, weight_decay=0.1),
    "compact": AdEMAMix(1e-2, state_format=COMPACT),
    "SimplifiedAdEMAMix": SimplifiedAdEMAMix(1e-2, alpha=10.0, normalize=True),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), AdEMAMix(1e-2)),
}
optims = pytest.mark.parametrize("optim", OPTIMS.values(), ids=OPTIMS)
X = jax.random.normal(jax.random.key(1), (8, 3))
Y = X[:, :2] * X[:, 1:]


def by_hand(optim: Any, params: Any, grad: Any, steps: int = 3) -> Any:
    """The parameters after some steps of our own loop."""
    state = eqx_ademamix.init(optim, params)
    for _ in range(steps):
        updates, state = eqx_ademamix.update(optim, grad(params), state, params)
        params = jax.tree.map(jnp.add, params, updates)
    return params


if HAS["flax"]:
    linen: Any = importlib.import_module("flax.linen")
    nnx: Any = importlib.import_module("flax.nnx")
    serialization: Any = importlib.import_module("flax.serialization")
    training: Any = importlib.import_module("flax.training.train_state")

    IN_NNX = {name: optim for name, optim in OPTIMS.items() if name != "compact"}

    @pytest.mark.parametrize("optim", IN_NNX.values(), ids=IN_NNX)
    def test_nnx(optim: Any):
        model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        loss_fn = lambda model: jnp.mean((model(X) - Y) ** 2)
        graph, params = nnx.split(model)
        grad = jax.jit(jax.grad(lambda p: loss_fn(nnx.merge(graph, p))))
        expected = nnx.merge(graph, by_hand(optim, params, grad))

        optimizer = nnx.Optimizer(model, optim, wrt=nnx.Param)
        step, traces = count_traces(lambda m, o: o.update(m, nnx.grad(loss_fn)(m)))
        step = nnx.jit(step)
        for _ in range(3):
            step(model, optimizer)
        assert len(traces) == 1
        assert np.allclose(model.kernel[...], expected.kernel[...], rtol=1e-5)
        assert np.allclose(model.bias[...], expected.bias[...], rtol=1e-5)

    def test_codecs_in_nnx():
        """`nnx.Optimizer` takes the state apart, but our own functions do not."""
        optim, model = OPTIMS["compact"], nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, optim, wrt=nnx.Param)
        loss_fn = lambda model: jnp.mean((model(X) - Y) ** 2)
        step = nnx.jit(lambda m, o: o.update(m, nnx.grad(loss_fn)(m)))
        with pytest.raises(ValueError, match="the optimizer state has a `State` there"):
            for _ in range(2):
                step(model, optimizer)

        graph, params = nnx.split(model)
        grad = jax.jit(jax.grad(lambda p: loss_fn(nnx.merge(graph, p))))
        trained = by_hand(optim, params, grad)
        assert loss_fn(nnx.merge(graph, trained)) < loss_fn(model)

    @optims
    def test_linen(optim: Any):
        model = linen.Dense(2)
        params = model.init(jax.random.key(0), X)["params"]
        state = training.TrainState.create(
            apply_fn=model.apply, params=params, tx=optim
        )
        loss_fn = lambda p: jnp.mean((model.apply({"params": p}, X) - Y) ** 2)
        grad = jax.jit(jax.grad(loss_fn))
        step, traces = count_traces(lambda s: s.apply_gradients(grads=grad(s.params)))
        step = jax.jit(step)
        for _ in range(3):
            state = step(state)
        assert len(traces) == 1 and state.step == 3
        assert_trees_close(state.params, by_hand(optim, params, grad), 1e-5)

    PARAMS = {"w": jnp.ones((64, 128), jnp.bfloat16), "b": jnp.ones(3)}
    SAVED = {
        "AdEMAMix": AdEMAMix(1e-3),
        "compact": AdEMAMix(1e-3, b1=0, state_format=COMPACT),
        "SimplifiedAdEMAMix": SimplifiedAdEMAMix(1e-3),
        "Compensated": Compensated(AdEMAMix(1e-3, state_format=COMPACT)),
        "chain": optax.chain(optax.clip_by_global_norm(1.0), AdEMAMix(1e-3)),
    }

    def test_flax_does_not_know_the_states():
        class Unknown(eqx.Module):
            x: jax.Array

        with pytest.raises(TypeError, match="can not serialize 'Unknown' object"):
            serialization.to_bytes(Unknown(jnp.ones(2)))

    @pytest.mark.parametrize("optim", SAVED.values(), ids=SAVED)
    def test_the_recipe_for_flax_serialization(optim: Any):
        def to_dict(state: Any) -> Any:
            return serialization.to_state_dict(jax.tree.leaves(state))

        def from_dict(like: Any, saved: Any) -> Any:
            leaves, treedef = jax.tree.flatten(like)
            return treedef.unflatten(serialization.from_state_dict(leaves, saved))

        for cls in (
            eqx_ademamix.AdEMAMixState,
            eqx_ademamix.SimplifiedAdEMAMixState,
            eqx_ademamix.CompensatedState,
        ):
            serialization.register_serialization_state(
                cls, to_dict, from_dict, override=True
            )
        like = eqx_ademamix.init(optim, PARAMS)
        _, state = eqx_ademamix.update(optim, PARAMS, like, PARAMS)
        train_state = {"step": 1, "opt_state": state}
        data = serialization.to_bytes(train_state)
        blank = {"step": 0, "opt_state": like}
        restored = serialization.from_bytes(blank, data)["opt_state"]
        as_jax = jax.tree.map(jnp.asarray, restored)
        assert eqx.tree_equal(as_jax, state, typematch=True)
        # The restored arrays are NumPy's, which `update` takes.
        new, next_state = eqx_ademamix.update(optim, PARAMS, restored, PARAMS)
        expected = eqx_ademamix.update(optim, PARAMS, state, PARAMS)
        assert eqx.tree_equal((new, next_state), expected)


if HAS["haiku"]:
    haiku: Any = importlib.import_module("haiku")

    @optims
    def test_haiku(optim: Any):
        network = haiku.without_apply_rng(haiku.transform(lambda x: haiku.Linear(2)(x)))
        params = network.init(jax.random.key(0), X)
        grad = jax.jit(jax.grad(lambda p: jnp.mean((network.apply(p, X) - Y) ** 2)))
        state = optim.init(params)
        step, traces = count_traces(lambda p, s: optim.update(grad(p), s, p))
        step, trained = jax.jit(step), params
        for _ in range(3):
            updates, state = step(trained, state)
            trained = optax.apply_updates(trained, updates)
        assert len(traces) == 1
        assert_trees_close(trained, by_hand(optim, params, grad), 1e-5)

    def test_the_mask_of_a_haiku_network():
        network = haiku.transform(lambda x: haiku.nets.MLP([4, 2])(x))
        mask = eqx_ademamix.decay_mask(network.init(jax.random.key(0), X))
        assert list(mask.values()) == [{"b": False, "w": True}] * 2


if HAS["optimistix"]:
    optimistix: Any = importlib.import_module("optimistix")

    @optims
    def test_optimistix(optim: Any):
        target = jnp.array([1.0, 2.0, 3.0])
        fn = lambda y, _: jnp.sum((y - target) ** 2)
        solver = optimistix.OptaxMinimiser(optim, rtol=0.0, atol=0.0)
        found = optimistix.minimise(fn, solver, jnp.zeros(3), max_steps=4, throw=False)
        expected = by_hand(optim, jnp.zeros(3), jax.grad(lambda y: fn(y, None)), 4)
        assert found.stats["num_steps"] == 4
        assert_trees_close(found.value, expected, 1e-5)


if HAS["flowjax"]:
    bijections: Any = importlib.import_module("flowjax.bijections")
    distributions: Any = importlib.import_module("flowjax.distributions")
    fit: Any = importlib.import_module("flowjax.train")

    @optims
    def test_flowjax(optim: Any):
        normal = distributions.Normal(jnp.zeros(2))
        affine = bijections.Affine(jnp.zeros(2), jnp.ones(2))
        flow = distributions.Transformed(normal, affine)
        data = 1 + 2 * jax.random.normal(jax.random.key(1), (64, 2))
        trained, losses = fit.fit_to_data(
            jax.random.key(2),
            flow,
            data,
            optimizer=optim,
            max_epochs=2,
            batch_size=32,
            show_progress=False,
        )
        assert len(losses["train"]) == 2 and np.all(np.isfinite(losses["train"]))
        assert trained.log_prob(data).mean() > flow.log_prob(data).mean()
