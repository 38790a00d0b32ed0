"""Finite gradients give finite updates, whatever their size."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqx_ademamix import AdEMAMix, SimplifiedAdEMAMix, StateFormat, init, update

from .helpers import COMPACT, everywhere, max_error, reference_init, reference_step, x64


# Three quarters of the square root of float32's largest number: 1.38e19.
BOUND = 0.75 * np.sqrt(float(np.finfo(np.float32).max))
LARGEST = float(np.finfo(np.float32).max)
RULE: dict[str, float] = dict(lr=1.0, b1=0.9, b2=0.999, b3=0.9999, alpha=5.0)

FORMATS: dict[str, Any] = {
    "float32": StateFormat.float32(),
    "bfloat16": StateFormat(jnp.bfloat16, jnp.bfloat16, jnp.bfloat16),
    "float16": StateFormat(jnp.float16, jnp.float16, jnp.float16),
    "half": everywhere(StateFormat.half()),
    "compact": COMPACT,
}


def run(optim: Any, gradients: Any, params: Any) -> np.ndarray:
    """The updates, with the parameters held fixed."""
    step = eqx.filter_jit(update)
    state, updates = init(optim, params), []
    for g in gradients:
        u, state = step(optim, jnp.asarray(g), state, params)
        updates.append(np.asarray(u))
    return np.stack(updates)


def reference_updates(gradients: Any, shape: tuple[int, ...]) -> np.ndarray:
    """The updates in float64, where nothing is clipped."""
    ref, updates = reference_init(np.zeros(shape)), []
    for t, g in enumerate(gradients, 1):
        after = reference_step(ref, g, t, **RULE)
        updates.append(after.p - ref.p)
        ref = after._replace(p=ref.p)
    return np.stack(updates)


def spiked(size: float) -> list[np.ndarray]:
    """Normal gradients of four entries, and a spike in the first of them at step 31."""
    rng = np.random.default_rng(0)
    gradients = [rng.normal(size=4).astype(np.float32) for _ in range(91)]
    gradients[30][0] = size
    return gradients


@pytest.mark.parametrize("size", (1e10, 1e15, 9.9e18, 1e19))
def test_up_to_1e19_the_step_is_that_of_float64(size: float):
    found = run(AdEMAMix(1.0), spiked(size), jnp.zeros(4))
    expected = reference_updates(spiked(size), (4,))
    assert np.max(np.abs(found / expected - 1)) < 0.01


@pytest.mark.parametrize("size", (1.4e19, 1e20, 1e25, 1e30, LARGEST, -LARGEST))
def test_a_spike_among_normal_steps(size: float):
    found = run(AdEMAMix(1.0), spiked(size), jnp.zeros(4))
    expected = reference_updates(spiked(size), (4,))
    assert np.isfinite(found).all()
    assert np.abs(found).max() <= 1.01 * np.abs(expected).max()
    # Above the bound, the rule is applied to the bound.
    clipped = spiked(float(np.clip(size, -BOUND, BOUND)))
    assert np.array_equal(found, run(AdEMAMix(1.0), clipped, jnp.zeros(4)))


@pytest.mark.parametrize("name", FORMATS)
def test_finite_in_every_format(name: str):
    optim = AdEMAMix(1.0, weight_decay=0.1, state_format=FORMATS[name])
    rng = np.random.default_rng(1)
    sizes = (LARGEST, 1.0, 1e30, 1e-30, LARGEST, 0.0, 1e19, -LARGEST)
    gradients = [
        np.float32(s) * np.sign(rng.normal(size=(2, 300))).astype(np.float32)
        for s in sizes
    ]
    assert np.isfinite(run(optim, gradients, jnp.ones((2, 300)))).all()
    whole = [np.full(300, LARGEST, np.float32)] * 3
    updates = run(AdEMAMix(1.0, state_format=FORMATS[name]), whole, jnp.zeros(300))
    assert np.isfinite(updates).all()
    # The first step is 1 + alpha (1 - b3) learning rates. ScaledFloat8 changes `m1` by
    # up to a quarter, and the root of `nu` by less than a factor of 1.096.
    assert updates[0] == pytest.approx(-1.0005, rel=0.3)


@pytest.mark.parametrize(
    "optim",
    (
        AdEMAMix(0.0, b2=0.0, eps=1e-38, weight_decay=3e38),
        AdEMAMix(1e3, b1=0.0, b2=0.0, alpha=1e18, eps=1e-38),
        SimplifiedAdEMAMix(0.0, b1=0.9999, b2=0.0, alpha=1e18, eps=1e-38),
        AdEMAMix(1e3, decoupled_weight_decay=True, weight_decay=3e38),
    ),
    ids=("decay overflows", "average overflows", "sum overflows", "decoupled"),
)
def test_overflows_in_the_rule_are_the_largest_number(optim: Any):
    """The denominator of the second step is `eps`, since `b2` is 0."""
    gradients = [np.full(3, LARGEST, np.float32), np.zeros(3, np.float32)]
    assert np.isfinite(run(optim, gradients, jnp.full(3, -LARGEST))).all()


@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
def test_the_update_of_a_narrow_parameter_is_finite(dtype: str):
    gradients = [np.ones(3, np.float32), np.full(3, LARGEST, np.float32)]
    params = jnp.ones(3, dtype)
    updates = run(AdEMAMix(1e30, b1=0.0), gradients, params)
    assert np.isfinite(updates.astype(np.float32)).all()


def test_infinities_and_nans_pass():
    gradients = [np.array([np.inf, -np.inf, np.nan, 1.0], np.float32)]
    for learning_rate in (0.0, 1.0):
        updates = run(AdEMAMix(learning_rate), gradients * 2, jnp.zeros(4))
        assert np.array_equal(np.isnan(updates), [[True, True, True, False]] * 2)


def test_a_nan_in_a_large_array_is_not_clipped_away():
    g = np.ones((300, 1000), np.float32)
    g[5, 7] = np.nan
    updates = run(AdEMAMix(1.0, weight_decay=0.1), [g], jnp.zeros(g.shape))
    assert np.isnan(updates[0, 5, 7]) and np.isnan(updates).sum() == 1


#
# Complex gradients: their magnitude is clipped, and the direction stays
#


@pytest.mark.parametrize(
    "g",
    (3e38 + 3e38j, 1.5e19 + 1.5e19j, 1e30 - 1e25j, -3e38j, 1e25 + 0j, 1e38 - 3e38j),
)
def test_complex_gradients_keep_their_direction(g: complex):
    params = jnp.zeros(2, jnp.complex64)
    updates = run(AdEMAMix(1.0), [np.full(2, g, np.complex64)], params)
    expected = -1.0005 * g / abs(g)
    assert max_error(updates[0], np.full(2, expected)) < 1e-6


@pytest.mark.parametrize("g", (1e19 + 1e18j, 0.9e19 + 0.9e19j, 3 + 4j, 0j))
def test_complex_gradients_below_the_bound_are_exact(g: Any):
    optim, params = AdEMAMix(1.0, b1=0.0), jnp.zeros(2, jnp.complex64)
    g = np.full(2, g, np.complex64)
    _, state = update(optim, jnp.asarray(g), init(optim, params), params)
    one = init(optim, params)
    _, scaled = update(optim, jnp.asarray(g * np.complex64(2.0**-40)), one, params)
    assert np.array_equal(np.asarray(scaled.m2) * np.complex64(2.0**40), state.m2)


def test_complex_infinities_and_nans_pass():
    g = np.array([complex(np.inf, 1), complex(1, np.nan), 1j], np.complex64)
    updates = run(AdEMAMix(1.0), [g], jnp.zeros(3, jnp.complex64))
    assert np.array_equal(np.isfinite(updates), [[False, False, True]])


#
# NumPy and float64
#


def test_numpy_gradients_beyond_float32_are_not_infinite():
    optim, params = AdEMAMix(1.0), jnp.zeros(4)
    g = np.array([1e300, -1e300, 1.0, np.inf])
    updates, state = update(optim, g, init(optim, params), params)
    largest = np.array([LARGEST, -LARGEST, 1.0, np.inf], np.float32)
    expected = update(optim, jnp.asarray(largest), init(optim, params), params)
    assert np.array_equal(updates[:3], expected[0][:3]) and np.isnan(updates[3])
    assert eqx.tree_equal(state, expected[1])
    params = jnp.zeros(2, jnp.complex64)
    g = np.array([1e300 + 1e300j, 1e-3 + 1e300j])
    updates, _ = update(optim, g, init(optim, params), params)
    diagonal = np.sqrt(0.5) * (1 + 1j)
    assert max_error(updates, -1.0005 * np.array([diagonal, 1j])) < 1e-6


def test_the_bound_of_float64_is_that_of_float64():
    with x64():
        params = jnp.zeros(3, jnp.float64)
        gradients = [np.array([1e150, 1e30, 1.0]), np.array([1.0, 1e-300, 1e308])]
        found = run(AdEMAMix(1.0), gradients, params)
        gradients[1][2] = 0.75 * np.sqrt(np.finfo(np.float64).max)
        expected = reference_updates(gradients, (3,))
        assert max_error(found, expected) < 1e-12
        # Codes are decoded to float32, so that is the range of this parameter.
        optim = AdEMAMix(1.0, state_format=COMPACT)
        gradients = [np.full(3, 1e150), np.ones(3), np.full(3, 1e308)]
        assert np.abs(run(optim, gradients, params)).max() < 10


def test_derivatives_are_finite():
    optim, params = AdEMAMix(1.0, eps_root=1e-8), jnp.zeros(4)
    state = init(optim, params)
    loss = lambda g: update(optim, g, state, params)[0].sum()
    g = jnp.asarray([1.0, 1e19, 1e30, 0.0])
    assert np.isfinite(jax.grad(loss)(g)).all()
    params = params.astype(jnp.complex64)
    state = init(optim, params)
    loss = lambda g: jnp.abs(update(optim, g, state, params)[0]).sum()
    g = jnp.asarray([1 + 1j, 1e19j, 1e30 + 1j, 1j])
    assert np.isfinite(jax.grad(loss)(g)).all()
