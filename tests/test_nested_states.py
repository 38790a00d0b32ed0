"""States inside of other states: read, converted, and stored in another format."""
# A static type checker also finds many of these mistakes.
# pyright: reportArgumentType=false, reportCallIssue=false

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
    AdEMAMixState,
    Compensated,
    CompensatedState,
    SimplifiedAdEMAMix,
    StateFormat,
    ademamix,
    alpha_scheduler,
    beta3_scheduler,
    change_state_format,
    decoded,
    from_adamw,
    from_optax,
    from_torch,
    hyperparams,
    init,
    simplified_ademamix,
    state_report,
    to_optax,
    update,
)

from .helpers import COMPACT, assert_trees_close, buffers, everywhere, tree_type


pytestmark = pytest.mark.usefixtures("standard_promotion")


PARAMS = {"w": jnp.linspace(-1.0, 1.0, 6).reshape(2, 3), "b": jnp.ones(3)}
PARAMS16 = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
CLIP = optax.clip_by_global_norm(1.0)
RATE = optax.linear_schedule(1e-2, 0.0, 100)
SCHEDULED = AdEMAMix(
    RATE,
    b3=beta3_scheduler(0.99, 0.9, warmup=20),
    alpha=alpha_scheduler(5.0, warmup=20),
)
STATIC = ("b3", "alpha", "weight_decay_mask", "trainable", "state_format")
FUNCTION_STATIC = ("b3_scheduler", "alpha_scheduler", "mask", "mu_dtype")


def every_third(step: Any) -> Any:
    """A schedule of `MultiSteps` whose number rises every three updates."""
    return 1 + step // 3


def inject(*args: Any, static: Any = STATIC, **kwargs: Any) -> Any:
    make = optax.inject_hyperparams(AdEMAMix, static, hyperparam_dtype=jnp.float32)
    return make(*args, **kwargs)


def grads_of(params: Any) -> Any:
    grad = jax.grad(lambda p: sum(jnp.sum(jnp.sin(x) ** 2) for x in jtu.tree_leaves(p)))
    return grad(params)


def train(optim: Any, params: Any, state: Any, steps: int) -> Any:
    @eqx.filter_jit
    def step(params: Any, state: Any) -> Any:
        updates, state = update(optim, grads_of(params), state, params)
        return eqx.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def nested(make: Any) -> dict[str, Any]:
    """An optimizer inside of others, with the number of its steps after six updates."""
    return {
        "chain": (optax.chain(CLIP, make), 6),
        "chain in a chain": (optax.chain(optax.chain(CLIP, make), CLIP), 6),
        "named_chain": (optax.named_chain(("clip", CLIP), ("ours", make)), 6),
        "MultiSteps": (optax.MultiSteps(make, 2), 3),
        "apply_if_finite": (optax.apply_if_finite(make, 3), 6),
        "Compensated": (Compensated(make), 6),
        "Compensated around a chain": (Compensated(optax.chain(CLIP, make)), 6),
        "MultiSteps around Compensated": (optax.MultiSteps(Compensated(make), 2), 3),
    }


SIMPLIFIED = SimplifiedAdEMAMix(RATE, alpha=alpha_scheduler(5.0, warmup=20))
NESTED = nested(SCHEDULED)


#
# Reading
#


@pytest.mark.parametrize("optim,steps", NESTED.values(), ids=NESTED)
def test_reading_a_nested_state(optim: Any, steps: int):
    _, state = train(optim, PARAMS16, init(optim, PARAMS16), 6)
    (inner,) = [x for x in jtu.tree_leaves(state, is_leaf=is_ours) if is_ours(x)]
    assert inner.count == steps
    expected = hyperparams(SCHEDULED, inner)
    assert_trees_close(hyperparams(SCHEDULED, state), expected, 0.0)
    assert_trees_close(eqx.filter_jit(hyperparams)(SCHEDULED, state), expected, 1e-6)
    assert_trees_close(hyperparams(SCHEDULED, jax.device_get(state)), expected, 0.0)
    assert tree_type(decoded(state)) == tree_type(state)
    # The bytes of the report are those of the whole tree.
    rows = [
        [line.split()[:-1] for line in state_report(tree).splitlines()[2:]]
        for tree in (state, inner)
    ]
    for row, alone in zip(*rows, strict=True):
        assert row[: len(alone)] == alone
        assert row[len(alone) :] in ([], ["remainder"], ["int16"])


