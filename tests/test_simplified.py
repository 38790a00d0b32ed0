"""Simplified AdEMAMix, against a float64 reference written independently in NumPy, and
under everything that AdEMAMix lives under."""
# optax has one type for all states and all updates.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportIndexIssue=false

import contextlib
import dataclasses
import inspect
import itertools as it
from typing import Any, NamedTuple

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
    AdEMAMix,
    AdEMAMixState,
    Compensated,
    Encoded,
    ScaledFloat16,
    SimplifiedAdEMAMix,
    SimplifiedAdEMAMixState,
    StateFormat,
    alpha_scheduler,
    beta3_scheduler,
    decay_mask,
    decoded,
    from_optax,
    hyperparams,
    init,
    scale_by_simplified_ademamix,
    simplified_ademamix,
    state_bytes,
    state_report,
    to_optax,
    update,
)

from .helpers import (
    COMPACT,
    assert_trees_close,
    buffers,
    count_traces,
    everywhere,
    loss_of_arrays,
    make_mlp,
    make_zoo,
    max_error,
    reference_alpha,
    reference_b3,
    tree_type,
    x64,
)


#
# The reference: arXiv:2502.02431, on one array, in float64
#


class Simplified(NamedTuple):
    """One parameter, the sum of the weights of its gradients, and its moments."""

    p: np.ndarray
    num: float
    m: np.ndarray
    nu: np.ndarray


def simplified_init(p: Any) -> Simplified:
    p = np.asarray(p)
    p = p.astype(np.complex128 if np.iscomplexobj(p) else np.float64)
    return Simplified(p, 0.0, np.zeros_like(p), np.zeros(p.shape))


def simplified_step(
    ref: Simplified,
    g: Any,
    t: int,
    *,
    lr: float,
    b1: float,
    b2: float = 0.95,
    alpha: float,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    weight_decay: float = 0.0,
    bias_correct_m1: bool = False,
    normalize: bool = False,
) -> tuple[np.ndarray, Simplified]:
    """The update of the step number `t`, counted from 1, and what it leads to."""
    g = np.asarray(g).astype(ref.p.dtype)
    m = b1 * ref.m + g
    num = b1 * ref.num + 1
    nu = b2 * ref.nu + (1 - b2) * np.abs(g) ** 2
    numerator = alpha * g + m
    if bias_correct_m1:
        numerator = numerator / num
    if normalize:
        numerator = numerator / (num + alpha)
    direction = numerator / (np.sqrt(nu / (1 - b2**t) + eps_root) + eps)
    u = -lr * (direction + weight_decay * ref.p)
    return u, Simplified(ref.p + u, num, m, nu)


#
# Runs
#


SHAPES = {
    "scalar": (),
    "vector": (4,),
    "empty": (0, 3),
    "matrix": (5, 7),
}
STEPS = 100
WARMUP = 60
RATE = 3e-3

# Each as our optimizer takes it, and as a function of the steps taken before.
B1S: dict[str, Any] = {
    "0.99": (0.99, lambda i: 0.99),
    "zero": (0.0, lambda i: 0.0),
    "scheduled": (
        beta3_scheduler(0.99, 0.9, warmup=WARMUP, offset=1),
        lambda i: reference_b3(i + 1, 0.99, 0.9, WARMUP),
    ),
}
ALPHAS: dict[str, Any] = {
    "zero": (0.0, lambda i: 0.0),
    "100": (100.0, lambda i: 100.0),
    "scheduled": (
        alpha_scheduler(100.0, warmup=WARMUP),
        lambda i: reference_alpha(i, 100.0, WARMUP),
    ),
}
PLAIN, CORRECTED, NORMALIZED = {}, {"bias_correct_m1": True}, {"normalize": True}
CORRECTIONS: tuple[Any, ...] = (PLAIN, CORRECTED, NORMALIZED)
RESTS: tuple[Any, ...] = (
    {},
    {"eps": 1e-3, "eps_root": 1e-2},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "weight_decay_mask": {k: k == "matrix" for k in SHAPES}},
    {"weight_decay": 0.1, "weight_decay_mask": lambda x: x.ndim > 1, "eps_root": 1e-6},
)
# Three, three and three, and the rest in turn, each of it with each correction.
CASES = tuple(
    (*case, RESTS[i % len(RESTS)])
    for i, case in enumerate(it.product(B1S, ALPHAS, CORRECTIONS))
)
# Nine of them, in which each two of the first three options meet.
SQUARE = tuple(CASES[9 * i + 3 * j + (i + j) % 3] for i in range(3) for j in range(3))


def optax_alphas() -> list[str]:
    """What optax takes as `alpha`: no schedule in its first versions of it."""
    params: Any = jnp.ones(())
    scale: Any = optax.contrib.scale_by_simplified_ademamix
    with jax.numpy_dtype_promotion("standard"):
        tx = scale(alpha=lambda t: 0.0)
        try:
            tx.update(params, tx.init(params))
        except TypeError:
            return [name for name in ALPHAS if name != "scheduled"]
    return list(ALPHAS)


# What optax has.
OPTAX_ALPHAS = optax_alphas()
OPTAX_CASES = tuple(
    (b1, alpha, RESTS[i % 4])
    for i, (b1, alpha) in enumerate(it.product((0.99, 0.9, 0.0), ALPHAS))
    if alpha in OPTAX_ALPHAS
)


def draw(rng: np.random.Generator, shape: Any, dtype: Any) -> np.ndarray:
    x = rng.normal(size=shape)
    if np.issubdtype(dtype, np.complexfloating):
        x = x + 1j * rng.normal(size=shape)
    return np.asarray(x).astype(dtype)


def make_params(dtype: Any) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {k: draw(rng, shape, dtype) for k, shape in SHAPES.items()}


def make_grads(dtype: Any, scale: float = 1.0) -> dict[str, np.ndarray]:
    """The gradients of all steps, stacked."""
    rng = np.random.default_rng(1)
    stack = {k: draw(rng, (STEPS, *shape), dtype) for k, shape in SHAPES.items()}
    return {k: (scale * x).astype(dtype) for k, x in stack.items()}


def run(optim: Any, params: Any, grads: Any) -> tuple[Any, Any, Any]:
    """The end of a run, and the updates of all its steps, stacked."""

    def body(carry: Any, g: Any) -> Any:
        params, state = carry
        updates, state = optim.update(g, state, params)
        return (eqx.apply_updates(params, updates), state), updates

    params, grads = jax.tree.map(jnp.asarray, (params, grads))
    scan = jax.jit(lambda carry, grads: jax.lax.scan(body, carry, grads))
    (params, state), updates = scan((params, optim.init(params)), grads)
    return params, state, updates


def run_reference(
    p: Any, grads: Any, at: Any, **kwargs: Any
) -> tuple[Simplified, np.ndarray]:
    ref, updates = simplified_init(p), []
    for i, g in enumerate(grads):
        u, ref = simplified_step(ref, g, i + 1, **at(i), **kwargs)
        updates.append(u)
    return ref, np.stack(updates)


def is_decayed(mask: Any, name: str) -> bool:
    if isinstance(mask, dict):
        return mask[name]
    return bool(mask(np.zeros(SHAPES[name])) if callable(mask) else mask)


def reference_runs(params: Any, grads: Any, at: Any, rest: Any) -> Any:
    kwargs = dict(rest)
    mask = kwargs.pop("weight_decay_mask", True)
    decay = kwargs.pop("weight_decay", 0.0)
    return {
        k: run_reference(
            params[k], grads[k], at, weight_decay=decay * is_decayed(mask, k), **kwargs
        )
        for k in SHAPES
    }


def check(
    b1: Any, alpha: Any, correction: Any, rest: Any, dtype: Any, tolerance: float
) -> None:
    params, grads = make_params(dtype), make_grads(dtype)
    optim = SimplifiedAdEMAMix(RATE, b1[0], alpha=alpha[0], **rest, **correction)
    new_params, state, updates = run(optim, params, grads)
    at = lambda i: {"lr": RATE, "b1": b1[1](i), "alpha": alpha[1](i)}
    refs = reference_runs(params, grads, at, {**rest, **correction})
    for k, (ref, steps) in refs.items():
        assert max_error(updates[k], steps) <= tolerance
        assert max_error(new_params[k], ref.p) <= tolerance
        assert max_error(state.m[k], ref.m) <= tolerance
        assert max_error(state.nu[k], ref.nu) <= tolerance
        assert max_error(state.num, ref.num) <= tolerance
    real = np.zeros((), dtype).real.dtype
    assert state.count == STEPS and state.count.dtype == jnp.int32
    assert state.num.dtype == jnp.zeros((), float).dtype and state.num.shape == ()
    assert all(x.dtype == dtype for x in jtu.tree_leaves((new_params, state.m)))
    assert all(x.dtype == real for x in jtu.tree_leaves(state.nu))


#
# The numbers
#


@pytest.mark.parametrize("b1,alpha,rest", OPTAX_CASES)
def test_the_reference_is_that_of_optax(b1: float, alpha: str, rest: Any):
    """Both in float64, over all that optax has."""
    ours, at_step = ALPHAS[alpha]
    kwargs = dict(rest)
    mask = kwargs.pop("weight_decay_mask", None)
    theirs = optax.contrib.simplified_ademamix(
        RATE, b1, alpha=ours, mask=mask, **kwargs
    )
    at = lambda i: {"lr": RATE, "b1": b1, "alpha": at_step(i)}
    with x64(), jax.numpy_dtype_promotion("standard"):
        params, grads = make_params(np.float64), make_grads(np.float64)
        new_params, state, updates = run(theirs, params, grads)
        for k, (ref, steps) in reference_runs(params, grads, at, rest).items():
            assert max_error(updates[k], steps) <= 1e-12
            assert max_error(new_params[k], ref.p) <= 1e-12
            assert max_error(state[0].m[k], ref.m) <= 1e-12
            assert max_error(state[0].n[k], ref.nu) <= 1e-12


@pytest.mark.parametrize("b1,alpha,correction,rest", CASES)
def test_float64_reference(b1: str, alpha: str, correction: Any, rest: Any):
    with x64():
        check(B1S[b1], ALPHAS[alpha], correction, rest, np.float64, 1e-12)


