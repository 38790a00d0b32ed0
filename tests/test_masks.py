"""Which leaves are trained, which leaves are decayed, and the decay report."""

import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
from jaxtyping import Array, Float

import eqx_ademamix
from eqx_ademamix import AdEMAMix, decay_mask, decay_report

from .helpers import loss_of_arrays, make_mlp, make_zoo, tree_type


def decayed(model: Any, **kwargs: Any) -> set[str]:
    mask = decay_mask(model, **kwargs)
    assert jtu.tree_structure(mask) == jtu.tree_structure(model)
    assert all(type(x) is bool for x in jtu.tree_leaves(mask))
    pairs = zip(jtu.tree_leaves_with_path(model), jtu.tree_leaves(mask), strict=True)
    return {jtu.keystr(path) for (path, _), flag in pairs if flag}


def test_the_rules(getkey: Any):
    assert decayed(make_zoo(getkey())) == {
        ".mlp.layers[0].weight",
        ".mlp.layers[1].weight",
        ".conv.weight",
        ".shared.pytree[0].weight",
    }


LAYERS = (
    (lambda key: eqx.nn.Linear(3, 4, key=key), {".weight"}),
    (lambda key: eqx.nn.Embedding(3, 4, key=key), {".weight"}),
    (lambda key: eqx.nn.Conv1d(2, 3, 3, key=key), {".weight"}),
    (lambda key: eqx.nn.Conv3d(2, 3, 3, key=key), {".weight"}),
    (lambda key: eqx.nn.ConvTranspose2d(2, 3, 3, key=key), {".weight"}),
    (lambda key: eqx.nn.LayerNorm((3, 4)), set()),
    (lambda key: eqx.nn.RMSNorm((3, 4)), set()),
    (lambda key: eqx.nn.GroupNorm(2, 4), set()),
    (lambda key: eqx.nn.GRUCell(2, 3, key=key), {".weight_ih", ".weight_hh"}),
    (lambda key: eqx.nn.LSTMCell(2, 3, key=key), {".weight_ih", ".weight_hh"}),
    (
        lambda key: eqx.nn.MultiheadAttention(
            2, 4, use_query_bias=True, use_output_bias=True, key=key
        ),
        {f".{x}_proj.weight" for x in ("query", "key", "value", "output")},
    ),
)


@pytest.mark.parametrize("make,expected", LAYERS)
def test_stacked_layers_come_out_as_one(make: Any, expected: set[str], getkey: Any):
    assert decayed(make(getkey())) == expected
    once = eqx.filter_vmap(make)
    stacked = eqx.filter_eval_shape(once, jax.random.split(getkey(), 5))
    keys = jax.random.split(getkey(), (2, 5))
    twice = eqx.filter_eval_shape(eqx.filter_vmap(once), keys)
    assert decayed(stacked) == decayed(twice) == expected


class Block(eqx.Module):
    linear: eqx.nn.Linear
    norm: eqx.nn.LayerNorm
    scale: jax.Array
    gate: jax.Array

    def __init__(self, key: jax.Array):
        self.linear = eqx.nn.Linear(3, 3, key=key)
        self.norm = eqx.nn.LayerNorm(3)
        self.scale = jnp.ones(3)
        self.gate = jnp.ones((3, 3))


class Typed(eqx.Module):
    kernel: Float[Array, "in out"]
    scale: Float[Array, " dim"] | None
    free: Float[Array, "*any"]

    def __init__(self, key: jax.Array):
        self.kernel, self.scale, self.free = jnp.ones((3, 3)), jnp.ones(3), jnp.ones(3)


@pytest.mark.parametrize(
    "make,expected",
    ((Block, {".linear.weight", ".gate"}), (Typed, {".kernel"})),
)
def test_stacked_vectors_of_a_block(make: Any, expected: set[str], getkey: Any):
    """A vector next to an `eqx.nn` layer, or with an annotation that gives its rank."""
    assert decayed(make(getkey())) == expected
    stacked = eqx.filter_vmap(make)(jax.random.split(getkey(), 4))
    assert decayed(stacked) == expected
    model = {"embedding": eqx.nn.Embedding(5, 3, key=getkey()), "blocks": stacked}
    inner = {f"['blocks']{path}" for path in expected}
    assert decayed(model) == {"['embedding'].weight"} | inner


