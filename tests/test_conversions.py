"""Conversions from and to AdamW, optax, and PyTorch, and longer warm-ups."""
# A static type checker also finds many of these mistakes.
# pyright: reportArgumentType=false, reportCallIssue=false

import itertools as it
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from eqx_ademamix import (
    AdEMAMix,
    AdEMAMixState,
    SimplifiedAdEMAMix,
    StateFormat,
    alpha_scheduler,
    beta3_scheduler,
    extend,
    from_adamw,
    from_optax,
    from_torch,
    hyperparams,
    init,
    to_adamw,
    to_optax,
    update,
)

from .helpers import (
    Reference,
    assert_trees_close,
    buffers,
    make_mlp,
    make_zoo,
    max_error,
    reference_alpha,
    reference_b3,
    reference_step,
    tree_type,
    x64,
)


pytestmark = pytest.mark.usefixtures("standard_promotion")


X = jax.random.normal(jax.random.key(1), (16, 3))


def loss_fn(model: Any) -> Any:
    return jnp.mean((jax.vmap(model)(X) - X[:, :2]) ** 2)


def train(optim: Any, model: Any, state: Any, steps: int) -> Any:
    """Trains the filtered model with any optimizer that has `init` and `update`."""
    params, static = eqx.partition(model, eqx.is_inexact_array)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        grads = jax.grad(lambda p: loss_fn(eqx.combine(p, static)))(params)
        updates, state = optim.update(grads, state, params)
        return eqx.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return eqx.combine(params, static), state


def arrays(model: Any) -> Any:
    return eqx.filter(model, eqx.is_inexact_array)


ADAMW: Any = dict(b1=0.9, b2=0.99, weight_decay=0.1)
WRAPPED = {
    "adamw": lambda: optax.adamw(1e-2, **ADAMW),
    "chain": lambda: optax.chain(
        optax.clip_by_global_norm(100.0), optax.adamw(1e-2, **ADAMW)
    ),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adamw)(1e-2, **ADAMW),
    "MultiSteps": lambda: optax.MultiSteps(optax.adamw(1e-2, **ADAMW), 1),
    "masked": lambda: optax.masked(
        optax.adamw(1e-2, **ADAMW), lambda p: jax.tree.map(lambda _: True, p)
    ),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adamw(1e-2, **ADAMW), 3),
}


@pytest.mark.parametrize("make", WRAPPED.values(), ids=WRAPPED.keys())
def test_from_adamw_goes_on_exactly(make: Any):
    """With `alpha=0`, 100 AdamW steps plus 100 of our steps equal 200 AdamW steps."""
    adamw, model = make(), make_mlp()
    model, opt_state = train(adamw, model, adamw.init(arrays(model)), 100)
    expected, _ = train(adamw, model, opt_state, 100)
    optim = AdEMAMix(1e-2, alpha=0.0, **ADAMW)
    state = from_adamw(opt_state, optim, model)
    assert tree_type(state) == tree_type(init(optim, model))
    assert (state.count, state.count_m2) == (100, 0)
    assert all(not jnp.any(x) for x in jtu.tree_leaves(state.m2))
    ours, state = train(optim, model, state, 100)
    assert_trees_close(arrays(ours), arrays(expected), 1e-5)
    assert (state.count, state.count_m2) == (200, 100)


def test_from_adamw_and_back():
    model, adamw = make_mlp(), optax.adamw(1e-2, **ADAMW)
    model, opt_state = train(adamw, model, adamw.init(arrays(model)), 20)
    there: Any = from_adamw(opt_state, AdEMAMix(1e-2), model)
    back: Any = to_adamw(there)
    assert isinstance(back, optax.ScaleByAdamState)
    assert_trees_close(back, opt_state[0], 0.0)
    # AdamW can also continue from our state.
    expected, _ = train(adamw, model, opt_state, 20)
    ours, _ = train(adamw, model, (back, *opt_state[1:]), 20)
    assert_trees_close(arrays(ours), arrays(expected), 0.0)


def test_the_schedules_start_at_the_switch():
    model, adamw = make_mlp(), optax.adamw(1e-2)
    _, opt_state = train(adamw, model, adamw.init(arrays(model)), 20)
    optim = AdEMAMix(
        lambda count: 1e-3 * count,
        b3=beta3_scheduler(0.999, 0.9, warmup=10),
        alpha=alpha_scheduler(5.0, warmup=10),
    )
    now = hyperparams(optim, from_adamw(opt_state, optim, model))
    np.testing.assert_allclose(now.learning_rate, 20e-3, rtol=1e-6)
    assert now.alpha == 0.0 and now.b3 == np.float32(0.9)


def test_from_adamw_in_other_formats_and_shapes(getkey: Any):
    """Covers `mu_dtype` in AdamW, a state format, a frozen part, no `m1`, and a whole
    model."""
    model = make_zoo(getkey())
    adamw = optax.adamw(1e-2, mu_dtype=jnp.bfloat16)
    grads = jax.tree.map(jnp.ones_like, arrays(model))
    _, opt_state = adamw.update(grads, adamw.init(arrays(model)), arrays(model))
    fmt = StateFormat(m1=jnp.float16, m2=jnp.float32, nu=jnp.float32)
    for optim in (
        AdEMAMix(1e-2),
        AdEMAMix(1e-2, b1=0),
        AdEMAMix(1e-2, state_format=fmt),
        AdEMAMix(1e-2, trainable=lambda x: x.ndim > 1),
    ):
        state = from_adamw(opt_state, optim, model)
        assert tree_type(state) == tree_type(init(optim, model))
        for x in jtu.tree_leaves(state.m1):
            np.testing.assert_allclose(np.asarray(x, float), 0.1, rtol=4e-3)
        update(optim, grads, state, model)
    complex_params = {"c": jnp.ones(2, jnp.complex64)}
    adamw = optax.adamw(1e-2)
    _, opt_state = adamw.update(
        complex_params, adamw.init(complex_params), complex_params
    )
    optim = AdEMAMix(1e-2)
    state: Any = from_adamw(opt_state, optim, complex_params)
    assert tree_type(state) == tree_type(optim.init(complex_params))


