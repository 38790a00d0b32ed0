"""Encoded states work wherever dense states work."""

import contextlib
import textwrap
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import eqx_ademamix
from eqx_ademamix import (
    AbstractCodec,
    AdEMAMix,
    AdEMAMixState,
    Compensated,
    Dense,
    Encoded,
    ScaledFloat8,
    ScaledFloat16,
    SimplifiedAdEMAMix,
    SplitBfloat16,
    StateFormat,
    decoded,
    state_bytes,
    state_report,
)

from .helpers import (
    COMPACT,
    SCHEDULES,
    assert_trees_close,
    buffers,
    compiled_programs,
    count_traces,
    everywhere,
    loss_of_arrays,
    make_mlp,
    max_error,
    tree_type,
    x64,
)


FORMATS = {
    "compact": StateFormat.compact(),
    "half": StateFormat.half(),
    "mixed": StateFormat(m1=jnp.bfloat16, m2=SplitBfloat16(), nu=ScaledFloat16()),
}


def make_params() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    draw = lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    shapes = {"w": (64, 256), "stack": (3, 20, 300), "kernel": (16, 8, 3, 3), "b": (7,)}
    params: dict[str, Any] = {name: draw(shape) for name, shape in shapes.items()}
    c = jax.lax.complex(draw((70, 70)), draw((70, 70)))
    return {**params, "c": c, "frozen": None, "i": 3}


def sines(params: Any) -> Any:
    """Gradients with a wide range of sizes."""
    real = lambda x: 1e-3 * jnp.sin(7 * x) * jnp.exp(2 * x)

    def of(x: Any) -> Any:
        if jnp.iscomplexobj(x):
            return jax.lax.complex(real(x.real), real(x.imag))
        return real(x)

    return jax.tree.map(of, eqx.filter(params, eqx.is_inexact_array))


def train(optim: Any, params: Any, steps: int, step: Any = None) -> tuple[Any, Any]:
    state = eqx_ademamix.init(optim, params)
    for _ in range(steps):
        updates, state = (step or eqx_ademamix.update)(
            optim, sines(params), state, params
        )
        params = eqx.apply_updates(params, updates)
    return params, state


#
# What is stored
#


def test_bytes_a_parameter():
    params = {"a": jnp.zeros((32, 256)), "b": jnp.zeros((4, 16, 4097))}
    count = sum(x.size for x in params.values())
    for fmt, bound in ((StateFormat.compact(), 4.2), (StateFormat.half(), 6.2)):
        for tree, size in ((params, count), (params["a"], params["a"].size)):
            state = AdEMAMix(1e-3, state_format=fmt).init(tree)
            moments = (state.m1, state.m2, state.nu)
            assert state_bytes(moments) <= bound * size
            assert state_bytes(state) == sum(x.nbytes for x in jtu.tree_leaves(state))
    for codec, bound in (
        (ScaledFloat8(), 1.1),
        (ScaledFloat8().for_squares(), 1.1),
        (ScaledFloat16(), 2.1),
        (SplitBfloat16(), 3.1),
    ):
        assert codec.bytes_per_parameter((64, 256)) <= bound


def test_state_bytes_before_there_is_a_state():
    optim = AdEMAMix(1e-3, state_format=StateFormat.compact())
    shapes = eqx.filter_eval_shape(eqx_ademamix.init, optim, make_params())
    state = eqx_ademamix.init(optim, make_params())
    assert state_bytes(shapes) == state_bytes(state) > 0
    assert state_report(shapes) == state_report(state)


def test_which_leaves_are_encoded():
    fmt = StateFormat.compact()
    params = {"small": jnp.zeros((63, 65)), "large": jnp.zeros((64, 64))}
    state = AdEMAMix(1e-3, state_format=fmt).init(params)
    assert state.m1["small"].dtype == jnp.float32
    assert not isinstance(state.m1["small"], Encoded)
    for tree, codec in ((state.m1, fmt.m1), (state.m2, fmt.m2), (state.nu, fmt.nu)):
        assert isinstance(tree["large"], Encoded) and tree["large"].codec == codec
    fmt = StateFormat(fmt.m1, fmt.m2, fmt.nu, min_size=4097)
    assert not isinstance(
        AdEMAMix(1, state_format=fmt).init(params).m1["large"], Encoded
    )
    with x64():
        wide = AdEMAMix(1e-3, state_format=fmt).init(jnp.zeros(3, jnp.float64))
        assert wide.m1.dtype == wide.m2.dtype == wide.nu.dtype == jnp.float64


