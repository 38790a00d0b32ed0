"""Log-time schedules, the cool-down of alpha, and half-lives."""
# pyright: reportArgumentType=false, reportCallIssue=false

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqx_ademamix
from eqx_ademamix import (
    AdEMAMix,
    SimplifiedAdEMAMix,
    alpha_cooldown_scheduler,
    alpha_scheduler,
    beta3_scheduler,
    extend,
    from_half_life,
    half_life,
    log_time_beta_scheduler,
    log_time_weight_decay_scheduler,
    power_alpha_scheduler,
)

from .helpers import count_traces, x64


INT32_MAX = 2**31 - 1
STEPS = np.asarray([0, 1, 7, 8, 1000, 256_000, 2**24 + 1, INT32_MAX])
SCHEDULES: Any = (
    log_time_beta_scheduler(),
    log_time_beta_scheduler(2.5, offset=1),
    power_alpha_scheduler(),
    power_alpha_scheduler(0.0, 1e35),
    log_time_weight_decay_scheduler(4.0, 1000),
    log_time_weight_decay_scheduler(1e38, 1e-30),
    alpha_cooldown_scheduler(power_alpha_scheduler(1.0), 1000, 100),
)


#
# Values
#


@pytest.mark.parametrize("delta", (1e-30, 0.5, 8.0, 1e30))
@pytest.mark.parametrize("offset", (0, 1, -3))
def test_log_time_beta(delta: float, offset: int):
    schedule = log_time_beta_scheduler(delta, offset)
    t = np.maximum(STEPS + offset, 0).astype(np.float64)
    np.testing.assert_allclose(schedule(STEPS), t / (delta + t), rtol=3e-7)
    exact = np.maximum(delta / (delta + t), np.finfo(np.float32).tiny)
    np.testing.assert_allclose(schedule.complement(STEPS), exact, rtol=3e-7)
    assert np.all(np.asarray(schedule.complement(STEPS)) > 0)


def test_log_time_beta_meets_the_end_of_a_warmup():
    """The paper's experiments with AdEMAMix end at 1 - delta / T."""
    log_time, steps = log_time_beta_scheduler(8.0), 256_000
    warmup = beta3_scheduler(1 - 8 / steps, 0.9, warmup=steps)
    assert abs(log_time.complement(steps) / warmup.complement(steps) - 1) < 1e-4


def test_log_time_average_is_the_mean_at_delta_1():
    """beta = t / (1 + t), which gives all gradients the same weight."""
    schedule, values = log_time_beta_scheduler(1.0), [3.0, -1.0, 5.0, 9.0]
    mean = 100.0  # its weight in the first step is 0
    for t, value in enumerate(values):
        mean += float(schedule.complement(t)) * (value - mean)
        assert abs(mean - np.mean(values[: t + 1])) < 1e-5


def test_power_alpha():
    t = STEPS.astype(np.float64)
    np.testing.assert_allclose(power_alpha_scheduler()(STEPS), (1 + t) ** 0.15, 1e-6)
    schedule = power_alpha_scheduler(0.5, scale=3.0, offset=2)
    np.testing.assert_allclose(schedule(STEPS), 3 * (3 + t) ** 0.5, rtol=1e-6)
    assert np.all(np.asarray(power_alpha_scheduler(1.0, scale=2.0)(STEPS)) == 2.0)


def test_weight_decay():
    t = STEPS.astype(np.float64)
    schedule = log_time_weight_decay_scheduler(4.0, timescale=25_600)
    np.testing.assert_allclose(schedule(STEPS), 4 / (25_600 + t), rtol=1e-6)
    # With a timescale of 1, it is omega / t for the paper's t = 1, 2, ...
    schedule = log_time_weight_decay_scheduler(4.0, 1)
    np.testing.assert_allclose(schedule(np.arange(3)), [4.0, 2.0, 4 / 3], rtol=1e-6)


def test_weight_decay_as_in_the_code_of_the_paper():
    """omega / peak in a coupled decay is the decay there, which follows the shape of
    the learning rate, but not its peak."""
    peak, shape = 1e-3, (0.0, 0.5, 1.0, 0.25)
    optim = AdEMAMix(
        lambda count: peak * jnp.asarray(shape)[count],
        weight_decay=log_time_weight_decay_scheduler(4.0 / peak, timescale=100),
    )
    p, state = jnp.asarray(2.0), eqx_ademamix.init(optim, jnp.asarray(2.0))
    for t, gamma in enumerate(shape):
        update, state = eqx_ademamix.update(optim, jnp.zeros(()), state, p)
        np.testing.assert_allclose(update, -gamma * 4.0 / (100 + t) * 2.0, rtol=1e-5)


