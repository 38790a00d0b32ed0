"""`scale_to` and `scale_report`: published fits, in and out of their ranges."""

import math
import re
import warnings
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eqx_ademamix
from eqx_ademamix import (
    AdEMAMix,
    Compensated,
    Offloaded,
    ScalingWarning,
    SimplifiedAdEMAMix,
    alpha_cooldown_scheduler,
    alpha_scheduler,
    beta3_scheduler,
    log_time_beta_scheduler,
    log_time_weight_decay_scheduler,
    power_alpha_scheduler,
    presets,
    scale_report,
    scale_to,
)


# A run that all fits cover.
RUN: Any = {"steps": 100_000, "batch_tokens": 500_000, "params": 1e9}
SMALL = AdEMAMix(1e-3, weight_decay=0.1)


def scaled(optim: Any, **run: float) -> Any:
    return scale_to(optim, **run)


def step_law(params: float, tokens: float, batch: float) -> float:
    """The learning rate for AdamW of arXiv:2503.04715 for a batch of its own size, and
    the rule of the square root for other ones."""
    best = 0.58 * tokens**0.571
    return 1.79 * params**-0.713 * tokens**0.307 * math.sqrt(batch / best)


def power_lines(params: float, tokens: float) -> float:
    """The share of the run over which AdamW's weights are an average
    (arXiv:2505.13738)."""
    return 1.084 * (tokens / params) ** -0.527


def without_a_warning(optim: Any, **run: float) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return scaled(optim, **run)


#
# The values
#


def test_the_values_are_those_of_the_fits():
    new = without_a_warning(SMALL, **RUN)
    tokens = 5e10
    rate = 0.5 * step_law(1e9, tokens, 500_000)
    assert new.learning_rate == pytest.approx(rate, rel=1e-12)
    assert new.learning_rate == pytest.approx(5.403e-4, rel=1e-4)
    steps = 1 / (new.learning_rate * new.weight_decay)  # that the weights average
    assert steps / 100_000 == pytest.approx(power_lines(1e9, tokens), rel=1e-12)
    assert new.weight_decay == pytest.approx(0.13418, rel=1e-4)
    assert new.b3.beta_end == 0.5 ** (15 / 100_000)
    assert (new.b3.beta_start, new.b3.warmup) == (0.9, 100_000)
    assert (new.alpha.alpha, new.alpha.alpha_start, new.alpha.warmup) == (5, 0, 100_000)


class Published(NamedTuple):
    params: float
    steps: int
    batch: int
    learning_rate: float


PUBLISHED = (
    Published(110e6, 256_000, 64 * 1024, 1e-3),  # arXiv:2409.03137, Table 2
    Published(330e6, 256_000, 96 * 1024, 5e-4),  # Table 3
    Published(1.3e9, 770_000, 128 * 1024, 3e-4),  # Table 4
    Published(124e6, 128_000, 256 * 512, 1e-3),  # arXiv:2509.01440
    Published(720e6, 48_000, 1_000_000, 1e-3),
)


def test_half_of_the_fit_is_close_to_what_was_published():
    ratios = [
        run.learning_rate / step_law(run.params, run.steps * run.batch, run.batch)
        for run in PUBLISHED
    ]
    expected = [0.542, 0.480, 0.644, 0.418, 0.518]
    assert ratios == pytest.approx(expected, abs=5e-4)
    assert all(0.7 < 0.5 / ratio < 1.3 for ratio in ratios)


@pytest.mark.parametrize("run", PUBLISHED)
def test_the_published_runs_are_in_range(run: Published):
    new = without_a_warning(
        SMALL, steps=run.steps, batch_tokens=run.batch, params=run.params
    )
    assert new.learning_rate == pytest.approx(run.learning_rate, rel=0.3)
    assert 0.03 < new.weight_decay < 0.2  # it was 0.1