@pytest.mark.parametrize("dtype", ("float16", "bfloat16", "float32"))
def test_a_dtype_is_a_codec(dtype: str):
    """`Dense` stores a plain array, and is what a format keeps of a dtype."""
    dense = Dense(dtype)
    assert isinstance(dense, AbstractCodec) and dense.for_squares() == dense
    fmt = StateFormat(m1=dtype, m2=jnp.dtype(dtype), nu=dense)
    assert fmt.m1 == fmt.m2 == fmt.nu == dense
    assert (dense == Dense("float32")) == (dtype == "float32")
    assert fmt == StateFormat(dense, dense, dense)
    x = jnp.asarray([0.1, -3.0, 1e6], jnp.float32)
    stored = dense.encode(x, jax.random.key(0))
    assert isinstance(stored, jax.Array) and stored.dtype == dtype
    assert np.all(np.isfinite(stored))  # also 1e6 in float16
    assert dense.decode(stored) is stored
    assert dense.bytes_per_parameter((3,)) == jnp.dtype(dtype).itemsize
    assert dense.zeros(x).dtype == dtype


def test_dense_follows_wider_and_complex_parameters():
    with x64():
        for stored, param, expected in (
            ("float32", "float64", "float64"),
            ("float32", "complex64", "complex64"),
            ("float32", "complex128", "complex128"),
            ("bfloat16", "float64", "bfloat16"),
            ("bfloat16", "complex64", "complex64"),
            ("float64", "float32", "float64"),
        ):
            dense, x = Dense(stored), jnp.ones(3, param)
            assert dense.zeros(x).dtype == dense.encode(x).dtype == expected
    with pytest.raises(ValueError, match=r"`dtype` is .*, but one of the dtypes"):
        Dense(jnp.int8)
    with pytest.raises(ValueError, match="`dtype` is float64, but JAX has 64-bit"):
        Dense(jnp.float64)


def test_report():
    params = {"bias": jnp.zeros(256), "weight": jnp.zeros((64, 256))}
    optim = AdEMAMix(1e-3, b1=0, state_format=StateFormat.compact())
    assert state_report(eqx_ademamix.init(optim, params)) == (
        "The state takes 51,720 bytes, 3.11 per parameter.\n"
        "\n"
        "  path        shape      m1    m2             nu            bytes\n"
        "  ['bias']    (256,)     none  float32        float32        8.00\n"
        "  ['weight']  (64, 256)  none  ScaledFloat16  ScaledFloat8   3.03"
    )
    example = str(state_report.__doc__).split("```text\n")[1].split("```")[0]
    example = textwrap.dedent(example).rstrip()  # Python 3.13 dedents it by itself
    optim = AdEMAMix(1e-3, state_format=StateFormat.compact())
    report = state_report((eqx_ademamix.init(optim, params), "and more"))
    assert report == example
    empty = AdEMAMix(1e-3).init({})
    assert state_report(empty).startswith("The state takes 8 bytes.")


MIXED = {
    "bias": jnp.zeros(256, jnp.bfloat16),
    "norm": jnp.zeros(256),
    "weight": jnp.zeros((64, 256), jnp.bfloat16),
}


def test_report_with_remainders():
    """Rows and header count the remainders of `Compensated`."""
    optim = Compensated(AdEMAMix(1e-3, state_format=StateFormat.compact()))
    report = textwrap.dedent("""\
        The state takes 105,740 bytes, 6.26 per parameter.

          path        shape      m1            m2             nu            remainder  bytes
          ['bias']    (256,)     float32       float32        float32       int16      14.00
          ['norm']    (256,)     float32       float32        float32       none       12.00
          ['weight']  (64, 256)  ScaledFloat8  ScaledFloat16  ScaledFloat8  int16       6.05
    """)  # noqa: E501
    state = eqx_ademamix.init(optim, MIXED)
    assert state_report(state) == report.rstrip()
    shapes = eqx.filter_eval_shape(optim.init, MIXED)
    assert state_report(shapes) == report.rstrip()