@pytest.mark.parametrize("alpha", (8.0, alpha_scheduler(8.0, warmup=500)))
def test_cooldown(alpha: Any):
    schedule = alpha_cooldown_scheduler(alpha, total_steps=1000, cooldown=100)
    values = np.asarray(
        schedule(np.asarray([500, 899, 900, 925, 950, 1000, INT32_MAX]))
    )
    np.testing.assert_allclose(values, [8, 8, 8, 6, 4, 0, 0], atol=1e-6)
    assert schedule(250) == (8.0 if alpha == 8.0 else 4.0)


def test_cooldown_to_another_end():
    schedule = alpha_cooldown_scheduler(8.0, 10, 4, alpha_end=2.0, offset=1)
    np.testing.assert_allclose(schedule(np.asarray([5, 7, 9])), [8.0, 5.0, 2.0])
    at_once = alpha_cooldown_scheduler(8.0, 10, 0, alpha_end=2.0)
    assert at_once(9) == 8.0 and at_once(10) == 2.0
    longer_than_the_run = alpha_cooldown_scheduler(8.0, 10, 20)
    assert longer_than_the_run(0) == 4.0


#
# All schedules
#


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_never_nan_at_any_kind_of_step(schedule: Any):
    values = np.asarray(schedule(STEPS))
    assert (
        values.dtype == np.float32 and np.isfinite(values).all() and (values >= 0).all()
    )
    assert np.all(np.diff(values) >= 0) or np.all(np.diff(values) <= 0)
    for step in (7, np.int64(7), np.uint8(7), jnp.asarray(7), 7.0):
        value = schedule(step)
        assert value == values[2] and value.shape == () and not value.weak_type
    np.testing.assert_allclose(
        jax.jit(schedule)(jnp.asarray(STEPS[:6])), values[:6], 1e-6
    )
    with pytest.raises(TypeError, match="`step` is the bool True, but a number or an"):
        schedule(True)


def test_array_fields_are_traced_and_can_be_batched():
    def evaluate(schedules: Any, step: jax.Array) -> Any:
        return [s(step) for s in schedules]

    counted, traces = count_traces(evaluate)
    for x in (0.5, 0.25):
        schedules = (
            log_time_beta_scheduler(jnp.asarray(x)),
            power_alpha_scheduler(jnp.asarray(x)),
            log_time_weight_decay_scheduler(jnp.asarray(x), 1.0),
            alpha_cooldown_scheduler(jnp.asarray(x), 100, 10),
        )
        values = eqx.filter_jit(counted)(schedules, jnp.asarray(3))
        expected = [3 / (3 + x), 4 ** (1 - x), x / 4, x]
        np.testing.assert_allclose(values, expected, rtol=1e-6)
    assert len(traces) == 1
    deltas = jnp.asarray([1.0, 3.0])
    batch = eqx.filter_vmap(log_time_beta_scheduler)(deltas)
    values = eqx.filter_vmap(lambda s: s.complement(1))(batch)
    np.testing.assert_allclose(values, [0.5, 0.75])