def is_ours(x: Any) -> bool:
    return isinstance(x, AdEMAMixState | eqx_ademamix.SimplifiedAdEMAMixState)


def test_hyperparams_of_wrappers_of_this_package():
    for optim in (SCHEDULED, SIMPLIFIED):
        wrapped = Compensated(optim)
        state = init(wrapped, PARAMS16)
        expected = hyperparams(optim, state.inner_state)
        assert_trees_close(hyperparams(wrapped, state), expected, 0.0)
    twice = Compensated(Compensated(SCHEDULED))
    with pytest.warns(UserWarning, match="`Compensated` has no effect"):
        state = init(twice, PARAMS16)
    assert hyperparams(twice, state).alpha == 0.0


def test_hyperparams_of_an_ensemble():
    optim = optax.chain(CLIP, SCHEDULED)
    many = jax.tree.map(lambda x: jnp.stack([x, x]), PARAMS)
    states = eqx.filter_vmap(lambda p: init(optim, p))(many)
    h = eqx.filter_vmap(lambda s: hyperparams(SCHEDULED, s))(states)
    assert h.learning_rate.shape == (2,)
    with pytest.raises(ValueError, match=r"state\.count is .* shape \(2,\), but a"):
        hyperparams(SCHEDULED, states)


#
# Injected hyperparameters
#


def test_injected_values_win():
    optim, plain = inject(1e-3, b1=0.8), AdEMAMix(1.0, eps=1e-3)
    state = init(optim, PARAMS)
    state.hyperparams["learning_rate"] = jnp.asarray(0.5)
    for tree in (state, jax.device_get(state), (optax.EmptyState(), state)):
        h = hyperparams(plain, tree)
        assert (h.learning_rate, h.b1) == (0.5, np.float32(0.8))
    assert hyperparams(plain, state.inner_state).learning_rate == 1.0


def test_injected_lr_is_the_learning_rate():
    make = optax.inject_hyperparams(ademamix, FUNCTION_STATIC)
    state = init(make(lr=0.25, b1=0.5), PARAMS)
    h = hyperparams(AdEMAMix(1.0), state)
    assert (h.learning_rate, h.b1) == (0.25, 0.5)


def test_schedules_of_b3_and_alpha_stay():
    """`ademamix` uses its schedulers, and ignores the injected numbers."""
    make = optax.inject_hyperparams(ademamix, FUNCTION_STATIC)
    schedules = dict(b3_scheduler=SCHEDULED.b3, alpha_scheduler=SCHEDULED.alpha)
    optim = make(lr=0.25, **schedules)
    _, state = train(optim, PARAMS, init(optim, PARAMS), 3)
    h = hyperparams(SCHEDULED, state)
    expected = hyperparams(SCHEDULED, state.inner_state)
    assert (h.b3, h.alpha) == (expected.b3, expected.alpha)
    assert (h.learning_rate, expected.learning_rate) == (0.25, RATE(3))
    # Without a schedule in `optim`, the injected numbers are used.
    h = hyperparams(AdEMAMix(1.0, b3=0.5, alpha=1.0), state)
    assert (h.b3, h.alpha) == (np.float32(0.9999), 5.0)


