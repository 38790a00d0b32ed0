"""Learning rates by layer: `path_scales`, the report, and prefix trees of scales."""

import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import pytest

import eqx_ademamix
from eqx_ademamix import (
    AdEMAMix,
    SimplifiedAdEMAMix,
    learning_rate_report,
    path_scales,
)
from eqx_ademamix._learning_rate_scale import as_scales, checked_scales
from eqx_ademamix._paths import flatten

from .helpers import count_traces, make_mlp, make_zoo, tree_type, x64


def scales_of(model: Any, rules: Any) -> dict[str, Any]:
    """The scales by path. Checks that there is one at each inexact array."""
    scales = path_scales(model, rules)
    is_none = lambda x: x is None
    whole = jtu.tree_flatten_with_path(model, is_leaf=is_none)
    found = jtu.tree_flatten_with_path(scales, is_leaf=is_none)
    assert found[1] == whole[1]
    pairs = list(zip(found[0], whole[0], strict=True))
    assert all((s is not None) == eqx.is_inexact_array(x) for (_, s), (_, x) in pairs)
    return {jtu.keystr(path): s for (path, s), _ in pairs if s is not None}


def resolved(scales: Any, model: Any) -> list[Any]:
    arrays = flatten(eqx.filter(model, eqx.is_inexact_array))
    return as_scales(checked_scales(scales), arrays, "learning_rate_scale")


MODEL = make_mlp()
STACK = eqx.filter_vmap(lambda key: eqx.nn.Linear(3, 3, key=key))(
    jax.random.split(jax.random.key(0), 4)
)

#
# `path_scales`
#


def test_the_first_match_wins():
    rules = {r"layers\[0\]": 0.25, "bias": 2, "layers": 0.5}
    assert scales_of(MODEL, rules) == {
        ".layers[0].weight": 0.25,
        ".layers[0].bias": 0.25,
        ".layers[1].weight": 0.5,
        ".layers[1].bias": 2.0,
        ".layers[2].weight": 0.5,
        ".layers[2].bias": 2.0,
    }
    # A rule that never comes first is legal.
    found = scales_of(MODEL, [("layers", 0.5), (re.compile(r"\[0\]"), 3.0)])
    assert set(found.values()) == {0.5}


def test_one_elsewhere():
    found = scales_of(MODEL, {r"\[2\]\.weight$": 0.5})
    assert {path for path, scale in found.items() if scale != 1.0} == {
        ".layers[2].weight"
    }
    assert set(scales_of(MODEL, {}).values()) == {1.0}


def test_a_path_begins_with_or_without_its_dot():
    for pattern in (r"^layers\[0\]\.bias", r"^\.layers\[0\]\.bias"):
        assert scales_of(MODEL, {pattern: 0.5})[".layers[0].bias"] == 0.5


def test_types(getkey: Any):
    found = scales_of(make_zoo(getkey()), {eqx.nn.Linear: 0.5, eqx.nn.MLP: 0.1})
    assert {path for path, scale in found.items() if scale == 0.5} == {
        f".mlp.layers[{i}].{name}" for i in (0, 1) for name in ("weight", "bias")
    }
    assert 0.1 not in found.values()
    found = scales_of(make_zoo(getkey()), {eqx.nn.MLP: 0.1, eqx.nn.Linear: 0.5})
    assert list(found.values()).count(0.1) == 4 and 0.5 not in found.values()
    # An outer module counts, and so does the root.
    assert set(scales_of(MODEL, {eqx.nn.MLP: 0.5}).values()) == {0.5}
    assert set(scales_of({"a": [MODEL]}, {eqx.Module: 0.5}).values()) == {0.5}


def test_types_and_patterns_together():
    model = [eqx.nn.Embedding(5, 3, key=jax.random.key(0)), *MODEL.layers]
    found = scales_of(model, {r"\[1\]\.bias": 4.0, eqx.nn.Embedding: 0.125})
    assert found.pop("[0].weight") == 0.125 and found.pop("[1].bias") == 4.0
    assert set(found.values()) == {1.0}


NUMBERS = (1, 0.5, np.float32(0.5), np.float64(0.5), np.int8(2), 0, -1.0)


@pytest.mark.parametrize("number", NUMBERS)
def test_numbers_become_floats(number: Any):
    found = scales_of(MODEL, {"bias": number})
    assert all(type(x) is float for x in found.values())
    assert found[".layers[0].bias"] == number
    checked = checked_scales({"a": number, "b": None})
    assert type(checked["a"]) is float and checked == {"a": number, "b": None}


