"""The guards: what each prevents, and that nothing changes while it is off."""

import dataclasses
from pathlib import Path
from typing import Any, cast

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
    CheckpointError,
    Compensated,
    Offloaded,
    SimplifiedAdEMAMix,
    StateFormat,
    change_state_format,
    init,
    update,
)

from .helpers import (
    COMPACT,
    HAS_HOST_MEMORY,
    assert_trees_close,
    count_traces,
    everywhere,
    make_mlp,
    tree_type,
    x64,
)


DOCS = Path(__file__).parents[1] / "docs"
PARAMS = {
    "w": jnp.linspace(-1.0, 1.0, 12).reshape(3, 4),
    "c": jnp.array([1 + 2j, -0.5j]),
    "b": jnp.array([-0.0, 0.0, 3.0], jnp.bfloat16),
}
FORMATS = {
    "float32": StateFormat.float32(),
    "half": everywhere(StateFormat.half()),
    "compact": COMPACT,
    "bfloat16": StateFormat(jnp.bfloat16, jnp.bfloat16, jnp.bfloat16),
    "split": StateFormat(
        jnp.bfloat16, eqx_ademamix.SplitBfloat16(), jnp.float32, min_size=0
    ),
}


def gradients(seed: int, params: Any = PARAMS, scale: float = 1.0) -> Any:
    """Gradients of each parameter's type."""
    leaves, treedef = jtu.tree_flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    normal = [
        (scale * jax.random.normal(key, x.shape, x.dtype)).astype(x.dtype)
        for key, x in zip(keys, leaves, strict=True)
    ]
    return treedef.unflatten(normal)


def with_nan(grads: Any, value: float = np.nan) -> Any:
    return {**grads, "w": grads["w"].at[1, 2].set(value)}


def as_optax(optim: Any) -> optax.GradientTransformation:
    return optax.GradientTransformation(optim.init, optim.update)


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jtu.tree_leaves(tree)]


def after_steps(optim: Any, steps: int, params: Any = PARAMS) -> Any:
    state = init(optim, params)
    for step in range(steps):
        _, state = update(optim, gradients(step, params), state, params)
    return state


#
# Off
#


def test_off_adds_no_instruction():
    """The direction is that of the formula, and no gradient is reduced or selected."""

    def formula(g: Any, m: Any, h: Any) -> Any:
        m1_hat = 1 / h._bias1 * m.m1
        nu_hat = 1 / h._bias2 * m.nu
        denominator = jnp.sqrt(nu_hat + h._eps_root) + h._eps
        return (m1_hat + h.alpha * m.m2) / denominator

    optim, x = AdEMAMix(1e-3), jnp.ones(3)
    state = init(optim, x)
    h, m = optim.resolve(state), state.moments
    ours, theirs = (jax.make_jaxpr(f)(x, m, h) for f in (optim.direction, formula))
    assert str(ours) == str(theirs)
    for off in (optim, SimplifiedAdEMAMix(1e-3)):
        on = dataclasses.replace(off, skip_nonfinite=True, clip_update_rms=1.0)
        off_text, on_text = (
            str(jax.make_jaxpr(lambda g, s, o=o: update(o, g, s))(x, init(o, x)))
            for o in (off, on)
        )
        for name in ("reduce_and", "reduce_max"):
            assert name in on_text and name not in off_text
        assert init(off, x).skipped is None


def test_the_guards_are_keyword_only_and_off_by_default():
    for optim in (AdEMAMix(1e-3), SimplifiedAdEMAMix(1e-3)):
        assert optim.clip_update_rms is None and optim.skip_nonfinite is False
    assert AdEMAMix(1e-3).max_slow_ratio is None
    assert not hasattr(SimplifiedAdEMAMix(1e-3), "max_slow_ratio")


#
# max_slow_ratio
#


def slow_part(x: Any, nu_hat: Any, ratio: float) -> Any:
    """The clipped slow average, in float64."""
    bound = ratio * np.sqrt(nu_hat)
    with np.errstate(divide="ignore", invalid="ignore"):
        return x * np.fmin(1.0, bound / np.abs(x))


