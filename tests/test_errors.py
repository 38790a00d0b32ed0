"""Bad input raises an error: one short sentence that names the place."""
# A static type checker also finds many of these mistakes.
# pyright: reportArgumentType=false, reportCallIssue=false

import functools
import io
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
    Offloaded,
    ScaledFloat8,
    ScaledFloat16,
    SimplifiedAdEMAMix,
    StateFormat,
    decay_mask,
    hyperparams,
    init,
    learning_rate_report,
    load,
    make_step,
    path_scales,
    save,
    state_sharding,
    update,
)

from . import helpers
from .helpers import loss_of_arrays, make_mlp


MODEL = make_mlp()
GRADS = eqx.filter_grad(loss_of_arrays)(MODEL)
OPTIM = AdEMAMix(1e-3)
ADAM = optax.adam(1e-3)
STATE = init(OPTIM, MODEL)
DECAYING = AdEMAMix(1e-3, weight_decay=0.1, weight_decay_mask=decay_mask(MODEL))
SWAPPED = eqx.nn.MLP(3, 2, 5, 2, key=jax.random.key(1))  # another width
DEEPER = eqx.nn.MLP(3, 2, 4, 3, key=jax.random.key(1))
NORM, OTHER_NORM = (eqx.nn.LayerNorm(3, eps=eps) for eps in (1e-5, 1e-3))

W0 = lambda tree: tree.layers[0].weight
B2 = lambda tree: tree.layers[2].bias
LAST_LAYER = eqx.tree_at(
    lambda m: m.layers[2], jax.tree.map(lambda _: False, MODEL), True
)
is_none = lambda x: x is None

SIMPLIFIED = SimplifiedAdEMAMix(1e-3)

COMPACT = AdEMAMix(1e-3, state_format=helpers.COMPACT)
COMPACT_STATE = init(COMPACT, MODEL)

MESH = Mesh(np.array(jax.devices()).reshape(1, 8), ("data", "model"))
OTHER_MESH = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
SPLIT = {
    "w": jax.device_put(jnp.ones(8), NamedSharding(OTHER_MESH, PartitionSpec("a")))
}


def stepped(**fields: Any) -> Any:
    return update(AdEMAMix(**{"learning_rate": 1e-3, **fields}), GRADS, STATE, MODEL)


def deleted() -> Any:
    x = jnp.asarray(1e-3)
    x.delete()
    return x


def with_deleted_rate() -> AdEMAMix:
    optim = AdEMAMix(jnp.asarray(1e-3))
    for x in jax.tree.leaves(eqx.filter(optim, eqx.is_array)):
        x.delete()
    return optim


@functools.total_ordering
class Key:
    """Keys that differ but print as the same text."""

    def __init__(self, number: int):
        self.number = number

    def __repr__(self) -> str:
        return "'k'"

    def __lt__(self, other: Any) -> bool:
        return str(self) < str(other)


class Complement(eqx.Module):
    """A schedule of `b3` whose complement is out of range."""

    def __call__(self, count: Any) -> float:
        return 0.5

    def complement(self, count: Any) -> float:
        return 0.0


class Untupled(AbstractCodec):
    """A codec with a field of each kind. Its parts are not a tuple."""

    leaf: Any = None
    static: Any = eqx.field(static=True, default=1)

    def encode_real(self, value: Any, seed: Any) -> Any:
        return value

    def decode_real(self, parts: Any) -> Any:
        return parts

    def for_squares(self) -> Any:
        return self


def half(model: Any, dtype: Any = jnp.bfloat16) -> Any:
    arrays, rest = eqx.partition(model, eqx.is_inexact_array)
    return eqx.combine(eqx_ademamix.tree_cast(arrays, dtype), rest)


MODEL16, GRADS16 = half(MODEL), half(GRADS)
COMPENSATED = Compensated(OPTIM)
STATE16 = init(COMPENSATED, MODEL16)
SGD = Compensated(optax.sgd(1e-3))
SGD_STATE = init(SGD, MODEL16)
ADAM_STATE = init(optax.adam(1e-3), MODEL)


def counted(count: int) -> Any:
    return optax.ScaleByScheduleState(jnp.asarray(count, jnp.int32))


def put(tree: Any, where: Any, value: Any) -> Any:
    return eqx.tree_at(where, tree, value, is_leaf=is_none)


def grads(where: Any, value: Any) -> Any:
    return lambda: update(OPTIM, put(GRADS, where, value), STATE, MODEL)


def state(where: Any, value: Any) -> Any:
    return lambda: update(OPTIM, GRADS, put(STATE, where, value), MODEL)


NEGATIVE = put(STATE, lambda s: s.count, jnp.asarray(-5))


def simplified_state(num: float) -> Any:
    return put(init(SIMPLIFIED, MODEL), lambda s: s.num, jnp.asarray(num))


def params(value: Any) -> Any:
    return lambda: update(OPTIM, GRADS, STATE, value)


def make(*args: Any, **kwargs: Any) -> Any:
    return lambda: AdEMAMix(*args, **kwargs)


def masked(mask: Any, params: Any = MODEL) -> Any:
    return lambda: init(AdEMAMix(1e-3, weight_decay_mask=mask), params)


def mask_of_optax(params: Any) -> Any:
    is_bias = lambda path, x: path[-1:] == (jtu.GetAttrKey("bias"),)
    return jtu.tree_map_with_path(is_bias, params)


def scaled(scales: Any, params: Any = MODEL) -> Any:
    return lambda: learning_rate_report(params, scales)


def ruled(rules: Any, params: Any = MODEL) -> Any:
    return lambda: path_scales(params, rules)


def frozen(spec: Any) -> Any:
    return lambda: init(AdEMAMix(1e-3, trainable=spec), MODEL)


def scheduled(name: str, schedule: Any) -> Any:
    optim = AdEMAMix(**{"learning_rate": 1e-3, name: schedule})
    return lambda: update(optim, GRADS, STATE, MODEL)


def donated() -> None:
    step = jax.jit(lambda s: OPTIM.update(GRADS, s, MODEL)[1], donate_argnums=0)
    old = init(OPTIM, MODEL)
    step(old)
    update(OPTIM, GRADS, old, MODEL)


def donated_params() -> None:
    model = jax.tree.map(lambda x: x + 0, eqx.filter(MODEL, eqx.is_inexact_array))
    for x in jtu.tree_leaves(model):
        x.delete()
    update(OPTIM, GRADS, STATE, model)


def donated_optimizer() -> None:
    optim = AdEMAMix(jnp.asarray(1e-3))
    optim.learning_rate.delete()  # pyright: ignore
    update(optim, GRADS, STATE, MODEL)


def donated_hyperparams() -> None:
    state = init(OPTIM, MODEL)
    state.count.delete()
    hyperparams(OPTIM, state)


def mean(model: Any, *batch: Any) -> Any:
    return jnp.mean(model**2)


PARAMS = jnp.ones(2)
MEAN_STEP = make_step(mean, SGD.optim)


def run(step: Any, *batch: Any, **kwargs: Any) -> Any:
    """A first call of a step, or of the step that `make_step` makes of a loss."""
    step = step if hasattr(step, "pack") else make_step(step, SGD.optim, **kwargs)
    return lambda: step(step.init(PARAMS), *batch)


def with_state(loss_fn: Any, model_state: Any, **kwargs: Any) -> Any:
    step = make_step(loss_fn, SGD.optim, **kwargs)
    return lambda: step(step.init(PARAMS, model_state=model_state))


def packed(state: Any, optim: Any = OPTIM, **kwargs: Any) -> Any:
    return lambda: make_step(loss_of_arrays, optim, **kwargs).pack(MODEL, state)


def donated_carry(use: Any) -> Any:
    def user() -> None:
        step = make_step(mean, SGD.optim)
        carry = step.init(PARAMS)
        step(carry)
        use(step, carry)

    return user


def donated_batch() -> None:
    batch = jnp.ones(2) + 1
    batch.delete()
    run(lambda model, batch: jnp.mean(model * batch["x"]), {"x": batch})()


def donated_rate() -> None:
    optim = AdEMAMix(jnp.asarray(1e-3))
    step = make_step(mean, optim)
    optim.learning_rate.delete()  # pyright: ignore
    step(step.init(PARAMS))


def changed_carry() -> None:
    carry = MEAN_STEP.init(PARAMS)
    MEAN_STEP(jax.tree.map(lambda x: x.astype(jnp.bfloat16), carry))


def deep(leaf: Any) -> Any:
    """A tree with forty levels and a long name at each level."""
    for i in range(40):
        leaf = {f"transformer_block_with_a_long_name_{i}": leaf}
    return leaf


def scaled_up(optim: Any) -> Any:
    return eqx_ademamix.scale_to(optim, steps=100_000, batch_tokens=5e5, params=1e9)


BF16 = jnp.asarray(0.9, jnp.bfloat16)
SHAPE = r"has shape \({}\), but the optimizer state has \({}\) there. Was `init` called"

