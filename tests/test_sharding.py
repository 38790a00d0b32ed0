"""States on many devices: `init` keeps the shardings of the parameters, and the step is
local. These tests read shardings and the collectives of compiled programs."""

import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import eqx_ademamix
from eqx_ademamix import AdEMAMix, Compensated, Encoded, SimplifiedAdEMAMix

from .helpers import COMPACT, everywhere


FORMATS = {
    "float32": eqx_ademamix.StateFormat.float32(),
    "half": everywhere(eqx_ademamix.StateFormat.half()),
    "compact": COMPACT,
}
SHAPE = (64, 2048)
# Meshes, and shardings whose shards hold whole blocks.
LAYOUTS = {
    "rows": ((8,), "a", P("a", None)),
    "columns": ((8,), "a", P(None, "a")),
    "both": ((4, 2), "ab", P("a", "b")),
    "one of two axes": ((4, 2), "ab", P("b", None)),
    "three axes": ((2, 2, 2), "abc", P(("a", "c"), "b")),
}
layouts = pytest.mark.parametrize("layout", LAYOUTS)
formats = pytest.mark.parametrize("name", FORMATS)


def sharding_of(layout: str) -> NamedSharding:
    shape, names, spec = LAYOUTS[layout]
    devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
    return NamedSharding(Mesh(devices, tuple(names)), spec)


def params_on(sharding: NamedSharding, dtype: Any = jnp.float32) -> dict[str, Any]:
    x = np.random.default_rng(0).normal(size=SHAPE)
    return {"w": jax.device_put(jnp.asarray(x, dtype), sharding)}


def assert_beside(state: Any, sharding: NamedSharding) -> None:
    """Every array of the state is sharded as it should be: codes, dense moments and
    remainders as the parameter, scales along the same axes, counters not at all."""
    for x in jtu.tree_leaves(state):
        if x.ndim == 0:
            assert x.sharding.is_fully_replicated
            assert x.sharding.device_set == sharding.device_set
        else:
            assert x.sharding.is_equivalent_to(sharding, 2), (x.shape, x.sharding)


def collectives(program: Any) -> list[str]:
    """The shapes of what devices exchange in a compiled program, without scalars."""
    found = re.findall(
        r"= (.*?) (?:all-gather|all-reduce|all-to-all|collective-permute|"
        r"reduce-scatter)[\w\-]*\(",
        program.as_text(),
    )
    return [x for x in found if not re.fullmatch(r"\w+\[\]\S*", x)]


@formats
@layouts
@pytest.mark.parametrize("how", ("eager", "jit", "filter_jit"))
def test_init_keeps_shardings(how: str, layout: str, name: str):
    sharding = sharding_of(layout)
    optim, params = AdEMAMix(1e-3, state_format=FORMATS[name]), params_on(sharding)
    init = lambda p: eqx_ademamix.init(optim, p)
    wrap = {"eager": lambda f: f, "jit": jax.jit, "filter_jit": eqx.filter_jit}[how]
    state = wrap(init)(params)
    assert_beside(state, sharding)
    assert all(np.all(np.asarray(x) == 0) for x in jtu.tree_leaves(state))


@pytest.mark.parametrize("how", ("eager", "jit"))
@pytest.mark.parametrize(
    "optim",
    (
        SimplifiedAdEMAMix(1e-3, state_format=COMPACT),
        Compensated(AdEMAMix(1e-3, state_format=COMPACT)),
        AdEMAMix(1e-3, b1=0.0, bias_correct_m2=True),
    ),
    ids=("Simplified", "Compensated", "b1=0"),
)
def test_init_of_other_optimizers(how: str, optim: Any):
    sharding = sharding_of("both")
    dtype = jnp.bfloat16 if isinstance(optim, Compensated) else jnp.float32
    init = lambda p: eqx_ademamix.init(optim, p)
    state = (jax.jit(init) if how == "jit" else init)(params_on(sharding, dtype))
    assert_beside(state, sharding)


def test_a_nan_among_parameters_is_no_nan_in_the_state():
    sharding = sharding_of("rows")
    bad = jnp.full(SHAPE, jnp.nan).at[0].set(jnp.inf)
    params = jax.device_put(bad, sharding)
    state = jax.jit(AdEMAMix(1e-3, state_format=COMPACT).init)(params)
    assert all(np.all(np.asarray(x) == 0) for x in jtu.tree_leaves(state))


@formats
@layouts
def test_the_step_is_local(layout: str, name: str):
    """No moment, code, scale, gradient or parameter moves between devices, shardings
    stay, and the second step compiles nothing."""
    sharding = sharding_of(layout)
    optim, params = AdEMAMix(1e-3, state_format=FORMATS[name]), params_on(sharding)
    state = eqx_ademamix.init(optim, params)

    def update(params: Any, state: Any) -> Any:
        grads = jax.tree.map(jnp.sin, params)
        updates, state = eqx_ademamix.update(optim, grads, state, params)
        return eqx.apply_updates(params, updates), state

    step: Any = jax.jit(update)
    assert collectives(step.lower(params, state).compile()) == []
    for _ in range(2):
        params, state = step(params, state)
        assert_beside((params, state), sharding)
    assert step._cache_size() == 1


@pytest.mark.parametrize("name", ("half", "compact"))
@pytest.mark.parametrize("shape", ((4096, 40), (64, 64, 3, 3), (65_536,), (4096, 1)))
def test_the_step_is_local_if_blocks_span_axes(name: str, shape: tuple[int, ...]):
    """Blocks along several short axes, of which the first is split."""
    sharding = NamedSharding(sharding_of("rows").mesh, P("a"))
    x = jax.device_put(jnp.ones(shape), sharding)
    optim = AdEMAMix(1e-3, state_format=FORMATS[name])
    state = optim.init(x)
    assert collectives(jax.jit(optim.update).lower(x, state).compile()) == []


@pytest.mark.parametrize("name", ("half", "compact"))
def test_blocks_that_span_devices(name: str):
    """Devices exchange no more than the maxima of 32 entries each."""
    sharding = sharding_of("columns")
    x = jax.device_put(jnp.ones((512, 1024)), sharding)
    optim = AdEMAMix(1e-3, state_format=FORMATS[name])
    state = optim.init(x)
    for shape in collectives(jax.jit(optim.update).lower(x, state).compile()):
        dims = re.findall(r"\[([\d,]*)\]", shape)
        assert all(
            np.prod([int(d) for d in x.split(",") if d]) <= 512 * 32 for x in dims
        )
    _, state = jax.jit(optim.update)(x, state)
    assert isinstance(state.m2, Encoded)
    assert state.m2.real[0].sharding.is_equivalent_to(sharding, 2)
