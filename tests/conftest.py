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


@pytest.fixture(scope="session", autouse=True)
def compile_once(tmp_path_factory: pytest.TempPathFactory):
    """Tests, and the processes that they start, share compiled programs, because
    compiling takes most of the time. Each worker has its own cache, because JAX does
    not write the files of a cache atomically."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("cache")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in options.items():
            jax.config.update(name, value)
            patch.setenv(name.upper(), str(value))
        yield


@pytest.fixture
def standard_promotion():
    """For tests that run optax code, which adds integers and floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def random_numbers_of_jax_0_5():
    """For tests whose facts depend on random numbers: older versions have others."""
    with jax.threefry_partitionable(True):
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
