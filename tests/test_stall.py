"""`stall_report`: what a format freezes, predicted and measured."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import eqx_ademamix
from eqx_ademamix import AdEMAMix, AdEMAMixState, ScaledFloat16, StateFormat, _stall
from eqx_ademamix._stall import FROZEN, expected_m2_stall
from eqx_ademamix._storage.codec import AbstractCodec, Dense

from .helpers import (
    COMPACT,
    HAS_HOST_MEMORY,
    count_traces,
    everywhere,
    x64,
)


SCALED8 = eqx_ademamix.ScaledFloat8()
BFLOAT16 = StateFormat("bfloat16", "bfloat16", "bfloat16")


def with_m2(codec: Any) -> StateFormat:
    return StateFormat("float32", codec, "float32", min_size=0)


def normal(seed: int, shape: tuple[int, ...] = (64, 64)) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


#
# Predicted and measured
#


def gradient(key: jax.Array) -> jax.Array:
    """Gradients whose scales are log-normal, and whose mean is 0.05 of their noise, as
    in the experiment of `docs/precision.md`."""
    return jnp.exp(normal(100)) * (0.05 + jax.random.normal(key, (64, 64), jnp.float32))


@eqx.filter_jit
def settled(optim: Any) -> Any:
    """The state after 2000 steps that began with settled averages, so that what the
    format does to them has had time to show."""
    b3 = optim.b3
    scale, spread = jnp.exp(normal(100)), jnp.sqrt((1 - b3) / (1 + b3))
    m2 = scale * (0.05 + spread * normal(101))
    start = eqx_ademamix.init(AdEMAMix(1.0, b3=b3), m2)
    start = AdEMAMixState(start.count, start.count_m2, start.m1, m2, scale**2)
    state = eqx_ademamix.change_state_format(start, optim, m2)

    def step(state: Any, key: jax.Array) -> tuple[Any, None]:
        return eqx_ademamix.update(optim, gradient(key), state)[1], None

    return jax.lax.scan(step, state, jax.random.split(jax.random.key(1), 2000))[0]


@eqx.filter_jit
def measured(optim: Any, state: Any, grads: jax.Array, trials: int) -> Any:
    """The fraction of each moment whose decoded value is the same as before in the mean
    of so many steps, each with the same gradient and another random rounding."""
    before = eqx_ademamix.decoded(state).moments

    def changes(after: Any) -> list[jax.Array]:
        pairs = zip(eqx_ademamix.decoded(after).moments, before, strict=True)
        return [x.astype(float) - y.astype(float) for x, y in pairs]

    def trial(carry: Any, i: jax.Array) -> Any:
        total, last = carry
        # One trial late. In the program that stores `last`, XLA may leave out a
        # conversion to bfloat16 and back.
        total = jax.tree.map(jnp.add, total, changes(last))
        other = eqx.tree_at(lambda s: s.count, state, state.count + i)
        return (total, eqx_ademamix.update(optim, grads, other)[1]), None

    start = [jnp.zeros(grads.shape)] * 3, state
    (total, _), _ = jax.lax.scan(trial, start, jnp.arange(trials + 1))
    names = ("m1", "m2", "nu")
    return {name: jnp.mean(x == 0) for name, x in zip(names, total, strict=True)}


# How often rounding is tried: it never changes some entries of `ScaledFloat8` in fewer
# trials, since a step at b3 = 0.9999 is about a thousandth of the spacing of its codes.
FORMATS = {
    "bfloat16": (BFLOAT16, 1),
    "ScaledFloat16": (everywhere(StateFormat.half()), 64),
    "ScaledFloat8": (StateFormat("float32", SCALED8, SCALED8, min_size=0), 4096),
}


@pytest.mark.parametrize("b3", [0.999, 0.9999])
@pytest.mark.parametrize("name", FORMATS)
def test_prediction_is_what_is_measured(name: str, b3: float):
    fmt, trials = FORMATS[name]
    optim = AdEMAMix(1.0, b3=jnp.asarray(b3), state_format=fmt)  # compiled once
    state, grads = settled(optim), gradient(jax.random.key(2))
    (predicted,) = eqx_ademamix.stall_report(optim, state, grads).values()
    found = measured(optim, state, grads, trials)
    assert list(predicted) == ["m1", "m2", "nu"]
    for moment, fraction in predicted.items():
        assert abs(fraction - float(found[moment])) < 0.05


@pytest.mark.parametrize("b3", [0.999, 0.9999])
def test_prediction_holds_for_the_steps_that_follow(b3: float):
    """Nearest rounding, other gradients of the same scale: 100 more steps."""
    optim = AdEMAMix(1.0, b3=jnp.asarray(b3), state_format=BFLOAT16)
    state = settled(optim)

    def step(carry: Any, key: jax.Array) -> Any:
        before, after = carry
        pairs = zip(before.moments, after.moments, strict=True)
        kept = jnp.stack([jnp.mean(x == y) for x, y in pairs])
        return (after, eqx_ademamix.update(optim, gradient(key), after)[1]), kept

    keys = jax.random.split(jax.random.key(3), 101)
    _, kept = eqx.filter_jit(jax.lax.scan)(step, (state, state), keys)
    report = eqx_ademamix.stall_report(optim, state, gradient(jax.random.key(2)))
    (predicted,) = report.values()
    difference = np.asarray(kept[1:].mean(0)) - np.array(list(predicted.values()))
    assert np.abs(difference).max() < 0.05


#
# Exact values
#


def test_nearest_rounding_by_its_formula():
    """An entry stalls if `|(1 - b)(g - m)|` is less than half the spacing. Between 1
    and 2, bfloat16 has a spacing of 1/128."""
    optim = AdEMAMix(1.0, b1=0.5, b2=0.75, b3=0.875, state_format=BFLOAT16)
    one = jnp.ones(4, jnp.bfloat16)
    zero = jnp.zeros((), jnp.int32)
    state = AdEMAMixState(zero, zero, one, one, one)
    # In units of 1/256, half a spacing: the changes of m1, m2 and nu are, of a gradient
    # 1 + x / 256, x / 2, x / 8 and about 2 x / 4.
    grads = 1 + jnp.array([0.0, 1.9, 7.0, 9.0]) / 256
    report = eqx_ademamix.stall_report(optim, state, grads)
    expected = {"m1": 0.5, "m2": 0.75, "nu": 0.5}
    assert report == {"(the tree itself)": expected}


def test_a_constant_gradient_stalls_far_from_itself():
    """A bfloat16 `m2` that starts at 0 stops where a step of 1e-4 of the gradient is
    less than half the spacing: before 1/19 of the gradient, 1e-4 * 512."""
    optim = AdEMAMix(1.0, b3=0.9999, state_format=with_m2("bfloat16"))
    grads = jnp.exp(normal(0))
    step = jax.jit(lambda state: eqx_ademamix.update(optim, grads, state)[1])
    state = jax.lax.fori_loop(
        0, 1000, lambda _, s: step(s), eqx_ademamix.init(optim, grads)
    )
    (report,) = eqx_ademamix.stall_report(optim, state, grads).values()
    assert report["m2"] == 1.0
    assert float((state.m2.astype(float) / grads).max()) < 1 / 19


@pytest.mark.parametrize("fmt", [StateFormat.float32(), COMPACT])
def test_nothing_stalls(fmt: StateFormat):
    optim = AdEMAMix(1.0, b3=0.9999, state_format=fmt)
    grads = {"w": normal(0)}
    state = eqx_ademamix.init(optim, grads)
    for _ in range(2):
        report = eqx_ademamix.stall_report(optim, state, grads)
        assert report == {"['w']": {"m1": 0.0, "m2": 0.0, "nu": 0.0}}
        _, state = eqx_ademamix.update(optim, {"w": normal(1)}, state)


def test_a_row_that_was_never_used_has_not_stalled():
    optim = AdEMAMix(1.0, state_format=BFLOAT16)
    grads = normal(0).at[:32].set(0.0)
    _, state = eqx_ademamix.update(optim, grads, eqx_ademamix.init(optim, grads))
    (unused,) = eqx_ademamix.stall_report(optim, state, grads).values()
    # From now on no row has gradients, and those that had some do not decay.
    (after,) = eqx_ademamix.stall_report(optim, state, 0 * grads).values()
    assert unused["m2"] == 0.0 and after["m2"] == 0.5


def test_a_nu_below_the_range_of_its_block_has_stalled():
    """The numbers of a block span 63 powers of two. The square of 1e-15 is stored as
    the smallest of them, and cannot decay."""
    fmt = StateFormat("float32", "float32", SCALED8, min_size=0)
    optim = AdEMAMix(1.0, b2=0.5, state_format=fmt)
    grads = jnp.ones(256).at[0].set(1.2).at[1:].set(1e-15)
    step = jax.jit(lambda state: eqx_ademamix.update(optim, grads, state)[1])
    state = eqx_ademamix.init(optim, grads)
    for _ in range(40):  # until the bound of the block has settled
        state = step(state)
    assert (step(state).nu.real[0] == state.nu.real[0])[1:].all()
    (report,) = eqx_ademamix.stall_report(optim, state, grads.at[0].set(1.3)).values()
    assert report["nu"] == 255 / 256


def test_arithmetic_can_stall_too():
    """float32 has 24 bits, so it loses a change of less than 2^-25 of a moment, also
    before a codec sees it."""
    for codec in ("float32", ScaledFloat16()):
        optim = AdEMAMix(1.0, b3=1 - 2**-30, state_format=with_m2(codec))
        grads, m2 = normal(0), 1.0 + jnp.abs(normal(1))
        state = eqx_ademamix.init(AdEMAMix(1.0), m2)
        state = eqx.tree_at(lambda s: s.m2, state, m2)
        state = eqx_ademamix.change_state_format(state, optim, m2)
        (report,) = eqx_ademamix.stall_report(optim, state, grads).values()
        assert report["m2"] == 1.0


#
# Your own codec
#


class Grid(AbstractCodec):
    """Multiples of 1/16, rounded to nearest or at random."""

    is_random: bool = eqx.field(static=True)

    def encode_real(self, value: Any, seed: Any) -> Any:
        chance = jnp.float32(0.5)
        if self.is_random and seed is not None:
            chance = jax.random.uniform(jax.random.key(seed), value.shape)
        return (jnp.floor(value * 16 + chance),)

    def decode_real(self, parts: Any) -> Any:
        return parts[0] / 16

    def for_squares(self) -> AbstractCodec:
        return Dense("float32")


@pytest.mark.parametrize("is_random", [False, True])
def test_your_own_codec(is_random: bool):
    optim = AdEMAMix(1.0, b3=0.999, state_format=with_m2(Grid(is_random)))
    grads = normal(0)
    m2 = jnp.round(16 * normal(1)) / 16
    state = eqx_ademamix.init(AdEMAMix(1.0), m2)
    state = eqx.tree_at(lambda s: s.m2, state, m2)
    state = eqx_ademamix.change_state_format(state, optim, m2)
    (report,) = eqx_ademamix.stall_report(optim, state, grads).values()
    # No change of 0.001 (g - m) is as large as 1/32. Only exact zeros lose nothing,
    # and no gradient is one.
    assert report == {"m1": 0.0, "m2": 0.0 if is_random else 1.0, "nu": 0.0}


#
# Every state
#


def bfloat16_m2(grads: Any, **options: Any) -> tuple[AdEMAMix, Any]:
    optim = AdEMAMix(1e-3, b3=0.9999, state_format=with_m2("bfloat16"), **options)
    _, state = eqx_ademamix.update(optim, grads, eqx_ademamix.init(optim, grads))
    return optim, state


def test_paths_are_those_of_the_state_report():
    model = eqx.nn.Linear(4, 4, key=jax.random.key(0))
    grads = eqx.filter(model, eqx.is_inexact_array)
    optim, state = bfloat16_m2(grads)
    report = eqx_ademamix.stall_report(optim, state, grads)
    lines = eqx_ademamix.state_report(state).splitlines()[3:]
    assert list(report) == [line.split()[0] for line in lines]
    assert next(iter(report)) == ".weight"


def test_frozen_leaves_are_left_out():
    grads = {"a": normal(0), "b": normal(1)}
    optim, state = bfloat16_m2(grads, trainable={"a": True, "b": False})
    assert list(eqx_ademamix.stall_report(optim, state, grads)) == ["['a']"]


def test_at_b1_0_there_is_no_m1():
    optim, state = bfloat16_m2(normal(0), b1=0.0)
    (report,) = eqx_ademamix.stall_report(optim, state, normal(1)).values()
    assert list(report) == ["m2", "nu"]


def test_simplified():
    optim = eqx_ademamix.SimplifiedAdEMAMix(
        1e-3, b1=0.9999, state_format=with_m2("bfloat16")
    )
    state = eqx_ademamix.init(optim, normal(0))
    state = eqx.tree_at(lambda s: s.m, state, jnp.full((64, 64), 1024, jnp.bfloat16))
    # The sum changes by g - 1e-4 * 1024, and its spacing at 1024 is 8 (below, it is 4).
    grads = jnp.full((64, 64), 3.9).at[:16].set(4.2).at[16:32].set(-2.1)
    (report,) = eqx_ademamix.stall_report(optim, state, grads).values()
    assert report == {"m": 0.5, "nu": 0.0}


def test_inside_of_other_states(standard_promotion: None):
    optim, state = bfloat16_m2(normal(0))
    expected = eqx_ademamix.stall_report(optim, state, normal(1))
    assert 0.0 < expected["(the tree itself)"]["m2"] < 1.0
    inner: Any = optim
    chain = optax.chain(optax.clip_by_global_norm(1.0), inner)
    accumulating = optax.MultiSteps(chain, 4)
    outer = eqx_ademamix.init(accumulating, normal(0))
    is_inner = lambda x: isinstance(x, AdEMAMixState)
    outer = jax.tree.map(lambda x: state if is_inner(x) else x, outer, is_leaf=is_inner)
    assert eqx_ademamix.stall_report(optim, outer, normal(1)) == expected


def test_an_injected_b3_counts(standard_promotion: None):
    options: Any = dict(b3=0.9, state_format=with_m2("bfloat16"))
    cls: Any = AdEMAMix
    make = optax.inject_hyperparams(
        cls, static_args=("state_format", "trainable", "weight_decay_mask")
    )
    optim, injected = AdEMAMix(1e-3, **options), make(1e-3, **options)
    state = eqx_ademamix.init(injected, normal(0))
    _, state = eqx_ademamix.update(injected, normal(0), state, normal(0))
    state.hyperparams["b3"] = jnp.asarray(1 - 2**-20, jnp.float32)
    (report,) = eqx_ademamix.stall_report(optim, state, normal(1)).values()
    assert report["m2"] > 0.99


def test_compensated():
    params = normal(0).astype(jnp.bfloat16)
    optim = eqx_ademamix.Compensated(
        AdEMAMix(1e-3, b3=0.9999, state_format=with_m2("bfloat16"))
    )
    state = eqx_ademamix.init(optim, params)
    _, state = eqx_ademamix.update(optim, params, state, params)
    (report,) = eqx_ademamix.stall_report(optim, state, 0 * params).values()
    assert report == {"m1": 0.0, "m2": 1.0, "nu": 0.0}


if HAS_HOST_MEMORY:

    def test_offloaded():
        optim, state = bfloat16_m2(normal(0))
        expected = eqx_ademamix.stall_report(optim, state, normal(1))
        offloaded = eqx_ademamix.Offloaded(optim, ("m2", "nu"))
        state = eqx_ademamix.change_state_format(state, offloaded, normal(0))
        assert state.m2.sharding.memory_kind == "pinned_host"
        assert eqx_ademamix.stall_report(offloaded, state, normal(1)) == expected


@pytest.mark.parametrize("codec", ["float32", "float32-codec", ScaledFloat16()])
def test_complex_parameters(codec: Any):
    """An entry stalls only if both of its parts do. Nothing of these stalls."""
    codec = Dense("float32") if codec == "float32-codec" else codec
    optim = AdEMAMix(1e-3, b3=0.9999, state_format=with_m2(codec))
    grads = jax.lax.complex(normal(0), 0 * normal(1))
    _, state = eqx_ademamix.update(optim, grads, eqx_ademamix.init(optim, grads))
    (report,) = eqx_ademamix.stall_report(optim, state, grads).values()
    assert report == {"m1": 0.0, "m2": 0.0, "nu": 0.0}


def test_float64():
    with x64():
        optim = AdEMAMix(1e-3, b3=1 - 2.0**-30)
        grads = normal(0).astype(jnp.float64)
        _, state = eqx_ademamix.update(optim, grads, eqx_ademamix.init(optim, grads))
        (report,) = eqx_ademamix.stall_report(optim, state, grads).values()
        assert report == {"m1": 0.0, "m2": 0.0, "nu": 0.0}


def test_leaves_of_every_shape():
    grads = {"scalar": jnp.ones(()), "empty": jnp.ones((0, 3)), "row": jnp.ones(5)}
    optim, state = bfloat16_m2(grads)
    report = eqx_ademamix.stall_report(
        optim, state, jax.tree.map(jnp.zeros_like, grads)
    )
    assert [row["m2"] for row in report.values()] == [0.0, 1.0, 1.0]
    empty: Any = {}
    assert (
        eqx_ademamix.stall_report(optim, eqx_ademamix.init(optim, empty), empty) == {}
    )


def test_sharded():
    mesh = Mesh(np.array(jax.devices()), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    fmt = StateFormat("bfloat16", ScaledFloat16(), SCALED8, min_size=0)
    optim = AdEMAMix(1e-3, b1=0.999, state_format=fmt)
    reports = []
    for put in (lambda x: x, lambda x: jax.device_put(x, sharding)):
        grads = put(normal(0))
        state = eqx_ademamix.init(optim, grads)
        _, state = jax.jit(optim.update)(grads, state)
        reports.append(eqx_ademamix.stall_report(optim, state, 1e-3 * grads))
    (report,) = reports[0].values()
    assert reports[0] == reports[1] and report == {"m1": 1.0, "m2": 0.0, "nu": 0.0}


def test_equal_leaves_are_traced_once(monkeypatch: pytest.MonkeyPatch):
    counted, traces = count_traces(_stall._mean)
    monkeypatch.setattr(_stall, "_mean", counted)
    grads = {str(i): normal(i, (7, 9)) for i in range(3)}
    optim, state = bfloat16_m2(grads)
    for _ in range(2):
        assert len(eqx_ademamix.stall_report(optim, state, grads)) == 3
    assert len(traces) == 2  # one for float32, and one for bfloat16


#
# Before there is a state
#


@pytest.mark.parametrize(
    ("codec", "b3", "is_frozen"),
    [
        (Dense("bfloat16"), 0.999, False),
        (Dense("bfloat16"), 0.9999, True),
        (Dense("float16"), 0.9999, False),
        (Dense("float16"), 0.99999, True),
        (Dense("float32"), 0.99999, False),
        (ScaledFloat16(), 0.99999, False),
        (eqx_ademamix.SplitBfloat16(), 0.99999, False),
        (Grid(False), 0.99, True),
    ],
    ids=str,
)
def test_expected_m2_stall(codec: AbstractCodec, b3: float, is_frozen: bool):
    assert (expected_m2_stall(codec, b3) > FROZEN) == is_frozen


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda optim: optax.masked(optim, {"a": False, "w": True}),
        lambda optim: optax.partition(
            {"ours": optim, "sgd": optax.sgd(1.0)}, {"a": "sgd", "w": "ours"}
        ),
    ],
    ids=["masked", "partition"],
)
def test_a_wrapper_that_leaves_gaps(wrapped: Any):
    optim, grads = AdEMAMix(1e-3, state_format=BFLOAT16), {"w": normal(0)}
    params = {"a": {"b": jnp.ones(3)}, **grads}
    found = eqx_ademamix.stall_report(
        optim, eqx_ademamix.init(wrapped(optim), params), params
    )
    alone = eqx_ademamix.stall_report(optim, eqx_ademamix.init(optim, grads), grads)
    assert found == alone
    with pytest.raises(ValueError, match="grads is a dict without the key 'w'"):
        state = eqx_ademamix.init(wrapped(optim), params)
        eqx_ademamix.stall_report(optim, state, {"a": params["a"]})
