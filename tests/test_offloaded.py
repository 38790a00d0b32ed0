"""`Offloaded` keeps moments in host memory and takes the same steps.

With an older jax, each of these tests asserts the error that `init` raises there.
"""

import contextlib
import functools as ft
import re
from collections.abc import Callable
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
    change_state_format,
    init,
    make_step,
    update,
)

from .helpers import (
    COMPACT,
    HAS_HOST_MEMORY,
    SCHEDULES,
    assert_trees_close,
    buffers,
    everywhere,
    loss_of_arrays,
    make_zoo,
    tree_type,
    x64,
)


TOO_OLD = "^`Offloaded` needs jax 0.10.2 or newer, but this is jax "
FORMATS = {
    "float32": StateFormat.float32(),
    "half": everywhere(StateFormat.half()),
    "compact": COMPACT,
}
formats = pytest.mark.parametrize("name", FORMATS)
DEVICE = jax.devices()[0]


def feature(test: Callable[..., None]) -> Callable[..., None]:
    """A test that, with an older jax, asserts that `init` raises the error."""

    @ft.wraps(test)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        if HAS_HOST_MEMORY:
            return test(*args, **kwargs)
        with pytest.raises(ValueError, match=TOO_OLD):
            init(Offloaded(AdEMAMix(1e-3)), jnp.ones(3))

    return wrapped


def make_params(seed: int = 0, dtype: Any = jnp.float32) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    shapes = {"a": (8, 512), "b": (8,), "c": (8, 512)}
    return {
        key: jnp.asarray(rng.normal(size=shape), dtype) for key, shape in shapes.items()
    }


def on_device(tree: Any) -> Any:
    return jax.device_put(tree, DEVICE)


def on_mesh(tree: Any, kind: str = "Auto") -> Any:
    """Splits the first axis of each array over eight devices."""
    types = (getattr(jax.sharding.AxisType, kind),)
    mesh = Mesh(np.array(jax.devices()), ("x",), axis_types=types)
    spec = lambda x: P("x", *[None] * (x.ndim - 1))
    put = lambda x: jax.device_put(x, NamedSharding(mesh, spec(x)))
    return jax.tree.map(put, tree)


def placed(params: Any, layout: str) -> Any:
    return on_device(params) if layout == "one device" else on_mesh(params, layout)


def within(params: Any) -> Any:
    """The mesh of the arrays as a context, which JAX wants for explicit axes."""
    mesh = getattr(jtu.tree_leaves(params)[0].sharding, "mesh", None)
    is_explicit = mesh is not None and "Explicit" in str(mesh.axis_types)
    return jax.set_mesh(mesh) if is_explicit else contextlib.nullcontext()


def in_host(tree: Any) -> list[bool]:
    """Which arrays of a tree are in host memory."""
    kinds = [x.sharding.memory_kind for x in jtu.tree_leaves(tree)]
    assert set(kinds) <= {"device", "pinned_host"}
    return [kind == "pinned_host" for kind in kinds]


def hosted(state: Any) -> set[str]:
    """The fields of a state that are in host memory."""
    found = {name: in_host(getattr(state, name)) for name in vars(state)}
    assert all(len(set(flags)) <= 1 for flags in found.values())
    return {name for name, flags in found.items() if any(flags)}


def run(optim: Any, params: Any, state: Any, steps: int = 20) -> tuple[Any, Any]:
    """A run in which each step overwrites what it gets. Types and memories stay, and
    the program is compiled once."""

    @ft.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, i: Any) -> Any:
        grads = jax.tree.map(lambda x: jnp.sin(3 * x + i.astype(x.real.dtype)), params)
        updates, state = update(optim, grads, state, params)
        return eqx.apply_updates(params, updates), state

    before: Any = jax.tree.map(jnp.copy, params), state
    for i in range(steps):
        after = step(*before, jnp.asarray(i))
        assert tree_type(before) == tree_type(after)
        for x, y in zip(*map(jtu.tree_leaves, (before, after)), strict=True):
            assert x.is_deleted() and x.sharding.memory_kind == y.sharding.memory_kind
            assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
        before = after
    assert step._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue]
    return before