def test_biases_by_name():
    names = ("bias", "bias_n", "bias_ih", "qkv_bias", "biases", "pos_bias_table")
    others = ("unbiased", "biasing", "weight")
    model = {name: jnp.ones((2, 2)) for name in names + others}
    assert decayed(model) == {f"['{name}']" for name in others}
    assert decayed({"bias": [jnp.ones((2, 2))], "w": [jnp.ones((2, 2))]}) == {
        "['w'][0]"
    }


def test_precedence():
    model = {"norm": eqx.nn.LayerNorm((2, 2)), "w": jnp.ones((2, 2)), "v": jnp.ones(2)}
    norm, bias = "['norm'].weight", "['norm'].bias"
    assert decayed(model) == {"['w']"}
    assert decayed(model, include="norm") == {"['w']", norm, bias}
    assert decayed(model, include=("norm", "v"), exclude=r"bias$") == {
        "['w']", "['v']", norm,
    }  # fmt: skip
    opinion = {bias: True, "['w']": False}
    assert decayed(model, exclude=".", predicate=lambda path, _: opinion.get(path)) == {
        bias
    }
    assert decayed(model, skip_types=()) == {"['w']", norm}
    assert decayed(model, predicate=lambda _, x: x.ndim == 1) == {"['v']"}


def test_patterns():
    model = make_mlp()
    weights = {f".layers[{i}].weight" for i in range(3)}
    assert decayed(model) == weights
    assert decayed(model, exclude=r"layers\[0\]") == weights - {".layers[0].weight"}
    assert decayed(model, exclude=[r"^layers\[0\]", re.compile(r"\[1\]")]) == {
        ".layers[2].weight"
    }
    assert decayed(model, exclude=r"^\.layers\[[01]\]") == {".layers[2].weight"}


def test_shapes_are_enough(getkey: Any):
    shapes = eqx.filter_eval_shape(make_zoo, getkey())
    assert decayed(shapes) == decayed(make_zoo(getkey()))


def test_predicate_must_answer():
    with pytest.raises(
        TypeError, match=r"predicate at \.layers\[0\]\.weight is the int"
    ):
        decay_mask(make_mlp(), predicate=lambda path, leaf: 1)  # pyright: ignore


def test_report():
    model = {"mlp": make_mlp(), "norm": eqx.nn.LayerNorm(4), "f": jnp.tanh, "n": 3}
    blocks = eqx.filter_vmap(Block)(jax.random.split(jax.random.key(0), 7))
    model["blocks"] = blocks
    mask = decay_mask(model, exclude=r"layers\[2\]", include="norm'].weight")
    assert decay_report(model, mask) == (
        "Weight decay acts on 5 of 14 arrays, 158 of 264 parameters.\n"
        "\n"
        "decayed:\n"
        "  ['blocks'].linear.weight  (7, 3, 3)  rank 2, stacked 7 times\n"
        "  ['blocks'].gate           (7, 3, 3)  rank 2, stacked 7 times\n"
        "  ['mlp'].layers[0].weight  (4, 3)     rank 2\n"
        "  ['mlp'].layers[1].weight  (4, 4)     rank 2\n"
        "  ['norm'].weight           (4,)       chosen (in a LayerNorm)\n"
        "\n"
        "not decayed:\n"
        "  ['blocks'].linear.bias    (7, 3)     a bias\n"
        "  ['blocks'].norm.weight    (7, 3)     in a LayerNorm\n"
        "  ['blocks'].norm.bias      (7, 3)     in a LayerNorm\n"
        "  ['blocks'].scale          (7, 3)     rank 1, stacked 7 times\n"
        "  ['mlp'].layers[0].bias    (4,)       a bias\n"
        "  ['mlp'].layers[1].bias    (4,)       a bias\n"
        "  ['mlp'].layers[2].weight  (2, 4)     chosen (rank 2)\n"
        "  ['mlp'].layers[2].bias    (2,)       a bias\n"
        "  ['norm'].bias             (4,)       in a LayerNorm"
    )


def test_report_of_any_filter_spec():
    model = make_mlp()
    assert "acts on 0 of 6 arrays" in decay_report(model, False)
    assert "decayed:\n  nothing\n" in decay_report(model, False)
    assert "acts on 3 of 6 arrays" in decay_report(model, lambda x: x.ndim > 1)
    report = decay_report(jnp.ones(3), True)
    assert "(the tree itself)  (3,)  chosen (rank 1)" in report


