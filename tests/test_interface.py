"""One way of calling for every optimizer: `init` and `update`, the whole model."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import jaxtyping
import numpy as np
import optax
import pytest

import eqx_ademamix
from eqx_ademamix import (
    AdEMAMix,
    Compensated,
    SimplifiedAdEMAMix,
    StateFormat,
    ademamix,
    init,
    simplified_ademamix,
    update,
)

from .helpers import COMPACT, loss_of_arrays, make_mlp, tree_type


pytestmark = pytest.mark.usefixtures("standard_promotion")


def plateau() -> Any:
    return optax.chain(
        optax.sgd(1e-2), optax.contrib.reduce_on_plateau(patience=1, rtol=0.9)
    )


def module() -> Any:
    """optax's functions are annotated with its own class, but use only the methods."""
    return AdEMAMix(1e-2)


# Each with a factory, since making arrays at import would choose JAX's devices.
OURS: dict[str, Any] = {
    "AdEMAMix": lambda: AdEMAMix(1e-2, weight_decay=0.1),
    "AdEMAMix, compact": lambda: AdEMAMix(1e-2, state_format=COMPACT),
    "SimplifiedAdEMAMix": lambda: SimplifiedAdEMAMix(1e-2, normalize=True),
    "Compensated": lambda: Compensated(AdEMAMix(1e-2)),
}
OPTAX: dict[str, Any] = {
    "adamw": lambda: optax.adamw(1e-2),
    "sgd": lambda: optax.sgd(1e-2, momentum=0.9),
    "contrib.ademamix": lambda: optax.contrib.ademamix(1e-2, weight_decay=0.1),
    "ademamix": lambda: ademamix(1e-2, weight_decay=0.1),
    "simplified_ademamix": lambda: simplified_ademamix(1e-3),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), module()),
    "MultiSteps": lambda: optax.MultiSteps(module(), every_k_schedule=2),
    "inject": lambda: optax.inject_hyperparams(ademamix)(lr=1e-2),
    "plateau": plateau,
    "apply_if_finite": lambda: optax.apply_if_finite(module(), 5),
    "Compensated of optax": lambda: Compensated(optax.adamw(1e-2)),
}
ALL = OURS | OPTAX


def whole_model() -> Any:
    """A model with everything that is not trained: functions, integers, names."""
    model: Any = make_mlp()
    bias = model.layers[0].bias.astype(jnp.bfloat16)
    model = eqx.tree_at(lambda m: m.layers[0].bias, model, bias)
    return {"net": model, "step": jnp.asarray(3), "name": "mlp", "scale": 2.0}


@pytest.mark.parametrize("name", ALL)
def test_one_loop_for_every_optimizer(name: str):
    optim, model, traces = ALL[name](), whole_model(), []
    state = init(optim, model)

    @eqx.filter_jit
    def step(optim: Any, model: Any, state: Any) -> Any:
        traces.append(1)
        loss, grads = eqx.filter_value_and_grad(loss_of_arrays)(model)
        updates, state = update(optim, grads, state, model, value=loss)
        return eqx.apply_updates(model, updates), state, loss

    # In its oldest version, `reduce_on_plateau` changes the type of its own state once.
    is_stable = name != "plateau"
    of_model, of_state, losses = tree_type(model), tree_type(state), []
    for _ in range(6):
        model, state, loss = step(optim, model, state)
        assert tree_type(model) == of_model
        assert tree_type(state) == of_state or not is_stable
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert len(traces) == 1 or not is_stable
    assert model["step"] == 3 and model["name"] == "mlp" and model["scale"] == 2.0


@pytest.mark.parametrize("name", sorted(OPTAX.keys() - {"Compensated of optax"}))
def test_optax_gets_the_arrays(name: str):
    optim, model = OPTAX[name](), make_mlp()
    grads = eqx.filter_grad(loss_of_arrays)(model)
    arrays = eqx.filter(model, eqx.is_inexact_array)
    extra = {"value": 1.0} if name == "plateau" else {}
    state, theirs = init(optim, model), optim.init(arrays)
    assert eqx.tree_equal(state, theirs)
    for _ in range(2):
        updates, state = update(optim, grads, state, model, **extra)
        expected, theirs = optim.update(grads, theirs, arrays, **extra)
        assert eqx.tree_equal(updates, expected) and eqx.tree_equal(state, theirs)


def test_extra_arguments_are_forwarded():
    optim, model = plateau(), make_mlp()
    grads, state = eqx.filter_grad(loss_of_arrays)(model), init(plateau(), model)
    for _ in range(4):  # the loss does not fall, so the rate is reduced
        _, state = update(optim, grads, state, model, value=jnp.asarray(1.0))
    assert state[1].scale < 1.0
    with pytest.raises(TypeError, match="value"):
        update(optim, grads, state, model)


def test_compensated_forwards_extra_arguments():
    optim = Compensated(plateau())
    params = jnp.ones(3, jnp.bfloat16)
    state = init(optim, params)
    for _ in range(4):
        _, state = update(optim, params, state, params, value=jnp.asarray(1.0))
    assert state.inner_state[1].scale < 1.0


@pytest.mark.parametrize("name", OURS)
def test_methods_ignore_extra_arguments(name: str):
    optim, params = OURS[name](), {"w": jnp.ones(3, jnp.bfloat16)}
    state = optim.init(params)
    expected = optim.update(params, state, params)
    found = optim.update(params, state, params, value=1.0, grad=params, anything=None)
    assert eqx.tree_equal(found, expected)