@pytest.mark.parametrize(
    ("params", "alpha"), [(1.1e8, 8), (3e8, 8), (6e8, 8), (7e8, 5), (1.3e9, 5)]
)
def test_alpha_is_that_of_the_nearest_model(params: float, alpha: float):
    new = scaled(SMALL, steps=100_000, batch_tokens=300_000, params=params)
    assert new.alpha.alpha == alpha


@pytest.mark.parametrize(
    ("steps", "b3"), [(32_000, 0.9996751), (64_000, 0.9998376), (700_000, 0.9999)]
)
def test_b3_keeps_its_share_of_the_run(steps: int, b3: float):
    new = scaled(SMALL, steps=steps, batch_tokens=131_072, params=1.5e8)
    assert new.b3.beta_end == pytest.approx(b3, abs=1e-7)
    assert new.b3.beta_end == min(0.9999, 0.5 ** (15 / steps))


def test_a_decay_that_the_learning_rate_does_not_multiply():
    coupled = scaled(SMALL, **RUN)
    decoupled = scaled(
        AdEMAMix(1e-3, weight_decay=0.1, decoupled_weight_decay=True), **RUN
    )
    product = coupled.learning_rate * coupled.weight_decay
    assert decoupled.weight_decay == pytest.approx(product, rel=1e-12)


#
# Ranges
#


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"params": 1e8}, "params 1e+08, not 1.1e+08 to 1.3e+09"),
        ({"params": 1.31e9}, "params 1.31e+09, not 1.1e+08 to 1.3e+09"),
        ({"params": 8e9}, "params 8e+09, not 1.1e+08 to 3.3e+09"),
        ({"params": 1e11}, "params 1e+11, not 1.1e+08 to 7e+10"),
        ({"steps": 300_000}, "tokens 1.5e+11, not 4e+09 to 1.01e+11"),
        ({"batch_tokens": 30_000}, "tokens 3e+09, not 4e+09 to 1.01e+11"),
        ({"batch_tokens": 60_000}, "tokens per parameter 6, not 20 to 1.28e+03"),
        ({"steps": 31_999}, "steps 3.2e+04, not 3.2e+04 to 7.7e+05"),
        (
            {"steps": 20_000, "batch_tokens": 2_000_000},
            "batch_tokens over the best 3.05, not 0.1 to 1.5",
        ),
    ],
)
def test_outside_of_a_range(change: dict[str, float], text: str):
    run = {**RUN, **change}
    with pytest.warns(ScalingWarning, match=re.escape(text)) as found:
        scale_to(SMALL, **run)
    assert len(found) == 1
    message = str(found[0].message)
    assert message.startswith("The run is outside of the range of a published fit: ")
    assert message.count(text) == 1
    assert "low: " in scale_report(SMALL, **run)
    assert f"outside of its range: {text}" in scale_report(SMALL, **run)


def test_the_report_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scale_report(SMALL, steps=10, batch_tokens=10, params=10)


def test_the_report():
    head, columns, *rows = scale_report(SMALL, **RUN).splitlines()
    assert head == (
        "A run of 100,000 steps with 5e+10 tokens, 50 for each of 1e+09 parameters. "
        "The new values are absolute: none depends on the present one."
    )
    assert columns.split() == ["before", "after", "source", "confidence"]
    assert [re.split(r"\s{2,}", row.strip()) for row in rows] == [
        [
            "learning_rate",
            "0.001",
            "0.0005403",
            "arXiv:2503.04715 (Step Law), arXiv:2205.10287 (batch size)",
            "medium: a fit for AdamW, halved, within 30% of five runs of AdEMAMix",
        ],
        [
            "weight_decay",
            "0.1",
            "0.1342",
            "arXiv:2505.13738 (Power Lines)",
            "low: a fit for AdamW, with a factor not checked against the paper",
        ],
        [
            "b3",
            "0.9999",
            "0.9 to 0.999896033328, linear in half-life over 100,000 steps",
            "arXiv:2409.03137, Figure 17; arXiv:2509.01440, section D.1",
            "medium: 15 half-lives in the run, between two values that were tested",
        ],
        [
            "alpha",
            "5",
            "0 to 5, linear over 100,000 steps",
            "arXiv:2409.03137, Tables 2 to 4; arXiv:2509.14233",
            "medium: that of the published model with 1.3e+09 parameters",
        ],
    ]
    long = scale_report(SMALL, steps=128_000, batch_tokens=131_072, params=124e6)
    assert "high: the best of two values in both" in long