ARRAYS = (
    jnp.asarray([1, 2, 3, 4]),
    np.asarray([1.0, 2.0, 3.0, 4.0]),
    np.asarray([1, 2, 3, 4], np.int8),
    jnp.asarray([1.0, 2.0, 3.0, 4.0], jnp.bfloat16),
)


@pytest.mark.parametrize("array", ARRAYS)
def test_arrays_become_float_arrays(array: Any):
    found = scales_of({"stack": STACK, "head": MODEL}, {"stack": array})
    scale = found["['stack'].weight"]
    assert isinstance(scale, jax.Array) and scale.dtype == jnp.float32
    assert not scale.weak_type and scale.tolist() == [1, 2, 3, 4]
    assert found["['head'].layers[0].weight"] == 1.0
    with x64():
        scale = checked_scales(array)
        assert scale.dtype == jnp.float64 and scale.tolist() == [1, 2, 3, 4]


def test_shapes_are_enough(getkey: Any):
    shapes = eqx.filter_eval_shape(make_zoo, getkey())
    scales = path_scales(shapes, {"mlp": 0.5, eqx.nn.Conv: 0.25})
    expected = path_scales(make_zoo(getkey()), {"mlp": 0.5, eqx.nn.Conv: 0.25})
    assert jtu.tree_leaves(scales) == jtu.tree_leaves(expected)
    assert learning_rate_report(shapes, scales).startswith(
        "The learning rate is scaled at 6 of 12"
    )


def test_a_model_that_is_one_array():
    assert path_scales(jnp.ones(3), {"": 0.5}) == 0.5
    assert path_scales(jnp.ones(3), {}) == 1.0
    assert path_scales(jnp.ones(3, int), {}) is None


def test_scales_that_are_traced():
    def two_scales(scale: Any) -> Any:
        scales = path_scales(MODEL, {"weight": scale, r"\[0\]": 0.5})
        assert "traced" in learning_rate_report(MODEL, scales)
        return scales.layers[0].weight, scales.layers[0].bias

    counted, traces = count_traces(two_scales)
    jitted = eqx.filter_jit(counted)
    for value in (0.5, np.inf, 0.125):
        assert jitted(jnp.asarray(value)) == (value, 0.5)
    assert len(traces) == 1


#
# Prefix trees
#


def test_a_number_for_all():
    assert resolved(0.5, MODEL) == [
        None if x is None else 0.5 for x in flatten(MODEL_ARRAYS).values
    ]


MODEL_ARRAYS = eqx.filter(MODEL, eqx.is_inexact_array)
WHOLE = path_scales(MODEL, {r"\[0\]": 0.25, r"\[1\]": 0.5})
PREFIXES = (
    ("whole model", WHOLE),
    ("everything", jax.tree.map(lambda x: x, WHOLE, is_leaf=lambda x: x is None)),
    ("filtered model", path_scales(MODEL_ARRAYS, {r"\[0\]": 0.25, r"\[1\]": 0.5})),
    ("a number for a layer", eqx.tree_at(lambda m: m.layers, WHOLE, (0.25, 0.5, 1))),
    (
        "numbers where there are no arrays",
        jax.tree.map(
            lambda x: 7.0 if x is None else x, WHOLE, is_leaf=lambda x: x is None
        ),
    ),
    (
        "modules of numbers and a number",
        eqx.tree_at(lambda m: m.layers[1], WHOLE, np.float32(0.5)),
    ),
)


@pytest.mark.parametrize("spec", [x for _, x in PREFIXES], ids=[x for x, _ in PREFIXES])
def test_prefix_trees(spec: Any):
    found = [x for x in resolved(spec, MODEL) if x is not None]
    assert found == [0.25, 0.25, 0.5, 0.5, 1.0, 1.0]
    assert all(type(x) is float for x in found)


def test_prefix_trees_of_dicts():
    model = {"a": {"x": jnp.ones(2), "y": [jnp.ones(3), None]}, "b": jnp.ones(4)}
    assert resolved({"a": 2, "b": 3}, model) == [2.0, 2.0, None, 3.0]
    spec = {"a": {"x": 2, "y": [5, None]}, "b": 3}
    assert resolved(spec, model) == [2.0, 5.0, None, 3.0]
    spec = {"a": {"x": 2, "y": 5}, "b": 3}
    assert resolved(spec, model) == [2.0, 5.0, None, 3.0]


