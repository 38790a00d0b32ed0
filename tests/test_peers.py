"""What optax's own tests check about `optax.contrib.ademamix`, checked about ours.

The facts are those of optax's tests of contributed optimizers, of sharding, of injected
hyperparameters, of accumulation, of float64, and of the functions on states. Each is
tested with optax's AdEMAMix too. Only `test_without_parameters` is not true of it.

Three facts about optax's AdEMAMix are not true of ours, on purpose:

- `optax.tree.get` and `optax.tree.set` do not find the fields of our states, which are
  modules (see `test_reading_and_setting_inside_a_state`).
- The state of 16-bit parameters is float32, unless `mu_dtype` or `state_format` says
  otherwise.
- `mu_dtype` cannot be complex, and the moments of complex parameters stay complex.
"""
# optax uses one type for all states and all updates.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportIndexIssue=false

import contextlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from eqx_ademamix import (
    AdEMAMix,
    SimplifiedAdEMAMix,
    ademamix,
    simplified_ademamix,
)

from .helpers import assert_trees_close, buffers, count_traces, tree_type, x64


pytestmark = pytest.mark.usefixtures("standard_promotion")


class Peer(NamedTuple):
    """A constructor of optimizers, and a learning rate that suits it."""

    name: str
    make: Callable[..., Any]
    rate: float


OURS = (
    Peer("ademamix", ademamix, 1e-2),
    Peer("AdEMAMix", AdEMAMix, 1e-2),
    Peer("simplified_ademamix", simplified_ademamix, 1e-3),
    Peer("SimplifiedAdEMAMix", SimplifiedAdEMAMix, 1e-3),
)
CONTROL = Peer("optax.contrib.ademamix", optax.contrib.ademamix, 1e-2)
PEERS = (CONTROL, *OURS)


def each(peers: tuple[Peer, ...]) -> Any:
    return pytest.mark.parametrize("peer", peers, ids=lambda peer: peer.name)


#
# Problems
#


class Problem(NamedTuple):
    """A loss, where to start, and where its minimum is."""

    loss: Callable[[Any], jax.Array]
    start: Any
    end: Any


def squared_distance(x: Any, y: Any) -> jax.Array:
    return sum(
        (
            jnp.sum(jnp.abs(a - b) ** 2)
            for a, b in zip(jtu.tree_leaves(x), jtu.tree_leaves(y), strict=True)
        ),
        start=jnp.zeros(()),
    )


def bowl(end: Any) -> Problem:
    """The squared distance to `end`, from a start one unit away in every entry."""
    start = jax.tree.map(lambda x: x + jnp.ones_like(x), end)
    return Problem(lambda x: squared_distance(x, end), start, end)


def valley(end: Any) -> Problem:
    """Rosenbrock's function: the minimum is at the end of a curved, narrow valley."""
    loss = lambda x: (
        jnp.abs(end[0] - x[0]) ** 2 + 100.0 * jnp.abs(x[1] - x[0] ** 2) ** 2
    )
    return Problem(loss, jnp.zeros_like(end), end)


def vector() -> Problem:
    return bowl(jnp.asarray([2.0, -1.0, 0.5]))


def matrix() -> Problem:
    return bowl(jnp.asarray([[3.0, -2.0], [1.0, 4.0]]))


def tree() -> Problem:
    return bowl({"w": jnp.asarray([[1.0, 0.0], [-1.0, 2.0]]), "b": [jnp.ones(3)]})


def scalar() -> Problem:
    return bowl(jnp.asarray(1.5, jnp.float32))


def curved() -> Problem:
    return valley(jnp.asarray([1.0, 1.0]))


def complex_vector() -> Problem:
    return bowl(jnp.asarray([2.0 + 1.0j, -1.0j, 0.5]))


def complex_curved() -> Problem:
    return valley(jnp.asarray([1.0 + 1.0j, 2.0j]))


PROBLEMS = (vector, matrix, tree, scalar, curved, complex_vector, complex_curved)