def test_what_is_off_stays_off():
    adamw = AdEMAMix(1e-3, alpha=0.0)
    new = scaled(adamw, **RUN)
    assert new.alpha == new.weight_decay == 0.0
    report = scale_report(adamw, **RUN)
    assert (
        len(re.findall(r"^  (?:weight_decay|alpha) .* unchanged$", report, re.M)) == 2
    )


#
# Schedules
#


def test_warm_ups_keep_their_starts_and_offsets():
    optim = AdEMAMix(
        1e-3,
        b3=beta3_scheduler(0.999, 0.5, warmup=10, offset=1),
        alpha=alpha_scheduler(2.0, 1.0, warmup=10, offset=1),
    )
    new = scaled(optim, **RUN)
    assert (new.b3.beta_start, new.b3.offset, new.b3.warmup) == (0.5, 1, 100_000)
    assert (new.alpha.alpha_start, new.alpha.offset) == (1, 1)
    assert new.alpha(99_999) == 5.0


def test_a_cool_down_keeps_its_share():
    alpha = alpha_cooldown_scheduler(alpha_scheduler(8.0, warmup=9000), 10_000, 1000)
    new = scaled(AdEMAMix(1e-3, alpha=alpha), **RUN).alpha
    assert (new.total_steps, new.cooldown) == (100_000, 10_000)
    assert new.alpha.warmup == 100_000


def test_log_time_schedules_stay():
    b3, alpha = log_time_beta_scheduler(), power_alpha_scheduler()
    new = scaled(AdEMAMix(1e-3, b3=b3, alpha=alpha), **RUN)
    assert eqx.tree_equal(new.b3, b3) and eqx.tree_equal(new.alpha, alpha)


def test_a_preset_keeps_the_shape_of_its_learning_rate():
    old = presets.paper("110m", total_steps=256_000)
    new = scaled(old, **RUN)
    peak = scaled(SMALL, **RUN).learning_rate
    assert new.learning_rate.peak == peak
    steps = np.arange(0, 256_001, 1000)
    rate: Any = old.learning_rate
    shape = np.asarray(rate(steps)) / 1e-3
    stretched = np.asarray(new.learning_rate(steps / 2.56)) / peak
    np.testing.assert_allclose(stretched, shape, atol=2e-6)
    words = eqx_ademamix.schedule_report(new, num_steps=100_000)
    assert "cosine to 0.01 at 256,000, stretched from 256,000 to 100,000 steps" in words