@pytest.mark.parametrize(
    "schedule,text,words",
    (
        (
            log_time_beta_scheduler(8.0),
            "LogTimeBetaSchedule(delta=8, offset=0)",
            "1 - 8 / (8 + t), at step t",
        ),
        (
            log_time_beta_scheduler(jnp.asarray(2.5), offset=1),
            "LogTimeBetaSchedule(delta=2.5, offset=1)",
            "1 - 2.5 / (2.5 + t + 1), at step t",
        ),
        (
            power_alpha_scheduler(0.85, scale=2.0),
            "PowerAlphaSchedule(kappa=0.85, scale=2, offset=0)",
            "2 * (1 + t)^(1 - 0.85), at step t",
        ),
        (
            log_time_weight_decay_scheduler(4.0, 1000),
            "LogTimeWeightDecaySchedule(omega=4, timescale=1000, offset=0)",
            "4 / (1000 + t), at step t",
        ),
        (
            alpha_cooldown_scheduler(8.0, 10_000, 1000),
            "AlphaCooldownSchedule(alpha=8, total_steps=10000, cooldown=1000, "
            "alpha_end=0, offset=0)",
            "8, linear to 0 over the last 1,000 steps of 10,000",
        ),
        (
            alpha_cooldown_scheduler(alpha_scheduler(8.0, warmup=500), 10_000, 1000),
            "AlphaCooldownSchedule(alpha=AlphaSchedule(alpha=8, alpha_start=0, "
            "warmup=500, offset=0, begin=0), total_steps=10000, cooldown=1000, "
            "alpha_end=0, offset=0)",
            "0 to 8, linear over 500 steps; then linear to 0 over the last 1,000 steps "
            "of 10,000",
        ),
        (
            beta3_scheduler(0.9999, 0.9, warmup=256_000),
            "Beta3Schedule(beta_end=0.9999, beta_start=0.9, warmup=256000, offset=0, "
            "begin=0)",
            "0.9 to 0.9999, linear in half-life over 256,000 steps",
        ),
        (
            alpha_scheduler(5.0),
            "AlphaSchedule(alpha=5, alpha_start=0, warmup=0, offset=0, begin=0)",
            "5 at every step",
        ),
    ),
)
def test_texts(schedule: Any, text: str, words: str):
    assert repr(schedule) == text
    assert schedule.describe() == words


def test_repr_of_a_traced_schedule():
    texts: list[str] = []

    @jax.jit
    def show(x: jax.Array) -> jax.Array:
        texts.append(repr(log_time_beta_scheduler(x)))
        return x

    show(jnp.asarray(1.0))
    assert "delta=f32[]" in texts[0] or "traced" in texts[0].lower()


@pytest.mark.parametrize(
    "make,text",
    (
        (
            lambda: log_time_beta_scheduler(0.0),
            r"`delta` is 0\.0, but a finite number > 0",
        ),
        (
            lambda: log_time_beta_scheduler(1e-60),
            r"`delta` is 1e-60 \(0\.0 in float32\)",
        ),
        (lambda: log_time_beta_scheduler("8"), "`delta` is the str '8'"),
        (
            lambda: power_alpha_scheduler(1.5),
            r"`kappa` is 1\.5, but a number in \[0, 1\]",
        ),
        (lambda: power_alpha_scheduler(0.5, -1.0), r"`scale` is -1\.0"),
        (lambda: log_time_weight_decay_scheduler(-1.0, 1), r"`omega` is -1\.0"),
        (lambda: log_time_weight_decay_scheduler(1.0, 0), r"`timescale` is 0\.0"),
        (lambda: log_time_weight_decay_scheduler(1.0, 1, math.nan), "`offset` is nan"),
        (lambda: alpha_cooldown_scheduler(-8.0, 10, 1), r"`alpha` is -8\.0"),
        (lambda: alpha_cooldown_scheduler(8.0, -10, 1), r"`total_steps` is -10\.0"),
        (lambda: alpha_cooldown_scheduler(8.0, 10, -1), r"`cooldown` is -1\.0"),
        (lambda: alpha_cooldown_scheduler(8.0, 10, 1, -1.0), r"`alpha_end` is -1\.0"),
        (
            lambda: alpha_cooldown_scheduler(log_time_beta_scheduler(), 10, 1),
            "`alpha` is a `LogTimeBetaSchedule`, which is a schedule for another",
        ),
    ),
)
def test_bad_arguments(make: Any, text: str):
    with pytest.raises((ValueError, TypeError), match=text):
        make()


BETA, ALPHA = log_time_beta_scheduler(), power_alpha_scheduler()
DECAY = log_time_weight_decay_scheduler(4.0, 10)
COOLDOWN = alpha_cooldown_scheduler(8.0, 10, 1)
SWAPPED: Any = (
    (AdEMAMix, "b1", ALPHA),
    (AdEMAMix, "b2", DECAY),
    (AdEMAMix, "b3", COOLDOWN),
    (AdEMAMix, "alpha", BETA),
    (AdEMAMix, "alpha", DECAY),
    (AdEMAMix, "weight_decay", BETA),
    (AdEMAMix, "weight_decay", beta3_scheduler(0.9)),
    (AdEMAMix, "learning_rate", BETA),
    (AdEMAMix, "learning_rate", DECAY),
    (SimplifiedAdEMAMix, "b1", COOLDOWN),
    (SimplifiedAdEMAMix, "b2", ALPHA),
    (SimplifiedAdEMAMix, "alpha", beta3_scheduler(0.9)),
)