def assert_equal(x: Any, y: Any) -> None:
    """Bit for bit, with equal types."""
    assert tree_type(x) == tree_type(y)
    for a, b in zip(jtu.tree_leaves(x), jtu.tree_leaves(y), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


#
# The same steps
#

LAYOUTS = ("one device", "Auto", "Explicit")
RUNS = [(layout, name, 0.1) for layout in LAYOUTS for name in FORMATS]


@feature
@pytest.mark.parametrize(
    "layout,name,weight_decay", [*RUNS, ("one device", "float32", 0.0)]
)
def test_it_takes_the_same_steps(layout: str, name: str, weight_decay: float):
    """Bit for bit."""
    fmt = FORMATS[name]
    plain = AdEMAMix(1e-2, weight_decay=weight_decay, state_format=fmt, **SCHEDULES)
    params = placed(make_params(), layout)
    with within(params):
        state = init(Offloaded(plain), params)
        assert hosted(state) == {"m2"}
        assert_equal(state, init(plain, params))
        found = run(Offloaded(plain), params, state)
        expected = run(plain, params, init(plain, params))
    assert hosted(found[1]) == {"m2"}
    assert_equal(found, expected)


@feature
@pytest.mark.parametrize(
    "optim,moments",
    (
        (AdEMAMix(1e-2), ("m1", "m2", "nu")),
        (AdEMAMix(1e-2, b1=0.0, bias_correct_m2=True), ("nu", "m2")),
        (SimplifiedAdEMAMix(1e-3, state_format=COMPACT), ["m"]),
        (SimplifiedAdEMAMix(1e-3, normalize=True), ("m", "nu", "m")),
    ),
)
def test_other_moments(optim: Any, moments: Any):
    params = on_device(make_params())
    offloaded = Offloaded(optim, moments)
    found = run(offloaded, params, init(offloaded, params), 5)
    assert hosted(found[1]) == set(moments)
    assert_equal(found, run(optim, params, init(optim, params), 5))


@feature
def test_leaves_of_all_kinds():
    """Scalars, empty arrays, complex numbers, float64, and leaves without a moment."""
    with x64():
        params: Any = {
            "complex": jnp.asarray([[1 + 2j, -1j]], jnp.complex64),
            "wide": jnp.ones(3, jnp.float64),
            "empty": jnp.zeros((0, 4)),
            "scalar": jnp.asarray(0.5, jnp.float32),
            "half": jnp.ones((2, 3), jnp.bfloat16),
            "frozen": jnp.ones(2, jnp.float16),
            "nothing": None,
        }
        params = on_device(params)
        plain = AdEMAMix(1e-2, trainable=lambda x: x.dtype != jnp.float16)
        offloaded = Offloaded(plain, ("m1", "m2"))
        states = [init(optim, params) for optim in (plain, offloaded)]
        steps = [jax.jit(optim.update) for optim in (plain, offloaded)]
        for _ in range(3):
            outs = [
                step(params, state, params)
                for step, state in zip(steps, states, strict=True)
            ]
            assert_equal(*outs)
            states = [state for _, state in outs]
        assert hosted(states[1]) == {"m1", "m2"} and hosted(states[0]) == set()
        assert states[1].m2["frozen"] is None


@feature
def test_a_whole_model():
    model = eqx.filter_shard(make_zoo(jax.random.key(0)), DEVICE)
    plain = AdEMAMix(1e-2, weight_decay=0.1)
    outs = []
    for optim in (plain, Offloaded(plain)):

        @eqx.filter_jit(donate="all-except-first")
        def step(optim: Any, model: Any, state: Any) -> Any:
            loss, grads = eqx.filter_value_and_grad(loss_of_arrays)(model)
            updates, state = update(optim, grads, state, model)
            return eqx.apply_updates(model, updates), state, loss

        copy = jax.tree.map(lambda x: jnp.copy(x) if eqx.is_array(x) else x, model)
        carry = copy, init(optim, model)
        for _ in range(3):
            *carry, _ = step(optim, *carry)
        outs.append(carry)
    assert hosted(outs[1][1]) == {"m2"}
    assert_equal(*(eqx.filter(out, eqx.is_array) for out in outs))


@feature
def test_steps_outside_of_jit():
    params = make_params()
    plain = AdEMAMix(1e-2, weight_decay=0.1)
    outs = [
        optim.update(params, init(optim, params), params)
        for optim in (plain, Offloaded(plain))
    ]
    assert_equal(*outs)
    assert hosted(outs[1][1]) == {"m2"}


#
# init
#


@feature
@formats
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("how", ("eager", "jit"))
def test_init(how: str, layout: str, name: str):
    """Zeros in host memory, sharded as those of the wrapped optimizer."""
    plain = AdEMAMix(1e-3, state_format=FORMATS[name])
    params = placed(make_params(), layout)
    wrap = jax.jit if how == "jit" else lambda f: f
    with within(params):
        state, expected = (wrap(o.init)(params) for o in (Offloaded(plain), plain))
    assert hosted(state) == {"m2"}
    assert_equal(state, expected)
    for x, y in zip(*map(jtu.tree_leaves, (state, expected)), strict=True):
        sharding = x.sharding.with_memory_kind("device")
        assert sharding.is_equivalent_to(y.sharding, x.ndim)


@feature
def test_init_without_arrays():
    """From shapes, of shapes, and of nothing."""
    optim, params = Offloaded(AdEMAMix(1e-3)), make_params()
    structs = eqx.filter_eval_shape(lambda: params)
    assert_equal(init(optim, structs), init(optim, params))
    shapes = eqx.filter_eval_shape(init, optim, params)
    assert shapes == eqx.filter_eval_shape(init, AdEMAMix(1e-3), params)
    assert init(optim, {}).m2 == {}


@feature
def test_init_on_another_device():
    params = jax.device_put(make_params(), jax.devices()[3])
    for x in jtu.tree_leaves(init(Offloaded(AdEMAMix(1e-3)), params)):
        assert x.devices() == {jax.devices()[3]}


@pytest.mark.parametrize("name", ("float32", "half"))
@pytest.mark.parametrize("wrap", (lambda x: x, Compensated))
def test_a_device_by_name_needs_one_program(wrap: Any, name: str):
    """The scalars and scales of a state are where a step puts them. (This is what keeps
    `Offloaded` from compiling twice, but holds without it, too.)"""
    params = on_device(make_params(dtype=jnp.bfloat16))
    optim = wrap(AdEMAMix(1e-3, state_format=FORMATS[name]))
    run(optim, params, init(optim, params), 2)


#
# What the program does
#


def transfers(jaxpr: Any) -> list[tuple[str, int]]:
    """The copies between memories in a program, in order, each with the equation."""
    found = []
    for i, eqn in enumerate(jaxpr.eqns):
        if eqn.primitive.name == "device_put":
            found.append((eqn.params["devices"][0].name, i))
    return found


def needed_by(jaxpr: Any, i: int) -> set[int]:
    """The equations whose results an equation needs, directly or not."""
    made_by = {out: j for j, eqn in enumerate(jaxpr.eqns) for out in eqn.outvars}
    needed, new = set[int](), [i]
    while new:
        inputs = [x for x in jaxpr.eqns[new.pop()].invars if not hasattr(x, "val")]
        more = {made_by[x] for x in inputs if x in made_by} - needed
        needed |= more
        new += more
    return needed


@feature
@pytest.mark.parametrize(
    "moments,fmt,arrays", ((("m2",), "float32", 1), (("m1", "m2", "nu"), "compact", 6))
)
def test_the_device_holds_two_leaves_at_once(
    moments: tuple[str, ...], fmt: str, arrays: int
):
    """Each moment is copied to the device once and back once. There are two queues of
    leaves, and in each of them a leaf waits until those before it are back."""
    params = {f"{i:02d}": jnp.ones((4, 8 + i)) for i in range(6)}
    optim = Offloaded(AdEMAMix(1e-3, state_format=FORMATS[fmt]), moments)
    state = init(optim, params)
    jaxpr = jax.make_jaxpr(optim.update)(params, state, params).jaxpr
    copies = transfers(jaxpr)
    assert [kind for kind, _ in copies] == (["Device"] * arrays + ["Host"] * arrays) * 6
    places = [i for _, i in copies]
    leaves = [places[i : i + 2 * arrays] for i in range(0, len(places), 2 * arrays)]
    for i, leaf in enumerate(leaves):
        for fetch in leaf[:arrays]:
            needed = needed_by(jaxpr, fetch)
            back = [set(other[arrays:]) <= needed for other in leaves]
            assert back == [j in range(i % 2, i, 2) for j in range(6)]


@feature
def test_the_wrapped_optimizer_has_no_barriers():
    params = make_params()
    optim = AdEMAMix(1e-3)
    text = str(jax.make_jaxpr(optim.update)(params, init(optim, params), params))
    assert "optimization_barrier" not in text and "device_put" not in text


@feature
def test_the_compiled_program():
    """On a GPU, each of three moments is copied there and back. XLA knows the memory of
    each input and output, and those in host memory are overwritten there."""
    params = on_device(make_params())
    optim = Offloaded(AdEMAMix(1e-3))
    state = init(optim, params)
    step = jax.jit(optim.update, donate_argnums=(0, 1))
    traced = step.trace(params, state)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count('_xla_buffer_placement = "device"') == 3
    assert text.count('_xla_buffer_placement = "pinned_host"') == 3
    text = str(traced.lower().compile().as_text())
    inputs, outputs = re.findall(r"entry_computation_layout={(.*)->(.*)}", text)[0]
    assert inputs.count("S(5)") == outputs.count("S(5)") == 3
    before = buffers(state.m2)
    _, state = step(jax.tree.map(jnp.copy, params), state)
    assert buffers(state.m2) == before


@feature
def test_what_is_in_place_does_not_move():
    from eqx_ademamix import _memory

    x = init(Offloaded(AdEMAMix(1e-3)), jnp.ones(3)).m2
    assert _memory.to_host(x) is x
    y = _memory.to_device(x)
    assert in_host((x, y)) == [True, False] and _memory.to_device(y) is y


#
# Inside of others
#


@feature
@pytest.mark.parametrize("bits", (8, 16))
def test_compensated(bits: int):
    params = on_device(make_params(dtype=jnp.bfloat16))
    plain = AdEMAMix(1e-3, weight_decay=0.1)
    optims = [Compensated(x, bits=bits) for x in (plain, Offloaded(plain))]
    outs = [run(optim, params, init(optim, params), 5) for optim in optims]
    assert_equal(*outs)
    assert hosted(outs[1][1].inner_state) == {"m2"}
    jitted = jax.jit(optims[1].init)(params)
    assert hosted(jitted.inner_state) == {"m2"}


@feature
@pytest.mark.parametrize("name", ("chain", "MultiSteps", "apply_if_finite"))
@pytest.mark.usefixtures("standard_promotion")
def test_inside_optax(name: str):
    wrap: Any = {
        "chain": lambda x: optax.chain(optax.clip_by_global_norm(1.0), x),
        "MultiSteps": lambda x: optax.MultiSteps(x, 2),
        "apply_if_finite": lambda x: optax.apply_if_finite(x, 3),
    }[name]
    params, outs = on_device(make_params()), []
    for optim in (AdEMAMix(1e-3), Offloaded(AdEMAMix(1e-3))):
        wrapped = wrap(optim)
        state, step = wrapped.init(params), jax.jit(wrapped.update)
        for _ in range(4):
            _, state = step(params, state, params)
        outs.append(state)
    assert_equal(*outs)
    assert sum(in_host(outs[1])) == len(params) and not any(in_host(outs[0]))


@feature
def test_loops():
    """The carry of a loop keeps its memory."""
    params = on_device(make_params())
    plain = AdEMAMix(1e-2)

    def body(optim: Any, carry: Any, _: Any) -> Any:
        updates, state = update(optim, carry[0], carry[1], carry[0])
        return (eqx.apply_updates(carry[0], updates), state), None

    def scan(optim: Any, carry: Any) -> Any:
        return jax.lax.scan(ft.partial(body, optim), carry, length=3)[0]

    def fori(optim: Any, carry: Any) -> Any:
        step = lambda i, carry: body(optim, carry, None)[0]
        return jax.lax.fori_loop(0, 3, step, carry)

    def cond(optim: Any, carry: Any) -> Any:
        step = lambda carry: body(optim, carry, None)[0]
        return jax.lax.cond(carry[0]["b"][0] < 100, step, lambda x: x, carry)

    for loop in (scan, fori, cond):
        outs = [
            jax.jit(ft.partial(loop, optim))((params, init(optim, params)))
            for optim in (plain, Offloaded(plain))
        ]
        assert_equal(*outs)
        assert hosted(outs[1][1]) == {"m2"}


@feature
def test_batches_of_states():
    """An ensemble, and a sweep over learning rates."""
    params = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), make_params())
    outs = []
    for wrap in (lambda x: x, Offloaded):
        make = eqx.filter_vmap(lambda rate, wrap=wrap: wrap(AdEMAMix(rate)))
        optim = make(jnp.asarray([1e-2, 1e-3]))
        state = eqx.filter_vmap(init)(optim, params)
        step = eqx.filter_jit(eqx.filter_vmap(update))
        outs.append(step(optim, params, state, params))
    assert_equal(*outs)
    assert hosted(outs[1][1]) == {"m2"}


