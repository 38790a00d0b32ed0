"""Compares results with an independent float64 reference written in NumPy."""

import itertools as it
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eqx_ademamix

from .helpers import (
    Reference,
    max_error,
    reference_alpha,
    reference_b3,
    reference_init,
    reference_step,
    x64,
)


SHAPES = {
    "scalar": (),
    "vector": (4,),
    "empty": (0, 3),
    "matrix": (5, 7),
    "4d": (2, 3, 4, 5),
}
STEPS = 200
WARMUP = 120
FIXED: Any = dict(b1=0.9, b2=0.999)

# (b3, alpha) in the form for our optimizer, and in the form for the reference
CONSTANT = ((0.9999, 5.0), lambda t: (0.9999, 5.0))
SCHEDULED = (
    (
        eqx_ademamix.beta3_scheduler(0.9999, 0.9, warmup=WARMUP),
        eqx_ademamix.alpha_scheduler(8.0, warmup=WARMUP),
    ),
    lambda t: (
        reference_b3(t, 0.9999, 0.9, WARMUP),
        reference_alpha(t, 8.0, WARMUP),
    ),
)
FAST_B3 = ((0.99, 2.0), lambda t: (0.99, 2.0))


def make_params(seed: int, dtype: Any) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {k: rng.normal(size=shape).astype(dtype) for k, shape in SHAPES.items()}


def make_grads(scale: float, dtype: Any) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [
        {k: (scale * rng.normal(size=s)).astype(dtype) for k, s in SHAPES.items()}
        for _ in range(STEPS)
    ]


def run(optim: Any, params: Any, grads: list[Any]) -> tuple[Any, Any]:
    params = jax.tree.map(jnp.asarray, params)
    state = optim.init(params)

    @jax.jit
    def step(params: Any, state: Any, g: Any) -> Any:
        updates, state = optim.update(g, state, params)
        return eqx.apply_updates(params, updates), state

    for g in grads:
        params, state = step(params, state, g)
    return params, state


def run_reference(
    params: Any, grads: list[Any], at: Any, decay: dict[str, float], lr: float
) -> dict[str, Reference]:
    refs = {k: reference_init(p) for k, p in params.items()}
    for i, g in enumerate(grads):
        b3, alpha = at(i)
        for k in refs:
            refs[k] = reference_step(
                refs[k], g[k], i + 1, lr=lr, b3=b3, alpha=alpha,
                weight_decay=decay[k], **FIXED,
            )  # fmt: skip
    return refs


def errors(params: Any, state: Any, refs: dict[str, Reference]) -> list[float]:
    found = (
        {k: Reference(params[k], state.m1[k], state.m2[k], state.nu[k])} for k in refs
    )
    return [
        max_error(a, b)
        for tree in found
        for k, moments in tree.items()
        for a, b in zip(moments, refs[k], strict=True)
    ]


CASES = tuple(
    it.product(
        (1e-6, 1e-3, 1.0, 1e3),
        (CONSTANT, SCHEDULED, FAST_B3),
        (None, True, {k: k == "matrix" for k in SHAPES}),
    )
)


def check(scale: float, rule: Any, mask: Any, dtype: Any, tolerance: float) -> None:
    (b3, alpha), at = rule
    decay = 0.0 if mask is None else 0.1
    optim = eqx_ademamix.AdEMAMix(
        3e-3, b3=b3, alpha=alpha, weight_decay=decay,
        weight_decay_mask=True if mask is None else mask, **FIXED,
    )  # fmt: skip
    params, grads = make_params(0, dtype), make_grads(scale, dtype)
    new_params, state = run(optim, params, grads)
    decays = {k: decay * (mask[k] if isinstance(mask, dict) else 1) for k in SHAPES}
    refs = run_reference(params, grads, at, decays, 3e-3)
    assert max(errors(new_params, state, refs)) <= tolerance
    assert state.count == state.count_m2 == STEPS
    assert all(x.dtype == dtype for x in jax.tree.leaves((new_params, state.nu)))


@pytest.mark.parametrize("scale,rule,mask", CASES)
def test_float32_reference(scale: float, rule: Any, mask: Any):
    check(scale, rule, mask, np.float32, 1e-5)


@pytest.mark.parametrize("scale,rule,mask", CASES)
def test_float64_reference(scale: float, rule: Any, mask: Any):
    with x64():
        check(scale, rule, mask, np.float64, 1e-12)


