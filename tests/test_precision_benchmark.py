"""The parts of `benchmarks/precision.py` that are not in the package."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .helpers import x64


def test_the_dynamic_map(module: Any):
    """Matches the paper that defines the map: 256 numbers, most dense near zero."""
    numbers = module("_storage").dynamic_map()
    assert len(numbers) == len(set(numbers)) == 256
    assert numbers.max() == 1.0 and 0.0 in numbers
    positive = numbers[numbers > 0]
    np.testing.assert_allclose(positive[0], 0.55e-6)
    np.testing.assert_allclose(positive[-2], 1 - 0.9 / 128)
    assert [np.sum(positive <= 10.0**-k) for k in (6, 5, 4, 3)] == [1, 3, 7, 15]
    assert np.array_equal(numbers[:127], -positive[:-1][::-1])


def test_other_formats_are_what_they_are_called(module: Any):
    storages = {s.name: s for s in module("_storage").STORAGES}
    x = jnp.asarray(np.random.default_rng(0).normal(size=512), jnp.float32)
    for name, bound in (
        ("float32", 0.0),
        ("bfloat16, to nearest", 2.0**-8),
        ("bfloat16, stochastic", 2.0**-7),
        ("float16, scaled, to nearest", 2.0**-11),
    ):
        y = storages[name].round_trip(x, jax.random.key(0))
        assert np.max(np.abs(y / x - 1)) <= bound
    for name, bound in (
        ("int16, linear", 0.5 / 32767),
        ("int8, linear", 0.5 / 127),
        ("int8, dynamic map", 0.5 * 0.9 / 64),
    ):
        y = storages[name].round_trip(x, jax.random.key(0))
        assert np.max(np.abs(y - x)) <= 1.01 * bound * np.max(np.abs(x))


def test_the_protocol(module: Any):
    precision = module("precision")
    storages = {s.name: s for s in precision.STORAGES}
    with x64():
        exact = precision.measure(storages["float32"], 800, 0)
        coarse = precision.measure(storages["bfloat16, to nearest"], 800, 0)
    assert exact.relative_error < 1e-5 < 1e-2 < coarse.relative_error
    np.testing.assert_allclose(exact.left, 0.9999**200, rtol=1e-5)
    np.testing.assert_allclose(coarse.left, 1.0, rtol=1e-3)
    assert len(exact.errors) == precision.NUM_POINTS


def test_a_spike_is_seen(module: Any):
    training = module("_precision_training")
    losses = np.linspace(2, 1, 200)
    assert training.largest_rise(losses) == 0.0
    losses[100:140] += 0.5
    assert 0.3 < training.largest_rise(losses) < 0.5


def test_the_page_says_what_the_trainings_found(module: Any):
    training = module("_precision_training")
    docs = Path(__file__).parents[1] / "docs"
    found = training.read_outcomes(docs / "precision_training.csv")
    page = (docs / "precision.md").read_text()
    for name in training.VARIANTS:
        losses = [o.validation_loss for o in sorted(found) if o.variant == name]
        assert len(losses) == 3
        cells = " | ".join(f"{loss:.4f}" for loss in (*losses, np.mean(losses)))
        assert f"| {cells} |" in page, name