#
# The masks in use
#

MASKS = (
    ("whole model", lambda model: decay_mask(model)),
    (
        "filtered model",
        lambda model: decay_mask(eqx.filter(model, eqx.is_inexact_array)),
    ),
    (
        "callable of one leaf",
        lambda model: lambda x: x.ndim > 1,
    ),
    (
        "prefix",
        lambda model: eqx.tree_at(
            lambda m: m.layers,
            decay_mask(model),
            tuple(
                eqx.tree_at(lambda x: x.bias, m, False)
                for m in decay_mask(model).layers
            ),
        ),
    ),
    (
        "tree of bools and callables",
        lambda model: eqx.tree_at(
            lambda m: m.layers, decay_mask(model), (lambda x: x.ndim > 1,) * 3
        ),
    ),
    (
        "NumPy bools",
        lambda model: jax.tree.map(np.bool_, decay_mask(model)),
    ),
)


@pytest.mark.parametrize("make", [m for _, m in MASKS], ids=[n for n, _ in MASKS])
def test_decay_acts_where_the_mask_says(make: Any):
    """With zero gradients, only weight decay changes a parameter."""
    model = make_mlp()
    assert callable(model)  # so are masks like it, but masks count as trees
    optim = AdEMAMix(0.1, weight_decay=0.5, weight_decay_mask=make(model))
    grads = jax.tree.map(
        lambda x: jnp.zeros_like(x), eqx.filter(model, eqx.is_inexact_array)
    )
    for update in (eqx_ademamix.update, eqx.filter_jit(eqx_ademamix.update)):
        updates, _ = update(optim, grads, eqx_ademamix.init(optim, model), model)
        for u, p in zip(
            jtu.tree_leaves(updates),
            jtu.tree_leaves(eqx.filter(model, eqx.is_inexact_array)),
            strict=True,
        ):
            expected = -0.05 * p if p.ndim > 1 else jnp.zeros_like(p)
            np.testing.assert_allclose(u, expected, rtol=1e-6)


TRAINABLE = (
    ("tree", lambda model: jax.tree.map(lambda _: False, model), "replace"),
    ("filtered tree", lambda model: jax.tree.map(
        lambda _: False, eqx.filter(model, eqx.is_inexact_array)), "replace"),
    ("prefix", lambda model: eqx.tree_at(
        lambda m: m.layers, jax.tree.map(lambda _: False, model), (False, True, False)),
        None),
)  # fmt: skip


@pytest.mark.parametrize("_,make,how", TRAINABLE)
@pytest.mark.parametrize("with_params", (False, True))
def test_frozen_leaves(_: str, make: Any, how: Any, with_params: bool):
    model = make_mlp()
    spec = make(model)
    if how:
        spec = eqx.tree_at(
            lambda m: (m.layers[1].weight, m.layers[1].bias), spec, (True, True)
        )
    optim = AdEMAMix(
        0.1, weight_decay=0.5 if with_params else 0.0, trainable=spec,
        weight_decay_mask=decay_mask(model),
    )  # fmt: skip
    state = eqx_ademamix.init(optim, model)
    grads = eqx.filter_grad(loss_of_arrays)(model)  # at every leaf, even if frozen
    params = (model,) if with_params else ()
    update = eqx.filter_jit(eqx_ademamix.update)
    for _step in range(2):
        updates, new_state = update(optim, grads, state, *params)
        assert tree_type(new_state) == tree_type(state)
        state = new_state
        for tree in (updates, state.m1, state.m2, state.nu):
            assert tree.layers[0].weight is tree.layers[0].bias is None
            assert tree.layers[2].weight is tree.layers[2].bias is None
            assert tree.layers[1].weight.shape == (4, 4)
        new = eqx.apply_updates(model, updates)
        assert new.layers[0].weight is model.layers[0].weight
        before = model.layers[1].bias
        assert before is not None and jnp.any(new.layers[1].bias != before)