def test_injected_schedules_are_those_of_the_next_step():
    static = ("b3", "weight_decay_mask", "trainable", "state_format")
    optim = inject(RATE, static=static, alpha=SCHEDULED.alpha)
    ours = AdEMAMix(RATE, alpha=SCHEDULED.alpha)
    state = init(optim, PARAMS)
    for _ in range(3):
        now = hyperparams(ours, state)
        _, state = update(optim, PARAMS, state, PARAMS)
        used = state.hyperparams  # by the last step
        assert (now.learning_rate, now.alpha) == (used["learning_rate"], used["alpha"])
        assert hyperparams(AdEMAMix(1.0), state).learning_rate == now.learning_rate


def test_inner_injections_win():
    def outer(learning_rate: Any, b1: Any) -> Any:
        return optax.chain(CLIP, inject(0.125 + 0 * learning_rate))

    state = init(optax.inject_hyperparams(outer)(0.5, 0.75), PARAMS)
    h = hyperparams(AdEMAMix(1.0), state)
    assert (h.learning_rate, h.b1) == (0.125, np.float32(0.9))
    # A state beside ours injects nothing into it.
    scale = optax.inject_hyperparams(optax.scale_by_learning_rate)(0.5)
    state = init(optax.chain(AdEMAMix(1.0), scale), PARAMS)
    assert hyperparams(AdEMAMix(1.0), state).learning_rate == 1.0


@pytest.mark.parametrize("make", (AdEMAMix, ademamix))
def test_an_injected_b1_of_zero_stores_m1(make: Any):
    static = STATIC if make is AdEMAMix else FUNCTION_STATIC
    of = lambda static: optax.inject_hyperparams(make, static)(1e-2, b1=0)
    params, state = train(make(1e-2, b1=0), PARAMS, init(make(1e-2, b1=0), PARAMS), 5)
    assert not jtu.tree_leaves(state.m1)
    for names, has_m1 in ((static, True), ((*static, "b1"), False)):
        ours, state = train(of(names), PARAMS, init(of(names), PARAMS), 5)
        assert bool(jtu.tree_leaves(state.inner_state.m1)) == has_m1
        assert_trees_close(ours, params, 1e-6)


def test_what_optax_finds():
    """`optax.tree` looks into named tuples, and a module is not one."""
    optim = optax.chain(CLIP, AdEMAMix(1e-3))
    state = init(optim, PARAMS)
    assert optax.tree.get(state, "count_m2") is None
    assert optax.tree.get(to_optax(state), "count_m2") == 0
    with pytest.raises(KeyError):
        optax.tree.set(state, count_m2=jnp.asarray(7, jnp.int32))
    where = lambda s: s[1].count_m2
    state = eqx.tree_at(where, state, jnp.asarray(7, jnp.int32))
    assert optax.tree.get(to_optax(state), "count_m2") == 7


#
# From AdamW
#

ADAMW: Any = dict(b1=0.9, b2=0.99, weight_decay=0.1)
# With `alpha=0`, AdEMAMix is AdamW.
AS_ADAMW = AdEMAMix(1e-2, alpha=0.0, **ADAMW)


def pairs() -> dict[str, Any]:
    """Optimizers that contain AdamW, and the same ones with AdEMAMix in its place."""
    adamw = optax.adamw(1e-2, **ADAMW)
    adam, decay = optax.scale_by_adam(0.9, 0.99), optax.add_decayed_weights(0.1)
    scale = optax.scale_by_learning_rate(RATE)
    as_adam = AdEMAMix(-1.0, b1=0.9, b2=0.99, alpha=0.0)
    injected = optax.inject_hyperparams(optax.adamw)(RATE, **ADAMW)
    return {
        "chain": (optax.chain(CLIP, adamw), optax.chain(CLIP, AS_ADAMW)),
        "a schedule beside it": (
            optax.chain(CLIP, adam, decay, scale),
            optax.chain(CLIP, as_adam, decay, scale),
        ),
        "a schedule, once inside": (
            optax.adamw(RATE, **ADAMW),
            optax.chain(as_adam, decay, scale),
        ),
        "a schedule that was injected": (
            injected,
            inject(RATE, alpha=0.0, **ADAMW),
        ),
        "a schedule that was injected, and is not": (
            injected,
            AdEMAMix(RATE, alpha=0.0, **ADAMW),
        ),
        "MultiSteps": (
            optax.MultiSteps(adamw, every_third),
            optax.MultiSteps(AS_ADAMW, every_third),
        ),
    }


