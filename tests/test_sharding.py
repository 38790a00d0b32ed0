"""States on many devices: `init` keeps the shardings of the parameters, and the step is
local. These tests read shardings and the collectives of compiled programs."""

import contextlib
import functools as ft
import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import eqx_ademamix
from eqx_ademamix import (
    AdEMAMix,
    Compensated,
    Encoded,
    SimplifiedAdEMAMix,
    SplitBfloat16,
)

from .helpers import COMPACT, assert_trees_close, everywhere


if hasattr(jax, "shard_map"):
    shard_map: Any = jax.shard_map
else:  # before JAX 0.6
    from jax.experimental.shard_map import shard_map

FORMATS = {
    "float32": eqx_ademamix.StateFormat.float32(),
    "half": everywhere(eqx_ademamix.StateFormat.half()),
    "compact": COMPACT,
    # A codec with codes and other arrays of integers.
    "split": everywhere(
        eqx_ademamix.StateFormat(SplitBfloat16(), SplitBfloat16(), jnp.float32)
    ),
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


# Mesh axes are automatic or, where JAX has them, explicit.
AXIS_TYPES: dict[str, Any] = {"Auto": None}
if hasattr(jax.sharding, "AxisType"):
    AXIS_TYPES["Explicit"] = jax.sharding.AxisType.Explicit
axis_types = pytest.mark.parametrize("axis_type", AXIS_TYPES)


def sharding_of(layout: str, axis_type: str = "Auto") -> NamedSharding:
    shape, names, spec = LAYOUTS[layout]
    devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
    kind = AXIS_TYPES[axis_type]
    types: Any = {} if kind is None else {"axis_types": (kind,) * len(names)}
    return NamedSharding(Mesh(devices, tuple(names), **types), spec)


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
    return [x for x in found if re.search(r"\[\d", x)]


@formats
@layouts
@axis_types
@pytest.mark.parametrize("how", ("eager", "jit", "filter_jit"))
def test_init_keeps_shardings(how: str, axis_type: str, layout: str, name: str):
    sharding = sharding_of(layout, axis_type)
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
@axis_types
def test_the_step_is_local(axis_type: str, layout: str, name: str):
    """No moment, code, scale, gradient or parameter moves between devices, shardings
    stay, and the second step compiles nothing."""
    sharding = sharding_of(layout, axis_type)
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


@axis_types
def test_a_check_of_parameters_gathers_nothing(axis_type: str):
    sharding = sharding_of("rows", axis_type)
    optim = Compensated(AdEMAMix(1e-3), check_params=True)
    params = params_on(sharding, jnp.bfloat16)
    state = optim.init(params)
    program = jax.jit(optim.update).lower(params, state, params).compile()
    assert collectives(program) == []


@axis_types
@pytest.mark.parametrize(
    "optim",
    (
        AdEMAMix(1e-3, skip_nonfinite=True, clip_update_rms=1.0),
        AdEMAMix(1e-3, state_format=COMPACT),
        SimplifiedAdEMAMix(1e-3),
        Compensated(AdEMAMix(1e-3)),
    ),
    ids=("float32", "compact", "Simplified", "Compensated"),
)
def test_an_ensemble_that_is_split(optim: Any, axis_type: str):
    """One or more members on each device."""
    dtype = jnp.bfloat16 if isinstance(optim, Compensated) else jnp.float32
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 512)), dtype)
    mesh = sharding_of("rows", axis_type).mesh
    split = NamedSharding(mesh, P("a"))
    state = jax.vmap(optim.init)(x)
    step = jax.jit(jax.vmap(optim.update))
    expected = step(x, state, x)
    with getattr(jax, "set_mesh", contextlib.nullcontext)(mesh):
        args = jax.device_put((x, state, x), split)
        found = step(*args)
        for y in jtu.tree_leaves(found):
            assert y.sharding.is_equivalent_to(split, y.ndim), y.shape
        assert collectives(step.lower(*args).compile()) == []
    for y, z in zip(*map(jtu.tree_leaves, (found, expected)), strict=True):
        assert y.dtype == z.dtype
        if y.dtype == jnp.float32:
            np.testing.assert_allclose(y, z, rtol=1e-5, atol=1e-7)