# (id, what a user does, the error that they get)
CASES = (
    # gradients
    (
        "shape",
        grads(W0, jnp.ones((4, 2))),
        r"grads\.layers\[0\]\.weight " + SHAPE.format("4, 2", "4, 3"),
    ),
    (
        "broadcasts",
        grads(W0, jnp.ones((4, 1))),
        r"grads\.layers\[0\]\.weight " + SHAPE.format("4, 1", "4, 3"),
    ),
    (
        "too many axes",
        grads(B2, jnp.ones((1, 2))),
        r"grads\.layers\[2\]\.bias " + SHAPE.format("1, 2", "2,"),
    ),
    (
        "scalar",
        grads(B2, jnp.asarray(1.0)),
        r"grads\.layers\[2\]\.bias " + SHAPE.format("", "2,"),
    ),
    (
        "a Python scalar",
        grads(B2, 1.0),
        r"grads\.layers\[2\]\.bias is the float 1.0, but a gradient is an array",
    ),
    (
        "structure",
        lambda: update(OPTIM, {"w": jnp.ones(3)}, STATE, MODEL),
        r"grads is a dict with the keys 'w', but the optimizer state has an `MLP` there",
    ),
    (
        "deeper structure",
        lambda: update(OPTIM, put(GRADS, lambda m: m.layers[1], [jnp.ones(3)]), STATE),
        r"grads\.layers\[1\] is a list of length 1, but the optimizer state has a `Linear` there",
    ),
    (
        "gradients of a deeper model",
        lambda: update(OPTIM, eqx.filter_grad(loss_of_arrays)(DEEPER), STATE),
        r"grads\.layers is a tuple of length 4, "
        r"but the optimizer state has a tuple of length 3 there",
    ),
    (
        "None",
        grads(W0, None),
        r"grads\.layers\[0\]\.weight is None, "
        r"but the optimizer state has a float32 array of shape \(4, 3\) there",
    ),
    (
        "of a part of the model",
        lambda: update(OPTIM, eqx.partition(GRADS, LAST_LAYER)[0], STATE, MODEL),
        r"grads\.layers\[0\]\.weight is None.*optimizer with `trainable=filter_spec` before",
    ),
    (
        "a whole layer None",
        grads(lambda m: m.layers[0], None),
        r"grads\.layers\[0\] is None, but the optimizer state has a `Linear` there",
    ),
    (
        "no gradients",
        lambda: update(OPTIM, None, STATE, MODEL),
        "grads is None, but the optimizer state has an `MLP` there",
    ),
    (
        "integers",
        grads(W0, jnp.ones((4, 3), int)),
        r"grads\.layers\[0\]\.weight is an int32 array of shape \(4, 3\), but a gradient is",
    ),
    (
        "complex",
        grads(W0, jnp.ones((4, 3), complex)),
        r"grads\.layers\[0\]\.weight has dtype complex64, "
        r"but the optimizer state is for a real parameter",
    ),
    (
        "real",
        lambda: OPTIM.update(jnp.ones(2), OPTIM.init(jnp.ones(2, complex))),
        "grads has dtype float32, but the optimizer state is for a complex parameter",
    ),
    (
        "deep",
        lambda: OPTIM.update(
            deep(jnp.ones((2, 1))), OPTIM.init(deep(jnp.ones((2, 3))))
        ),
        r"grads\['transformer_block.*\.\.\..*_0'\] has shape \(2, 1\)",
    ),
    (
        "the model",
        lambda: update(OPTIM, MODEL, STATE, MODEL),
        r"grads\.activation is the function `relu`, "
        r"but a gradient is an array .* Was the model passed as the gradients",
    ),
    (
        "the model, jitted",
        lambda: eqx.filter_jit(update)(OPTIM, MODEL, STATE, MODEL),
        r"grads\.activation is the function `relu`",
    ),
    (
        "swapped",
        lambda: update(OPTIM, STATE, GRADS, MODEL),
        "`grads` is an `AdEMAMixState`: were `grads` and `state` swapped",
    ),
    (
        "optimizer last",
        lambda: update(GRADS, STATE, OPTIM),
        "`optim` is an `MLP`, but an optimizer of this package or of optax was expected",
    ),
    (
        "optax's optimizer",
        lambda: init(optax.adam, MODEL),
        "`optim` is the function `adam`, but an optimizer of this package or of optax",
    ),
    (
        "an object without update",
        lambda: update(eqx.nn.Identity(), GRADS, STATE, MODEL),
        "`optim` is an `Identity`, but an optimizer of this package or of optax",
    ),
    (
        "None for optax",
        lambda: update(ADAM, put(GRADS, W0, None), init(ADAM, MODEL), MODEL),
        r"grads\.layers\[0\]\.weight is None, but `params` has a float32 array of shape \(4, 3\) there, "
        r"and an optax optimizer trains every array",
    ),
    (
        "another shape for optax",
        lambda: update(ADAM, put(GRADS, W0, jnp.ones(3)), init(ADAM, MODEL), MODEL),
        r"grads\.layers\[0\]\.weight is a float32 array of shape \(3,\), "
        r"but `params` has a float32 array of shape \(4, 3\) there. Take the gradients",
    ),
    (
        "another model for optax",
        lambda: update(ADAM, GRADS, init(ADAM, DEEPER), DEEPER),
        r"grads\.layers is a tuple of length 3, but `params` has a tuple of length 4",
    ),
    (
        "the frozen part for optax",
        lambda: update(ADAM, GRADS, init(ADAM, MODEL), put(MODEL, W0, None)),
        r"grads\.layers\[0\]\.weight is a float32 array of shape \(4, 3\), but `params` has None",
    ),
    (
        "the model as gradients for optax",
        lambda: update(ADAM, MODEL, init(ADAM, MODEL), MODEL),
        r"grads\.activation is the function `relu`, but a gradient is an array",
    ),
    (
        "nothing to train for optax",
        lambda: init(ADAM, {"a": 1.0, "b": "name"}),
        "None of the leaves of `params` is a floating-point or complex array",
    ),
    (
        "model first",
        lambda: init(MODEL, OPTIM),
        "`optim` is an `MLP`, "
        "but an optimizer of this package or of optax was expected, .* Check the order",
    ),
    # the state
    (
        "without skipped",
        lambda: update(AdEMAMix(1, skip_nonfinite=True), GRADS, STATE, MODEL),
        r"state\.skipped is None, but this optimizer counts skipped steps. "
        r"Was `skip_nonfinite` different when the state was created\? Convert it with",
    ),
    (
        "skipped without the guard",
        lambda: update(OPTIM, GRADS, init(AdEMAMix(1, skip_nonfinite=True), MODEL)),
        r"state\.skipped is an int32 array of shape \(\), but this optimizer does not "
        "count skipped steps",
    ),
    (
        "without m2_weight",
        lambda: update(AdEMAMix(1, bias_correct_m2=True), GRADS, STATE, MODEL),
        r"state\.m2_weight is None, but this optimizer keeps one. "
        r"Were `bias_correct_m2`, `b1` or `b2` different when the state was created\? ",
    ),
    (
        "with m2_weight",
        lambda: update(OPTIM, GRADS, init(AdEMAMix(1, bias_correct_m2=True), MODEL)),
        r"state\.m2_weight is a float32 array of shape \(\), but this optimizer keeps none",
    ),
    (
        "of another model",
        lambda: update(OPTIM, GRADS, init(OPTIM, SWAPPED), MODEL),
        r"params\.layers\[0\]\.weight " + SHAPE.format("4, 3", "5, 3"),
    ),
    (
        "of another model, no params",
        lambda: update(OPTIM, GRADS, init(OPTIM, SWAPPED)),
        r"grads\.layers\[0\]\.weight " + SHAPE.format("4, 3", "5, 3"),
    ),
    (
        "of another class",
        lambda: update(OPTIM, GRADS, optax.adam(1e-3).init(GRADS), MODEL),
        "`state` is a tuple of length 2, but an `AdEMAMixState` was expected",
    ),
    (
        "no state",
        lambda: update(OPTIM, GRADS, None, MODEL),
        "`state` is None, but an `AdEMAMixState` was expected",
    ),
    (
        "of b1=0",
        lambda: update(OPTIM, GRADS, init(AdEMAMix(1, b1=0), MODEL), MODEL),
        r"state\.m1 has no moments, but this optimizer has a `b1` above 0",
    ),
    (
        "for b1=0",
        lambda: update(AdEMAMix(1, b1=0), GRADS, STATE, MODEL),
        r"state\.m1\.layers\[0\]\.weight holds a moment, "
        r"but an optimizer with `b1=0` stores no `m1`",
    ),
    (
        "of another format",
        lambda: update(
            AdEMAMix(
                1, state_format=StateFormat(jnp.bfloat16, jnp.float32, jnp.float32)
            ),
            GRADS,
            STATE,
            MODEL,
        ),
        r"state\.m1\.layers\[0\]\.weight is stored as float32, "
        r"but bfloat16 was expected for this parameter and `state_format`",
    ),
    (
        "m1 of another shape",
        state(lambda s: W0(s.m1), jnp.ones((4, 1))),
        r"state\.m1\.layers\[0\]\.weight is a float32 array of shape \(4, 1\), "
        r"but state\.m2 has a float32 array of shape \(4, 3\)",
    ),
    (
        "m2 of another shape",
        state(lambda s: W0(s.m2), jnp.ones(())),
        r"state\.m2\.layers\[0\]\.weight is a float32 array of shape \(\), but state\.nu has",
    ),
    (
        "nu of another shape",
        state(lambda s: B2(s.nu), jnp.ones((2, 2))),
        r"state\.m2\.layers\[2\]\.bias is a float32 array of shape \(2,\), "
        r"but state\.nu has a float32 array of shape \(2, 2\)",
    ),
    (
        "m1 of another dtype",
        state(lambda s: W0(s.m1), jnp.ones((4, 3), jnp.bfloat16)),
        r"state\.m1\.layers\[0\]\.weight is stored as bfloat16, but float32 was expected",
    ),
    (
        "m2 of another dtype",
        state(lambda s: B2(s.m2), jnp.ones(2, jnp.float16)),
        r"state\.m2\.layers\[2\]\.bias is stored as float16, but float32 was expected",
    ),
    (
        "nu of another dtype",
        state(lambda s: B2(s.nu), jnp.ones(2, int)),
        r"state\.nu\.layers\[2\]\.bias is stored as int32, but float32 was expected",
    ),
    (
        "nu complex",
        state(lambda s: B2(s.nu), jnp.ones(2, complex)),
        r"state\.nu\.layers\[2\]\.bias is stored as complex64, but float32 was expected",
    ),
    (
        "m2 None",
        state(lambda s: B2(s.m2), None),
        r"state\.m2\.layers\[2\]\.bias is None, but state\.nu has a float32 array",
    ),
    (
        "m2 a function",
        state(lambda s: B2(s.m2), jnp.tanh),
        r"state\.m2\.layers\[2\]\.bias is the function `tanh`, but state\.nu",
    ),
    (
        "m1 of another structure",
        state(lambda s: s.m1, [jnp.ones(2)]),
        r"state\.m1 is a list of length 1, but state\.m2 has an `MLP` there: the moments of one",
    ),
    (
        "m2 with other static fields",
        lambda: update(
            OPTIM,
            NORM,
            put(init(OPTIM, NORM), lambda s: s.m2, init(OPTIM, OTHER_NORM).m2),
        ),
        r"state\.m2 has different static fields from state\.nu there",
    ),
    (
        "of a model with other static fields",
        lambda: update(OPTIM, NORM, init(OPTIM, NORM), OTHER_NORM),
        "params has different static fields from the optimizer state there, although the "
        "arrays match",
    ),
    (
        "count a float",
        state(lambda s: s.count, jnp.asarray(1.0)),
        r"state\.count is a float32 array of shape \(\), "
        r"but an int32 array of shape \(\) was expected",
    ),
    (
        "count negative",
        lambda: update(OPTIM, GRADS, NEGATIVE, MODEL),
        r"^state\.count is -5, but a number of steps >= 0 was expected\. Pass on the state",
    ),
    (
        "count_m2 negative, of NumPy",
        state(lambda s: s.count_m2, np.asarray(-1, np.int32)),
        r"^state\.count_m2 is -1, but a number of steps >= 0",
    ),
    (
        "count negative, hyperparams",
        lambda: hyperparams(OPTIM, NEGATIVE),
        r"^state\.count is -5, but a number of steps >= 0",
    ),
    (
        "count negative, in a constant of jit",
        lambda: jax.jit(lambda: update(OPTIM, GRADS, NEGATIVE, MODEL)[0].layers)(),
        r"^state\.count is -5, but a number of steps >= 0",
    ),
    (
        "count negative, Compensated",
        lambda: update(
            COMPENSATED,
            GRADS16,
            put(STATE16, lambda s: s.count, jnp.asarray(-5)),
            MODEL16,
        ),
        r"^state\.count is -5, but a number of steps >= 0",
    ),
    (
        "num negative",
        lambda: update(SIMPLIFIED, GRADS, simplified_state(-1.0), MODEL),
        r"^state\.num is -1\.0, but a finite sum of weights >= 0 was expected",
    ),
    (
        "num NaN",
        lambda: update(SIMPLIFIED, GRADS, simplified_state(np.nan), MODEL),
        r"^state\.num is nan, but a finite sum of weights >= 0",
    ),
    (
        "num infinite, hyperparams",
        lambda: hyperparams(SIMPLIFIED, simplified_state(np.inf)),
        r"^state\.num is inf, but a finite sum of weights >= 0",
    ),
    (
        "batched",
        lambda: update(
            OPTIM,
            GRADS,
            eqx.filter_vmap(lambda _: init(OPTIM, MODEL))(jnp.ones(2)),
            MODEL,
        ),
        r"state\.count is an int32 array of shape \(2,\), .* `eqx.filter_vmap\(update\)`",
    ),
    ("donated", donated, r"state\.count has been deleted: its buffer was donated"),
    (
        "donated parameters",
        donated_params,
        r"params\.layers\[0\]\.weight has been deleted",
    ),
    ("donated optimizer", donated_optimizer, r"optim\.learning_rate has been deleted"),
    ("donated, hyperparams", donated_hyperparams, r"state\.count has been deleted"),
    (
        "numbers in place of arrays",
        lambda: update(OPTIM, GRADS, jax.tree.map(lambda _: 0, STATE), MODEL),
        "state.count is the int 0, but an int32 array",
    ),
    (
        "numbers in all moments",
        lambda: update(
            OPTIM,
            GRADS,
            put(STATE, lambda s: (W0(s.m1), W0(s.m2), W0(s.nu)), (0, 0, 0)),
            MODEL,
        ),
        r"state\.m2\.layers\[0\]\.weight is the int 0, "
        r"but state\.nu has the int 0 there: the moments of one parameter are arrays",
    ),
    (
        "hyperparams of no state",
        lambda: hyperparams(OPTIM, MODEL),
        "`state` has no states of AdEMAMix, but one was expected. Found in it: MLP",
    ),
    # parameters
    (
        "of another model",
        params(SWAPPED),
        r"params\.layers\[0\]\.weight " + SHAPE.format("5, 3", "4, 3"),
    ),
    (
        "of another structure",
        params([jnp.ones(3)]),
        "params is a list of length 1, but the optimizer state has an `MLP` there",
    ),
    (
        "lost a leaf",
        params(put(MODEL, W0, None)),
        r"params\.layers\[0\]\.weight is None, but the optimizer state has a float32 array",
    ),
    (
        "a number",
        params(3),
        "params is the int 3, but the optimizer state has an `MLP` there",
    ),
    (
        "integers",
        params(jax.tree.map(lambda x: x.astype(int) if eqx.is_array(x) else x, MODEL)),
        r"params\.layers\[0\]\.weight is an int32 array of shape \(4, 3\), "
        r"but the optimizer state has a float32",
    ),
    (
        "another key",
        lambda: OPTIM.update(
            {"a": jnp.ones(2), "z": jnp.ones(2)},
            OPTIM.init({"a": jnp.ones(2), "b": jnp.ones(2)}),
        ),
        "grads is a dict without the key 'b', but the optimizer state has one with it there",
    ),
    (
        "one key more",
        lambda: OPTIM.update(
            {"a": jnp.ones(2), "z": jnp.ones(2)}, OPTIM.init({"a": jnp.ones(2)})
        ),
        "grads is a dict with the key 'z', but the optimizer state has one without it there",
    ),
    (
        "missing",
        lambda: update(DECAYING, GRADS, init(DECAYING, MODEL)),
        "`params` is missing, but `weight_decay` is on",
    ),
    (
        "missing for an array",
        lambda: update(AdEMAMix(1, weight_decay=jnp.asarray(0.0)), GRADS, STATE),
        "`params` is missing, but `weight_decay` is on",
    ),
    (
        "nothing inexact",
        lambda: init(OPTIM, {"n": 3, "f": jnp.tanh, "i": jnp.ones(2, int)}),
        "None of the leaves of `params` is a floating-point or complex array",
    ),
    (
        "Python floats",
        lambda: init(OPTIM, 1.0),
        "None of the leaves of `params` is",
    ),
    # masks
    (
        "wrong structure",
        masked([True, False]),
        "weight_decay_mask is a list of length 2, "
        "but the parameters have an `MLP` there. A mask is a bool",
    ),
    (
        "too deep",
        masked({"w": {"x": True}}, {"w": jnp.ones(2)}),
        r"weight_decay_mask\['w'\] is a dict with the keys 'x', "
        r"but the parameters have a float32 array of shape \(2,\) there",
    ),
    (
        "wrong inside",
        masked(put(decay_mask(MODEL), lambda m: m.layers[0], (True,))),
        r"weight_decay_mask\.layers\[0\] is a tuple of length 1, "
        r"but the parameters have a `Linear` there",
    ),
    (
        "None",
        masked(None),
        r"weight_decay_mask\.layers\[0\]\.weight is None, but a bool was expected",
    ),
    (
        "a None leaf",
        masked(put(decay_mask(MODEL), W0, None)),
        r"weight_decay_mask\.layers\[0\]\.weight is None, but a bool was expected",
    ),
    (
        "no bool",
        masked(put(decay_mask(MODEL), W0, 1)),
        r"weight_decay_mask\.layers\[0\]\.weight is the int 1, but a bool was expected",
    ),
    (
        "the model",
        masked(MODEL),
        r"weight_decay_mask\.layers\[0\]\.weight is a float32 array of shape \(4, 3\), "
        r"but a bool was expected",
    ),
    (
        "callable without bool",
        masked(lambda x: x),
        r"weight_decay_mask\.layers\[0\]\.weight is a float32 array of shape \(4, 3\), but a bool",
    ),
    (
        "a mask of optax",
        masked(mask_of_optax),
        "weight_decay_mask is the function `mask_of_optax`, which returns a tree of "
        r"bools.*: pass the tree `mask\(params\)` instead, with `params = "
        r"eqx.filter\(model, eqx.is_inexact_array\)`, or use `decay_mask\(model\)`\.$",
    ),
    (
        "a mask of optax for a part",
        masked({"a": mask_of_optax, "b": True}, {"a": MODEL, "b": jnp.ones(2)}),
        r"weight_decay_mask\['a'\] is the function `mask_of_optax`, which returns a tree",
    ),
    (
        "`decay_mask` itself",
        masked(decay_mask),
        "weight_decay_mask is the function `decay_mask`, which returns a tree of bools",
    ),
    (
        "a mask of optax as `trainable`",
        frozen(mask_of_optax),
        "trainable is the function `mask_of_optax`.*eqx.is_inexact_array\\)`\\.$",
    ),
    (
        "a mask of optax in a report",
        lambda: eqx_ademamix.decay_report(MODEL, mask_of_optax),
        "mask is the function `mask_of_optax`, which returns a tree of bools",
    ),
    (
        "wrong structure in update",
        lambda: update(
            AdEMAMix(1, weight_decay=0.1, weight_decay_mask=[True]), GRADS, STATE, MODEL
        ),
        "weight_decay_mask is a list of length 1",
    ),
    (
        "nothing trained",
        frozen(False),
        "`trainable` selects none of the arrays of `params`",
    ),
    # scales
    (
        "scales of another structure",
        scaled([1.0, 2.0]),
        "^scales is a list of length 2, but the parameters have an `MLP` there. Scales are a number",
    ),
    (
        "scales too deep",
        scaled({"w": {"x": 1.0}}, {"w": jnp.ones(2)}),
        r"scales\['w'\] is a dict with the keys 'x', but the parameters have a float32 array",
    ),
    (
        "no scale for an array",
        scaled(put(path_scales(MODEL, {}), W0, None)),
        r"`scales\.layers\[0\]\.weight` is None, but a scale was expected",
    ),
    (
        "a bool as a scale",
        scaled(put(path_scales(MODEL, {}), W0, True)),
        r"`scales\.layers\[0\]\.weight` is the bool True, but a scale was expected: a finite real",
    ),
    (
        "a NumPy bool as a scale",
        scaled(np.bool_(True)),
        r"`scales` is a bool array of shape \(\), but a scale was expected",
    ),
    (
        "a schedule as a scale",
        scaled({"w": optax.constant_schedule(1.0)}, {"w": jnp.ones(2)}),
        r"`scales\['w'\]` is the function `.*`, but a scale was expected",
    ),
    (
        "a scale in quotes",
        ruled({"bias": "0.5"}),
        r"`rules\['bias'\]` is the str '0.5', but a scale was expected",
    ),
    (
        "a complex scale",
        ruled({eqx.nn.Linear: jnp.asarray(1j)}),
        r"`rules\[Linear\]` is a complex64 array of shape \(\), but a scale was expected",
    ),
    (
        "NaN as a scale",
        ruled({"bias": np.nan}),
        r"`rules\['bias'\]` is nan, but a finite number was expected",
    ),
    (
        "infinite in float32",
        scaled(put(path_scales(MODEL, {}), W0, 1e39)),
        r"`scales\.layers\[0\]\.weight` is 1e\+39 \(inf in float32\), but a finite",
    ),
    (
        "NaN in an array",
        scaled([np.asarray([0, np.nan])], [jnp.ones(2)]),
        r"`scales\[0\]` is a float64 array of shape \(2,\) with NaN or infinite entries in float32",
    ),
    (
        "a scale with another size",
        scaled(np.ones(3), {"w": jnp.ones((3, 4)), "b": [jnp.ones((2, 3))]}),
        r"`scales` has shape \(3,\) at \['b'\]\[0\], where the parameter has shape \(2, 3\)",
    ),
    (
        "a scale with too many axes",
        scaled(np.ones((3, 1)), jnp.ones(3)),
        r"`scales` has shape \(3, 1\) at \(the tree itself\), where the parameter has shape \(3,\)",
    ),
    (
        "a rule with another size",
        ruled({"bias": 1, "layers": jnp.ones(4)}),
        r"`rules\['layers'\]` has shape \(4,\) at \.layers\[2\]\.weight, "
        r"where the parameter has shape \(2, 4\)",
    ),
    (
        "rules that are not pairs",
        ruled(["bias", "weight"]),
        "`rules` is a list of length 2, but a mapping from regular expressions or types",
    ),
    ("a rule alone", ruled(0.5), "`rules` is the float 0.5, but a mapping from"),
    (
        "a module as a key",
        ruled([(eqx.nn.Identity(), 0.5)]),
        r"`rules` has the key Identity\(\), but a regular expression or a type was expected",
    ),
    (
        "a pattern of bytes",
        ruled({b"bias": 0.5}),
        r"`rules` has the key b'bias', but a regular expression or a type was expected",
    ),
    (
        "an invalid pattern",
        ruled({"layers[0": 0.5}),
        r"`rules` has the key 'layers\[0', which is not a regular expression \(unterminated",
    ),
    (
        "a pattern without its backslash",
        ruled({"layers[0]": 0.5}),
        r"`rules\['layers\[0\]'\]` matches none of the model's 6 floating-point or complex arrays: "
        r"\.layers\[0\]\.weight, \.layers\[0\]\.bias, \.layers\[1\]\.weight, \.\.\.\. Correct the key",
    ),
    (
        "a type that is not there",
        ruled({eqx.nn.Embedding: 0.5}, {"w": jnp.ones(2), "n": 3}),
        r"`rules\[Embedding\]` matches none of the model's 1 floating-point or complex arrays: \['w'\]\.",
    ),
    (
        "rules for a model without arrays",
        ruled({"n": 0.5}, {"n": 3}),
        r"`rules\['n'\]` matches none of the model's 0 .*: it has none\.",
    ),
    (
        "nothing trained by callable",
        frozen(lambda x: x.ndim > 5),
        "`trainable` selects none of the arrays of `params`",
    ),
    (
        "trainable of wrong structure",
        frozen({"w": True}),
        "trainable is a dict with the keys 'w', but the parameters have an `MLP` there",
    ),
    (
        "trainable no bool",
        frozen("all"),
        r"trainable\.layers\[0\]\.weight is the str 'all', but a bool was expected",
    ),
    (
        "unfrozen since",
        lambda: update(
            OPTIM, GRADS, init(AdEMAMix(1, trainable=lambda x: x.ndim > 1), MODEL)
        ),
        r"grads\.layers\[0\]\.bias is trained \(a float32 array of shape \(4,\)\), "
        r"but the optimizer state has no moment there.*`trainable=filter_spec`, and pass",
    ),
    (
        "unfrozen since, params",
        lambda: update(
            OPTIM,
            GRADS,
            init(AdEMAMix(1, trainable=lambda x: x.ndim > 1), MODEL),
            MODEL,
        ),
        r"params\.layers\[0\]\.bias is trained",
    ),
    (
        "frozen since",
        lambda: update(
            AdEMAMix(1, trainable=lambda x: x.ndim > 1), GRADS, STATE, MODEL
        ),
        r"params\.layers\[0\]\.bias is None, .* has `trainable` changed since then",
    ),
    # hyperparameters
    (
        "b1 of 1",
        make(1e-3, b1=1.0),
        r"`b1` is 1.0, but a number in \[0, 1\) was expected",
    ),
    ("b2 negative", make(1e-3, b2=-0.1), r"`b2` is -0.1, but a number in \[0, 1\)"),
    (
        "b3 over 1",
        make(1e-3, b3=jnp.asarray(1.5)),
        r"`b3` is 1.5, but a number in \[0, 1\)",
    ),
    (
        "b3 rounds to 1",
        make(1e-3, b3=np.asarray(1 - 1e-9)),
        r"`b3` is 0.999999999 \(1.0 in float32\), but a number in \[0, 1\)",
    ),
    (
        "alpha negative",
        make(1e-3, alpha=-1),
        "`alpha` is -1.0, but a finite number >= 0",
    ),
    (
        "max_slow_ratio of 0",
        make(1e-3, max_slow_ratio=0),
        "`max_slow_ratio` is 0.0, but a finite number > 0, or None for no limit, was",
    ),
    (
        "clip_update_rms too small for float32",
        make(1e-3, clip_update_rms=1e-60),
        r"`clip_update_rms` is 1e-60 \(0.0 in float32\), but a finite number > 0, or None",
    ),
    (
        "clip_update_rms infinite",
        make(1e-3, clip_update_rms=jnp.asarray(jnp.inf)),
        "`clip_update_rms` is inf, but a finite number > 0, or None for no limit",
    ),
    (
        "a schedule as a limit",
        make(1e-3, max_slow_ratio=lambda count: 1.0),
        "`max_slow_ratio` is .*, but a finite number > 0, or None for no limit, was",
    ),
    (
        "a bool as a limit",
        make(1e-3, clip_update_rms=True),
        "`clip_update_rms` is the bool True, but a finite number > 0, or None",
    ),
    (
        "skip_nonfinite is a number",
        make(1e-3, skip_nonfinite=1),
        "`skip_nonfinite` is the int 1, but a bool was expected",
    ),
    (
        "alpha infinite",
        make(1e-3, alpha=float("inf")),
        "`alpha` is inf, but a finite number >= 0",
    ),
    (
        "learning rate NaN",
        make(float("nan")),
        "`learning_rate` is nan, but a finite number was expected",
    ),
    (
        "learning rate infinite",
        make(jnp.asarray(jnp.inf)),
        "`learning_rate` is inf, but a finite number",
    ),
    (
        "eps negative",
        make(1e-3, eps=-1e-8),
        "`eps` is -1e-08, but a finite number >= 0",
    ),
    ("eps_root NaN", make(1e-3, eps_root=np.nan), "`eps_root` is nan"),
    (
        "both eps 0",
        make(1e-3, eps=0),
        "`eps` and `eps_root` are both 0, but one must be positive",
    ),
    ("weight decay negative", make(1e-3, weight_decay=-0.1), "`weight_decay` is -0.1"),
    (
        "not scalar",
        make(jnp.ones(16)),
        r"`learning_rate` has shape \(16,\), "
        r"but a scalar was expected. For a sweep, .*`eqx.filter_vmap`",
    ),
    (
        "not scalar b1",
        make(1e-3, b1=np.ones((1,)) / 2),
        r"`b1` has shape \(1,\), but a scalar",
    ),
    (
        "a string",
        make("1e-3"),
        "`learning_rate` is the str '1e-3', but a finite number was expected",
    ),
    ("None", make(1e-3, b2=None), "`b2` is None, but a number"),
    ("a bool", make(1e-3, alpha=True), "`alpha` is the bool True"),
    (
        "complex",
        make(1e-3, alpha=jnp.asarray(1j)),
        "`alpha` has dtype complex64, but a real number",
    ),
    (
        "a schedule for eps",
        make(1e-3, eps=lambda count: 1e-8),
        "`eps` is the function `<lambda>`, but a finite number >= 0",
    ),
    (
        "16-bit b1",
        make(1e-3, b1=BF16),
        "`b1` is a bfloat16 array of shape .*hyperparam_dtype=jnp.float32",
    ),
    (
        "16-bit b2",
        make(1e-3, b2=np.float16(0.9)),
        "`b2` is a float16 array of shape .*0.9999 rounds to 1 in float16",
    ),
    ("16-bit b3", make(1e-3, b3=BF16), "`b3` is a bfloat16 array"),
    (
        "too large for float32",
        make(1e39),
        r"`learning_rate` is 1e\+39 \(inf in float32\), but a finite number",
    ),
    (
        "an int too large",
        make(1e-3, alpha=10**400),
        "`alpha` is inf, but a finite number >= 0",
    ),
    (
        "swapped schedules",
        make(1e-3, b3=eqx_ademamix.alpha_scheduler(1.0)),
        "`b3` is an `AlphaSchedule`, .* swapped",
    ),
    (
        "8-bit b1",
        make(1e-3, b1=jnp.asarray(0.5, jnp.float8_e4m3fn)),
        "`b1` is a float8_e4m3fn array",
    ),
    (
        "format",
        make(1e-3, state_format=jnp.float32),
        "`state_format` is .*, but a `StateFormat` was expected",
    ),
    (
        "b3 of a schedule above 1",
        lambda: stepped(b3=lambda count: 2.0),
        r"`b3\(count\)` is 2.0, but a number in \[0, 1\) was expected",
    ),
    (
        "b3 of a schedule 1",
        lambda: stepped(b3=lambda count: 1),
        r"`b3\(count\)` is 1.0, but a number in \[0, 1\)",
    ),
    (
        "b3 of a schedule NaN",
        lambda: stepped(b3=lambda count: np.nan),
        r"`b3\(count\)` is nan, but a number in \[0, 1\)",
    ),
    (
        "b3 of a schedule, an array",
        lambda: stepped(b3=lambda count: jnp.asarray(1.5)),
        r"`b3\(count\)` is 1.5, but a number in \[0, 1\)",
    ),
    (
        "alpha of a schedule negative",
        lambda: stepped(alpha=lambda count: -5.0),
        r"`alpha\(count\)` is -5.0, but a finite number >= 0 was expected",
    ),
    (
        "rate of a schedule NaN",
        lambda: stepped(learning_rate=lambda count: float("nan")),
        r"`learning_rate\(count\)` is nan, but a finite number was expected",
    ),
    (
        "decay of a schedule negative",
        lambda: stepped(weight_decay=lambda count: np.float32(-1)),
        r"`weight_decay\(count\)` is -1.0, but a finite number >= 0",
    ),
    (
        "schedule in a jitted step",
        lambda: eqx.filter_jit(stepped)(b3=lambda count: 2.0),
        r"`b3\(count\)` is 2.0, but a number in \[0, 1\)",
    ),
    (
        "b1 of a schedule, simplified",
        lambda: update(
            SimplifiedAdEMAMix(1, lambda count: 1.0), GRADS, init(SIMPLIFIED, MODEL)
        ),
        r"`b1\(count\)` is 1.0, but a number in \[0, 1\)",
    ),
    (
        "complement of a schedule",
        lambda: stepped(b3=Complement()),
        r"`b3.complement\(count\)` is 0.0, but a number in \(0, 1\] was expected",
    ),
    (
        "the warm-up as the start",
        lambda: eqx_ademamix.alpha_scheduler(5.0, 1000),
        "`alpha_start` is 1000, above the final value 5, but without a warm-up it has no effect",
    ),
    (
        "a start of b3 without a warm-up",
        lambda: eqx_ademamix.beta3_scheduler(0.9, 0.99),
        "`beta_start` is 0.99, above the final value 0.9, but without a warm-up",
    ),
    (
        "format of integers",
        lambda: StateFormat(jnp.int8, jnp.float32, jnp.float32),
        r"`StateFormat\(m1=...\)` is .*, but one of the dtypes float16, bfloat16",
    ),
    (
        "format of nothing",
        lambda: StateFormat(None, None, None),
        r"`StateFormat\(m1=...\)` is None",
    ),
    (
        "codec class",
        lambda: StateFormat(ScaledFloat8, ScaledFloat16, ScaledFloat8),
        r"`StateFormat\(m1=...\)` is the class `ScaledFloat8`, but one of the dtypes",
    ),
    (
        "codec without sign",
        lambda: StateFormat(jnp.float32, ScaledFloat16(signed=False), jnp.float32),
        r""
        r"`StateFormat\(m2=...\)` is ScaledFloat16\(.*\), which has no negative numbers. "
        r"Leave out `signed=False`",
    ),
    (
        "min_size a bool",
        lambda: StateFormat(jnp.float32, jnp.float32, jnp.float32, min_size=True),
        "`min_size` is the bool True, but an integer >= 0 was expected",
    ),
    (
        "min_size negative",
        lambda: StateFormat(jnp.float32, jnp.float32, jnp.float32, min_size=-1),
        "`min_size` is the int -1, but an integer >= 0",
    ),
    (
        "block_size 0",
        lambda: ScaledFloat16(0),
        r"`ScaledFloat16\(block_size=...\)` is the int 0, but a positive integer was expected",
    ),
    (
        "block_size a float",
        lambda: ScaledFloat8(256.0),
        r"`ScaledFloat8\(block_size=...\)` is the float 256.0, but a positive integer",
    ),
    (
        "encoded, but float32 expected",
        lambda: update(OPTIM, GRADS, COMPACT_STATE, MODEL),
        r"state\.m1\.layers\[0\]\.weight is stored as ScaledFloat8\(.*\), "
        r"but float32 was expected for this parameter and `state_format`",
    ),
    (
        "float32, but encoded expected",
        lambda: update(COMPACT, GRADS, STATE),
        r"state\.m1\.layers\[0\]\.weight is stored as float32, "
        r"but ScaledFloat8\(block_size=256, signed=True\) was expected",
    ),
    (
        "another codec",
        lambda: update(
            COMPACT,
            GRADS,
            put(COMPACT_STATE, lambda s: B2(s.nu), ScaledFloat8().zeros(jnp.ones(2))),
            MODEL,
        ),
        r"state\.nu\.layers\[2\]\.bias is stored as ScaledFloat8\(block_size=256, signed=True\), "
        r"but ScaledFloat8\(block_size=256, signed=False\) was",
    ),
    (
        "codes of another dtype",
        lambda: update(
            COMPACT,
            GRADS,
            put(COMPACT_STATE, lambda s: B2(s.m2).real[0], jnp.zeros(2, jnp.int8)),
            MODEL,
        ),
        r""
        r"state\.m2\.layers\[2\]\.bias is stored as ScaledFloat16\(.*\) with the arrays "
        r"int8\[2\], float32\[1\], but",
    ),
    (
        "codes of another shape",
        lambda: update(
            COMPACT,
            GRADS,
            put(COMPACT_STATE, lambda s: B2(s.m2).real[0], jnp.zeros(3, jnp.int16)),
            MODEL,
        ),
        r"state\.m2\.layers\[2\]\.bias is a ScaledFloat16 moment of shape \(3,\), "
        r"but state\.nu has a ScaledFloat8 moment of shape \(2,\)",
    ),
    (
        "an imaginary part more",
        lambda: update(
            COMPACT,
            GRADS,
            eqx.tree_at(
                lambda s: W0(s.m1).imag,
                COMPACT_STATE,
                W0(COMPACT_STATE.m1).real,
                is_leaf=is_none,
            ),
            MODEL,
        ),
        r""
        r"state\.m1\.layers\[0\]\.weight is stored as ScaledFloat8\(.*\) with the arrays "
        r"int8\[4, 3\], float32\[1\], int8\[4, 3\], float32\[1\], but",
    ),
    (
        "a part lost",
        lambda: update(
            COMPACT, GRADS, put(COMPACT_STATE, lambda s: W0(s.m1).real[1], None), MODEL
        ),
        r""
        r"state\.m1\.layers\[0\]\.weight is stored as ScaledFloat8\(.*\) with the arrays "
        r"int8\[4, 3\], None\[\], but",
    ),
    (
        "all parts lost",
        lambda: update(
            COMPACT, GRADS, put(COMPACT_STATE, lambda s: W0(s.m1).real, ()), MODEL
        ),
        r"state\.m1\.layers\[0\]\.weight is a ScaledFloat8 moment of shape \(\), but state\.m2",
    ),
    (
        "codec with a leaf",
        lambda: StateFormat(Untupled(2.0), jnp.float32, jnp.float32),
        r"`StateFormat\(m1=...\)` is an `Untupled` with fields that are not static",
    ),
    (
        "codec with an array",
        lambda: StateFormat(jnp.float32, jnp.float32, Untupled(static=[1.0])),
        r"`StateFormat\(nu=...\)` is an `Untupled` with fields that are not static",
    ),
    (
        "codec without a tuple",
        lambda: init(
            AdEMAMix(
                1,
                state_format=StateFormat(
                    Untupled(), jnp.float32, jnp.float32, min_size=0
                ),
            ),
            MODEL,
        ),
        r"`Untupled.encode_real` returned .* for an array of shape \(4, 3\), "
        r"but a tuple was expected",
    ),
    (
        "encoded, of another model",
        lambda: update(COMPACT, GRADS, init(COMPACT, SWAPPED), MODEL),
        r"params\.layers\[0\]\.weight " + SHAPE.format("4, 3", "5, 3"),
    ),
    (
        "encoded moments on trees",
        lambda: eqx_ademamix.tree_update_moment(GRADS, COMPACT_STATE.m1, 0.9, 1),
        "`moments` has ScaledFloat8 moments, but this function takes arrays",
    ),
    (
        "encoded moments to correct",
        lambda: eqx_ademamix.tree_bias_correction(COMPACT_STATE.m1, 0.9, 1),
        "`moment` has ScaledFloat8 moments, but this function takes arrays",
    ),
    (
        "report of a model",
        lambda: eqx_ademamix.state_report(MODEL),
        "`state` has no states of AdEMAMix, but one was expected. Found in it: MLP",
    ),
    (
        "a stall report of a chain",
        lambda: eqx_ademamix.stall_report(optax.chain(ADAM), STATE, GRADS),
        "`optim` is .*, but an optimizer of this package was expected",
    ),
    (
        "a stall report of another model",
        lambda: eqx_ademamix.stall_report(OPTIM, STATE, put(GRADS, W0, jnp.ones(3))),
        r"grads\.layers\[0\]\.weight " + SHAPE.format("3,", "4, 3"),
    ),
    (
        "a stall report under jit",
        lambda: eqx.filter_jit(eqx_ademamix.stall_report)(OPTIM, STATE, GRADS),
        r"^`stall_report` returns Python numbers, but its arguments are traced\. Call it "
        r"outside of `jit`\.",
    ),
    (
        "diagnose of a number",
        lambda: eqx_ademamix.diagnose(3.0),
        "`history` is the float 3.0, but a list of dictionaries or the path of a CSV",
    ),
    (
        "diagnose of one dictionary",
        lambda: eqx_ademamix.diagnose({"step": 1}),
        "`history` is a dict with the keys 'step', but a list of dictionaries or the path of a CSV file",
    ),
    (
        "diagnose of losses",
        lambda: eqx_ademamix.diagnose([2.0, 1.0]),
        r"history\[0\] is the float 2.0, but a dictionary was expected, with what",
    ),
    (
        "diagnose of a vector",
        lambda: eqx_ademamix.diagnose([{"step": 1, "loss": jnp.ones(3)}]),
        r"`history` has .* of shape \(3,\) under 'loss', but numbers or arrays of shape",
    ),
    (
        "diagnose of text",
        lambda: eqx_ademamix.diagnose([{"loss": "high"}]),
        "`history` has rows, but no numbers under any key. A CSV file needs",
    ),
    (
        "diagnose with integer parameters",
        lambda: eqx_ademamix.diagnose([], param_dtype="int8"),
        "`param_dtype` is the str 'int8', but a floating-point dtype was expected",
    ),
    (
        "telemetry of a chain",
        lambda: eqx_ademamix.telemetry(optax.chain(ADAM), STATE),
        "`optim` is .*, but an optimizer of this package was expected",
    ),
    (
        "telemetry of another model's gradients",
        lambda: eqx_ademamix.telemetry(OPTIM, STATE, grads=put(GRADS, W0, jnp.ones(3))),
        r"^grads\.layers\[0\]\.weight " + SHAPE.format("3,", "4, 3"),
    ),
    (
        "telemetry of another model",
        lambda: eqx_ademamix.telemetry(OPTIM, STATE, params=SWAPPED),
        r"^params\.layers\[0\]\.weight " + SHAPE.format("5, 3", "4, 3"),
    ),
    (
        "telemetry of layers, but not of paths",
        lambda: eqx_ademamix.telemetry(OPTIM, STATE, stacked="layers"),
        r"^`stacked` names arrays whose layers get numbers of their own, but `per_path` "
        r"is False\. Pass `per_path=True` as well\.$",
    ),
    (
        "telemetry of layers that are not there",
        lambda: eqx_ademamix.telemetry(OPTIM, STATE, per_path=True, stacked="blocks"),
        r"^`stacked` has 'blocks', which is found in none of the 6 paths of trained "
        r"arrays that have an axis: \.layers\[0\]\.weight, .*, \.\.\.\. Correct the "
        r"pattern, or leave it out\.$",
    ),
    (
        "telemetry with a flag that is not a bool",
        lambda: eqx_ademamix.telemetry(OPTIM, STATE, per_path="layers"),
        r"^`per_path` is the str 'layers', but a bool was expected\.",
    ),
    # Many devices
    (
        "a moving average of integers",
        lambda: eqx_ademamix.tree_update_moment(
            {"w": jnp.ones(2)}, {"w": jnp.zeros(2, jnp.int32)}, 0.9, 1
        ),
        r"^moments\['w'\] is an int32 array of shape \(2,\), but a moving average must",
    ),
    (
        "an axis that the mesh does not have",
        lambda: state_sharding(OPTIM, MODEL, MESH, axis="rows"),
        r"^`axis` is 'rows', but `mesh` has the axes 'data', 'model'\.$",
    ),
    (
        "an axis of one device",
        lambda: state_sharding(OPTIM, MODEL, MESH, axis="data"),
        r"^`axis` is 'data', of size 1, but none of the 6 trained arrays has an axis "
        r"that can be split 1 ways\. The state would be replicated: choose another "
        r"axis of the mesh\.$",
    ),
    (
        "parameters on another mesh",
        lambda: state_sharding(OPTIM, SPLIT, MESH, axis="model"),
        r"^params\['w'\] is sharded with NamedSharding\(.*, but not over `mesh`: "
        r"Mesh\(.*\), with the devices \[0, 1, 2, 3, 4, 5, 6, 7\]\. Put the "
        r"parameters on this mesh, or describe them with `jax\.ShapeDtypeStruct`\.$",
    ),
    # Offloaded
    (
        "Offloaded, wrong optimizer",
        lambda: Offloaded(COMPENSATED),
        "`optim` is a `Compensated`, but `Offloaded` goes directly around an `AdEMAMix`",
    ),
    (
        "Offloaded, a class",
        lambda: Offloaded(AdEMAMix),
        "`optim` is the class `AdEMAMix`, but `Offloaded` goes directly around",
    ),
    (
        "Offloaded, wrong name",
        lambda: Offloaded(OPTIM, ("m2", "m3")),
        r"`moments` is \('m2', 'm3'\), but a tuple of names was expected. The moments of "
        "this AdEMAMix are 'm1', 'm2', 'nu'",
    ),
    (
        "Offloaded, no name",
        lambda: Offloaded(OPTIM, ()),
        r"`moments` is \(\), but a tuple of names was expected",
    ),
    (
        "Offloaded, a string",
        lambda: Offloaded(OPTIM, "m2"),
        "`moments` is the str 'm2', but a tuple of names was expected",
    ),
    (
        "Offloaded, b1=0",
        lambda: Offloaded(AdEMAMix(1e-3, b1=0.0), ("m1",)),
        "The moments of this AdEMAMix are 'm2', 'nu'",
    ),
    (
        "Offloaded, the default names",
        lambda: Offloaded(SIMPLIFIED),
        "The moments of this SimplifiedAdEMAMix are 'm', 'nu'",
    ),
    # Compensated
    (
        "no optimizer",
        lambda: Compensated(1e-3),
        "`optim` is the float 0.001, but an optimizer of this package or of optax",
    ),
    (
        "an optimizer's class",
        lambda: Compensated(AdEMAMix),
        "`optim` is the class `AdEMAMix`, but an optimizer",
    ),
    (
        "bits",
        lambda: Compensated(OPTIM, bits=12),
        "`bits` is the int 12, but 8 or 16 was expected",
    ),
    (
        "no params",
        lambda: update(COMPENSATED, GRADS16, STATE16),
        "`params` is missing, but `Compensated` needs the parameters",
    ),
    (
        "cast since",
        lambda: update(COMPENSATED, GRADS16, STATE16, MODEL),
        r"params\.layers\[0\]\.weight has dtype float32, "
        r"but the state keeps a remainder for bfloat16 there",
    ),
    (
        "cast since, to another 16 bits",
        lambda: update(COMPENSATED, GRADS16, STATE16, half(MODEL, jnp.float16)),
        r"params\.layers\[0\]\.weight has dtype float16, "
        r"but the state keeps a remainder for bfloat16 there",
    ),
    (
        "cast since, from float32",
        lambda: update(
            COMPENSATED,
            GRADS16,
            init(COMPENSATED, eqx.tree_at(B2, MODEL, B2(MODEL16))),
            MODEL16,
        ),
        r"params\.layers\[0\]\.weight has dtype bfloat16, but the state keeps no remainder for it",
    ),
    (
        "no remainders",
        lambda: update(
            COMPENSATED, GRADS16, put(STATE16, lambda s: s.remainder, None), MODEL16
        ),
        "state.remainder is None, but it must have the structure of the parameters",
    ),
    (
        "gradients that broadcast, optax",
        lambda: update(SGD, put(GRADS16, W0, jnp.ones(3)), SGD_STATE, MODEL16),
        r"grads\.layers\[0\]\.weight has shape \(3,\), but the optimizer state has \(4, 3\)",
    ),
    (
        "complex gradients, optax",
        lambda: update(
            SGD, put(GRADS16, W0, jnp.ones((4, 3), complex)), SGD_STATE, MODEL16
        ),
        r"grads\.layers\[0\]\.weight has dtype complex64, but the optimizer state is for a real",
    ),
    (
        "no gradient, optax",
        lambda: update(SGD, put(GRADS16, W0, None), SGD_STATE, MODEL16),
        r"grads\.layers\[0\]\.weight is None, but the optimizer state has an int16 array",
    ),
    (
        "nothing to train, Compensated",
        lambda: init(COMPENSATED, {"n": 3}),
        "None of the leaves of `params` is a floating-point",
    ),
    (
        "hyperparams of a chain",
        lambda: hyperparams(optax.chain(OPTIM), STATE),
        "`optim` is a `GradientTransformationExtraArgs`, but an optimizer of this package was "
        "expected. Pass the optimizer of this package that it contains",
    ),
    (
        "decoded without a state",
        lambda: eqx_ademamix.decoded(SGD_STATE),
        "`state` has no states of AdEMAMix, but at least one was expected. Found in it: "
        "CompensatedState, EmptyState. Pass",
    ),
    (
        "a target without AdEMAMix",
        lambda: eqx_ademamix.from_adamw(ADAM_STATE, optax.sgd(1e-3), MODEL),
        "`optim` is a `GradientTransformationExtraArgs`, whose state has no states of AdEMAMix, "
        "but one was expected. Found in it: EmptyState. Pass an optimizer of this package",
    ),
    (
        "counters that differ",
        lambda: eqx_ademamix.from_adamw(
            (ADAM_STATE, *map(counted, (3, 7))),
            optax.chain(OPTIM, optax.scale_by_schedule(lambda count: count)),
            MODEL,
        ),
        r"`opt_state` has 2 counters `ScaleByScheduleState\.count` \(3, 7\), but the state of "
        "`optim` has 1, so it is unclear from which number",
    ),
    (
        "Simplified AdEMAMix in a chain",
        lambda: eqx_ademamix.from_optax(
            eqx_ademamix.to_optax(init(SIMPLIFIED, MODEL)),
            optax.chain(SIMPLIFIED),
            MODEL,
        ),
        "`optim` is a `GradientTransformationExtraArgs`, but `num` is computed from the `b1` of the",
    ),
    (
        "a weight that optax does not keep",
        lambda: eqx_ademamix.to_optax(
            init(AdEMAMix(1e-3, bias_correct_m2=True), MODEL)
        ),
        "`state` has `m2_weight`, which optax's optimizers do not keep: their `b1` and",
    ),
    (
        "no m1 in another format",
        lambda: eqx_ademamix.change_state_format(
            init(AdEMAMix(1e-3, b1=0), MODEL), OPTIM, MODEL
        ),
        "`state` has no `m1`, since its optimizer has `b1=0`, but `optim` needs one",
    ),
    (
        "a batch of states",
        lambda: hyperparams(
            OPTIM, put(STATE, lambda s: s.count, jnp.zeros(2, jnp.int32))
        ),
        r"state\.count is an int32 array of shape \(2,\), but a scalar was expected. For a batch",
    ),
    (
        "a flag that is a number",
        lambda: SimplifiedAdEMAMix(1e-3, normalize=1),
        "`normalize` is the int 1, but a bool was expected. Pass True or False",
    ),
    (
        "two divisors",
        lambda: SimplifiedAdEMAMix(1e-3, normalize=True, bias_correct_m1=True),
        "`bias_correct_m1` and `normalize` are both true, but each divides",
    ),
    (
        "review of no steps",
        lambda: eqx_ademamix.review(OPTIM, num_steps=0),
        r"`num_steps` is the int 0, but an int from 1 to 2\*\*31 - 1 was expected",
    ),
    (
        "review of 1e5 steps",
        lambda: eqx_ademamix.review(OPTIM, num_steps=1e5),
        "`num_steps` is the float 100000.0, but an int from 1 to",
    ),
    (
        "review of a chain",
        lambda: eqx_ademamix.review(optax.chain(OPTIM), num_steps=9),
        "`optim` is a `GradientTransformationExtraArgs`, but `review` sees no optimizer of this package in it",
    ),
    (
        "review of a wrapped chain",
        lambda: eqx_ademamix.review(Compensated(optax.chain(OPTIM)), num_steps=9),
        "`optim` is a `Compensated`, but `review` sees no optimizer of this package in it",
    ),
    (
        "review of a list without an optimizer of ours",
        lambda: eqx_ademamix.review([optax.sgd(1.0)], num_steps=9),
        "`optim` is a list of length 1, but `review` sees no optimizer of this package in it",
    ),
    (
        "review of a list with a model",
        lambda: eqx_ademamix.review([OPTIM, MODEL], num_steps=9),
        r"`optim\[1\]` is an `MLP`, but an optimizer was expected. The list has the",
    ),
    (
        "review of a list with a class",
        lambda: eqx_ademamix.review([AdEMAMix], num_steps=9),
        r"`optim\[0\]` is the class `AdEMAMix`, but an optimizer was expected",
    ),
    (
        "review under jit",
        lambda: jax.jit(
            lambda a: eqx_ademamix.review(AdEMAMix(1e-3, alpha=a), num_steps=9)
        )(1.0),
        "`alpha` is traced, but `review` reads numbers. Call it outside of `jit`",
    ),
    (
        "scale_to of a function",
        lambda: scaled_up(AdEMAMix(1e-3, b3=lambda t: 0.999)),
        "`b3` is the function `<lambda>`, but there is no published fit for such",
    ),
    (
        "scale_to of a learning rate of 0",
        lambda: scaled_up(AdEMAMix(0.0)),
        "The largest learning rate of `optim` is 0, but a positive number was expected",
    ),
    (
        "scale_to of a warm-up alone",
        lambda: scaled_up(AdEMAMix(optax.linear_schedule(0.0, 1e-3, 9))),
        "`learning_rate` is .*, and no schedule of `optim` says how long its run is",
    ),
    (
        "scale_to under jit",
        lambda: jax.jit(lambda a: scaled_up(AdEMAMix(1e-3, alpha=a)))(1.0),
        "`optim.alpha` is .*, but `scale_to` needs a concrete number. Call it outside",
    ),
    (
        "scale_to of no steps",
        lambda: eqx_ademamix.scale_to(OPTIM, steps=0, batch_tokens=9, params=9),
        "`steps` is 0.0, but a finite number > 0 was expected",
    ),
    (
        "extend SimplifiedAdEMAMix",
        lambda: eqx_ademamix.extend(SIMPLIFIED, init(SIMPLIFIED, MODEL), warmup=9),
        "`optim` is a `SimplifiedAdEMAMix`, but this function supports only an `AdEMAMix`",
    ),
    (
        "extend Compensated",
        lambda: eqx_ademamix.extend(COMPENSATED, STATE16, warmup=9),
        "`optim` is a `Compensated`, but this function supports only an `AdEMAMix`",
    ),
    (
        "bits a float",
        lambda: Compensated(OPTIM, bits=16.0),
        "`bits` is the float 16.0, but 8 or 16 was expected",
    ),
    (
        "other bits",
        lambda: update(Compensated(OPTIM, bits=8), GRADS16, STATE16, MODEL16),
        r"state\.remainder\.layers\[0\]\.weight has dtype int16, but int8 was expected at `bits=8`",
    ),
    (
        "state of the wrapped",
        lambda: update(COMPENSATED, GRADS16, STATE, MODEL16),
        "`state` is an `AdEMAMixState`, but a `CompensatedState` was expected",
    ),
    (
        "Compensated, another model",
        lambda: update(COMPENSATED, GRADS16, STATE16, half(SWAPPED)),
        r"params\.layers\[0\]\.weight has shape \(5, 3\), but the optimizer state has \(4, 3\)",
    ),
    (
        "Compensated, gradients",
        lambda: update(
            COMPENSATED, put(GRADS16, W0, jnp.ones((4, 1))), STATE16, MODEL16
        ),
        r"grads\.layers\[0\]\.weight has shape \(4, 1\), but the optimizer state has \(4, 3\)",
    ),
    (
        "Compensated, swapped",
        lambda: update(COMPENSATED, STATE16, GRADS16, MODEL16),
        "`grads` is a `CompensatedState`: were `grads` and `state` swapped",
    ),
    (
        "Compensated, master of another",
        lambda: COMPENSATED.master_params(MODEL, STATE16),
        r"params\.layers\[0\]\.weight has dtype float32, "
        r"but the state keeps a remainder for bfloat16",
    ),
    (
        "format of float64",
        lambda: StateFormat(jnp.float32, jnp.float64, jnp.float32),
        "is float64, but JAX has 64-bit types disabled",
    ),
    # schedules
    (
        "16-bit b3",
        scheduled("b3", lambda count: BF16),
        r"`b3\(count\)` is a bfloat16 array",
    ),
    (
        "16-bit b3 since",
        lambda: update(eqx.tree_at(lambda o: o.b3, OPTIM, BF16), GRADS, STATE),
        "`b3` is a bfloat16 array",
    ),
    (
        "alpha of shape (3,)",
        scheduled("alpha", lambda count: jnp.ones(3)),
        r"`alpha\(count\)` has shape \(3,\), but a scalar was expected",
    ),
    (
        "learning rate None",
        scheduled("learning_rate", lambda count: None),
        r"`learning_rate\(count\)` is None, but a finite number was expected",
    ),
    (
        "b3 complex",
        scheduled("b3", lambda count: jnp.asarray(1j)),
        r"`b3\(count\)` has dtype complex64",
    ),
    (
        "learning rate batched since",
        lambda: update(
            eqx.tree_at(lambda o: o.alpha, OPTIM, jnp.ones(4)), GRADS, STATE
        ),
        r"`alpha` has shape \(4,\), but a scalar",
    ),
    # make_step
    (
        "make_step in another order",
        lambda: make_step(OPTIM, loss_of_arrays),
        r"`loss_fn` is an `AdEMAMix`, but a function was expected. .*`make_step\(loss_fn, optim\)`",
    ),
    (
        "make_step with a class",
        lambda: make_step(mean, AdEMAMix),
        "`optim` is the class `AdEMAMix`",
    ),
    (
        "grad_transform",
        lambda: make_step(mean, OPTIM, grad_transform=optax.clip_by_global_norm),
        "`grad_transform` is the function `clip_by_global_norm`, but an optax transformation",
    ),
    (
        "has_aux",
        lambda: make_step(mean, OPTIM, has_aux=1),
        "`has_aux` is the int 1, but a bool",
    ),
    (
        "donate",
        lambda: make_step(mean, OPTIM, donate=None),
        "`donate` is None, but a bool",
    ),
    (
        "steps_per_call",
        lambda: make_step(mean, OPTIM, steps_per_call=0),
        "`steps_per_call` is the int 0, but an integer >= 1 was expected",
    ),
    (
        "pack_below",
        lambda: make_step(mean, OPTIM, pack_below=True),
        "`pack_below` is the bool True, but an integer >= 0 was expected",
    ),
    (
        "the model as a carry",
        lambda: MEAN_STEP(PARAMS),
        r"`carry` is a float32 array of shape \(2,\), but a carry was expected, as `step.init\(model\)`",
    ),
    (
        "all that a step returned",
        lambda: MEAN_STEP(MEAN_STEP(MEAN_STEP.init(PARAMS))),
        r"`carry` is a tuple of length 2, .* `carry, loss = step\(carry, \*batch\)`",
    ),
    (
        "the carry of another step",
        lambda: MEAN_STEP(make_step(mean, SGD.optim).init(PARAMS)),
        r"`carry` was made by another step. .* call `step.pack\(model, state\)`",
    ),
    (
        "unpacking the carry of another step",
        lambda: MEAN_STEP.unpack(make_step(mean, SGD.optim).init(PARAMS)),
        r"`carry` was made by another step",
    ),
    (
        "a donated carry",
        donated_carry(lambda step, carry: step(carry)),
        "`carry` was used by an earlier call, to which its arrays were donated",
    ),
    (
        "unpacking a donated carry",
        donated_carry(lambda step, carry: step.unpack(carry)),
        "`carry` was used by an earlier call",
    ),
    (
        "packing a description of a state",
        lambda: make_step(mean, OPTIM).pack(PARAMS, jax.eval_shape(OPTIM.init, PARAMS)),
        r"state\.count is a `jax.ShapeDtypeStruct`, which has no numbers to train",
    ),
    (
        "a description of a model",
        lambda: MEAN_STEP.init(jax.eval_shape(lambda: PARAMS)),
        r"model is a `jax.ShapeDtypeStruct`, which has no numbers to train",
    ),
    ("a donated batch", donated_batch, r"batch\[0\]\['x'\] has been deleted"),
    ("a donated learning rate", donated_rate, r"optim.learning_rate has been deleted"),
    (
        "a carry that was cast",
        changed_carry,
        r"carry.arrays\[0\] is a bfloat16 array of shape \(2,\), but it was a float32 array of shape \(2,\). Change",
    ),
    (
        "no loss",
        run(lambda model: None),
        r"`loss_fn` returned None as the loss, but a floating-point array of shape \(\)",
    ),
    (
        "a loss with a shape",
        run(lambda model: model**2),
        r"`loss_fn` returned a float32 array of shape \(2,\) as the loss, .* `jnp.mean`",
    ),
    (
        "a complex loss",
        run(lambda model: jnp.sum(model).astype(complex)),
        r"`loss_fn` returned a complex64 array of shape \(\) as the loss",
    ),
    (
        "aux without has_aux",
        run(lambda model: (mean(model), model)),
        r"`loss_fn` returned a tuple of length 2 as the loss, .* pass `has_aux=True`",
    ),
    (
        "has_aux without aux",
        run(mean, has_aux=True),
        r"`loss_fn` returned a float32 array of shape \(\), but the pair `\(loss, aux\)` was expected",
    ),
    (
        "aux of text",
        run(lambda model: (mean(model), {"name": "text"}), has_aux=True),
        r"aux\['name'\] is the str 'text', but `loss_fn` can return only arrays and numbers",
    ),
    (
        "no model_state",
        with_state(mean, jnp.ones(2)),
        r"`loss_fn` returned a float32 array of shape \(\), but the pair `\(loss, model_state\)`",
    ),
    (
        "model_state and aux in a triple",
        with_state(lambda model, s: (mean(model), s, 1), jnp.ones(2), has_aux=True),
        r"returned a tuple of length 3, but the pair `\(loss, \(model_state, aux\)\)` was expected",
    ),
    (
        "model_state without aux",
        with_state(lambda model, s: (mean(model), s), jnp.ones(3), has_aux=True),
        r"returned a loss and a float32 array of shape \(3,\), but the pair `\(model_state, aux\)`",
    ),
    (
        "model_state with another structure",
        with_state(lambda model, s: (mean(model), {}), {"n": jnp.ones(2)}),
        r"model_state is a dict without the key 'n' after a step, but it was one with it before",
    ),
    (
        "model_state that counts in Python",
        with_state(lambda model, s: (mean(model), {"n": s["n"] + 1}), {"n": 0}),
        r"model_state\['n'\] is the int 1 after a step, but it was the int 0 before it",
    ),
    (
        "model_state with another dtype in a loop",
        with_state(
            lambda model, s: (mean(model), s.astype(float)),
            jnp.ones(2, int),
            steps_per_call=2,
        ),
        r"model_state is a float32 array of shape \(2,\) after a step, but it was an int32",
    ),
    (
        "text in a batch",
        run(MEAN_STEP, {"x": jnp.ones(2), "name": "text"}),
        r"batch\[0\]\['name'\] is the str 'text', but a batch has only arrays and numbers",
    ),
    (
        "a batch without the first axis",
        run(mean, jnp.ones(3), {"y": jnp.ones((2, 3))}, steps_per_call=3),
        r"batch\[1\]\['y'\] has shape \(2, 3\), but with `steps_per_call=3` the first axis",
    ),
    (
        "a number in a stacked batch",
        run(mean, 1.0, steps_per_call=3),
        r"batch\[0\] has shape \(\), but with `steps_per_call=3`",
    ),
    (
        "packing the state of another model",
        packed(init(OPTIM, SWAPPED)),
        r"state.m1.layers\[0\].weight is a float32 array of shape \(5, 3\), but for this model and "
        r"optimizer it is a float32 array of shape \(4, 3\)",
    ),
    (
        "packing the state of a deeper model",
        packed(init(OPTIM, DEEPER)),
        r"state.m1.layers is a tuple of length 4, but for this model and optimizer it is a tuple of length 3",
    ),
    (
        "packing the state of another optimizer",
        packed(ADAM_STATE),
        r"state is a tuple of length 2, but for this model and optimizer it is an `AdEMAMixState`",
    ),
    (
        "packing one state of two",
        packed(STATE, grad_transform=optax.clip_by_global_norm(1.0)),
        r"state is an `AdEMAMixState`, but .* it is a tuple of length 2.* With `grad_transform`, `state` is the pair",
    ),
    (
        "packing an encoded state",
        packed(init(AdEMAMix(1e-3, b1=0.0), MODEL)),
        r"state.m1.layers\[0\].weight is None, but for this model and optimizer it is a float32 array",
    ),
    (
        "nothing to train in a step",
        lambda: make_step(mean, OPTIM).init({"n": 1}),
        "None of the leaves of `params` is a floating-point",
    ),
    # checkpoints (those that need a file are in test_checkpoint.py)
    (
        "saving, swapped",
        lambda: save(STATE, "run"),
        r"`path` is an `AdEMAMixState`, but the path of a file was expected. The order of the arguments is `save\(path, tree\)`",
    ),
    (
        "loading from an open file",
        lambda: load(io.BytesIO(), STATE),
        "`path` is a `BytesIO`, but the path of a file was expected",
    ),
    (
        "loading without a file",
        lambda: load("missing/run", STATE),
        r"There is no checkpoint missing/run\.",
    ),
    (
        "saving under jit",
        lambda: jax.jit(lambda x: save("run", {"w": x}))(jnp.ones(3)),
        r"tree\['w'\] is traced, but a file can be neither read nor written",
    ),
    (
        "loading under jit",
        lambda: jax.jit(lambda x: load("run", {"w": x}))(jnp.ones(3)),
        r"like\['w'\] is traced, but a file can be neither read nor written",
    ),
    (
        "saving with a traced hyperparameter",
        lambda: jax.jit(lambda x: save("run", MODEL, optim=AdEMAMix(x)))(1e-3),
        r"optim\.learning_rate is traced, but a file",
    ),
    (
        "saving shapes",
        lambda: save("run", [jax.eval_shape(lambda: jnp.ones(3))]),
        r"tree\[0\] is a `jax.ShapeDtypeStruct`, which has no numbers to save",
    ),
    *(
        (
            f"saving {name}",
            lambda x=x: save("run", {"x": x}),
            rf"tree\['x'\] is an? {name} array of shape .*, but only numbers and booleans of JAX dtypes, and",
        )
        for name, x in (
            ("object", np.asarray([{}, []], object)),
            ("str32", np.str_("a")),
            ("datetime64.D.", np.asarray("2024-01-01", "M8[D]")),
            ("longdouble|float128", np.ones(3, np.longdouble)),
        )
    ),
    (
        "saving a donated array",
        lambda: save("run", {"x": deleted()}),
        r"tree\['x'\] has been deleted: its buffer was donated",
    ),
    (
        "saving two leaves with one path",
        lambda: save("run", {Key(1): 1, Key(2): 2}),
        r"`tree` has 2 leaves with the path \['k'\]",
    ),
    (
        "loading 64 bits",
        lambda: load("run", {"x": jax.ShapeDtypeStruct((3,), np.float64)}),
        r"like\['x'\] is float64, but JAX has 64-bit types disabled",
    ),
    (
        "saving with a class",
        lambda: save("run", STATE, optim=AdEMAMix),
        "`optim` is the class `AdEMAMix`, but an optimizer of this package",
    ),
    (
        "loading with a donated hyperparameter",
        lambda: load("run", STATE, optim=with_deleted_rate()),
        r"optim\.learning_rate has been deleted",
    ),
)


