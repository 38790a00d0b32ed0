"""How accurately codecs store a moment, once and over a whole run."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest

from eqx_ademamix import (
    AbstractCodec,
    AdEMAMix,
    AdEMAMixState,
    Encoded,
    ScaledFloat8,
    ScaledFloat16,
    SplitBfloat16,
    StateFormat,
    decoded,
)

from .helpers import x64


SIGNED: tuple[AbstractCodec, ...] = (ScaledFloat8(), ScaledFloat16(), SplitBfloat16())
SQUARES = (ScaledFloat8().for_squares(), ScaledFloat16().for_squares())
ALL = SIGNED + SQUARES
# BOUNDS: the largest relative error of an entry that is at least 2^-23 of the largest
# entry in its block. FACTORS: the largest factor by which a square is underestimated.
BOUNDS = {"ScaledFloat8": 1 / 4, "ScaledFloat16": 1 / 2048, "SplitBfloat16": 2.0**-15}
FACTORS = {"ScaledFloat8": 6 / 5, "ScaledFloat16": 1 + 1 / 1024}
SHAPES = (
    (),
    (1,),
    (5,),
    (256,),
    (1000,),
    (0,),
    (3, 0),
    (0, 3),
    (7, 1),
    (500, 1),
    (2, 255),
    (2, 257),
    (3, 2, 300),
    (8, 4, 3, 3),
    (4, 512),
)
KEYS = (None, jax.random.key(0), jax.random.PRNGKey(1), (3, 4))


def name_of(codec: AbstractCodec) -> str:
    return type(codec).__name__


def draw(shape: tuple[int, ...], decades: float, seed: int = 0) -> np.ndarray:
    """Normal random numbers with scales that spread over `decades` decades below 1."""
    rng = np.random.default_rng(seed)
    scales = 10.0 ** -rng.uniform(0, decades, shape)
    return np.asarray(rng.normal(size=shape) * scales, np.float32)


def round_trip(codec: AbstractCodec, x: Any, key: Any) -> np.ndarray:
    there_and_back = jax.jit(lambda x: codec.decode(codec.encode(x, key)))
    return np.asarray(there_and_back(jnp.asarray(x)), np.float64)


def in_wide_blocks(x: np.ndarray, block: int) -> np.ndarray:
    """The largest magnitude in the block of each entry, if blocks divide the rows."""
    largest = np.abs(x.reshape(*x.shape[:-1], -1, block)).max(-1)
    return np.repeat(largest, block, axis=-1)


#
# Storing a moment once
#


@pytest.mark.parametrize("key", KEYS, ids=str)
@pytest.mark.parametrize("codec", SIGNED, ids=name_of)
@pytest.mark.parametrize("scale", (1e-12, 1e-6, 1.0, 1e4))
def test_the_error_of_an_entry(codec: AbstractCodec, key: Any, scale: float):
    x = draw((16, 1024), decades=6) * np.float32(scale)
    y = round_trip(codec, x, key)
    kept = np.abs(x) >= 2.0**-23 * in_wide_blocks(x, 256)
    error = np.abs(y - x) / np.abs(np.float64(x))
    assert kept.mean() > 0.98
    assert error[kept].max() <= BOUNDS[name_of(codec)] * (1 + 1e-2)
    assert np.all(np.isfinite(y))
    # Smaller entries have at most the absolute error of an entry that is kept.
    least = BOUNDS[name_of(codec)] * 2.0**-22 * in_wide_blocks(x, 256)
    assert np.all(np.abs(y - x)[~kept] <= least[~kept])


def test_two_bytes_keep_eleven_bits():
    """This also holds at the limit, for an entry of exactly 2^-23 of the largest."""
    codec, keys = ScaledFloat16(), jax.random.split(jax.random.key(0), 1000)
    of = lambda x: jax.vmap(lambda key: codec.decode(codec.encode(x, key)))(keys)
    for top in (1.0, 1.5, 1.9999999):
        x = np.float32(top) * np.float32(2.0) ** -np.arange(24, dtype=np.float32)
        y = np.float64(jax.jit(of)(x))
        assert np.max(np.abs(y / x - 1)) <= 2.0**-11 * (1 + 2.0**-7)


@pytest.mark.parametrize("codec", ALL, ids=repr)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(codec: AbstractCodec, shape: tuple[int, ...]):
    x = np.abs(draw(shape, decades=3))
    stored = jax.jit(lambda x: codec.encode(x, jax.random.key(0)))(x)
    assert stored.shape == stored.real[0].shape == shape
    assert stored.dtype == np.float32
    y = jax.jit(codec.decode)(stored)
    assert y.shape == shape and y.dtype == jnp.float32
    bound = FACTORS[name_of(codec)] - 1 if codec in SQUARES else BOUNDS[name_of(codec)]
    assert np.all(np.abs(np.asarray(y) / x - 1) <= 1.01 * bound)
    blank = codec.zeros(jnp.asarray(x))
    assert jtu.tree_structure(blank) == jtu.tree_structure(stored)
    kinds = [[(a.shape, a.dtype) for a in jtu.tree_leaves(t)] for t in (blank, stored)]
    assert kinds[0] == kinds[1]
    assert np.all(np.asarray(jax.jit(codec.decode)(blank)) == 0)
    size = sum(a.nbytes for a in jtu.tree_leaves(stored))
    if x.size:
        assert codec.bytes_per_parameter(shape) * x.size == pytest.approx(size)
    else:
        assert math.isnan(codec.bytes_per_parameter(shape))


def test_scales_lie_along_the_last_axis():
    scales = lambda shape: ScaledFloat16().zeros(jnp.ones(shape)).real[1].shape
    assert scales((7, 300)) == (7, 2)
    assert scales((7, 2, 64)) == (7, 2, 1)
    assert scales((7, 64, 3, 3)) == (7, 3)  # rows of 576
    assert scales((5000, 1)) == (20,)
    assert scales((100,)) == scales(()) == (1,)
    assert ScaledFloat16(32).zeros(jnp.ones((7, 100))).real[1].shape == (7, 4)


@pytest.mark.parametrize("codec", ALL, ids=repr)
def test_zeros_stay_zeros(codec: AbstractCodec):
    x = np.abs(draw((4, 512), decades=6))
    x[0], x[1, :256], x[:, 7] = 0, 0, 0
    for key in KEYS:
        assert np.all(round_trip(codec, x, key)[x == 0] == 0)


@pytest.mark.parametrize("codec", ALL, ids=repr)
@pytest.mark.parametrize("bad", (np.nan, np.inf))
def test_what_is_not_finite_stays_so(codec: AbstractCodec, bad: float):
    x = np.ones((2, 512), np.float32)
    x[1, 300] = bad
    y = round_trip(codec, x, jax.random.key(0))
    assert not np.isfinite(y[1, 300])
    assert np.all(np.isfinite(y[0])) and np.all(np.isfinite(y[1, :256]))


@pytest.mark.parametrize("codec", ALL, ids=repr)
def test_the_ends_of_float32(codec: AbstractCodec):
    info = np.finfo(np.float32)
    x = np.array([info.max, info.max / 2, info.tiny, info.tiny / 2], np.float32)
    keys = jax.random.split(jax.random.key(0), 100)
    for value in (jnp.asarray(x), jnp.asarray(x[2:])):
        of = lambda key, value=value: codec.decode(codec.encode(value, key))
        assert np.all(np.isfinite(jax.jit(jax.vmap(of))(keys)))
    with x64():
        wide = jnp.asarray([1e300, 1.0], jnp.float64)
        assert np.all(np.isfinite(codec.decode(codec.encode(wide))))


@pytest.mark.parametrize("codec", SIGNED, ids=name_of)
def test_complex_moments(codec: AbstractCodec):
    x = draw((2, 300), decades=2) + 1j * draw((2, 300), decades=2, seed=1)
    x = x.astype(np.complex64)
    stored = codec.encode(jnp.asarray(x), jax.random.key(0))
    assert stored.dtype == np.complex64 and stored.imag is not None
    y = np.asarray(codec.decode(stored))
    assert y.dtype == np.complex64
    for part in (np.real, np.imag):
        assert np.max(np.abs(part(y) / part(x) - 1)) <= 1.01 * BOUNDS[name_of(codec)]
    assert np.all(np.asarray(codec.decode(codec.zeros(jnp.asarray(x)))) == 0)


#
# Random rounding
#


@pytest.mark.parametrize("codec", ALL, ids=repr)
def test_the_mean_over_keys_is_exact(codec: AbstractCodec):
    x = jnp.asarray(np.abs(draw((256,), decades=3)))
    keys = jax.random.split(jax.random.key(0), 4096)
    y = jax.jit(jax.vmap(lambda key: codec.decode(codec.encode(x, key))))(keys)
    deviation = np.mean(np.float64(y) / np.asarray(x) - 1, axis=0)
    noise = np.std(np.float64(y) / np.asarray(x), axis=0) / np.sqrt(4096)
    # At a power of two, the step size doubles. There, a dithered mean is off by 1/16
    # of a step. One-byte squares are rounded in (almost) the logarithm.
    bend = 1 / (16 * 1024) if codec == ScaledFloat16() else 0
    bend = 0.007 if codec == SQUARES[0] else bend
    # Also, float32 resolves the position of a number on the grid to 1/200 of a step.
    rounding = 1 / (200 * 1024)
    rounding += 5 * BOUNDS[name_of(codec)] / 4096  # rare cases that no key may hit
    assert np.all(np.abs(deviation) <= 5 * noise + bend + rounding)
    assert np.abs(np.mean(deviation)) <= 5 * np.mean(noise) / 16 + bend / 2 + rounding


@pytest.mark.parametrize("codec", ALL, ids=repr)
def test_a_key_decides_everything(codec: AbstractCodec):
    x = jnp.asarray(np.abs(draw((4, 512), decades=3)))
    encode = lambda key: jtu.tree_leaves(codec.encode(x, key))
    for key in KEYS:
        jitted = jtu.tree_leaves(jax.jit(lambda k=key: codec.encode(x, k))())
        for a, b, c in zip(encode(key), encode(key), jitted, strict=True):
            assert np.array_equal(a, b) and np.array_equal(a, c)
    one, other = encode((1, 2)), encode((2, 1))
    assert not np.array_equal(one[-2 if len(one) == 2 else 0], other[0])


def test_what_is_stored_stays_stored():
    """A stored square does not change if it is stored again, even if the largest entry
    of its block changes. Powers of two map the grid of squares to itself."""
    codec = ScaledFloat8().for_squares()
    x = np.maximum(draw((64, 256), decades=4) ** 2, 1e-10)
    y = round_trip(codec, x, jax.random.key(0))
    same = [round_trip(codec, y, jax.random.key(i)) == y for i in range(1, 20)]
    assert np.mean(same) > 0.9999
    grown = y.copy()
    grown[:, 0] = 37.0 * y.max()
    same = round_trip(codec, grown, jax.random.key(0))[:, 1:] == y[:, 1:]
    assert np.mean(same) > 0.9999


#
# Squares
#


@pytest.mark.parametrize("codec", SQUARES, ids=repr)
@pytest.mark.parametrize("shape", ((64, 256), (64, 1000), (4096, 1), (300,)), ids=str)
@pytest.mark.parametrize("decades", (0.5, 5, 10))
def test_squares_are_not_underestimated(
    codec: AbstractCodec, shape: tuple[int, ...], decades: float
):
    """Squares are not underestimated by more than the bound proven in the docstring.

    `decades` applies to the gradients.
    """
    x = draw(shape, decades) ** 2
    x[: shape[0] // 2] *= 1e-4
    keys = jax.random.split(jax.random.key(0), 20)
    of = jax.jit(lambda key: codec.decode(codec.encode(jnp.asarray(x), key)))
    for y in (round_trip(codec, x, None), *(np.float64(of(key)) for key in keys)):
        assert np.all(y > 0)
        assert np.max(np.float64(x) / y) <= FACTORS[name_of(codec)] * (1 + 1e-5)
        # Overestimates have the same bound, if the value is in the range of the block.
        room = x >= 2.0**-41 * x.max()
        assert np.max(np.asarray(y)[room] / x[room]) <= FACTORS[name_of(codec)] * (
            1 + 1e-5
        )


def test_squares_of_a_codec_for_two_signs():
    """With any codec for `nu`, a format never stores small squares as zero."""
    for codec in SIGNED:
        fmt = StateFormat(m1=jnp.float32, m2=jnp.float32, nu=codec, min_size=0)
        assert isinstance(fmt.nu, AbstractCodec)
        x = np.float32(10.0) ** -np.arange(0, 30, 3, dtype=np.float32)
        assert np.all(round_trip(fmt.nu, x, jax.random.key(0)) > 0)


#
# Over a run
#


def protocol(codec: AbstractCodec, decades: float | None) -> tuple[float, float]:
    """The relative error and the cosine of `m2` after 40,000 steps at b3 = 0.9999.

    Halfway, the mean gradient changes its sign. The scales of the gradients are
    log-normal, or spread evenly over `decades` decades.
    """
    size, steps, b3 = 4096, 40_000, 0.9999
    keys = jax.random.split(jax.random.key(0), 3)
    sigma = jnp.exp(jax.random.normal(keys[0], (size,), jnp.float32))
    if decades is not None:
        sigma = 10 ** (-decades * jax.random.uniform(keys[0], (size,), jnp.float32))
    mean = 0.05 * sigma * jax.random.normal(keys[1], (size,), jnp.float32)
    step_of = lambda m, g: m + (1 - b3) * (g - m)

    def step(carry: Any, t: Any) -> Any:
        stored, exact = carry
        key, noise_key = jax.random.split(jax.random.fold_in(keys[2], t))
        noise = jax.random.normal(noise_key, (size,), jnp.float32)
        g = jnp.where(t < steps // 2, 1.0, -0.5).astype(jnp.float32) * mean
        g = g + sigma * noise
        stored = codec.encode(step_of(codec.decode(stored), g), key)
        return (stored, step_of(exact, g.astype(jnp.float64))), None

    start = codec.zeros(sigma), jnp.zeros(size, jnp.float64)
    (stored, exact), _ = jax.jit(lambda: jax.lax.scan(step, start, jnp.arange(steps)))()
    x = np.float64(codec.decode(stored)) / np.float64(sigma)
    y = np.float64(exact) / np.float64(sigma)
    norm = np.linalg.norm
    return float(norm(x - y) / norm(y)), float(np.sum(x * y) / norm(x) / norm(y))


@pytest.mark.parametrize(
    "codec,decades,error,cosine",
    (
        (ScaledFloat16(), None, 0.015, 0.9998),
        (ScaledFloat16(), 6.0, 0.015, 0.9998),
        (SplitBfloat16(), None, 1e-3, 0.999999),
    ),
    ids=("ScaledFloat16", "six decades", "SplitBfloat16"),
)
def test_the_slow_average_over_a_run(
    codec: AbstractCodec, decades: float | None, error: float, cosine: float
):
    with x64():
        found = protocol(codec, decades)
    assert found[0] <= error and found[1] >= cosine


@pytest.mark.parametrize("codec", (ScaledFloat16(), SplitBfloat16()), ids=name_of)
def test_a_slow_average_without_gradient_decays(codec: AbstractCodec):
    """It decays to 0.9999^10000 = 0.3679 of its value. With rounding to nearest, it
    would not change."""
    start = jnp.asarray(draw((8, 256), decades=1))

    def decay(m: Any, t: Any) -> Any:
        return codec.encode(0.9999 * codec.decode(m), (t, 0)), None

    run = jax.jit(lambda m: jax.lax.scan(decay, m, jnp.arange(10_000)))
    end, _ = run(codec.encode(start))
    left = np.asarray(codec.decode(end)) / np.asarray(start)
    np.testing.assert_allclose(np.mean(left), 0.9999**10_000, rtol=2e-3)
    assert np.max(np.abs(left / 0.9999**10_000 - 1)) < 0.1

    nearest = codec.encode(start) if isinstance(codec, ScaledFloat16) else None
    if nearest is not None:
        again = codec.encode(0.9999 * codec.decode(nearest))
        assert np.mean(np.asarray(again.real[0]) == np.asarray(nearest.real[0])) > 0.5


def test_one_byte_moments_over_a_run():
    """The gradients in a block spread over six decades and shrink halfway. The updates
    keep the right size in each decade, and none of them explodes."""
    size, steps = 1536, 8000
    decade = np.arange(size) % 6
    keys = jax.random.split(jax.random.key(0), 3)
    scale = 10.0 ** -(jnp.float32(decade) + jax.random.uniform(keys[0], (size,)))
    mean = 0.05 * jax.random.normal(keys[1], (size,))

    def sizes(fmt: StateFormat) -> np.ndarray:
        optim = AdEMAMix(1.0, b2=0.999, b3=0.999, eps=1e-20, state_format=fmt)

        def step(state: Any, t: Any) -> Any:
            noise = jax.random.normal(jax.random.fold_in(keys[2], t), (size,))
            shrink = jnp.where(t < steps // 2, 1.0, 0.3)
            updates, state = optim.update(shrink * scale * (mean + noise), state)
            return state, jnp.abs(updates)

        start = optim.init(jnp.zeros(size))
        run = jax.jit(lambda s: jax.lax.scan(step, s, jnp.arange(steps)))
        return np.asarray(run(start)[1])

    compact = StateFormat.compact()
    exact = sizes(StateFormat.float32())
    found = sizes(StateFormat(compact.m1, compact.m2, compact.nu, min_size=0))
    for d in range(6):
        for half in (slice(steps // 2), slice(steps // 2, None)):
            a, b = found[half, decade == d], exact[half, decade == d]
            assert 0.9 <= np.median(a) / np.median(b) <= 1.1
            assert 0.9 <= np.median(a / b) <= 1.1
    assert found.max() <= 3 * exact.max()


@pytest.mark.parametrize("b1", (0.9, 0.99, 0.999, 0.9999))
def test_the_errors_of_one_byte_do_not_add_up(b1: float):
    """The errors stay bounded for every decay rate."""
    keys = jax.random.split(jax.random.key(0), 20_000)

    def step(carry: Any, key: Any) -> Any:
        stored, exact = carry
        g = jax.random.normal(key, (512,))
        m1 = ScaledFloat8().decode(stored)
        stored = ScaledFloat8().encode(m1 + (1 - b1) * (g - m1), key)
        return (stored, exact + (1 - b1) * (g - exact)), None

    start = ScaledFloat8().zeros(jnp.zeros(512)), jnp.zeros(512)
    (stored, exact), _ = jax.jit(lambda: jax.lax.scan(step, start, keys))()
    m1 = ScaledFloat8().decode(stored)
    assert np.std(m1) <= {0.9: 1.1, 0.99: 1.5, 0.999: 2.5, 0.9999: 6}[b1] * np.std(
        exact
    )


def test_a_slow_average_leaves_zero():
    """Even if a step is many orders of magnitude smaller than the block's largest
    entry."""
    codec = ScaledFloat16()
    size = np.array([1.0, 1e-4, 1e-5, 1e-6, 1e-7], np.float32)
    step = lambda m, t: codec.encode(0.9999 * codec.decode(m) + 1e-4 * size, (t, 0))
    run = jax.jit(
        lambda m: jax.lax.scan(lambda m, t: (step(m, t), None), m, jnp.arange(10_000))
    )
    end, _ = run(codec.encode(jnp.asarray([1.0, 0, 0, 0, 0])))
    left = np.asarray(codec.decode(end)) / size
    np.testing.assert_allclose(left[0], 1, rtol=0.05)
    np.testing.assert_allclose(left[1:], 1 - 0.9999**10_000, rtol=0.1)


#
# Rows without gradients, and spikes
#

EVERYWHERE = {
    name: StateFormat(fmt.m1, fmt.m2, fmt.nu, min_size=0)
    for name, fmt in (
        ("float32", StateFormat.float32()),
        ("half", StateFormat.half()),
        ("compact", StateFormat.compact()),
    )
}


def train(
    name: str, gradient: Any, steps: int, size: int
) -> tuple[AdEMAMixState, np.ndarray]:
    """The last state, and the magnitudes of all updates in learning rates."""
    optim = AdEMAMix(1.0, alpha=5.0, b3=0.9999, state_format=EVERYWHERE[name])

    def step(state: Any, t: Any) -> Any:
        updates, state = optim.update(gradient(t), state)
        return state, jnp.abs(updates)

    start = optim.init(jnp.zeros(size))
    run = jax.jit(lambda s: jax.lax.scan(step, s, jnp.arange(steps)))
    state, updates = run(start)
    return state, np.asarray(updates)


def normal(t: Any, size: int) -> jax.Array:
    return jax.random.normal(jax.random.fold_in(jax.random.key(0), t), (size,))


@pytest.mark.parametrize("name", ("half", "compact"))
def test_squares_without_gradients_decay(name: str):
    """After 1000 steps with gradients and 20,000 without, no update explodes."""
    noisy = lambda t: jnp.where(t < 1000, 1e-3, 0.0) * normal(t, 1024)
    exact, usual = train("float32", noisy, 21_000, 1024)
    state, found = train(name, noisy, 21_000, 1024)
    assert np.max(found) <= 1.5 * np.max(usual)
    logs = [np.log(np.float64(decoded(x).nu)) for x in (state, exact)]
    assert np.mean(logs[0]) == pytest.approx(np.mean(logs[1]), abs=np.log(6 / 5))
    # Nine numbers of one byte, and none of the errors of a random walk.
    assert np.max(np.abs(logs[0] - logs[1])) < 9 * np.log(6 / 5)


@pytest.mark.parametrize("name", ("half", "compact"))
def test_rows_with_a_gradient_now_and_then(name: str):
    """Each of the 16 rows has a gradient in one of 4992 steps."""
    row = jnp.arange(1024) // 64

    def sparse(t: Any) -> jax.Array:
        is_its_turn = (row == (t // 312) % 16) & (t % 312 == 0)
        return jnp.where(is_its_turn, normal(t, 1024), 0.0)

    _, usual = train("float32", sparse, 15_000, 1024)
    _, found = train(name, sparse, 15_000, 1024)
    assert np.max(found) <= 1.5 * np.max(usual)
    assert np.sum(found) == pytest.approx(np.sum(usual), rel=0.1)


@pytest.mark.parametrize("name", ("half", "compact"))
@pytest.mark.parametrize("spikes", ((1000,), (1000, 1003, 1100)), ids=str)
def test_a_spike_does_not_stop_its_neighbors(name: str, spikes: tuple[int, ...]):
    """A gradient of 1e10 among those of size 0.01. Later spikes find the block as the
    first one left it."""

    def spiked(t: Any) -> jax.Array:
        g = 0.01 * normal(t, 256)
        return g.at[0].set(jnp.where(jnp.isin(t, jnp.array(spikes)), 1e10, g[0]))

    _, usual = train("float32", spiked, 2200, 256)
    _, found = train(name, spiked, 2200, 256)
    medians = [np.median(x[:, 1:], axis=1) for x in (found, usual)]
    for steps in (slice(900, 1000), slice(1200, 1300), slice(2100, 2200)):
        ratio = np.mean(medians[0][steps]) / np.mean(medians[1][steps])
        assert 0.8 <= ratio <= 1.25


#
# Your own codec
#


class Halved(AbstractCodec):
    """The codec from the documentation. It stores plain float16."""

    def encode_real(self, value: Any, seed: Any) -> tuple[Any, ...]:
        return (value.astype(jnp.float16),)

    def decode_real(self, parts: tuple[Any, ...]) -> Any:
        return parts[0].astype(jnp.float32)

    def for_squares(self) -> AbstractCodec:
        return SplitBfloat16()


def test_a_codec_of_ones_own():
    fmt = StateFormat(m1=Halved(), m2=Halved(), nu=Halved(), min_size=0)
    optim = AdEMAMix(1e-3, state_format=fmt)
    state = optim.init(jnp.ones((3, 5)))
    assert isinstance(state.m1, Encoded) and state.m1.real[0].dtype == jnp.float16
    assert isinstance(state.nu.codec, SplitBfloat16)
    updates, _ = jax.jit(optim.update)(jnp.ones((3, 5)), state)
    expected, _ = AdEMAMix(1e-3).update(jnp.ones((3, 5)), AdEMAMix(1e-3).init(updates))
    np.testing.assert_allclose(updates, expected, rtol=1e-3)


def test_codecs_are_equal_and_hashable():
    assert ScaledFloat8() == ScaledFloat8() != ScaledFloat8(128)
    assert ScaledFloat8() != ScaledFloat16()
    assert hash(StateFormat.compact()) == hash(StateFormat.compact())
    assert StateFormat.compact() == StateFormat.compact() != StateFormat.half()