@feature
def test_shard_map():
    """Leaves that are split and leaves that are not can be in one tree."""
    optim = Offloaded(AdEMAMix(1e-3))
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    shapes = {"a": (8, 2), "b": (8, 3), "c": (4,), "d": (8,), "e": (5,)}
    specs = {key: P("x") if x[0] == 8 else P() for key, x in shapes.items()}
    params = {
        key: jax.device_put(jnp.ones(shape), NamedSharding(mesh, specs[key]))
        for key, shape in shapes.items()
    }
    state = init(optim, params)
    of_state = jax.tree.map(lambda x: x.sharding.spec, state)
    types: Any = dict(mesh=mesh, out_specs=(specs, of_state))
    step = jax.shard_map(optim.update, in_specs=(specs, of_state), **types)
    updates, new = jax.jit(step)(params, state)
    assert hosted(new) == {"m2"}
    assert_equal((updates, new), jax.jit(optim.update)(params, state))


@feature
@pytest.mark.parametrize("name", ("float32", "compact"))
def test_derivatives(name: str):
    """Those through three steps are those of the wrapped optimizer."""
    params = {key: jnp.full((2, 8), 1.0 + i) for i, key in enumerate("abcd")}
    plain = AdEMAMix(1e-2, state_format=FORMATS[name], eps_root=1e-8)

    def total(optim: Any, g: Any) -> Any:
        state, grads = init(optim, params), {**params, "a": g}
        for _ in range(2):
            _, state = optim.update(grads, state, params)
        return jnp.sum(optim.update(grads, state, params)[0]["a"])

    for derive in (jax.grad, jax.jacfwd):
        found, expected = (
            jax.jit(derive(ft.partial(total, optim)))(params["a"])
            for optim in (Offloaded(plain, ("m1", "m2", "nu")), plain)
        )
        assert_equal(found, expected)
        assert np.all(np.asarray(found) != 0)