@pytest.mark.parametrize(
    "call,text", [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_one_sentence(call: Any, text: str):
    with pytest.raises((ValueError, TypeError), match=text) as info:
        call()
    message = str(info.value)
    assert len(message) < 600
    assert "jaxtyp" not in message.lower() and "beartype" not in message.lower()


JITTED = (
    (
        "shape",
        lambda g, s, p: (put(g, W0, jnp.ones((4, 1))), s, p),
        r"grads\.layers\[0\]\.weight has shape \(4, 1\)",
    ),
    (
        "None",
        lambda g, s, p: (put(g, W0, None), s, p),
        r"grads\.layers\[0\]\.weight is None",
    ),
    (
        "integers",
        lambda g, s, p: (put(g, W0, jnp.ones((4, 3), int)), s, p),
        r"grads\.layers\[0\]\.weight is an int32",
    ),
    ("swapped", lambda g, s, p: (s, g, p), "were `grads` and `state` swapped"),
    (
        "state dtype",
        lambda g, s, p: (
            g,
            put(s, lambda s: W0(s.m2), jnp.ones((4, 3), jnp.bfloat16)),
            p,
        ),
        r"state\.m2\.layers\[0\]\.weight is stored as bfloat16",
    ),
    (
        "state shape",
        lambda g, s, p: (g, put(s, lambda s: W0(s.nu), jnp.ones((3,))), p),
        r"state\.m2\.layers\[0\]\.weight is .*, but state\.nu has a float32 array of shape \(3,\)",
    ),
    ("no params", lambda g, s, p: (g, s, None), "`params` is missing"),
    (
        "other params",
        lambda g, s, p: (g, s, SWAPPED),
        r"params\.layers\[0\]\.weight has shape \(5, 3\)",
    ),
)


@pytest.mark.parametrize(
    "edit,text", [case[1:] for case in JITTED], ids=[case[0] for case in JITTED]
)
def test_one_sentence_under_jit(edit: Any, text: str):
    args = edit(GRADS, init(DECAYING, MODEL), MODEL)
    with pytest.raises((ValueError, TypeError), match=text):
        eqx.filter_jit(update)(DECAYING, *args)


def test_a_mask_as_an_argument_of_plain_jit():
    mask = {"w": True}
    update = jax.jit(
        lambda mask, g: AdEMAMix(1e-3, weight_decay=0.1, weight_decay_mask=mask).update(
            g, OPTIM.init(g), g
        )
    )
    with pytest.raises(TypeError, match=r"weight_decay_mask\['w'\].*`eqx.filter_jit`"):
        update(mask, {"w": jnp.ones(2)})


def test_traced_hyperparameters_are_left_alone():
    @jax.jit
    def step(b1: Any, alpha: Any, eps: Any) -> Any:
        optim = AdEMAMix(1e-3, b1=b1, alpha=alpha, eps=eps)
        return optim.update(jnp.ones(2), optim.init(jnp.ones(2)))[0]

    assert step(0.9, -1.0, 0.0).shape == (2,)


def test_traced_counters_are_left_alone():
    where = lambda s: (s.count, s.count_m2)
    bad = put(STATE, where, (jnp.asarray(-5), jnp.asarray(-5)))
    _, after = eqx.filter_jit(update)(OPTIM, GRADS, bad, MODEL)
    assert (after.count, after.count_m2) == (-4, -4)
    assert eqx.filter_jit(hyperparams)(OPTIM, bad).b1 == np.float32(0.9)


@pytest.mark.parametrize("rate", (0, -1e-3, jnp.asarray(-1.0)))
def test_zero_and_negative_learning_rates_are_legal(rate: Any):
    updates, _ = AdEMAMix(rate).update(jnp.ones(2), OPTIM.init(jnp.ones(2)))
    assert jnp.all(updates >= 0)


def test_the_net_behind_our_checks():
    """If a call bypasses the checks, jaxtyping still checks every leaf in the core."""
    from jaxtyping import TypeCheckError

    from eqx_ademamix import _step

    def core(*leaves: Any) -> Any:
        key = STATE.count, np.zeros(2, np.uint32)
        rest = None, OPTIM.resolve(STATE), key, None
        decay = _step.WeightDecay.none
        return _step._leaf_step(AdEMAMix, STATE.names, decay, *leaves, *rest)

    trees: Any = GRADS, STATE.m2, STATE.nu, STATE.m1, MODEL
    good = [W0(tree) for tree in trees]
    assert len(core(*good)) == 2
    for i, name in ((1, "m2"), (2, "nu"), (3, "m1"), (4, "p")):
        for value in (jnp.ones((4, 2)), jnp.ones((4, 3), int)):
            bad = list(good)
            bad[i] = value
            with pytest.raises(TypeCheckError, match=f"'{name}'"):
                core(*bad)
    for name, tree in (("m1", STATE.m1), ("m2", STATE.m2), ("nu", STATE.nu)):
        fields = {"count": STATE.count, "count_m2": STATE.count_m2}
        moments = {"m1": STATE.m1, "m2": STATE.m2, "nu": STATE.nu}
        bad = put(tree, W0, jnp.ones((4, 2)))
        with pytest.raises(TypeCheckError):
            AdEMAMixState(**{**fields, **moments, name: bad})


@pytest.mark.parametrize(
    "noun,article",
    (
        ("`MLP`", "an"),
        ("`LSTMCell`", "an"),
        ("`GRUCell`", "a"),
        ("`UNet`", "a"),
        ("`RMSNorm`", "an"),
        ("`Linear`", "a"),
        ("`Untupled`", "an"),
        ("uint8 array", "a"),
        ("int32 array", "an"),
        ("float32 array", "a"),
        ("`S`", "a"),
    ),
)
def test_articles(noun: str, article: str):
    from eqx_ademamix._paths import with_article

    assert with_article(noun) == f"{article} {noun}"


def test_there_are_many_cases():
    assert len(CASES) >= 30
    assert len({case[0:3:2] for case in CASES}) == len(CASES)


def test_a_failed_update_leaves_nothing_behind():
    """Checks do not change their arguments, so the state still works after an error."""
    with pytest.raises(ValueError, match="has shape"):
        update(OPTIM, put(GRADS, W0, jnp.ones((4, 2))), STATE, MODEL)
    _, new = update(OPTIM, GRADS, STATE, MODEL)
    assert new.count == 1 and eqx_ademamix.hyperparams(OPTIM, STATE).b1 == np.float32(
        0.9
    )
