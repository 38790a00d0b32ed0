"""Sharded states saved and restored by Orbax, as they are. A resumed run equals one
that was not interrupted, bit for bit."""

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
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import eqx_ademamix
from eqx_ademamix import AdEMAMix, Compensated, Offloaded, SimplifiedAdEMAMix

from .helpers import COMPACT, HAS_HOST_MEMORY, SCHEDULES, everywhere, make_zoo


ROOT = Path(__file__).parents[1]
FORMATS = {
    "float32": eqx_ademamix.StateFormat.float32(),
    "half": everywhere(eqx_ademamix.StateFormat.half()),
    "compact": COMPACT,
}


def ademamix(name: str) -> AdEMAMix:
    return AdEMAMix(1e-2, weight_decay=0.1, state_format=FORMATS[name], **SCHEDULES)


def simplified(name: str) -> SimplifiedAdEMAMix:
    rate: Any = eqx_ademamix.alpha_scheduler(1e-2, warmup=10)
    return SimplifiedAdEMAMix(rate, state_format=FORMATS[name])


OPTIMIZERS: dict[str, Any] = {
    **{name: ademamix(name) for name in FORMATS},
    **{f"simplified {name}": simplified(name) for name in FORMATS},
    **{f"compensated {name}": Compensated(ademamix(name)) for name in FORMATS},
    "b1=0": AdEMAMix(1e-2, b1=0.0, bias_correct_m2=True, **SCHEDULES),
    "chain": optax.chain(
        optax.clip(1.0),
        eqx_ademamix.scale_by_ademamix(
            0.9, 0.999, 0.99, 3.0, SCHEDULES["b3"], SCHEDULES["alpha"]
        ),
        optax.scale(-1e-2),
    ),
}
if HAS_HOST_MEMORY:
    OPTIMIZERS["offloaded"] = Offloaded(ademamix("compact"))
optimizers = pytest.mark.parametrize("name", OPTIMIZERS)
formats = pytest.mark.parametrize("name", FORMATS)


#
# Ways to save and restore a tree
#


class Api(NamedTuple):
    save: Callable[[str, Any], None]
    restore: Callable[[str, Any], Any]


def save_standard(path: str, tree: Any) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
        checkpointer.wait_until_finished()


def restore_standard(path: str, like: Any) -> Any:
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, like)


def save_pytree(path: str, tree: Any) -> None:
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def restore_pytree(path: str, like: Any) -> Any:
    args = ocp.checkpoint_utils.construct_restore_args(like)
    with ocp.PyTreeCheckpointer() as checkpointer:
        return checkpointer.restore(path, item=like, restore_args=args)


def save_managed(path: str, tree: Any) -> None:
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager(path, options=options) as manager:
        for i in range(3):
            manager.save(i, args=ocp.args.StandardSave(tree))


def restore_managed(path: str, like: Any) -> Any:
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

        def save_v1_async(path: str, tree: Any) -> None:
            v1.save_async(path, tree).result()

        def save_v1_managed(path: str, tree: Any) -> None:
            with v1.training.Checkpointer(path) as checkpointer:
                checkpointer.save_async(1, tree).result()

        def restore_v1_managed(path: str, like: Any) -> Any:
            with v1.training.Checkpointer(path) as checkpointer:
                return checkpointer.load(1, like)

        APIS["v1"] = Api(v1.save, v1.load)
        APIS["v1, async"] = Api(save_v1_async, v1.load)
        APIS["v1.training"] = Api(save_v1_managed, restore_v1_managed)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "checkpoint")


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


@pytest.mark.parametrize(
    ("api", "num_steps"),
    (*((api, 6) for api in APIS), ("StandardCheckpointer", 12)),
)
@optimizers
def test_resume_is_exact(name: str, api: str, num_steps: int, path: str):
    """The template is what `init` returned. The warm-ups end after 10 steps."""
    before = undisturbed(name, num_steps)
    APIS[api].save(path, before)
    after = APIS[api].restore(path, make_run(name, mesh_of(8)))
    assert_same(after, before)
    for _ in range(6):
        after = jitted(name)(after)  # restored arrays are donated as they are
    assert_same(after, undisturbed(name, num_steps + 6))
    assert jitted(name)._cache_size() == 1


#
# Other meshes
#


# The number of devices, and how the parameters are spread over them.
LAYOUTS = {
    "FSDP on 8": (8, spread),
    "FSDP on 4": (4, spread),
    "ZeRO-1 on 8": (8, replicated),
    "ZeRO-1 on 2": (2, replicated),  # splits another axis
}
MOVES = (
    ("FSDP on 8", "FSDP on 4"),
    ("FSDP on 4", "FSDP on 8"),
    ("FSDP on 8", "ZeRO-1 on 8"),
    ("ZeRO-1 on 8", "FSDP on 8"),
    ("ZeRO-1 on 8", "ZeRO-1 on 2"),
    ("ZeRO-1 on 2", "FSDP on 8"),
)


