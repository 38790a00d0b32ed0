"""ZeRO-1: `state_sharding` splits the state of replicated parameters. These tests read
shardings, bytes per device, and the collectives of compiled programs."""

import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import eqx_ademamix
from eqx_ademamix import (
    AdEMAMix,
    Compensated,
    Offloaded,
    SimplifiedAdEMAMix,
    StateFormat,
    sharding_report,
    state_report,
    state_sharding,
)
from eqx_ademamix._memory import HOST

from .helpers import COMPACT, HAS_HOST_MEMORY, assert_trees_close, everywhere


FORMATS = {
    "float32": StateFormat.float32(),
    "bfloat16": StateFormat(jnp.bfloat16, jnp.bfloat16, jnp.bfloat16),
    "half": everywhere(StateFormat.half()),
    "compact": COMPACT,
}
formats = pytest.mark.parametrize("name", FORMATS)

# Shapes, and how the state of `compact()` is split 8 ways.
SPECS = {
    "matrix": ((64, 2048), P(None, "data")),  # both axes hold whole blocks: the larger
    "rows": ((64, 512), P("data")),  # 512 / 8 is not a multiple of 256
    "kernel": ((64, 64, 3, 3), P("data")),
    "narrow": ((4096, 40), P("data")),  # blocks along both axes
    "stacked": ((8, 4, 96), P("data")),
    "vector": ((4096,), P("data")),  # two blocks on each device
    "span": ((1024,), P("data")),  # no whole blocks, but 8 divides it
    "odd": ((7, 100), P()),  # 8 divides neither axis
    "empty": ((0, 8), P()),
    "scalar": ((), P()),
}


def mesh_of(shape: tuple[int, ...] = (8,), names: tuple[str, ...] = ("data",)) -> Mesh:
    return Mesh(np.array(jax.devices()[: np.prod(shape)]).reshape(shape), names)


def meshes() -> dict[str, Mesh]:
    """With automatic axes and, where JAX has them, with explicit ones."""
    found = {"auto": mesh_of()}
    if hasattr(jax.sharding, "AxisType"):
        kind: Any = jax.sharding.AxisType.Explicit
        found["explicit"] = Mesh(np.array(jax.devices()), ("data",), axis_types=(kind,))
    return found


MESHES = meshes()


def make_params(dtype: Any = jnp.float32) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    return {k: jnp.asarray(rng.normal(size=s), dtype) for k, (s, _) in SPECS.items()}


def everywhere_on(mesh: Mesh, tree: Any) -> Any:
    return jax.device_put(tree, NamedSharding(mesh, P()))


def spec_text(sharding: Any) -> tuple[Any, ...]:
    """Without axes that are not split."""
    spec = tuple(sharding.spec)
    while spec and spec[-1] is None:
        spec = spec[:-1]
    return spec


def assert_sharded(state: Any, shardings: Any) -> None:
    pairs = zip(jtu.tree_leaves(state), jtu.tree_leaves(shardings), strict=True)
    for x, sharding in pairs:
        assert x.sharding.is_equivalent_to(sharding, x.ndim), x.shape


def bytes_on(device: Any, state: Any) -> int:
    shards = [s for x in jtu.tree_leaves(state) for s in x.addressable_shards]
    return sum(s.data.nbytes for s in shards if s.device == device)


def collectives(program: Any) -> list[tuple[str, str]]:
    """The kinds and results of what devices exchange, without scalars."""
    found = re.findall(
        r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)"
        r"[\w\-]*\(",
        program.as_text(),
    )
    return [(kind, x) for x, kind in found if not re.fullmatch(r"\w+\[\]\S*", x)]


def here(tree: Any) -> Any:
    """The arrays of a tree, on one device."""
    return jax.device_put(jax.device_get(tree), jax.devices()[0])


#
# Shardings
#


def test_one_axis_of_each_parameter():
    mesh, params = mesh_of(), make_params()
    optim = AdEMAMix(1e-3, state_format=COMPACT)
    shardings = state_sharding(optim, params, mesh, axis="data")
    shapes = eqx.filter_eval_shape(eqx_ademamix.init, optim, params)
    assert jtu.tree_structure(shardings) == jtu.tree_structure(shapes)
    assert spec_text(shardings.count) == spec_text(shardings.count_m2) == ()
    for moments in (shardings.m1, shardings.m2, shardings.nu):
        for name, (_, spec) in SPECS.items():
            codes, scales = moments[name].real
            assert spec_text(codes) == tuple(spec)
            # Scales are split along the same axes, unless blocks span devices.
            assert spec_text(scales) == (() if name == "span" else tuple(spec))


