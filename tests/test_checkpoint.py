"""`save` and `load`: what comes back is what was saved, with its types, or an error."""

import json
import pathlib
import weakref
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors import safe_open
from safetensors.numpy import load_file

import eqx_ademamix
from eqx_ademamix import (
    AdEMAMix,
    CheckpointError,
    Compensated,
    SimplifiedAdEMAMix,
    StateFormat,
    beta3_scheduler,
    decay_mask,
    init,
    load,
    save,
    update,
)
from eqx_ademamix._checkpoint import saving

from .helpers import COMPACT, Zoo, everywhere, make_mlp, make_zoo, x64
from .test_error_messages import is_on_page


#
# Equality, with types and to the last bit
#


def is_typed_key(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def facts(x: Any) -> Any:
    """Everything that two leaves must have in common."""
    if is_typed_key(x):
        data = np.asarray(jax.random.key_data(x))
        return str(x.dtype), x.sharding, x.shape, data.tobytes()
    if isinstance(x, jax.Array):
        array = np.asarray(x)
        return "jax", x.weak_type, x.sharding, x.dtype, x.shape, array.tobytes()
    if isinstance(x, np.ndarray | np.generic):
        return type(x), x.dtype, x.shape, x.tobytes()
    return type(x), repr(x) if isinstance(x, float | complex) else x


def assert_same(x: Any, y: Any) -> None:
    assert jtu.tree_structure(x) == jtu.tree_structure(y)
    for (path, a), b in zip(
        jtu.tree_leaves_with_path(x), jtu.tree_leaves(y), strict=True
    ):
        assert facts(a) == facts(b), jtu.keystr(path)


def saved(tree: Any, path: pathlib.Path, **options: Any) -> pathlib.Path:
    save(path, tree, **options)
    return path


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "run.safetensors"


#
# Every kind of leaf
#

NARROW = (
    "bool int4 uint4 int2 uint2 int8 uint8 int16 uint16 int32 uint32 bfloat16 float16 "
    "float32 complex64 float4_e2m1fn float8_e3m4 float8_e4m3 float8_e4m3b11fnuz "
    "float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu"
).split()
WIDE = ("int64", "uint64", "float64", "complex128")
DTYPES = [name for name in (*NARROW, *WIDE) if hasattr(jnp, name) or name == "bool"]
SHAPES = ((), (1,), (2, 3), (0,), (3, 0, 2))


def array_of(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Any bits, including those of NaNs."""
    dtype, generator = jnp.dtype(name), np.random.default_rng(seed)
    if name in ("bool", "int2", "uint2", "int4", "uint4", "float4_e2m1fn"):
        return generator.integers(0, 2, shape).astype(dtype)
    bits = generator.integers(0, 256, (*shape, dtype.itemsize), np.uint8)
    return bits.view(dtype).reshape(shape)


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype(name: str, path: pathlib.Path):
    with x64():
        arrays = [array_of(name, shape) for shape in SHAPES]
        scalar = arrays[0][()]  # one of NumPy's scalars
        tree = arrays, [jax.device_put(x) for x in arrays], scalar
        save(path, tree)
        assert_same(load(path, tree), tree)
        structs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
        blank = [jax.device_put(np.zeros_like(x)) for x in arrays]
        assert_same(load(path, (arrays, structs, scalar)), tree)
        assert_same(
            load(path, (blank, blank, scalar)),
            (tree[1], tree[1], scalar),
        )


def test_numpy_arrays_of_any_layout(path: pathlib.Path):
    """Other orders of axes and of bytes come back as the same numbers."""
    x = np.arange(6.0).reshape(2, 3)
    tree = x.T, x[:, ::2], x.astype(">f8"), np.broadcast_to(x[0], (2, 3))
    save(path, tree)
    back = load(path, tree)
    for a, b in zip(tree, back, strict=True):
        assert a.dtype == b.dtype and (a == b).all()
        assert b.flags.writeable and b.flags.c_contiguous


def test_keys(path: pathlib.Path):
    keys = [jax.random.key(7, impl=x) for x in ("threefry2x32", "rbg", "unsafe_rbg")]
    tree = keys, [jax.random.split(key, (2, 3)) for key in keys], jax.random.PRNGKey(1)
    save(path, tree)
    assert_same(load(path, tree), tree)
    back = load(path, eqx.filter_eval_shape(lambda: tree))
    assert_same(back, tree)
    for key, other in zip(keys, back[0], strict=True):
        assert (jax.random.normal(key, (3,)) == jax.random.normal(other, (3,))).all()


def test_weak_types_are_those_of_like(path: pathlib.Path):
    tree = jnp.asarray(1.5), jnp.broadcast_to(jnp.asarray(2), (3,)), jnp.asarray(2j)
    assert all(x.weak_type for x in tree)
    save(path, tree)
    assert_same(load(path, tree), tree)
    strong = jax.tree.map(lambda x: x.astype(x.dtype), tree)
    assert_same(load(path, strong), strong)


class Settings(eqx.Module):
    rate: float
    name: str = eqx.field(static=True)
    function: Callable[..., Any]


def test_functions_and_static_fields_are_those_of_like(path: pathlib.Path):
    save(path, (Settings(0.5, "a", jnp.sin), [jnp.ones(2)], None))
    like = Settings(0.5, "b", jnp.cos), [jnp.zeros(2)], None
    back, array, _ = load(path, like)
    assert (back.name, back.function) == ("b", jnp.cos) and (array[0] == 1).all()


def test_python_scalars_are_compared(path: pathlib.Path):
    tree = {"a": (1, True, 2.5, float("nan"), 1j, "text", b"bytes", 10**30)}
    save(path, tree)
    assert_same(load(path, tree), tree)


def test_a_tree_of_one_leaf_and_an_empty_tree(path: pathlib.Path):
    for tree in (jnp.arange(3), np.float32(2), 3, None, (), {"a": None}):
        save(path, tree)
        assert_same(load(path, tree), tree)


def test_nans_may_be_loaded_while_they_are_looked_for(path: pathlib.Path):
    tree = jnp.asarray([jnp.nan, jnp.inf]), jnp.asarray(float("nan"))
    save(path, tree)
    with jax.debug_nans(True), jax.debug_infs(True):
        assert_same(load(path, tree), tree)


def test_all_transfers_are_explicit(path: pathlib.Path):
    state = init(AdEMAMix(1e-3, state_format=COMPACT), BIG)
    tree = state, jax.random.key(0), jax.device_put(jnp.ones((8, 2)), on(mesh(8), "a"))
    with jax.transfer_guard("disallow"):
        save(path, tree)
        back = load(path, tree)
    assert_same(back, tree)


def test_like_may_have_been_donated(path: pathlib.Path):
    tree = {"w": jnp.arange(3.0)}
    save(path, tree)
    like = {"w": jnp.zeros(3)}
    like["w"].delete()
    assert_same(load(path, like), tree)


#
# Models and states
#

BIG = {"weight": jnp.ones((8, 256)) / 3, "bias": jnp.ones(256), "scale": jnp.ones(())}
COMPLEX = {"w": jnp.full((4, 64), 1 + 2j, jnp.complex64), "b": jnp.ones(3)}
HALF = {"w": jnp.full((8, 64), 0.3, jnp.bfloat16), "b": jnp.ones(3)}
SPLIT = StateFormat(
    m1=jnp.bfloat16, m2=eqx_ademamix.SplitBfloat16(), nu=jnp.float16, min_size=0
)
RUNS = (
    ("float32", AdEMAMix(1e-3), BIG),
    ("compact", AdEMAMix(1e-3, state_format=COMPACT), BIG),
    ("half", AdEMAMix(1e-3, state_format=everywhere(StateFormat.half())), BIG),
    ("split", AdEMAMix(1e-3, state_format=SPLIT), BIG),
    ("without m1", AdEMAMix(1e-3, b1=0.0), BIG),
    ("complex", AdEMAMix(1e-3, state_format=COMPACT), COMPLEX),
    ("corrected", AdEMAMix(1e-3, bias_correct_m2=True), BIG),
    ("simplified", SimplifiedAdEMAMix(1e-3, state_format=COMPACT), BIG),
    ("compensated", Compensated(AdEMAMix(1e-3), check_params=True), HALF),
    ("compensated, 8 bits", Compensated(AdEMAMix(1e-3), bits=8), HALF),
    ("optax", optax.chain(optax.clip(1.0), optax.adam(1e-3)), BIG),
    ("a zoo", AdEMAMix(1e-3, state_format=COMPACT), make_zoo(jax.random.key(0))),
)


def step(optim: Any, params: Any, state: Any) -> Any:
    arrays = lambda p: jtu.tree_leaves(eqx.filter(p, eqx.is_inexact_array))
    loss = lambda p: sum(jnp.sum(jnp.sin(x).real.astype(float)) for x in arrays(p))
    grads = eqx.filter_grad(loss)(params)
    updates, state = update(optim, grads, state, params)
    return eqx.apply_updates(params, updates), state


@pytest.mark.parametrize(
    "optim,params", [x[1:] for x in RUNS], ids=[x[0] for x in RUNS]
)
def test_a_run_goes_on(
    optim: Any, params: Any, path: pathlib.Path, standard_promotion: None
):
    """From the file, the next step is the same bit for bit, and is not traced again."""
    traces: list[None] = []

    @eqx.filter_jit
    def run(params: Any, state: Any) -> Any:
        traces.append(None)
        return step(optim, params, state)

    start = params, init(optim, params)
    now = run(*start)
    save(path, (now, jax.random.key(2)), optim=optim)
    for like in (start, eqx.filter_eval_shape(lambda: start)):
        back, key = load(path, (like, jax.random.key(0)), optim=optim)
        assert_same((back, key), (now, jax.random.key(2)))
        assert_same(run(*back), run(*now))
    assert len(traces) == 1


def test_a_state_of_equinox(path: pathlib.Path):
    """The state of a `BatchNorm`."""
    model, state = eqx.nn.make_with_state(Zoo)(jax.random.key(0))
    save(path, (model, state))
    assert_same(load(path, (model, state)), (model, state))


#
# Devices
#


def mesh(*shape: int, **options: Any) -> Mesh:
    devices = np.array(jax.devices()[: int(np.prod(shape))])
    return Mesh(devices.reshape(shape), ("a", "b")[: len(shape)], **options)


def on(mesh: Any, *axes: Any, **options: Any) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(*axes), **options)


def meshes() -> tuple[Mesh, ...]:
    """Also with explicit axes, where JAX has them."""
    kinds = getattr(jax.sharding, "AxisType", None)
    explicit = [] if kinds is None else [mesh(8, axis_types=(kinds.Explicit,))]
    return (mesh(8), *explicit)


@pytest.mark.parametrize("mesh_8", meshes(), ids=("auto", "explicit")[: len(meshes())])
def test_onto_other_devices(mesh_8: Mesh, path: pathlib.Path):
    """From eight devices to four, to one, and back: the sharding is that of `like`."""
    x = jnp.arange(128.0).reshape(8, 16)
    shardings = (
        *(on(mesh_8, "a"), on(mesh_8, None, "a"), on(mesh_8)),
        *(on(mesh(4), "a"), on(mesh(2, 2), "a", "b"), on(mesh(2, 4), ("a", "b"))),
        jax.device_put(x, jax.devices()[3]).sharding,
    )
    key = jax.random.split(jax.random.key(0), 8)
    codes = x.astype(jnp.float8_e4m3fn)
    for sharding in shardings:
        mesh_of = getattr(sharding, "mesh", None)
        to = sharding, sharding, None if mesh_of is None else on(mesh_of)
        tree = tuple(map(jax.device_put, (x, codes, key), to))
        save(path, tree)
        assert_same(load(path, (x, codes, key)), (x, codes, key))
        save(path, (x, codes, key))
        assert_same(load(path, tree), tree)
        structs = [
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for x in tree
        ]
        assert_same(load(path, tuple(structs)), tree)


if hasattr(jax, "set_mesh"):

    def test_a_template_over_an_abstract_mesh(path: pathlib.Path):
        """What `jax.eval_shape` gives for explicit axes knows no devices."""
        mesh_8 = meshes()[-1]

        def make() -> Any:
            return jax.device_put(jnp.arange(16.0), on(mesh_8, "a"))

        save(path, make())
        like = eqx.filter_eval_shape(make)
        with pytest.raises(
            ValueError, match=r"^like has the sharding .* names no devices"
        ):
            load(path, like)
        with jax.set_mesh(mesh(2, 4)):
            with pytest.raises(ValueError, match="names no devices"):
                load(path, like)
        with jax.set_mesh(mesh_8):
            assert_same(load(path, like), make())


@pytest.mark.parametrize("mesh_8", meshes(), ids=("auto", "explicit")[: len(meshes())])
def test_weak_types_on_devices(mesh_8: Mesh, path: pathlib.Path):
    x = jnp.full_like(jnp.asarray(2.0), 2.0, shape=(16,))
    for sharding in (on(mesh_8, "a"), on(mesh_8)):
        placed = jax.device_put(x, sharding)
        assert placed.weak_type
        save(path, placed)
        assert_same(load(path, placed), placed)


def test_not_committed_to_the_first_device(path: pathlib.Path):
    """Counters on one device can be used together with sharded parameters."""
    params = jax.device_put(jnp.ones((8, 2)), on(mesh(8), "a"))
    tree = params, jnp.zeros((), jnp.int32)
    save(path, tree)
    for like in (tree, (params, jax.eval_shape(lambda: tree[1]))):
        x, count = load(path, like)
        assert (jax.jit(jnp.add)(x, count.astype(x.dtype)) == 1).all()


@pytest.mark.parametrize(
    "fmt", (StateFormat.float32(), COMPACT), ids=("float32", "compact")
)
def test_a_sharded_state(fmt: StateFormat, path: pathlib.Path):
    params = jax.device_put(jnp.ones((8, 512)), on(mesh(8), "a"))
    optim = AdEMAMix(1e-3, state_format=fmt)
    state = init(optim, params)
    save(path, (params, state), optim=optim)
    assert_same(load(path, (params, state), optim=optim), (params, state))
    other = jax.device_put(params, on(mesh(4), None, "a"))
    assert_same(load(path, (other, init(optim, other))), (other, init(optim, other)))


def pinned_host() -> NamedSharding | None:
    """In host memory, where the backend has a memory of that name."""
    kinds = [x.kind for x in jax.devices()[0].addressable_memories()]
    return (
        on(mesh(8), "a", memory_kind="pinned_host") if "pinned_host" in kinds else None
    )


def test_the_kind_of_memory_is_kept(path: pathlib.Path):
    x = jax.device_put(jnp.arange(16.0), pinned_host() or on(mesh(8), "a"))
    save(path, x)
    assert load(path, x).sharding == x.sharding
    assert (np.asarray(load(path, x)) == np.arange(16.0)).all()


#
# Memory
#


def aligned(raw: np.ndarray) -> np.ndarray:
    """A copy where JAX would leave it, if it could: at a multiple of 64 bytes."""
    memory = np.empty(raw.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    copy = memory[start : start + raw.nbytes].view(raw.dtype).reshape(raw.shape)
    copy[...] = raw
    return copy


@pytest.mark.parametrize("sharding", (None, on(mesh(1), "a"), on(mesh(8), "a")))
def test_arrays_own_their_memory(
    sharding: Any, path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    """Not NumPy's memory, which must not be donated."""
    tensor, read = saving._tensor, []

    def keep(*args: Any) -> np.ndarray:
        read.append(aligned(tensor(*args)))
        return read[-1]

    monkeypatch.setattr(saving, "_tensor", keep)
    tree = [
        jax.device_put(x, sharding) for x in (jnp.arange(4096.0), jnp.ones((8, 64)))
    ]
    tree = [*tree, jnp.asarray(1.0), jax.random.split(jax.random.key(0), 64)]
    save(path, tree)
    back, others = load(path, tree), load(path, tree)[:2]
    for raw in read:
        raw[...] = 0
    assert_same(back, tree)
    donated = jax.jit(lambda xs: jax.tree.map(lambda x: x + 1, xs), donate_argnums=0)
    out = donated(others)
    assert all(x.is_deleted() for x in others)
    assert (np.asarray(out[0]) == np.arange(1, 4097)).all() and (out[1] == 2).all()


def test_one_array_at_a_time(path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    """`load` has no second copy of the whole, and neither has `save`."""
    tree = [np.full(1000, i, np.complex64) for i in range(20)]
    alive: list[weakref.ref[np.ndarray]] = []

    def watched(function: Any) -> Any:
        def call(*args: Any) -> np.ndarray:
            assert sum(x() is not None for x in alive) <= 1
            array = np.array(function(*args))
            alive.append(weakref.ref(array))
            return array

        return call

    monkeypatch.setattr(saving, "to_raw", watched(saving.to_raw))
    save(path, tree)
    assert len(alive) == 20
    alive.clear()
    monkeypatch.setattr(saving, "_tensor", watched(saving._tensor))
    like = eqx.filter_eval_shape(lambda: jax.tree.map(jnp.asarray, tree))
    before = {id(x) for x in jax.live_arrays()}
    back = load(path, like)
    assert len(alive) == 20
    new = [x for x in jax.live_arrays() if id(x) not in before]
    assert sum(x.nbytes for x in new) == sum(x.nbytes for x in back)


#
# What is in the file
#


def test_any_reader_of_safetensors_sees_it(path: pathlib.Path):
    model = make_mlp()
    optim = AdEMAMix(
        1e-3,
        b3=beta3_scheduler(0.999, 0.9, warmup=10),
        weight_decay_mask=decay_mask(model),
        state_format=COMPACT,
    )
    _, state = step(optim, model, init(optim, model))
    x = (
        jnp.ones((2, 3), jnp.float8_e4m3fn),
        jnp.asarray([1 + 2j]),
        jnp.asarray([1.5], jnp.bfloat16),
        jnp.arange(3).astype(jnp.int4),
    )
    save(path, (model, state, jax.random.key(3), x, 0.5), optim=optim)
    tensors = load_file(path)
    assert (tensors["[0].layers[0].weight"] == model.layers[0].weight).all()
    assert tensors["[1].count"] == 1 and tensors["[1].count"].dtype == np.int32
    codes, scales = state.m1.layers[0].weight.real
    assert (tensors["[1].m1.layers[0].weight.real[0]"] == codes).all()
    assert (tensors["[1].m1.layers[0].weight.real[1]"] == scales).all()
    assert (tensors["[2]"] == [0, 3]).all() and tensors["[2]"].dtype == np.uint32
    assert (tensors["[3][0]"] == 56).all() and tensors["[3][0]"].dtype == np.uint8
    assert (tensors["[3][1]"] == [[1, 2]]).all() and tensors[
        "[3][1]"
    ].dtype.name == "float32"
    assert tensors["[3][2]"] == 1.5 and tensors["[3][2]"].dtype == jnp.bfloat16
    assert (tensors["[3][3]"] == [0, 1, 2]).all() and tensors[
        "[3][3]"
    ].dtype == np.uint8
    with safe_open(path, framework="np") as file:
        metadata = file.metadata()
    assert (metadata["format"], metadata["format_version"]) == ("eqx_ademamix", "1")
    assert len(metadata["header_crc32"]) == 8
    parts = {
        k: json.loads(metadata[k]) for k in set(metadata) - {"format", "header_crc32"}
    }
    assert parts["step"] == 1
    assert parts["versions"] == {
        "eqx_ademamix": eqx_ademamix.__version__,
        "jax": jax.__version__,
        "equinox": eqx.__version__,
        "numpy": np.__version__,
    }
    assert parts["arrays"]["[3][2]"].keys() == {"dtype", "shape", "crc32"}
    types = {path: (x["dtype"], x["shape"]) for path, x in parts["arrays"].items()}
    assert types["[1].m1.layers[0].weight.real[0]"] == ("int8", [4, 3])
    assert types["[2]"] == ("key<fry>", [])
    assert [types[f"[3][{i}]"] for i in range(4)] == [
        ("float8_e4m3fn", [2, 3]),
        ("complex64", [1]),
        ("bfloat16", [1]),
        ("int4", [3]),
    ]
    assert parts["scalars"] == {"[4]": "float 0.5"}
    codec = "ScaledFloat8(block_size=256, signed=True)"
    assert parts["codecs"]["[1].m1.layers[0].weight"] == codec
    fields = parts["optimizer"]
    assert fields[""] == "AdEMAMix" and fields[".learning_rate"] == "0.001"
    assert fields[".b3"] == "Beta3Schedule" and fields[".b3.beta_end"] == "0.999"
    assert fields[".state_format.m2"] == "ScaledFloat16"
    assert fields[".weight_decay_mask.layers[0].weight"] == "True"
    assert set(parts["arrays"]) == set(tensors)


def test_the_step_is_that_of_the_only_state(path: pathlib.Path):
    state = init(AdEMAMix(1e-3), jnp.ones(3))
    batch = eqx.filter_vmap(lambda x: init(AdEMAMix(1e-3), x))(jnp.ones((2, 3)))
    cases = (state, 0), ((state, state), None), (jnp.ones(3), None), (batch, None)
    for tree, expected in cases:
        save(path, tree)
        with safe_open(path, framework="np") as file:
            assert json.loads(file.metadata()["step"]) == expected


def test_tensors_are_aligned(path: pathlib.Path):
    """Readers may map the file into memory."""
    save(path, [array_of(name, (3,)) for name in NARROW if hasattr(jnp, name)])
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    assert size % 8 == 0
    widths = {"F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
    for x in (x for name, x in header.items() if name != "__metadata__"):
        assert x["data_offsets"][0] % widths.get(x["dtype"], 1) == 0


def test_the_overhead_is_small(path: pathlib.Path):
    save(path, {"w": jnp.ones(1000)})
    assert path.stat().st_size < 4000 + 800


#
# What fits
#


class Old(eqx.Module):
    a: Any
    b: Any


class New(eqx.Module):  # the same fields in another order
    b: Any
    a: Any


class Renamed(eqx.Module):
    a: Any
    c: Any


def test_reordered_fields_are_harmless(path: pathlib.Path):
    save(path, Old(jnp.ones(2), jnp.zeros(3)))
    back = load(path, New(jnp.zeros(3), jnp.zeros(2)))
    assert (back.a == 1).all() and back.b.shape == (3,)


class Color(eqx.Module):
    """Prints like `['a']`."""

    def __str__(self) -> str:
        return "['a']"


MODEL = make_mlp()
OPTIONS: dict[str, Any] = {
    "float32": {},
    "compact": {"state_format": COMPACT},
    "no m1": {"b1": 0.0},
    "bfloat16": {"state_format": StateFormat(*[jnp.bfloat16] * 3)},
    "corrected": {"bias_correct_m2": True},
}
STATE = {name: init(AdEMAMix(1e-3, **x), MODEL) for name, x in OPTIONS.items()}
W = jnp.ones((4, 3))
WAS = "Was it saved with another model, another `trainable`, or another `b1`"
MISFITS = (
    ("shape", {"w": W}, {"w": W[:2]}, r"\['w'\] is a float32 array of shape \(4, 3\) in .*, but a float32 array of shape \(2, 3\) in `like`\. Was"),
    ("transposed", W, W.T, r"\(the tree itself\) is .* shape \(4, 3\) in .* shape \(3, 4\) in `like`"),
    ("a batch of one", W[0], W[:1], r"shape \(3,\) in .* shape \(1, 3\) in `like`"),
    ("dtype", {"w": W}, {"w": W.astype(jnp.bfloat16)}, r"\['w'\] is a float32 array .*, but a bfloat16 array"),
    ("same bits", {"w": W.astype(jnp.int32)}, {"w": W.astype(jnp.uint32)}, "an int32 array .*, but a uint32 array"),
    ("float8", W.astype(jnp.float8_e4m3fn), W.astype(jnp.float8_e5m2), "a float8_e4m3fn array .*, but a float8_e5m2 array"),
    ("64 bits", np.ones(3), jnp.ones(3), "a float64 array .*, but a float32 array"),
    ("complex", jnp.ones(3, complex), jnp.ones((3, 2)), "a complex64 array .*, but a float32 array"),
    ("key", jax.random.key(0), jax.random.key(0, impl="rbg"), r"a key<fry> array .*, but a key<rbg> array"),
    ("key data", jax.random.PRNGKey(0), jax.random.key(0), r"a uint32 array .*, but a key<fry> array"),
    ("renamed", Old(W, W), Renamed(W, W), r"another structure than `like`: `like` has a float32 array of shape \(4, 3\) at \.c, which the file does not have, and the file has .* at \.b, which `like` does not have\. " + WAS),
    ("renamed keys", {"a": W, "b": W}, {"a": W, "c": W}, r"at \['c'\], .* at \['b'\]"),
    ("missing", [W], [W, W, W, W], r"`like` has a float32 array .* at \[1\] \(and 2 more\), which the file does not have\. Was"),
    ("additional", [W, W], [W], r": the file has a float32 array .* at \[1\], which `like` does not have\. Was"),
    ("None", [W, W], [W, None], r"the file has .* at \[1\], which `like` does not have"),
    ("a function", [W, W], [W, jnp.tanh], r"the file has .* at \[1\], which `like` does not have"),
    ("deeper", [W], [[W]], r"`like` has .* at \[0\]\[0\], .* the file has .* at \[0\]"),
    ("b1 = 0", STATE["float32"], STATE["no m1"], r"the file has a float32 array of shape \(4, 3\) at \.m1\.layers\[0\]\.weight \(and 5 more\), which `like` does not have\. " + WAS),
    ("b1 > 0", STATE["no m1"], STATE["float32"], r"`like` has .* at \.m1\.layers\[0\]\.weight \(and 5 more\), which the file does not"),
    ("bias_correct_m2", STATE["float32"], STATE["corrected"], r"at \.m2_weight, which the file does not have"),
    ("codec", STATE["compact"], STATE["float32"], r"\.m1\.layers\[0\]\.weight is stored as ScaledFloat8\(block_size=256, signed=True\) in .*, but as float32 in `like`\. .* `change_state_format`"),
    ("no codec", STATE["float32"], STATE["compact"], r"is stored as float32 in .*, but as ScaledFloat8\(block_size=256, signed=True\) in `like`"),
    ("block size", init(AdEMAMix(1e-3, state_format=StateFormat(*[eqx_ademamix.ScaledFloat8(128)] * 3, min_size=0)), MODEL), STATE["compact"], r"ScaledFloat8\(block_size=128, signed=True\) in .*, but as ScaledFloat8\(block_size=256, signed=True\) in"),
    ("16 bits", STATE["float32"], STATE["bfloat16"], r"\.m1\.layers\[0\]\.weight is stored as float32 in .*, but as bfloat16 in `like`\. .* `change_state_format`"),
    ("a wider layer", init(AdEMAMix(1e-3), eqx.nn.MLP(3, 2, 5, 2, key=jax.random.key(0))), STATE["float32"], r"\.m1\.layers\[0\]\.weight is .* shape \(5, 3\) in .* shape \(4, 3\) in `like`"),
    ("int", {"s": 1}, {"s": 2}, r"\['s'\] is the int 1 in .*, but the int 2 in `like`\. Python values are compared, not loaded"),
    ("bool", {"s": True}, {"s": 1}, "is the bool True in .*, but the int 1 in"),
    ("float", {"s": 1.0}, {"s": 1}, "is the float 1.0 in .*, but the int 1 in"),
    ("nan", float("nan"), 0.0, "is the float nan in .*, but the float 0.0 in"),
    ("text", ["a"], ["b"], r"\[0\] is the str 'a' in .*, but the str 'b' in"),
    ("settings first", ({"width": 4}, W), ({"width": 2}, W[:2]), r"\[0\]\['width'\] is the int 4"),
    ("a scalar for an array", {"step": jnp.asarray(3)}, {"step": 3}, r"\['step'\] is an int32 array of shape \(\) in .*, but the int 3 in `like`"),
    ("an array for a scalar", {"step": 3}, {"step": jnp.asarray(3)}, r"\['step'\] is the int 3 in .*, but an int32 array of shape \(\) in `like`"),
)  # fmt: skip


@pytest.mark.parametrize(
    "tree,like,text", [x[1:] for x in MISFITS], ids=[x[0] for x in MISFITS]
)
def test_what_does_not_fit(tree: Any, like: Any, text: str, path: pathlib.Path):
    save(path, tree)
    with pytest.raises(CheckpointError, match=text) as error:
        load(path, like)
    message = str(error.value)
    assert str(path) in message and len(message) < 600
    assert is_on_page(message)
    assert_same(load(path, tree), tree)


#
# Property
#

KEYS = st.one_of(st.text(max_size=4), st.sampled_from(["a.b", "['a']", "\n", '"', "é"]))
ARRAYS = st.builds(
    array_of,
    st.sampled_from([name for name in NARROW if name in DTYPES]),
    st.sampled_from(SHAPES),
    st.integers(0, 99),
)
SCALARS = st.one_of(
    *(st.booleans(), st.integers(), st.floats(), st.complex_numbers(), st.text()),
    st.binary(max_size=4),
)
LEAVES = st.one_of(
    *(
        ARRAYS,
        ARRAYS.map(jax.device_put),
        ARRAYS.map(lambda x: x.reshape(-1)[:1].sum()),
    ),
    *(SCALARS, st.none(), st.just(jnp.tanh)),
    st.integers(0, 9).map(jax.random.key),
)
TREES = st.recursive(
    LEAVES,
    lambda x: st.one_of(
        st.lists(x, max_size=3),
        st.tuples(x, x),
        st.dictionaries(KEYS, x, max_size=3),
        st.dictionaries(st.integers(), x, max_size=2),
        st.builds(Old, x, x),
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(tree=TREES)
def test_any_tree_comes_back(tree: Any, tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    save(path, tree)
    assert_same(load(path, tree), tree)
    is_number = lambda x: isinstance(x, jax.Array) and not is_typed_key(x)
    blank = lambda x: jax.device_put(np.zeros_like(x)) if is_number(x) else x
    like = jax.tree.map(blank, tree)
    assert_same(load(path, like), tree)


CODECS = st.sampled_from(
    [
        *(jnp.float32, jnp.bfloat16, jnp.float16, eqx_ademamix.SplitBfloat16()),
        *(eqx_ademamix.ScaledFloat8(), eqx_ademamix.ScaledFloat8(64)),
        eqx_ademamix.ScaledFloat16(),
    ]
)
PARAMS = st.sampled_from([BIG, COMPLEX, HALF, MODEL])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    codecs=st.tuples(CODECS, CODECS, CODECS),
    min_size=st.sampled_from([0, 300]),
    params=PARAMS,
    b1=st.sampled_from([0.0, 0.9]),
    other=CODECS,
)
def test_any_format_comes_back(
    codecs: Any,
    min_size: int,
    params: Any,
    b1: float,
    other: Any,
    tmp_path_factory: pytest.TempPathFactory,
):
    """And only into the same format."""
    path = tmp_path_factory.getbasetemp() / "format.safetensors"
    fmt = StateFormat(*codecs, min_size=min_size)
    optim = AdEMAMix(1e-3, b1=b1, state_format=fmt)
    state = init(optim, params)
    save(path, state, optim=optim)
    assert_same(load(path, state, optim=optim), state)
    like = init(
        AdEMAMix(
            1e-3, b1=b1, state_format=StateFormat(other, *codecs[1:], min_size=min_size)
        ),
        params,
    )
    if jtu.tree_structure(like) == jtu.tree_structure(state):
        return
    with pytest.raises(CheckpointError, match=r"is stored as .*`change_state_format`"):
        load(path, like)


@pytest.mark.parametrize("is_committed", (False, True))
def test_arrays_stay_bound_to_their_device_or_free(
    tmp_path: pathlib.Path, is_committed: bool
):
    x = jnp.ones(3)
    like = jax.device_put(x, jax.devices()[0]) if is_committed else x
    save(tmp_path / "x", x)
    loaded = load(tmp_path / "x", like)
    # Before JAX 0.4.31, the attribute was private.
    committed = getattr(loaded, "committed", getattr(loaded, "_committed", None))
    assert committed is is_committed