#
# make_step
#


def loss_fn(model: Any, x: Any) -> Any:
    return sum(jnp.sum(jnp.sin(leaf) * x) for leaf in jtu.tree_leaves(model))


@feature
@pytest.mark.parametrize("layout", ("one device", "Auto", "nowhere"))
@pytest.mark.parametrize(
    "options", ({}, {"steps_per_call": 2}, {"pack_below": 100}), ids=str
)
def test_make_step(layout: str, options: Any):
    params = make_params() if layout == "nowhere" else placed(make_params(), layout)
    x = jnp.ones((options.get("steps_per_call", 1),))
    x = x if "steps_per_call" in options else x[0]
    outs = []
    for optim in (AdEMAMix(1e-2), Offloaded(AdEMAMix(1e-2))):
        step = make_step(loss_fn, optim, **options)
        carry = step.init(params)
        for _ in range(3):
            carry, _ = step(carry, x)
        out = step.unpack(carry)
        carry, _ = step(carry, x)  # which does not overwrite what was unpacked
        again, _ = step(step.pack(*out), x)
        assert_equal(step.unpack(carry), step.unpack(again))
        outs.append(out)
        if layout == "one device":
            assert step._compiled._cache_size() == 1  # pyright: ignore
    if "pack_below" in options:  # which may change the rounding
        assert_trees_close(*outs, tolerance=1e-6)
    else:
        assert_equal(*outs)
    assert hosted(outs[1][1]) == {"m2"}


