"""Compares with the installed `optax.contrib.ademamix`.

Results are equal where both are exact. Where they differ, ours are closer to float64.
"""
# optax uses one type for all states, and its schedules are functions.
# pyright: reportArgumentType=false

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eqx_ademamix
from eqx_ademamix import alpha_scheduler, beta3_scheduler, from_optax, to_optax

from .helpers import (
    Reference,
    max_error,
    reference_alpha,
    reference_b3,
    reference_init,
    reference_step,
)


STEPS = 300
SHAPES = {"w": (5, 7), "b": (7,), "s": (), "t": (2, 3, 4)}


pytestmark = pytest.mark.usefixtures("standard_promotion")


def draw(seed: int, dtype: Any) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    one = lambda s: rng.normal(size=s) + (1j * rng.normal(size=s) if is_complex else 0)
    is_complex = np.issubdtype(dtype, np.complexfloating)
    return {k: np.asarray(one(s), dtype) for k, s in SHAPES.items()}


def gradients(dtype: Any) -> dict[str, np.ndarray]:
    every = [draw(1 + i, dtype) for i in range(STEPS)]
    return {k: np.stack([g[k] for g in every]) for k in SHAPES}


def run(tx: Any, params: Any, grads: Any) -> tuple[Any, Any]:
    def body(carry: Any, g: Any) -> Any:
        params, state = carry
        updates, state = tx.update(g, state, params)
        return (eqx.apply_updates(params, updates), state), None

    params = jax.tree.map(jnp.asarray, params)
    # optax's state changes its dtypes in the first step, so a scan would reject it.
    first, rest = (
        jax.tree.map(lambda x, i=i: x[i], grads) for i in (0, slice(1, None))
    )
    carry, _ = jax.jit(body)((params, tx.init(params)), first)
    return jax.jit(lambda c: jax.lax.scan(body, c, rest)[0])(carry)


def mask_tree() -> dict[str, bool]:
    return {"w": True, "b": False, "s": True, "t": False}


B3 = beta3_scheduler(0.99, 0.9, warmup=100)
ALPHA = alpha_scheduler(4.0, warmup=150)
CASES: dict[str, Any] = {
    "constants": dict(learning_rate=1e-2, b3=0.99, alpha=3.0),
    "defaults": dict(learning_rate=1e-2),
    "schedules": dict(learning_rate=1e-2, b3=B3, alpha=ALPHA),
    "decay": dict(learning_rate=1e-2, b3=0.99, weight_decay=0.1),
    "mask, tree": dict(learning_rate=1e-2, b3=0.99, weight_decay=0.1, mask=mask_tree()),
    "mask, prefix": dict(learning_rate=1e-2, b3=0.99, weight_decay=0.1, mask=False),
    "mask, function": dict(
        learning_rate=1e-2, b3=0.99, weight_decay=0.1,
        mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
    ),
    "learning rate": dict(
        learning_rate=optax.warmup_cosine_decay_schedule(0.0, 1e-2, 50, STEPS), b3=0.99
    ),
    "eps": dict(learning_rate=1e-2, b3=0.99, eps=1e-3, eps_root=1e-3, b1=0.5, b2=0.9),
}  # fmt: skip


@pytest.mark.parametrize("dtype", (np.float32, np.complex64))
@pytest.mark.parametrize("kwargs", CASES.values(), ids=CASES.keys())
def test_equal_to_optax(kwargs: Any, dtype: Any):
    params, grads = draw(0, dtype), gradients(dtype)
    ours, state = run(eqx_ademamix.ademamix(**kwargs), params, grads)
    theirs, their_state = run(optax.contrib.ademamix(**kwargs), params, grads)
    converted = from_optax(their_state, eqx_ademamix.AdEMAMix(1e-2), ours)
    for k in SHAPES:
        assert max_error(ours[k], theirs[k]) <= 1e-5
        for name in ("m1", "m2", "nu"):
            a, b = (getattr(s, name)[k] for s in (state, converted))
            assert max_error(a, b) <= 1e-5
    assert state.count == converted.count and state.count_m2 == converted.count_m2
    assert isinstance(to_optax(state), optax.contrib.ScaleByAdemamixState)


def reference(params: Any, grads: Any, rule: Any) -> dict[str, Reference]:
    refs = {k: reference_init(p) for k, p in params.items()}
    for i in range(STEPS):
        b3, alpha = rule(i)
        for k in refs:
            refs[k] = reference_step(
                refs[k], grads[k][i], i + 1, lr=1e-2, b1=0.9, b2=0.999, b3=b3,
                alpha=alpha,
            )  # fmt: skip
    return refs


def worst_m2(state: Any, refs: dict[str, Reference]) -> float:
    return max(max_error(state.m2[k], refs[k].m2) for k in SHAPES)


def test_closer_to_float64_near_one():
    """The schedule ends at 0.999999. optax subtracts it from 1 in float32, where the
    spacing is 6e-8. This makes the weight of new gradients wrong by about 1%."""
    warmup = 100
    schedules: Any = dict(
        b3=beta3_scheduler(0.999999, 0.9, warmup=warmup),
        alpha=alpha_scheduler(5.0, warmup=warmup),
    )
    params, grads = draw(0, np.float32), gradients(np.float32)
    rule = lambda i: (
        reference_b3(i, 0.999999, 0.9, warmup),
        reference_alpha(i, 5.0, warmup),
    )
    refs = reference(params, grads, rule)
    _, ours = run(eqx_ademamix.ademamix(1e-2, **schedules), params, grads)
    _, theirs = run(optax.contrib.ademamix(1e-2, **schedules), params, grads)
    assert worst_m2(ours, refs) <= 3e-6
    assert worst_m2(theirs[0], refs) >= 20 * worst_m2(ours, refs)


def test_closer_to_float64_in_half_precision():
    """With bfloat16 parameters, optax also stores the moments in bfloat16, which rounds
    away changes of less than one part in 256. Our moments are float32."""
    params = {k: jnp.asarray(v, jnp.bfloat16) for k, v in draw(0, np.float32).items()}
    grads = {k: jnp.asarray(v, jnp.bfloat16) for k, v in gradients(np.float32).items()}
    exact_grads = {k: np.asarray(v, np.float64) for k, v in grads.items()}
    refs = reference(params, exact_grads, lambda i: (0.9999, 5.0))
    _, ours = run(eqx_ademamix.ademamix(1e-2), params, grads)
    _, theirs = run(optax.contrib.ademamix(1e-2), params, grads)
    assert ours.m2["w"].dtype == jnp.float32
    assert worst_m2(ours, refs) <= 1e-5
    assert worst_m2(theirs[0], refs) >= 0.01