@pytest.mark.parametrize("cls,name,schedule", SWAPPED)
def test_swapped_schedules(cls: Any, name: str, schedule: Any):
    with pytest.raises(
        TypeError, match=f"`{name}` is a.*which is a schedule for another"
    ):
        cls(**{"learning_rate": 1e-3, name: schedule})


def test_schedules_of_other_numbers_are_legal():
    warmup = alpha_scheduler(0.1, warmup=100)
    optim = AdEMAMix(
        warmup, weight_decay=warmup, b1=BETA, b2=BETA, b3=BETA, alpha=ALPHA
    )
    assert optim.learning_rate is warmup and optim.weight_decay is warmup


#
# Half-lives
#


@pytest.mark.parametrize("steps", (1e-300, 0.1, 1.0, 7.5, 6931.0, 1e9, 1e14))
def test_half_lives_of_python_numbers(steps: float):
    b = from_half_life(steps)
    assert type(b) is float and type(half_life(b)) is float
    np.testing.assert_allclose(b, 0.5 ** (1 / steps), rtol=1e-15)
    # The only error is that of rounding `b` to float64.
    error = 1e-15 + 2**-53 * steps / math.log(2) * 2
    if b > 0:
        np.testing.assert_allclose(half_life(b), steps, rtol=error)


def test_half_lives_at_the_ends():
    assert half_life(0) == half_life(0.0) == from_half_life(0) == 0.0
    assert half_life(0.5) == 1.0 and from_half_life(1) == 0.5
    assert half_life(1 - 2**-53) == pytest.approx(math.log(2) * 2**53, rel=1e-12)
    assert (
        half_life(np.float64(0.25)) == 0.5
        and type(half_life(np.float64(0.25))) is float
    )


def test_half_lives_of_arrays():
    b = np.asarray([[0.0, 0.5], [0.9, 0.9999]])
    found = half_life(b)
    assert isinstance(found, np.ndarray) and found.dtype == np.float64
    expected = [[0.0, 1.0], [math.log(0.5) / math.log(0.9), half_life(0.9999)]]
    np.testing.assert_allclose(found, expected, rtol=1e-13)
    np.testing.assert_allclose(from_half_life(found), b, rtol=1e-15)
    # In float32, no more is lost than by rounding b.
    for x in (0.9, 0.9999, 0.999999):
        x32 = jnp.asarray(x, jnp.float32)
        for value in (half_life(x32), jax.jit(half_life)(x32)):
            assert value.dtype == jnp.float32 and value.shape == ()
            np.testing.assert_allclose(value, half_life(float(x32)), rtol=1e-6)
    assert half_life(jnp.zeros((2, 0))).shape == (2, 0)
    steps = jnp.asarray([0.0, 1.0, 100.0])
    np.testing.assert_allclose(
        jax.jit(from_half_life)(steps), [0.0, 0.5, from_half_life(100)], rtol=1e-6
    )
    with x64():
        b = from_half_life(jnp.asarray(1e6))
        np.testing.assert_allclose(half_life(b), 1e6, rtol=1e-9)
    assert np.isfinite(jax.grad(half_life)(jnp.asarray(0.0)))


def test_half_lives_are_those_of_the_warmup():
    b3 = beta3_scheduler(0.9999, 0.9, warmup=1000)
    with x64():
        ends = half_life(np.asarray(b3(np.asarray([0, 500, 1000]))))
    np.testing.assert_allclose(ends[1], (ends[0] + ends[2]) / 2, rtol=1e-9)