@pytest.mark.parametrize("b1,alpha,correction,rest", SQUARE)
def test_float32_reference(b1: str, alpha: str, correction: Any, rest: Any):
    check(B1S[b1], ALPHAS[alpha], correction, rest, np.float32, 1e-5)


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("dtype", (np.complex64, np.complex128))
def test_complex_reference(dtype: Any, correction: Any):
    is_wide = dtype == np.complex128
    with x64() if is_wide else contextlib.nullcontext():
        args = B1S["scheduled"], ALPHAS["scheduled"], correction, RESTS[4], dtype
        check(*args, 1e-12 if is_wide else 1e-5)


@pytest.mark.parametrize("scale", (1e-6, 1e3))
def test_gradients_of_other_scales(scale: float):
    params, grads = make_params(np.float32), make_grads(np.float32, scale)
    optim = SimplifiedAdEMAMix(RATE, alpha=10.0, eps=1e-20)
    _, state, updates = run(optim, params, grads)
    at = lambda i: {"lr": RATE, "b1": 0.99, "alpha": 10.0}
    for k, (ref, steps) in reference_runs(params, grads, at, {"eps": 1e-20}).items():
        assert max_error(updates[k], steps) <= 1e-5
        assert max_error(state.m[k], ref.m) <= 1e-5


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_schedules_are_called_with_the_steps_taken_before(correction: Any):
    optim = SimplifiedAdEMAMix(
        lambda count: 1e-3 * (count.astype(float) + 1),
        lambda count: 1 - 1 / (count.astype(float) + 2),
        alpha=lambda count: 3 * count.astype(float),
        **correction,
    )
    at = lambda i: {"lr": 1e-3 * (i + 1), "b1": 1 - 1 / (i + 2), "alpha": 3.0 * i}
    with x64():
        params, grads = make_params(np.float64), make_grads(np.float64)
        new_params, state, updates = run(optim, params, grads)
        for k, (ref, steps) in reference_runs(params, grads, at, correction).items():
            assert max_error(updates[k], steps) <= 1e-12
            assert max_error(new_params[k], ref.p) <= 1e-12
            assert max_error(state.num, ref.num) <= 1e-12


@pytest.mark.parametrize("b1,alpha,rest", OPTAX_CASES)
def test_as_optax_computes_it(b1: float, alpha: str, rest: Any):
    kwargs = dict(rest)
    mask = kwargs.pop("weight_decay_mask", None)
    alpha = ALPHAS[alpha][0]
    theirs = optax.contrib.simplified_ademamix(
        RATE, b1, alpha=alpha, mask=mask, **kwargs
    )
    ours = SimplifiedAdEMAMix(RATE, b1, alpha=alpha, **rest)
    params, grads = make_params(np.float32), make_grads(np.float32)
    with jax.numpy_dtype_promotion("standard"):
        expected_params, expected, expected_updates = run(theirs, params, grads)
    new_params, state, updates = run(ours, params, grads)
    for k in SHAPES:
        assert max_error(updates[k], expected_updates[k]) <= 1e-5
        assert max_error(new_params[k], expected_params[k]) <= 1e-5
        assert max_error(state.m[k], expected[0].m[k]) <= 1e-5
        assert max_error(state.nu[k], expected[0].n[k]) <= 1e-5


@pytest.mark.parametrize("as_array,wide", ((False, False), (True, False), (True, True)))
@pytest.mark.parametrize("b1,b2", ((0.0, 0.0), (0.3, 0.2), (0.5, 0.5)))
def test_gradients_that_shrink(b1: float, b2: float, wide: bool, as_array: bool):
    """What a small decay forgets must not be left behind as rounding."""
    dtype, tolerance = (np.float64, 1e-12) if wide else (np.float32, 1e-5)
    with x64() if wide else contextlib.nullcontext():
        kind: Any = jnp.asarray if as_array else float
        optim = SimplifiedAdEMAMix(1e-3, kind(b1), kind(b2), alpha=kind(2.0))
        params, ref = jnp.ones(2, dtype), simplified_init(np.ones(2))
        state, step = optim.init(params), eqx.filter_jit(optim.update)
        rounded = lambda x: float(np.float32(x)) if as_array and not wide else x
        for t, g in enumerate((1e3, -2e3, 1e-3, 2e-3, 1e-3), start=1):
            grads = jnp.full(2, g, dtype)
            updates, state = step(grads, state, params)
            expected, ref = simplified_step(
                ref, grads, t, lr=1e-3, b1=rounded(b1), b2=rounded(b2), alpha=2.0
            )
            assert max_error(updates, expected) <= tolerance
            assert max_error(state.m, ref.m) <= tolerance
            assert max_error(state.nu, ref.nu) <= tolerance


@pytest.mark.parametrize("b1", (0.0, 0.9999, B1S["scheduled"][0]), ids=B1S.keys())
@pytest.mark.parametrize("alpha,b2", ((0.0, 0.0), (1.0, 0.95), (100.0, 0.999)))
def test_the_first_step(b1: Any, alpha: Any, b2: float):
    """Has the size of `1 + alpha` learning rates, or of one if normalized."""
    g = jnp.asarray([1.0, -2.0, 1e3])
    at_start = alpha if isinstance(alpha, float) else 0.0
    for correction in CORRECTIONS:
        optim = SimplifiedAdEMAMix(1.0, b1, b2, alpha, **correction)
        updates, state = optim.update(g, optim.init(g))
        size = 1.0 if correction == NORMALIZED else 1.0 + at_start
        np.testing.assert_allclose(updates, [-size, size, -size], rtol=1e-6)
        assert state.num == 1.0 and np.array_equal(state.m, g)


CONSTANT_B1S = (0.0, 0.9, 0.9999, B1S["scheduled"][0])
CONSTANT_ALPHAS = (0.0, 100.0, ALPHAS["scheduled"][0])


def run_constant(g: Any, steps: int, *args: Any, **kwargs: Any) -> np.ndarray:
    """The updates of a constant gradient."""
    optim = SimplifiedAdEMAMix(1.0, *args, **kwargs)

    def body(state: Any, _: None) -> Any:
        updates, state = optim.update(g, state)
        return state, updates

    scan = jax.jit(lambda state: jax.lax.scan(body, state, None, length=steps))
    return np.asarray(scan(optim.init(g))[1])


@pytest.mark.parametrize("b1", CONSTANT_B1S, ids=str)
@pytest.mark.parametrize("alpha", CONSTANT_ALPHAS, ids=str)
def test_a_constant_gradient_gives_one_learning_rate(b1: Any, alpha: Any):
    """From the first step on, whatever `alpha` and `b1` are or become."""
    values = [1.0, -0.3, 7.7, 123.4]
    with x64():
        updates = run_constant(
            jnp.asarray(values), 300, b1, alpha=alpha, normalize=True
        )
        assert np.max(np.abs(updates + np.sign(values))) <= 1e-6
    # In float32 too, up to the rounding of `m`: these gradients have few digits.
    values = [1.0, -0.25, 8.0, 128.0]
    updates = run_constant(jnp.asarray(values), 20, b1, alpha=alpha, normalize=True)
    assert np.max(np.abs(updates + np.sign(values))) <= 1e-6


@pytest.mark.parametrize("b1", CONSTANT_B1S, ids=str)
def test_the_bias_correction_is_exact_also_under_a_schedule(b1: Any):
    """Of a constant gradient the corrected `m` is that gradient at each step."""
    values = [1.0, -0.3, 7.7, 123.4]
    with x64():
        updates = run_constant(jnp.asarray(values), 300, b1, bias_correct_m1=True)
        assert np.max(np.abs(updates + np.sign(values))) <= 1e-6


@pytest.mark.parametrize("b1", (0.9, 0.99))
@pytest.mark.parametrize(
    "alpha,normalize",
    ((0.0, True), (1.0, True), (10.0, True), (100.0, True), (10.0, False)),
)
def test_the_size_of_updates_from_noise(b1: float, alpha: float, normalize: bool):
    """On Gaussian noise, once `m` has filled."""
    optim = SimplifiedAdEMAMix(1.0, b1, 0.999, alpha, normalize=normalize)
    start = int(10 / (1 - b1))

    def body(state: Any, key: Any) -> Any:
        updates, state = optim.update(jax.random.normal(key, (2048,)), state)
        return state, jnp.mean(jnp.square(updates))

    def squares(state: Any) -> Any:
        keys = jax.random.split(jax.random.key(0), start + 500)
        return jax.lax.scan(body, state, keys)[1][start:]

    found = np.sqrt(np.mean(jax.jit(squares)(optim.init(jnp.zeros(2048)))))
    expected = np.sqrt((alpha + 1) ** 2 + b1**2 / (1 - b1**2))
    if normalize:
        expected = expected / (1 / (1 - b1) + alpha)
    assert abs(found / expected - 1) <= 0.05


def test_alpha_zero_is_adam_with_the_learning_rate_of_a_sum():
    """But for the bias correction of `m`, which `bias_correct_m1` brings."""
    params, grads = make_params(np.float32), make_grads(np.float32)
    ours = SimplifiedAdEMAMix(RATE, 0.9, 0.99, weight_decay=0.1, bias_correct_m1=True)
    with jax.numpy_dtype_promotion("standard"):
        adamw = optax.adamw(RATE, 0.9, 0.99, weight_decay=0.1)
        expected, *_ = run(adamw, params, grads)
    found, *_ = run(ours, params, grads)
    for k in SHAPES:
        assert max_error(found[k], expected[k]) <= 1e-5


@pytest.mark.parametrize("b1", (0.0, jnp.asarray(0.0)), ids=("static", "traced"))
def test_m_is_stored_also_at_b1_zero(b1: Any):
    model = make_mlp()
    grads = eqx.filter_grad(loss_of_arrays)(model)
    optim = SimplifiedAdEMAMix(1e-3, b1)
    state = init(optim, model)
    assert tree_type(state.m) == tree_type(eqx.filter(model, eqx.is_inexact_array))
    for _ in range(2):
        _, state = update(optim, grads, state, model)
    assert_trees_close(state.m, grads, 0.0)
    assert state.num == 1.0


def test_bfloat16_parameters_do_not_spoil_m():
    """(1 - 0.9999^20000) / (1 - 0.9999) = 8647."""
    optim = SimplifiedAdEMAMix(1e-9, 0.9999)
    params, grads = jnp.zeros(3, jnp.bfloat16), jnp.ones(3, jnp.bfloat16)

    def body(state: Any, _: None) -> Any:
        return optim.update(grads, state, params)[1], None

    scan = jax.jit(lambda s: jax.lax.scan(body, s, None, length=20_000)[0])
    state = scan(optim.init(params))
    expected = -np.expm1(20_000 * np.log(0.9999)) / 1e-4
    np.testing.assert_allclose(state.m, expected, rtol=1e-3)
    np.testing.assert_allclose(state.num, expected, rtol=1e-3)
    assert state.m.dtype == state.num.dtype == jnp.float32