@pytest.mark.parametrize("old,new", pairs().values(), ids=pairs())
def test_a_chain_switches_in_the_middle(old: Any, new: Any):
    params, opt_state = train(old, PARAMS, init(old, PARAMS), 9)
    expected, _ = train(old, params, opt_state, 6)
    blank = init(new, params)
    for tree in (opt_state, jax.device_get(opt_state)):
        state = from_adamw(tree, new, params)
        assert tree_type(state) == tree_type(blank)
        ours, _ = train(new, params, state, 6)
        assert_trees_close(ours, expected, 1e-5)
    jitted = eqx.filter_jit(from_adamw)(opt_state, new, params)
    assert_trees_close(jitted, state, 0.0)
    every = [x for tree in (opt_state, state) for x in buffers(tree)]
    assert len(set(every)) == len(every)


def test_a_16_bit_run_switches_in_the_middle():
    adamw = optax.adamw(1e-2, **ADAMW)
    params, opt_state = train(adamw, PARAMS16, init(adamw, PARAMS16), 9)
    assert opt_state[0].mu["w"].dtype == jnp.bfloat16
    new, theirs = Compensated(AS_ADAMW), Compensated(adamw)
    state = from_adamw(opt_state, new, params)
    assert type(state) is CompensatedState
    assert tree_type(state) == tree_type(init(new, params))
    assert state.inner_state.m1["w"].dtype == jnp.float32
    assert state.inner_state.count == 9 and state.count == 0
    np.testing.assert_array_equal(state.inner_state.m1["w"], opt_state[0].mu["w"])
    # AdamW under `Compensated`, with the same moments.
    blank = init(theirs, params)
    wide = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)
    adam = opt_state[0]._replace(mu=wide(opt_state[0].mu), nu=wide(opt_state[0].nu))
    other = eqx.tree_at(lambda s: s.inner_state[0], blank, adam)
    expected, other = train(theirs, params, other, 9)
    ours, state = train(new, params, state, 9)
    assert_trees_close(ours, expected, 0.0)
    master = new.master_params(ours, state)
    assert_trees_close(master, theirs.master_params(expected, other), 1e-5)
    # From there on, the remainders continue.
    for optim in (new, Compensated(optax.chain(CLIP, AS_ADAMW))):
        again = from_adamw(other, optim, expected)
        assert tree_type(again) == tree_type(init(optim, expected))
        assert_trees_close(again.remainder, other.remainder, 0.0)
        assert again.count == 9
    again = from_adamw(other, Compensated(AS_ADAMW, bits=8), expected)
    assert not any(jnp.any(x) for x in jtu.tree_leaves(again.remainder))


def test_the_counters_of_schedules():
    scale = optax.scale_by_schedule(RATE)
    adam = optax.scale_by_adam()
    new = optax.chain(scale, AdEMAMix(1e-3), scale)

    def counts(old: Any) -> Any:
        _, opt_state = train(old, PARAMS, init(old, PARAMS), 4)
        opt_state = jax.tree.map(lambda x: x, opt_state)
        state = from_adamw(opt_state, new, PARAMS)
        return [int(state[0].count), int(state[2].count)]

    assert counts(optax.chain(adam)) == [4, 4]  # Adam's own
    assert counts(optax.chain(adam, scale)) == [4, 4]  # one for both
    old = optax.chain(scale, adam, scale)
    state: Any = init(old, PARAMS)
    put = lambda *values: [
        x._replace(count=jnp.asarray(n, jnp.int32))
        for x, n in zip(state, values, strict=True)
    ]
    two = from_adamw(tuple(put(3, 5, 7)), new, PARAMS)
    assert [x.count for x in two] == [3, 5, 7]  # in order
    one = optax.chain(AdEMAMix(1e-3), scale)
    assert from_adamw(tuple(put(3, 5, 3)), one, PARAMS)[1].count == 3
    with pytest.raises(ValueError, match=r"2 counters `ScaleBySchedule.*\(3, 7\), but"):
        from_adamw(tuple(put(3, 5, 7)), one, PARAMS)
    with pytest.raises(ValueError, match=r"\(traced, traced\), but .* unclear"):
        eqx.filter_jit(from_adamw)(tuple(put(3, 5, 3)), one, PARAMS)