@axis_types
@pytest.mark.parametrize("name", ("half", "compact"))
@pytest.mark.parametrize("shape", ((4096, 40), (64, 64, 3, 3), (65_536,), (4096, 1)))
def test_the_step_is_local_if_blocks_span_axes(
    shape: tuple[int, ...], name: str, axis_type: str
):
    """Blocks along several short axes, of which the first is split."""
    sharding = NamedSharding(sharding_of("rows", axis_type).mesh, P("a"))
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


TRANSFORMATIONS: dict[str, Any] = {
    "ademamix": eqx_ademamix.ademamix(1e-3),
    "simplified_ademamix": eqx_ademamix.simplified_ademamix(1e-3),
    "chain": optax.chain(
        optax.clip_by_global_norm(1.0),
        AdEMAMix(1e-3, state_format=COMPACT),  # pyright: ignore[reportArgumentType]
    ),
}


@axis_types
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_the_optax_surface(name: str, axis_type: str, standard_promotion: None):
    sharding, tx = sharding_of("both", axis_type), TRANSFORMATIONS[name]
    params = params_on(sharding)
    state: Any = jax.jit(tx.init)(params)
    assert_beside(state, sharding)
    updates, state = jax.jit(tx.update)(params, state, params)
    assert_beside((updates, state), sharding)


def from_torch(optim: Any, params: Any) -> Any:
    moments = {k: np.ones(SHAPE, np.float32) for k in TORCH_NAMES}
    names = {"['w']": 0}
    group = {"params": [0], "betas": (0.9, 0.999, 0.9999), "alpha": 2.0}
    saved = {"state": {0: {"step": 3, **moments}}, "param_groups": [group]}
    return eqx_ademamix.from_torch(saved, optim, params, names)


TORCH_NAMES = ("exp_avg", "exp_avg_slow", "exp_avg_sq")


def after_a_step(tx: Any, params: Any) -> Any:
    """The state of an optax optimizer, whose `init` puts counters on one device."""
    return tx.update(params, tx.init(params), params)[1]


CONVERSIONS = {
    "change_state_format": lambda optim, params: eqx_ademamix.change_state_format(
        AdEMAMix(1e-3).init(params), optim, params
    ),
    "decoded": lambda optim, params: eqx_ademamix.decoded(optim.init(params)),
    "from_adamw": lambda optim, params: eqx_ademamix.from_adamw(
        after_a_step(optax.adamw(1e-3), params), optim, params
    ),
    "from_adamw, replicated": lambda optim, params: eqx_ademamix.from_adamw(
        optax.adamw(1e-3).init(jax.tree.map(jnp.asarray, jax.device_get(params))),
        optim,
        params,
    ),
    "from_optax": lambda optim, params: eqx_ademamix.from_optax(
        after_a_step(optax.contrib.ademamix(1e-3), params), optim, params
    ),
    "from_torch": from_torch,
}


@axis_types
@pytest.mark.parametrize("name", ("float32", "compact"))
@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_conversions(
    conversion: str, name: str, axis_type: str, standard_promotion: None
):
    """The new state is sharded as one of `init`, so the step compiles once."""
    sharding = sharding_of("both", axis_type)
    optim, params = AdEMAMix(1e-3, state_format=FORMATS[name]), params_on(sharding)
    assert_beside(CONVERSIONS[conversion](optim, params), sharding)


@formats
def test_inside_shard_map(name: str):
    """`init` and `update` may run on shards. Dense moments are bit for bit those of the
    whole arrays. What is rounded at random is rounded by its place in the shard."""
    sharding = sharding_of("rows")
    params, optim = params_on(sharding), AdEMAMix(1e-3, state_format=FORMATS[name])
    specs = jax.tree.map(
        lambda x: P() if x.ndim == 0 else P("a"), jax.eval_shape(optim.init, params)
    )
    on_shards: Any = ft.partial(shard_map, mesh=sharding.mesh)
    init = on_shards(optim.init, in_specs=(P("a"),), out_specs=specs)
    in_specs = (P("a"), specs, P("a"))
    update = on_shards(optim.update, in_specs=in_specs, out_specs=(P("a"), specs))
    state = jax.jit(init)(params)
    assert_beside(state, sharding)
    updates, state = jax.jit(update)(params, state, params)
    whole, expected = jax.jit(optim.update)(params, optim.init(params), params)
    assert_beside((updates, state), sharding)
    if name == "float32":
        assert eqx.tree_equal((updates, state), (whole, expected))
    else:
        assert_trees_close(updates, whole, 0.5)
        codes = [s.m1["w"].real[0] for s in (state, expected)]
        assert not eqx.tree_equal(*codes)
