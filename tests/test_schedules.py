"""Golden values of the schedules, all kinds of steps, and precision."""
# pyright: reportArgumentType=false

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqx_ademamix import (
    alpha_scheduler,
    beta3_scheduler,
    log_time_beta_scheduler,
    log_time_weight_decay_scheduler,
)

from .helpers import reference_b3, x64


GOLDEN = (
    (1, 0.90038836127494),
    (1000, 0.9795986695231871),
    (25_600, 0.9990089120425198),
    (128_000, 0.9998001996254803),
    (256_000, 0.9999),
)
INT32_MAX = 2**31 - 1


@pytest.mark.parametrize("step,expected", GOLDEN)
def test_golden_b3(step: int, expected: float):
    schedule = beta3_scheduler(0.9999, 0.9, warmup=256_000)
    assert abs(float(schedule(step)) - expected) <= 2e-7
    assert abs(float(jax.jit(schedule)(jnp.asarray(step))) - expected) <= 2e-7
    with x64():
        assert abs(float(schedule(step)) - expected) <= 1e-12
        assert abs(float(jax.jit(schedule)(jnp.asarray(step))) - expected) <= 1e-12


@pytest.mark.parametrize(
    "step",
    (
        250,
        np.int32(250),
        np.int64(250),
        np.uint8(250),
        np.asarray(250),
        jnp.asarray(250),
        jnp.asarray(250, jnp.int16),
    ),
    ids=lambda x: type(x).__name__ + str(getattr(x, "dtype", "")),
)
def test_any_kind_of_step(step: Any):
    alpha = alpha_scheduler(8.0, 0.0, warmup=1000)
    b3 = beta3_scheduler(0.999, 0.9, warmup=1000)
    assert alpha(step) == 2.0
    assert abs(float(b3(step)) - reference_b3(250, 0.999, 0.9, 1000)) <= 2e-7
    for value in (alpha(step), b3(step), b3.complement(step)):
        assert value.dtype == jnp.float32 and value.shape == () and not value.weak_type


def test_many_steps_at_once():
    steps = np.arange(2000)
    alpha = alpha_scheduler(8.0, 2.0, warmup=1000)(steps)
    expected = np.minimum(2 + 6 * steps / 1000, 8)
    np.testing.assert_allclose(alpha, expected, rtol=1e-6)
    b3 = beta3_scheduler(0.999, 0.9, warmup=1000)(steps)
    expected = [reference_b3(int(t), 0.999, 0.9, 1000) for t in steps]
    np.testing.assert_allclose(b3, expected, atol=2e-7)


def test_half_life_is_linear():
    with x64():
        steps = np.asarray([0, 100, 250, 1000])
        b3 = np.asarray(beta3_scheduler(0.9999, 0.9, warmup=1000)(steps))
        half_life = np.log(0.5) / np.log(b3)
        start, end = np.log(0.5) / np.log(0.9), np.log(0.5) / np.log(0.9999)
        expected = start + (end - start) * steps / 1000
        np.testing.assert_allclose(half_life, expected, rtol=1e-11)


@pytest.mark.parametrize("step", (0, 1, 10**6, INT32_MAX))
def test_without_warmup_the_end_at_once(step: int):
    for s in (step, np.int64(step), jnp.asarray(step, jnp.int32)):
        assert alpha_scheduler(5.0, 1.0)(s) == 5.0
        assert beta3_scheduler(0.9999, 0.5)(s) == np.float32(0.9999)
        assert beta3_scheduler(0.0)(s) == 0.0


@pytest.mark.parametrize("step", (1000, 1001, INT32_MAX))
@pytest.mark.parametrize("offset", (0, 1))
def test_after_the_warmup_exactly_the_end(step: int, offset: int):
    for s in (step, jnp.asarray(step, jnp.int32)):
        alpha = alpha_scheduler(5.1, 0.3, warmup=1000, offset=offset)
        b3 = beta3_scheduler(0.9999, 0.9, warmup=1000, offset=offset)
        assert alpha(s) == np.float32(5.1)
        assert b3(s) == np.float32(0.9999)
        assert b3.complement(s) == np.float32(1 - 0.9999)


def test_beyond_int32_on_the_host():
    assert alpha_scheduler(4.0, warmup=2**40)(2**39) == 2.0


def test_b3_from_zero():
    b3 = beta3_scheduler(0.999, 0.0, warmup=100)
    assert b3(0) == 0.0 and b3.complement(0) == 1.0
    values = np.asarray(b3(np.arange(101)))
    assert np.all(np.isfinite(values)) and np.all(np.diff(values) > 0)
    # The half-life grows linearly from 0. After t of 100 steps, it is t / 100 of the
    # final value.
    np.testing.assert_allclose(b3(50), 0.999**2, rtol=1e-6)