#
# In the middle of a run
#


@feature
@pytest.mark.parametrize("name", ("float32", "compact"))
def test_moving_in_the_middle_of_a_run(name: str):
    plain = AdEMAMix(1e-2, state_format=FORMATS[name])
    params = on_device(make_params())
    params, state = run(plain, params, init(plain, params), 2)
    there = change_state_format(state, Offloaded(plain), params)
    back = change_state_format(there, plain, params)
    assert hosted(there) == {"m2"} and hosted(back) == set()
    assert_equal(there, state)
    assert_equal(back, state)
    with pytest.raises(
        ValueError, match=r"^state\.m2\['a'\]\S* is not in `pinned_host`"
    ):
        update(Offloaded(plain), params, state, params)
    found = run(Offloaded(plain), params, there, 3)
    assert_equal(found, run(plain, params, back, 3))


@feature
def test_moving_to_another_format():
    params = on_device(make_params())
    compact = Offloaded(AdEMAMix(1e-2, state_format=COMPACT))
    state = init(Offloaded(AdEMAMix(1e-2)), params)
    assert hosted(change_state_format(state, compact, params)) == {"m2"}
    state = init(compact, params)
    offloaded = Offloaded(AdEMAMix(1e-2), ("m1",))
    assert hosted(change_state_format(state, offloaded, params)) == {"m1"}


