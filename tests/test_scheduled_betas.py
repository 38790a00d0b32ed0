"""Schedules for `b1` and `b2`: the bias corrections, the state, and conversions."""
# pyright: reportArgumentType=false, reportCallIssue=false

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eqx_ademamix
from eqx_ademamix import (
    AdEMAMix,
    Compensated,
    SimplifiedAdEMAMix,
    StateFormat,
    beta3_scheduler,
    change_state_format,
    from_adamw,
    from_optax,
    hyperparams,
    init,
    load,
    log_time_beta_scheduler,
    save,
    update,
)

from .helpers import count_traces, everywhere, tree_type, x64


INT32_MAX = 2**31 - 1
LOG_TIME = log_time_beta_scheduler(8.0)
LATER = log_time_beta_scheduler(3.0, offset=1)
WARMUP = beta3_scheduler(0.99, 0.5, warmup=8)
GRADS = [np.sin(np.arange(1.0, 4.0) * (t + 1)) for t in range(12)]


def optimizer(**fields: Any) -> AdEMAMix:
    return AdEMAMix(**{"learning_rate": 0.1, "alpha": 2.0, "b3": 0.99, **fields})


def beta(b: Any, t: int) -> float:
    return 1 - float(b.complement(t)) if hasattr(b, "complement") else b


def reference(b1: Any, b2: Any, steps: int) -> tuple[np.ndarray, float, float]:
    """The last direction in float64, and the weights of `m1` and `nu`."""
    m1, m2, nu, w1, w2 = np.zeros(3), np.zeros(3), np.zeros(3), 0.0, 0.0
    for t, g in enumerate(GRADS[:steps]):
        c1, c2 = 1 - beta(b1, t), 1 - beta(b2, t)
        m1, nu = m1 + c1 * (g - m1), nu + c2 * (g**2 - nu)
        w1, w2, m2 = w1 + c1 * (1 - w1), w2 + c2 * (1 - w2), m2 + 0.01 * (g - m2)
    return (m1 / w1 + 2.0 * m2) / (np.sqrt(nu / w2) + 1e-8), w1, w2


def run(optim: Any, steps: int, state: Any = None) -> tuple[Any, Any]:
    p, updates = jnp.zeros(3), None
    state = init(optim, p) if state is None else state
    for g in GRADS[:steps]:
        updates, state = update(optim, jnp.asarray(g, p.dtype), state, p)
    return updates, state


@pytest.mark.parametrize(
    "b1,b2",
    (
        (LOG_TIME, LOG_TIME),
        (LATER, 0.999),
        (0.9, LATER),
        (WARMUP, lambda t: 0.9),
        (lambda t: 0.3, LATER),
    ),
)
def test_against_the_reference(b1: Any, b2: Any):
    as_complement: Any = lambda b: (
        b if hasattr(b, "complement") or not callable(b) else b(0)
    )
    for steps in (1, 2, 12):
        updates, state = run(optimizer(b1=b1, b2=b2), steps)
        direction, w1, w2 = reference(as_complement(b1), as_complement(b2), steps)
        np.testing.assert_allclose(updates, -0.1 * direction, rtol=2e-5, atol=1e-6)
        for weight, expected, b in (
            (state.m1_weight, w1, b1),
            (state.nu_weight, w2, b2),
        ):
            if callable(b):
                np.testing.assert_allclose(weight, expected, rtol=1e-6)
            else:
                assert weight is None


def test_the_weight_is_one_minus_the_product():
    _, state = run(optimizer(b1=WARMUP), 10)
    product = np.prod([beta(WARMUP, t) for t in range(10)])
    np.testing.assert_allclose(state.m1_weight, 1 - product, rtol=1e-6)


def test_a_constant_gradient_gives_the_direction_one():
    """At every step, whatever the decays are: the averages are unbiased."""
    optim = AdEMAMix(1.0, b1=WARMUP, b2=LATER, alpha=0.0)
    p = jnp.asarray(0.0)
    state = init(optim, p)
    for _ in range(5):
        updates, state = update(optim, jnp.asarray(3.0), state, p)
        np.testing.assert_allclose(updates, -1.0, rtol=1e-6)