#
# Arguments
#


def test_arguments_and_their_defaults():
    parameters = dict(inspect.signature(SimplifiedAdEMAMix.__init__).parameters)
    del parameters["self"]
    defaults = {k: x.default for k, x in parameters.items()}
    assert defaults.pop("learning_rate") is inspect.Parameter.empty
    assert list(defaults.items()) == [
        ("b1", 0.99),
        ("b2", 0.95),
        ("alpha", 0.0),
        ("eps", 1e-8),
        ("eps_root", 0.0),
        ("weight_decay", 0.0),
        ("weight_decay_mask", True),
        ("trainable", True),
        ("state_format", StateFormat.float32()),
        ("bias_correct_m1", False),
        ("normalize", False),
        ("decoupled_weight_decay", False),
        ("learning_rate_scale", 1.0),
        ("clip_update_rms", None),
        ("skip_nonfinite", False),
    ]
    keyword_only = inspect.Parameter.KEYWORD_ONLY
    by_keyword = {k for k, x in parameters.items() if x.kind == keyword_only}
    flags = {"bias_correct_m1", "normalize", "decoupled_weight_decay"}
    guards = {"clip_update_rms", "skip_nonfinite"}
    assert by_keyword == flags | guards | {"learning_rate_scale"}


@pytest.mark.parametrize(
    "ours,theirs",
    (
        (simplified_ademamix, optax.contrib.simplified_ademamix),
        (scale_by_simplified_ademamix, optax.contrib.scale_by_simplified_ademamix),
    ),
)
def test_the_functions_have_the_arguments_of_optax(ours: Any, theirs: Any):
    found, expected = (inspect.signature(f).parameters for f in (ours, theirs))
    arguments = lambda ps: [(k, x.default, x.kind) for k, x in ps.items()]
    keyword_only = inspect.Parameter.KEYWORD_ONLY
    guards = [
        ("clip_update_rms", None, keyword_only),
        ("skip_nonfinite", False, keyword_only),
    ]
    assert arguments(found) == [*arguments(expected), *guards]


def test_hyperparams():
    optim = SimplifiedAdEMAMix(
        lambda count: 0.1 * (count.astype(float) + 1),
        b1=beta3_scheduler(0.99, 0.9, warmup=100, offset=1),
        alpha=alpha_scheduler(8.0, warmup=4),
        weight_decay=jnp.asarray(0.1),
    )
    params = jnp.ones(3)
    state = optim.init(params)
    for i in range(3):
        for read in (hyperparams, eqx.filter_jit(hyperparams)):
            now = read(optim, state)
            leaves = jtu.tree_leaves_with_path(now)
            assert {jtu.keystr(path) for path, _ in leaves} == {
                ".learning_rate", ".b1", ".b2", ".alpha", ".weight_decay",
            }  # fmt: skip
            for _, x in leaves:
                assert x.shape == () and x.dtype == jnp.float32 and not x.weak_type
            np.testing.assert_allclose(now.learning_rate, 0.1 * (i + 1), rtol=1e-6)
            np.testing.assert_allclose(
                now.b1, reference_b3(i + 1, 0.99, 0.9, 100), rtol=1e-6
            )
            assert now.b2 == np.float32(0.95) and now.alpha == 2.0 * i
            assert now.weight_decay == np.float32(0.1)
        _, state = optim.update(params, state, params)
    with x64():
        wide = hyperparams(SimplifiedAdEMAMix(1e-3), SimplifiedAdEMAMix(1).init(params))
        assert all(x.dtype == jnp.float64 for x in jtu.tree_leaves(wide))


def test_python_numbers_are_static():
    optim = SimplifiedAdEMAMix(1, np.float32(0.5), alpha=np.int64(3), normalize=True)
    for value in (optim.learning_rate, optim.b1, optim.alpha):
        assert type(value) is float
    assert jtu.tree_leaves(eqx.filter(optim, eqx.is_array)) == []
    assert hash(optim) == hash(jax.tree.map(lambda x: x, optim))


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_new_arrays_do_not_retrace(correction: Any):
    model = make_mlp()
    grads = eqx.filter_grad(loss_of_arrays)(model)
    counted, traces = count_traces(
        lambda optim, state: update(optim, grads, state, model)
    )
    step, sizes = eqx.filter_jit(counted), []
    for rate in (
        jnp.asarray(0.1),
        jnp.asarray(0.2, jnp.float32),
        np.asarray(0.3, np.float64),
        jnp.asarray(1),
    ):
        optim = SimplifiedAdEMAMix(
            rate, jnp.asarray(0.9), alpha=np.asarray(2.0), **correction
        )
        updates, _ = step(optim, init(optim, model))
        sizes.append(float(jnp.max(jnp.abs(updates.layers[0].weight))))
    assert len(traces) == 1
    assert np.all(np.diff(sizes) > 0)


def test_a_schedule_with_arrays_does_not_retrace():
    model = make_mlp()
    grads = eqx.filter_grad(loss_of_arrays)(model)
    counted, traces = count_traces(
        lambda optim, state: update(optim, grads, state, model)
    )
    step = eqx.filter_jit(counted)
    for end in (0.99, 0.999, 0.9999):
        optim = SimplifiedAdEMAMix(
            1e-3,
            beta3_scheduler(jnp.asarray(end), 0.9, warmup=jnp.asarray(10)),
            alpha=alpha_scheduler(jnp.asarray(10 * end), warmup=jnp.asarray(10)),
        )
        step(optim, init(optim, model))
    assert len(traces) == 1


@pytest.mark.parametrize(
    "name,correction",
    (
        ("learning_rate", PLAIN),
        ("b1", CORRECTED),
        ("b1", NORMALIZED),
        ("b2", PLAIN),
        ("alpha", NORMALIZED),
    ),
)
def test_derivatives_to_hyperparameters(name: str, correction: Any):
    with x64():
        params = {"w": jnp.asarray([0.3, -0.7]), "b": jnp.asarray(0.1)}
        values = {"learning_rate": 0.02, "b1": 0.8, "b2": 0.9, "alpha": 2.0}

        def final_loss(value: Any) -> Any:
            arguments: Any = {**values, name: value}
            optim = SimplifiedAdEMAMix(**arguments, eps_root=1e-6, **correction)
            p, state = params, optim.init(params)
            for _ in range(4):
                updates, state = optim.update(jax.grad(loss_of_arrays)(p), state, p)
                p = eqx.apply_updates(p, updates)
            return loss_of_arrays(p)

        value, h = jnp.asarray(values[name]), 1e-5
        loss = jax.jit(final_loss)
        difference = (loss(value + h) - loss(value - h)) / (2 * h)
        derivative = jax.jit(jax.grad(final_loss))(value)
        np.testing.assert_allclose(derivative, difference, rtol=1e-6)


#
# Whole models, masks
#


def test_the_whole_model(getkey: Any):
    model = make_zoo(getkey())
    optim = SimplifiedAdEMAMix(
        1e-2, weight_decay=0.1, weight_decay_mask=decay_mask(model), normalize=True
    )
    state = init(optim, model)
    assert isinstance(state, SimplifiedAdEMAMixState)
    trained = jax.tree.map(lambda x: eqx.is_inexact_array(x), model)
    flags = jtu.tree_leaves(trained, is_leaf=lambda x: x is None)
    for tree in (state.m, state.nu):
        leaves = jtu.tree_leaves(tree, is_leaf=lambda x: x is None)
        assert [x is not None for x in leaves] == [bool(x) for x in flags]
    assert jtu.tree_leaves(state.m.shared.pytree[1]) == []  # shared with the first
    before = loss_of_arrays(model)
    for _ in range(3):
        grads = eqx.filter_grad(loss_of_arrays)(model)
        updates, state = eqx.filter_jit(update)(optim, grads, state, model)
        new = eqx.apply_updates(model, updates)
        assert tree_type(new) == tree_type(model)
        assert new.function is model.function and new.flags == model.flags
        model = new
    assert loss_of_arrays(model) < before


def test_methods_and_functions_are_the_same():
    model, optim = make_mlp(), SimplifiedAdEMAMix(1e-2)
    grads = eqx.filter_grad(loss_of_arrays)(model)
    a = update(optim, grads, init(optim, model), model)
    b = optim.update(grads, optim.init(model), model)
    assert_trees_close(a, b, 0.0)
    assert isinstance(optim, eqx_ademamix.AbstractOptimizer)


NESTED = {"layer": {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}, "scale": jnp.ones(2)}
MASKS = {
    "all": (True, {"w", "b", "scale"}),
    "none": (False, set()),
    "callable": (lambda x: x.ndim > 1, {"w"}),
    "tree": ({"layer": {"w": True, "b": False}, "scale": True}, {"w", "scale"}),
    "prefix": ({"layer": True, "scale": False}, {"w", "b"}),
    "decay_mask": (decay_mask(NESTED), {"w"}),
}


@pytest.mark.parametrize("mask,expected", MASKS.values(), ids=MASKS.keys())
def test_which_leaves_are_decayed(mask: Any, expected: set[str]):
    optim = SimplifiedAdEMAMix(1.0, weight_decay=0.5, weight_decay_mask=mask)
    zeros = jax.tree.map(jnp.zeros_like, NESTED)
    updates, _ = optim.update(zeros, optim.init(NESTED), NESTED)
    flat = {**updates["layer"], "scale": updates["scale"]}
    for name, x in flat.items():
        assert np.all(np.asarray(x) == (-0.5 if name in expected else 0.0))


@pytest.mark.parametrize("mask,expected", MASKS.values(), ids=MASKS.keys())
def test_which_leaves_are_trained(mask: Any, expected: set[str]):
    optim = SimplifiedAdEMAMix(1e-2, trainable=mask, weight_decay=0.1)
    if not expected:
        with pytest.raises(ValueError, match="`trainable` selects none of the arrays"):
            optim.init(NESTED)
        return
    state = optim.init(NESTED)
    updates, after = optim.update(NESTED, state, NESTED)
    assert tree_type(after) == tree_type(state)
    for tree in (state.m, state.nu, updates):
        flat = {**tree["layer"], "scale": tree["scale"]}
        assert {k for k, x in flat.items() if x is not None} == expected
    whole, _ = SimplifiedAdEMAMix(1e-2, weight_decay=0.1).update(
        NESTED, SimplifiedAdEMAMix(1e-2).init(NESTED), NESTED
    )
    pruned = jax.tree.map(
        lambda x, y: None if y is None else x,
        whole,
        updates,
        is_leaf=lambda x: x is None,
    )
    assert_trees_close(updates, pruned, 0.0)