def test_injected_schedules_of_the_slow_average_start_at_the_switch():
    static = ("weight_decay_mask", "trainable", "state_format")
    schedules: Any = dict(b3=SCHEDULED.b3, alpha=SCHEDULED.alpha)
    new = inject(RATE, static=static, **schedules)
    old = optax.inject_hyperparams(optax.adamw)(RATE, **ADAMW)
    params, opt_state = train(old, PARAMS, init(old, PARAMS), 9)
    state = from_adamw(opt_state, new, params)
    counts = {k: int(x.count) for k, x in state.hyperparams_states.items()}
    assert counts == {"learning_rate": 9, "b3": 0, "alpha": 0} and state.count == 9
    plain = AdEMAMix(RATE, **schedules)
    expected, _ = train(plain, params, from_adamw(opt_state, plain, params), 9)
    ours, _ = train(new, params, state, 9)
    assert_trees_close(ours, expected, 1e-5)


def test_shardings_of_a_nested_target():
    devices = np.asarray(jax.devices())
    sharding = NamedSharding(Mesh(devices, ("data",)), PartitionSpec("data", None))
    params = {"w": jax.device_put(jnp.ones((16, 4), jnp.bfloat16), sharding)}
    adamw = optax.adamw(1e-2)
    _, opt_state = jax.jit(adamw.update)(params, adamw.init(params), params)
    optim = Compensated(optax.chain(CLIP, AdEMAMix(1e-2)))
    state = from_adamw(opt_state, optim, params)
    changed = change_state_format(state, optim, params)
    for each in (state, changed):
        moments = [each.remainder, *each.inner_state[1].moments]
        for moment in moments:
            assert moment["w"].sharding.is_equivalent_to(sharding, 2)


#
# From optax and PyTorch
#


def test_from_optax_to_a_chain():
    kwargs: Any = dict(b3=SCHEDULED.b3, alpha=SCHEDULED.alpha)
    theirs = optax.chain(CLIP, optax.contrib.ademamix(RATE, **kwargs))
    scale = optax.scale_by_learning_rate(RATE)
    params, opt_state = train(theirs, PARAMS, init(theirs, PARAMS), 6)
    expected, _ = train(theirs, params, opt_state, 6)
    for new in (
        optax.chain(CLIP, SCHEDULED),
        optax.chain(CLIP, AdEMAMix(-1.0, **kwargs), scale),
        optax.chain(CLIP, inject(RATE, **kwargs)),
    ):
        state = from_optax(opt_state, new, params)
        assert tree_type(state) == tree_type(init(new, params))
        assert_trees_close(train(new, params, state, 6)[0], expected, 1e-5)


def test_from_optax_to_a_simplified_target():
    theirs = optax.contrib.simplified_ademamix(1e-4, alpha=5.0)
    ours = SimplifiedAdEMAMix(1e-4, b1=0.99, b2=0.95, alpha=5.0)
    _, opt_state = train(theirs, PARAMS, init(theirs, PARAMS), 6)
    state: Any = from_optax(opt_state, Compensated(ours), PARAMS16)
    assert_trees_close(state.inner_state, from_optax(opt_state, ours, PARAMS), 0.0)
    with pytest.raises(ValueError, match="`num` is computed from the `b1` of the"):
        from_optax(opt_state, optax.chain(CLIP, ours), PARAMS)