@pytest.mark.parametrize("name", ("half", "compact"))
def test_as_init_beside_such_parameters(name: str):
    """A parameter that is sharded as its state: `init` gives the same shardings."""
    mesh, optim = mesh_of(), AdEMAMix(1e-3, state_format=FORMATS[name])
    params = make_params()
    # JAX 0.4.27 puts empty arrays on one device. If blocks span devices, XLA chooses
    # the sharding of scales.
    del params["empty"], params["span"]
    shardings = state_sharding(optim, params, mesh, axis="data")
    of_codes = {k: shardings.m2[k].real[0] for k in params}
    assert_sharded(optim.init(jax.device_put(params, of_codes)), shardings)


def test_dense_moments_take_the_largest_axis():
    shardings = state_sharding(AdEMAMix(1e-3), make_params(), mesh_of(), axis="data")
    found = {k: spec_text(s) for k, s in shardings.nu.items()}
    expected = {k: tuple(s) for k, (_, s) in SPECS.items()}
    assert found == {
        **expected,
        "rows": (None, "data"),
        "stacked": (None, None, "data"),
    }


@formats
def test_all_axes_of_a_parameter_that_is_sharded(name: str):
    """Its own axes stay split. The state splits another one, or one of them again."""
    mesh = mesh_of((4, 2), ("data", "model"))
    put = lambda shape, *spec: jax.device_put(
        jnp.ones(shape), NamedSharding(mesh, P(*spec))
    )
    params = {
        "columns": put((64, 512), None, "model"),
        "again": put((64, 6), "model"),
        "fsdp": put((64, 512), "data"),
        "both": put((64, 512), "model", "data"),
    }
    optim = AdEMAMix(1e-3, state_format=FORMATS[name])
    shardings = state_sharding(optim, params, mesh, axis="data")
    codes = jax.tree.map(
        lambda m: m.real[0] if isinstance(m, eqx_ademamix.Encoded) else m,
        shardings.m2,
        is_leaf=lambda x: isinstance(x, eqx_ademamix.Encoded),
    )
    dense = name in ("float32", "bfloat16")
    assert {k: spec_text(s) for k, s in codes.items()} == {
        "columns": (None, ("model", "data")) if dense else ("data", "model"),
        "again": (("model", "data"),),
        "fsdp": ("data",),
        "both": ("model", "data"),
    }


def test_several_mesh_axes():
    mesh = mesh_of((2, 2, 2), ("replica", "data", "model"))
    params = {"w": jnp.ones((64, 256))}
    shardings = state_sharding(AdEMAMix(1e-3), params, mesh, axis=("replica", "data"))
    assert spec_text(shardings.m1["w"]) == (None, ("replica", "data"))
    # A parameter that is split over one of them already gets the other one, too.
    split = jax.device_put(params, NamedSharding(mesh, P("data")))
    shardings = state_sharding(AdEMAMix(1e-3), split, mesh, axis=("replica", "data"))
    assert spec_text(shardings.m1["w"]) == ("data", "replica")


def test_parameters_may_be_shapes():
    mesh, optim = mesh_of(), AdEMAMix(1e-3)
    struct = jax.ShapeDtypeStruct
    structs = jax.tree.map(lambda x: struct(x.shape, x.dtype), make_params())
    shardings = state_sharding(optim, structs, mesh, axis="data")
    assert shardings == state_sharding(optim, make_params(), mesh, axis="data")
    split = struct((64, 8), jnp.float32, sharding=NamedSharding(mesh, P(None, "data")))
    shardings = state_sharding(optim, {"w": split}, mesh, axis="data")
    assert spec_text(shardings.m1["w"]) == (None, "data")


