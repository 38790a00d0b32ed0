"""With `Compensated`, 16-bit parameters change like float32 parameters."""

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
    CompensatedState,
    SimplifiedAdEMAMix,
)
from eqx_ademamix._numerics import path_words

from .helpers import (
    COMPACT,
    assert_trees_close,
    compiled_programs,
    count_traces,
    loss_of_arrays,
    make_mlp,
    make_zoo,
    tree_type,
)


pytestmark = pytest.mark.usefixtures("standard_promotion")


HALVES = ("bfloat16", "float16")
BITS = (16, 8)
INNER = {
    "AdEMAMix": AdEMAMix(1e-3, weight_decay=0.1),
    "compact": AdEMAMix(1e-3, state_format=COMPACT),
    "simplified": SimplifiedAdEMAMix(1e-3, normalize=True, weight_decay=0.1),
    "adamw": optax.adamw(1e-3),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1e-3)),
}


class Constant(eqx_ademamix.AbstractOptimizer[jax.Array]):
    """Takes given steps and stores the parameters that it received."""

    steps: Any

    def init(self, params: Any) -> Any:
        return params

    def update(
        self, grads: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> Any:
        return jax.tree.map(
            lambda p: jnp.broadcast_to(self.steps, p.shape), params
        ), params


def cast(tree: Any, dtype: Any) -> Any:
    arrays, rest = eqx.partition(tree, eqx.is_inexact_array)
    return eqx.combine(eqx_ademamix.tree_cast(arrays, dtype), rest)


def numbers(size: int, low: float = -3, high: float = 3, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=size) * 10.0 ** rng.uniform(low, high, size)


#
# One step
#


@pytest.mark.parametrize("jit", (False, True))
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", HALVES)
def test_nothing_is_lost_in_a_step(dtype: str, bits: int, jit: bool):
    """Together, parameter and remainder give the float32 parameter to 24 or 16 bits."""
    params = jnp.asarray(numbers(20_000, -1, 3), dtype)
    steps = jnp.asarray(numbers(20_000, -6, 0.2, seed=1), jnp.float32)
    steps = jnp.abs(params.astype(jnp.float32)) * steps
    optim = Compensated(Constant(steps), bits)
    state = optim.init(params)

    def step(params: Any, state: Any) -> Any:
        updates, state = optim.update(params, state, params)
        return updates, eqx.apply_updates(params, updates), state

    updates, after, state = (jax.jit(step) if jit else step)(params, state)
    assert updates.dtype == after.dtype == params.dtype
    # The state matches the parameters that 16-bit addition gives.
    assert np.array_equal(after, np.asarray(params) + np.asarray(updates))
    wanted = np.float64(params.astype(jnp.float32) + steps)
    master = np.float64(optim.master_params(after, state))
    error: Any = np.abs(master - wanted)
    nearest = np.asarray(jnp.asarray(wanted, jnp.float32).astype(dtype) == after)
    assert np.all(nearest[np.abs(steps) < 0.1 * np.abs(np.float32(params))])
    significant = (8 if dtype == "bfloat16" else 11) + bits
    bound = 2.0 ** (1 - min(significant, 24))
    relative = error[nearest] / np.abs(np.asarray(wanted)[nearest])
    # Near half a unit in the last place, the codes are four times as far apart.
    assert np.quantile(relative, 0.98 if bits == 16 else 0.85) <= bound
    assert np.max(relative) <= 4.1 * bound
    # After a large step, the parameter may not be the nearest 16-bit number. Then the
    # remainder keeps only a part of the difference.
    rest: Any = np.abs(wanted - np.float64(after))
    rest = rest[~nearest]
    assert 100 < len(rest) < 2000
    assert np.max(error[~nearest] / rest) <= (0.08 if bits == 16 else 3.0)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", HALVES)
def test_remainders_are_right_in_the_mean(dtype: str, bits: int):
    params = jnp.full((50_000,), 1.5, dtype)
    step = jnp.float32(1.7e-6)
    optim = Compensated(Constant(step), bits)
    state = optim.init(params)
    updates, state = optim.update(params, state, params)
    assert np.all(np.asarray(updates) == 0)
    moved = np.float64(optim.master_params(params, state)) - 1.5
    np.testing.assert_allclose(moved.mean(), step, rtol=0.05)


@pytest.mark.parametrize("bits", BITS)
def test_a_parameter_that_becomes_zero_keeps_its_remainder(bits: int):
    params = jnp.asarray([1.0, -1.0, 0.0], jnp.bfloat16)
    steps = jnp.asarray([-1.0 + 2.0**-11, 1.0, 2.0**-20], jnp.float32)
    optim = Compensated(Constant(steps), bits)
    updates, state = optim.update(params, optim.init(params), params)
    after = eqx.apply_updates(params, updates)
    master = np.asarray(optim.master_params(after, state))
    np.testing.assert_allclose(master, [2.0**-11, 0.0, 2.0**-20], rtol=1e-4)
    assert after[1] == 0


def test_small_float16_numbers():
    """Below 6e-5, float16 has fewer digits. Below 6e-8, it has none."""
    params = jnp.asarray(numbers(20_000, -8, -4), jnp.float16)
    steps = jnp.asarray(numbers(20_000, -9, -5, seed=1), jnp.float32)
    optim = Compensated(Constant(steps))
    step = eqx.filter_jit(optim.update)
    updates, state = step(params, optim.init(params), params)
    after = np.asarray(params) + np.asarray(updates)
    wanted = np.float64(params.astype(jnp.float32) + steps)
    master = np.float64(optim.master_params(jnp.asarray(after), state))
    is_zero = after == 0
    error: Any = np.abs(master - wanted)
    assert np.max(error[~is_zero]) <= 2.0**-24 * 2.0**-14
    assert np.max(error[is_zero] / np.abs(np.asarray(wanted)[is_zero])) <= 2.0**-7


def test_what_is_not_finite_stays_so():
    params = jnp.asarray([1.0, jnp.inf, jnp.nan, 60_000.0], jnp.float16)
    optim = Compensated(Constant(jnp.float32(30_000.0)))
    updates, state = optim.update(params, optim.init(params), params)
    after = eqx.apply_updates(params, updates)
    assert np.array_equal(np.isfinite(after), [True, False, False, False])
    master = optim.master_params(after, state)
    assert np.array_equal(np.isfinite(master), [True, False, False, False])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", HALVES)
def test_infinite_parameters_stay_as_they_are(dtype: str, bits: int):
    """Without `Compensated`, infinite entries of a mask array stay unchanged too."""
    params = jnp.asarray([0.0, -jnp.inf, jnp.inf, 1.0], dtype)
    optim = Compensated(AdEMAMix(1e-3), bits)
    state = optim.init(params)
    for grads in (jnp.zeros_like(params), jnp.ones_like(params)):
        updates, state = optim.update(grads, state, params)
        params = eqx.apply_updates(params, updates)
        assert np.array_equal(params[1:3], [-np.inf, np.inf])
        assert np.array_equal(optim.master_params(params, state)[1:3], params[1:3])
    assert np.all(np.isfinite(params[jnp.array([0, 3])]))


#
# A run
#


def run(optim: Any, params: Any, grads: Any, steps: int) -> tuple[Any, Any]:
    def body(carry: Any, _: None) -> Any:
        params, state = carry
        updates, state = optim.update(cast(grads, params.dtype), state, params)
        return (eqx.apply_updates(params, updates), state), None

    carry = params, optim.init(params)
    return jax.jit(lambda c: jax.lax.scan(body, c, None, length=steps)[0])(carry)


@pytest.mark.parametrize(
    "inner", (AdEMAMix(1e-5, alpha=0.0), optax.adam(1e-5)), ids=("ours", "optax")
)
@pytest.mark.parametrize("dtype", HALVES)
def test_ten_thousand_small_steps(inner: Any, dtype: str):
    """The relative size of a step is 1e-5. 16-bit parameters alone do not change at
    all."""
    rng = np.random.default_rng(0)
    signs = np.sign(rng.normal(size=200))
    start = jnp.asarray(rng.uniform(1, 2, size=200) * signs, dtype)
    grads = jnp.asarray(rng.normal(size=200), dtype).astype(jnp.float32)
    exact, _ = run(inner, start.astype(jnp.float32), grads, 10_000)
    optim = Compensated(inner, bits=16)
    params, state = run(optim, start, grads, 10_000)
    master = optim.master_params(params, state)
    assert np.min(np.abs(exact - start.astype(jnp.float32))) > 0.05
    np.testing.assert_allclose(master, exact, rtol=1e-4)
    np.testing.assert_allclose(np.float32(params), exact, rtol=2.0**-8)
    plain, _ = run(AdEMAMix(1e-5, alpha=0.0), start, grads, 10_000)
    assert np.array_equal(plain, start)
    optim = Compensated(inner, bits=8)
    params, state = run(optim, start, grads, 10_000)
    np.testing.assert_allclose(optim.master_params(params, state), exact, rtol=5e-3)


def test_with_sixteen_bits_it_is_float32():
    """Bit for bit, except for the few remainders that are close to half a unit."""
    start = jnp.asarray(numbers(4096, -1, 0), jnp.bfloat16)
    grads = jnp.asarray(numbers(4096, -1, 0, seed=1), jnp.bfloat16)
    inner = optax.sgd(1e-5)
    exact, _ = run(inner, start.astype(jnp.float32), grads.astype(jnp.float32), 10_000)
    params, state = run(Compensated(inner), start, grads, 10_000)
    master = np.asarray(Compensated(inner).master_params(params, state))
    error = np.abs(master - np.asarray(exact))
    scale = np.maximum(np.abs(exact), 0.1 * np.abs(np.float32(start)))
    assert np.max(error / scale) < 5e-5 and np.mean(error == 0) > 0.1


@pytest.mark.parametrize("inner", ("AdEMAMix", "chain"))
def test_several_steps_in_one_program(inner: str):
    """XLA can delay the rounding between two steps that it compiles together."""
    optim = Compensated(INNER[inner])
    start = jnp.zeros(65_536, jnp.bfloat16)

    def step(params: Any, state: Any, key: Any) -> Any:
        noise = 1e-2 * jax.random.normal(key, params.shape)
        grads = 2 * (params.astype(jnp.float32) - noise)
        updates, state = optim.update(grads, state, params)
        return eqx.apply_updates(params, updates), state

    # With a fourth step, jax 0.12 takes minutes to compile this on a CPU: the time that
    # LLVM's loop vectorizer takes (in `onlyFirstLaneUsed`) is exponential in the steps.
    length = 4 if jax.__version_info__ < (0, 11) else 3

    def several(params: Any, state: Any, key: Any) -> Any:
        for i in range(length):
            params, state = step(params, state, jax.random.fold_in(key, i))
        return params, state

    params, state = start, optim.init(start)
    jitted = jax.jit(several)
    for t in range(20):
        params, state = jitted(params, state, jax.random.key(t))
    one, one_state = start, optim.init(start)
    single = jax.jit(step)
    for t in range(20):
        for i in range(length):
            key = jax.random.fold_in(jax.random.key(t), i)
            one, one_state = single(one, one_state, key)
    master = optim.master_params(params, state)
    assert np.max(np.abs(master)) < 0.2
    wanted = optim.master_params(one, one_state)
    assert np.mean(np.abs(master - wanted) <= 1e-4) > 0.999
    assert np.max(np.abs(master - wanted)) < 1e-2


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", INNER)
def test_a_model_learns_and_types_stay(name: str, bits: int):
    model = cast(make_mlp(), jnp.bfloat16)
    optim = Compensated(INNER[name], bits)
    x = jax.random.normal(jax.random.key(1), (16, 3), jnp.bfloat16)

    def loss(model: Any) -> Any:
        return jnp.mean((jax.vmap(model)(x) - x[:, :2]) ** 2).astype(jnp.float32)

    def one(model: Any, state: Any) -> Any:
        value, grads = eqx.filter_value_and_grad(loss)(model)
        updates, state = eqx_ademamix.update(optim, grads, state, model)
        return eqx.apply_updates(model, updates), state, value

    counted, traces = count_traces(one)
    step = eqx.filter_jit(counted, donate="all")
    state = eqx_ademamix.init(optim, model)
    kinds, losses = (tree_type(model), tree_type(state)), []
    for _ in range(60):
        model, state, value = step(model, state)
        losses.append(float(value))
    assert (tree_type(model), tree_type(state)) == kinds and len(traces) == 1
    assert losses[-1] < losses[0]
    assert state.count == 60


def test_mixed_models_and_frozen_leaves(getkey: Any):
    model = make_zoo(getkey())
    mlp = cast(model.mlp, jnp.bfloat16)
    model = eqx.tree_at(lambda m: m.mlp, model, mlp)
    model = eqx.tree_at(lambda m: m.scale, model, model.scale.astype(jnp.float16))
    trainable = jax.tree.map(lambda _: True, model)
    trainable = eqx.tree_at(lambda t: t.mlp.layers[0].weight, trainable, False)
    inner = AdEMAMix(1e-3, trainable=trainable)
    optim = Compensated(inner)
    state = eqx_ademamix.init(optim, model)
    assert isinstance(state, CompensatedState)
    remainder = state.remainder
    assert remainder.mlp.layers[1].weight.dtype == jnp.int16
    assert remainder.scale.shape == model.scale.shape
    assert remainder.mlp.layers[0].weight is None and remainder.norm.weight is None
    grads = eqx.filter_grad(loss_of_arrays)(model)
    updates, state = eqx_ademamix.update(optim, grads, state, model)
    assert updates.mlp.layers[0].weight is None
    after = eqx.apply_updates(model, updates)
    assert tree_type(after) == tree_type(model)
    master = optim.master_params(after, state)
    assert master.mlp.layers[1].weight.dtype == master.scale.dtype == jnp.float32
    assert master.mlp.layers[0].weight.dtype == jnp.bfloat16
    assert master.name == "zoo" and master.steps is after.steps
    # A parameter without a remainder gets the wrapped optimizer's update unchanged.
    wide = cast(model, jnp.float32)
    plain, _ = eqx_ademamix.update(inner, grads, eqx_ademamix.init(inner, wide), wide)
    assert_trees_close(updates.norm, plain.norm, 1e-6)


def test_scan_vmap_and_sharding():
    optim = Compensated(AdEMAMix(1e-4))
    params = jnp.asarray(numbers(64 * 16, -1, 0).reshape(64, 16), jnp.bfloat16)
    grads = jnp.sin(params)
    single = run(optim, params, grads, 5)
    many = eqx.filter_vmap(lambda p: run(optim, p, grads, 5))(jnp.stack([params] * 2))
    first = jax.tree.map(lambda x: x[0], many)
    assert tree_type(first) == tree_type(single)
    assert np.array_equal(first[0], single[0])
    mesh = Mesh(np.array(jax.devices()), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    sharded = jax.device_put(params, sharding)
    assert optim.init(sharded).remainder.sharding == sharding
    after, state = run(optim, sharded, jax.device_put(grads, sharding), 5)
    assert np.array_equal(after, single[0])
    assert state.remainder.sharding.is_equivalent_to(sharding, 2)


def test_one_program_for_each_type_of_leaf(caplog: pytest.LogCaptureFixture):
    """Also outside of `jit`, where JAX otherwise compiles each operation."""
    optim = Compensated(AdEMAMix(1e-4))

    def step(shape: tuple[int, ...]) -> None:
        params = {name: jnp.ones(shape, jnp.bfloat16) for name in "abc"}
        state = optim.init(params)
        with jax.log_compiles():
            _, state = optim.update(params, state, params)
            optim.master_params(params, state)

    step((21,))  # also compiles what does not depend on the leaves
    caplog.clear()
    step((22,))
    expected = ["_master_leaf", "_leaf_step", "_split_leaf"]
    assert compiled_programs(caplog) == expected


def test_bytes_of_the_remainders():
    params = cast(make_mlp(), jnp.bfloat16)
    size = sum(x.size for x in jtu.tree_leaves(eqx.filter(params, eqx.is_array)))
    for bits in BITS:
        state = eqx_ademamix.init(Compensated(AdEMAMix(1e-3), bits), params)
        assert eqx_ademamix.state_bytes(state.remainder) == size * bits // 8


def test_conversions_find_the_state_inside():
    params = {"w": jnp.ones((4, 3), jnp.bfloat16)}
    inner_optim = AdEMAMix(1e-3)
    optim = Compensated(inner_optim)
    state: Any = optim.init(params)
    _, state = optim.update(params, state, params)
    assert eqx_ademamix.to_optax(state).count == 1
    assert eqx.tree_equal(eqx_ademamix.decoded(state), state)
    assert eqx_ademamix.hyperparams(inner_optim, state.inner_state).alpha == 5.0
    adam = optax.adamw(1e-3)
    _, opt_state = adam.update(params, adam.init(params), params)
    inner = eqx_ademamix.from_adamw(opt_state, inner_optim, params)
    taken = eqx.tree_at(lambda s: s.inner_state, optim.init(params), inner)
    _, after = optim.update(params, taken, params)
    assert after.inner_state.count == 2


def test_trees_without_leaves():
    optim = Compensated(AdEMAMix(1e-3))
    state = optim.init({})
    updates, state = optim.update({}, state, {})
    assert updates == {} and state.count == 1


def test_counter_saturates():
    optim = Compensated(AdEMAMix(1e-3))
    params = jnp.ones(3, jnp.bfloat16)
    state = optim.init(params)
    last = jnp.asarray(2**31 - 1, jnp.int32)
    state = eqx.tree_at(lambda s: s.count, state, last)
    assert optim.update(params, state, params)[1].count == last


def test_the_typed_core():
    from eqx_ademamix._wrappers import compensated as core

    split = getattr(core, "_split")  # noqa: B009
    good, wide = [jnp.ones(3, jnp.bfloat16)], [jnp.ones(3)]
    keys, count = [path_words("")], jnp.zeros((), jnp.int32)
    split(wide, wide, good, [jnp.ones(3, jnp.int16)], keys, count)
    with pytest.raises(TypeError):
        split(wide, wide, good, [jnp.ones(2, jnp.int16)], keys, count)


#
# Parameters that are not those that the last update led to
#


def checked_steps(change: Any, *, check: bool = True, jit: bool = True) -> Any:
    """Two steps, with the updates changed in between."""
    optim = Compensated(AdEMAMix(1e-2), check_params=check)
    params: Any = {"w": jnp.linspace(0.1, 1.0, 300).astype(jnp.bfloat16)}
    step = eqx.filter_jit(eqx_ademamix.update) if jit else eqx_ademamix.update
    state, grads = optim.init(params), {"w": jnp.ones(300, jnp.bfloat16)}
    for _ in range(2):
        before = tree_type(state)
        updates, state = step(optim, grads, state, params)
        assert tree_type(state) == before
        params = eqx.apply_updates(params, jax.tree.map(change, updates))
    return jax.block_until_ready((params, state))


@pytest.mark.parametrize("jit", (True, False), ids=("jit", "eager"))
def test_changed_updates_are_detected(jit: bool):
    halved = lambda u: u * jnp.asarray(0.5, u.dtype)
    one_entry = lambda u: u.at[7].set(0)
    # With the oldest JAX, Equinox fails to read its own message from the error.
    text = "are not those that its last update led|not enough values to unpack"
    for change in (halved, one_entry):
        with pytest.raises(Exception, match=text):
            checked_steps(change, jit=jit)
        checked_steps(change, check=False)
    same = checked_steps(lambda u: u, jit=jit)
    plain = checked_steps(lambda u: u, jit=jit, check=False)
    assert eqx.tree_equal(same[0], plain[0])
    assert plain[1].fingerprint is None and same[1].fingerprint != 0


def test_the_check_inside_multi_steps_and_from_descriptions():
    compensated: Any = Compensated(AdEMAMix(1e-2), check_params=True)
    optim = optax.MultiSteps(compensated, every_k_schedule=2)
    params = jnp.linspace(0.1, 1.0, 30).astype(jnp.bfloat16)
    state = optim.init(params)
    for _ in range(5):
        updates, state = optim.update(params, state, params)
        params = eqx.apply_updates(params, updates)
    described = jax.ShapeDtypeStruct((30,), jnp.bfloat16)
    assert Compensated(AdEMAMix(1e-2), check_params=True).init(described) is not None
