"""Gradients that are accumulated over batches are exchanged once. These tests count the
sums over devices in compiled programs."""

import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from .helpers import assert_trees_close
from .test_examples import example
from .test_more_examples import as_users_run_it as as_users_run_it
from .test_more_examples import run


NUM_ARRAYS = 4  # of the model


@pytest.fixture
def accumulate(monkeypatch: pytest.MonkeyPatch) -> Any:
    return example("accumulate_sharded", monkeypatch)


def mesh_of(**options: Any) -> Mesh:
    return Mesh(np.array(jax.devices()), ("data",), **options)


def data_on(mesh: Mesh, count: int) -> Any:
    rng = np.random.default_rng(0)
    images = rng.normal(size=(count, 16, 64)).astype(np.float32)
    labels = rng.integers(10, size=(count, 16)).astype(np.int32)
    return jax.device_put((images, labels), NamedSharding(mesh, P(None, "data")))


@pytest.mark.parametrize("count", (1, 3))
def test_sums_over_devices(accumulate: Any, count: int):
    """XLA sums the gradient of each batch. With `shard_map`, it sums their mean."""
    mesh = mesh_of()
    model = eqx.nn.MLP(64, 10, width_size=16, depth=1, key=jax.random.key(0))
    model = accumulate.place(model, NamedSharding(mesh, P()))
    batches = data_on(mesh, count)
    ways = {"each": accumulate.mean_over_batches, "once": accumulate.mean_once(mesh)}
    outcomes: dict[str, Any] = {}
    exchanges: dict[str, tuple[int, int]] = {}
    for name, gradient in ways.items():
        step: Any = eqx.filter_jit(gradient)
        compiled = step.lower(model, batches).compile()
        exchanges[name] = accumulate.count_exchanges(compiled.compiled.as_text())
        outcomes[name] = compiled(model, batches)
    assert_trees_close(outcomes["each"], outcomes["once"], 1e-6)
    assert exchanges["once"] == (0, NUM_ARRAYS)
    # XLA unrolls a loop of one iteration. That of JAX 0.4.27 also sums activations.
    inside, after = exchanges["each"] if count > 1 else exchanges["each"][::-1]
    assert inside in (NUM_ARRAYS, NUM_ARRAYS + 1) and after == 0


def has_unreduced() -> bool:
    try:
        P(unreduced={"data"})  # pyright: ignore
    except TypeError:
        return False
    return hasattr(jax.sharding, "reshard")


def unreduced(weight: Any, batches: Any) -> Any:
    """The sum of the gradients, with explicit mesh axes."""
    mesh = mesh_of(axis_types=(jax.sharding.AxisType.Explicit,))
    put = lambda x, **kind: jax.sharding.reshard(
        x, NamedSharding(mesh, P(None, None, **kind))
    )
    own = put(weight, reduced={"data"})
    loss = lambda w, x: jnp.sum(jnp.tanh(jnp.einsum("bi,io->bo", x, w)))
    add = lambda total, x: (total + jax.grad(loss)(own, x), None)
    zeros = put(jnp.zeros_like(weight), unreduced={"data"})
    return put(jax.lax.scan(add, zeros, batches)[0])


if has_unreduced():

    def test_unreduced_gradients(accumulate: Any):
        """What the docs say of explicit mesh axes."""
        mesh = mesh_of(axis_types=(jax.sharding.AxisType.Explicit,))
        weight = jax.device_put(jnp.ones((64, 8)) / 64, NamedSharding(mesh, P()))
        images, _ = data_on(mesh, 3)
        compiled = jax.jit(unreduced).lower(weight, images).compile()
        assert accumulate.count_exchanges(compiled.as_text()) == (0, 1)
        loss = lambda w, x: jnp.sum(jnp.tanh(x @ w))
        here = jax.device_get((weight, images))
        expected = jax.grad(lambda w: sum(loss(w, x) for x in here[1]))(here[0])
        found = jnp.asarray(jax.device_get(compiled(weight, images)))
        assert_trees_close(found, expected, 1e-6)


def test_example(tmp_path: Any):
    args = ("--steps", 6, "--batch-size", 8, "--accumulate", 2)
    printed = run("accumulate_sharded.py", tmp_path, *args)
    assert re.search(r"^for each batch +[67] +0 ", printed, re.MULTILINE)
    assert re.search(r"^once +0 +6 ", printed, re.MULTILINE)
    assert "  .layers[1].weight  (256, 256)  P()        P('data')" in printed