@pytest.mark.usefixtures("random_numbers_of_jax_0_5")
@pytest.mark.parametrize("corrected", (False, True))
@pytest.mark.parametrize("eps_root", (0.0, 1e-3))
def test_the_slow_average_is_clipped_inside_the_update_only(
    corrected: bool, eps_root: float
):
    options: Any = dict(b3=0.9, alpha=2.0, bias_correct_m2=corrected, eps_root=eps_root)
    plain = AdEMAMix(1.0, **options)
    ratio = 0.3
    guarded = AdEMAMix(1.0, max_slow_ratio=ratio, **options)
    params = {k: PARAMS[k] for k in "wc"}
    state = after_steps(plain, 5, params)
    g = gradients(7, params)
    _, expected = update(plain, g, state, params)
    updates, found = update(guarded, g, state, params)
    assert bits(found) == bits(expected)  # what is stored
    is_clipped = []
    moments: Any = found.moments
    for name, u in updates.items():
        m1, m2, nu = (
            np.asarray(x[name], np.complex128 if name == "c" else np.float64)
            for x in moments
        )
        nu_hat = nu.real / (1 - 0.999**6)
        m2 = m2 / (1 - 0.9**6) if corrected else m2
        slow = slow_part(m2, nu_hat, ratio)
        d = (m1 / (1 - 0.9**6) + 2 * slow) / (np.sqrt(nu_hat + eps_root) + 1e-8)
        np.testing.assert_allclose(u, -d, rtol=1e-5, atol=1e-6)
        is_clipped.extend((slow != m2).ravel())
    assert 0 < np.mean(is_clipped) < 1


def test_without_squares_the_slow_average_has_no_effect():
    """`nu` has underflowed to 0, and `m2` has not."""
    optim = AdEMAMix(1.0, alpha=1.0, max_slow_ratio=1.0, eps_root=1e-6)
    params = {"w": jnp.zeros(3), "c": jnp.zeros(2, complex)}
    state = init(optim, params)
    state = eqx.tree_at(lambda s: s.m2, state, jax.tree.map(lambda x: x + 1e-3, params))
    updates, after = update(optim, params, state)
    for u, m2 in zip(*map(jtu.tree_leaves, (updates, after.m2)), strict=True):
        assert not u.any() and m2.all()
    # The derivative through the update is finite where `nu` and the gradient are 0.
    loss = lambda g: jnp.sum(update(optim, g, state)[0]["w"])
    assert jnp.isfinite(jax.grad(loss, holomorphic=False)(params)["w"]).all()


@pytest.mark.parametrize("name", FORMATS)
def test_the_push_after_the_gradients_stop(name: str, module: Any):
    """1000 noisy steps, and 20 000 without gradients."""
    guards = [{}, {"max_slow_ratio": 1.0}, {"clip_update_rms": 2.0}]
    plain, ratio, rms = module("_pushes").after_silence(name, guards)
    if name == "bfloat16":  # its `m2` and `nu` are frozen, so nothing grows
        assert plain.largest < 0.1
    else:
        assert 36 < plain.median < 40 and 190 < plain.largest < 260
        assert rms.median < 1.5 and rms.largest < 9
    assert ratio.largest < 5.0  # alpha
    assert ratio.median == pytest.approx(min(plain.median, 5.0), rel=1e-3)


@pytest.mark.usefixtures("random_numbers_of_jax_0_5")
def test_rows_that_rarely_see_a_gradient(module: Any):
    """Once in 5000 steps. One gradient alone gives the ratio `fresh`."""
    pushes = module("_pushes")
    options = [{"alpha": 0.0}, {}, {"max_slow_ratio": 1.0}]
    adamw, plain, one, fresh = pushes.rare_rows(
        [*options, {"max_slow_ratio": pushes.FRESH}]
    )
    assert 60 < adamw.median < 67 and adamw.largest < 100
    assert plain.median > 8 * adamw.median and plain.largest > 30 * adamw.largest
    assert one == plain  # the ratio stays below 1 here
    assert fresh.median < 0.5 * plain.median and fresh.largest < 0.1 * plain.largest


def test_the_page_shows_what_was_measured(module: Any):
    """The tables of docs/guards.md are those of the recorded results."""
    pushes, guards = module("_pushes"), module("guards")
    found = guards.pushes(DOCS / "guards_pushes.json")
    runs = guards.read(DOCS / "guards_runs.jsonl")
    tables = pushes.silence_table(found), pushes.rare_table(found)
    tables += guards.loss_table(runs), guards.ratio_table(runs)
    for table in tables:
        assert table in (DOCS / "guards.md").read_text()