def test_a_callable_sees_only_trained_arrays(getkey: Any):
    model, seen = make_zoo(getkey()), []

    def spec(x: Any) -> bool:
        seen.append(x)
        return x.ndim >= 2

    optim = AdEMAMix(0.1, weight_decay=0.5, trainable=spec)
    state = eqx_ademamix.init(optim, model)
    # Is it a mask as optax has them? It is called on the whole tree, and, since it
    # raises an error there, on three small trees of one array.
    whole, nested, leaves = seen[0], seen[1:4], seen[4:]
    arrays = eqx.filter(model, eqx.is_inexact_array)
    assert eqx.tree_equal(whole, arrays)
    assert eqx.tree_equal(leaves, jtu.tree_leaves(arrays))
    assert eqx.tree_equal(jtu.tree_leaves(nested), leaves[:1] * 3)
    assert all(x.ndim >= 2 for x in jtu.tree_leaves(state.m2))

    seen_by_mask = []

    def mask(x: Any) -> bool:
        seen_by_mask.append(x)
        return True

    optim = AdEMAMix(0.1, weight_decay=0.5, trainable=spec, weight_decay_mask=mask)
    eqx_ademamix.init(optim, model)
    whole, *leaves = seen_by_mask
    assert leaves and all(x.ndim >= 2 for x in leaves)
    assert eqx.tree_equal(leaves, jtu.tree_leaves(whole))


def test_what_only_looks_stacked(getkey: Any):
    """An array with four rows next to four stacked layers is not part of the stack."""

    class Model(eqx.Module):
        embedding: eqx.nn.Embedding
        position: jax.Array
        layers: eqx.nn.Linear

    stack = eqx.filter_vmap(lambda key: eqx.nn.Linear(3, 3, key=key))
    layers = stack(jax.random.split(getkey(), 4))
    model = Model(eqx.nn.Embedding(50, 4, key=getkey()), jnp.ones((4, 16)), layers)
    assert decayed(model) == {".embedding.weight", ".position", ".layers.weight"}
    assert decayed({"out": jnp.ones((4, 10)), "layers": layers}) == {
        "['out']",
        "['layers'].weight",
    }


@pytest.mark.parametrize(
    "kwargs,text",
    (
        ({"exclude": "["}, r"`exclude` is '\[', but a regular expression"),
        ({"include": 3}, "`include` is 3, but a regular expression"),
        (
            {"skip_types": eqx.nn.LayerNorm(3)},
            "`skip_types` is a `LayerNorm`, but a class",
        ),
    ),
)
def test_bad_arguments(kwargs: Any, text: str):
    with pytest.raises((ValueError, TypeError), match=text):
        decay_mask(make_mlp(), **kwargs)


#
# A callable is for one array. optax's masks are for a tree.
#


def without_biases(params: Any) -> Any:
    """A mask as optax takes it, which reads the paths."""
    is_bias = lambda path, x: "bias" not in jtu.keystr(path)
    return jtu.tree_map_with_path(is_bias, params)


def with_keys(params: Any) -> Any:
    """It only fits dicts: a module has names instead of keys."""
    is_bias = lambda path, x: not any("bias" in k.key for k in path)
    return jtu.tree_map_with_path(is_bias, params)


def with_names(params: Any) -> Any:
    """It only fits modules."""
    is_bias = lambda path, x: path[-1].name != "bias"
    return jtu.tree_map_with_path(is_bias, params)


def with_indices(params: Any) -> Any:
    """It only fits lists."""
    return jtu.tree_map_with_path(lambda path, x: path[-1].idx > 0, params)


@pytest.mark.parametrize("spec", [with_keys, with_names, with_indices])
@pytest.mark.parametrize(
    "model",
    [make_mlp(), {"w": jnp.ones(3)}, [jnp.ones(3)]],
    ids=["mlp", "dict", "list"],
)
@pytest.mark.parametrize("name", ["weight_decay_mask", "trainable"])
def test_a_mask_of_optax_for_another_kind_of_tree(spec: Any, model: Any, name: str):
    """It raises an error on this tree, and would choose wrongly array by array."""
    optim = AdEMAMix(1e-3, weight_decay=0.5, **{name: spec})
    with pytest.raises(TypeError, match="which returns a tree of bools, as an optax"):
        eqx_ademamix.init(optim, model)


PER_ARRAY = (
    lambda x: True,
    lambda x: x.ndim >= 2,
    lambda x: hasattr(x, "ndim") and x.ndim >= 2,
    lambda x: np.bool_(np.ndim(x) >= 2),
    eqx.is_array,
    eqx.is_inexact_array_like,
)