def abstract_run(name: str, layout: str) -> Run:
    """The types and shardings of a run. No array is made."""
    size, spread_params = LAYOUTS[layout]
    mesh = mesh_of(size)
    params, state = eqx.filter_eval_shape(make_run, name, mesh)
    params = placed(params, jax.tree.map(lambda x: spread_params(x, mesh), params))
    optim = OPTIMIZERS[name]
    where = eqx_ademamix.state_sharding(optim, params, mesh, axis="data")
    return Run(params, placed(state, where))


def placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


def shardings(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, tree)


@pytest.mark.parametrize(("old", "new"), MOVES)
@formats
def test_another_mesh(name: str, old: str, new: str, path: str):
    before = jax.device_put(undisturbed(name, 6), shardings(abstract_run(name, old)))
    save_standard(path, before)
    like = abstract_run(name, new)
    after = restore_standard(path, like)
    assert digest(after) == digest(before)
    assert shardings(after) == shardings(like)

    there: Any = jax.jit(
        ft.partial(step, OPTIMIZERS[name]),
        out_shardings=shardings(like),
        donate_argnums=0,
    )
    for _ in range(6):
        after = there(after)
    assert shardings(after) == shardings(like)
    assert there._cache_size() == 1
    assert digest(after) == digest(undisturbed(name, 12))


@pytest.mark.parametrize("api", APIS)
def test_every_api_restores_onto_another_mesh(api: str, path: str):
    before, like = undisturbed("compact", 6), abstract_run("compact", "ZeRO-1 on 2")
    APIS[api].save(path, before)
    after = APIS[api].restore(path, like)
    assert digest(after) == digest(before)
    assert shardings(after) == shardings(like)


#
# Another process, saving in the background, whole modules
#


RESUMED = (*FORMATS, "simplified compact", "compensated compact")


def resume(folder: str) -> None:
    """What the other process does. It prints a digest of each resumed run."""
    for name in RESUMED:
        run = restore_standard(f"{folder}/{name}", make_run(name, mesh_of(8)))
        print(digest(train(jitted(name), run, 6)))


def test_resume_in_a_fresh_process(tmp_path: Path):
    for name in RESUMED:
        save_standard(f"{tmp_path}/{name}", undisturbed(name, 6))
    code = (
        "import sys; from tests import conftest, test_orbax; "
        "test_orbax.resume(sys.argv[1])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [digest(undisturbed(name, 12)) for name in RESUMED]


@formats
def test_the_run_goes_on_while_orbax_saves(name: str, path: str):
    """Arrays can be donated as soon as `save` returns."""
    run = train(jitted(name), make_run(name, mesh_of(8)), 6)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, run)
        for _ in range(6):
            run = jitted(name)(run)
        checkpointer.wait_until_finished()
        saved = checkpointer.restore(path, run)
    assert_same(saved, undisturbed(name, 6))
    assert_same(run, undisturbed(name, 12))


def has_entries(x: Any) -> bool:
    """Whether Orbax takes it. It refuses functions and arrays of size zero."""
    return eqx.is_array(x) and x.size > 0


@pytest.mark.parametrize("api", APIS)
def test_whole_modules(api: str, path: str):
    """A model with functions, static fields and an empty array; its state; a key."""
    optim = AdEMAMix(1e-3, state_format=COMPACT)

    def make(seed: int) -> Any:
        key = jax.random.key(seed)
        model = {"zoo": make_zoo(key), "empty": jnp.zeros((0, 3))}
        state = eqx_ademamix.init(optim, model)
        return model, state, jax.random.key_data(key), jnp.int32(seed)

    saved, template = make(1), make(2)
    APIS[api].save(path, eqx.filter(saved, has_entries))
    arrays, rest = eqx.partition(template, has_entries)
    restored = eqx.combine(APIS[api].restore(path, arrays), rest)
    assert jtu.tree_structure(restored) == jtu.tree_structure(template)
    assert digest(eqx.filter(restored, eqx.is_array)) == digest(
        eqx.filter(saved, eqx.is_array)
    )
    model, state, key_data, _ = restored
    assert model["zoo"].function is jnp.tanh and model["empty"].shape == (0, 3)
    assert jnp.all(jax.random.wrap_key_data(key_data) == jax.random.key(1))
    grads = eqx.filter(model, eqx.is_inexact_array)
    # Traces the step, and so checks that the state fits the model.
    eqx.filter_eval_shape(eqx_ademamix.update, optim, grads, state, model)


@pytest.mark.parametrize("api", APIS)
@formats
def test_complex_moments(name: str, api: str, path: str):
    """An encoded complex moment has two groups of arrays."""
    x = jax.device_put(
        jnp.ones((8, 256), jnp.complex64), spread(np.ones(8), mesh_of(8))
    )
    like = eqx_ademamix.init(AdEMAMix(1e-3, state_format=FORMATS[name]), x)
    state = jax.tree.map(lambda x: x + jnp.asarray(1, x.dtype), like)
    APIS[api].save(path, state)
    assert_same(APIS[api].restore(path, like), state)