def test_the_guards_do_not_change_normal_training(module: Any):
    """In the recorded runs, by less than the seeds do."""
    runs = module("guards").read(DOCS / "guards_runs.jsonl")
    off, on = (
        [x.validation_loss for x in runs if x.guards == guards]
        for guards in ("off", "on")
    )
    assert len(off) == len(on) == 3
    assert abs(np.mean(on) - np.mean(off)) < np.std(off)


#
# clip_update_rms
#


def rms(x: Any) -> float:
    x = np.asarray(x, np.complex128)
    scale = max(float(np.max(np.abs(x))), 1e-300)
    return scale * float(np.sqrt(np.mean(np.abs(x / scale) ** 2)))


@pytest.mark.parametrize("make", (AdEMAMix, SimplifiedAdEMAMix))
@pytest.mark.parametrize("limit", (0.1, 2.0, 1e30, 1e-30))
def test_the_rms_of_the_direction_is_limited(make: Any, limit: float):
    params = {**PARAMS, "scalar": jnp.ones(()), "empty": jnp.zeros((0, 3))}
    plain, guarded = make(1.0), make(1.0, clip_update_rms=limit)
    state = init(plain, params)
    for step in range(3):
        g = gradients(step, params)
        expected, after = update(plain, g, state, params)
        found, state = update(guarded, g, state, params)
        assert bits(state) == bits(after)
        for name in ("w", "c", "scalar"):
            factor = min(1.0, limit / rms(expected[name]))
            if factor == 1.0:
                assert bits(found[name]) == bits(expected[name])
            np.testing.assert_allclose(
                found[name], factor * np.asarray(expected[name]), rtol=2e-6
            )
        assert found["empty"].shape == (0, 3)


@pytest.mark.parametrize("scale", (3e38, 1e30, 1.0, 1e-30, 1e-38, 0.0))
@pytest.mark.parametrize("kind", ("real", "complex"))
def test_no_overflow_and_no_nan(scale: float, kind: str):
    from eqx_ademamix._guards import limited_rms

    x = jnp.asarray([1.0, -0.5, 0.0, 1.0]) * jnp.float32(scale)
    x = x if kind == "real" else jax.lax.complex(x, x[::-1])
    for limit in (1e-3, 1.0, 3e38):
        found = jax.jit(limited_rms)(x, jnp.float32(limit))
        expected = np.asarray(x, np.complex128) * min(1.0, limit / max(rms(x), 1e-300))
        assert jnp.isfinite(found).all() and found.dtype == x.dtype
        np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-44)
        slope = jax.jvp(limited_rms, (x, jnp.float32(limit)), (x, jnp.float32(0)))[1]
        assert jnp.isfinite(slope).all()
        if rms(x) > 1.01 * limit:  # it does not depend on the scale
            np.testing.assert_allclose(slope, 0 * x, atol=1e-6 * limit)


def test_a_nan_does_not_spread():
    for optim in (AdEMAMix(1.0, clip_update_rms=0.1), AdEMAMix(1.0, max_slow_ratio=1)):
        state = init(optim, PARAMS)
        u = update(optim, with_nan(gradients(0)), state, PARAMS)[0]["w"]
        assert jnp.isnan(u).sum() == 1 and jnp.isnan(u[1, 2])


def test_float64_is_kept():
    with x64():
        params = {"w": jnp.linspace(-1.0, 1.0, 7)}
        assert params["w"].dtype == jnp.float64
        plain = AdEMAMix(1.0)
        guarded = AdEMAMix(1.0, clip_update_rms=0.5, max_slow_ratio=1e-5)
        g = gradients(0, params)
        found, _ = update(guarded, g, init(guarded, params), params)
        _, after = update(plain, g, init(plain, params), params)
        moments: Any = after.moments
        m1, m2, nu = (np.asarray(x["w"]) for x in moments)
        nu_hat = nu / (1 - 0.999)
        d = (m1 / (1 - 0.9) + 5 * slow_part(m2, nu_hat, 1e-5)) / (
            np.sqrt(nu_hat) + 1e-8
        )
        d = d * min(1.0, 0.5 / rms(d))
        np.testing.assert_allclose(found["w"], -d, rtol=1e-7)