def test_no_gradient_for_a_frozen_part():
    model = make_mlp()
    spec = eqx.tree_at(
        lambda m: m.layers, jax.tree.map(lambda _: False, model), (False, True, True)
    )
    optim = SimplifiedAdEMAMix(1e-2, trainable=spec, weight_decay=0.1)
    grads = eqx.filter_grad(loss_of_arrays)(model)
    state = init(optim, model)
    expected = update(optim, grads, state, model)
    pruned = eqx.tree_at(lambda m: m.layers[0], grads, None)
    assert_trees_close(update(optim, pruned, state, model), expected, 0.0)


def test_float0_gradients_and_trees_without_leaves():
    optim = SimplifiedAdEMAMix(1e-2)
    params = {"w": jnp.ones(3), "n": jnp.asarray(2)}
    grads = jax.grad(lambda p: jnp.sum(p["w"] ** 2), allow_int=True)(params)
    updates, _ = optim.update(grads, optim.init(params), params)
    assert updates["n"] is None and updates["w"].shape == (3,)
    for empty in ({}, (), {"a": None}, optax.MaskedNode()):
        updates, state = optim.update(empty, optim.init(empty), empty)
        assert state.count == 1 and jtu.tree_leaves(updates) == []


def test_weakly_typed_parameters_stay_so():
    params = {"full": jnp.full((3,), 0.5), "x": jnp.ones(2)}
    assert params["full"].weak_type
    optim = SimplifiedAdEMAMix(1e-2, weight_decay=0.1, normalize=True)

    def one(params: Any, state: Any) -> Any:
        grads = jax.grad(loss_of_arrays)(params)
        updates, state = optim.update(grads, state, params)
        return eqx.apply_updates(params, updates), state

    counted, traces = count_traces(one)
    step, kind, state = jax.jit(counted), tree_type(params), optim.init(params)
    for _ in range(3):
        params, state = step(params, state)
        assert tree_type(params) == kind
    assert len(traces) == 1


#
# The state
#


SCHEDULED: Any = dict(
    b1=beta3_scheduler(0.99, 0.9, warmup=10, offset=1),
    alpha=alpha_scheduler(5.0, warmup=10),
)
OPTIMIZERS = (
    SimplifiedAdEMAMix(1e-3),
    SimplifiedAdEMAMix(1e-3, weight_decay=0.1, bias_correct_m1=True),
    SimplifiedAdEMAMix(1e-3, **SCHEDULED),
    SimplifiedAdEMAMix(1e-3, **SCHEDULED, normalize=True),
    SimplifiedAdEMAMix(1e-3, 0, alpha=100),
    SimplifiedAdEMAMix(jnp.asarray(1e-3), jnp.asarray(0.9), alpha=np.asarray(2.0)),
    SimplifiedAdEMAMix(
        lambda count: 1e-3, lambda count: 0.9, weight_decay=jnp.asarray(0.1)
    ),
    SimplifiedAdEMAMix(
        1e-3, state_format=StateFormat(m1=jnp.float32, m2=jnp.bfloat16, nu=jnp.float16)
    ),
    SimplifiedAdEMAMix(1e-3, state_format=everywhere(StateFormat.half())),
    SimplifiedAdEMAMix(1e-3, state_format=COMPACT, normalize=True),
)
DTYPES = ("float16", "bfloat16", "float32", "float64", "complex64")


def mixed_params() -> dict[str, jax.Array]:
    return {name: jnp.ones((2, 3), name) for name in DTYPES}


@pytest.mark.parametrize("optim", OPTIMIZERS, ids=range(len(OPTIMIZERS)))
@pytest.mark.parametrize("with_params", (False, True))
def test_types_stay(optim: Any, with_params: bool):
    if not with_params and (
        isinstance(optim.weight_decay, jax.Array) or optim.weight_decay
    ):
        optim = SimplifiedAdEMAMix(1e-3, 0.9, bias_correct_m1=True)
    with x64():
        params = mixed_params()
        state = optim.init(params)
        before = tree_type(state)
        step = eqx.filter_jit(optim.update)
        updates, after = step(params, state, *([params] if with_params else []))
        assert tree_type(after) == before
        assert tree_type(updates) == tree_type(params)


def test_what_the_state_is():
    with x64():
        state = SimplifiedAdEMAMix(1e-3).init(mixed_params())
        names = [field.name for field in dataclasses.fields(SimplifiedAdEMAMixState)]
        assert names == ["count", "num", "m", "nu", "nu_weight", "skipped"]
        assert (state.count.dtype, state.count.shape) == (jnp.int32, ())
        assert (state.num.dtype, state.num.shape) == (jnp.float64, ())
        assert {k: (state.m[k].dtype.name, state.nu[k].dtype.name) for k in DTYPES} == {
            "float16": ("float32", "float32"),
            "bfloat16": ("float32", "float32"),
            "float32": ("float32", "float32"),
            "float64": ("float64", "float64"),
            "complex64": ("complex64", "float32"),
        }
        assert all(not jnp.any(x) for x in jtu.tree_leaves(state))
    state = SimplifiedAdEMAMix(1e-3).init(jnp.ones(2))
    assert state.num.dtype == jnp.float32 and not state.num.weak_type


@pytest.mark.parametrize("b1", (0.99, 0.0))
def test_m_is_stored_as_the_format_says_of_m2(b1: float):
    fmt = StateFormat(m1=jnp.float16, m2=jnp.bfloat16, nu=jnp.float16)
    with x64():
        state = SimplifiedAdEMAMix(1e-3, b1, state_format=fmt).init(mixed_params())
        assert {k: (state.m[k].dtype.name, state.nu[k].dtype.name) for k in DTYPES} == {
            "float16": ("bfloat16", "float16"),
            "bfloat16": ("bfloat16", "float16"),
            "float32": ("bfloat16", "float16"),
            "float64": ("bfloat16", "float16"),
            "complex64": ("complex64", "float16"),
        }
    fmt = StateFormat.compact()
    params = {"small": jnp.zeros((63, 65)), "large": jnp.zeros((64, 64))}
    state = SimplifiedAdEMAMix(1e-3, b1, state_format=fmt).init(params)
    for tree, codec in ((state.m, fmt.m2), (state.nu, fmt.nu)):
        assert isinstance(tree["large"], Encoded) and tree["large"].codec == codec
        assert tree["small"].dtype == jnp.float32
    assert isinstance(fmt.m2, ScaledFloat16)


def test_gradients_of_another_precision():
    with x64():
        params = {k: v for k, v in mixed_params().items() if k != "complex64"}
        optim = SimplifiedAdEMAMix(1e-3, **SCHEDULED, normalize=True)
        state = optim.init(params)
        for dtype in (jnp.bfloat16, jnp.float32, jnp.float64):
            grads = jax.tree.map(lambda x, d=dtype: jnp.ones_like(x, dtype=d), params)
            updates, after = optim.update(grads, state, params)
            assert tree_type(after) == tree_type(state)
            assert tree_type(updates) == tree_type(params)
            updates, after = optim.update(grads, state)
            assert tree_type(after) == tree_type(state)
            assert tree_type(updates) == tree_type(grads)


@pytest.mark.parametrize("optim", OPTIMIZERS, ids=range(len(OPTIMIZERS)))
def test_scan_carry_one_trace_and_donation(optim: Any):
    model = make_mlp()
    grads = eqx.filter_grad(loss_of_arrays)(model)
    state = init(optim, model)
    assert len(set(buffers(state))) == len(buffers(state))

    def one(optim: Any, state: Any) -> Any:
        return update(optim, grads, state, model)[1]

    def body(carry: Any, _: None) -> Any:
        return one(optim, carry), None

    scanned, _ = jax.jit(lambda s: jax.lax.scan(body, s, None, length=3))(state)
    counted, traces = count_traces(one)
    step = eqx.filter_jit(counted, donate="all-except-first")
    for _ in range(3):
        old = [x for x in jtu.tree_leaves(state) if x.size]
        state = step(optim, state)
        assert all(x.is_deleted() for x in old)
    assert len(traces) == 1
    assert_trees_close(*jax.jit(decoded)((scanned, state)), 1e-6)
    assert tree_type(scanned) == tree_type(state) and scanned.count == 3


@pytest.mark.parametrize("name", ("float32", "half", "compact"))
def test_all_of_it_is_written_where_it_was_read(name: str):
    params = {"w": jnp.zeros((64, 256)), "v": jnp.zeros((3, 20, 300))}
    fmt = getattr(StateFormat, name)()
    optim = SimplifiedAdEMAMix(1e-3, alpha=10.0, normalize=True, state_format=fmt)
    state = optim.init(params)

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = optim.update(grads, state, params)
        return eqx.apply_updates(params, updates), state

    jitted = jax.jit(step, donate_argnums=(0, 1))
    program = jitted.lower(params, state, params).compile().as_text()
    leaves = [x for x in jtu.tree_leaves((params, state)) if x.size > 1]
    assert str(program).count("-alias)") >= len(leaves)


def test_the_counter_saturates():
    optim = SimplifiedAdEMAMix(1e-3, **SCHEDULED, normalize=True)
    last = jnp.asarray(2**31 - 1, jnp.int32)
    state = eqx.tree_at(lambda s: s.count, optim.init(jnp.ones(2)), last)
    for step in (optim.update, jax.jit(optim.update)):
        updates, after = step(jnp.ones(2), state)
        assert after.count == 2**31 - 1
        assert np.all(np.isfinite(updates))
        assert hyperparams(optim, after).alpha == 5.0