def test_an_array_for_a_subtree():
    by_layer = np.asarray([1.0, 0.5, 0.25, 0.125])
    model = {"stack": STACK, "x": jnp.ones(2)}
    weight, bias, other = resolved({"stack": by_layer, "x": 0.5}, model)
    assert weight.tolist() == bias.tolist() == by_layer.tolist() and other == 0.5
    whole = np.arange(9.0).reshape(3, 3)
    [scale] = resolved(whole, jnp.ones((3, 3, 2)))
    np.testing.assert_array_equal(scale, whole)


def test_masks_and_scales_agree_on_prefixes():
    """A tree that is legal as a mask is legal with numbers, and the other way round."""
    from eqx_ademamix._filters import as_bools

    arrays = flatten(MODEL_ARRAYS)
    for _, spec in PREFIXES:
        mask = jax.tree.map(lambda x: x == 0.25, spec)
        flags = as_bools(mask, arrays, "mask")
        assert flags == [x == 0.25 for x in resolved(spec, MODEL)]


@pytest.mark.parametrize(
    "value", (np.nan, np.inf, 1e39, jnp.asarray(np.nan), jnp.asarray([1.0, np.inf]))
)
def test_infinite_scales(value: Any):
    text = r"`learning_rate_scale\['a'\]` is .* finite number"
    with pytest.raises(ValueError, match=text):
        checked_scales({"a": value})
    traced = jnp.full(np.shape(value), np.nan)  # is not checked
    assert jax.jit(checked_scales)(traced).shape == np.shape(value)


#
# The report
#


def test_report():
    model = {"head": make_mlp(), "stack": STACK, "n": 3, "f": jnp.tanh}
    model["z"] = jnp.ones((5, 2))
    rules = {
        "stack": jnp.asarray([0.512, 0.64, 0.8, 1.0]),
        "z": jnp.arange(5) / 10,
        "bias": 1e-3,
        r"\[2\]": 1,
    }
    scales = path_scales(model, rules)
    assert learning_rate_report(model, scales) == (
        "The learning rate is scaled at 6 of 9 arrays, 68 of 104 parameters.\n"
        "\n"
        "  ['head'].layers[0].weight  (4, 3)     1\n"
        "  ['head'].layers[0].bias    (4,)       0.001\n"
        "  ['head'].layers[1].weight  (4, 4)     1\n"
        "  ['head'].layers[1].bias    (4,)       0.001\n"
        "  ['head'].layers[2].weight  (2, 4)     1\n"
        "  ['head'].layers[2].bias    (2,)       0.001\n"
        "  ['stack'].weight           (4, 3, 3)  0.512, 0.64, 0.8, 1\n"
        "  ['stack'].bias             (4, 3)     0.512, 0.64, 0.8, 1\n"
        "  ['z']                      (5, 2)     0 to 0.4"
    )


def test_report_of_any_prefix():
    assert learning_rate_report(MODEL, 1).startswith(
        "The learning rate is scaled at 0 of 6 arrays, 0 of 46 parameters.\n\n"
    )
    report = learning_rate_report(jnp.ones((5, 2)), np.full(5, 0.5))
    assert report.endswith("\n\n  (the tree itself)  (5, 2)  0.5")
    assert learning_rate_report({"n": 3}, 1.0) == (
        "The learning rate is scaled at 0 of 0 arrays, 0 of 0 parameters.\n"
    )


def test_report_of_a_traced_scale():
    @jax.jit
    def show(scale: Any) -> Any:
        report = learning_rate_report({"w": jnp.ones((2, 3))}, {"w": scale})
        assert report.splitlines() == [
            "The learning rate is scaled at 1 of 1 arrays, 6 of 6 parameters.",
            "",
            "  ['w']  (2, 3)  traced",
        ]
        return scale

    show(jnp.asarray(1.0))
    show(jnp.ones(2))


#
# In an optimizer
#

CONFIGS = (
    (AdEMAMix, dict(b3=0.99, alpha=2.0)),
    (AdEMAMix, dict(b3=0.99, weight_decay=0.1, weight_decay_mask=lambda x: x.ndim > 1)),
    (SimplifiedAdEMAMix, dict(weight_decay=0.1)),
    (SimplifiedAdEMAMix, dict(normalize=True)),
)
IDS = ("AdEMAMix", "AdEMAMix with decay", "Simplified with decay", "normalized")
optimizers = pytest.mark.parametrize("cls,kwargs", CONFIGS, ids=IDS)


