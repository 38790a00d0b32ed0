"""N steps, `save`, `load` in a new process, and N more steps: the bits of 2 N steps."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
from safetensors.numpy import load_file

import eqx_ademamix
from eqx_ademamix import (
    AdEMAMix,
    Compensated,
    Dense,
    Offloaded,
    ScaledFloat8,
    ScaledFloat16,
    SimplifiedAdEMAMix,
    SplitBfloat16,
    StateFormat,
    alpha_scheduler,
    beta3_scheduler,
    decay_mask,
    init,
    load,
    save,
    update,
)

from .helpers import HAS_HOST_MEMORY


ROOT = Path(__file__).parents[1]
N = 4  # steps before the file, and as many after it
HALF_WAY = {"in the warm-up": 100, "to its end": N, "past it": N - 2}

COMPACT = StateFormat.compact()
FORMATS = {
    "float32": StateFormat.float32(),
    "half": StateFormat.half(),
    "compact": COMPACT,
    "bfloat16": StateFormat(jnp.bfloat16, jnp.bfloat16, jnp.bfloat16),
    "split": StateFormat(SplitBfloat16(), SplitBfloat16(), SplitBfloat16()),
    "float8": StateFormat(ScaledFloat8(), ScaledFloat8(), ScaledFloat8()),
    "mixed": StateFormat(Dense(jnp.float16), ScaledFloat16(), SplitBfloat16()),
}


class Model(eqx.Module):
    """Parameters of several shapes, a buffer, and a function."""

    linear: eqx.nn.Linear
    gain: jax.Array
    steps: jax.Array
    activation: Any

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.activation(self.linear(x)) * self.gain


class Run(NamedTuple):
    model: Model
    state: Any
    key: jax.Array


def make_model(dtype: Any) -> Model:
    linear = eqx.nn.Linear(130, 3, key=jax.random.key(0))  # more than one block wide
    model = Model(linear, jnp.ones(()), jnp.arange(3), jnp.tanh)
    arrays, rest = eqx.partition(model, eqx.is_inexact_array)
    return eqx.combine(eqx_ademamix.tree_cast(arrays, dtype), rest)


def scheduled(warmup: int = 100, **options: Any) -> Any:
    return AdEMAMix(
        optax.warmup_cosine_decay_schedule(0.0, 1e-2, min(warmup, 50), 200),
        b3=beta3_scheduler(0.999, 0.9, warmup=warmup),
        alpha=alpha_scheduler(5.0, warmup=warmup),
        weight_decay=0.1,
        weight_decay_mask=decay_mask(make_model(jnp.float32)),
        **options,
    )


def simplified(**options: Any) -> SimplifiedAdEMAMix:
    return SimplifiedAdEMAMix(
        optax.cosine_decay_schedule(1e-3, 100), weight_decay=0.1, **options
    )


CASES: dict[str, tuple[Any, Any]] = {
    **{f"AdEMAMix, {i}": (scheduled(warmup=k), None) for i, k in HALF_WAY.items()},
    **{
        f"{name}, {i}": (make(state_format=f), None)
        for name, make in (("AdEMAMix", scheduled), ("simplified", simplified))
        for i, f in FORMATS.items()
    },
    "b1=0": (scheduled(b1=0.0), None),
    "bias-corrected": (scheduled(bias_correct_m2=True), None),
    "normalized": (simplified(normalize=True), None),
    "compensated": (Compensated(scheduled()), jnp.bfloat16),
    "compensated, 8 bits": (Compensated(scheduled(), bits=8), jnp.bfloat16),
    "compensated, compact": (Compensated(scheduled(state_format=COMPACT)), jnp.float16),
    "compensated, simplified": (Compensated(simplified()), jnp.bfloat16),
    "optax": (eqx_ademamix.ademamix(optax.cosine_decay_schedule(1e-2, 100)), None),
    "chain": (
        optax.chain(
            optax.clip_by_global_norm(0.1),
            scheduled(),  # pyright: ignore[reportArgumentType]
        ),
        None,
    ),
}  # fmt: skip
if HAS_HOST_MEMORY:
    CASES["offloaded"] = Offloaded(scheduled(state_format=COMPACT)), None


def start(name: str) -> Run:
    optim, dtype = CASES[name]
    model = make_model(dtype or jnp.float32)
    return Run(model, init(optim, model), jax.random.key(7))


@eqx.filter_jit(donate="all-except-first")
def step(optim: Any, run: Run) -> Run:
    key, now = jax.random.split(run.key)
    x = jax.random.normal(now, (4, 130), run.model.gain.dtype)
    loss_fn = lambda model: (jax.vmap(model)(x).astype(jnp.float32) ** 2).mean()
    grads = eqx.filter_grad(loss_fn)(run.model)
    updates, state = update(optim, grads, run.state, run.model)
    return Run(eqx.apply_updates(run.model, updates), state, key)


def train(name: str, run: Run) -> Run:
    """Takes N steps."""
    for _ in range(N):
        run = step(CASES[name][0], run)
    return run


def file_of(folder: Path, part: str, name: str) -> Path:
    return folder / part / f"{name}.safetensors"


#
# In two processes
#


def begin(folder: Path) -> None:
    """All cases: N steps into a file, and then as many into another."""
    for name, (optim, _) in CASES.items():
        run = train(name, start(name))
        save(file_of(folder, "half", name), run, optim=optim)
        save(file_of(folder, "peace", name), train(name, run), optim=optim)


def resume(folder: Path) -> None:
    """All cases: N steps from the file on."""
    for name, (optim, _) in CASES.items():
        # Shapes do not say which arrays are in host memory.
        is_offloaded = isinstance(optim, Offloaded)
        like = start(name) if is_offloaded else eqx.filter_eval_shape(start, name)
        run = load(file_of(folder, "half", name), like, optim=optim)
        save(file_of(folder, "resumed", name), train(name, run), optim=optim)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for part in ("begin", "resume"):
        script = (
            "import pathlib, sys\n"
            "from tests import test_resume_exact\n"
            f"test_resume_exact.{part}(pathlib.Path(sys.argv[1]))\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", script, str(folder)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", CASES)
def test_the_same_bits(name: str, folder: Path):
    """Of the whole file: model, state, key, and what it says about them."""
    files = [file_of(folder, part, name) for part in ("half", "peace", "resumed")]
    half, peace, resumed = (path.read_bytes() for path in files)
    assert resumed == peace != half
    tensors, others = map(load_file, files[:2])
    changed = {i for i, x in tensors.items() if (x != others[i]).any()}
    assert ".key" in changed and ".model.steps" not in changed
    assert any(i.startswith(".model.") for i in changed)