def test_a_sweep_is_one_program():
    model = make_mlp()
    rates, decays = jnp.linspace(1e-4, 1e-2, 8), jnp.linspace(0.5, 0.99, 8)
    alphas = jnp.linspace(0.0, 100.0, 8)

    def train(optim: Any, model: Any, state: Any) -> Any:
        for _ in range(3):
            grads = eqx.filter_grad(loss_of_arrays)(model)
            updates, state = update(optim, grads, state, model)
            model = eqx.apply_updates(model, updates)
        return model, state

    def make(rate: Any, b1: Any, alpha: Any) -> Any:
        return SimplifiedAdEMAMix(
            rate, b1, alpha=alpha, weight_decay=0.1, normalize=True
        )

    optims = eqx.filter_vmap(make)(rates, decays, alphas)
    states = eqx.filter_vmap(init, in_axes=(eqx.if_array(0), None))(optims, model)
    assert states.count.shape == states.num.shape == (8,)
    counted, traces = count_traces(train)
    in_axes = (eqx.if_array(0), None, eqx.if_array(0))
    sweep = eqx.filter_jit(eqx.filter_vmap(counted, in_axes=in_axes))
    models, after = sweep(optims, model, states)
    sweep(eqx.filter_vmap(make)(2 * rates, decays, alphas), model, states)
    assert len(traces) == 1
    for i in (0, 3, 7):
        optim = make(rates[i], decays[i], alphas[i])
        alone, state = eqx.filter_jit(train)(optim, model, optim.init(model))
        pick = lambda x, i=i: x[i] if eqx.is_array(x) else x
        assert_trees_close(jax.tree.map(pick, models), alone, 1e-6)
        assert_trees_close(jax.tree.map(pick, after), state, 1e-6)


def test_an_ensemble_is_one_program():
    optim = SimplifiedAdEMAMix(1e-2, **SCHEDULED, normalize=True)
    models = eqx.filter_vmap(
        lambda key: eqx.nn.MLP(3, 2, 4, 2, key=key)
    )(jax.random.split(jax.random.key(0), 8))  # fmt: skip
    states = eqx.filter_vmap(optim.init)(models)

    def train(model: Any, state: Any) -> Any:
        grads = eqx.filter_grad(loss_of_arrays)(model)
        updates, state = update(optim, grads, state, model)
        return eqx.apply_updates(model, updates), state

    counted, traces = count_traces(train)
    step = eqx.filter_jit(eqx.filter_vmap(counted))
    out, states = step(*step(models, states))
    assert len(traces) == 1
    pick = lambda x: x[5] if eqx.is_array(x) else x
    alone = jax.tree.map(pick, models)
    expected = train(*train(alone, optim.init(alone)))
    assert_trees_close(jax.tree.map(pick, (out, states)), expected, 1e-6)


@pytest.mark.parametrize("name", ("float32", "compact"))
def test_the_state_is_sharded_as_the_parameters(name: str):
    devices = np.asarray(jax.devices())
    assert len(devices) == 8
    mesh = Mesh(devices, ("data",))
    sharding = NamedSharding(mesh, PartitionSpec("data", None))
    rng = np.random.default_rng(0)
    params = {
        "w": jnp.asarray(rng.normal(size=(64, 256)), jnp.float32),
        "b": jnp.ones(4),
    }
    sharded = {"w": jax.device_put(params["w"], sharding), "b": params["b"]}
    fmt = getattr(StateFormat, name)()
    optim = SimplifiedAdEMAMix(1e-2, weight_decay=0.1, state_format=fmt, **SCHEDULED)
    state, sharded_state = optim.init(params), optim.init(sharded)
    assert tree_type(state) == tree_type(sharded_state)
    step = jax.jit(optim.update)
    for _ in range(3):
        for tree in (sharded_state.m, sharded_state.nu):
            moment = tree["w"].real[0] if name == "compact" else tree["w"]
            assert moment.sharding.is_equivalent_to(sharding, 2)
            assert moment.addressable_shards[0].data.shape == (8, 256)
        updates, state = step(params, state, params)
        sharded_updates, sharded_state = step(sharded, sharded_state, sharded)
        assert sharded_updates["w"].sharding.is_equivalent_to(sharding, 2)
        if name == "float32":
            pairs = zip(*map(jtu.tree_leaves, (updates, sharded_updates)), strict=True)
            for a, b in pairs:
                np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    # Codes may differ by one where the compiler rounds the arithmetic otherwise.
    pairs = zip(*map(jtu.tree_leaves, (state, sharded_state)), strict=True)
    for a, b in pairs:
        assert np.mean(np.asarray(a) != np.asarray(b)) < 1e-3 or max_error(a, b) < 1e-6


def test_serialisation_shapes_and_numpy(tmp_path: Any):
    model, optim = make_mlp(), SimplifiedAdEMAMix(1e-2, **SCHEDULED, normalize=True)
    grads = eqx.filter_grad(loss_of_arrays)(model)
    _, state = optim.update(grads, optim.init(model), model)
    eqx.tree_serialise_leaves(tmp_path / "state.eqx", state)
    like = eqx.filter_eval_shape(init, optim, model)
    loaded = eqx.tree_deserialise_leaves(tmp_path / "state.eqx", like)
    assert_trees_close(loaded, state, 0.0)
    expected = optim.update(grads, state, model)
    on_host = jax.device_get(state)
    assert_trees_close(optim.update(grads, loaded, model), expected, 0.0)
    assert_trees_close(optim.update(grads, on_host, model), expected, 0.0)
    assert_trees_close(hyperparams(optim, on_host), hyperparams(optim, state), 0.0)


def test_plain_jit_of_the_methods():
    mask = {"w": True, "b": False}
    optim = SimplifiedAdEMAMix(
        1e-3, weight_decay=0.1, weight_decay_mask=mask, **SCHEDULED
    )
    params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
    found = jax.jit(optim.update)(params, jax.jit(optim.init)(params), params)
    expected = optim.update(params, optim.init(params), params)
    assert_trees_close(found, expected, 1e-6)


def test_a_state_is_typed():
    count, num = jnp.zeros((), jnp.int32), jnp.zeros(())
    good = {"w": jnp.zeros((2, 3))}
    SimplifiedAdEMAMixState(count, num, good, good)
    SimplifiedAdEMAMixState(count, num, {"w": jnp.zeros((2, 3), complex)}, good)
    for wrong in (
        {"w": jnp.zeros((3, 2))},
        {"v": jnp.zeros((2, 3))},
        {"w": jnp.zeros((2, 3), int)},
    ):
        with pytest.raises(TypeError):
            SimplifiedAdEMAMixState(count, num, wrong, good)
        with pytest.raises(TypeError):
            SimplifiedAdEMAMixState(count, num, good, wrong)
    with pytest.raises(TypeError):
        SimplifiedAdEMAMixState(count, num, good, {"w": jnp.zeros((2, 3), complex)})
    for counters in ((num, num), (count, count), (jnp.zeros(2, jnp.int32), num)):
        with pytest.raises(TypeError):
            SimplifiedAdEMAMixState(*counters, good, good)
    with pytest.raises(TypeError):
        SimplifiedAdEMAMixState(count, jnp.zeros(2), good, good)


#
# Formats
#


FORMATS = {
    "compact": StateFormat.compact(),
    "half": StateFormat.half(),
    "mixed": StateFormat(m1=jnp.bfloat16, m2=ScaledFloat16(), nu=jnp.float32),
}


def large_params() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    real = lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    shapes = {"w": (64, 256), "stack": (3, 20, 300), "b": (7,)}
    params: dict[str, Any] = {name: real(shape) for name, shape in shapes.items()}
    return {**params, "c": jax.lax.complex(real((70, 70)), real((70, 70)))}


def sines(params: Any) -> Any:
    """Gradients of all sizes."""
    real = lambda x: 1e-3 * jnp.sin(7 * x) * jnp.exp(2 * x)

    def of(x: Any) -> Any:
        if jnp.iscomplexobj(x):
            return jax.lax.complex(real(x.real), real(x.imag))
        return real(x)

    return jax.tree.map(of, params)


def train_on_sines(optim: Any, params: Any, steps: int) -> Any:
    def one(params: Any, state: Any) -> Any:
        updates, state = optim.update(sines(params), state, params)
        return eqx.apply_updates(params, updates), state

    counted, traces = count_traces(one)
    step, state = jax.jit(counted), optim.init(params)
    before = tree_type(state)
    for _ in range(steps):
        params, state = step(params, state)
    assert tree_type(state) == before and len(traces) == 1
    return params, state


@pytest.mark.parametrize("correction", (PLAIN, NORMALIZED))
@pytest.mark.parametrize("name", FORMATS)
def test_updates_are_close_to_those_of_float32(name: str, correction: Any):
    rate = 1e-3 if correction else 1e-4
    kwargs: Any = {**SCHEDULED, **correction}
    params, fmt = large_params(), everywhere(FORMATS[name])
    found, _ = train_on_sines(
        SimplifiedAdEMAMix(rate, state_format=fmt, **kwargs), params, 20
    )
    exact, _ = train_on_sines(SimplifiedAdEMAMix(rate, **kwargs), params, 20)
    tolerance = 0.1 if name == "compact" else 0.02
    for k, x in params.items():
        error = jnp.linalg.norm((exact[k] - found[k]).ravel())
        assert error <= tolerance * jnp.linalg.norm((exact[k] - x).ravel()), k


@pytest.mark.parametrize(
    "dtype,correction",
    (
        ("float16", PLAIN),
        ("bfloat16", NORMALIZED),
        ("float64", PLAIN),
        ("float64", CORRECTED),
        ("float64", NORMALIZED),
    ),
)
def test_what_is_stored_is_what_the_update_was_made_from(dtype: str, correction: Any):
    with x64():
        params = jnp.asarray(np.random.default_rng(0).normal(size=(64, 256)), dtype)
        optim = SimplifiedAdEMAMix(
            1e-2, 0.9, alpha=3.0, weight_decay=0.1,
            state_format=StateFormat.compact(), **correction,
        )  # fmt: skip
        state = optim.init(params)
        step = jax.jit(optim.update)
        _, state = step(jnp.sin(params), state, params)
        updates, after = step(params, state, params)
        assert updates.dtype == params.dtype and tree_type(after) == tree_type(state)
        assert isinstance(after.m, Encoded) and isinstance(after.nu, Encoded)
        dense: Any = jax.tree.map(np.float64, decoded(after))
        p = np.float64(params)
        divisor = (1.9 if "bias_correct_m1" in correction else 1.0) + (
            3.9 if "normalize" in correction else 0.0
        )
        direction = (3.0 * p + dense.m) / divisor
        direction = direction / (np.sqrt(dense.nu / (1 - 0.95**2)) + 1e-8)
        expected = -1e-2 * (direction + 0.1 * p)
        tolerance = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float64": 1e-12}[dtype]
        assert max_error(updates, expected) <= tolerance