@pytest.mark.parametrize(
    "make,text",
    (
        (lambda: half_life(1.0), r"`b` is 1\.0, but a number in \[0, 1\)"),
        (lambda: half_life(np.asarray([0.5, 1.5])), r"`b` is 1\.5, but a number in"),
        (lambda: half_life(jnp.asarray([[0.5], [jnp.nan]])), "`b` is nan, but"),
        (lambda: half_life(jnp.asarray(0.5, jnp.bfloat16)), "`b` is a bfloat16 array"),
        (lambda: half_life(jnp.asarray(1j)), "`b` has dtype complex64"),
        (lambda: half_life(True), "`b` is the bool True"),
        (lambda: half_life("0.9"), "`b` is the str '0.9'"),
        (lambda: from_half_life(-1), r"`steps` is -1\.0, but a finite number >= 0"),
        (lambda: from_half_life(math.inf), "`steps` is inf"),
        (lambda: from_half_life(1e17), r"`0\.5 \*\* \(1 / steps\)` is 1\.0, but a"),
        (
            lambda: from_half_life(jnp.asarray(1e8)),
            r"`0\.5 \*\* \(1 / steps\)` is 1\.0",
        ),
    ),
)
def test_bad_half_lives(make: Any, text: str):
    with pytest.raises((ValueError, TypeError), match=text):
        make()


#
# A new length in the middle of a run
#


def state_at(optim: AdEMAMix, steps: int) -> Any:
    state = eqx_ademamix.init(optim, jnp.ones(3))
    return eqx.tree_at(lambda s: s.count_m2, state, jnp.asarray(steps, jnp.int32))


def test_extend_leaves_schedules_without_an_end():
    optim = AdEMAMix(1e-3, b3=BETA, alpha=alpha_scheduler(8.0, warmup=1000))
    longer = extend(optim, state_at(optim, 500), warmup=2000)
    assert longer.b3 == BETA
    assert longer.alpha(500) == 4.0 and longer.alpha(2000) == 8.0
    optim = AdEMAMix(1e-3, b3=beta3_scheduler(0.999, 0.9, warmup=1000), alpha=ALPHA)
    longer = extend(optim, state_at(optim, 500), warmup=2000)
    assert longer.alpha == ALPHA and longer.b3(1999) < np.float32(0.999)


def test_extend_moves_a_cooldown():
    alpha = alpha_cooldown_scheduler(alpha_scheduler(8.0, warmup=1000), 1000, 200)
    optim = AdEMAMix(1e-3, alpha=alpha)
    longer = extend(optim, state_at(optim, 500), warmup=2000, total_steps=2000)
    steps = np.asarray([500, 1250, 1800, 1900, 2000])
    inner = 4 + 4 * (steps - 500) / 1500
    kept = np.asarray([1, 1, 1, 0.5, 0])
    np.testing.assert_allclose(longer.alpha(steps), inner * kept, rtol=1e-6)
    assert alpha(500) == longer.alpha(500) == 4.0
    shorter = extend(optim, state_at(optim, 500), warmup=800, total_steps=700)
    assert shorter.alpha(500) == 4.0 and shorter.alpha(700) == 0.0
    # A constant below the cool-down has no warm-up.
    optim = AdEMAMix(1e-3, alpha=COOLDOWN)
    longer = extend(optim, state_at(optim, 5), warmup=20, total_steps=20)
    assert longer.alpha(19) == 8.0 and longer.alpha(20) == 0.0


@pytest.mark.parametrize(
    "alpha,arguments,text",
    (
        (ALPHA, {}, "neither a schedule for `b3` nor one for `alpha` that has an end"),
        (COOLDOWN, {}, r"`total_steps` is None, and `optim\.alpha` is an `AlphaCool"),
        (
            alpha_scheduler(8.0, warmup=10),
            {"total_steps": 10},
            r"`total_steps` is the int 10, and `optim\.alpha` is an `AlphaSchedule`",
        ),
        (
            alpha_cooldown_scheduler(8.0, 100, 97),
            {"total_steps": 1000},
            "after 5 steps, the cool-down of `alpha` over 97 steps has begun",
        ),
        (
            alpha_cooldown_scheduler(8.0, 1000, 97),
            {"total_steps": 100},
            "`total_steps` is 100, but after 5 steps",
        ),
        (COOLDOWN, {"total_steps": -1}, r"`total_steps` is -1\.0, but a finite"),
    ),
)
def test_extend_that_cannot_be(alpha: Any, arguments: Any, text: str):
    optim = AdEMAMix(1e-3, alpha=alpha)
    with pytest.raises(ValueError, match=text):
        extend(optim, state_at(optim, 5), warmup=20, **arguments)