def test_from_torch_to_a_chain():
    zeros = {k: np.ones(3) for k in ("exp_avg", "exp_avg_slow", "exp_avg_sq")}
    state_dict = {"state": {0: {"step": 7, **zeros}}}
    scale = optax.scale_by_schedule(RATE)
    new, params = optax.chain(AdEMAMix(1e-2), scale), {"b": jnp.ones(3)}
    state = from_torch(state_dict, new, params, {"['b']": 0})
    alone = from_torch(state_dict, AdEMAMix(1e-2), params, {"['b']": 0})
    assert tree_type(state) == tree_type(init(new, params))
    assert_trees_close(state[0], alone, 0.0)
    assert state[1].count == 7


#
# Another format
#

HALF = everywhere(StateFormat.half())
FLOAT = StateFormat.float32()
FORMATS = {"float32": FLOAT, "half": HALF, "compact": COMPACT}


@pytest.mark.parametrize("new", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("old", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("make", (AdEMAMix, SimplifiedAdEMAMix))
def test_another_format(make: Any, old: StateFormat, new: StateFormat):
    before = make(1e-2, state_format=old)
    after = make(1e-2, state_format=new)
    params, state = train(before, PARAMS, init(before, PARAMS), 4)
    changed = change_state_format(state, after, params)
    assert tree_type(changed) == tree_type(init(after, params))
    assert_trees_close(decoded(changed), decoded(state), 0.2)
    for name in (*state.counters, *state.weights):
        assert getattr(changed, name) == getattr(state, name)
    every = buffers((state, changed))
    assert len(set(every)) == len(every)
    if old == new:  # bit by bit
        assert_trees_close(changed, state, 0.0)
    update(after, grads_of(params), changed, params)


def test_another_format_of_a_nested_state():
    to = AdEMAMix(1e-2, state_format=COMPACT)
    of = AdEMAMix(1e-2)
    wrap = lambda x: Compensated(optax.chain(optax.scale_by_schedule(RATE), x))
    _, state = train(wrap(of), PARAMS16, init(wrap(of), PARAMS16), 4)
    alone = change_state_format(state.inner_state[1], to, PARAMS)
    for tree in (state, jax.device_get(state)):
        # The optimizer that continues, or the part of it that says the format.
        for optim in (wrap(to), to):
            params = PARAMS if optim is to else PARAMS16
            changed = change_state_format(tree, optim, params)
            assert tree_type(changed) == tree_type(init(wrap(to), PARAMS16))
            assert_trees_close(changed.inner_state[1], alone, 0.0)
            assert_trees_close(changed.remainder, state.remainder, 0.0)
            assert changed.inner_state[0].count == 4
    with_others = (state, 3, "text", None, jax.random.key(0))
    changed = change_state_format(with_others, wrap(to), PARAMS16)
    assert changed[1:4] == (3, "text", None)
    assert jnp.issubdtype(changed[4].dtype, jax.dtypes.prng_key)
    jitted = eqx.filter_jit(change_state_format)(state, wrap(to), PARAMS16)
    assert_trees_close(jitted, changed[0], 0.0)


def test_b1_of_the_new_format():
    with_m1, without = AdEMAMix(1e-2), AdEMAMix(1e-2, b1=0)
    state = init(with_m1, PARAMS)
    dropped = change_state_format(state, without, PARAMS)
    assert tree_type(dropped) == tree_type(init(without, PARAMS))
    again = change_state_format(dropped, without, PARAMS)
    assert_trees_close(again, dropped, 0.0)
    with pytest.raises(ValueError, match=r"`state` has no `m1`, since .* `b1=0`"):
        change_state_format(dropped, with_m1, PARAMS)


@pytest.mark.parametrize("b3", (0.99, beta3_scheduler(0.99, 0.5, warmup=10)))
def test_bias_correction_of_m2(b3: Any):
    """`m2_weight` appears and disappears with `bias_correct_m2`."""
    plain = AdEMAMix(1e-2, b3=b3)
    corrected = AdEMAMix(1e-2, b3=b3, bias_correct_m2=True)
    _, without = train(plain, PARAMS, init(plain, PARAMS), 20)
    _, kept = train(corrected, PARAMS, init(corrected, PARAMS), 20)
    added = change_state_format(without, corrected, PARAMS)
    assert tree_type(added) == tree_type(kept)
    np.testing.assert_allclose(added.m2_weight, kept.m2_weight, rtol=1e-6)
    assert_trees_close(change_state_format(kept, corrected, PARAMS), kept, 0.0)
    dropped = change_state_format(kept, plain, PARAMS)
    assert tree_type(dropped) == tree_type(without)
    theirs = from_optax(to_optax(without), corrected, PARAMS)
    assert_trees_close(theirs, added, 0.0)
    fresh = from_adamw(ADAM_STATE, Compensated(corrected), PARAMS16)
    assert fresh.inner_state.m2_weight == 0.0
    with pytest.raises(ValueError, match="`m2_weight` is computed from the `b3`"):
        change_state_format(without, optax.chain(corrected), PARAMS)


def test_frozen_and_complex_leaves():
    params = {"c": jnp.ones((2, 3), jnp.complex64), "w": jnp.ones(3), "n": 3}
    trainable = {"c": True, "w": False, "n": False}
    of = AdEMAMix(1e-2, trainable=trainable)
    to = AdEMAMix(1e-2, trainable=trainable, state_format=COMPACT)
    grads = {"c": jnp.full((2, 3), 1 + 2j, jnp.complex64), "w": None, "n": None}
    _, state = update(of, grads, init(of, params), params)
    changed = change_state_format(state, to, params)
    assert tree_type(changed) == tree_type(init(to, params))
    assert_trees_close(decoded(changed).m2, state.m2, 1e-3)


def test_the_mean_of_two_encoded_states():
    optim = AdEMAMix(1e-2, state_format=COMPACT)
    params = {"w": jax.random.normal(jax.random.key(0), (4, 256))}
    states = [
        train(optim, jax.tree.map(lambda x, s=s: s * x, params), init(optim, params), 3)
        for s in (1, 2)
    ]
    first, second = (decoded(state) for _, state in states)
    of = lambda x, y: (x + y) / 2 if eqx.is_inexact_array(x) else x
    mean = jax.tree.map(of, first, second)
    encoded = change_state_format(mean, optim, params)
    assert tree_type(encoded) == tree_type(init(optim, params))
    np.testing.assert_allclose(
        decoded(encoded).m2["w"], mean.m2["w"], rtol=0, atol=1e-3 * 0.03
    )
    update(optim, grads_of(params), encoded, params)


#
# Errors
#

OURS = AdEMAMix(1e-3)
TWICE = optax.partition(
    {"w": AdEMAMix(1e-3), "b": AdEMAMix(1e-3)}, {"w": "w", "b": "b"}
)
ADAM: Any = optax.adam(1e-3)
ADAM_STATE = init(ADAM, PARAMS)


def donated() -> None:
    opt_state: Any = init(optax.adamw(RATE), PARAMS)
    opt_state[2].count.delete()
    from_adamw(opt_state, optax.chain(OURS, optax.scale_by_schedule(RATE)), PARAMS)


ERRORS: dict[str, Any] = {
    "hyperparams of a chain": (
        lambda: hyperparams(optax.chain(CLIP, OURS), None),
        "`optim` is a `GradientTransformationExtraArgs`, but an optimizer of this "
        "package was expected. Pass the optimizer of this package that it contains",
    ),
    "hyperparams of Compensated around a chain": (
        lambda: hyperparams(Compensated(optax.chain(CLIP, OURS)), None),
        "`optim` is a `Compensated` around a `GradientTransformationExtraArgs`, but",
    ),
    "hyperparams without a state": (
        lambda: hyperparams(OURS, ADAM_STATE),
        "`state` has no states of AdEMAMix, but one was expected. Found in it: "
        "ScaleByAdamState, EmptyState",
    ),
    "hyperparams of two states": (
        lambda: hyperparams(OURS, init(TWICE, PARAMS)),
        "`state` has 2 states of AdEMAMix, but one was expected. Found in it: "
        "PartitionState, MaskedState, AdEMAMixState",
    ),
    "hyperparams of the other optimizer": (
        lambda: hyperparams(OURS, init(Compensated(SIMPLIFIED), PARAMS16)),
        "no states of AdEMAMix, .* CompensatedState, SimplifiedAdEMAMixState",
    ),
    "decoded without a state": (
        lambda: decoded(ADAM_STATE),
        "`state` has no states of AdEMAMix, but at least one was expected. Found in "
        "it: ScaleByAdamState",
    ),
    "report without a state": (
        lambda: state_report(init(Compensated(optax.adam(1e-3)), PARAMS16)),
        "no states of AdEMAMix, .* CompensatedState, ScaleByAdamState",
    ),
    "a target without ours": (
        lambda: from_adamw(ADAM_STATE, optax.chain(CLIP, ADAM), PARAMS),
        "`optim` is a `GradientTransformationExtraArgs`, whose state has no states of "
        "AdEMAMix, but one was expected. Found in it: EmptyState, ScaleByAdamState",
    ),
    "a target with two": (
        lambda: from_adamw(ADAM_STATE, TWICE, PARAMS),
        "whose state has 2 states of AdEMAMix, .* PartitionState, MaskedState",
    ),
    "a simplified target": (
        lambda: from_adamw(ADAM_STATE, SIMPLIFIED, PARAMS),
        "`optim` is a `SimplifiedAdEMAMix`, whose state has no states of AdEMAMix",
    ),
    "from optax to a target without ours": (
        lambda: from_optax(ADAM_STATE, ADAM, PARAMS),
        "whose state has no states of this package, .* ScaleByAdamState",
    ),
    "a target that is not an optimizer": (
        lambda: from_adamw(ADAM_STATE, PARAMS, PARAMS),
        "`optim` is a dict with the keys .*, but an optimizer",
    ),
    "a donated counter": (
        donated,
        r"opt_state: ScaleByScheduleState\.count has been deleted",
    ),
    "another format without a state": (
        lambda: change_state_format(ADAM_STATE, OURS, PARAMS),
        "`state` has no states of AdEMAMix, .* ScaleByAdamState",
    ),
    "another format of the other optimizer": (
        lambda: change_state_format(init(OURS, PARAMS), SIMPLIFIED, PARAMS),
        "`state` has no states of SimplifiedAdEMAMix, .* in it: AdEMAMixState",
    ),
    "another format of another model": (
        lambda: change_state_format(
            init(OURS, PARAMS), OURS, {**PARAMS, "w": jnp.ones(3)}
        ),
        r"state.m1\['w'\] has shape \(2, 3\), but the state of `optim` has \(3,\)",
    ),
    "another format after arithmetic on counters": (
        lambda: change_state_format(
            jax.tree.map(lambda x: x / 2, init(OURS, PARAMS)), OURS, PARAMS
        ),
        r"state.count is a float32 array of shape \(\), but an int32 array",
    ),
}


@pytest.mark.parametrize("call,text", ERRORS.values(), ids=ERRORS.keys())
def test_one_sentence(call: Any, text: str):
    with pytest.raises((ValueError, TypeError), match=text) as info:
        call()
    assert len(str(info.value)) < 600


def test_simplified_function_inside_inject():
    make = optax.inject_hyperparams(simplified_ademamix, "mask")
    _, state = train(make(1e-4, 0.9), PARAMS, init(make(1e-4, 0.9), PARAMS), 2)
    h = hyperparams(SimplifiedAdEMAMix(1.0), state)
    assert (h.learning_rate, h.b1) == (np.float32(1e-4), np.float32(0.9))
