"""Options of the rule: each against a float64 reference, and nothing when it is off."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import pytest

from eqx_ademamix import (
    AdEMAMix,
    AdEMAMixState,
    SimplifiedAdEMAMix,
    StateFormat,
    beta3_scheduler,
    hyperparams,
    init,
    path_scales,
    update,
)

from .helpers import COMPACT, make_mlp, reference_b3, tree_type, x64


STEPS, WARMUP = 60, 40
SHAPE = (3, 4)
RATES = np.array([1.0, 0.5, -0.25])[:, None]  # for the three rows
PER_STEP = 1e-3


def gradients(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(STEPS, *SHAPE)).astype(np.float32)


def reference(
    start: np.ndarray,
    *,
    b3: Any = lambda t: 0.9999,
    weight_decay: Any = lambda count: 0.0,
    is_corrected: bool = False,
    is_decoupled: bool = False,
    scale: Any = 1.0,
    simplified: bool = False,
) -> tuple[list[np.ndarray], float]:
    """The updates in float64, and the weight of `m2` at the end."""
    p, m1, m2, nu, product = start.astype(np.float64), 0.0, 0.0, 0.0, 1.0
    updates = []
    for count, g in enumerate(gradients().astype(np.float64)):
        t, b = count + 1, b3(count)
        product *= b
        m1, nu = 0.9 * m1 + 0.1 * g, 0.999 * nu + 0.001 * g**2
        m2 = 0.9 * m2 + g if simplified else b * m2 + (1 - b) * g
        m2_hat = m2 / (1 - product) if is_corrected else m2
        numerator = m2 + 5 * g if simplified else m1 / (1 - 0.9**t) + 5 * m2_hat
        u = numerator / (np.sqrt(nu / (1 - 0.999**t)) + 1e-8)
        decay = weight_decay(count) * p
        coupled, alone = (0.0, decay) if is_decoupled else (decay, 0.0)
        updates.append(-1e-2 * scale * (u + coupled) - alone)
        p = p + updates[-1]
    return updates, 1 - product


def linear(count: Any) -> Any:
    return PER_STEP * (1.0 + jnp.asarray(count).astype(float))


SCHEDULE: Any = dict(b3=beta3_scheduler(0.9999, 0.9, warmup=WARMUP))
SCALE: Any = dict(learning_rate_scale={"w": RATES[:, 0]})
THEIR_SCHEDULE: Any = dict(b3=lambda count: reference_b3(count, 0.9999, 0.9, WARMUP))
THEIR_DECAY: Any = dict(weight_decay=lambda count: PER_STEP * (1 + count))
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "m2 corrected": (dict(bias_correct_m2=True), dict(is_corrected=True)),
    "m2 corrected, scheduled": (
        dict(bias_correct_m2=True, **SCHEDULE),
        dict(is_corrected=True, **THEIR_SCHEDULE),
    ),
    "coupled, scheduled": (dict(weight_decay=linear), THEIR_DECAY),
    "decoupled": (
        dict(decoupled_weight_decay=True, weight_decay=0.05),
        dict(is_decoupled=True, weight_decay=lambda count: 0.05),
    ),
    "decoupled, scheduled": (
        dict(decoupled_weight_decay=True, weight_decay=linear),
        dict(is_decoupled=True, **THEIR_DECAY),
    ),
    "scale and coupled": (
        SCALE | dict(weight_decay=linear),
        dict(scale=RATES) | THEIR_DECAY,
    ),
    "scale and decoupled": (
        SCALE | dict(weight_decay=linear, decoupled_weight_decay=True),
        dict(scale=RATES, is_decoupled=True) | THEIR_DECAY,
    ),
    "all": (
        SCALE
        | SCHEDULE
        | dict(weight_decay=linear, decoupled_weight_decay=True, bias_correct_m2=True),
        dict(scale=RATES, is_decoupled=True, is_corrected=True)
        | THEIR_DECAY
        | THEIR_SCHEDULE,
    ),
}


def run(optim: Any, start: Any) -> tuple[np.ndarray, Any]:
    params, traces = {"w": jnp.asarray(start)}, []
    state, updates = init(optim, params), []

    @eqx.filter_jit
    def step(optim: Any, grads: Any, state: Any, params: Any) -> Any:
        traces.append(1)
        updates, state = update(optim, grads, state, params)
        return updates, state, eqx.apply_updates(params, updates)

    before = tree_type(state)
    for g in gradients():
        u, state, params = step(
            optim, {"w": jnp.asarray(g, start.dtype)}, state, params
        )
        updates.append(np.asarray(u["w"]))
    assert tree_type(state) == before and len(traces) == 1
    return np.stack(updates), state


def deviation(found: np.ndarray, expected: list[np.ndarray]) -> float:
    scale = np.max(np.abs(expected), axis=(1, 2), keepdims=True)
    return float(np.max(np.abs(found - expected) / scale))


@pytest.mark.parametrize("case", CASES)
def test_against_float64(case: str):
    ours, theirs = CASES[case]
    start = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)
    expected, weight = reference(start, **theirs)
    found, state = run(AdEMAMix(1e-2, **ours), start)
    assert deviation(found, expected) < 1e-5
    if "bias_correct_m2" in ours:
        assert state.m2_weight == pytest.approx(weight, rel=1e-6)
    with x64():
        found, state = run(AdEMAMix(1e-2, **ours), start.astype(np.float64))
        assert deviation(found, expected) < 1e-12
        if "bias_correct_m2" in ours:
            assert state.m2_weight == pytest.approx(weight, rel=1e-13)


@pytest.mark.parametrize("case", [x for x in CASES if "m2" not in x and x != "all"])
def test_simplified_against_float64(case: str):
    ours, theirs = CASES[case]
    start = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)
    expected, _ = reference(start, simplified=True, **theirs)
    optim = SimplifiedAdEMAMix(1e-2, 0.9, 0.999, 5.0, **ours)
    assert deviation(run(optim, start)[0], expected) < 1e-5


#
# bias_correct_m2
#


def test_the_weight_keeps_its_digits():
    """At the first step it is 1 - b3. The product itself is 0.9999 in float32, and one
    minus that is off by 1.7e-4."""
    optim, params = AdEMAMix(1.0, alpha=1.0, bias_correct_m2=True), jnp.ones(3)
    state = init(optim, params)
    assert state.m2_weight is not None and state.m2_weight.dtype == jnp.float32
    assert state.m2_weight == 0.0
    updates, state = update(optim, params, state, params)
    assert state.m2_weight == np.float32(1 - 0.9999)
    assert abs(1 - np.float32(0.9999) - (1 - 0.9999)) / (1 - 0.9999) > 1.6e-4
    # Both averages are then the gradient: -(1 + alpha) learning rates.
    assert np.allclose(updates, -2.0, rtol=1e-6)


def test_a_constant_gradient_moves_by_1_plus_alpha():
    optim, params = AdEMAMix(1.0, **SCHEDULE, bias_correct_m2=True), jnp.ones(3)
    state = init(optim, params)
    for _ in range(50):
        updates, state = update(optim, params, state, params)
        assert np.allclose(updates, -6.0, rtol=2e-6)


def test_off_there_is_no_weight():
    params = make_mlp()
    off, on = (init(AdEMAMix(1e-3, bias_correct_m2=x), params) for x in (False, True))
    assert off.m2_weight is None
    assert len(jtu.tree_leaves(on)) == len(jtu.tree_leaves(off)) + 1
    assert (
        AdEMAMixState(off.count, off.count_m2, off.m1, off.m2, off.nu).m2_weight is None
    )


@pytest.mark.parametrize("fmt", (StateFormat.half(), COMPACT), ids=("half", "compact"))
def test_corrected_in_other_formats(fmt: StateFormat):
    optim = AdEMAMix(1.0, bias_correct_m2=True, state_format=fmt)
    params = jnp.ones((2, 300))
    updates, _ = update(optim, params, init(optim, params), params)
    assert np.allclose(updates, -6.0, rtol=0.3)
    assert np.isfinite(updates).all()


def test_corrected_at_b1_zero_and_in_a_chain():
    optim: Any = AdEMAMix(1.0, b1=0, bias_correct_m2=True)
    tx, params = optax.chain(optax.clip(10.0), optim), jnp.ones(3)
    updates, state = update(tx, params, init(tx, params), params)
    assert np.allclose(updates, -6.0, rtol=1e-6) and state[1].m1 is None


def test_a_state_of_the_other_option_is_refused_by_hyperparams_too():
    on, off, params = AdEMAMix(1.0, bias_correct_m2=True), AdEMAMix(1.0), jnp.ones(3)
    with pytest.raises(ValueError, match=r"state\.m2_weight is None, but this optimiz"):
        hyperparams(on, init(off, params))
    with pytest.raises(ValueError, match=r"but this optimizer keeps none"):
        hyperparams(off, init(on, params))


def test_the_weight_must_be_a_scalar():
    optim, params = AdEMAMix(1.0, bias_correct_m2=True), jnp.ones(3)
    state = init(optim, params)
    for wrong in (jnp.ones(2), jnp.asarray(1), jnp.asarray(1.0, jnp.bfloat16)):
        bad = eqx.tree_at(lambda s: s.m2_weight, state, wrong)
        with pytest.raises(
            ValueError, match=r"state\.m2_weight is .* a float32 or flo"
        ):
            update(optim, params, bad, params)


#
# weight_decay and decoupled_weight_decay
#


def test_a_scheduled_decay_needs_the_parameters():
    optim = AdEMAMix(1e-3, weight_decay=lambda count: 0.0)
    params = jnp.ones(3)
    with pytest.raises(ValueError, match="`params` is missing, but `weight_decay` is"):
        update(optim, params, init(optim, params))


def test_hyperparams_show_the_scheduled_decay():
    optim, params = AdEMAMix(1e-3, weight_decay=linear), jnp.ones(3)
    state = init(optim, params)
    for count in range(3):
        expected = PER_STEP * (1 + count)
        assert hyperparams(optim, state).weight_decay == pytest.approx(expected)
        _, state = update(optim, params, state, params)


def test_a_decoupled_decay_does_not_see_the_learning_rate():
    params, zero = (
        {"w": jnp.full(3, 2.0), "b": jnp.ones(2)},
        {"w": jnp.zeros(3), "b": jnp.zeros(2)},
    )
    for rate in (0.0, 1.0, lambda count: 1e-3):
        optim = AdEMAMix(
            rate,
            weight_decay=0.25,
            weight_decay_mask={"w": True, "b": False},
            decoupled_weight_decay=True,
            learning_rate_scale=7.0,
        )
        updates, _ = update(optim, zero, init(optim, params), params)
        assert np.array_equal(updates["w"], [-0.5] * 3)
        assert np.array_equal(updates["b"], [0.0] * 2)


#
# Off costs nothing
#


def compiled(optim: Any, params: Any) -> str:
    state = init(optim, params)
    step = jax.jit(lambda g, s, p: optim.update(g, s, p))
    return step.lower(params, state, params).as_text()


@pytest.mark.parametrize("make", (AdEMAMix, SimplifiedAdEMAMix))
def test_options_that_are_off_compile_to_nothing(make: Any):
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones(4, jnp.bfloat16)}
    plain = compiled(make(1e-3, weight_decay=0.1), params)
    ones = path_scales(params, {"a": 1.0})
    off = dict(decoupled_weight_decay=False, learning_rate_scale=ones)
    assert compiled(make(1e-3, weight_decay=0.1, **off), params) == plain
    assert compiled(make(1e-3, learning_rate_scale=2.0), params) != plain