def test_frozen_leaves_and_functions_in_the_model():
    model = eqx.nn.MLP(64, 64, 64, 1, key=jax.random.key(0))
    optim = AdEMAMix(1e-3, trainable=lambda x: x.ndim == 2)
    shardings = state_sharding(optim, model, mesh_of(), axis="data")
    assert shardings.m1.layers[0].bias is None
    assert spec_text(shardings.m1.layers[0].weight) == ("data",)


@pytest.mark.parametrize(
    "optim",
    (
        optax.adamw(1e-3),
        optax.chain(optax.clip_by_global_norm(1.0), AdEMAMix(1e-3)),  # pyright: ignore
        optax.MultiSteps(eqx_ademamix.ademamix(1e-3), 2),
        SimplifiedAdEMAMix(1e-3),
        Compensated(AdEMAMix(1e-3)),
    ),
    ids=("adamw", "chain", "MultiSteps", "Simplified", "Compensated"),
)
def test_other_optimizers(optim: Any, standard_promotion: None):
    """Every array of the state that has the shape of its parameter is split."""
    dtype = jnp.bfloat16 if isinstance(optim, Compensated) else jnp.float32
    params = {"w": jnp.ones((64, 16), dtype)}
    shardings = state_sharding(optim, params, mesh_of(), axis="data")
    state = jax.device_put(eqx_ademamix.init(optim, params), shardings)
    shapes = {x.shape: spec_text(x.sharding) for x in jtu.tree_leaves(state)}
    assert shapes == {(): (), (64, 16): ("data",)}


#
# The step
#


def loss_of(params: Any, batch: Any) -> jax.Array:
    """Gradients of each device's share of the batch differ."""
    scale = jnp.mean(batch)
    return sum(
        (jnp.mean(jnp.sin(x * scale)) for x in params.values() if x.size),
        start=jnp.zeros(()),
    )


def train(
    optim: Any, mesh: Mesh, shardings: Any, params: Any, steps: int = 3
) -> tuple[Any, Any, Any]:
    """Parameters and state after a few steps, and the compiled step."""
    whole = NamedSharding(mesh, P())
    batch = jnp.arange(16.0)
    if mesh.size > 1:
        batch = jax.device_put(batch, NamedSharding(mesh, P("data")))
    params = jax.device_put(params, whole)
    state = jax.jit(optim.init, out_shardings=shardings)(params)

    def update(params: Any, state: Any, batch: Any) -> Any:
        grads = jax.grad(loss_of)(params, batch)
        updates, state = eqx_ademamix.update(optim, grads, state, params)
        return eqx.apply_updates(params, updates), state

    step: Any = jax.jit(update, out_shardings=(whole, shardings))
    program = step.lower(params, state, batch).compile()
    for _ in range(steps):
        params, state = step(params, state, batch)
    assert step._cache_size() == 1
    return params, state, program


def optimizer(name: str) -> AdEMAMix:
    return AdEMAMix(1e-2, weight_decay=0.1, state_format=FORMATS[name])


@formats
def test_only_updates_are_gathered(name: str):
    """One all-gather for each parameter whose state is split, of its shape and type.
    Everything else that devices exchange are gradients, and parts of blocks that span
    devices."""
    mesh, optim, params = mesh_of(), optimizer(name), make_params()
    shardings = state_sharding(optim, params, mesh, axis="data")
    _, state, program = train(optim, mesh, shardings, params)
    found = collectives(program)
    gathered = [x.split("{")[0] for kind, x in found if kind == "all-gather"]
    is_split = lambda name: any(SPECS[name][1])
    shapes = {
        f"f32[{','.join(map(str, shape))}]"
        for key, (shape, _) in SPECS.items()
        if is_split(key)
    }
    of_blocks = [x for x in gathered if x not in shapes]
    assert sorted(x for x in gathered if x in shapes) == sorted(shapes)
    assert {kind for kind, _ in found} <= {"all-gather", "all-reduce"}
    has_blocks = name in ("half", "compact")
    assert len(of_blocks) <= 6 * has_blocks
    assert all(np.prod(dims(x)) <= 1024 / 256 for x in of_blocks)
    assert_sharded(state, shardings)


def dims(text: str) -> list[int]:
    found = re.findall(r"\[([\d,]+)\]", text)
    return [int(n) for x in found for n in x.split(",")]