@pytest.mark.parametrize("spec", PER_ARRAY)
def test_a_callable_for_one_array(spec: Any):
    """Whatever it says about a whole tree, it decides array by array."""
    model = {"mlp": make_mlp(), "v": jnp.ones(3), "n": 3}
    arrays = eqx.filter(model, eqx.is_inexact_array)
    expected = jax.tree.map(lambda x: bool(spec(x)), arrays)
    for name in ("weight_decay_mask", "trainable"):
        optim, like = (
            AdEMAMix(1e-3, weight_decay=0.5, **{name: mask})
            for mask in (spec, expected)
        )
        state = eqx_ademamix.init(optim, model)
        assert tree_type(state) == tree_type(eqx_ademamix.init(like, model))
        got, wanted = (
            eqx_ademamix.update(o, arrays, state, model)[0] for o in (optim, like)
        )
        assert eqx.tree_equal(got, wanted)


def test_a_callable_for_a_tree_of_one_array():
    """A model that is an array has no paths, so both kinds of masks agree."""
    optim = AdEMAMix(1e-3, weight_decay=0.5, weight_decay_mask=without_biases)
    state = eqx_ademamix.init(optim, jnp.ones(3))
    zero = jnp.zeros(3)
    updates, _ = eqx_ademamix.update(optim, zero, state, jnp.ones(3))
    assert np.allclose(updates, -0.5e-3, rtol=1e-6)


TREES = (
    make_mlp(),
    {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
    {"bias": jnp.ones(2)},
    [jnp.ones(2), (jnp.ones(3, jnp.complex64), None)],
)
RETURNING_TREES = (
    without_biases,
    lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
    lambda params: jax.tree.map(lambda x: np.bool_(x.ndim > 1), params),
    lambda params: jax.tree.map(lambda x: jnp.asarray(x.ndim > 1), params),
    decay_mask,
)


@pytest.mark.parametrize("tree", TREES, ids=range(len(TREES)))
@pytest.mark.parametrize("mask", RETURNING_TREES, ids=range(len(RETURNING_TREES)))
@pytest.mark.parametrize("name", ("weight_decay_mask", "trainable"))
def test_a_mask_of_optax_is_refused(tree: Any, mask: Any, name: str):
    message = rf"^{name} is the function .* pass the tree `mask\(params\)` instead"
    optim = AdEMAMix(1e-3, weight_decay=0.5, **{name: mask})
    for call in (eqx_ademamix.init, eqx.filter_jit(eqx_ademamix.init)):
        with pytest.raises(TypeError, match=message):
            call(optim, tree)
    with pytest.raises(TypeError, match=message):
        eqx.filter_eval_shape(eqx_ademamix.init, optim, tree)


def test_a_mask_of_optax_is_refused_in_update():
    """Also for a state that another optimizer made, and for an ensemble."""
    model = make_mlp()
    grads = eqx.filter_grad(loss_of_arrays)(model)
    state = eqx_ademamix.init(AdEMAMix(1e-3), model)
    optim = AdEMAMix(1e-3, weight_decay=0.5, weight_decay_mask=without_biases)
    with pytest.raises(TypeError, match="pass the tree"):
        eqx_ademamix.update(optim, grads, state, model)
    models = eqx.filter_vmap(lambda key: eqx.nn.Linear(2, 2, key=key))(
        jax.random.split(jax.random.key(0), 3)
    )
    with pytest.raises(TypeError, match="pass the tree"):
        eqx.filter_vmap(lambda model: eqx_ademamix.init(optim, model))(models)


def test_an_optax_mask_moved_over():
    """The tree that the mask returns, of the arrays or of the whole model."""
    model = {"w": jnp.ones((2, 2)), "bias": jnp.ones(2), "n": 3}
    params = eqx.filter(model, eqx.is_inexact_array)
    zero = jax.tree.map(jnp.zeros_like, params)
    for mask in (without_biases(params), without_biases(model), decay_mask(model)):
        optim = AdEMAMix(1e-3, weight_decay=0.5, weight_decay_mask=mask)
        state = eqx_ademamix.init(optim, model)
        updates, _ = eqx_ademamix.update(optim, zero, state, model)
        assert np.all(updates["w"] < 0) and np.all(updates["bias"] == 0)