@feature
@pytest.mark.parametrize("layout", ("one device", "Auto"))
def test_with_the_tools_of_jax(layout: str):
    """What the docs show for a state that has no room for a copy."""
    plain = AdEMAMix(1e-2)
    params = placed(make_params(), layout)
    state = init(plain, params)
    there = jax.device_put(state.m2, jax.memory.Space.Host)
    state = eqx.tree_at(lambda s: s.m2, state, there)
    _, state = jax.jit(Offloaded(plain).update)(params, state, params)
    assert hosted(state) == {"m2"}
    _, state = jax.jit(plain.update)(params, state, params)  # which leaves it there
    assert hosted(state) == {"m2"}


@feature
def test_a_checkpoint(tmp_path: Any):
    """Equinox reads arrays into device memory. A template says where they
    were."""
    optim = Offloaded(AdEMAMix(1e-2))
    params = on_device(make_params())
    params, state = run(optim, params, init(optim, params), 2)
    eqx.tree_serialise_leaves(tmp_path / "state", state)
    like = init(optim, params)
    found = eqx.tree_deserialise_leaves(tmp_path / "state", like)
    assert hosted(found) == set()
    assert hosted(change_state_format(found, optim, params)) == {"m2"}
    found = jax.device_put(found, jax.tree.map(lambda x: x.sharding, like))
    assert hosted(found) == {"m2"}
    assert_equal(run(optim, params, found, 2), run(optim, params, state, 2))


