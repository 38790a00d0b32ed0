"""Random rounding depends on a leaf's path, its moment and the counter, and on nothing
else: not on the other leaves, their number or their order."""

import re
import zlib
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import pytest

import eqx_ademamix
from eqx_ademamix import AdEMAMix, Compensated, SimplifiedAdEMAMix, SplitBfloat16
from eqx_ademamix._numerics import path_word, path_words, text_hash

from .helpers import COMPACT, everywhere


SPLIT = SplitBfloat16()
FORMATS = {
    "compact": COMPACT,
    "half": everywhere(eqx_ademamix.StateFormat.half()),
    "split": eqx_ademamix.StateFormat(SPLIT, SPLIT, SPLIT, min_size=0),
}
OPTIMIZERS = (AdEMAMix, SimplifiedAdEMAMix)


def draw(seed: int) -> jax.Array:
    x = np.random.default_rng(seed).normal(size=(8, 256))
    return jnp.asarray(x, jnp.float32)


PARAMS = {"a": draw(0), "b": draw(1), "c": draw(2)}


def train(optim: Any, params: Any, steps: int = 3) -> tuple[Any, Any]:
    state = eqx_ademamix.init(optim, params)
    for _ in range(steps):
        grads = jax.tree.map(jnp.sin, params)
        updates, state = eqx_ademamix.update(optim, grads, state, params)
        params = eqx.apply_updates(params, updates)
    return params, state


def of_leaf(state: Any, name: str) -> list[Any]:
    """All arrays of a state that belong to one leaf."""
    pairs = jtu.tree_leaves_with_path(state)
    return [x for path, x in pairs if f"['{name}']" in jtu.keystr(path)]


def assert_same_bits(one: Any, other: Any, name: str) -> None:
    assert np.array_equal(one[0][name], other[0][name])
    arrays = of_leaf(one[1], name), of_leaf(other[1], name)
    assert arrays[0]
    for a, b in zip(*arrays, strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("name", FORMATS)
def test_adding_a_leaf_changes_no_other(make: Any, name: str):
    optim = make(1e-2, state_format=FORMATS[name])
    full = train(optim, PARAMS)
    fewer = train(optim, {k: PARAMS[k] for k in ("b", "c")})
    alone = train(optim, {"c": PARAMS["c"]})
    assert_same_bits(full, fewer, "b")
    for other in (fewer, alone):
        assert_same_bits(full, other, "c")


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("name", FORMATS)
def test_freezing_a_leaf_changes_no_other(make: Any, name: str):
    fmt = FORMATS[name]
    full = train(make(1e-2, state_format=fmt), PARAMS)
    trainable = {"a": False, "b": True, "c": True}
    frozen = train(make(1e-2, state_format=fmt, trainable=trainable), PARAMS)
    assert frozen[1].nu["a"] is None
    for leaf in ("b", "c"):
        assert_same_bits(full, frozen, leaf)


def test_other_types_of_leaves_between_change_nothing():
    """Leaves of one type share one compiled rule. Their order plays no role."""
    optim = AdEMAMix(1e-2, state_format=COMPACT)
    mixed = {**PARAMS, "between": jnp.ones((3, 5)), "aa": jnp.ones(7)}
    plain, other = train(optim, PARAMS), train(optim, mixed)
    for leaf in PARAMS:
        assert_same_bits(plain, other, leaf)


@pytest.mark.parametrize(
    "inner", (AdEMAMix(1e-4), SimplifiedAdEMAMix(1e-6), optax.sgd(1e-4))
)
@pytest.mark.parametrize("bits", (16, 8))
def test_remainders_of_compensated(inner: Any, bits: int):
    optim = Compensated(inner, bits)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    full = train(optim, params)
    fewer = train(optim, {"c": params["c"]})
    assert_same_bits(full, fewer, "c")


def test_leaves_moments_and_steps_are_rounded_differently():
    """Equal values at different places get different codes."""
    same = {"a": PARAMS["a"], "b": PARAMS["a"]}
    fmt = FORMATS["half"]
    optim = AdEMAMix(1e-3, b1=0.9999, b3=0.9999, state_format=fmt)
    _, one = train(optim, same, steps=1)
    for tree in (one.m1, one.m2, one.nu):
        assert not np.array_equal(tree["a"].real[0], tree["b"].real[0])
    # m1 and m2 have the same values here, since b1 = b3.
    assert not np.array_equal(one.m1["a"].real[0], one.m2["a"].real[0])
    assert not np.array_equal(one.m1["a"].real[-1], one.m2["a"].real[-1])
    zero = jax.tree.map(jnp.zeros_like, same)
    _, two = eqx_ademamix.update(optim, zero, one, same)
    assert not np.array_equal(one.m1["a"].real[-1], two.m1["a"].real[-1])


def kernels(program: Any) -> list[str]:
    """The computations that XLA compiles to kernels, with names in order of use."""
    text = re.sub(r", metadata=\{.*?\}", "", program.as_text())
    found = re.findall(r"^%fused_computation\S* (.*?)^\}", text, re.S | re.M)

    def renamed(body: str) -> str:
        names: dict[str, str] = {}
        return re.sub(
            r"%[\w.\-]+", lambda m: names.setdefault(m[0], f"%{len(names)}"), body
        )

    return [renamed(re.sub(r"param_[\w.]+:", "", body)) for body in found]


@pytest.mark.parametrize("name", ("compact", "half", "compensated"))
def test_equal_leaves_share_kernels(name: str):
    """XLA on CPUs compiles equal kernels once. If seeds were numbers, each leaf would
    have kernels of its own, and many leaves would compile for minutes. Older versions
    of XLA make short arrays a part of kernels, too."""

    def distinct(count: int) -> int:
        params = {str(i): draw(i) for i in range(count)}
        if name == "compensated":
            params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
            optim = Compensated(AdEMAMix(1e-2))
        else:
            optim = AdEMAMix(1e-2, state_format=FORMATS[name])
        args = params, eqx_ademamix.init(optim, params), params
        step = jax.jit(lambda g, s, p: eqx_ademamix.update(optim, g, s, p))
        return len(set(kernels(step.lower(*args).compile())))

    assert (distinct(3) == distinct(8)) is (jax.__version_info__ >= (0, 7, 1))


@pytest.mark.parametrize("count", (0, 1, 2, 2**31 - 1))
def test_the_hash_of_a_path_is_the_same_at_any_count(count: int):
    for path in ("['w']", "['b']"):
        words = jnp.asarray(path_words(path))
        assert path_word(jnp.asarray(count, jnp.int32), words) == text_hash(path)


def test_the_hash_of_a_path_is_stable():
    """Not Python's own `hash`, which differs from process to process."""
    for text in ("", ".layers[0].weight", "['w']", "ü"):
        assert text_hash(text) == zlib.crc32(text.encode())