def gradient(loss: Callable[[Any], jax.Array], params: Any) -> Any:
    """The direction of steepest ascent. JAX returns its conjugate."""
    return jax.tree.map(jnp.conj, jax.grad(loss)(params))


def trees(dtype: Any = jnp.float32) -> tuple[Any, Any]:
    """Parameters and gradients."""
    params = {"w": jnp.full((2, 3), -1.0, dtype), "b": [jnp.ones((2, 5, 2), dtype)]}
    return params, jax.tree.map(lambda x: (0.1 * x).astype(dtype), params)


def ours_or_theirs(state: Any) -> Any:
    """The state with the moments, without the states of a chain around it."""
    while type(state) is tuple:
        state = state[0]
    return state


def moments(state: Any) -> list[Any]:
    """The trees shaped like the parameters."""
    state = ours_or_theirs(state)
    names = [name for name in ("m", "m1", "m2", "nu") if hasattr(state, name)]
    return [getattr(state, name) for name in names]


def non_params(state: Any) -> list[Any]:
    state = ours_or_theirs(state)
    names = [name for name in ("count", "count_m2", "num") if hasattr(state, name)]
    return [getattr(state, name) for name in names]


#
# Contributed optimizers
#


@each(PEERS)
@pytest.mark.parametrize("make_problem", PROBLEMS, ids=lambda f: f.__name__)
def test_finds_the_minimum(peer: Peer, make_problem: Any):
    problem, optim = make_problem(), peer.make(peer.rate)

    def step(carry: Any, _: None) -> Any:
        params, state = carry
        g = gradient(problem.loss, params)
        updates, state = optim.update(g, state, params)
        return (optax.apply_updates(params, updates), state), None

    start = problem.start, optim.init(problem.start)
    (params, state), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=20_000))(start)
    assert tree_type((params, state)) == tree_type(start)
    assert squared_distance(params, problem.end) < 1e-3


@each(PEERS)
def test_ignores_extra_arguments(peer: Peer):
    optim, (params, grads) = peer.make(peer.rate), trees()
    state = optim.init(params)
    with_extra = optim.update(grads, state, params, value=1.0, unknown=jnp.ones(2))
    assert_trees_close(with_extra, optim.update(grads, state, params), 0.0)


@each(PEERS)
def test_extra_arguments_trace_once(peer: Peer):
    optim, (params, grads) = peer.make(peer.rate), trees()
    counted, traces = count_traces(
        lambda state, value: optim.update(grads, state, params, value=value)
    )
    step, state = jax.jit(counted), optim.init(params)
    for i in range(3):
        _, state = step(state, jnp.asarray(float(i)))
    assert len(traces) == 1


@each(PEERS)
def test_update_traces_once(peer: Peer):
    optim, (params, grads) = peer.make(peer.rate), trees()
    counted, traces = count_traces(optim.update)
    step, state = jax.jit(counted), optim.init(params)
    for _ in range(3):
        _, state = step(grads, state, params)
    assert len(traces) == 1


@each(PEERS)
def test_a_constant_schedule_is_a_number(peer: Peer):
    problem = vector()
    ends = []
    for rate in (peer.rate, optax.constant_schedule(peer.rate)):
        optim = peer.make(learning_rate=rate)
        params, state = problem.start, optim.init(problem.start)
        for _ in range(10):
            g = gradient(problem.loss, params)
            updates, state = optim.update(g, state, params)
            params = optax.apply_updates(params, updates)
        ends.append(params)
    assert_trees_close(*ends, tolerance=1e-6)


@each(PEERS)
def test_a_schedule_sees_the_steps_taken(peer: Peer):
    optim = peer.make(learning_rate=lambda step: jnp.where(step == 0, 0.0, peer.rate))
    params, grads = trees()
    updates, state = optim.update(grads, optim.init(params), params)
    assert all(jnp.all(x == 0) for x in jtu.tree_leaves(updates))
    updates, _ = optim.update(grads, state, params)
    assert all(jnp.all(x != 0) for x in jtu.tree_leaves(updates))