@pytest.mark.parametrize("dtype", (np.complex64, np.complex128))
def test_complex_reference(dtype: Any):
    rng = np.random.default_rng(0)

    def draw(shape: Any) -> np.ndarray:
        return (rng.normal(size=shape) + 1j * rng.normal(size=shape)).astype(dtype)

    params = {k: draw(s) for k, s in SHAPES.items()}
    grads = [{k: draw(s) for k, s in SHAPES.items()} for _ in range(STEPS)]
    (b3, alpha), at = SCHEDULED
    optim = eqx_ademamix.AdEMAMix(3e-3, b3=b3, alpha=alpha, weight_decay=0.1)
    refs = run_reference(params, grads, at, dict.fromkeys(SHAPES, 0.1), 3e-3)
    if dtype == np.complex128:
        with x64():
            new_params, state = run(optim, params, grads)
            assert max(errors(new_params, state, refs)) <= 1e-12
    else:
        new_params, state = run(optim, params, grads)
        assert max(errors(new_params, state, refs)) <= 1e-5
    real = np.float64 if dtype == np.complex128 else np.float32
    assert all(x.dtype == real for x in jax.tree.leaves(state.nu))
    assert all(x.dtype == dtype for x in jax.tree.leaves((state.m1, state.m2)))


def test_eps_root_and_learning_rate_schedule():
    params, grads = make_params(0, np.float32), make_grads(1.0, np.float32)[:50]
    optim = eqx_ademamix.AdEMAMix(
        lambda count: 1e-3 / (1 + jnp.asarray(count, float)), eps=1e-3, eps_root=1e-2
    )
    new_params, state = run(optim, params, grads)
    refs = {k: reference_init(p) for k, p in params.items()}
    for i, g in enumerate(grads):
        for k in refs:
            refs[k] = reference_step(
                refs[k], g[k], i + 1, lr=1e-3 / (1 + i), b3=0.9999, alpha=5.0,
                eps=1e-3, eps_root=1e-2, **FIXED,
            )  # fmt: skip
    assert max(errors(new_params, state, refs)) <= 1e-5


@pytest.mark.parametrize("b1", (0.9, 0.0))
def test_alpha_zero_is_adamw(b1: float):
    params, grads = make_params(0, np.float32), make_grads(1.0, np.float32) * 5
    kwargs: Any = dict(b1=b1, b2=0.999, weight_decay=0.1)
    ours, _ = run(eqx_ademamix.AdEMAMix(1e-2, alpha=0, **kwargs), params, grads)
    with jax.numpy_dtype_promotion("standard"):
        theirs, _ = run(optax.adamw(1e-2, **kwargs), params, grads)
    refs = {k: reference_init(p) for k, p in params.items()}
    for (i, g), k in it.product(enumerate(grads), refs):
        refs[k] = reference_step(
            refs[k], g[k], i + 1, lr=1e-2, b1=b1, b2=0.999, b3=0.0, alpha=0.0,
            weight_decay=0.1,
        )  # fmt: skip
    for k in refs:
        assert max_error(ours[k], np.asarray(theirs[k])) <= 1e-5
    # Where the two differ, ours is closer to float64.
    ours_error = [max_error(ours[k], ref.p) for k, ref in refs.items()]
    theirs_error = [max_error(theirs[k], ref.p) for k, ref in refs.items()]
    assert sum(ours_error) < sum(theirs_error)


@pytest.mark.parametrize("b3", (0.9, 0.999, 0.9999, 0.999999))
@pytest.mark.parametrize("scheduled", (False, True))
@pytest.mark.parametrize("wide", (False, True))
def test_what_the_update_uses_for_one_minus_b3(b3: float, scheduled: bool, wide: bool):
    """Starting from `m2 = 0`, one step with a gradient of 1 gives `m2 = 1 - b3`."""
    schedule = eqx_ademamix.beta3_scheduler(b3, 0.9, warmup=1000)
    optim = eqx_ademamix.AdEMAMix(1e-3, b3=schedule if scheduled else b3)
    for step in (0, 1, 10, 500, 999, 1000, 5000):
        with x64() if wide else jax.numpy_dtype_promotion("strict"):
            state = optim.init(jnp.ones(()))
            state = eqx.tree_at(
                lambda s: s.count_m2, state, jnp.asarray(step, jnp.int32)
            )
            _, state = jax.jit(optim.update)(jnp.ones(()), state)
            done = min(step / 1000, 1)
            exact = -np.expm1(1 / ((1 - done) / np.log(0.9) + done / np.log(b3)))
            exact = exact if scheduled else 1 - b3
            assert abs(float(state.m2) / exact - 1) <= (1e-9 if wide else 1e-6)