def grads_of(model: Any, step: int) -> Any:
    """Arbitrary gradients, equal for equal models and steps."""
    arrays = eqx.filter(model, eqx.is_inexact_array)
    return jax.tree.map(lambda x: jnp.cos(x * (step + 1)), arrays)


def run(optim: Any, model: Any, steps: int = 3) -> list[tuple[Any, Any]]:
    """The updates and the states of some steps. The model does not change."""
    state, out = eqx_ademamix.init(optim, model), []
    update = eqx.filter_jit(eqx_ademamix.update)
    for step in range(steps):
        updates, state = update(optim, grads_of(model, step), state, model)
        out.append((updates, state))
    return out


@optimizers
def test_a_scaled_leaf_is_a_run_at_that_learning_rate(cls: Any, kwargs: Any):
    scales = path_scales(MODEL, {r"\[0\]": 0.25, "bias": -0.1, r"\[1\]": 0.0})
    found = run(cls(1e-2, learning_rate_scale=scales, **kwargs), MODEL)
    alone = {s: run(cls(1e-2 * s, **kwargs), MODEL) for s in (0.25, -0.1, 0.0, 1.0)}
    for step, (updates, state) in enumerate(found):
        pairs = zip(*map(jtu.tree_leaves, (updates, scales)), strict=True)
        for i, (u, scale) in enumerate(pairs):
            expected = jtu.tree_leaves(alone[scale][step][0])[i]
            np.testing.assert_allclose(u, expected, rtol=3e-7)
        # The moments do not depend on the learning rate.
        assert eqx.tree_equal(state, alone[1.0][step][1])


@optimizers
def test_powers_of_two_are_exact(cls: Any, kwargs: Any):
    scales = path_scales(MODEL, {"weight": 0.25, "bias": 2.0})
    [*_, (scaled, _)] = run(cls(1e-2, learning_rate_scale=scales, **kwargs), MODEL)
    [*_, (plain, _)] = run(cls(1e-2, **kwargs), MODEL)
    expected = jax.tree.map(lambda u, s: u * s, plain, scales)
    assert eqx.tree_equal(scaled, expected)


@optimizers
@pytest.mark.parametrize("one", (1, np.float32(1), {"a": 1.0, "b": [1.0, None]}))
def test_a_scale_of_one_changes_nothing(cls: Any, kwargs: Any, one: Any):
    model = {"a": jnp.arange(3.0), "b": [jnp.ones((2, 2)), 3]}
    plain = run(cls(1e-2, **kwargs), model)
    assert eqx.tree_equal(
        run(cls(1e-2, learning_rate_scale=one, **kwargs), model), plain
    )


@optimizers
def test_stacked_layers_are_single_layers(cls: Any, kwargs: Any):
    """An array of scales on a stack gives what a number gives on each of its layers."""
    by_layer = np.asarray([1.0, 0.5, 0.25, -2.0])
    model = {"stack": {"weight": STACK.weight}, "x": jnp.ones(2)}
    scales = {"stack": by_layer, "x": 1.0}
    found = run(cls(1e-2, learning_rate_scale=scales, **kwargs), model)
    plain = run(cls(1e-2, **kwargs), model)
    for (scaled, _), (updates, _) in zip(found, plain, strict=True):
        weight = np.asarray(updates["stack"]["weight"])
        expected = weight * by_layer.astype(np.float32)[:, None, None]
        np.testing.assert_array_equal(scaled["stack"]["weight"], expected)
        np.testing.assert_array_equal(scaled["x"], updates["x"])


def test_an_array_as_large_as_the_leaf():
    scales = np.asarray([[1.0, 0.5], [0.25, 0.0]])
    params = jnp.ones((2, 2))
    [(scaled, _)] = run(AdEMAMix(0.5, learning_rate_scale=scales), params, 1)
    [(plain, _)] = run(AdEMAMix(0.5), params, 1)
    np.testing.assert_array_equal(scaled, plain * scales.astype(np.float32))