@pytest.mark.parametrize("bits", (8, 16))
@pytest.mark.parametrize(
    "wrap",
    (
        lambda optim: optim,
        lambda optim: optax.chain(optax.clip_by_global_norm(1.0), optim),
        lambda optim: optax.apply_if_finite(optim, 5),
    ),
    ids=("alone", "chain", "apply_if_finite"),
)
@pytest.mark.parametrize("inner", (AdEMAMix, SimplifiedAdEMAMix))
def test_rows_add_up_to_the_header(inner: Any, wrap: Any, bits: int):
    state = eqx_ademamix.init(wrap(Compensated(inner(1e-3), bits)), MIXED)
    first, _, head, *rows = state_report(state).splitlines()
    assert head.split()[-2:] == ["remainder", "bytes"]
    sizes = [x.size for x in MIXED.values()]
    total = sum(n * float(row.split()[-1]) for n, row in zip(sizes, rows, strict=True))
    scalars = [x for x in jax.tree.leaves(state) if x.shape == ()]
    assert total == state_bytes(state) - state_bytes(scalars)
    assert first.startswith(f"The state takes {state_bytes(state):,} bytes")


@pytest.mark.parametrize("tree", ({}, (1, 2), "two"))
def test_report_of_something_else(tree: Any):
    if tree == "two":
        tree = [AdEMAMix(1e-3).init(jnp.ones(2))] * 2
    with pytest.raises(ValueError, match=r"`state` has .* states of AdEMAMix, but one"):
        state_report(tree)


#
# Steps
#


@pytest.mark.parametrize("name", FORMATS)
def test_updates_are_close_to_those_of_float32(name: str):
    params = make_params()
    fmt = everywhere(FORMATS[name])
    compact, _ = train(AdEMAMix(1e-3, state_format=fmt, **SCHEDULES), params, 20)
    exact, _ = train(AdEMAMix(1e-3, **SCHEDULES), params, 20)
    moved = jax.tree.map(lambda x, y: x - y, *map(arrays_of, (exact, params)))
    error = jax.tree.map(lambda x, y: x - y, *map(arrays_of, (exact, compact)))
    tolerance = 0.1 if name == "compact" else 0.02
    for path, x in jtu.tree_leaves_with_path(error):
        size = jnp.linalg.norm(dict(jtu.tree_leaves_with_path(moved))[path].ravel())
        assert jnp.linalg.norm(x.ravel()) <= tolerance * size, jtu.keystr(path)


def arrays_of(tree: Any) -> Any:
    return eqx.filter(tree, eqx.is_inexact_array)


@pytest.mark.parametrize("name", FORMATS)
def test_types_stay_and_one_trace(name: str):
    optim = AdEMAMix(1e-3, state_format=everywhere(FORMATS[name]), **SCHEDULES)
    params = make_params()
    counted, traces = count_traces(eqx_ademamix.update)
    before = tree_type(eqx_ademamix.init(optim, params))
    _, state = train(optim, params, 3, eqx.filter_jit(counted))
    assert tree_type(state) == before
    assert len(traces) == 1
    _, state = train(optim, params, 1)
    assert tree_type(state) == before


def test_runs_repeat_bit_for_bit():
    optim = AdEMAMix(1e-3, state_format=COMPACT)
    step = eqx.filter_jit(eqx_ademamix.update)
    one, other = (train(optim, make_params(), 5, step) for _ in range(2))
    assert eqx.tree_equal(one, other)


def test_equal_leaves_are_rounded_independently():
    """Rounding depends on the place in the model. Otherwise, equal layers would have
    equal errors."""
    optim = AdEMAMix(1e-3, state_format=COMPACT)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 256)), jnp.float32)
    _, state = optim.update([x, x], optim.init([x, x]))
    for tree in (state.m1, state.m2, state.nu):
        assert not np.array_equal(tree[0].real[0], tree[1].real[0])


@pytest.mark.parametrize("name", FORMATS)
def test_scan_and_vmap(name: str):
    optim = AdEMAMix(1e-3, state_format=everywhere(FORMATS[name]))
    params = arrays_of(make_params())

    def run(params: Any) -> Any:
        def body(carry: Any, _: None) -> Any:
            params, state = carry
            updates, state = optim.update(sines(params), state, params)
            return (eqx.apply_updates(params, updates), state), None

        return jax.lax.scan(body, (params, optim.init(params)), None, length=3)[0]

    single = jax.jit(run)(params)
    stacked = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), params)
    many = eqx.filter_jit(eqx.filter_vmap(run))(stacked)
    first = jax.tree.map(lambda x: x[0], many)
    assert tree_type(first) == tree_type(single)
    assert_trees_close(decoded(first), decoded(single), 0.02)
    assert many[1].m2["w"].shape == (2, 64, 256)