SCHEDULED: Any = dict(
    b3=beta3_scheduler(0.99, 0.9, warmup=50), alpha=alpha_scheduler(3.0, warmup=50)
)


@pytest.mark.parametrize("b1", (0.9, 0.0))
def test_from_optax_in_the_middle(b1: float):
    kwargs: Any = dict(b1=b1, weight_decay=0.1, **SCHEDULED)
    theirs, ours = optax.contrib.ademamix(1e-2, **kwargs), AdEMAMix(1e-2, **kwargs)
    model = make_mlp()
    middle, opt_state = train(theirs, model, theirs.init(arrays(model)), 30)
    expected, expected_state = train(theirs, middle, opt_state, 30)

    state = from_optax(opt_state, ours, middle)
    assert tree_type(state) == tree_type(init(ours, middle))
    end, _ = train(ours, middle, state, 30)
    assert_trees_close(arrays(end), arrays(expected), 1e-5)

    # Then the reverse: our optimizer takes the first half.
    middle, state = train(ours, model, init(ours, model), 30)
    expected, _ = train(ours, middle, state, 30)
    back = (to_optax(state), *theirs.init(arrays(model))[1:])  # pyright: ignore
    end, end_state = train(theirs, middle, back, 30)
    assert_trees_close(arrays(end), arrays(expected), 1e-5)
    assert tree_type(end_state) == tree_type(expected_state)


def test_optax_both_ways_is_lossless():
    model, optim = make_mlp(), AdEMAMix(1e-2, **SCHEDULED)
    _, state = train(optim, model, init(optim, model), 5)
    assert_trees_close(from_optax(to_optax(state), optim, model), state, 0.0)
    chain = (optax.EmptyState(), (to_optax(state), optax.EmptyState()))
    assert_trees_close(from_optax(chain, optim, model), state, 0.0)


#
# Buffers and shardings
#


def test_no_buffer_is_shared():
    model, optim, adamw = make_mlp(), AdEMAMix(1e-2), optax.adamw(1e-2)
    model, opt_state = train(adamw, model, adamw.init(arrays(model)), 3)
    state: Any = from_adamw(opt_state, optim, model)
    theirs = to_optax(state)
    trees = (
        opt_state,
        state,
        to_adamw(state),
        theirs,
        from_optax(theirs, optim, model),
    )
    every = [x for tree in trees for x in buffers(tree)]
    assert len(set(every)) == len(every)
    step = jax.jit(lambda s, p: optim.update(p, s, p)[1], donate_argnums=0)
    step(state, arrays(model))
    assert all(not x.is_deleted() for x in jtu.tree_leaves(opt_state))


def test_states_inside_others_and_of_numpy():
    """Covers our state in a chain, NumPy arrays, and the reference's named tuple."""
    model, optim = make_mlp(), AdEMAMix(1e-2)
    _, state = train(optim, model, init(optim, model), 3)
    inside = (optax.EmptyState(), {"inner": jax.device_get(state)})
    assert_trees_close(to_adamw(inside), to_adamw(state), 0.0)  # pyright: ignore
    assert_trees_close(to_optax(inside), to_optax(state), 0.0)  # pyright: ignore
    fields = [(k, Any) for k in ("count", "count_m2", "m1", "m2", "nu")]
    reference = NamedTuple("ScaleByAdemamixState", fields)
    theirs: Any = to_optax(state)
    assert_trees_close(from_optax(reference(*theirs), optim, model), state, 0.0)


def test_too_large_for_the_format():
    """A finite moment stays finite in float16, just as in a step."""
    params = {"w": jnp.full((3,), 1e6)}
    adamw = optax.adamw(1e-2)
    _, opt_state = adamw.update(params, adamw.init(params), params)
    fmt = StateFormat(m1=jnp.float16, m2=jnp.float32, nu=jnp.float16)
    state: Any = from_adamw(opt_state, AdEMAMix(1e-2, state_format=fmt), params)
    assert jnp.all(state.nu["w"] == 65504) and jnp.all(state.m1["w"] == 65504)


def test_shardings_are_kept():
    devices = np.asarray(jax.devices())
    sharding = NamedSharding(Mesh(devices, ("data",)), PartitionSpec("data", None))
    params = {"w": jax.device_put(jnp.ones((16, 4)), sharding)}
    adamw, optim = optax.adamw(1e-2), AdEMAMix(1e-2)
    _, opt_state = jax.jit(adamw.update)(params, adamw.init(params), params)
    state: Any = from_adamw(opt_state, optim, params)
    theirs: Any = to_optax(state)
    for tree in (state, theirs, from_optax(theirs, optim, params)):
        for moment in (tree.m1, tree.m2, tree.nu):
            assert moment["w"].sharding.is_equivalent_to(sharding, 2)
    back: Any = to_adamw(state)
    assert back.mu["w"].sharding.is_equivalent_to(sharding, 2)
    # An Adam state that is sharded although the parameters are not.
    state = from_adamw(opt_state, optim, {"w": jnp.ones((16, 4))})
    moments = {k: np.zeros((16, 4)) for k in ("exp_avg", "exp_avg_slow", "exp_avg_sq")}
    state_dict = {"state": {0: {"step": 1, **moments}}}
    for each in (state, from_torch(state_dict, optim, params, {"['w']": 0})):
        for moment in (each.m1, each.m2, each.nu):
            assert moment["w"].sharding.is_equivalent_to(sharding, 2)