def test_a_function_that_returns_python_floats_loses_nothing():
    optim = eqx_ademamix.AdEMAMix(1e-3, b3=lambda count: 0.999999)
    _, state = optim.update(jnp.ones(()), optim.init(jnp.ones(())))
    assert abs(float(state.m2) / 1e-6 - 1) <= 1e-6
    assert eqx_ademamix.hyperparams(optim, state).b3 == jnp.float32(0.999999)


def test_bias_correction_is_exact_at_the_first_step():
    """Adam's first step has size `lr`, whatever the gradient and the decay rates."""
    for b1, b2 in ((0.9, 0.999), (0.5, 0.5), (0.999, 0.999999), (0.0, 0.0)):
        optim = eqx_ademamix.AdEMAMix(1.0, b1=b1, b2=b2, alpha=0.0)
        g = jnp.asarray([1e-3, -1.0, 1e3])
        updates, _ = optim.update(g, optim.init(g))
        np.testing.assert_allclose(updates, [-1.0, 1.0, -1.0], rtol=2e-5)


def test_two_counters():
    """In this state, the slow average starts later. Then alpha and b3 use `count_m2`,
    while the learning rate and the bias corrections use `count`."""
    (b3, alpha), at = SCHEDULED
    optim = eqx_ademamix.AdEMAMix(lambda count: 1e-3 * (count + 1), b3=b3, alpha=alpha)
    ref = reference_init(np.ones(3))
    m = np.asarray([0.1, -0.2, 0.3])
    ref = ref._replace(m1=m, nu=m**2)
    state = optim.init(jnp.ones(3))
    state = eqx_ademamix.AdEMAMixState(
        count=jnp.asarray(50, jnp.int32),
        count_m2=jnp.asarray(7, jnp.int32),
        m1=jnp.asarray(m, jnp.float32),
        m2=state.m2,
        nu=jnp.asarray(m**2, jnp.float32),
    )
    g = jnp.asarray([1.0, 2.0, -3.0])
    params = jnp.ones(3)
    for i in range(5):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optim.update(g, state, params)
        params = params + updates
        b3_now, alpha_now = at(7 + i)
        ref = reference_step(
            ref, g, 51 + i, lr=1e-3 * (51 + i), b3=b3_now, alpha=alpha_now, **FIXED
        )
    assert max_error(params, ref.p) <= 1e-5
    assert (state.count, state.count_m2) == (55, 12)


@pytest.mark.parametrize(
    "b1,b2,b3", ((0.0, 0.0, 0.0), (0.3, 0.4, 0.2), (0.5, 0.6, 0.5))
)
@pytest.mark.parametrize("as_array", (False, True))
@pytest.mark.parametrize("wide", (False, True))
def test_small_decays(b1: float, b2: float, b3: float, as_array: bool, wide: bool):
    """The gradients shrink by six orders of magnitude. With a small decay rate, the old
    large gradients must not leave a rounding error behind."""
    dtype, tolerance = (np.float64, 1e-12) if wide else (np.float32, 1e-5)
    with x64() if wide else jax.numpy_dtype_promotion("strict"):
        decays = [jnp.asarray(b) if as_array else b for b in (b1, b2, b3)]
        optim = eqx_ademamix.AdEMAMix(1e-3, *decays, alpha=2.0)
        p = jnp.ones(2, dtype)
        state, ref = optim.init(p), reference_init(np.ones(2))
        step = eqx.filter_jit(optim.update)
        for t, g in enumerate((1e3, -2e3, 1e-3, 2e-3, 1e-3), start=1):
            updates, state = step(jnp.full(2, g, dtype), state, p)
            p = p + updates
            b = [
                float(np.float32(x)) if as_array and not wide else x
                for x in (b1, b2, b3)
            ]
            ref = reference_step(
                ref, np.full(2, g, dtype), t, lr=1e-3, b1=b[0], b2=b[1], b3=b[2],
                alpha=2.0,
            )  # fmt: skip
            assert max_error(state.m2, ref.m2) <= tolerance
            assert max_error(state.nu, ref.nu) <= tolerance
        assert max_error(p, ref.p) <= tolerance


def test_the_mask_sees_the_parameters():
    """This also holds in `update`, where the gradients can have another dtype."""
    params = {"w": jnp.ones(2, jnp.bfloat16), "v": jnp.ones(2)}
    optim = eqx_ademamix.AdEMAMix(
        1.0, weight_decay=0.5, weight_decay_mask=lambda x: x.dtype == jnp.bfloat16
    )
    grads = {"w": jnp.zeros(2), "v": jnp.zeros(2)}
    updates, _ = optim.update(grads, optim.init(params), params)
    assert jnp.all(updates["w"] == -0.5) and jnp.all(updates["v"] == 0.0)