def test_a_constant_schedule_is_the_constant():
    constant = optimizer(b1=0.9, b2=0.99)
    scheduled = optimizer(b1=lambda t: 0.9, b2=lambda t: 0.99)
    for steps in (1, 7):
        (x, _), (y, state) = run(constant, steps), run(scheduled, steps)
        np.testing.assert_allclose(x, y, rtol=1e-5)
        np.testing.assert_allclose(state.m1_weight, 1 - 0.9**steps, rtol=1e-6)


def test_without_schedules_nothing_changes():
    """No array more in the state, and no equation more in the step."""
    optim, p = optimizer(), jnp.zeros(3)
    state = init(optim, p)
    assert state.m1_weight is None and state.nu_weight is None
    assert len(jax.tree.leaves(state)) == 5
    lines = str(jax.make_jaxpr(lambda g, s: update(optim, g, s, p))(p, state))
    assert lines.count("expm1") == 2  # the two bias corrections
    scheduled = optimizer(b1=LOG_TIME, b2=LOG_TIME)
    state = init(scheduled, p)
    assert len(jax.tree.leaves(state)) == 7
    lines = str(jax.make_jaxpr(lambda g, s: update(scheduled, g, s, p))(p, state))
    assert lines.count("expm1") == 0


def test_types_traces_and_the_last_counter():
    optim, p = optimizer(b1=LOG_TIME, b2=LATER, b3=LOG_TIME), jnp.ones(3)
    state: Any = init(optim, p)
    assert state.m1_weight.dtype == state.nu_weight.dtype == jnp.float32
    counted, traces = count_traces(lambda g, s: update(optim, g, s, p))
    step = jax.jit(counted)
    _, after = step(p, state)
    assert tree_type(after) == tree_type(state)
    last = jnp.asarray(INT32_MAX, jnp.int32)
    late = eqx.tree_at(lambda s: (s.count, s.count_m2), after, (last, last))
    updates, final = step(p, late)
    assert len(traces) == 1
    assert np.isfinite(updates).all() and final.count == INT32_MAX
    h = hyperparams(optim, late)
    assert h.b1 == 1.0 and h.b2 == 1.0  # rounded: 1 - b1 is 4e-9
    assert float(final.m1_weight) == 1.0


def test_float64():
    with x64():
        updates, state = run(optimizer(b1=LOG_TIME, b2=LATER), 12)
        assert state.m1_weight.dtype == jnp.float64
        direction, _, w2 = reference(LOG_TIME, LATER, 12)
        np.testing.assert_allclose(updates, -0.1 * direction, rtol=1e-12)
        np.testing.assert_allclose(state.nu_weight, w2, rtol=1e-14)


def test_batched_and_traced():
    def last(delta: jax.Array) -> jax.Array:
        return run(optimizer(b1=log_time_beta_scheduler(delta), b2=LATER), 3)[0]

    deltas = jnp.asarray([3.0, 8.0])
    both = jax.jit(jax.vmap(last))(deltas)
    for update_of_one, delta in zip(both, (3.0, 8.0), strict=True):
        direction, *_ = reference(log_time_beta_scheduler(delta), LATER, 3)
        np.testing.assert_allclose(update_of_one, -0.1 * direction, rtol=1e-5)


def test_in_wrappers_formats_and_chains():
    p, g = jnp.ones((64, 64), jnp.bfloat16), jnp.ones((64, 64), jnp.bfloat16)
    compact = everywhere(StateFormat.compact())
    inner = optimizer(b1=LOG_TIME, b2=LATER, state_format=compact, weight_decay=0.1)
    for optim in (inner, Compensated(inner), optax.chain(optax.identity(), inner)):
        state = init(optim, p)
        for _ in range(2):
            types = tree_type(state)
            updates, state = update(optim, g, state, p)
            assert tree_type(state) == types
            assert np.isfinite(np.asarray(updates, np.float32)).all()


