"""Settings for all tests: eight devices and strict promotion."""

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType


# Must be set before JAX is imported, because JAX reads it then.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import pytest


jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def standard_promotion():
    """For tests that run optax code, which adds integers and floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a benchmark. The files in that folder import each other by name."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module


@pytest.fixture
def getkey():
    # Imported here, because jaxtyping's import hook must come before Equinox.
    import equinox.internal as eqxi

    return eqxi.GetKey()