def test_equal_leaves_are_rounded_independently_and_runs_repeat():
    optim = SimplifiedAdEMAMix(1e-3, state_format=COMPACT)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 256)), jnp.float32)
    step = jax.jit(optim.update)
    runs = [step([x, x], optim.init([x, x])) for _ in range(2)]
    assert eqx.tree_equal(*runs)
    for tree in (runs[0][1].m, runs[0][1].nu):
        assert not np.array_equal(tree[0].real[0], tree[1].real[0])


def test_float16_moments_stay_finite():
    """A sum of gradients grows out of float16 sooner than an average."""
    fmt = StateFormat(m1=jnp.float32, m2=jnp.float16, nu=jnp.float16)
    optim = SimplifiedAdEMAMix(1e-3, state_format=fmt)
    g = jnp.full((3,), 1e4)
    state, updates = optim.init(g), None
    for _ in range(10):
        updates, state = optim.update(g, state)
    assert np.all(np.asarray(state.m) == 65504) and np.all(np.isfinite(updates))


def test_decoded():
    params = {k: v for k, v in large_params().items() if k in ("w", "b")}
    optim = SimplifiedAdEMAMix(1e-3, state_format=COMPACT)
    _, state = train_on_sines(optim, params, 2)
    dense = decoded(state)
    assert type(dense) is SimplifiedAdEMAMixState
    assert tree_type(dense) == tree_type(SimplifiedAdEMAMix(1e-3).init(params))
    codec: Any = optim.state_format.m2
    assert np.array_equal(dense.m["w"], codec.decode(state.m["w"]))
    assert (dense.count, dense.num) == (state.count, state.num)
    nested = decoded({"inside": (state, 1)})
    assert eqx.tree_equal(nested["inside"][0], dense)


def test_report_and_bytes():
    params = {"bias": jnp.zeros(256), "weight": jnp.zeros((64, 256))}
    optim = SimplifiedAdEMAMix(1e-3, state_format=StateFormat.compact())
    state = init(optim, params)
    report = (
        "The state takes 51,720 bytes, 3.11 per parameter.\n"
        "\n"
        "  path        shape      m              nu            bytes\n"
        "  ['bias']    (256,)     float32        float32        8.00\n"
        "  ['weight']  (64, 256)  ScaledFloat16  ScaledFloat8   3.03"
    )
    shapes = eqx.filter_eval_shape(init, optim, params)
    assert state_report(state) == state_report(shapes) == report
    assert state_report((optax.EmptyState(), state)) == report
    assert state_bytes(state) == state_bytes(shapes) == 51_720
    assert state_bytes(init(SimplifiedAdEMAMix(1e-3), params)) == 8 + 8 * 16_640
    assert state_report(init(SimplifiedAdEMAMix(1e-3), jnp.zeros((2, 3)))) == (
        "The state takes 56 bytes, 9.33 per parameter.\n"
        "\n"
        "  path               shape   m        nu       bytes\n"
        "  (the tree itself)  (2, 3)  float32  float32   8.00"
    )


#
# Around it
#


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_compensated_bfloat16_parameters_move_as_float32_ones(correction: Any):
    rng = np.random.default_rng(0)
    start = jnp.asarray(rng.uniform(1, 2, size=256), jnp.bfloat16)
    grads = jnp.asarray(rng.normal(size=(STEPS, 256)), jnp.bfloat16)
    inner = SimplifiedAdEMAMix(1e-6, alpha=2.0, weight_decay=0.1, **correction)
    optim = Compensated(inner)
    wide, wide_grads = start.astype(jnp.float32), grads.astype(jnp.float32)
    exact, *_ = run(inner, wide, wide_grads)
    params, state, _ = run(optim, start, grads)
    assert params.dtype == jnp.bfloat16
    assert isinstance(state.inner_state, SimplifiedAdEMAMixState)
    assert state.inner_state.count == STEPS
    moved = np.float64(exact) - np.float64(wide)
    found = np.float64(optim.master_params(params, state)) - np.float64(wide)
    # To a few units in the last place of a float32 parameter between 1 and 2.
    assert np.max(np.abs(found - moved)) <= 20 * 2.0**-23
    assert np.max(np.abs(moved)) >= 100 * 2.0**-23 or correction


def loss_of_model(model: Any) -> Any:
    x = jax.random.normal(jax.random.key(1), (16, 3))
    return jnp.mean((jax.vmap(model)(x) - x[:, :2]) ** 2)


def as_class() -> Any:
    return SimplifiedAdEMAMix(3e-2, weight_decay=0.01, **SCHEDULED, normalize=True)


def as_compact() -> Any:
    return SimplifiedAdEMAMix(3e-2, **SCHEDULED, normalize=True, state_format=COMPACT)


def as_function() -> Any:
    return simplified_ademamix(3e-3, 0.9, alpha=SCHEDULED["alpha"], weight_decay=0.01)


def as_scale() -> Any:
    return optax.chain(scale_by_simplified_ademamix(0.9), optax.scale(-3e-3))