def test_simplified():
    """A scheduled `b2`. `num` takes care of `b1` already."""
    optim = SimplifiedAdEMAMix(1.0, b1=WARMUP, b2=LATER, normalize=True)
    p = jnp.asarray(0.0)
    state = init(optim, p)
    for t in range(4):
        updates, state = update(optim, jnp.asarray(-2.0), state, p)
        np.testing.assert_allclose(updates, 1.0, rtol=1e-6)
        weight = 1 - np.prod([beta(LATER, i) for i in range(t + 1)])
        np.testing.assert_allclose(state.nu_weight, weight, rtol=1e-6)
    assert init(SimplifiedAdEMAMix(1.0), p).nu_weight is None


#
# Conversions and files
#


def test_from_adamw():
    adamw, p = optax.adamw(0.1), jnp.ones(3)
    opt_state = adamw.init(p)
    with jax.numpy_dtype_promotion("standard"):
        for g in GRADS[:5]:
            _, opt_state = adamw.update(jnp.asarray(g, p.dtype), opt_state, p)
    optim = optimizer(b1=WARMUP, b2=LATER, bias_correct_m2=True)
    state = from_adamw(opt_state, optim, p)
    _, own = run(optim, 5)
    np.testing.assert_allclose(state.m1_weight, own.m1_weight, rtol=1e-6)
    np.testing.assert_allclose(state.nu_weight, own.nu_weight, rtol=1e-6)
    assert state.m2_weight == 0.0 and state.count == 5
    _, after = update(optim, p, state, p)
    assert tree_type(after) == tree_type(state)
    # As before, a chain around an optimizer with constant decays can be converted.
    chain = optax.chain(optimizer(bias_correct_m2=True))
    assert from_adamw(opt_state, chain, p)[0].m2_weight == 0.0
    with pytest.raises(ValueError, match="`m1_weight` is computed from the `b1` of"):
        from_adamw(opt_state, optax.chain(optimizer(b1=WARMUP)), p)


def test_from_optax_and_back():
    _, state = run(optimizer(), 6)
    theirs = eqx_ademamix.to_optax(state)
    optim = optimizer(b1=LATER, b2=WARMUP)
    ours = from_optax(theirs, optim, jnp.zeros(3))
    _, own = run(optim, 6)
    np.testing.assert_allclose(ours.m1_weight, own.m1_weight, rtol=1e-6)
    np.testing.assert_allclose(ours.nu_weight, own.nu_weight, rtol=1e-6)


def test_from_torch():
    zeros = np.zeros(3, np.float32)
    moments = {"exp_avg_fast": zeros, "exp_avg_slow": zeros, "exp_avg_sq": zeros}
    state_dict = {"state": {0: {"step": 7, **moments}}, "param_groups": []}
    optim = optimizer(b1=LATER)
    state = eqx_ademamix.from_torch(state_dict, optim, {"w": zeros}, {"['w']": 0})
    np.testing.assert_allclose(state.m1_weight, run(optim, 7)[1].m1_weight, rtol=1e-6)


def test_change_state_format_adds_and_drops_weights():
    p = jnp.zeros(3)
    constant, scheduled = optimizer(), optimizer(b1=LATER, b2=LOG_TIME)
    _, old = run(constant, 4)
    with pytest.raises(
        ValueError, match="Were `bias_correct_m2`, `b1` or `b2` different"
    ):
        update(scheduled, p, old, p)
    new = change_state_format(old, scheduled, p)
    _, own = run(scheduled, 4)
    np.testing.assert_allclose(new.m1_weight, own.m1_weight, rtol=1e-6)
    np.testing.assert_allclose(new.nu_weight, own.nu_weight, rtol=1e-6)
    update(scheduled, p, new, p)
    back = change_state_format(new, constant, p)
    assert back.m1_weight is None and back.nu_weight is None
    simplified = SimplifiedAdEMAMix(1.0, b2=LATER)
    plain = init(SimplifiedAdEMAMix(1.0), p)
    assert change_state_format(plain, simplified, p).nu_weight == 0.0