@pytest.mark.parametrize("cls", (AdEMAMix, SimplifiedAdEMAMix))
def test_weight_decay_is_scaled(cls: Any):
    """With zero gradients, only weight decay changes a parameter."""
    params = {"a": jnp.asarray([1.0, -2.0]), "b": jnp.asarray([4.0])}
    optim = cls(0.5, weight_decay=0.25, learning_rate_scale={"a": 0.5, "b": 1.0})
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = eqx_ademamix.update(
        optim, zeros, eqx_ademamix.init(optim, params), params
    )
    assert updates["a"].tolist() == [-0.0625, 0.125] and updates["b"].tolist() == [-0.5]


@pytest.mark.parametrize("cls", (AdEMAMix, SimplifiedAdEMAMix))
def test_decoupled_weight_decay_is_not_scaled(cls: Any):
    params = {"a": jnp.asarray([1.0, -2.0]), "b": jnp.asarray([4.0])}
    optim = cls(
        0.5,
        weight_decay=0.25,
        decoupled_weight_decay=True,
        learning_rate_scale={"a": 0.5, "b": np.zeros(1)},
    )
    zeros = jax.tree.map(jnp.zeros_like, params)
    state = eqx_ademamix.init(optim, params)
    updates, _ = eqx_ademamix.update(optim, zeros, state, params)
    assert updates["a"].tolist() == [-0.25, 0.5] and updates["b"].tolist() == [-1.0]


def test_traced_scales_do_not_retrace():
    counted, traces = count_traces(eqx_ademamix.update)
    step = eqx.filter_jit(counted)
    state = eqx_ademamix.init(AdEMAMix(1e-2), MODEL)
    grads = grads_of(MODEL, 0)
    [(plain, _)] = run(AdEMAMix(1e-2), MODEL, 1)
    for value in (0.5, 0.25, 2.0):
        scales = path_scales(MODEL, {"weight": jnp.asarray(value)})
        updates, _ = step(
            AdEMAMix(1e-2, learning_rate_scale=scales), grads, state, MODEL
        )
        expected = plain.layers[1].weight * value
        np.testing.assert_allclose(updates.layers[1].weight, expected, rtol=3e-7)
        bias = plain.layers[1].bias
        np.testing.assert_allclose(updates.layers[1].bias, bias, rtol=3e-7)
    assert len(traces) == 1
    for value in (0.5, 0.25, 0.5):  # Python numbers are static
        scales = path_scales(MODEL, {"weight": value})
        step(AdEMAMix(1e-2, learning_rate_scale=scales), grads, state, MODEL)
    assert len(traces) == 3


def test_scales_made_under_jit():
    """The argument of plain `jax.jit` reaches the optimizer as a traced value."""

    @jax.jit
    def step(scale: Any, grads: Any) -> Any:
        optim = AdEMAMix(0.5, learning_rate_scale={"a": scale, "b": 1})
        return optim.update(grads, optim.init(grads))[0]

    grads = {"a": jnp.ones((2, 3)), "b": jnp.ones(2)}
    once, halved = step(jnp.asarray(1.0), grads), step(jnp.asarray(0.5), grads)
    np.testing.assert_array_equal(halved["a"], once["a"] * 0.5)
    np.testing.assert_array_equal(halved["b"], once["b"])
    rows = step(jnp.asarray([1.0, 0.5]), grads)
    np.testing.assert_array_equal(rows["a"][0], once["a"][0])
    np.testing.assert_array_equal(rows["a"][1], halved["a"][1])


def test_a_sweep_over_a_scale():
    grads = grads_of(MODEL, 0)

    def step(scale: Any) -> Any:
        scales = path_scales(MODEL, {"weight": scale})
        optim = AdEMAMix(1e-2, learning_rate_scale=scales)
        return optim.update(grads, optim.init(MODEL), MODEL)[0]

    values = jnp.asarray([0.25, 1.0, 4.0])
    swept = eqx.filter_vmap(step)(values)
    for i, value in enumerate(values):
        alone = step(value)
        for a, b in zip(*map(jtu.tree_leaves, (swept, alone)), strict=True):
            np.testing.assert_array_equal(a[i], b)

    # The optimizers themselves can be a batch, too.
    make = lambda scale: AdEMAMix(1e-2, learning_rate_scale={"w": scale})
    optims = eqx.filter_vmap(make)(values)
    assert optims.learning_rate_scale["w"].shape == (3,)
    params = {"w": jnp.ones((2, 2))}
    over = eqx.filter_vmap(
        lambda optim: optim.update(params, optim.init(params))[0],
        in_axes=(eqx.if_array(0),),
    )
    updates = over(optims)["w"]
    np.testing.assert_array_equal(updates[2], updates[1] * 4)