@pytest.mark.parametrize(
    "make",
    (
        lambda: ademamix(1e-3),
        lambda: eqx_ademamix.scale_by_ademamix(0.9, 0.999, 0.9999, 5.0, None, None),
        lambda: simplified_ademamix(1e-3),
        lambda: eqx_ademamix.scale_by_simplified_ademamix(),
    ),
)
def test_transformations_take_extra_arguments(make: Any):
    tx, params = make(), {"w": jnp.ones(3)}
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    state = tx.init(params)
    found = tx.update(params, state, params, value=1.0, unknown="x")
    assert eqx.tree_equal(found, tx.update(params, state, params))


def test_updates_have_the_dtypes_of_the_parameters():
    """`eqx.apply_updates` would widen a parameter that gets a wider update."""
    params = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(2)}
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    optim = optax.scale(-0.1)
    updates, _ = update(optim, wide, init(optim, params), params)
    assert tree_type(updates) == tree_type(params)
    assert tree_type(eqx.apply_updates(params, updates)) == tree_type(params)
    assert tree_type(update(optim, wide, init(optim, params))[0]) == tree_type(wide)


def test_optax_gets_numpy_gradients_and_none_for_integers():
    params = {"w": np.ones(3, np.float32), "n": jnp.arange(2)}
    grads = {"w": np.ones(3), "n": np.zeros(2, jax.dtypes.float0)}
    optim = optax.sgd(0.5)
    updates, _ = update(optim, grads, init(optim, params), params)
    assert updates["n"] is None and np.array_equal(updates["w"], [-0.5] * 3)


def test_a_part_of_the_model_for_optax():
    model = make_mlp()
    spec = jtu.tree_map(lambda _: False, model)
    spec = eqx.tree_at(lambda m: m.layers[2], spec, replace=True)
    part, frozen = eqx.partition(model, spec)
    optim = optax.adamw(1e-2)
    loss = lambda part: loss_of_arrays(eqx.combine(part, frozen))
    state = init(optim, part)
    updates, _ = update(optim, eqx.filter_grad(loss)(part), state, part)
    trained = jtu.tree_leaves(updates)
    assert len(trained) == 2 and all(np.any(x != 0) for x in trained)


#
# Descriptions of arrays
#


def described(tree: Any) -> Any:
    is_inexact = eqx.is_inexact_array
    struct = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if is_inexact(x) else x
    return jax.tree.map(struct, tree)


# optax's `inject_hyperparams` and `reduce_on_plateau` accept no descriptions.
@pytest.mark.parametrize("name", [x for x in ALL if x not in ("inject", "plateau")])
def test_init_from_descriptions(name: str):
    optim, model = ALL[name](), whole_model()
    expected = init(optim, model)
    found = init(optim, described(model))
    assert tree_type(found) == tree_type(expected)
    assert eqx.tree_equal(found, expected)


def test_init_from_arrays_and_descriptions_mixed():
    params = {
        "a": jnp.ones((4, 8)),
        "b": jax.ShapeDtypeStruct((3,), jnp.complex64),
        "c": jax.ShapeDtypeStruct((2, 2), jnp.bfloat16),
        "d": jax.ShapeDtypeStruct((2,), jnp.int32),
    }
    for fmt in (StateFormat.float32(), COMPACT):
        state = init(AdEMAMix(1e-3, state_format=fmt), params)
        whole = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params)
        expected = init(AdEMAMix(1e-3, state_format=fmt), whole)
        assert tree_type(state) == tree_type(expected)
        assert state.m2["d"] is None and state.nu["b"].dtype == jnp.float32


def test_masks_and_filters_of_descriptions():
    params = described({"w": jnp.ones((2, 2)), "b": jnp.ones(2)})
    optim = AdEMAMix(1e-3, trainable=lambda x: x.ndim == 2, weight_decay=0.1)
    state = init(optim, params)
    assert state.m2["b"] is None and state.m2["w"].shape == (2, 2)
    assert ademamix(1e-3, weight_decay=0.1, mask={"w": True, "b": False}).init(params)


def test_nothing_in_update_may_be_a_description():
    optim, params = AdEMAMix(1e-3), {"w": jnp.ones(3)}
    state = init(optim, params)
    with pytest.raises(TypeError, match=r"grads\['w'\] is a `ShapeDtypeStruct`"):
        update(optim, described(params), state, params)


#
# Compensated without anything to compensate
#


def test_compensated_says_that_it_has_no_effect():
    optim, params = Compensated(AdEMAMix(1e-3)), jnp.ones(3)
    with pytest.warns(UserWarning, match="no array that is trained has the dtype bfl"):
        state = init(optim, params)
    a, _ = update(optim, params, state, params)
    b, _ = update(AdEMAMix(1e-3), params, init(AdEMAMix(1e-3), params), params)
    assert np.array_equal(a, b)
    frozen = {"a": jnp.ones(3), "b": jnp.ones(3, jnp.bfloat16)}
    only_a = Compensated(AdEMAMix(1e-3, trainable={"a": True, "b": False}))
    with pytest.warns(UserWarning, match="use the wrapped optimizer by itself"):
        init(only_a, frozen)
    init(Compensated(AdEMAMix(1e-3)), frozen)  # no warning
    init(optim, {})


#
# The checks of jaxtyping
#


def program(disable: bool) -> str:
    """The program of a step, with and without jaxtyping's checks."""
    optim, params = AdEMAMix(1e-3), jnp.ones(8)
    state = init(optim, params)
    fresh = lambda grads, state: update(optim, grads, state)
    jaxtyping.config.update("jaxtyping_disable", disable)
    try:
        return jax.jit(fresh).lower(params, state).as_text()
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def test_checks_leave_nothing_in_the_program():
    assert program(disable=False) == program(disable=True)