@pytest.mark.parametrize("name", FORMATS)
def test_donation(name: str):
    optim = AdEMAMix(1e-3, state_format=everywhere(FORMATS[name]))
    params = arrays_of(make_params())
    state = optim.init(params)
    assert len(set(buffers(state))) == len(buffers(state))

    def step(params: Any, state: Any) -> Any:
        updates, state = optim.update(sines(params), state, params)
        return eqx.apply_updates(params, updates), state

    jitted = jax.jit(step, donate_argnums=(0, 1))
    # Every buffer is updated in place.
    program = jitted.lower(params, state).compile().as_text()
    leaves = [x for x in jtu.tree_leaves((params, state)) if x.size > 1]
    assert str(program).count("-alias)") >= len(leaves)
    for _ in range(3):
        old = jtu.tree_leaves((params, state))
        params, state = jitted(params, state)
        assert all(x.is_deleted() for x in old if x.size > 1)


@pytest.mark.parametrize("shape", ((512, 512), (4000, 67), (1000, 300)), ids=str)
@pytest.mark.parametrize("name", ("float32", "half", "compact"))
def test_temporaries_of_a_step(name: str, shape: tuple[int, ...]):
    """A step does not copy the state. It needs at most 0.35 bytes per parameter."""
    params = [jnp.zeros(shape) for _ in range(4)]
    optim = AdEMAMix(1e-3, state_format=getattr(StateFormat, name)())
    state = optim.init(params)

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = optim.update(grads, state, params)
        return eqx.apply_updates(params, updates), state

    jitted = jax.jit(step, donate_argnums=(0, 1))
    memory: Any = jitted.lower(params, state, params).compile().memory_analysis()
    size = sum(x.size for x in params)
    assert memory.temp_size_in_bytes <= 0.35 * size


def memory_of(optim: Any, *, state_first: bool = False) -> Any:
    """The memory of a float32 step that donates its parameters and its state."""
    params = [jnp.zeros((512, 256))]

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = optim.update(grads, state, params)
        params = eqx.apply_updates(params, updates)
        return (state, params) if state_first else (params, state)

    jitted = jax.jit(step, donate_argnums=(0, 1))
    lowered = jitted.lower(params, optim.init(params), params)
    return lowered.compile().memory_analysis()


@pytest.mark.parametrize(
    "optim",
    (AdEMAMix(1e-3), AdEMAMix(1e-3, b1=0.0), SimplifiedAdEMAMix(1e-3)),
    ids=("AdEMAMix", "b1=0", "Simplified"),
)
def test_no_temporaries_in_float32(optim: Any):
    """Also if the direction depends on the gradient itself, which is clipped."""
    assert memory_of(optim).temp_size_in_bytes <= 4096


def test_results_in_another_order_are_copied():
    """The FAQ says how much that takes at most: three arrays of float32. (jax 0.4.27
    reports all sizes on a CPU as 0.)"""
    memory = memory_of(AdEMAMix(1e-3), state_first=True)
    least = 12 * 512 * 256 if memory.argument_size_in_bytes else 0
    assert least <= memory.temp_size_in_bytes <= least + 4096


@pytest.mark.parametrize("block_size", (64, 100, 257, 4096))
def test_temporaries_with_other_blocks(block_size: int):
    """Also if a block has no whole number of parts, or many."""
    one, two = ScaledFloat8(block_size), ScaledFloat16(block_size)
    optim = AdEMAMix(1e-3, state_format=StateFormat(one, two, one))
    grads = jnp.zeros((512, 4096))
    jitted = jax.jit(optim.update, donate_argnums=1)
    memory: Any = jitted.lower(grads, optim.init(grads)).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= 0.4 * grads.size