@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float16, jnp.complex64))
@pytest.mark.parametrize("scale", (0.5, np.asarray([0.5, 0.25])))
def test_dtypes_do_not_change(dtype: Any, scale: Any):
    params = jnp.ones((2, 3), dtype)
    optim = AdEMAMix(0.5, weight_decay=0.5, learning_rate_scale=scale)
    state = eqx_ademamix.init(optim, params)
    updates, new = eqx_ademamix.update(optim, params, state, params)
    assert updates.dtype == dtype and tree_type(new) == tree_type(state)
    plain, _ = eqx_ademamix.update(
        AdEMAMix(0.5, weight_decay=0.5), params, state, params
    )
    np.testing.assert_array_equal(updates[0], plain[0] * jnp.asarray(0.5, dtype))


def test_frozen_leaves_need_no_scale():
    nothing = jax.tree.map(lambda _: False, MODEL)
    head = eqx.tree_at(lambda m: m.layers[2], nothing, True)
    scales = eqx.tree_at(
        lambda m: m.layers, WHOLE, (None, None, 0.5), is_leaf=lambda x: x is None
    )
    optim = AdEMAMix(1e-2, trainable=head, learning_rate_scale=scales)
    [(updates, _)] = run(optim, MODEL, 1)
    [(plain, _)] = run(AdEMAMix(1e-2), MODEL, 1)
    assert updates.layers[0].weight is None
    half = plain.layers[2].weight * 0.5
    np.testing.assert_array_equal(updates.layers[2].weight, half)


def test_scales_inside_optax(standard_promotion: Any):
    """In `optax.chain`, and as an argument that `inject_hyperparams` leaves alone."""
    scales = {"a": 0.5, "b": jnp.asarray([1.0, 0.25])}
    params = {"a": jnp.ones(3), "b": jnp.ones((2, 2))}
    optim: Any = AdEMAMix(0.5, learning_rate_scale=scales)
    [(expected, _)] = run(optim, params, 1)
    trees_and_flags = (
        "weight_decay_mask",
        "trainable",
        "state_format",
        "learning_rate_scale",
        "bias_correct_m2",
        "decoupled_weight_decay",
    )
    cls: Any = AdEMAMix
    injected = optax.inject_hyperparams(cls, static_args=trees_and_flags)
    for other in (
        optax.chain(optim, optax.identity()),
        injected(0.5, learning_rate_scale=scales),
    ):
        updates, _ = other.update(grads_of(params, 0), other.init(params), params)
        assert eqx.tree_equal(updates, expected, rtol=1e-6)


@pytest.mark.parametrize(
    "scales,text",
    (
        ([1.0], "^learning_rate_scale is a list of length 1, but the parameters have"),
        (
            np.ones(5),
            r"^`learning_rate_scale` has shape \(5,\) at \.layers\[0\]\.weight",
        ),
        (None, r"^`learning_rate_scale\.layers\[0\]\.weight` is None, but a scale"),
    ),
)
def test_scales_that_do_not_fit(scales: Any, text: str):
    for optim in (AdEMAMix(1, learning_rate_scale=scales),
                  SimplifiedAdEMAMix(1, learning_rate_scale=scales)):  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=text):
            eqx_ademamix.init(optim, MODEL)
    state = eqx_ademamix.init(AdEMAMix(1), MODEL)
    with pytest.raises((ValueError, TypeError), match=text):
        AdEMAMix(1, learning_rate_scale=scales).update(grads_of(MODEL, 0), state)


@pytest.mark.parametrize("cls", (AdEMAMix, SimplifiedAdEMAMix))
def test_scales_are_checked_when_the_optimizer_is_made(cls: Any):
    with pytest.raises(TypeError, match=r"`learning_rate_scale\['a'\]` is the bool"):
        cls(1e-3, learning_rate_scale={"a": True})
    with pytest.raises(ValueError, match=r"`learning_rate_scale\['a'\]` is nan, but"):
        cls(1e-3, learning_rate_scale={"a": np.nan})
    optim = cls(1e-3, learning_rate_scale={"a": np.float32(0.5), "b": None, "c": 0})
    assert optim.learning_rate_scale == {"a": 0.5, "b": None, "c": 0.0}
    assert hash(optim) == hash(cls(1e-3, learning_rate_scale=optim.learning_rate_scale))
