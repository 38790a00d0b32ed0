"""Settings for all tests: eight devices, strict promotion."""

import os


# Before JAX is imported, which reads it.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import pytest


jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def standard_promotion():
    """For tests that run the arithmetic of optax, which adds integers and floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def getkey():
    # Delayed: jaxtyping's import hook must come before the first import of Equinox.
    import equinox.internal as eqxi

    return eqxi.GetKey()