#
# PyTorch
#

SHAPES = {
    ".layers[0].weight": (4, 3),
    ".layers[0].bias": (4,),
    ".layers[1].weight": (4, 4),
    ".layers[1].bias": (4,),
    ".layers[2].weight": (2, 4),
    ".layers[2].bias": (2,),
}
STEPS = 40
T_WARMUP = 60


def torch_gradients() -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    draw = lambda: {k: rng.normal(size=s).astype(np.float32) for k, s in SHAPES.items()}
    return [draw() for _ in range(2 * STEPS)]


def torch_run(steps: range, start: dict[str, Reference]) -> dict[str, Reference]:
    """The results of PyTorch's AdEMAMix by its published formulas, with t from 1."""
    refs = dict(start)
    for i, k in it.product(steps, refs):
        refs[k] = reference_step(
            refs[k], torch_gradients()[i][k], i + 1, lr=1e-2, b1=0.9, b2=0.99,
            b3=reference_b3(i + 1, 0.999, 0.9, T_WARMUP),
            alpha=reference_alpha(i + 1, 5.0, T_WARMUP), weight_decay=0.1,
        )  # fmt: skip
    return refs


@pytest.fixture(scope="module")
def golden() -> tuple[dict[str, Reference], dict[str, Reference]]:
    model = jtu.tree_leaves_with_path(arrays(make_mlp()))
    zero = {
        jtu.keystr(path): Reference(
            np.asarray(x, float),
            np.zeros(x.shape),
            np.zeros(x.shape),
            np.zeros(x.shape),
        )
        for path, x in model
    }
    middle = torch_run(range(STEPS), zero)
    return middle, torch_run(range(STEPS, 2 * STEPS), middle)


def apple(ref: Reference, transpose: bool) -> dict[str, Any]:
    turn = np.transpose if transpose else lambda x: x
    names = ("exp_avg_fast", "exp_avg_slow", "exp_avg_sq")
    moments = zip(names, (ref.m1, ref.m2, ref.nu), strict=True)
    return {"step": STEPS, **{k: turn(x).astype(np.float32) for k, x in moments}}


def pytorch_optimizer(ref: Reference, transpose: bool) -> dict[str, Any]:
    state = apple(ref, transpose)
    del state["step"]  # it is in the group
    return {"exp_avg": state.pop("exp_avg_fast"), **state}


def bitsandbytes(ref: Reference, transpose: bool) -> dict[str, Any]:
    state = apple(ref, transpose)
    stacked = np.stack([state["exp_avg_fast"], state["exp_avg_slow"]])
    return {"step": np.asarray(STEPS), "state1": stacked, "state2": state["exp_avg_sq"]}


def newer_bitsandbytes(ref: Reference, transpose: bool) -> dict[str, Any]:
    state = bitsandbytes(ref, transpose)
    return {"step": state.pop("step"), "__bnb_optimizer_quant_state__": state}


WRITERS = (apple, pytorch_optimizer, bitsandbytes, newer_bitsandbytes)


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(
    "how", ("index", "name", "param_names", "no dot", "transposed")
)
def test_from_torch_goes_on(write: Any, how: str, golden: Any):
    middle, end = golden
    key = {path: f"net.{i}" if how == "name" else i for i, path in enumerate(SHAPES)}
    state = {
        key[path]: write(ref, how == "transposed" and ref.m1.ndim == 2)
        for path, ref in middle.items()
    }
    group: Any = {"params": list(key.values()), "lr": 1e-2, "step": STEPS}
    names: Any = dict(key)
    if how == "param_names":
        group["param_names"] = [f"net{path}" for path in key]
        names = {path: f"net{path}" for path in key}
    if how == "no dot":
        names = {path.removeprefix("."): i for path, i in key.items()}
    if how == "transposed":
        names = {path: (i, np.transpose) for path, i in key.items()}
    state_dict = {"state": state, "param_groups": [group]}
    model = make_mlp()
    where = jtu.tree_structure(arrays(model))
    params = where.unflatten(
        [jnp.asarray(middle[path].p, jnp.float32) for path in SHAPES]
    )
    optim = AdEMAMix(
        1e-2,
        b1=0.9,
        b2=0.99,
        b3=beta3_scheduler(0.999, 0.9, warmup=T_WARMUP, offset=1),
        alpha=alpha_scheduler(5.0, warmup=T_WARMUP, offset=1),
        weight_decay=0.1,
    )
    ours = from_torch(state_dict, optim, params, names)
    assert tree_type(ours) == tree_type(optim.init(params))
    assert ours.count == ours.count_m2 == STEPS
    assert len(set(buffers(ours))) == len(buffers(ours))
    step = jax.jit(optim.update)
    for grads in torch_gradients()[STEPS:]:
        tree = where.unflatten([jnp.asarray(grads[path]) for path in SHAPES])
        updates, ours = step(tree, ours, params)
        params = eqx.apply_updates(params, updates)
    moments = zip(
        *map(jtu.tree_leaves, (params, ours.m1, ours.m2, ours.nu)), strict=True
    )
    for path, leaves in zip(SHAPES, moments, strict=True):
        for x, ref in zip(leaves, end[path], strict=True):
            assert max_error(x, ref) <= 1e-5


def test_from_torch_without_m1():
    """At `b1 = 0`, Apple's version stores `None`, and so does ours."""
    moments = {
        "exp_avg_fast": None,
        "exp_avg_slow": np.ones(3),
        "exp_avg_sq": np.ones(3),
    }
    state_dict = {"state": {0: {"step": 5, **moments}}}
    optim = AdEMAMix(1e-3, b1=0)
    state = from_torch(state_dict, optim, {"w": jnp.ones(3)}, {"['w']": 0})
    assert tree_type(state) == tree_type(optim.init({"w": jnp.ones(3)}))


