"""The rows of the table in the README: our behavior and optax's behavior."""
# The two optimizers do not share a type.
# pyright: reportArgumentType=false

import pathlib
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import eqx_ademamix
from eqx_ademamix import AdEMAMix

from .helpers import count_traces, loss_of_arrays, make_mlp, max_error


README = pathlib.Path(__file__).parents[1] / "README.md"


pytestmark = pytest.mark.usefixtures("standard_promotion")


def row(name: str) -> tuple[str, str]:
    """The two cells in a row of the table."""
    lines = [x for x in README.read_text().splitlines() if x.startswith(f"| {name} |")]
    (line,) = lines
    _, _, ours, theirs, _ = (cell.strip() for cell in line.split("|"))
    return ours, theirs


def test_whole_model():
    assert row("accepts a whole Equinox model") == ("yes", "no, arrays only")
    model = make_mlp()
    eqx_ademamix.init(AdEMAMix(1e-3), model)
    with pytest.raises((TypeError, ValueError, AttributeError)):
        optax.contrib.ademamix(1e-3).init(model)


def test_wrong_shape():
    name = "a gradient of the wrong shape that broadcasts"
    assert row(name) == ("an error that names the path", "a wrong step")
    model = {"w": jnp.ones((4, 3))}
    grads = {"w": jnp.ones((4, 1))}
    ours, theirs = AdEMAMix(1e-3), cast(Any, optax.contrib.ademamix(1e-3))
    with pytest.raises(ValueError, match=r"grads\['w'\] has shape \(4, 1\)"):
        ours.update(grads, ours.init(model), model)
    updates, _ = theirs.update(grads, theirs.init(model), model)
    assert updates["w"].shape == (4, 3)


def slow_average(optim: Any) -> float:
    params, grads = jnp.zeros((), jnp.bfloat16), jnp.ones((), jnp.bfloat16)
    state = optim.init(params)
    state = jax.eval_shape(lambda: optim.update(grads, state, params)[1])
    start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state)
    end = jax.jit(
        lambda s: jax.lax.fori_loop(
            0, 20_000, lambda _, s: optim.update(grads, s, params)[1], s
        )
    )(start)
    m2 = end.m2 if isinstance(end, eqx_ademamix.AdEMAMixState) else end[0].m2
    return float(m2)


def test_bfloat16():
    name = "`m2` after 20,000 gradients of 1, bf16 parameters (exact: 0.8647)"
    ours, theirs = row(name)
    assert f"{slow_average(AdEMAMix(1e-3)):.4f}" == ours == "0.8647"
    assert f"{slow_average(optax.contrib.ademamix(1e-3)):.3f}" == theirs == "0.031"


def test_new_learning_rate():
    assert row("a new learning rate") == ("same program", "recompiles")
    params = jnp.ones(3)

    def one(optim: Any, state: Any) -> Any:
        return optim.update(params, state, params)[0]

    for make, traced in (
        (lambda rate: AdEMAMix(jnp.asarray(rate)), 1),
        (optax.contrib.ademamix, 3),
    ):
        counted, traces = count_traces(one)
        step = eqx.filter_jit(counted)
        for rate in (0.1, 0.2, 0.3):
            step(make(rate), make(rate).init(params))
        assert len(traces) == traced


def test_second_step():
    name = "traces for two steps, bf16 moments, scheduled `b3`"
    assert row(name) == ("1", "2")
    params = jnp.ones(3)
    schedule = eqx_ademamix.beta3_scheduler(0.999, 0.9, warmup=10)
    fmt = eqx_ademamix.StateFormat(jnp.bfloat16, jnp.bfloat16, jnp.bfloat16)
    for optim, traced in (
        (AdEMAMix(1e-3, b3=schedule, state_format=fmt), 1),
        (optax.contrib.ademamix(1e-3, b3=schedule, mu_dtype=jnp.bfloat16), 2),
    ):
        counted, traces = count_traces(optim.update)
        step, state = jax.jit(counted), optim.init(params)
        for _ in range(2):
            _, state = step(params, state, params)
        assert len(traces) == traced


def test_b1_zero():
    assert row("bytes of state per parameter, `b1=0`") == ("8", "12")
    params = jnp.ones(1000)
    for optim, size in (
        (AdEMAMix(1e-3, b1=0), 8),
        (optax.contrib.ademamix(1e-3, 0), 12),
    ):
        leaves = [x for x in jtu.tree_leaves(optim.init(params)) if x.shape]
        assert sum(x.nbytes for x in leaves) == 1000 * size


def test_precision_of_one_minus_b3():
    name = "relative error of `1 - b3` if a schedule reaches `b3=0.999999`, float32"
    ours, theirs = row(name)
    grads, errors = jnp.ones(()), []
    # A Python float is exact in both. A schedule returns a float32 array.
    schedule = eqx_ademamix.beta3_scheduler(0.999999, 0.9, warmup=10)
    for optim in (
        AdEMAMix(1e-3, b3=schedule),
        optax.contrib.ademamix(1e-3, b3=schedule),
    ):
        state = optim.init(grads)
        at_end = jnp.asarray(10, jnp.int32)
        count = lambda s: (s if hasattr(s, "m2") else s[0]).count_m2
        state = eqx.tree_at(count, state, at_end)
        _, state = jax.jit(optim.update)(grads, state, grads)
        m2 = (state if hasattr(state, "m2") else state[0]).m2
        errors.append(abs(float(m2) / (1 - 0.999999) - 1))
    assert errors[0] < 1e-6 and ours == "below 1e-6"
    assert f"{errors[1]:.0%}" == theirs


def test_split_parameters():
    name = "parameters split over devices, state made by `jax.jit(init)`"
    assert row(name) == ("split", "a whole copy on each device")
    split = NamedSharding(
        Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data")
    )
    params = jax.device_put(jnp.ones((64, 8)), split)
    shares = []
    for optim in (AdEMAMix(1e-3), optax.contrib.ademamix(1e-3)):
        moments = [x for x in jtu.tree_leaves(jax.jit(optim.init)(params)) if x.ndim]
        shares.append({x.addressable_shards[0].data.size / x.size for x in moments})
    assert shares == [{1 / 8}, {1.0}]


def test_equal_where_both_are_exact():
    """In float32 with constant hyperparameters, both optimizers are the same."""
    model = eqx.filter(make_mlp(), eqx.is_inexact_array)
    kwargs: Any = dict(b3=0.99, alpha=2.0, weight_decay=0.1)
    ours, theirs = AdEMAMix(1e-2, **kwargs), optax.contrib.ademamix(1e-2, **kwargs)
    ends = []
    for optim in (ours, theirs):
        params, state = model, optim.init(model)
        for _ in range(50):
            grads = eqx.filter_grad(loss_of_arrays)(params)
            updates, state = optim.update(grads, state, params)
            params = eqx.apply_updates(params, updates)
        ends.append(jtu.tree_leaves(params))
    for a, b in zip(*ends, strict=True):
        assert max_error(a, b) <= 1e-5
