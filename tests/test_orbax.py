"""Sharded states saved and restored by Orbax, as they are. A resumed run equals one that
was not interrupted, bit for bit."""

import functools as ft
import hashlib
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import eqx_ademamix
from eqx_ademamix import AdEMAMix, Compensated, SimplifiedAdEMAMix

from .helpers import COMPACT, SCHEDULES, everywhere, make_zoo


ROOT = Path(__file__).parents[1]
FORMATS = {
    "float32": eqx_ademamix.StateFormat.float32(),
    "half": everywhere(eqx_ademamix.StateFormat.half()),
    "compact": COMPACT,
}


def ademamix(name: str) -> AdEMAMix:
    return AdEMAMix(1e-2, weight_decay=0.1, state_format=FORMATS[name], **SCHEDULES)


def simplified(name: str) -> SimplifiedAdEMAMix:
    rate = eqx_ademamix.alpha_scheduler(1e-2, warmup=10)
    return SimplifiedAdEMAMix(rate, state_format=FORMATS[name])


OPTIMIZERS: dict[str, Any] = {
    **{name: ademamix(name) for name in FORMATS},
    **{f"simplified {name}": simplified(name) for name in FORMATS},
    **{f"compensated {name}": Compensated(ademamix(name)) for name in FORMATS},
    "b1=0": AdEMAMix(1e-2, b1=0.0, bias_correct_m2=True, **SCHEDULES),
}
optimizers = pytest.mark.parametrize("name", OPTIMIZERS)
formats = pytest.mark.parametrize("name", FORMATS)


#
# Ways to save and restore a tree
#


class Api(NamedTuple):
    save: Callable[[Path, Any], None]
    restore: Callable[[Path, Any], Any]


def save_standard(path: Path, tree: Any) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
        checkpointer.wait_until_finished()


def restore_standard(path: Path, like: Any) -> Any:
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, like)


def save_pytree(path: Path, tree: Any) -> None:
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def restore_pytree(path: Path, like: Any) -> Any:
    args = ocp.checkpoint_utils.construct_restore_args(like)
    with ocp.PyTreeCheckpointer() as checkpointer:
        return checkpointer.restore(path, item=like, restore_args=args)


def save_managed(path: Path, tree: Any) -> None:
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager(path, options=options) as manager:
        for i in range(3):
            manager.save(i, args=ocp.args.StandardSave(tree))


def restore_managed(path: Path, like: Any) -> Any:
    with ocp.CheckpointManager(path) as manager:
        assert list(manager.all_steps()) == [1, 2]
        return manager.restore(2, args=ocp.args.StandardRestore(like))


APIS = {
    "StandardCheckpointer": Api(save_standard, restore_standard),
    "PyTreeCheckpointer": Api(save_pytree, restore_pytree),
    "CheckpointManager": Api(save_managed, restore_managed),
}

# Old versions of Orbax have no such API, or functions of other names.
if importlib.util.find_spec("orbax.checkpoint.experimental.v1"):
    from orbax.checkpoint.experimental import v1

    if hasattr(v1, "save_async"):

        def save_v1_async(path: Path, tree: Any) -> None:
            v1.save_async(path, tree).result()

        def save_v1_managed(path: Path, tree: Any) -> None:
            with v1.training.Checkpointer(path) as checkpointer:
                checkpointer.save_async(1, tree).result()

        def restore_v1_managed(path: Path, like: Any) -> Any:
            with v1.training.Checkpointer(path) as checkpointer:
                return checkpointer.load(1, like)

        APIS["v1"] = Api(v1.save, v1.load)
        APIS["v1, async"] = Api(save_v1_async, v1.load)
        APIS["v1.training"] = Api(save_v1_managed, restore_v1_managed)


#
# A run
#


class Run(NamedTuple):
    """What changes from step to step."""

    params: Any
    state: Any


def mesh_of(size: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:size]), ("data",))


def spread(x: Any, mesh: Mesh) -> NamedSharding:
    """Splits an array along its first axis, if the devices divide that."""
    divides = x.ndim > 0 and x.shape[0] % mesh.size == 0
    return NamedSharding(mesh, P("data") if divides else P())


def replicated(x: Any, mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def make_params(mesh: Mesh) -> dict[str, Any]:
    """An array that the devices divide, one that they do not, and a gap."""
    x = np.random.default_rng(0).normal(size=(16, 512)).astype(np.float32)
    params = {
        "weight": jnp.asarray(x),
        "bias": jnp.asarray(x[:3, 0], jnp.bfloat16),
        "frozen": None,
    }
    return jax.tree.map(lambda x: jax.device_put(x, spread(x, mesh)), params)


def make_run(name: str, mesh: Mesh) -> Run:
    params = make_params(mesh)
    return Run(params, eqx_ademamix.init(OPTIMIZERS[name], params))


def step(optim: Any, run: Run) -> Run:
    params, state = run
    grads = jax.tree.map(lambda x: jnp.sin(x) * jnp.cos(x / 2), params)
    updates, state = eqx_ademamix.update(optim, grads, state, params)
    return Run(eqx.apply_updates(params, updates), state)


@ft.cache
def jitted(name: str) -> Any:
    return jax.jit(ft.partial(step, OPTIMIZERS[name]), donate_argnums=0)


def train(step: Any, run: Run, num_steps: int) -> Run:
    """Leaves `run` as it is: the first step is donated copies."""
    run = jax.tree.map(jnp.copy, run)
    for _ in range(num_steps):
        run = step(run)
    return run


@ft.cache
def undisturbed(name: str, num_steps: int) -> Run:
    return train(jitted(name), make_run(name, mesh_of(8)), num_steps)


def assert_same(x: Any, y: Any) -> None:
    """Equal bits, types and shardings."""
    assert jtu.tree_structure(x) == jtu.tree_structure(y)
    assert digest(x) == digest(y)
    for a, b in zip(jtu.tree_leaves(x), jtu.tree_leaves(y), strict=True):
        assert a.sharding == b.sharding


def digest(tree: Any) -> str:
    leaves = [np.asarray(x) for x in jtu.tree_leaves(tree)]
    types = [(x.shape, x.dtype.name) for x in leaves]
    return hashlib.sha256(
        repr(types).encode() + b"".join(x.tobytes() for x in leaves)
    ).hexdigest()


#
# Resuming
#


@pytest.mark.parametrize("api", APIS)
@optimizers
def test_resume_is_exact(name: str, api: str, tmp_path: Path):
    """The template is what `init` returned. The warm-ups end after 10 steps."""
    before = undisturbed(name, 6)
    APIS[api].save(tmp_path / "checkpoint", before)
    after = APIS[api].restore(tmp_path / "checkpoint", make_run(name, mesh_of(8)))
    assert_same(after, before)
    for _ in range(6):
        after = jitted(name)(after)  # restored arrays are donated as they are
    assert_same(after, undisturbed(name, 12))
    assert jitted(name)._cache_size() == 1