@each(PEERS)
def test_annotation_of_the_learning_rate(peer: Peer):
    """optax tests schedules only where it reads that they are accepted."""
    parameters = inspect.signature(peer.make).parameters
    assert parameters["learning_rate"].annotation == optax.ScalarOrSchedule


@each(PEERS)
@pytest.mark.parametrize("dtype", ("float16", "bfloat16", "float32", "complex64"))
def test_updates_have_the_dtype_of_the_parameters(peer: Peer, dtype: str):
    optim, (params, grads) = peer.make(peer.rate), trees(jnp.dtype(dtype))
    state = jax.jit(optim.init)(params)
    updates, _ = jax.jit(optim.update)(grads, state, params)
    assert tree_type(updates) == tree_type(params)


def assert_same_types(optim: Any, params: Any, grads: Any) -> None:
    """Takes two steps, each in one branch of a conditional: both branches must have
    equal types."""

    @jax.jit
    def step(state: Any, is_on: jax.Array) -> Any:
        update = lambda: optim.update(grads, state, params)
        return jax.lax.cond(is_on, update, lambda: (params, state))

    state = optim.init(params)
    for _ in range(2):
        updates, after = step(state, jnp.asarray(True))
        assert tree_type((updates, after)) == tree_type((params, state))
        state = after
    assert tree_type(jax.jit(optim.init)(params)) == tree_type(optim.init(params))


@each(PEERS)
@pytest.mark.parametrize(
    "dtype", ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")
)
def test_types_are_the_same_after_a_step(peer: Peer, dtype: str):
    with x64() if dtype in ("float64", "complex128") else contextlib.nullcontext():
        assert_same_types(peer.make(peer.rate), *trees(jnp.dtype(dtype)))


@each(PEERS)
@pytest.mark.parametrize("weight_decay", (0.0, 0.1))
def test_float32_beside_float64(peer: Peer, weight_decay: float):
    with x64():
        params = (jnp.ones(2, jnp.float32), jnp.ones(2, jnp.float64))
        optim = peer.make(peer.rate, weight_decay=weight_decay)
        assert_same_types(optim, params, params)


@each(PEERS)
@pytest.mark.parametrize("shape", ((), (0,), (2, 0), (1, 1, 1)))
def test_unusual_shapes(peer: Peer, shape: tuple[int, ...]):
    assert_same_types(peer.make(peer.rate), jnp.ones(shape), jnp.ones(shape))


@each(PEERS)
def test_no_parameters(peer: Peer):
    optim = peer.make(peer.rate)
    updates, state = optim.update({}, optim.init({}), {})
    assert updates == {} and tree_type(state) == tree_type(optim.init({}))


@each(OURS)
def test_without_parameters(peer: Peer):
    """optax's AdEMAMix always needs `params`, which it ignores without weight decay."""
    optim, (params, grads) = peer.make(peer.rate), trees()
    state = optim.init(params)
    without, _ = optim.update(grads, state)
    assert_trees_close(without, optim.update(grads, state, params)[0], 0.0)


#
# Inside transformations of JAX
#


@each(PEERS)
def test_jit_changes_nothing(peer: Peer):
    optim, (params, grads) = peer.make(peer.rate, weight_decay=0.1), trees()
    state = optim.init(params)
    compiled = jax.jit(optim.update)(grads, state, params)
    assert_trees_close(compiled, optim.update(grads, state, params), 1e-6)


@each(PEERS)
def test_vmap_is_a_loop(peer: Peer):
    optim, (params, grads) = peer.make(peer.rate, weight_decay=0.1), trees()
    stack = lambda x: jnp.stack([x, 2.0 * x, -x])
    batch = jax.tree.map(stack, (params, grads))

    def run(params: Any, grads: Any) -> Any:
        updates, state = optim.update(grads, optim.init(params), params)
        return optim.update(updates, state, params)

    outputs = [run(*jax.tree.map(lambda x, i=i: x[i], batch)) for i in range(3)]
    expected = jax.tree.map(lambda *xs: jnp.stack(xs), *outputs)
    assert_trees_close(jax.vmap(run)(*batch), expected, 1e-6)