@pytest.mark.parametrize("make", (AdEMAMix, SimplifiedAdEMAMix))
def test_vmapped_members_have_their_own(make: Any):
    """One member is over the limit, and one has a NaN."""
    optim = make(1.0, clip_update_rms=0.5, skip_nonfinite=True)
    members = [gradients(0), gradients(1, scale=0.0), with_nan(gradients(2))]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *members)
    params = jax.tree.map(lambda x: jnp.stack([x] * 3), PARAMS)
    state = eqx.filter_vmap(init, in_axes=(None, 0))(optim, params)
    step = eqx.filter_vmap(update, in_axes=(None, 0, 0, 0))
    updates, after = step(optim, stacked, state, params)
    assert after.skipped.tolist() == [0, 0, 1] and after.count.tolist() == [1, 1, 0]
    for i, g in enumerate(members):
        alone, alone_after = update(optim, g, init(optim, PARAMS), PARAMS)
        for pair in ((updates, alone), (after, alone_after)):
            for x, y in zip(*map(jtu.tree_leaves, pair), strict=True):
                np.testing.assert_allclose(
                    np.asarray(x[i], np.complex64),
                    np.asarray(y, np.complex64),
                    rtol=1e-5,
                )


def test_stacked_layers_are_one_leaf():
    params = {"layers": jnp.ones((4, 8))}
    g = {"layers": jnp.ones((4, 8)).at[1:].set(0.0)}
    plain, guarded = AdEMAMix(1.0), AdEMAMix(1.0, clip_update_rms=0.25)
    expected, found = (update(o, g, init(o, params))[0] for o in (plain, guarded))
    factor = 0.25 / rms(expected["layers"])
    assert 0 < factor < 1
    np.testing.assert_allclose(found["layers"], factor * expected["layers"], rtol=1e-6)


#
# skip_nonfinite
#

BETA = eqx_ademamix.beta3_scheduler(0.999, 0.9, warmup=10)
SKIPPING = {
    **{name: AdEMAMix(0.1, state_format=fmt) for name, fmt in FORMATS.items()},
    "corrected, decay": AdEMAMix(
        0.1,
        b1=0.0,
        bias_correct_m2=True,
        weight_decay=0.1,
        max_slow_ratio=1.0,
        clip_update_rms=1.0,
    ),
    "scheduled": AdEMAMix(0.1, b1=BETA, b2=BETA, b3=BETA, bias_correct_m2=True),
    "simplified": SimplifiedAdEMAMix(0.1, weight_decay=0.1, normalize=True),
    "simplified, scheduled": SimplifiedAdEMAMix(0.1, b1=BETA, b2=BETA),
}


@pytest.mark.parametrize("value", (np.nan, np.inf, -np.inf))
@pytest.mark.parametrize("name", SKIPPING)
def test_a_step_with_a_nan_changes_nothing(name: str, value: float):
    optim = dataclasses.replace(SKIPPING[name], skip_nonfinite=True)
    step = jax.jit(optim.update)
    state = after_steps(optim, 2)
    updates, after = step(with_nan(gradients(5), value), state, PARAMS)
    assert tree_type(updates) == tree_type(PARAMS)
    assert all(not x.any() for x in jtu.tree_leaves(updates))
    assert bits(eqx.apply_updates(PARAMS, updates)) == bits(PARAMS)
    assert (int(state.skipped), int(after.skipped)) == (0, 1)
    assert after.skipped.dtype == jnp.int32 and after.skipped.shape == ()
    assert tree_type(after) == tree_type(state)
    assert bits(dataclasses.replace(after, skipped=state.skipped)) == bits(state)


def test_without_the_guard_one_nan_stays():
    optim = AdEMAMix(0.1)
    _, state = update(optim, with_nan(gradients(0)), init(optim, PARAMS), PARAMS)
    updates, _ = update(optim, gradients(1), state, PARAMS)
    assert jnp.isnan(updates["w"][1, 2])


@pytest.mark.parametrize("make", (AdEMAMix, SimplifiedAdEMAMix))
def test_finite_steps_are_those_without_the_guard(make: Any):
    plain, guarded = make(0.1), make(0.1, skip_nonfinite=True)
    step, traces = count_traces(guarded.update)
    step, state, other = jax.jit(step), init(guarded, PARAMS), init(plain, PARAMS)
    for seed in range(4):
        g = gradients(seed)
        if seed == 2:
            _, state = step(with_nan(g), state, PARAMS)
        updates, state = step(g, state, PARAMS)
        expected, other = jax.jit(plain.update)(g, other, PARAMS)
        assert bits(updates) == bits(expected)
    assert bits(dataclasses.replace(state, skipped=None)) == bits(other)
    assert len(traces) == 1 and state.skipped == 1


