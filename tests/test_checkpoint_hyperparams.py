"""`load` compares the hyperparameters of the run that was saved, field by field."""

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
import pytest

from eqx_ademamix import (
    AdEMAMix,
    CheckpointError,
    Compensated,
    SimplifiedAdEMAMix,
    StateFormat,
    alpha_scheduler,
    beta3_scheduler,
    decay_mask,
    load,
    save,
)

from .helpers import make_mlp


ROOT = pathlib.Path(__file__).parents[1]
MODEL = make_mlp()
W = jnp.ones((4, 3))


def scheduled(**changes: Any) -> AdEMAMix:
    options: Any = dict(
        learning_rate=optax.cosine_decay_schedule(1e-3, 100),
        b3=beta3_scheduler(0.999, 0.9, warmup=10),
        alpha=alpha_scheduler(5.0, warmup=10),
        weight_decay_mask=decay_mask(MODEL),
        trainable=eqx.is_inexact_array,
    )
    return AdEMAMix(**{**options, **changes})


def closure(rate: float) -> Callable[[Any], Any]:
    return lambda count: rate


class Schedule:
    """A user's own callable."""

    def __init__(self, rate: float):
        self.rate = rate

    def __call__(self, count: Any) -> float:
        return self.rate

    def method(self, count: Any) -> float:
        return self.rate


class Module(eqx.Module):
    rate: float
    length: int = eqx.field(static=True)

    def __call__(self, count: Any) -> float:
        return self.rate


def recursive() -> Any:
    def schedule(count: Any) -> Any:
        return schedule if count is None else 1e-3

    return schedule


ALL_TRUE = jax.tree.map(lambda _: True, eqx.filter(MODEL, eqx.is_inexact_array))
PLANS = (
    ("a number", scheduled(b2=0.999), scheduled(b2=0.99), r"optim\.b2 is 0\.999 in .*, but 0\.99 in `optim` \(the first of 1 that differ\)"),
    ("an array", scheduled(eps=jnp.asarray(1e-3)), scheduled(eps=jnp.asarray(1e-4)), r"optim\.eps is float32\[\] 0\.001"),
    ("a number, an array", scheduled(eps=1e-3), scheduled(eps=jnp.asarray(1e-3)), r"optim\.eps is 0\.001 in .*, but float32"),
    ("a schedule", scheduled(), scheduled(alpha=alpha_scheduler(5.0, warmup=20)), r"optim\.alpha\.warmup is 10\.0 in .*, but 20\.0"),
    ("no schedule", scheduled(), scheduled(b3=0.999), r"optim\.b3 is Beta3Schedule in .*, but 0\.999 in `optim` \(the first of 6"),
    ("optax's schedule", scheduled(), scheduled(learning_rate=optax.cosine_decay_schedule(2e-3, 100)), r"optim\.learning_rate\.init_value is 0\.001 in .*, but 0\.002"),
    ("another function", scheduled(), scheduled(learning_rate=optax.linear_schedule(1e-3, 0.0, 100)), r"optim\.learning_rate is cosine_decay_schedule.* but .*polynomial"),
    ("a closure", scheduled(learning_rate=closure(1e-3)), scheduled(learning_rate=closure(2e-3)), r"optim\.learning_rate\.rate is 0\.001"),
    ("a default", scheduled(learning_rate=lambda t, rate=1e-3: rate), scheduled(learning_rate=lambda t, rate=2e-3: rate), r"optim\.learning_rate\.__defaults__\[0\] is 0\.001"),
    ("jitted", scheduled(learning_rate=jax.jit(closure(1e-3))), scheduled(learning_rate=jax.jit(closure(2e-3))), r"optim\.learning_rate\.__wrapped__\.rate is 0\.001"),
    ("partial", scheduled(learning_rate=jtu.Partial(max, 1e-3)), scheduled(learning_rate=jtu.Partial(max, 2e-3)), r"optim\.learning_rate\.args\[0\] is 0\.001"),
    ("an object", scheduled(learning_rate=Schedule(1e-3)), scheduled(learning_rate=Schedule(2e-3)), r"optim\.learning_rate\.rate is 0\.001"),
    ("a method", scheduled(learning_rate=Schedule(1e-3).method), scheduled(learning_rate=Schedule(2e-3).method), r"optim\.learning_rate\.__self__\.rate is 0\.001"),
    ("a module", scheduled(learning_rate=Module(1e-3, 1)), scheduled(learning_rate=Module(1e-3, 2)), r"optim\.learning_rate\.length is 1 in .*, but 2"),
    ("a mask", scheduled(), scheduled(weight_decay_mask=ALL_TRUE), r"optim\.weight_decay_mask\.layers\[0\]\.bias is False in .*, but True"),
    ("scales", scheduled(), scheduled(learning_rate_scale=0.5), r"optim\.learning_rate_scale is 1\.0 in .*, but 0\.5"),
    ("a flag", scheduled(), scheduled(decoupled_weight_decay=True), r"optim\.decoupled_weight_decay is False"),
    ("the format", scheduled(), scheduled(state_format=StateFormat.compact()), r"optim\.state_format\.m1 is Dense in .*, but ScaledFloat8"),
    ("another optimizer", scheduled(), SimplifiedAdEMAMix(1e-3), "optim is AdEMAMix in .*, but SimplifiedAdEMAMix"),
    ("compensated", Compensated(scheduled()), Compensated(scheduled(), bits=8), r"optim\.bits is 16 in .*, but 8"),
    ("inside", Compensated(scheduled()), Compensated(scheduled(b2=0.99)), r"optim\.optim\.b2 is 0\.999"),
    ("optax", optax.chain(optax.clip(1.0), optax.adam(1e-3)), optax.chain(optax.clip(2.0), optax.adam(1e-3)), r"max_delta is 1\.0 in .*, but 2\.0"),
    ("large arrays", scheduled(learning_rate_scale={"w": jnp.arange(9.0)}), scheduled(learning_rate_scale={"w": jnp.ones(9)}), r"\['w'\] is float32\[9\] with the checksum [0-9a-f]{8}"),
    ("without", None, scheduled(), "was saved without an optimizer"),
)  # fmt: skip