@pytest.mark.parametrize("spec", (("x", None), (None, "x")), ids=("first", "last"))
def test_sharding(spec: tuple[Any, ...]):
    """The codes have the sharding of the parameters, and the results are the same."""
    mesh = Mesh(np.array(jax.devices()), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    params = jnp.asarray(np.random.default_rng(0).normal(size=(64, 2048)), jnp.float32)
    optim = AdEMAMix(1e-3, state_format=StateFormat.compact())
    step = jax.jit(optim.update)

    def run(params: Any) -> Any:
        state = optim.init(params)
        for _ in range(3):
            updates, state = step(sines(params), state, params)
            params = params + updates
        return params, state

    sharded, plain = run(jax.device_put(params, sharding)), run(params)
    for tree in (sharded[1].m1, sharded[1].m2, sharded[1].nu):
        assert tree.real[0].sharding.is_equivalent_to(sharding, 2)
    assert optim.init(jax.device_put(params, sharding)).m2.real[0].sharding == sharding
    # Codes can differ by one if the compiler rounds the arithmetic differently.
    for a, b in zip(jtu.tree_leaves(sharded), jtu.tree_leaves(plain), strict=True):
        assert np.mean(np.asarray(a) != np.asarray(b)) < 1e-3 or max_error(a, b) < 1e-6


@pytest.mark.parametrize("spec", (("x", None), (None, "x")), ids=("first", "last"))
@pytest.mark.parametrize("name", ("half", "compact"))
def test_sharding_that_is_a_part_of_the_type(name: str, spec: tuple[Any, ...]):
    """`jax.make_mesh` gives such shardings. There, a state can also be a `scan` carry,
    even if the devices do not divide the blocks."""
    is_typed = hasattr(jax, "set_mesh")
    mesh = jax.make_mesh((8,), ("x",)) if is_typed else Mesh(jax.devices(), ("x",))
    optim = AdEMAMix(1e-3, state_format=getattr(StateFormat, name)())
    grads = jnp.asarray(np.random.default_rng(0).normal(size=(64, 1024)), jnp.float32)

    def run(grads: Any) -> Any:
        def body(state: Any, _: None) -> Any:
            updates, state = optim.update(grads, state)
            return state, updates

        return jax.lax.scan(body, optim.init(grads), None, length=3)

    plain = run(grads)
    with jax.set_mesh(mesh) if is_typed else contextlib.nullcontext():
        sharded = run(jax.device_put(grads, NamedSharding(mesh, PartitionSpec(*spec))))
        assert sharded[1].sharding.is_equivalent_to(
            NamedSharding(mesh, PartitionSpec(None, *spec)), 3
        )
        dense = jax.tree.map(np.asarray, (decoded(sharded[0]), sharded[1]))
    expected = decoded(plain[0]), plain[1]
    assert_trees_close(jax.tree.map(jnp.asarray, dense), expected, 1e-2)


@pytest.mark.parametrize("name", ("half", "compact"))
def test_derivatives_through_an_update(name: str):
    """Derivatives are not zero, and close to those of float32 where the terms of the
    rule's derivative do not cancel: where gradients are as small as the root of
    `eps_root`."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 256)), jnp.float32)

    def slope(fmt: StateFormat) -> Any:
        optim = AdEMAMix(1e-3, eps_root=1e-8, state_format=fmt)
        state = optim.init(x)
        weights = jnp.arange(256, dtype=jnp.float32)[None]
        total = lambda g: jnp.sum(weights * optim.update(g, state)[0])
        return jax.grad(total)(1e-4 * x)

    found = slope(getattr(StateFormat, name)())
    exact = slope(StateFormat.float32())
    error = jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact)
    assert error <= {"half": 0.01, "compact": 0.25}[name]


def slope_of_rule(g: Any, m1: Any, m2: Any, nu: Any, t: int) -> tuple[Any, Any]:
    """The two terms of du/dg in Algorithm 1 with a learning rate of 1, in float64, at
    given moments after `t` steps. The derivative is minus their difference."""
    g, m1, m2, nu = (np.asarray(x, np.float64) for x in (g, m1, m2, nu))
    bias1, bias2 = 1 - 0.9**t, 1 - 0.999**t
    root = np.sqrt(nu / bias2 + 1e-8)
    d = root + 1e-8
    first = ((1 - 0.9) / bias1 + 5.0 * (1 - 0.9999)) / d
    # nu_hat changes by 2 (1 - b2) g / bias2, and its root by that over 2 root.
    second = (m1 / bias1 + 5.0 * m2) / d**2 * (1 - 0.999) * g / bias2 / root
    return first, second


@pytest.mark.parametrize("steps", (1, 3))
@pytest.mark.parametrize("name", ("float32", "half", "compact"))
def test_derivatives_are_those_of_the_rule_at_the_decoded_moments(
    name: str, steps: int
):
    """Rounding counts as the identity, and the rule's derivative is evaluated at what
    is read back."""
    grads = jnp.asarray(np.random.default_rng(0).normal(size=(steps, 4096)), "float32")
    fmt = getattr(StateFormat, name)()
    optim = AdEMAMix(1.0, eps_root=1e-8, state_format=fmt)
    state, g = eqx_ademamix.init(optim, grads[0]), grads[-1]
    for past in grads[:-1]:
        state = eqx_ademamix.update(optim, past, state)[1]
    # An entry of the update depends on its own gradient only, so one tangent is enough.
    slope = jax.jvp(
        lambda g: eqx_ademamix.update(optim, g, state)[0], (g,), (jnp.ones_like(g),)
    )[1]
    after = decoded(eqx_ademamix.update(optim, g, state)[1])
    first, second = slope_of_rule(g, after.m1, after.m2, after.nu, steps)
    error = np.abs(np.asarray(slope, np.float64) - (second - first))
    # The terms nearly cancel at the first step, so the error is relative to them.
    assert np.all(error <= 1e-6 * (np.abs(first) + np.abs(second)))


def test_derivatives_in_float32_are_exact_and_those_of_codecs_are_not():
    """At the first step the exact derivative nearly cancels. What is left with a codec
    is its rounding error."""
    g = jnp.asarray(np.random.default_rng(0).normal(size=4096), jnp.float32)
    wide = np.asarray(g, np.float64)
    moments = 0.1 * wide, 1e-4 * wide, 1e-3 * wide**2
    first, second = slope_of_rule(g, *moments, 1)

    def error(name: str) -> Any:
        fmt = getattr(StateFormat, name)()
        optim = AdEMAMix(1.0, eps_root=1e-8, state_format=fmt)
        update = lambda g: optim.update(g, optim.init(g))[0]
        slope = jax.jvp(update, (g,), (jnp.ones_like(g),))[1]
        return np.abs(np.asarray(slope, np.float64) - (second - first)) / first

    assert np.median((first - second) / first) < 1e-7
    assert np.max(error("float32")) < 1e-6
    assert 1e-4 < np.median(error("half")) < 1e-3
    assert 0.03 < np.median(error("compact")) < 0.15


def test_derivatives_do_not_pass_through_a_state_that_a_codec_stored():
    x = jnp.asarray(np.random.default_rng(0).normal(size=4096), jnp.float32)

    def slope(fmt: StateFormat) -> Any:
        optim = AdEMAMix(1.0, eps_root=1e-8, state_format=fmt)

        def second_update(g: Any) -> Any:
            state = eqx_ademamix.update(optim, g, eqx_ademamix.init(optim, g))[1]
            return eqx_ademamix.update(optim, x, state)[0]

        return jax.jvp(second_update, (x,), (jnp.ones_like(x),))[1]

    dense = StateFormat(jnp.bfloat16, jnp.bfloat16, jnp.bfloat16)
    assert np.all(slope(StateFormat.compact()) == 0)
    assert np.all(slope(StateFormat.half()) == 0)
    assert np.all(slope(dense) != 0)


def test_b1_zero_and_params_left_out():
    fmt = COMPACT
    optim = AdEMAMix(1e-3, b1=0, state_format=fmt)
    params = arrays_of(make_params())
    state = optim.init(params)
    assert jtu.tree_leaves(state.m1) == []
    updates, after = jax.jit(optim.update)(sines(params), state)
    assert tree_type(after) == tree_type(state)
    assert tree_type(updates) == tree_type(params)


@pytest.mark.parametrize("scale", (1e-12, 1e-6, 1.0, 1e4))
def test_gradients_of_all_scales(scale: float):
    """As with Adam, a step does not depend on the scale of the gradients."""
    fmt = COMPACT
    optim = AdEMAMix(1e-3, eps=1e-30, state_format=fmt)
    params = eqx.filter(
        make_params(), lambda x: eqx.is_array(x) and x.dtype == "float32"
    )
    grads = jax.tree.map(lambda x: jnp.sign(x) * jnp.exp(x), params)

    def run(scale: float) -> Any:
        state, updates = optim.init(grads), None
        for _ in range(3):
            scaled = jax.tree.map(lambda g: scale * g, grads)
            updates, state = optim.update(scaled, state)
        return updates

    for x, y in zip(*map(jtu.tree_leaves, (run(scale), run(1.0))), strict=True):
        assert np.all(np.isfinite(x))
        assert np.linalg.norm(x - y) <= 0.2 * np.linalg.norm(y)


@pytest.mark.parametrize("dtype", ("float16", "bfloat16", "float64"))
def test_other_parameters(dtype: str):
    with x64():
        params = jnp.asarray(np.random.default_rng(0).normal(size=(64, 256)), dtype)
        optim = AdEMAMix(1e-2, weight_decay=0.1, state_format=StateFormat.compact())
        state = optim.init(params)
        assert isinstance(state.m2, Encoded)
        updates, after = jax.jit(optim.update)(params, state, params)
        assert updates.dtype == params.dtype and tree_type(after) == tree_type(state)
        # The update was computed from the stored values.
        dense = jax.tree.map(np.float64, decoded(after))
        step = dense.m1 / (1 - 0.9) + 5 * dense.m2
        step = step / (np.sqrt(dense.nu / (1 - 0.999)) + 1e-8)
        expected = -1e-2 * (step + 0.1 * np.float64(params))
        rtol = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float64": 1e-12}[dtype]
        np.testing.assert_allclose(np.float64(updates), expected, rtol=rtol)


#
# Functions for stored states
#


def test_decoded():
    params = make_params()
    optim = AdEMAMix(1e-3, state_format=COMPACT)
    _, state = train(optim, params, 2)
    dense = decoded(state)
    assert type(dense) is AdEMAMixState
    like = eqx_ademamix.init(AdEMAMix(1e-3), params)
    assert tree_type(dense) == tree_type(like)
    fmt = optim.state_format
    assert isinstance(fmt.m2, ScaledFloat16)
    assert np.array_equal(dense.m2["w"], fmt.m2.decode(state.m2["w"]))
    assert decoded(dense) is not None and eqx.tree_equal(decoded(dense), dense)
    nested = decoded({"inside": (state, 1)})
    assert eqx.tree_equal(nested["inside"][0], dense)


def test_decoded_compiles_one_program_for_each_type_of_leaf(
    caplog: pytest.LogCaptureFixture,
):
    """Also outside of `jit`, where JAX otherwise compiles each operation."""
    optim = AdEMAMix(1e-3, state_format=COMPACT)
    params = {name: jnp.ones((19, 256)) for name in "abc"}
    state = eqx_ademamix.init(optim, params)
    with jax.log_compiles():
        decoded(state)
    # The codecs of m1, m2, and nu differ.
    assert compiled_programs(caplog) == ["_decode"] * 3


def test_to_and_from_optax_and_adamw():
    params = {"w": make_params()["w"], "b": make_params()["b"]}
    optim = AdEMAMix(1e-3, state_format=COMPACT)
    _, state = train(optim, params, 3)
    dense = decoded(state)
    theirs = eqx_ademamix.to_optax(state)
    adam = eqx_ademamix.to_adamw(state)
    for x, y in ((theirs.m1, dense.m1), (theirs.m2, dense.m2), (theirs.nu, dense.nu)):
        assert eqx.tree_equal(x, y)
    assert eqx.tree_equal(adam.mu, dense.m1) and eqx.tree_equal(adam.nu, dense.nu)
    back = eqx_ademamix.from_optax(theirs, optim, params)
    assert tree_type(back) == tree_type(state)
    # Rounding is to nearest, so a value on the grid of squares stays on the grid.
    assert eqx.tree_equal(decoded(back).nu, dense.nu)
    for x, y, bound in (
        (decoded(back).m1, dense.m1, 1 / 10_000),
        (decoded(back).m2, dense.m2, 1 / 2048),
    ):
        near = jax.tree.map(
            lambda a, b, bound=bound: bool(
                jnp.all(abs(a - b) <= 1.01 * bound * abs(b) + 1e-10 * jnp.max(abs(b)))
            ),
            x,
            y,
        )
        assert all(jtu.tree_leaves(near))
    switched = eqx_ademamix.from_adamw(adam, optim, params)
    assert tree_type(switched) == tree_type(state)
    assert all(np.all(x == 0) for x in jtu.tree_leaves(decoded(switched).m2))
    assert eqx.tree_equal(decoded(switched).nu, dense.nu)
    mesh = Mesh(np.array(jax.devices()), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    weights = {"w": params["w"]}
    mu = jax.device_put(weights, sharding)
    adam = optax.ScaleByAdamState(jnp.int32(3), mu, jax.tree.map(jnp.square, mu))
    switched = eqx_ademamix.from_adamw(adam, optim, weights)
    assert switched.m2["w"].real[0].sharding == sharding


def test_from_torch():
    params = {"w": jnp.zeros((64, 256))}
    x = np.asarray(make_params()["w"])
    moments = {"exp_avg_fast": x, "exp_avg_slow": x, "exp_avg_sq": x**2}
    state_dict = {"state": {0: {"step": 5, **moments}}, "param_groups": []}
    optim = AdEMAMix(1e-3, state_format=StateFormat.compact())
    state = eqx_ademamix.from_torch(state_dict, optim, params, {"['w']": 0})
    assert tree_type(state) == tree_type(optim.init(params))
    np.testing.assert_allclose(decoded(state).m2["w"], x, rtol=1.01 * 2**-11)
    np.testing.assert_allclose(decoded(state).nu["w"], x**2, rtol=0.1)


def test_serialisation(tmp_path: Any):
    params = make_params()
    optim = AdEMAMix(1e-3, state_format=COMPACT)
    _, state = train(optim, params, 2)
    eqx.tree_serialise_leaves(tmp_path / "state.eqx", state)
    like = eqx.filter_eval_shape(eqx_ademamix.init, optim, params)
    loaded = eqx.tree_deserialise_leaves(tmp_path / "state.eqx", like)
    assert eqx.tree_equal(loaded, state)
    as_numpy = jax.tree.map(np.asarray, state)
    one = eqx_ademamix.update(optim, sines(params), as_numpy, params)
    assert eqx.tree_equal(one, eqx_ademamix.update(optim, sines(params), state, params))


def test_a_sweep_and_extend_and_hyperparams():
    fmt = COMPACT
    model = make_mlp()

    @eqx.filter_vmap
    def run(rate: Any) -> Any:
        optim = AdEMAMix(rate, state_format=fmt)
        state = eqx_ademamix.init(optim, model)
        grads = eqx.filter_grad(loss_of_arrays)(model)
        updates, state = eqx_ademamix.update(optim, grads, state, model)
        return updates, eqx_ademamix.hyperparams(optim, state)

    updates, h = eqx.filter_jit(run)(jnp.asarray([1e-3, 2e-3]))
    weight = updates.layers[0].weight
    np.testing.assert_allclose(2 * weight[0], weight[1], rtol=1e-5)
    np.testing.assert_allclose(h.learning_rate, [1e-3, 2e-3])
    optim = AdEMAMix(1e-3, state_format=fmt, **SCHEDULES)
    state = eqx_ademamix.init(optim, model)
    longer: Any = eqx_ademamix.extend(optim, state, warmup=20)
    assert longer.alpha(20) == 5.0


def test_the_typed_core_takes_encoded_leaves_by_their_shape():
    good = ScaledFloat8().zeros(jnp.zeros((2, 3)))
    squares = ScaledFloat8(signed=False).zeros(jnp.zeros((2, 3)))
    other = ScaledFloat8().zeros(jnp.zeros((3, 2)))
    count = jnp.zeros((), jnp.int32)
    AdEMAMixState(count, count, {"w": good}, {"w": good}, {"w": squares})
    for wrong in ({"w": other}, {"v": good}, {"w": jnp.zeros((3, 3))}):
        with pytest.raises(TypeError):
            AdEMAMixState(count, count, wrong, {"w": good}, {"w": squares})
    imaginary = ScaledFloat8().zeros(jnp.zeros((2, 3), complex))
    with pytest.raises(TypeError):
        AdEMAMixState(count, count, {"w": good}, {"w": good}, {"w": imaginary})