def test_as_apply_if_finite(standard_promotion: None):
    ours = AdEMAMix(0.1, weight_decay=0.1, skip_nonfinite=True)
    plain = dataclasses.replace(ours, skip_nonfinite=False)
    theirs = optax.apply_if_finite(as_optax(plain), 10**6)
    p = q = PARAMS
    state, other = init(ours, p), cast(optax.ApplyIfFiniteState, theirs.init(q))
    for seed in range(6):
        g = with_nan(gradients(seed), np.inf) if seed in (0, 3, 4) else gradients(seed)
        u, state = update(ours, g, state, p)
        v, other = cast(Any, theirs.update(g, other, q))
        p, q = eqx.apply_updates(p, u), eqx.apply_updates(q, v)
        assert_trees_close(p, q, 1e-6)
    assert state.skipped == other.total_notfinite == 3
    assert_trees_close(
        dataclasses.replace(state, skipped=None), other.inner_state, 1e-6
    )


def test_frozen_leaves_do_not_count():
    frozen = {"w": False, "c": True, "b": True}
    optim = AdEMAMix(0.1, trainable=frozen, skip_nonfinite=True)
    state = init(optim, PARAMS)
    updates, state = update(optim, with_nan(gradients(0)), state, PARAMS)
    assert updates["w"] is None and state.skipped == 0 and state.count == 1
    assert all(
        np.isfinite(np.asarray(x, complex)).all()
        for x in updates.values()
        if x is not None
    )


def test_it_saturates():
    optim = AdEMAMix(0.1, skip_nonfinite=True)
    most = jnp.asarray(2**31 - 1, jnp.int32)
    state = dataclasses.replace(init(optim, PARAMS), skipped=most)
    assert update(optim, with_nan(gradients(0)), state, PARAMS)[1].skipped == most


def test_empty_trees_and_scans():
    optim = AdEMAMix(0.1, skip_nonfinite=True, clip_update_rms=1.0, max_slow_ratio=1.0)
    _, state = update(optim, {}, init(optim, {}))
    assert state.count == 1 and state.skipped == 0
    grads = jnp.ones((5, 3)).at[1].set(jnp.nan).at[3, 0].set(jnp.inf)
    step: Any = lambda s, g: update(optim, g, s)[::-1]
    state, _ = jax.lax.scan(step, init(optim, grads[0]), grads)
    assert state.count == 3 and state.skipped == 2


#
# Devices
#


def spread(mesh: Mesh, params: Any) -> Any:
    specs = {"w": PartitionSpec(None, "x"), "v": PartitionSpec("x")}
    put = lambda name, x: jax.device_put(x, NamedSharding(mesh, specs[name]))
    return {name: put(name, x) for name, x in params.items()}


def check_on(mesh: Mesh) -> None:
    optim = AdEMAMix(
        1.0, b1=0.5, clip_update_rms=0.3, max_slow_ratio=1e-3, skip_nonfinite=True
    )
    params = {"w": jnp.linspace(-1.0, 1.0, 48).reshape(3, 16), "v": jnp.ones(8)}
    sharded = spread(mesh, params)
    step, traces = count_traces(optim.update)
    step = jax.jit(step)
    state, other = init(optim, sharded), init(optim, params)
    kind = tree_type(state)
    for seed in range(3):
        g = gradients(seed, params)
        g = with_nan(g) if seed == 1 else g  # on one device
        found, state = step(spread(mesh, g), state, sharded)
        expected, other = jax.jit(optim.update)(g, other, params)
        for name, x in expected.items():
            np.testing.assert_allclose(found[name], x, rtol=1e-5)
            assert found[name].sharding.is_equivalent_to(sharded[name].sharding, x.ndim)
        assert tree_type(state) == kind
        for x in (state.skipped, state.count):
            assert {int(shard.data) for shard in x.addressable_shards} == {int(x)}
    assert (state.skipped, state.count) == (1, 2) and len(traces) == 1


def test_sharded_arrays():
    check_on(Mesh(np.array(jax.devices()), ("x",)))


if hasattr(jax, "set_mesh"):

    def test_sharding_that_is_a_part_of_the_type():
        mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
        with jax.set_mesh(mesh):
            check_on(mesh)