@pytest.mark.parametrize(
    "old,new,text", [x[1:] for x in PLANS], ids=[x[0] for x in PLANS]
)
def test_other_hyperparameters(old: Any, new: Any, text: str, tmp_path: pathlib.Path):
    # Slow to import, and the last test does not need it.
    from .test_error_messages import is_on_page

    path = tmp_path / "run.safetensors"
    save(path, W, optim=old)
    with pytest.raises(CheckpointError, match=text) as error:
        load(path, W, optim=new)
    assert is_on_page(str(error.value))
    with pytest.warns(UserWarning, match=text) as record:
        assert (load(path, W, optim=new, strict=False) == W).all()
    assert len(record) == 1
    assert (load(path, W) == W).all()
    if old is not None:
        assert (load(path, W, optim=old) == W).all()


def test_other_arrays_are_never_loaded(tmp_path: pathlib.Path):
    """`strict=False` is about hyperparameters only."""
    path = tmp_path / "run.safetensors"
    save(path, W, optim=scheduled())
    with pytest.raises(CheckpointError, match="shape"):
        load(path, W.T, optim=scheduled(), strict=False)


SAME_EVERYWHERE = """
import json

from eqx_ademamix._checkpoint.fields import fields_of
from tests.test_checkpoint_hyperparams import *
optims = [plan for row in PLANS for plan in row[1:3] if plan is not None]
optims += [scheduled(learning_rate=recursive()), AdEMAMix(1e-3, trainable=eqx.is_array)]
optims += [optax.MultiSteps(optax.adamw(1e-3), 3), Compensated(optax.lion(1e-3))]
texts = [fields_of(optim) for optim in optims]
print(json.dumps(texts))
"""


def test_two_processes_have_the_same_texts():
    """No text has an address or depends on the order of a set."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", SAME_EVERYWHERE]
    output = subprocess.check_output(command, env=environment, timeout=300)
    names: dict[str, Any] = {}
    exec(SAME_EVERYWHERE, names)
    assert json.loads(output) == names["texts"] and len(names["texts"]) > 40
    assert b"0x" not in output