@each(PEERS)
def test_donated_buffers(peer: Peer):
    optim, (params, grads) = peer.make(peer.rate), trees()
    state = optim.init(params)
    assert len(set(buffers(state))) == len(jtu.tree_leaves(state))
    expected = optim.update(grads, optim.init(params), params)
    donated = jax.jit(optim.update, donate_argnums=(1,))(grads, state, params)
    assert_trees_close(donated, expected, 1e-6)
    assert all(x.is_deleted() for x in jtu.tree_leaves(state))


@each(PEERS)
def test_shapes_instead_of_arrays(peer: Peer):
    """`init` accepts descriptions of arrays, and can be evaluated as a description."""
    optim, (params, grads) = peer.make(peer.rate), trees()
    structs = jax.eval_shape(lambda: params)
    state = optim.init(params)
    assert tree_type(optim.init(structs)) == tree_type(state)
    _, described = jax.eval_shape(
        optim.update, grads, jax.eval_shape(optim.init, params), structs
    )
    shape_and_dtype = lambda x: (x.shape, x.dtype)
    assert jax.tree.map(shape_and_dtype, described) == (
        jax.tree.map(shape_and_dtype, state)
    )


#
# Shardings
#


# Newer versions of JAX have meshes whose shardings are a part of the types of arrays.
HAS_EXPLICIT = hasattr(jax, "set_mesh")


@contextlib.contextmanager
def mesh_of(kind: str) -> Any:
    if kind == "explicit":
        axis_types = (jax.sharding.AxisType.Explicit,)
        mesh = jax.make_mesh((8,), ("x",), axis_types=axis_types)
        with jax.set_mesh(mesh):
            yield mesh
    else:
        yield Mesh(np.asarray(jax.devices()), ("x",))


@each(PEERS)
@pytest.mark.parametrize("kind", ("auto", *(["explicit"] if HAS_EXPLICIT else [])))
@pytest.mark.parametrize("weight_decay", (0.0, 0.1))
def test_shardings(peer: Peer, kind: str, weight_decay: float):
    """`init` and `update` return equal types, compiled or not, and the moments are
    sharded as the parameters. An explicit sharding is a part of the type."""
    typeof = jax.typeof if kind == "explicit" else lambda x: tree_type(x)[1]
    types = lambda tree: jax.tree.map(typeof, tree)
    optim = peer.make(peer.rate, weight_decay=weight_decay)
    with mesh_of(kind) as mesh:
        sharding = NamedSharding(mesh, PartitionSpec(None, "x"))
        params = jax.device_put(jnp.zeros((2, 8, 4), jnp.float16), sharding)
        init, update = jax.jit(optim.init), jax.jit(optim.update)
        state = optim.init(params)
        after = optim.update(params, state, params)
        compiled = update(params, state, params)
        assert types(after) == types(compiled) == types((params, state))
        assert types(init(params)) == types(state)
    for x in jtu.tree_leaves((moments(state), after[0], moments(compiled[1]))):
        assert x.sharding.is_equivalent_to(sharding, x.ndim)


#
# Wrappers of optax
#


@each(PEERS)
def test_injected_is_the_same(peer: Peer):
    params, grads = trees()
    plain, injected = (
        make(learning_rate=peer.rate)
        for make in (peer.make, optax.inject_hyperparams(peer.make))
    )
    state, wrapped = jax.jit(plain.init)(params), jax.jit(injected.init)(params)
    step, wrapped_step = jax.jit(plain.update), jax.jit(injected.update)
    for _ in range(3):
        expected, state = step(grads, state, params)
        updates, wrapped = wrapped_step(grads, wrapped, params)
        assert_trees_close(updates, expected, 1e-5)
    # The wrapper turns b3 = 0.9999 into a float32, and 1 - b3 is then 1.7e-4 too large.
    assert_trees_close(wrapped.inner_state, state, 2e-4)