@pytest.mark.parametrize(
    "fmt", (StateFormat.float32(), everywhere(StateFormat.compact()))
)
def test_constant_decays_after_schedules(fmt: StateFormat):
    """The corrected moments stay, though the weights by which they are divided do
    not."""
    scheduled = optimizer(b1=LATER, b2=LOG_TIME, bias_correct_m2=True)
    _, state = run(scheduled, 7)
    constant = optimizer(b1=0.9, b2=0.999, state_format=fmt)
    new = change_state_format(state, constant, jnp.zeros(3))
    assert tree_type(new) == tree_type(init(constant, jnp.zeros(3)))
    found, rtol = (
        eqx_ademamix.decoded(new),
        1e-6 if fmt == StateFormat.float32() else 0.1,
    )
    m1, nu = state.m1 / state.m1_weight, state.nu / state.nu_weight
    np.testing.assert_allclose(found.m1 / (1 - 0.9**7), m1, rtol)
    np.testing.assert_allclose(found.nu / (1 - 0.999**7), nu, rtol)
    fresh = change_state_format(init(scheduled, jnp.zeros(3)), constant, jnp.zeros(3))
    assert not eqx_ademamix.decoded(fresh).nu.any()


def test_constant_decays_without_m1():
    _, state = run(optimizer(b1=LATER, b2=LOG_TIME), 7)
    without = optimizer(b1=0.0)
    new = change_state_format(state, without, jnp.zeros(3))
    assert tree_type(new) == tree_type(init(without, jnp.zeros(3)))


def test_optax_after_schedules(standard_promotion: Any):
    g, p = jnp.asarray(GRADS[7], jnp.float32), jnp.zeros(3)
    _, state = run(optimizer(b1=LATER, b2=LOG_TIME), 7)
    optim = optimizer(b1=0.9, b2=0.999)
    constant = change_state_format(state, optim, p)
    expected, _ = update(optim, g, constant, p)
    theirs: Any = optax.contrib.ademamix(0.1, b1=0.9, b2=0.999, b3=0.99, alpha=2.0)
    opt_state = (eqx_ademamix.to_optax(constant), *theirs.init(p)[1:])
    np.testing.assert_allclose(theirs.update(g, opt_state, p)[0], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "to", "name"),
    (
        ({"b1": LATER}, "to_optax", "m1_weight"),
        ({"b1": LATER}, "to_adamw", "m1_weight"),
        ({"b2": LATER}, "to_optax", "nu_weight"),
        ({"b2": LATER}, "to_adamw", "nu_weight"),
        ({"bias_correct_m2": True}, "to_optax", "m2_weight"),
    ),
)
def test_optax_has_no_weights(fields: Any, to: str, name: str):
    """It would divide by others, and the steps would be too short or too long."""
    state = init(optimizer(**fields), jnp.zeros(3))
    text = f"^`state` has `{name}`, which optax's optimizers do not keep"
    with pytest.raises(ValueError, match=text):
        getattr(eqx_ademamix, to)(state)
    without = change_state_format(state, optimizer(), jnp.zeros(3))
    getattr(eqx_ademamix, to)(without)


def test_optax_has_no_weights_of_simplified():
    p, scheduled = jnp.zeros(3), SimplifiedAdEMAMix(1.0, b2=LATER)
    _, state = run(scheduled, 5)
    with pytest.raises(ValueError, match=r"^`state` has `nu_weight`, which optax's"):
        eqx_ademamix.to_optax(state)
    new = change_state_format(state, SimplifiedAdEMAMix(1.0, b2=0.9), p)
    nu = eqx_ademamix.to_optax(new).n
    np.testing.assert_allclose(nu / (1 - 0.9**5), state.nu / state.nu_weight, 1e-6)
    # AdamW has no slow average, so its weight does not matter there.
    eqx_ademamix.to_adamw(init(optimizer(bias_correct_m2=True), p))


def test_save_and_load(tmp_path: Any):
    optim = optimizer(b1=LOG_TIME, b2=LATER, b3=LOG_TIME)
    _, state = run(optim, 3)
    save(tmp_path / "run", state, optim=optim)
    blank = init(optim, jnp.zeros(3))
    loaded = load(tmp_path / "run", blank, optim=optim)
    assert eqx.tree_equal(loaded, state)
    other = optimizer(b1=log_time_beta_scheduler(9.0), b2=LATER, b3=LOG_TIME)
    with pytest.raises(ValueError, match=r"optim\.b1\.delta is 8.*, but 9"):
        load(tmp_path / "run", blank, optim=other)
    with pytest.raises(ValueError, match="has another structure"):
        load(tmp_path / "run", init(optimizer(), jnp.zeros(3)))