if hasattr(jax, "shard_map"):

    def test_inside_shard_map_the_devices_decide_alike():
        """One of them has a NaN."""
        mesh = Mesh(np.array(jax.devices()), ("x",))
        optim = AdEMAMix(1.0, skip_nonfinite=True)
        params, spec = jnp.ones(16), PartitionSpec("x")
        state = init(optim, params)
        specs = jax.tree.map(lambda x: spec if x.ndim else PartitionSpec(), state)
        step: Any = jax.shard_map(
            lambda g, s: update(optim, g, s),
            mesh=mesh,
            in_specs=(spec, specs),
            out_specs=(spec, specs),
        )
        updates, after = jax.jit(step)(params.at[3].set(jnp.nan), state)
        assert not updates.any() and after.skipped == 1 and after.count == 0
        updates, after = jax.jit(step)(params, after)
        assert updates.all() and after.skipped == 1 and after.count == 1


#
# Inside of others
#


@pytest.mark.parametrize("bits_", (8, 16))
@pytest.mark.parametrize("check", (False, True))
@pytest.mark.parametrize("chained", (False, True))
def test_compensated_keeps_remainders(bits_: int, check: bool, chained: bool):
    """Also those of more than half a unit, which an update of 0 would move over."""
    inner: Any = AdEMAMix(1e-2, weight_decay=0.1, skip_nonfinite=True)
    inner = optax.chain(inner, optax.scale(0.5)) if chained else inner
    optim = Compensated(inner, bits_, check_params=check)
    params = jax.tree.map(lambda x: x.real.astype(jnp.bfloat16), PARAMS)
    step = jax.jit(optim.update)
    state = init(optim, params)
    _, first = step(with_nan(gradients(0, params)), state, params)
    assert bits(first)[1:] != [] and first.count == 0
    assert first.fingerprint is None or first.fingerprint == 0
    for seed in range(3):
        updates, state = step(gradients(seed, params), state, params)
        params = eqx.apply_updates(params, updates)
    # Remainders of up to several units.
    odd = jax.tree.map(lambda r: r + jnp.iinfo(r.dtype).max // 2, state.remainder)
    state = eqx.tree_at(lambda s: s.remainder, state, odd)
    updates, after = step(with_nan(gradients(9, params)), state, params)
    assert bits(eqx.apply_updates(params, updates)) == bits(params)
    assert bits(after.remainder) == bits(state.remainder)
    assert after.count == state.count == 3
    assert bits(after.fingerprint) == bits(state.fingerprint)
    assert tree_type(after) == tree_type(state)


def test_compensated_is_unchanged_by_finite_steps():
    params = jax.tree.map(lambda x: x.real.astype(jnp.bfloat16), PARAMS)
    both = []
    for skip in (False, True):
        optim = Compensated(AdEMAMix(1e-2, skip_nonfinite=skip))
        state, p = init(optim, params), params
        for seed in range(4):
            updates, state = update(optim, gradients(seed, params), state, p)
            p = eqx.apply_updates(p, updates)
        both.append((bits(p), bits(state.remainder)))
    assert both[0] == both[1]


if HAS_HOST_MEMORY:

    def test_offloaded():
        inner = AdEMAMix(1e-2, skip_nonfinite=True, max_slow_ratio=0.1)
        optim: Any = Offloaded(inner, ("m2", "nu"))
        params = jax.device_put(PARAMS, jax.devices()[0])
        state, other = init(optim, params), init(inner, params)
        for seed in range(3):
            g = gradients(seed) if seed != 1 else with_nan(gradients(seed))
            updates, state = jax.jit(optim.update)(g, state, params)
            expected, other = jax.jit(inner.update)(g, other, params)
            assert bits(updates) == bits(expected)
        assert state.m2["w"].sharding.memory_kind == "pinned_host"
        assert state.skipped == 1 and bits(state) == bits(other)


def test_make_step_leaves_the_model_alone():
    def loss_fn(model: Any, x: Any) -> Any:
        return jnp.sum(jax.vmap(model)(x))

    model = make_mlp()
    optim = AdEMAMix(1e-2, weight_decay=0.1, skip_nonfinite=True)
    step = eqx_ademamix.make_step(loss_fn, optim)
    x = jnp.ones((2, 3))
    carry, _ = step(step.init(model), x)
    before, _ = step.unpack(carry)
    arrays = bits(eqx.filter(before, eqx.is_array))
    carry, loss = step(carry, x * jnp.nan)
    after, state = step.unpack(carry)
    assert jnp.isnan(loss) and bits(eqx.filter(after, eqx.is_array)) == arrays
    assert state.skipped == 1 and state.count == 1


def test_multi_steps(standard_promotion: None):
    """optax keeps a NaN in its sum of gradients, which it multiplies by 0 after each
    step. `should_skip_update_fn` drops that gradient instead."""
    inner = as_optax(AdEMAMix(1e-2, skip_nonfinite=True))
    params = {"w": PARAMS["w"]}
    grads = [gradients(seed, params) for seed in range(4)]
    grads[0] = with_nan(grads[0])
    for skip, expected in ((None, (2, 0)), (optax.skip_not_finite, (0, 1))):
        tx = optax.MultiSteps(inner, 2, should_skip_update_fn=skip)
        state, step = tx.init(params), jax.jit(tx.update)
        for g in grads:
            _, state = step(g, state, params)
        own = state.inner_opt_state
        assert (own.skipped, own.count) == expected


#
# Where hyperparameters and states go
#

ON: Any = dict(max_slow_ratio=0.5, clip_update_rms=0.25, skip_nonfinite=True)
BOTH: Any = dict(clip_update_rms=0.25, skip_nonfinite=True)


def test_values_are_traced():
    """A new array compiles nothing, and the numbers are those of a Python number."""
    step, traces = count_traces(update)
    step = eqx.filter_jit(step)
    for ratio, limit in ((0.5, 0.25), (0.01, 0.1)):
        arrays: Any = dict(
            max_slow_ratio=jnp.asarray(ratio), clip_update_rms=jnp.asarray(limit)
        )
        optim = AdEMAMix(1.0, b3=0.9, **arrays)
        state, g = init(optim, PARAMS), gradients(0)
        found, _ = step(optim, g, state, PARAMS)
        plain = AdEMAMix(1.0, b3=0.9, max_slow_ratio=ratio, clip_update_rms=limit)
        expected, _ = update(plain, g, state, PARAMS)
        for x, y in zip(*map(jtu.tree_leaves, (found, expected)), strict=True):
            np.testing.assert_allclose(
                x.astype(jnp.complex64), y.astype(jnp.complex64), rtol=1e-5
            )
    assert len(traces) == 1
    assert isinstance(optim.max_slow_ratio, jax.Array)
    assert plain.max_slow_ratio == 0.01 and isinstance(plain.clip_update_rms, float)


def test_as_transformations():
    """The functions have the same arguments, and the same updates."""
    g = gradients(0)
    for tx, optim in (
        (eqx_ademamix.ademamix(1e-2, **ON), AdEMAMix(1e-2, **ON)),
        (
            eqx_ademamix.scale_by_ademamix(0.9, 0.999, 0.9999, 5.0, None, None, **ON),
            AdEMAMix(-1.0, **ON),
        ),
        (
            eqx_ademamix.simplified_ademamix(1e-2, **BOTH),
            SimplifiedAdEMAMix(1e-2, **BOTH),
        ),
        (
            eqx_ademamix.scale_by_simplified_ademamix(**BOTH),
            SimplifiedAdEMAMix(-1.0, **BOTH),
        ),
    ):
        state = tx.init(PARAMS)
        found, after = tx.update(g, state, PARAMS)
        expected, _ = update(optim, g, init(optim, PARAMS), PARAMS)
        assert bits(found) == bits(expected)
        assert getattr(after, "skipped") == 0  # noqa: B009


def test_injected():
    """optax turns the numbers into arrays, which can change from step to step."""
    static = ("b3", "alpha", "weight_decay_mask", "trainable", "state_format")
    inject: Any = optax.inject_hyperparams(cast(Any, AdEMAMix), static_args=static)
    tx = inject(1e-2, **ON)
    params = {"w": PARAMS["w"]}
    state = tx.init(params)
    assert {"max_slow_ratio", "clip_update_rms"} <= set(state.hyperparams)
    g = gradients(0, params)
    found, after = tx.update(g, state, params)
    optim = AdEMAMix(1e-2, **ON)
    expected, _ = update(optim, g, init(optim, params), params)
    np.testing.assert_allclose(found["w"], expected["w"], rtol=1e-5)
    for own in (optim, AdEMAMix(1e-2, skip_nonfinite=True)):
        assert eqx_ademamix.hyperparams(own, after).learning_rate == jnp.float32(1e-2)


@pytest.mark.parametrize("make", (AdEMAMix, SimplifiedAdEMAMix))
def test_a_state_from_before(make: Any):
    off, on = make(1e-2), make(1e-2, skip_nonfinite=True)
    state = after_steps(off, 2)
    with pytest.raises(ValueError, match="skipped is None, but this optimizer counts"):
        update(on, gradients(0), state, PARAMS)
    converted = change_state_format(state, on, PARAMS)
    assert converted.skipped == 0 and tree_type(converted) == tree_type(
        init(on, PARAMS)
    )
    _, after = update(on, with_nan(gradients(0)), converted, PARAMS)
    with pytest.raises(ValueError, match=r"skipped is an int32 .* does not count"):
        update(off, gradients(0), after, PARAMS)
    assert bits(change_state_format(after, off, PARAMS)) == bits(state)
    assert change_state_format(after, on, PARAMS).skipped == 1


def test_from_other_optimizers(standard_promotion: None):
    params = {"w": PARAMS["w"]}
    on, simplified = AdEMAMix(1e-2, **ON), SimplifiedAdEMAMix(1e-2, **BOTH)
    adamw = optax.adamw(1e-2).init(params)
    states: Any = [
        eqx_ademamix.from_adamw(adamw, on, params),
        eqx_ademamix.from_optax(optax.contrib.ademamix(1e-2).init(params), on, params),
        eqx_ademamix.from_optax(
            optax.contrib.simplified_ademamix(1e-2).init(params), simplified, params
        ),
    ]
    for state, optim in zip(states, (on, on, simplified), strict=True):
        assert state.skipped == 0 and tree_type(state) == tree_type(init(optim, params))
    assert eqx_ademamix.to_optax(states[0]).count == 0
    assert eqx_ademamix.to_adamw(states[0]).count == 0


def test_extend_keeps_the_guards():
    alpha = eqx_ademamix.alpha_scheduler(5.0, warmup=10)
    optim = AdEMAMix(1e-2, alpha=alpha, **ON)
    longer = eqx_ademamix.extend(optim, init(optim, PARAMS), warmup=20)
    assert [getattr(longer, name) for name in ON] == list(ON.values())
    assert (
        eqx_ademamix.extend(
            AdEMAMix(1e-2, alpha=alpha), init(AdEMAMix(1e-2), PARAMS), warmup=20
        ).max_slow_ratio
        is None
    )


def test_checkpoints(tmp_path: Any):
    """Guards that are off add no array, and guards cannot change between two runs."""
    off, on = AdEMAMix(1e-2), AdEMAMix(1e-2, **ON)
    path = tmp_path / "off.safetensors"
    eqx_ademamix.save(path, init(off, PARAMS), optim=off)
    assert b".skipped" not in path.read_bytes()
    eqx_ademamix.load(path, init(off, PARAMS), optim=off)
    with pytest.raises(CheckpointError, match=r"at \.skipped, which the"):
        eqx_ademamix.load(path, init(on, PARAMS), optim=on)
    other = AdEMAMix(1e-2, max_slow_ratio=0.5)
    with pytest.raises(CheckpointError, match=r"max_slow_ratio is None .* 0\.5"):
        eqx_ademamix.load(path, init(off, PARAMS), optim=other)
    _, state = update(on, with_nan(gradients(0)), init(on, PARAMS), PARAMS)
    path = tmp_path / "on.safetensors"
    eqx_ademamix.save(path, state, optim=on)
    loaded = eqx_ademamix.load(path, init(on, PARAMS), optim=on)
    assert loaded.skipped == 1 and eqx.tree_equal(loaded, state)
    with pytest.raises(CheckpointError, match=r"optim\.clip_update_rms is 0"):
        other = dataclasses.replace(on, clip_update_rms=0.5)
        eqx_ademamix.load(path, init(on, PARAMS), optim=other)


def test_the_state_is_four_bytes_larger():
    mesh = Mesh(np.array(jax.devices()), ("x",))
    off, on = AdEMAMix(1e-2), AdEMAMix(1e-2, skip_nonfinite=True)
    params = {"w": jnp.zeros((8, 4))}
    sizes = [eqx_ademamix.state_bytes(init(o, params)) for o in (off, on)]
    assert sizes[1] == sizes[0] + 4
    shardings = eqx_ademamix.state_sharding(on, params, mesh, axis="x")
    assert shardings.skipped == NamedSharding(mesh, PartitionSpec())
    state = jax.device_put(init(on, params), shardings)
    g = {"w": jnp.full((8, 4), jnp.nan)}
    _, after = jax.jit(on.update)(g, state, params)
    assert after.skipped == 1 and tree_type(after) == tree_type(state)