WRAPPERS: dict[str, Any] = {
    "alone": lambda optim: optim,
    "chain": lambda optim: optax.chain(optax.clip_by_global_norm(1.0), optim),
    "MultiSteps": lambda optim: optax.MultiSteps(optim, every_k_schedule=2),
    "apply_if_finite": lambda optim: optax.apply_if_finite(optim, 3),
    "masked": lambda optim: optax.chain(
        optax.masked(optim, lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
        optax.masked(
            optax.scale(-1e-2), lambda p: jax.tree.map(lambda x: x.ndim < 2, p)
        ),
    ),
}


@pytest.mark.parametrize(
    "make,name",
    (
        *it.product((as_class, as_function), WRAPPERS),
        (as_compact, "MultiSteps"),
        (as_scale, "chain"),
    ),
)
def test_trains_inside_optax(make: Any, name: str, standard_promotion: None):
    model, optim = make_mlp(), WRAPPERS[name](make())

    def one(model: Any, state: Any) -> Any:
        loss, grads = eqx.filter_value_and_grad(loss_of_model)(model)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, state = optim.update(grads, state, params)
        return eqx.apply_updates(model, updates), state, loss

    counted, traces = count_traces(one)
    step = eqx.filter_jit(counted)
    state = optim.init(eqx.filter(model, eqx.is_inexact_array))
    kind, losses = tree_type(state), []
    for _ in range(60):
        model, state, loss = step(model, state)
        losses.append(float(loss))
    assert tree_type(state) == kind and len(traces) == 1
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("make", (as_class, as_function))
def test_multi_steps_is_one_step_on_the_mean(make: Any, standard_promotion: None):
    params = {"w": jnp.ones((2, 3)), "b": jnp.zeros(3)}
    draw = lambda k: jax.tree.map(
        lambda x: jax.random.normal(jax.random.key(k), x.shape), params
    )
    grads = [draw(k) for k in range(3)]
    steps = optax.MultiSteps(make(), every_k_schedule=3)
    state, updates = steps.init(params), None
    for g in grads:
        updates, state = jax.jit(steps.update)(g, state, params)
    mean = jax.tree.map(lambda *xs: sum(xs) / 3, *grads)
    expected, _ = make().update(mean, make().init(params), params)
    assert_trees_close(updates, expected, 1e-5)


def test_a_nan_changes_nothing_under_apply_if_finite(standard_promotion: None):
    params = jnp.ones(3)
    optim: Any = optax.apply_if_finite(as_class(), 3)
    state = optim.init(params)
    updates, state = optim.update(jnp.asarray([1.0, jnp.nan, 0.0]), state, params)
    assert jnp.all(updates == 0)
    assert state.inner_state.count == 0 and state.inner_state.num == 0
    updates, state = optim.update(params, state, params)
    assert jnp.all(updates < 0)
    assert state.inner_state.count == 1 and state.inner_state.num == 1


@pytest.mark.parametrize("alpha,rest", tuple(zip(ALPHAS, RESTS[1:4], strict=True)))
def test_the_function_is_the_class(alpha: str, rest: Any):
    kwargs = dict(rest)
    mask = kwargs.pop("weight_decay_mask", None)
    tx = simplified_ademamix(RATE, 0.9, 0.99, ALPHAS[alpha][0], mask=mask, **kwargs)
    assert isinstance(tx, optax.GradientTransformation)
    optim = SimplifiedAdEMAMix(RATE, 0.9, 0.99, ALPHAS[alpha][0], **rest)
    params, grads = make_params(np.float32), make_grads(np.float32)
    found, expected = run(tx, params, grads), run(optim, params, grads)
    assert_trees_close((found[0], found[2]), (expected[0], expected[2]), 1e-6)


@pytest.mark.parametrize("alpha", OPTAX_ALPHAS)
def test_the_direction_has_a_positive_sign(alpha: str):
    scale = scale_by_simplified_ademamix(0.9, 0.99, ALPHAS[alpha][0], 1e-6, 1e-4)
    assert isinstance(scale, optax.GradientTransformation)
    theirs = optax.contrib.scale_by_simplified_ademamix(
        0.9, 0.99, ALPHAS[alpha][0], 1e-6, 1e-4
    )
    params, grads = make_params(np.float32), make_grads(np.float32)
    *_, found = run(scale, params, grads)
    with jax.numpy_dtype_promotion("standard"):
        *_, expected = run(theirs, params, grads)
    for k in SHAPES:
        assert max_error(found[k], expected[k]) <= 1e-5


def test_the_masks_of_the_function_are_those_of_optax(standard_promotion: None):
    params = eqx.filter(make_mlp(), eqx.is_inexact_array)
    by_rank = lambda p: jax.tree.map(lambda x: x.ndim > 1, p)
    zeros = jax.tree.map(jnp.zeros_like, params)
    for mask in (by_rank, by_rank(params)):
        tx = simplified_ademamix(1.0, weight_decay=0.5, mask=mask)
        updates: Any = tx.update(zeros, tx.init(params), params)[0]
        for layer, old in zip(updates.layers, params.layers, strict=True):
            np.testing.assert_allclose(layer.weight, -0.5 * old.weight, rtol=1e-6)
            assert not np.any(layer.bias)
    tx = simplified_ademamix(
        1.0, weight_decay=0.5, mask={"layer": True, "scale": False}
    )
    zeros = jax.tree.map(jnp.zeros_like, NESTED)
    updates, _ = tx.update(zeros, tx.init(NESTED), NESTED)
    assert np.all(updates["layer"]["w"] == -0.5) and not np.any(updates["scale"])


#
# To and from optax
#


OptaxState: Any = optax.contrib.ScaleBySimplifiedAdEMAMixState


def arrays(model: Any) -> Any:
    return eqx.filter(model, eqx.is_inexact_array)


def train_model(optim: Any, model: Any, state: Any, steps: int) -> Any:
    """Any optimizer with `init` and `update`, on the filtered model."""
    params, static = eqx.partition(model, eqx.is_inexact_array)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        of = lambda p: loss_of_model(eqx.combine(p, static))
        updates, state = optim.update(jax.grad(of)(params), state, params)
        return eqx.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return eqx.combine(params, static), state


@pytest.mark.parametrize(
    "b1,alpha", [(0.0 if alpha == "100" else 0.9, alpha) for alpha in OPTAX_ALPHAS]
)
def test_from_optax_in_the_middle_and_back(
    b1: float, alpha: str, standard_promotion: None
):
    kwargs: Any = dict(b1=b1, alpha=ALPHAS[alpha][0], weight_decay=0.1)
    theirs: Any = optax.contrib.simplified_ademamix(1e-4, **kwargs)
    ours, model = SimplifiedAdEMAMix(1e-4, **kwargs), make_mlp()
    middle, opt_state = train_model(theirs, model, theirs.init(arrays(model)), 20)
    expected, expected_state = train_model(theirs, middle, opt_state, 20)
    state = from_optax(opt_state, ours, middle)
    assert tree_type(state) == tree_type(init(ours, middle))
    end, _ = train_model(ours, middle, state, 20)
    assert_trees_close(arrays(end), arrays(expected), 1e-5)

    middle, state = train_model(ours, model, init(ours, model), 20)
    expected, _ = train_model(ours, middle, state, 20)
    back = (to_optax(state), *theirs.init(arrays(model))[1:])
    end, end_state = train_model(theirs, middle, back, 20)
    assert_trees_close(arrays(end), arrays(expected), 1e-5)
    assert tree_type(end_state) == tree_type(expected_state)


ROUND_TRIPS = (
    SimplifiedAdEMAMix(1e-3),
    SimplifiedAdEMAMix(1e-3, bias_correct_m1=True),
    SimplifiedAdEMAMix(1e-2, **SCHEDULED, normalize=True),
    SimplifiedAdEMAMix(1e-2, 0.0, normalize=True),
    SimplifiedAdEMAMix(1e-2, jnp.asarray(0.9), normalize=True),
)


@pytest.mark.parametrize("optim", ROUND_TRIPS, ids=range(len(ROUND_TRIPS)))
def test_after_a_round_trip_training_goes_on(optim: Any):
    model, state = train_model(optim, make_mlp(), init(optim, make_mlp()), 15)
    theirs = to_optax(state)
    assert type(theirs) is OptaxState
    assert theirs.t == 15 and theirs.t.dtype == jnp.int32
    assert_trees_close(theirs.m, state.m, 0.0)
    assert_trees_close(theirs.n, state.nu, 0.0)
    back = from_optax(theirs, optim, model)
    assert tree_type(back) == tree_type(state) and back.count == 15
    assert_trees_close((back.m, back.nu), (state.m, state.nu), 0.0)
    np.testing.assert_allclose(back.num, state.num, rtol=1e-6)
    uses_num = optim.bias_correct_m1 or optim.normalize
    expected, _ = train_model(optim, model, state, 15)
    found, _ = train_model(optim, model, back, 15)
    assert_trees_close(arrays(found), arrays(expected), 1e-6 if uses_num else 0.0)
    inside = (optax.EmptyState(), (theirs, optax.EmptyState()))
    assert_trees_close(from_optax(inside, optim, model), back, 0.0)
    assert_trees_close(to_optax((optax.EmptyState(), state)), theirs, 0.0)


def optax_state(count: int) -> Any:
    return OptaxState(jnp.asarray(count, jnp.int32), jnp.ones(3), jnp.ones(3))


@pytest.mark.parametrize("b1", (0.0, 0.5, 0.99, 0.9999))
@pytest.mark.parametrize("count", (0, 1, 100, 1_000_000))
@pytest.mark.parametrize("as_array", (False, True))
def test_num_is_rebuilt_from_a_constant(b1: float, count: int, as_array: bool):
    optim = SimplifiedAdEMAMix(1e-3, jnp.asarray(b1) if as_array else b1)
    state = from_optax(optax_state(count), optim, jnp.ones(3))
    exact = np.longdouble(np.float32(b1)) if as_array else np.longdouble(b1)
    expected = float((1 - exact**count) / (1 - exact))
    np.testing.assert_allclose(state.num, expected, rtol=1e-6)
    assert state.num.dtype == jnp.float32 and state.num.shape == ()
    assert state.count == count and not state.num.weak_type


NUM_SCHEDULES = (
    (
        beta3_scheduler(0.99, 0.9, warmup=50, offset=1),
        lambda i: reference_b3(i + 1, 0.99, 0.9, 50),
    ),
    (
        beta3_scheduler(0.9999, 0.9, warmup=1000),
        lambda i: reference_b3(i, 0.9999, 0.9, 1000),
    ),
    (lambda count: 0.9, lambda i: 0.9),
    (
        lambda count: jnp.where(count < 5, 0.5, 0.0),
        lambda i: 0.5 if i < 5 else 0.0,
    ),
)


@pytest.mark.parametrize("b1,at", NUM_SCHEDULES, ids=range(len(NUM_SCHEDULES)))
@pytest.mark.parametrize("count", (0, 1, 30, 3000))
def test_num_is_rebuilt_from_a_schedule(b1: Any, at: Any, count: int):
    optim = SimplifiedAdEMAMix(1e-3, b1, normalize=True)
    state = from_optax(optax_state(count), optim, jnp.ones(3))
    expected = 0.0
    for i in range(count):
        expected = at(i) * expected + 1
    np.testing.assert_allclose(state.num, expected, rtol=1e-6)
    assert state.num.dtype == jnp.float32 and state.count == count


def test_num_goes_on_as_if_it_had_been_counted():
    """From a run of optax the next step is that of a run of ours."""
    for optim in ROUND_TRIPS[1:4]:
        params, state = jnp.ones(3), optim.init(jnp.ones(3))
        for _ in range(40):
            _, state = optim.update(params, state)
        found = from_optax(OptaxState(state.count, state.m, state.nu), optim, params)
        a, b = optim.update(params, found)[0], optim.update(params, state)[0]
        np.testing.assert_allclose(a, b, rtol=2e-6)


def test_other_formats_frozen_leaves_and_complex_parameters():
    model = {"w": jnp.ones((4, 3)), "b": jnp.ones(3), "n": 3, "f": jnp.tanh}
    params = arrays(model)
    theirs = optax.contrib.scale_by_simplified_ademamix()
    grads = jax.tree.map(jnp.ones_like, params)
    with jax.numpy_dtype_promotion("standard"):
        _, opt_state = theirs.update(grads, theirs.init(params), params)
    fmt = StateFormat(m1=jnp.float32, m2=jnp.float16, nu=jnp.float32)
    for optim in (
        SimplifiedAdEMAMix(1e-2),
        SimplifiedAdEMAMix(1e-2, state_format=fmt),
        SimplifiedAdEMAMix(1e-2, state_format=COMPACT),
        SimplifiedAdEMAMix(1e-2, trainable=lambda x: x.ndim > 1),
    ):
        state = from_optax(opt_state, optim, model)
        assert tree_type(state) == tree_type(init(optim, model))
        for x in jtu.tree_leaves(decoded(state).m):
            np.testing.assert_allclose(np.asarray(x, float), 1.0, rtol=1e-3)
        assert state.count == 1 and state.num == 1.0
    complex_params = {"c": jnp.ones(2, jnp.complex64)}
    with jax.numpy_dtype_promotion("standard"):
        opt_state = theirs.init(complex_params)
    optim = SimplifiedAdEMAMix(1e-2)
    state = from_optax(opt_state, optim, complex_params)
    assert tree_type(state) == tree_type(optim.init(complex_params))


def test_codes_are_decoded_for_optax():
    optim = SimplifiedAdEMAMix(1e-3, state_format=COMPACT)
    params = {"w": large_params()["w"]}
    _, state = train_on_sines(optim, params, 3)
    theirs, dense = to_optax(state), decoded(state)
    assert eqx.tree_equal(theirs.m, dense.m) and eqx.tree_equal(theirs.n, dense.nu)
    back = from_optax(theirs, optim, params)
    assert tree_type(back) == tree_type(state)
    # Rounded to nearest: what was on a grid of squares is still on it.
    assert eqx.tree_equal(decoded(back).nu, dense.nu)


def test_no_buffer_is_shared_and_shardings_are_kept():
    devices = np.asarray(jax.devices())
    sharding = NamedSharding(Mesh(devices, ("data",)), PartitionSpec("data", None))
    params = {"w": jax.device_put(jnp.ones((16, 4)), sharding)}
    optim = SimplifiedAdEMAMix(1e-2)
    _, state = jax.jit(optim.update)(params, optim.init(params), params)
    theirs = to_optax(state)
    back = from_optax(theirs, optim, params)
    for moment in (theirs.m, theirs.n, back.m, back.nu):
        assert moment["w"].sharding.is_equivalent_to(sharding, 2)
    model = make_mlp()
    state = init(optim, model)
    theirs = to_optax(state)
    back = from_optax(theirs, optim, model)
    every = [x for tree in (state, theirs, back) for x in buffers(tree)]
    assert len(set(every)) == len(every)


#
# Errors
#


MODEL = make_mlp()
GRADS = eqx.filter_grad(loss_of_arrays)(MODEL)
OPTIM = SimplifiedAdEMAMix(1e-3)
STATE = init(OPTIM, MODEL)
SWAPPED = eqx.nn.MLP(3, 2, 5, 2, key=jax.random.key(1))  # another width
W0 = lambda tree: tree.layers[0].weight
B2 = lambda tree: tree.layers[2].bias


def state(where: Any, value: Any) -> Any:
    put = lambda: eqx.tree_at(where, STATE, value, is_leaf=lambda x: x is None)
    return lambda: update(OPTIM, GRADS, put(), MODEL)


def grads(where: Any, value: Any) -> Any:
    return lambda: update(OPTIM, eqx.tree_at(where, GRADS, value), STATE, MODEL)


def make(*args: Any, **kwargs: Any) -> Any:
    return lambda: SimplifiedAdEMAMix(*args, **kwargs)


def updated(optim: Any, given: Any = STATE, params: Any = MODEL) -> Any:
    return lambda: update(optim, GRADS, given, params)


def donated() -> None:
    old = init(OPTIM, MODEL)
    old.count.delete()
    update(OPTIM, GRADS, old, MODEL)


ADEMAMIX = AdEMAMix(1e-3)
BF16 = jnp.asarray(0.9, jnp.bfloat16)
FLOAT16_M = StateFormat(m1=jnp.float32, m2=jnp.float16, nu=jnp.float32)
MINE, OTHERS = "`SimplifiedAdEMAMixState`", "`AdEMAMixState`"

# What a user does, and what they read.
ERRORS: dict[str, Any] = {
    # the state
    "m of another shape": (
        state(lambda s: W0(s.m), jnp.ones((4, 1))),
        r"state\.m\.layers\[0\]\.weight is a float32 array of shape \(4, 1\), but "
        r"state\.nu has a float32 array of shape \(4, 3\) there",
    ),
    "nu of another shape": (
        state(lambda s: B2(s.nu), jnp.ones((2, 2))),
        r"state\.m\.layers\[2\]\.bias is a float32 array of shape \(2,\), but "
        r"state\.nu has a float32 array of shape \(2, 2\) there",
    ),
    "m None": (
        state(lambda s: B2(s.m), None),
        r"state\.m\.layers\[2\]\.bias is None, but state\.nu has a float32 array",
    ),
    "m a function": (
        state(lambda s: B2(s.m), jnp.tanh),
        r"state\.m\.layers\[2\]\.bias is the function `tanh`, but state\.nu",
    ),
    "m of another structure": (
        state(lambda s: s.m, [jnp.ones(2)]),
        r"state\.m is a list of length 1, but state\.nu has an `MLP` there",
    ),
    "m of another dtype": (
        state(lambda s: W0(s.m), jnp.ones((4, 3), jnp.bfloat16)),
        r"state\.m\.layers\[0\]\.weight is stored as bfloat16, but float32 was",
    ),
    "nu of another dtype": (
        state(lambda s: B2(s.nu), jnp.ones(2, int)),
        r"state\.nu\.layers\[2\]\.bias is stored as int32, but float32 was expected",
    ),
    "of another format": (
        updated(SimplifiedAdEMAMix(1, state_format=FLOAT16_M)),
        r"state\.m\.layers\[0\]\.weight is stored as float32, but float16 was",
    ),
    "of another model": (
        updated(OPTIM, init(OPTIM, SWAPPED)),
        r"params\.layers\[0\]\.weight has shape \(4, 3\), but the optimizer state has "
        r"\(5, 3\) there. Was `init` called",
    ),
    "of another model, no params": (
        updated(OPTIM, init(OPTIM, SWAPPED), None),
        r"grads\.layers\[0\]\.weight has shape \(4, 3\), but the optimizer state has "
        r"\(5, 3\) there. Was `init` called",
    ),
    "of AdEMAMix": (
        updated(OPTIM, init(ADEMAMIX, MODEL)),
        f"`state` is an {OTHERS}, but a {MINE} was expected",
    ),
    "for AdEMAMix": (
        updated(ADEMAMIX),
        f"`state` is a {MINE}, but an {OTHERS} was expected",
    ),
    "no state": (updated(OPTIM, None), f"`state` is None, but a {MINE} was expected"),
    "hyperparams of a state of AdEMAMix": (
        lambda: hyperparams(OPTIM, init(ADEMAMIX, MODEL)),
        "`state` has no states of SimplifiedAdEMAMix, .* Found in it: AdEMAMixState",
    ),
    "hyperparams of AdEMAMix": (
        lambda: hyperparams(ADEMAMIX, STATE),
        "`state` has no states of AdEMAMix, .* Found in it: SimplifiedAdEMAMixState",
    ),
    "swapped": (
        lambda: update(OPTIM, STATE, GRADS, MODEL),
        f"`grads` is a {MINE}: were `grads` and `state` swapped",
    ),
    "count a float": (
        state(lambda s: s.count, jnp.asarray(1.0)),
        r"state\.count is a float32 array of shape \(\), but an int32 array of shape",
    ),
    "num an integer": (
        state(lambda s: s.num, jnp.asarray(1)),
        r"state\.num is an int32 array of shape \(\), but",
    ),
    "num a vector": (
        state(lambda s: s.num, jnp.ones(2)),
        r"state\.num is a float32 array of shape \(2,\), but",
    ),
    "batched": (
        updated(OPTIM, eqx.filter_vmap(lambda _: init(OPTIM, MODEL))(jnp.ones(2))),
        r"state\.count is an int32 array of shape \(2,\), .* `eqx.filter_vmap\(update",
    ),
    "donated": (donated, r"state\.count has been deleted: its buffer was donated"),
    # gradients and parameters
    "a gradient that broadcasts": (
        grads(W0, jnp.ones((4, 1))),
        r"grads\.layers\[0\]\.weight has shape \(4, 1\), but the optimizer state has "
        r"\(4, 3\) there",
    ),
    "a complex gradient": (
        grads(W0, jnp.ones((4, 3), complex)),
        r"grads\.layers\[0\]\.weight has dtype complex64, but the optimizer state is "
        "for a real parameter",
    ),
    "the model as gradients": (
        lambda: update(OPTIM, MODEL, STATE, MODEL),
        r"grads\.activation is the function `relu`, but a gradient is an array",
    ),
    "no parameters": (
        updated(SimplifiedAdEMAMix(1, weight_decay=0.1), STATE, None),
        "`params` is missing, but `weight_decay` is on",
    ),
    "nothing to train": (
        lambda: init(OPTIM, {"n": 3, "f": jnp.tanh}),
        "None of the leaves of `params` is a floating-point or complex array",
    ),
    "frozen since": (
        updated(SimplifiedAdEMAMix(1, trainable=lambda x: x.ndim > 1)),
        r"params\.layers\[0\]\.bias is None, .* has `trainable` changed since then",
    ),
    "a mask of another structure": (
        lambda: init(SimplifiedAdEMAMix(1, weight_decay_mask=[True]), MODEL),
        "weight_decay_mask is a list of length 1, but the parameters have an `MLP`",
    ),
    # arguments
    "both corrections": (
        make(1e-3, bias_correct_m1=True, normalize=True),
        "`(bias_correct_m1|normalize)`.*`(normalize|bias_correct_m1)`",
    ),
    "b1 of 1": (make(1e-3, 1.0), r"`b1` is 1.0, but a number in \[0, 1\)"),
    "b2 negative": (make(1e-3, b2=-0.1), r"`b2` is -0.1, but a number in \[0, 1\)"),
    "alpha negative": (make(1e-3, alpha=-1), "`alpha` is -1.0, but a finite number >="),
    "rate NaN": (make(float("nan")), "`learning_rate` is nan, but a finite number"),
    "eps negative": (make(1e-3, eps=-1e-8), "`eps` is -1e-08, but a finite number >="),
    "both eps 0": (make(1e-3, eps=0), "`eps` and `eps_root` are both 0, but"),
    "decay negative": (make(1e-3, weight_decay=-0.1), "`weight_decay` is -0.1"),
    "16-bit b1": (make(1e-3, BF16), "`b1` is a bfloat16 array of shape"),
    "16-bit b2": (make(1e-3, b2=BF16), "`b2` is a bfloat16 array of shape"),
    "a schedule for eps": (
        make(1e-3, eps=lambda count: 1e-8),
        "`eps` is the function `<lambda>`, but a finite number >= 0",
    ),
    "a scheduled 16-bit b1": (
        updated(SimplifiedAdEMAMix(1e-3, lambda count: BF16)),
        r"`b1\(count\)` is a bfloat16 array",
    ),
    "alpha's schedule for b1": (
        make(1e-3, alpha_scheduler(1.0)),
        "`b1` is an `AlphaSchedule`, ",
    ),
    "b1's schedule for alpha": (
        make(1e-3, alpha=beta3_scheduler(0.9)),
        "`alpha` is a `Beta3Schedule`, ",
    ),
    "not scalar": (
        make(1e-3, jnp.ones(2) / 2),
        r"`b1` has shape \(2,\), but a scalar was expected. .*`eqx.filter_vmap`",
    ),
    "format": (
        make(1e-3, state_format=jnp.float32),
        "`state_format` is .*, but a `StateFormat` was expected",
    ),
    # conversions
    "from_optax of AdEMAMix": (
        lambda: from_optax(optax.contrib.ademamix(1).init(GRADS), OPTIM, MODEL),
        "`opt_state` has no states of .*simplified_ademamix.*, but one was expected",
    ),
    "from_optax to AdEMAMix": (
        lambda: from_optax(to_optax(STATE), ADEMAMIX, MODEL),
        "`opt_state` has no states of .*, but one was expected",
    ),
    "from_optax of two": (
        lambda: from_optax((optax_state(1), optax_state(1)), OPTIM, jnp.ones(3)),
        "`opt_state` has 2 states of .*, but one was expected",
    ),
    "from_optax of another model": (
        lambda: from_optax(to_optax(init(OPTIM, SWAPPED)), OPTIM, MODEL),
        r"opt_state\.m\.layers\[0\]\.weight has shape \(5, 3\), but the state of "
        r"`optim` has \(4, 3\) there",
    ),
}


@pytest.mark.parametrize("act,text", ERRORS.values(), ids=ERRORS.keys())
def test_error(act: Any, text: str):
    with pytest.raises((ValueError, TypeError), match=text) as info:
        act()
    assert len(str(info.value)) < 700


def test_a_value_error_for_both_corrections():
    with pytest.raises(ValueError, match="bias_correct_m1"):
        SimplifiedAdEMAMix(1e-3, bias_correct_m1=True, normalize=True)


def test_ademamix_goes_on_as_before():
    """The functions that take both tell them apart."""
    params = {"w": jnp.ones((2, 3))}
    state: Any = init(ADEMAMIX, params)
    assert type(state) is AdEMAMixState
    assert len(jtu.tree_leaves(hyperparams(ADEMAMIX, state))) == 6
    assert "m1       m2       nu" in state_report(state)
    theirs = to_optax(state)
    assert type(theirs) is optax.contrib.ScaleByAdemamixState
    assert_trees_close(from_optax(theirs, ADEMAMIX, params), state, 0.0)
