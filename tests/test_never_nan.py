"""No valid setting produces a NaN."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eqx_ademamix import AdEMAMix, StateFormat, alpha_scheduler, beta3_scheduler

from .helpers import tree_type


DECAYS = st.one_of(
    st.sampled_from([0.0, 0.5, 0.9, 0.9999, 0.999999, float(np.nextafter(1, 0))]),
    st.floats(0, 1, exclude_max=True),
)
WARMUPS = st.sampled_from([0, 1, 2, 1000, 2**31 - 1])
COUNTS = st.sampled_from([0, 1, 999, 1000, 1001, 2**24 + 1, 2**31 - 2, 2**31 - 1])
SCALES = st.sampled_from([0.0, 1e-38, 1e-20, 1e-6, 1.0, 1e6, 1e18, 1e30, 3.4e38])
FORMATS = st.sampled_from(
    [
        StateFormat.float32(),
        StateFormat(m1=jnp.bfloat16, m2=jnp.bfloat16, nu=jnp.bfloat16),
        StateFormat(m1=jnp.float16, m2=jnp.float16, nu=jnp.float16),
    ]
)
EPS = st.sampled_from(
    [(1e-8, 0.0), (0.0, 1e-8), (1e-8, 1e-8), (1e-50, 0.0), (0.0, 1e-300), (1.0, 1.0)]
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    decays=st.tuples(DECAYS, DECAYS, DECAYS, DECAYS),
    warmups=st.tuples(WARMUPS, WARMUPS),
    counts=st.tuples(COUNTS, COUNTS),
    scales=st.lists(SCALES, min_size=1, max_size=3),
    fmt=FORMATS,
    eps=EPS,
    alpha=st.sampled_from([0.0, 5.0, 1e3, 3e38]),
    rate=st.sampled_from([0.0, 1e-3, -3e38]),
    scale=st.sampled_from([1.0, 0.0, 1e30]),
    corrected=st.booleans(),
)
def test_never_a_nan(
    decays: Any,
    warmups: Any,
    counts: Any,
    scales: Any,
    fmt: Any,
    eps: Any,
    alpha: Any,
    rate: Any,
    scale: Any,
    corrected: Any,
):
    b1, b2, b3, b3_start = decays
    optim = AdEMAMix(
        rate,
        b1=b1,
        b2=b2,
        # Without a warm-up, a start above the end is an error.
        b3=beta3_scheduler(b3, b3_start if warmups[0] else 0.0, warmup=warmups[0]),
        alpha=alpha_scheduler(alpha, warmup=warmups[1]),
        eps=eps[0],
        eps_root=eps[1],
        weight_decay=0.1,
        state_format=fmt,
        bias_correct_m2=corrected,
        decoupled_weight_decay=not corrected,
        learning_rate_scale=scale,
    )
    params = jnp.asarray([1.0, -1.0, 0.0, 1e-3])
    state = optim.init(params)
    counters = tuple(jnp.asarray(count, jnp.int32) for count in counts)
    state = eqx.tree_at(lambda s: (s.count, s.count_m2), state, counters)
    kind = tree_type(state)
    for size in [*scales, 0.0, 1.0]:
        grads = size * jnp.asarray([1.0, -1.0, 0.0, 1e-3])
        updates, state = optim.update(grads, state, params)
        for x in jtu.tree_leaves((updates, state)):
            assert np.all(np.isfinite(np.asarray(x, np.float64)))
        assert tree_type(state) == kind


@pytest.mark.parametrize("b1", (0, 0.9))
def test_zero_gradients_move_nothing(b1: float):
    optim = AdEMAMix(1.0, b1=b1, b3=beta3_scheduler(0.999), alpha=alpha_scheduler(5.0))
    zeros, state = jnp.zeros(3), optim.init(jnp.zeros(3))
    for _ in range(3):
        updates, state = jax.jit(optim.update)(zeros, state)
        np.testing.assert_array_equal(updates, zeros)


def test_a_square_that_overflows_is_forgotten():
    """1e20 squared overflows float32. The gradient is clipped, so the average of the
    squares is finite and can decay, and the parameter can change again."""
    optim = AdEMAMix(1e-3, b1=0.5, b2=0.5, b3=0.5)
    state = optim.init(jnp.zeros(1))
    updates, state = optim.update(jnp.asarray([1e20]), state)
    assert np.isfinite(state.nu[0]) and np.isfinite(updates[0])
    update = jax.jit(optim.update)
    for _ in range(300):
        updates, state = update(jnp.ones(1), state)
    np.testing.assert_allclose(updates, -6e-3, rtol=1e-3)


@pytest.mark.parametrize("bad", (np.nan, np.inf))
def test_a_bad_gradient_is_not_hidden(bad: float):
    optim = AdEMAMix(1e-3)
    updates, state = optim.update(jnp.asarray([bad, 1.0]), optim.init(jnp.zeros(2)))
    assert not np.isfinite(state.m1[0]) and np.isfinite(updates[1])
    assert not np.isfinite(state.nu[0])