def test_starting_above_the_end():
    b3 = beta3_scheduler(0.9, 0.99, warmup=10)(np.arange(20))
    assert b3[0] == np.float32(0.99) and b3[10] == np.float32(0.9)
    assert np.all(np.diff(b3) <= 0)
    alpha = alpha_scheduler(1.0, 3.0, warmup=2)(np.arange(4))
    np.testing.assert_array_equal(alpha, [3.0, 2.0, 1.0, 1.0])


def test_offset_counts_from_one():
    steps = np.arange(50)
    for make in (
        lambda offset: alpha_scheduler(8.0, 1.0, warmup=30, offset=offset),
        lambda offset: beta3_scheduler(0.999, 0.9, warmup=30, offset=offset),
    ):
        np.testing.assert_array_equal(make(1)(steps), make(0)(steps + 1))
    assert alpha_scheduler(8.0, 1.0, warmup=30, offset=-10)(0) == 1.0


@pytest.mark.parametrize("b3", (0.99, 0.9999, 0.999999, 1 - 1e-9))
def test_complement_without_cancellation(b3: float):
    schedule = beta3_scheduler(b3, 0.9, warmup=1000)
    steps = np.asarray([0, 1, 100, 500, 900, 999, 1000, 2000])
    done = np.minimum(steps / 1000, 1)
    exact = -np.expm1(1 / ((1 - done) / np.log(0.9) + done / np.log1p(b3 - 1)))
    np.testing.assert_allclose(schedule.complement(steps), exact, rtol=1e-6)


def test_array_fields_are_traced_and_can_be_batched():
    traces = []

    @eqx.filter_jit
    def evaluate(schedules: Any, step: jax.Array) -> Any:
        traces.append(None)
        return [s(step) for s in schedules]

    for end in (0.99, 0.999):
        schedules = (
            alpha_scheduler(jnp.asarray(8 * end), warmup=jnp.asarray(100)),
            beta3_scheduler(jnp.asarray(end), jnp.asarray(0.9), warmup=np.asarray(100)),
        )
        alpha, b3 = evaluate(schedules, jnp.asarray(50))
        np.testing.assert_allclose(alpha, 4 * end, rtol=1e-6)
        np.testing.assert_allclose(b3, reference_b3(50, end, 0.9, 100), atol=2e-7)
    assert len(traces) == 1

    ends = jnp.asarray([0.9, 0.99, 0.999])
    batch = eqx.filter_vmap(lambda end: beta3_scheduler(end, warmup=10))(ends)
    np.testing.assert_array_equal(eqx.filter_vmap(lambda s: s(10))(batch), ends)


def test_fields_are_typed():
    schedule = beta3_scheduler(jnp.asarray(0.5), 0)
    assert isinstance(schedule.beta_end, jax.Array)
    assert schedule.beta_end.dtype == jnp.float32 and not schedule.beta_end.weak_type
    assert (schedule.beta_start, schedule.warmup, schedule.offset) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    "make,text",
    (
        (lambda: alpha_scheduler(-1.0), "`alpha` is -1.0, but a finite number >= 0"),
        (lambda: alpha_scheduler(1.0, float("nan")), "`alpha_start` is nan"),
        (lambda: alpha_scheduler(1.0, warmup=-1), "`warmup` is -1.0, but a finite"),
        (lambda: alpha_scheduler(1.0, offset=float("inf")), "`offset` is inf"),
        (lambda: beta3_scheduler(1.0), r"`beta_end` is 1.0, but a number in \[0, 1\)"),
        (lambda: beta3_scheduler(0.9, -0.1), r"`beta_start` is -0.1"),
        (lambda: beta3_scheduler(0.9, warmup=-5), "`warmup` is -5.0"),
        (lambda: beta3_scheduler("0.9"), "`beta_end` is the str '0.9'"),
        (lambda: beta3_scheduler(jnp.ones(2) / 2), r"`beta_end` has shape \(2,\)"),
        (
            lambda: beta3_scheduler(jnp.asarray(0.9, jnp.bfloat16)),
            "`beta_end` is a bfloat16 array",
        ),
    ),
)
def test_bad_arguments(make: Any, text: str):
    with pytest.raises((ValueError, TypeError), match=text):
        make()


def test_subnormal_time_scales():
    """XLA takes subnormal numbers for zero."""
    schedule = log_time_beta_scheduler(1e-40)
    assert schedule(0) == 0.0 and schedule.complement(0) == 1.0
    assert log_time_weight_decay_scheduler(0.0, 1e-40)(0) == 0.0
    assert log_time_weight_decay_scheduler(1e-3, 1e-40)(0) > 1e30