#
# Longer warm-ups
#


def at_count(optim: Any, count: int) -> AdEMAMixState:
    state = optim.init(jnp.ones(2))
    return eqx.tree_at(lambda s: s.count_m2, state, jnp.asarray(count, jnp.int32))


@pytest.mark.parametrize("offset", (0, 1))
@pytest.mark.parametrize(
    "count,warmup", ((0, 50), (30, 200), (30, 60), (99, 1000), (150, 300))
)
@pytest.mark.parametrize("as_array", (False, True))
def test_extend(offset: int, count: int, warmup: int, as_array: bool):
    kind: Any = jnp.asarray if as_array else float
    b3 = beta3_scheduler(kind(0.999), kind(0.9), warmup=kind(100.0), offset=offset)
    alpha = alpha_scheduler(kind(8.0), kind(1.0), warmup=kind(100.0), offset=offset)
    optim = AdEMAMix(1e-3, b3=b3, alpha=alpha)
    new: Any = extend(optim, at_count(optim, count), warmup=warmup)
    # The values do not jump.
    np.testing.assert_allclose(new.alpha(count), alpha(count), rtol=1e-6)
    np.testing.assert_allclose(
        new.b3.complement(count), b3.complement(count), rtol=2e-6
    )
    # The end value is the same. It is reached at the new length and not earlier,
    # unless it was already reached.
    end = warmup - offset
    for step in (end, end + 1, 10**6):
        assert new.alpha(step) == 8.0 and new.b3(step) == np.float32(0.999)
    if count < 100 - offset:
        assert new.alpha(end - 1) < 8.0
        assert new.b3.complement(end - 1) > new.b3.complement(end)
    # In between, alpha and the half-life of b3 are linear.
    steps = np.arange(count, end + 1)
    straight = np.linspace(float(alpha(count)), 8.0, len(steps))
    np.testing.assert_allclose(new.alpha(steps), straight, rtol=2e-6)
    rate = -np.log1p(-np.asarray(new.b3.complement(steps), float))
    straight = np.linspace(1 / rate[0], 1 / rate[-1], len(steps))
    np.testing.assert_allclose(1 / rate, straight, rtol=1e-5)
    assert tree_type(new.alpha.alpha) == tree_type(alpha.alpha)


def test_extend_again():
    """Each time, the length is counted in the same way as at construction."""
    optim = AdEMAMix(1e-3, alpha=alpha_scheduler(8.0, warmup=100, offset=1))
    for count, warmup in ((20, 200), (50, 80), (79 - 2, 1000)):
        new: Any = extend(optim, at_count(optim, count), warmup=warmup)
        old: Any = optim.alpha
        np.testing.assert_allclose(new.alpha(count), old(count), rtol=1e-6)
        assert new.alpha(warmup - 1) == 8.0 and new.alpha(warmup - 2) < 8.0
        optim = new


def test_extend_leaves_constants_alone():
    optim = AdEMAMix(1e-3, b3=0.99, alpha=alpha_scheduler(8.0, warmup=100))
    new = extend(optim, at_count(optim, 10), warmup=200)
    assert new.b3 == 0.99 and new.learning_rate == 1e-3


def test_extend_a_delayed_warmup():
    """A warm-up that has not started yet still starts at the planned step."""
    alpha = alpha_scheduler(8.0, warmup=100, offset=-100)
    optim = AdEMAMix(1e-3, alpha=alpha)
    new: Any = extend(optim, at_count(optim, 10), warmup=200)
    assert new.alpha(100) == 0.0 and new.alpha(200) == 4.0 and new.alpha(300) == 8.0


@pytest.mark.parametrize("warmup", [101, 300, 500, 501, 999, 2000, 3000])
def test_extend_at_an_older_checkpoint(warmup: int):
    """After a return to step 100, from which the first extension was constant."""
    start = AdEMAMix(1e-3, alpha=alpha_scheduler(8.0, warmup=1000))
    optim = extend(start, at_count(start, 500), warmup=2000)
    new: Any = extend(optim, at_count(optim, 100), warmup=warmup)
    assert new.alpha(100) == 4.0 and new.alpha(warmup) == 8.0
    # The steepest part of the way there is at most as steep as a line from now that has
    # its length shortened by what the old schedule waits, in proportion.
    values = np.asarray(new.alpha(np.arange(100, warmup + 1)))
    share = 1.0 if warmup > 2000 else 1900 / 1500
    wait = 400 if warmup > 2000 else 0
    steepest = 4.0 * share / (warmup - 100 - wait)
    assert np.diff(values).max() <= steepest + 1e-6
    if warmup == 2000:
        steps = np.arange(100, 2001)
        np.testing.assert_array_equal(new.alpha(steps), optim.alpha(steps))


def test_extend_from_zero():
    optim = AdEMAMix(1e-3, b3=beta3_scheduler(0.999, 0.0, warmup=100))
    new: Any = extend(optim, at_count(optim, 0), warmup=200)
    assert new.b3(0) == 0.0 and new.b3(200) == np.float32(0.999)


#
# Errors
#

PARAMS = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
OTHER = {"w": jnp.ones((2, 4)), "b": jnp.ones(3)}
OURS = AdEMAMix(1e-3)
ALPHA = AdEMAMix(1e-3, alpha=alpha_scheduler(8.0, warmup=100))


def torch_state(**edit: Any) -> dict[str, Any]:
    one = lambda shape: {"step": 3, **torch_moments(shape)}
    state = {0: one((3,)), 1: {**one((2, 3)), **edit}}
    return {"state": state, "param_groups": [{"params": [0, 1]}]}