@pytest.mark.parametrize(
    ("schedule", "end"),
    [
        (optax.warmup_cosine_decay_schedule(0.0, 3e-3, 500, 20_000, 3e-5), 0.01),
        (optax.warmup_cosine_decay_schedule(0.0, 3e-3, 500, 20_000), 0.0),
        (optax.linear_schedule(3e-3, 3e-4, 20_000), 0.1),
        (lambda step: jnp.where(step < 20_000, 3e-3, 3e-4), 0.1),
    ],
)
def test_a_schedule_of_optax_is_stretched(schedule: Any, end: float):
    """Also without a warm-up of `b3`, the end of the schedule is found."""
    new = scaled(AdEMAMix(schedule), **RUN).learning_rate
    steps = np.arange(0, 100_001)
    rates = np.asarray(new(steps)) / new.peak
    assert rates.max() == pytest.approx(1.0, rel=1e-5)
    assert rates[-1] == pytest.approx(end, abs=1e-5)
    old = np.asarray(jax.vmap(schedule)(jnp.asarray(steps[::5] // 5, float))) / 3e-3
    np.testing.assert_allclose(rates[::5], old, atol=2e-3)


def test_a_warm_up_alone_is_stretched_with_the_run():
    warmup = optax.linear_schedule(0.0, 1e-3, 1000)
    b3 = beta3_scheduler(0.9999, 0.9, warmup=50_000)
    new = scaled(AdEMAMix(warmup, b3=b3), **RUN).learning_rate
    assert new(1000) == pytest.approx(new.peak / 2, rel=1e-6)
    assert new(2000) == pytest.approx(new.peak, rel=1e-6)


def test_the_result_trains():
    optim = scaled(presets.benchmark(32_000), **RUN)
    params = {"w": jnp.ones((4, 3))}
    traces: list[int] = []

    @eqx.filter_jit
    def step(optim: Any, state: Any) -> Any:
        traces.append(1)
        return eqx_ademamix.update(optim, params, state, params)

    state, updates = eqx_ademamix.init(optim, params), params
    for _ in range(3):
        updates, state = step(optim, state)
    assert len(traces) == 1 and int(state.count) == 3
    assert jnp.isfinite(updates["w"]).all() and (updates["w"] < 0).all()


def test_wrappers_stay():
    for wrapped in (Compensated(SMALL), Compensated(Offloaded(SMALL))):
        new = scaled(wrapped, **RUN)
        assert jax.tree.structure(new) != jax.tree.structure(wrapped)
        assert type(new) is type(wrapped) and type(new.optim) is type(wrapped.optim)
        inner: Any = getattr(new.optim, "optim", new.optim)
        assert inner.learning_rate == scaled(SMALL, **RUN).learning_rate
        assert scale_report(wrapped, **RUN) == scale_report(SMALL, **RUN)


def test_arrays_become_numbers():
    new = scaled(AdEMAMix(jnp.asarray(1e-3), alpha=jnp.asarray(5.0)), **RUN)
    assert isinstance(new.learning_rate, float) and isinstance(new.alpha.alpha, float)


#
# Errors
#


@pytest.mark.parametrize("name", ["learning_rate", "b3", "alpha", "weight_decay"])
def test_traced_hyperparameters(name: str):
    def called(value: jax.Array) -> None:
        fields: Any = {"learning_rate": 1e-3, name: value}
        scaled(AdEMAMix(**fields), **RUN)

    text = f"`optim.{name}` is .*, but `scale_to` needs a concrete number"
    for transform, value in ((jax.jit, jnp.asarray(0.5)), (jax.vmap, jnp.ones(2) / 2)):
        with pytest.raises(ValueError, match=text):
            transform(called)(value)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"b3": lambda t: 0.999}, "`b3` is the function `<lambda>`, but there is no"),
        ({"alpha": lambda t: 1.0}, "`alpha` is the function `<lambda>`, but there is"),
        (
            {"weight_decay": log_time_weight_decay_scheduler(4.0, 10.0)},
            "`weight_decay` is a `LogTimeWeightDecaySchedule`, but there is no",
        ),
        ({"learning_rate": 0.0}, "The largest learning rate of `optim` is 0, but"),
        ({"learning_rate": -1e-3}, "The largest learning rate of `optim` is -0.001"),
        (
            {"learning_rate": optax.linear_schedule(0.0, 1e-3, 9)},
            "`learning_rate` is the function .*, and no schedule of `optim` says",
        ),
    ],
)
def test_schedules_without_a_fit(fields: Any, text: str):
    with pytest.raises(ValueError, match=text):
        scaled(AdEMAMix(**{"learning_rate": 1e-3} | fields), **RUN)


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
@pytest.mark.parametrize("name", RUN)
def test_sizes_out_of_range(name: str, value: float):
    with pytest.raises(ValueError, match=f"`{name}` is "):
        scaled(SMALL, **{**RUN, name: value})


def test_other_optimizers():
    for optim in (SimplifiedAdEMAMix(1e-3), Compensated(SimplifiedAdEMAMix(1e-3))):
        with pytest.raises(
            TypeError, match="this function supports only an `AdEMAMix`"
        ):
            scaled(optim, **RUN)