@feature
def test_a_carry_from_a_state_without_it():
    params = on_device(make_params())
    step = make_step(loss_fn, Offloaded(AdEMAMix(1e-2)))
    carry = step.pack(params, init(AdEMAMix(1e-2), params))
    with pytest.raises(ValueError, match=r"^state\.m2\['a'\] is not in `pinned_host`"):
        step(carry, 1.0)


@feature
def test_conversions():
    params = on_device(make_params())
    optim: Any = Offloaded(AdEMAMix(1e-3, state_format=COMPACT), ("m1", "m2"))
    adam, theirs = optax.adam(1e-3), optax.contrib.ademamix(1e-3)
    assert hosted(eqx_ademamix.from_adamw(adam.init(params), optim, params)) == {
        "m1",
        "m2",
    }
    state = eqx_ademamix.from_optax(theirs.init(params), optim, params)
    assert hosted(state) == {"m1", "m2"}
    assert not any(in_host(eqx_ademamix.to_adamw(state)))
    assert not any(in_host(eqx_ademamix.to_optax(state)))
    no_m1 = Offloaded(AdEMAMix(1e-3, b1=0.0))
    assert not any(in_host(eqx_ademamix.to_optax(init(no_m1, params))))
    wrapped = optax.chain(optax.clip_by_global_norm(1.0), optim)
    state = eqx_ademamix.from_adamw(adam.init(params), wrapped, params)
    assert hosted(state[1]) == {"m1", "m2"}


#
# Reading a state
#


@feature
def test_the_report():
    params = {"bias": jnp.zeros(256), "weight": jnp.zeros((64, 256))}
    fmt = StateFormat.compact()
    optim = Offloaded(AdEMAMix(1e-3, state_format=fmt))
    state = init(optim, params)
    assert eqx_ademamix.state_bytes(state) == 69_384
    lines = eqx_ademamix.state_report(state).splitlines()
    assert lines[0] == (
        "The state takes 69,384 bytes, 4.17 per parameter, 34,048 of them in "
        "host memory."
    )
    assert (
        lines[3].split()
        == "['bias'] (256,) float32 float32 (host) float32 12.00".split()
    )
    assert "ScaledFloat8  ScaledFloat16 (host)  ScaledFloat8" in lines[4]


@feature
def test_reading_a_state():
    params = on_device(make_params())
    optim = Offloaded(AdEMAMix(1e-3, state_format=COMPACT))
    state = init(optim, params)
    assert not any(in_host(eqx_ademamix.decoded(state)))
    assert eqx_ademamix.hyperparams(optim, state).learning_rate == np.float32(1e-3)
    dense = init(Offloaded(AdEMAMix(1e-3)), params)
    assert eqx_ademamix.decoded(dense).m2["a"] is dense.m2["a"]


#
# Where it cannot work
#


def test_an_older_jax(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 1))
    optim, params = Offloaded(AdEMAMix(1e-3)), jnp.ones(3)
    with pytest.raises(ValueError, match=TOO_OLD):
        init(optim, params)
    with pytest.raises(ValueError, match=TOO_OLD):
        jax.jit(optim.init)(params)
    with pytest.raises(ValueError, match=TOO_OLD):
        update(optim, params, init(AdEMAMix(1e-3), params))


class OtherDevice:
    """A device without the memory of a host."""

    def addressable_memories(self) -> list[Any]:
        class Memory:
            kind = "device"

        return [Memory()]

    def __repr__(self) -> str:
        return "other:0"


@feature
def test_a_device_without_such_memory(monkeypatch: pytest.MonkeyPatch):
    from eqx_ademamix import _memory

    monkeypatch.setattr(_memory, "_device_of", lambda arrays: OtherDevice())
    match = "needs `pinned_host` memory, but the device other:0 has only device"
    with pytest.raises(ValueError, match=match):
        init(Offloaded(AdEMAMix(1e-3)), jnp.ones(3))


def test_it_can_be_a_static_argument():
    a, b = (Offloaded(AdEMAMix(1e-3)) for _ in range(2))
    assert a == b and hash(a) == hash(b)
    assert a != Offloaded(AdEMAMix(1e-3), ("nu",))
