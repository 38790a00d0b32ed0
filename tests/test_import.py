"""What importing the package does, and what it leaves for the user to do after it."""

import os
import pathlib
import socket
import subprocess
import sys

import eqx_ademamix


ROOT = pathlib.Path(__file__).parents[1]


def run(program: str) -> str:
    """Runs a program in a process of its own, and returns what it printed."""
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_importing_starts_no_backend():
    """The number of devices can still be chosen afterwards."""
    assert run(
        "import os, eqx_ademamix\n"
        "os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=3'\n"
        "import jax\n"
        "print(jax.device_count())\n"
    ).split() == ["3"]


def test_importing_leaves_room_for_several_processes():
    """`jax.distributed.initialize` must come before the backend starts."""
    assert run(
        "import eqx_ademamix, jax\n"
        f"jax.distributed.initialize('127.0.0.1:{free_port()}', 1, 0)\n"
        "print(jax.process_count())\n"
        "jax.distributed.shutdown()\n"
    ).split() == ["1"]


def test_optimizers_can_be_made_before_the_backend():
    """Neither Python numbers, nor schedules, nor formats are made into arrays."""
    assert run(
        "import os, eqx_ademamix as e\n"
        "e.AdEMAMix(1e-3, b3=e.beta3_scheduler(0.9999, 0.9, warmup=10),"
        " state_format=e.StateFormat.compact())\n"
        "e.SimplifiedAdEMAMix(1e-3, alpha=e.alpha_scheduler(5.0, warmup=10))\n"
        "os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=2'\n"
        "import jax\n"
        "print(jax.device_count())\n"
    ).split() == ["2"]


def test_importing_needs_no_optional_package():
    assert run(
        "import sys\n"
        "sys.modules['safetensors'] = None\n"
        "import eqx_ademamix\n"
        "print(eqx_ademamix.save.__name__)\n"
    ).split() == ["save"]


def test_the_package_is_typed():
    assert (pathlib.Path(eqx_ademamix.__file__).parent / "py.typed").exists()