@formats
def test_the_same_numbers(name: str):
    """As on one device."""
    optim, params = optimizer(name), make_params()
    alone = Mesh(np.array(jax.devices()[:1]), ("data",))
    results = [
        train(optim, mesh, state_sharding(optim, params, mesh, axis="data"), params)
        for mesh in (mesh_of(), alone)
    ]
    (p, state, _), (p1, state1, _) = results
    assert_trees_close(here(p), here(p1), 1e-6)
    state, state1 = (eqx_ademamix.decoded(here(x)) for x in (state, state1))
    assert_trees_close(state, state1, 1e-6)


@formats
def test_bytes_per_device(name: str):
    mesh, optim, params = mesh_of(), optimizer(name), make_params()
    del params["span"]  # its scales are on every device
    shardings = state_sharding(optim, params, mesh, axis="data")
    state = jax.device_put(optim.init(params), shardings)
    unsplit = {k: x for k, x in params.items() if not any(SPECS[k][1])}
    rest = eqx_ademamix.state_bytes(optim.init(unsplit))  # and counters
    total = eqx_ademamix.state_bytes(state)
    for device in mesh.devices.flat:
        assert bytes_on(device, state) == (total - rest) / 8 + rest


@pytest.mark.parametrize("axes", MESHES)
def test_updates_keep_the_sharding_of_parameters(axes: str):
    """Outside of `jit`, and inside with explicit mesh axes, JAX knows the shardings, so
    updates need no `out_shardings`."""
    mesh, optim, params = MESHES[axes], optimizer("compact"), make_params()
    del params["span"]  # XLA chooses the sharding of its scales
    params = everywhere_on(mesh, params)
    shardings = state_sharding(optim, params, mesh, axis="data")
    state = jax.device_put(optim.init(params), shardings)
    update = optim.update if axes == "auto" else jax.jit(optim.update)
    for _ in range(2):
        updates, state = update(params, state, params)
        assert all(x.sharding.is_fully_replicated for x in updates.values())
        assert_sharded(state, shardings)


@pytest.mark.parametrize("axes", MESHES)
def test_compensated(axes: str):
    mesh, params = MESHES[axes], everywhere_on(MESHES[axes], make_params(jnp.bfloat16))
    optim = Compensated(AdEMAMix(1e-2, state_format=COMPACT))
    shardings = state_sharding(optim, params, mesh, axis="data")
    state = jax.device_put(optim.init(params), shardings)
    whole = NamedSharding(mesh, P())
    step: Any = jax.jit(optim.update, out_shardings=(whole, shardings))
    updates, after = step(params, state, params)
    alone, _ = optim.update(*map(here, (params, state, params)))
    assert_trees_close(here(updates), alone, 2**-8)  # one unit of bfloat16
    assert_sharded(after, shardings)
    master = optim.master_params(params, after)
    assert all(x.sharding.is_fully_replicated for x in master.values())


if HAS_HOST_MEMORY:

    def test_offloaded():
        """Slices of moments stay in host memory."""
        mesh, whole = mesh_of(), NamedSharding(mesh_of(), P())
        params = everywhere_on(mesh, make_params())
        results: list[Any] = []
        for wrap in (Offloaded, lambda optim: optim):
            optim = wrap(optimizer("compact"))
            shardings = state_sharding(optim, params, mesh, axis="data")
            state = jax.jit(optim.init, out_shardings=shardings)(params)
            step: Any = jax.jit(optim.update, out_shardings=(whole, shardings))
            _, state = step(params, state, params)
            updates, state = step(params, state, params)
            assert step._cache_size() == 1
            assert_sharded(state, shardings)
            kinds = {
                name: {x.sharding.memory_kind for x in jtu.tree_leaves(tree)}
                for name, tree in (("m1", state.m1), ("m2", state.m2), ("nu", state.nu))
            }
            host = HOST if isinstance(optim, Offloaded) else "device"
            assert kinds == {"m1": {"device"}, "m2": {host}, "nu": {"device"}}
            results.append(here((updates, state)))
        assert eqx.tree_equal(*results)


#
# Errors
#