@each(PEERS)
def test_injected_zero_decay(peer: Peer):
    """An array that holds 0 stores a moment, which then equals the gradient."""
    params, grads = trees()
    injected = optax.inject_hyperparams(peer.make)(learning_rate=peer.rate, b1=0.0)
    plain = peer.make(learning_rate=peer.rate, b1=0.0)
    state, wrapped = plain.init(params), injected.init(params)
    for _ in range(3):
        expected, state = plain.update(grads, state, params)
        updates, wrapped = injected.update(grads, wrapped, params)
        assert_trees_close(updates, expected, 1e-5)
    assert_trees_close(moments(wrapped.inner_state)[0], grads, 1e-6)


@each(PEERS)
def test_injected_schedule(peer: Peer):
    params, grads = trees()
    schedule = optax.linear_schedule(peer.rate, 0.0, 10)
    optim = optax.inject_hyperparams(peer.make)(learning_rate=schedule)
    state, update = optim.init(params), jax.jit(optim.update)
    for step in range(3):
        _, state = update(grads, state, params)
        found = state.hyperparams["learning_rate"]
        np.testing.assert_allclose(found, schedule(step), rtol=1e-6)


@each(PEERS)
def test_reading_and_setting_injected_hyperparameters(peer: Peer):
    params, grads = trees()
    optim = optax.inject_hyperparams(peer.make)(learning_rate=peer.rate)
    with_rate = jax.jit(lambda state, rate: optax.tree.set(state, learning_rate=rate))
    state = optim.init(params)
    for rate in (peer.rate, 0.0):
        state = with_rate(state, jnp.asarray(rate))
        updates, state = optim.update(grads, state, params)
        found = optax.tree.get(state, "learning_rate")
        np.testing.assert_allclose(found, rate, rtol=1e-6)
    assert all(jnp.all(x == 0) for x in jtu.tree_leaves(updates))
    with pytest.raises(KeyError, match="Found no values matching 'ema'"):
        optax.tree.set(state, ema=1.0)


@each(PEERS)
@pytest.mark.parametrize("dtype", ("bfloat16", "float32"))
def test_accumulation(peer: Peer, dtype: str):
    """Nothing changes before the fourth step, which is a step on the mean."""
    params, grads = trees(jnp.dtype(dtype))
    steps, optim = optax.MultiSteps(peer.make(peer.rate), 4), peer.make(peer.rate)
    state, step = jax.jit(steps.init)(params), jax.jit(steps.update)
    for _ in range(3):
        updates, state = step(grads, state, params)
        assert not steps.has_updated(state)
        assert_trees_close(updates, jax.tree.map(jnp.zeros_like, params), 0.0)
    updates, state = step(grads, state, params)
    expected, _ = optim.update(grads, optim.init(params), params)
    assert steps.has_updated(state)
    assert_trees_close(updates, expected, 1e-2 if dtype == "bfloat16" else 1e-5)