def torch_moments(shape: Any, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    names = ("exp_avg_fast", "exp_avg_slow", "exp_avg_sq")
    return {k: np.zeros(shape, dtype) for k in names}


NAMES: Any = {"['b']": 0, "['w']": 1}
RAGGED = [[1.0], [1.0, 2.0]]


def torch(state_dict: Any, names: Any = NAMES) -> Any:
    return lambda: from_torch(state_dict, OURS, PARAMS, names)


def negative(opt_state: Any, i: int) -> Any:
    where = lambda s: s[i].nu["w"]
    return eqx.tree_at(where, opt_state, -jnp.ones((2, 3)))


def donated_adam() -> None:
    opt_state: Any = optax.adam(1e-3).init(PARAMS)
    opt_state[0].mu["w"].delete()
    from_adamw(opt_state, OURS, PARAMS)


ERRORS: dict[str, Any] = {
    "no Adam state": (
        lambda: from_adamw(optax.sgd(1e-3, momentum=0.9).init(PARAMS), OURS, PARAMS),
        r"no states of Adam or AdamW, .* Found in it: TraceState",
    ),
    "ours for Adam's": (
        lambda: from_adamw(OURS.init(PARAMS), OURS, PARAMS),
        "no states of Adam .* Found in it: AdEMAMixState",
    ),
    "two Adam states": (
        lambda: from_adamw(
            (optax.adam(1e-3).init(PARAMS), optax.adam(1e-3).init(PARAMS)), OURS, PARAMS
        ),
        "has 2 states of Adam",
    ),
    "nothing": (
        lambda: from_adamw(None, OURS, PARAMS),
        "no states .* Found in it: None",
    ),
    "another model": (
        lambda: from_adamw(optax.adam(1e-3).init(OTHER), OURS, PARAMS),
        r"opt_state.mu\['w'\] has shape \(2, 4\), but the state of `optim` has \(2, 3\)",
    ),
    "another structure": (
        lambda: from_adamw(optax.adam(1e-3).init([jnp.ones(3)]), OURS, PARAMS),
        "opt_state.mu is a list of length 1, but the state of `optim` has a dict",
    ),
    "a leaf missing": (
        lambda: from_adamw(
            optax.adam(1e-3).init({"w": jnp.ones((2, 3)), "b": None}), OURS, PARAMS
        ),
        r"opt_state.mu\['b'\] is None, but the state of `optim` has a float32 array",
    ),
    "Adam's for optax": (
        lambda: from_optax(optax.adam(1e-3).init(PARAMS), OURS, PARAMS),
        "no states of optax.contrib.ademamix, .* Found in it: ScaleByAdamState",
    ),
    "optax of another model": (
        lambda: from_optax(optax.contrib.ademamix(1e-3).init(OTHER), OURS, PARAMS),
        r"opt_state.m1\['w'\] has shape \(2, 4\)",
    ),
    "no m1 for Adam": (
        lambda: to_adamw(AdEMAMix(1e-3, b1=0).init(PARAMS)),
        "`state` has no first moment, since its optimizer has `b1=0`",
    ),
    "to_adamw of optax": (
        lambda: to_adamw(optax.adam(1e-3).init(PARAMS)),
        "`state` has no states of AdEMAMix, .* Found in it: ScaleByAdamState",
    ),
    "from_adamw of optax's optimizer": (
        lambda: from_adamw(optax.adam(1e-3).init(PARAMS), optax.adam(1e-3), PARAMS),
        "`optim` is a `GradientTransformation.*whose state has no states of AdEMAMix",
    ),
    "torch: not a state dict": (
        torch({"w": 1}),
        "`state_dict` is a dict with the keys 'w', but a PyTorch optimizer's",
    ),
    "torch: no name": (
        torch(torch_state(), {"['b']": 0}),
        r"`names` has no entry for params\['w'\], which is trained",
    ),
    "torch: unknown name": (
        torch(torch_state(), {"['b']": 0, "['w']": "net.w"}),
        r"params\['w'\] is mapped to 'net.w', but `state_dict` has no state of that",
    ),
    "torch: a moment is missing": (
        torch({"state": {0: torch_state()["state"][0], 1: {"step": 3, "exp_avg": 0}}}),
        r"params\['w'\]: a moment is missing. The state dict has step, exp_avg for it",
    ),
    "torch: another shape": (
        torch(torch_state(exp_avg_slow=np.zeros((3, 2), np.float32))),
        r"params\['w'\] has shape \(2, 3\), but its moment in the state dict has \(3, 2\)",
    ),
    "torch: 8 bits": (
        torch(torch_state(exp_avg_slow=np.zeros((2, 3), np.uint8))),
        r"params\['w'\] has moments in 8 bits",
    ),
    "torch: other steps": (
        torch(torch_state(step=4)),
        r"parameters after different numbers of steps, \[3, 4\]",
    ),
    "torch: no steps": (
        torch(torch_state(step=None)),
        r"params\['w'\]: `state_dict` has no 'step' for it",
    ),
    "extend: a function": (
        lambda: extend(
            AdEMAMix(1e-3, alpha=lambda c: 1.0), at_count(OURS, 3), warmup=100
        ),
        "`alpha` is the function `<lambda>`, but `extend` knows only the schedules of",
    ),
    "extend: no schedule": (
        lambda: extend(OURS, at_count(OURS, 3), warmup=100),
        "`optim` has neither a schedule for `b3` nor one for `alpha`",
    ),
    "extend: passed": (
        lambda: extend(ALPHA, at_count(ALPHA, 30), warmup=30),
        "`warmup` is 30, but 30 steps of the warm-up of `alpha` have already been taken",
    ),
    "extend: negative": (
        lambda: extend(ALPHA, at_count(ALPHA, 30), warmup=-1),
        "`warmup` is -1.0, but a finite number >= 0",
    ),
    "torch: a moment is None": (
        torch(torch_state(exp_avg_sq=None)),
        r"params\['w'\]: the moment `nu` is missing: it is None",
    ),
    "torch: complex": (
        torch(torch_state(exp_avg_slow=np.zeros((2, 3), complex))),
        r"params\['w'\]: the moment `m2` has dtype complex128 in .* but real numbers",
    ),
    "torch: complex nu": (
        torch(torch_state(exp_avg_sq=np.zeros((2, 3), complex))),
        r"params\['w'\]: the moment `nu` has dtype complex128 in .* but real numbers",
    ),
    "torch: complex nu of a complex parameter": (
        lambda: from_torch(
            {"state": {0: {**torch_moments((3,), complex), "step": 3}}},
            OURS,
            {"c": jnp.ones(3, complex)},
            {"['c']": 0},
        ),
        r"params\['c'\]: the moment `nu` has dtype complex128 in .* but real numbers",
    ),
    "torch: real for complex": (
        lambda: from_torch(
            {"state": {0: {**torch_moments((3,)), "step": 3}}},
            OURS,
            {"c": jnp.ones(3, complex)},
            {"['c']": 0},
        ),
        r"params\['c'\]: the moment `m1` has dtype float32 in .* but complex numbers",
    ),
    "torch: groups": (
        torch({**torch_state(), "param_groups": {"params": [0, 1]}}),
        r"state_dict\['param_groups'\] is a dict with the keys 'params', but a list was",
    ),
    "torch: a group": (
        torch({**torch_state(), "param_groups": [1]}),
        r"state_dict\['param_groups'\]\[0\] is the int 1, but a dict was expected",
    ),
    "torch: a group without parameters": (
        torch({**torch_state(), "param_groups": [{"params": []}, {"params": None}]}),
        r"state_dict\['param_groups'\]\[1\]\['params'\] is None, but a list was expected",
    ),
    "torch: a group with strange names": (
        torch({**torch_state(), "param_groups": [{"params": [0], "param_names": 1}]}),
        r"state_dict\['param_groups'\]\[0\]\['param_names'\] is the int 1, but a list was",
    ),
    "torch: quantisation state": (
        torch(torch_state(__bnb_optimizer_quant_state__=[1])),
        r"params\['w'\]: its '__bnb_optimizer_quant_state__' in .* is a list of length 1, "
        "but a dict was expected",
    ),
    "torch: ragged and stacked": (
        torch(
            {"state": {**torch_state()["state"], 1: {"state1": RAGGED, "state2": 0}}}
        ),
        r"params\['w'\]: the moment `state1` in the state dict is a list of length 2, but",
    ),
    "torch: ragged steps": (
        torch(torch_state(step=RAGGED)),
        r"params\['w'\]: its 'step' in the state dict is a list of length 2, but a number",
    ),
    "torch: a function that returns nothing": (
        torch(torch_state(), {"['b']": 0, "['w']": (1, lambda x: None)}),
        r"params\['w'\]: the moment `m1` after its function is None, but an array of numbers",
    ),
    "torch: a function that returns bools": (
        torch(torch_state(), {"['b']": 0, "['w']": (1, lambda x: x == 0)}),
        r"params\['w'\]: the moment `m1` after its function is a bool array of shape "
        r"\(2, 3\), but an array of numbers",
    ),
    "torch: a function that returns NaN": (
        torch(torch_state(), {"['b']": 0, "['w']": (1, lambda x: x + np.nan)}),
        r"params\['w'\]: the moment `m1` has a NaN \(in float32\), but finite numbers were",
    ),
    "a negative Adam": (
        lambda: from_adamw(negative(optax.adam(1e-3).init(PARAMS), 0), OURS, PARAMS),
        r"opt_state\.nu\['w'\] has a negative entry \(in float32\), but real numbers >= 0 were "
        r"expected\. If the run diverged, convert",
    ),
    "torch: half a step": (
        torch(torch_state(step=3.5)),
        r"params\['w'\]: its 'step' in the state dict is the float 3.5",
    ),
    "torch: names in a list": (
        torch(torch_state(), ["w"]),
        "`names` is a list of length 1, but a dict was expected",
    ),
    "torch: a strange name": (
        torch(torch_state(), {"['b']": 0, "['w']": [1, 2]}),
        r"`names` has a list of length 2 for params\['w'\], but a name, an index",
    ),
    "complex Adam for a real model": (
        lambda: from_adamw(
            optax.adam(1e-3).init(jax.tree.map(lambda x: x.astype(complex), PARAMS)),
            OURS,
            PARAMS,
        ),
        r"opt_state.mu\['b'\] has dtype complex64, but the state of `optim` is for a real",
    ),
    "a batch of states": (
        lambda: from_adamw(
            jax.vmap(optax.adam(1e-3).init)(jax.tree.map(lambda x: x[None], PARAMS)),
            OURS,
            PARAMS,
        ),
        r"opt_state.count is an int32 array of shape \(1,\), but a scalar",
    ),
    "a donated state": (
        donated_adam,
        r"opt_state.mu\['w'\] has been deleted",
    ),
    "extend: batched schedules": (
        lambda: extend(
            eqx.tree_at(lambda o: o.alpha.warmup, ALPHA, jnp.ones(3)),
            at_count(OURS, 3),
            warmup=200,
        ),
        r"optim.alpha.warmup is a float32 array of shape \(3,\), but a concrete number",
    ),
    "extend: traced": (
        lambda: jax.jit(lambda s: extend(ALPHA, s, warmup=200).alpha(3))(
            at_count(ALPHA, 3)
        ),
        r"state.count_m2 is an int32 array of shape \(\), but a concrete number",
    ),
    "extend: no state": (
        lambda: extend(ALPHA, PARAMS, warmup=200),
        "`state` has no states of AdEMAMix, .* Found in it: a dict with the keys",
    ),
}


@pytest.mark.parametrize("call,text", ERRORS.values(), ids=ERRORS.keys())
def test_one_sentence(call: Any, text: str):
    with pytest.raises((ValueError, TypeError), match=text) as info:
        call()
    assert len(str(info.value).split("\n---")[0]) < 600


#
# Values that no run can continue from
#

MOMENTS = {"m1": "exp_avg_fast", "m2": "exp_avg_slow", "nu": "exp_avg_sq"}
NO_NUMBERS = {
    "bools": (np.ones((2, 3), bool), r"a bool array of shape \(2, 3\)"),
    "strings": (np.full((2, 3), "one"), r"a str\d* array of shape \(2, 3\)"),
    "a string": ("one", "the str 'one'"),
    "objects": (np.full((2, 3), None), r"an object array of shape \(2, 3\)"),
    "ragged": (RAGGED, "a list of length 2"),
    "dates": (
        np.zeros((2, 3), "datetime64[s]"),
        r"a datetime64\[s\] array of shape .*",
    ),
}


@pytest.mark.parametrize("x,found", NO_NUMBERS.values(), ids=NO_NUMBERS)
@pytest.mark.parametrize("name", MOMENTS)
@pytest.mark.filterwarnings("ignore:Creating an ndarray from ragged")  # NumPy < 1.24
def test_a_torch_moment_is_an_array_of_numbers(name: str, x: Any, found: str):
    text = rf"^params\['w'\]: the moment `{name}` in the state dict is {found}, but an "
    with pytest.raises(ValueError, match=text + "array of numbers was expected"):
        torch(torch_state(**{MOMENTS[name]: x}))()


FLAWS = {
    "NaN": (np.nan, "a NaN"),
    "inf": (np.inf, "an infinite entry"),
    "-inf": (-np.inf, "an infinite entry"),
    "1e300": (1e300, "an infinite entry"),
    "-1e300": (-1e300, "an infinite entry"),
    "an int": (10**39, "an infinite entry"),
    "negative": (-1e-30, "a negative entry"),
}


def flawed(x: float, dtype: Any = np.float64) -> np.ndarray:
    """Ones, except for one entry."""
    array = np.ones((2, 3), dtype)
    array[1, 2] = x
    return array


@pytest.mark.parametrize("x,flaw", FLAWS.values(), ids=FLAWS)
@pytest.mark.parametrize("name", MOMENTS)
def test_the_values_of_a_torch_moment(name: str, x: float, flaw: str):
    convert = torch(torch_state(**{MOMENTS[name]: flawed(x)}))
    if flaw == "a negative entry" and name != "nu":
        assert getattr(convert(), name)["w"][1, 2] == np.float32(x)
        return
    text = rf"^params\['w'\]: the moment `{name}` has {flaw} \(in float32\), but (finite|real) "
    with pytest.raises(ValueError, match=text):
        convert()


def test_a_torch_moment_may_be_as_large_as_its_type():
    """float64 parameters have float64 moments. In float16 a number stays finite."""
    large = flawed(1e300)
    state_dict = torch_state(exp_avg_slow=large, exp_avg_sq=large)
    with x64():
        params = jax.tree.map(lambda x: x.astype(np.float64), PARAMS)
        state = from_torch(state_dict, OURS, params, NAMES)
        assert state.m2["w"][1, 2] == state.nu["w"][1, 2] == 1e300
        with pytest.raises(
            ValueError, match=r"`m2` has an infinite entry \(in float32\)"
        ):
            torch(state_dict)()
    fmt = StateFormat(m1=jnp.float16, m2=jnp.float16, nu=jnp.float32)
    optim = AdEMAMix(1e-3, state_format=fmt)
    state = from_torch(torch_state(exp_avg_slow=flawed(1e30)), optim, PARAMS, NAMES)
    assert state.m2["w"][1, 2] == 65504


def test_from_torch_of_other_numbers():
    """Covers integers, bfloat16, nested lists, and a moment without entries."""
    numbers = torch_state(
        exp_avg_fast=[[1, 2, 3], [4, 5, 6]],
        exp_avg_slow=np.arange(6).reshape(2, 3),
        exp_avg_sq=np.ones((2, 3), jnp.bfloat16),
    )
    state: Any = torch(numbers)()
    assert np.array_equal(state.m1["w"], [[1, 2, 3], [4, 5, 6]])
    assert np.array_equal(state.m2["w"], [[0, 1, 2], [3, 4, 5]])
    assert jnp.all(state.nu["w"] == 1) and state.nu["w"].dtype == jnp.float32
    nothing = {"state": {0: {**torch_moments((0, 3)), "step": 1}}}
    state = from_torch(nothing, OURS, {"w": jnp.ones((0, 3))}, {"['w']": 0})
    assert state.m2["w"].shape == (0, 3)


def test_what_the_function_raises_is_raised():
    def fail(x: Any) -> Any:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        torch(torch_state(), {"['b']": 0, "['w']": (1, fail)})()


def test_from_torch_without_m1_transposed():
    """The function of a moment is not called on an `m1` that the optimizer drops."""
    moments = {"exp_avg_slow": np.ones((3, 2)), "exp_avg_sq": np.ones((3, 2))}
    state_dict = {"state": {0: {"step": 5, "exp_avg_fast": None, **moments}}}
    optim, params = AdEMAMix(1e-3, b1=0), {"w": jnp.ones((2, 3))}
    state = from_torch(state_dict, optim, params, {"['w']": (0, np.transpose)})
    assert tree_type(state) == tree_type(optim.init(params))


CONVERSIONS: Any = {
    "from_adamw": (lambda s: from_adamw(s, OURS, PARAMS), optax.scale_by_adam()),
    "from_optax": (lambda s: from_optax(s, OURS, PARAMS), optax.contrib.ademamix(1.0)),
    "from_optax, simplified": (
        lambda s: from_optax(s, SimplifiedAdEMAMix(1e-3), PARAMS),
        optax.contrib.simplified_ademamix(1.0),
    ),
}
PLACES = {
    "from_adamw": (("mu", "nu"), ("count",)),
    "from_optax": (("m1", "m2", "nu"), ("count", "count_m2")),
    "from_optax, simplified": (("m", "n"), ("t",)),
}


def broken(how: str, name: str, x: Any) -> Any:
    """A state of optax with another leaf in one place."""
    opt_state = CONVERSIONS[how][1].init(PARAMS)
    one = opt_state if how == "from_adamw" else opt_state[0]
    return one._replace(**{name: x})


def with_leaf(x: Any) -> Any:
    return {**PARAMS, "w": x}


@pytest.mark.parametrize("as_array", (jnp.asarray, np.asarray))
@pytest.mark.parametrize("dtype", (np.float32, jnp.bfloat16))
@pytest.mark.parametrize("how", CONVERSIONS)
def test_the_values_of_an_optax_state(how: str, dtype: Any, as_array: Any):
    convert, _ = CONVERSIONS[how]
    for name in PLACES[how][0]:
        for x, flaw in ((np.nan, "NaN"), (-np.inf, "infinite"), (-1, "negative")):
            opt_state = broken(how, name, with_leaf(as_array(flawed(x, dtype))))
            if x == -1 and name not in ("nu", "n"):
                convert(opt_state)
                continue
            text = rf"^opt_state\.{name}\['w'\] has an? {flaw}.*, but (finite|real) "
            with pytest.raises(ValueError, match=text):
                convert(opt_state)


@pytest.mark.parametrize("how", CONVERSIONS)
@pytest.mark.parametrize("as_array", (jnp.asarray, np.asarray, int))
def test_the_counters_of_an_optax_state(how: str, as_array: Any):
    for name in PLACES[how][1]:
        text = rf"^opt_state\.{name} is -5, but a number of steps >= 0 was expected"
        with pytest.raises(ValueError, match=text):
            CONVERSIONS[how][0](broken(how, name, as_array(-5)))


@pytest.mark.parametrize("to", (to_adamw, to_optax))
def test_our_own_counters(to: Any):
    state = eqx.tree_at(lambda s: s.count, OURS.init(PARAMS), jnp.asarray(-5))
    with pytest.raises(ValueError, match=r"^state\.count is -5, but a number"):
        to(state)


def test_a_nan_in_a_large_array():
    """XLA's maximum of such an array may be finite."""
    params = jnp.ones((300, 1000))
    opt_state: Any = optax.scale_by_adam().init(params)
    opt_state = opt_state._replace(nu=params.at[3, 7].set(jnp.nan))
    with pytest.raises(ValueError, match=r"^opt_state\.nu has a NaN"):
        from_adamw(opt_state, OURS, params)


def test_a_moment_that_is_dropped_is_not_checked():
    opt_state = broken("from_optax", "m1", with_leaf(flawed(np.nan)))
    optim = AdEMAMix(1e-3, b1=0)
    state = from_optax(opt_state, optim, PARAMS)
    assert tree_type(state) == tree_type(optim.init(PARAMS))


def test_a_complex_nu():
    """optax has a complex `nu` for complex parameters. Its imaginary part is zero."""
    params = {"c": jnp.asarray([1 + 2j, 3j, -1])}
    adam: Any = optax.scale_by_adam()
    _, opt_state = adam.update(params, adam.init(params), params)
    state: Any = from_adamw(opt_state, OURS, params)
    np.testing.assert_allclose(state.nu["c"], 1e-3 * np.asarray([5, 9, 1]), rtol=1e-6)
    for x, flaw in ((1j, "complex"), (-1 + 0j, "negative"), (np.nan, "NaN")):
        opt_state = opt_state._replace(nu={"c": jnp.full(3, x, complex)})
        with pytest.raises(ValueError, match=rf"^opt_state.nu\['c'\] has a {flaw}"):
            from_adamw(opt_state, OURS, params)
    for x, flaw in ((complex(1, np.nan), "a NaN"), (complex(np.inf), "an infinite")):
        opt_state = opt_state._replace(mu={"c": jnp.full(3, x, complex)})
        with pytest.raises(ValueError, match=rf"^opt_state.mu\['c'\] has {flaw}"):
            from_adamw(opt_state, OURS, params)


def test_sharded_values_are_checked():
    mesh = Mesh(np.asarray(jax.devices()), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec("data", None))
    params = {"w": jax.device_put(jnp.ones((16, 4)), sharding)}
    opt_state: Any = optax.scale_by_adam().init(params)
    nu = {"w": jax.device_put(jnp.ones((16, 4)).at[15, 3].set(-1.0), sharding)}
    with pytest.raises(ValueError, match=r"^opt_state.nu\['w'\] has a negative entry"):
        from_adamw(opt_state._replace(nu=nu), OURS, params)


@pytest.mark.parametrize("how", CONVERSIONS)
def test_traced_values_are_not_checked(how: str):
    """An array that the traced function closes over is known, and is checked."""
    convert, name = CONVERSIONS[how][0], PLACES[how][0][-1]
    opt_state = broken(how, name, with_leaf(-jnp.ones((2, 3))))
    state = jax.jit(convert)(opt_state)
    assert jnp.all(state.nu["w"] == -1)
    with pytest.raises(ValueError, match=rf"opt_state.{name}\['w'\] has a negative"):
        jax.jit(lambda: convert(opt_state))()
    good = CONVERSIONS[how][1].init(PARAMS)
    assert tree_type(jax.jit(lambda: convert(good))()) == tree_type(convert(good))