@pytest.mark.parametrize("other", ("order of axes", "devices", "axis types"))
def test_parameters_on_another_mesh(other: str):
    devices = np.array(jax.devices())
    first = {
        "order of axes": Mesh(devices.reshape(2, 4), ("a", "data")),
        "devices": Mesh(devices[4:], ("data",)),
        "axis types": MESHES.get("explicit", Mesh(devices[::-1], ("data",))),
    }[other]
    second = {
        "order of axes": Mesh(devices.reshape(4, 2), ("data", "a")),
        "devices": Mesh(devices[:4], ("data",)),
        "axis types": MESHES["auto"],
    }[other]
    params = everywhere_on(first, {"w": jnp.ones((64, 64))})
    text = (
        r"^params\['w'\] is sharded with .*, but not over `mesh`: Mesh\(.*\), with the"
    )
    with pytest.raises(ValueError, match=text):
        state_sharding(AdEMAMix(1e-3), params, second, axis="data")
    assert state_sharding(AdEMAMix(1e-3), params, first, axis="data")


if hasattr(jax, "set_mesh"):

    def test_shapes_over_an_abstract_mesh():
        mesh = MESHES["explicit"]
        params = jax.device_put(jnp.ones((64, 2048)), NamedSharding(mesh, P("data")))
        shapes = jax.eval_shape(lambda: params)
        optim = AdEMAMix(1e-3)
        found, expected = (
            state_sharding(optim, x, mesh, axis="data") for x in (shapes, params)
        )
        assert found == expected


def test_an_axis_that_splits_nothing():
    params = {"a": jnp.ones((7, 3)), "b": jnp.ones(5)}
    with pytest.raises(
        ValueError,
        match=r"^`axis` is 'data', of size 8, but none of the 2 trained "
        r"arrays has an axis that can be split 8 ways\. The state would be replicated: "
        r"choose another axis of the mesh\.$",
    ):
        state_sharding(AdEMAMix(1e-3), params, mesh_of(), axis="data")


def test_a_mesh_of_one_device():
    """To try a program on one device, no change is needed."""
    params = {"w": jnp.ones((8, 8))}
    shardings = state_sharding(AdEMAMix(1e-3), params, mesh_of((1,)), axis="data")
    assert all(s.is_fully_replicated for s in jtu.tree_leaves(shardings))


@pytest.mark.parametrize("axis", ("model", ("data", "model"), (), 0, None))
def test_an_axis_that_the_mesh_does_not_have(axis: Any):
    with pytest.raises(
        ValueError, match=r"^`axis` is .*, but `mesh` has the axes 'data'\.$"
    ):
        state_sharding(AdEMAMix(1e-3), {"w": jnp.ones(8)}, mesh_of(), axis=axis)


#
# The report
#


def test_report():
    params = {k: make_params()[k] for k in ("rows", "span", "odd")}
    optim = AdEMAMix(1e-3, state_format=COMPACT)
    assert sharding_report(optim, params, mesh_of(), axis="data") == REPORT
    shardings = state_sharding(optim, params, mesh_of(), axis="data")
    state = jax.device_put(optim.init(params), shardings)
    assert f"{eqx_ademamix.state_bytes(state):,} bytes" in REPORT
    assert f"{bytes_on(jax.devices()[3], state):,} on each" in REPORT
    assert state_report(state) == STATE_REPORT
    structs = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        eqx.filter_eval_shape(eqx_ademamix.init, optim, params),
        shardings,
    )
    assert state_report(structs) == STATE_REPORT


REPORT = """\
The state takes 139,644 bytes, 20,028 on each of 8 devices.

  path      shape      parameter  state      bytes   note
  ['odd']   (7, 100)   P()        P()        2,884   replicated: 8 divides no axis
  ['rows']  (64, 512)  P()        P('data')  16,576
  ['span']  (1024,)    P()        P('data')  560     blocks span devices, which exchange scales"""
STATE_REPORT = """\
The state takes 139,644 bytes, 4.05 per parameter, 20,028 on each of 8 devices.

  path      shape      m1            m2             nu            bytes  sharding   note
  ['odd']   (7, 100)   ScaledFloat8  ScaledFloat16  ScaledFloat8   4.12  P()
  ['rows']  (64, 512)  ScaledFloat8  ScaledFloat16  ScaledFloat8   4.05  P('data')
  ['span']  (1024,)    ScaledFloat8  ScaledFloat16  ScaledFloat8   4.05  P('data')  blocks span devices, which exchange scales"""