@each(PEERS)
@pytest.mark.parametrize(
    "dtypes", (("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "float16"))
)
def test_accumulation_of_other_dtypes(peer: Peer, dtypes: tuple[str, str]):
    """Accumulated or not, updates have equal dtypes, and fit into the parameters."""
    params, grads = (trees(jnp.dtype(d))[i] for i, d in enumerate(dtypes))
    steps, optim = optax.MultiSteps(peer.make(peer.rate), 2), peer.make(peer.rate)
    _, state = steps.update(grads, steps.init(params), params)
    updates, _ = steps.update(grads, state, params)
    expected, _ = optim.update(grads, optim.init(params), params)
    assert tree_type(updates) == tree_type(expected)
    assert tree_type(optax.apply_updates(params, updates)) == tree_type(params)


@each(PEERS)
def test_accumulation_skips_what_is_not_finite(peer: Peer):
    skip = optax.skip_not_finite
    steps = optax.MultiSteps(peer.make(peer.rate), 2, should_skip_update_fn=skip)
    params, grads = trees()
    bad = jax.tree.map(lambda x: x * jnp.nan, grads)
    state, step = steps.init(params), jax.jit(steps.update)
    for g, mini_step in ((grads, 1), (bad, 1), (grads, 0)):
        _, state = step(g, state, params)
        assert state.mini_step == mini_step
    counts = non_params(state.inner_opt_state)
    assert counts[0] == 1
    assert all(jnp.all(jnp.isfinite(x)) for x in jtu.tree_leaves(state))


@each(PEERS)
def test_chain(peer: Peer):
    """The neighbors in a chain keep their states, and see what it passes on."""
    params, grads = trees()
    plain = peer.make(peer.rate)
    optim = optax.chain(optax.clip(0.05), plain, optax.scale(2.0))
    updates, state = optim.update(grads, optim.init(params), params)
    clipped = jax.tree.map(lambda x: jnp.clip(x, -0.05, 0.05), grads)
    expected, inner = plain.update(clipped, plain.init(params), params)
    assert_trees_close(updates, jax.tree.map(lambda x: 2.0 * x, expected), 1e-6)
    assert_trees_close(state[1], inner, 1e-6)


@each(PEERS)
def test_masked(peer: Peer):
    params, grads = trees()
    plain = peer.make(peer.rate)
    optim = optax.masked(plain, {"w": True, "b": False})
    updates, state = optim.update(grads, optim.init(params), params)
    expected, _ = plain.update(grads["w"], plain.init(params["w"]), params["w"])
    assert_trees_close(updates, {"w": expected, "b": grads["b"]}, 1e-6)
    assert len(jtu.tree_leaves(moments(state.inner_state)[0])) == 1


@each(PEERS)
def test_partition(peer: Peer):
    params, grads = trees()
    plain, labels = peer.make(peer.rate), {"w": "first", "b": "second"}
    optim = optax.multi_transform({"first": plain, "second": optax.sgd(1.0)}, labels)
    updates, _ = jax.jit(optim.update)(grads, optim.init(params), params)
    expected, _ = plain.update(grads["w"], plain.init(params["w"]), params["w"])
    rest = jax.tree.map(jnp.negative, grads["b"])
    assert_trees_close(updates, {"w": expected, "b": rest}, 1e-6)


#
# Functions on states
#


@each(PEERS)
def test_maps_of_the_parameters_in_a_state(peer: Peer):
    """Moments become specs, and everything else is replaced by the other function."""
    optim, (params, _) = peer.make(peer.rate), trees()
    specs = {"w": "spec of w", "b": ["spec of b"]}
    mapped = optax.tree.map_params(
        optim,
        lambda _, spec: spec,
        optim.init(params),
        specs,
        transform_non_params=lambda _: "other",
    )
    assert all(tree == specs for tree in moments(mapped))
    assert set(non_params(mapped)) == {"other"}


@each(PEERS)
def test_maps_to_none(peer: Peer):
    params, _ = trees()
    optim = peer.make(optax.constant_schedule(peer.rate))
    state = optim.init(params)
    mapped = optax.tree.map_params(optim, lambda _: None, state)
    assert all(tree == {"w": None, "b": [None]} for tree in moments(mapped))
    none = lambda _: None
    mapped = optax.tree.map_params(optim, lambda x: x, state, transform_non_params=none)
    assert set(non_params(mapped)) == {None}
    assert_trees_close(moments(mapped), moments(state), 0.0)


@each(PEERS)
def test_maps_of_an_injected_state(peer: Peer):
    params, _ = trees()
    optim = optax.inject_hyperparams(peer.make)(learning_rate=peer.rate)
    state = optax.tree.map_params(optim, lambda x: x + 1.0, optim.init(params))
    np.testing.assert_allclose(state.hyperparams["learning_rate"], peer.rate)
    for x in jtu.tree_leaves(moments(state.inner_state)):
        assert jnp.all(x == 1)


@each(PEERS)
def test_absent_keys(peer: Peer):
    state = peer.make(peer.rate).init(jnp.ones(3))
    assert optax.tree.get_all_with_path(state, "apple") == []
    assert optax.tree.get(state, "apple", default=7) == 7
