"""`review`: each sentence for the problem that it is about, and none next to it."""

import functools as ft
import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from eqx_ademamix import (
    AdEMAMix,
    Compensated,
    Offloaded,
    ScaledFloat16,
    SimplifiedAdEMAMix,
    StateFormat,
    alpha_cooldown_scheduler,
    alpha_scheduler,
    beta3_scheduler,
    decay_mask,
    log_time_beta_scheduler,
    log_time_weight_decay_scheduler,
    power_alpha_scheduler,
    presets,
    review,
)

from .helpers import make_mlp


STEPS = 256_000
CLIP = optax.clip_by_global_norm(0.5)
BFLOAT16 = StateFormat("float32", "bfloat16", "float32")


def made(steps: int = STEPS, b3_end: float = 0.9999, **fields: Any) -> AdEMAMix:
    """A good optimizer for a run of this length, except for the given fields."""
    good: Any = {
        "b3": beta3_scheduler(b3_end, 0.9, warmup=steps),
        "alpha": alpha_scheduler(8.0, warmup=steps),
    }
    return AdEMAMix(1e-3, **{**good, **fields})


def test_a_good_configuration_gets_no_sentence():
    assert review(made(), num_steps=STEPS) == []
    assert review([CLIP, made()], num_steps=STEPS) == []
    assert review(made(8000, b3_end=0.999), num_steps=8000) == []  # of our main example


#
# The sentences
#


@pytest.mark.parametrize("b3", [0.9999, lambda step: 0.9999, np.float64(0.9999)])
def test_a_large_b3_from_the_start(b3: Any):
    assert review(made(b3=b3), num_steps=STEPS) == [
        "`b3` is already 0.9999 at step 0, a half-life of 6,931 steps. Such a slow "
        "average makes the beginning of a run unstable: the paper starts at 0.9 "
        "(arXiv:2409.03137, section 3). Pass "
        "`b3=beta3_scheduler(0.9999, 0.9, warmup=256000)`."
    ]
    # The half-life of 0.99 is 68.97 steps, and 69 is the threshold.
    assert review(made(b3=0.99), num_steps=STEPS) == []
    (sentence,) = review(made(b3=0.9901), num_steps=STEPS)
    assert sentence.startswith("`b3` is already 0.9901 at step 0, a half-life of 70 ")


@pytest.mark.parametrize("alpha", [5.0, lambda step: 5.0, np.float32(5.0)])
def test_a_large_alpha_from_the_start(alpha: Any):
    assert review(made(alpha=alpha), num_steps=STEPS) == [
        "`alpha` is already 5 at step 0. Without a warm-up of `alpha`, a model with "
        "1.3 billion parameters was stable only at 1 (arXiv:2409.03137, Figure 14). "
        "Pass `alpha=alpha_scheduler(5, warmup=256000)`."
    ]
    assert review(made(alpha=1.0), num_steps=STEPS) == []


def test_a_large_array_b3_from_the_start():
    (sentence,) = review(made(b3=jnp.asarray(0.9999)), num_steps=STEPS)
    # The float32 nearest to 0.9999 is 0.99989998.
    assert sentence.startswith("`b3` is already 0.9999 at step 0, a half-life of 6,930")


def test_the_defaults_have_two_problems():
    sentences = review(AdEMAMix(1e-3), num_steps=STEPS)
    assert [re.findall(r"^`\w+` is already \S+", x) for x in sentences] == [
        ["`b3` is already 0.9999"],
        ["`alpha` is already 5"],
    ]


def test_a_warmup_that_is_longer_than_the_run():
    assert review(made(), num_steps=200_000) == [
        "The warm-up of `b3` to 0.9999 takes 256,000 steps, but the run has only "
        "200,000. At its last step, `b3` is 0.999872. Pass "
        "`b3=beta3_scheduler(0.9999, 0.9, warmup=200000)`.",
        "The warm-up of `alpha` to 8 takes 256,000 steps, but the run has only "
        "200,000. At its last step, `alpha` is 6.25. Pass "
        "`alpha=alpha_scheduler(8, warmup=200000)`.",
    ]
    assert review(made(200_000), num_steps=200_000) == []
    one_more = made(alpha=alpha_scheduler(8.0, warmup=STEPS + 1))
    assert len(review(one_more, num_steps=STEPS)) == 1
    as_in_the_paper = made(alpha=alpha_scheduler(8.0, warmup=STEPS + 1, offset=1))
    assert review(as_in_the_paper, num_steps=STEPS) == []


def test_a_warmup_of_optax_that_is_longer_than_the_run():
    rising = optax.linear_schedule(0.0, 8.0, STEPS)
    assert review(made(alpha=rising), num_steps=STEPS) == []
    (sentence,) = review(made(200_000, alpha=rising), num_steps=200_000)
    assert "takes more than 200,000 steps, but the run has only 200,000." in sentence
    assert "`alpha` is 6.25." in sentence


def test_a_warmup_that_is_shorter_than_a_half_life():
    short = made(
        b3=beta3_scheduler(0.9999, 0.9, warmup=3000),
        alpha=alpha_scheduler(8.0, warmup=6931),
    )
    assert review(short, num_steps=STEPS) == [
        "The warm-up of `b3` to 0.9999 is over by step 3,000, within one half-life of "
        "`b3=0.9999` (6,931 steps). After a short warm-up, a run can diverge or end "
        "worse (arXiv:2409.03137, Figure 13). Let it last as long as the run: "
        "`b3=beta3_scheduler(0.9999, 0.9, warmup=256000)`.",
        "The warm-up of `alpha` to 8 is over by step 6,931, within one half-life of "
        "`b3=0.9999` (6,931 steps). After a short warm-up, a run can diverge or end "
        "worse (arXiv:2409.03137, Figure 13). Let it last as long as the run: "
        "`alpha=alpha_scheduler(8, warmup=256000)`.",
    ]
    long_enough = made(alpha=alpha_scheduler(8.0, warmup=6932))
    assert review(long_enough, num_steps=STEPS) == []
    # Constants of 1 and 0.99 are all right, so a short way to them is, too.
    small = made(
        b3=beta3_scheduler(0.99, 0.9, warmup=9), alpha=alpha_scheduler(1.0, warmup=9)
    )
    assert review(small, num_steps=STEPS) == []


def test_a_short_warmup_of_optax():
    short = made(alpha=optax.linear_schedule(0.0, 8.0, 3000))
    (sentence,) = review(short, num_steps=STEPS)
    # Only a few values of such a function are known.
    assert "is over by step 6,931, within one half-life" in sentence
    long_enough = made(alpha=optax.linear_schedule(0.0, 8.0, 6932))
    assert review(long_enough, num_steps=STEPS) == []


def test_a_b3_that_remembers_too_much_for_the_run():
    assert review(made(20_000), num_steps=20_000) == [
        "`b3` reaches 0.9999, which remembers about 10,000 steps. The run of 20,000 "
        "steps has only 2.9 of its half-lives. A shorter memory was better at 4.6 "
        "(arXiv:2409.03137, Figure 17) and at fewer (arXiv:2509.01440, section D.1). "
        "Pass "
        "`b3=beta3_scheduler(0.99948, 0.9, warmup=20000)`."
    ]
    assert 0.5 ** (15 / 20_000) == pytest.approx(0.99948, abs=5e-7)
    assert review(made(20_000, b3_end=0.99948), num_steps=20_000) == []
    assert len(review(made(31_883), num_steps=31_883)) == 1
    assert review(made(31_884), num_steps=31_884) == []  # 4.6 half-lives


def test_a_run_that_is_too_short():
    short = made(689, b3_end=0.99)
    assert review(short, num_steps=689) == [
        "A run of 689 steps is too short for a slow average: even with a decay "
        "of only 0.99, it needs ten half-lives, which are 690 steps. Use AdamW, which "
        "is `alpha=0`."
    ]
    assert review(made(690, b3_end=0.99), num_steps=690) == []


def test_a_large_alpha_without_clipping():
    (sentence,) = review([made()], num_steps=STEPS)
    assert sentence == (
        "`alpha` reaches 8, and nothing in the list clips the gradients before the "
        "optimizer. After a spike, half of it is still in the slow average 6,931 steps "
        "later. The published runs with such an `alpha` clip to a norm of 0.1 to 0.5. "
        "Put `optax.clip_by_global_norm(0.5)` first."
    )
    # Clipping the updates comes too late for the averages.
    assert review([made(), CLIP], num_steps=STEPS) == [sentence]
    assert review((optax.scale(0.5), made()), num_steps=STEPS) == [sentence]
    for clip in (optax.clip(1.0), optax.adaptive_grad_clip(0.1)):
        assert review([clip, made()], num_steps=STEPS) == []
    small = made(alpha=alpha_scheduler(3.9, warmup=STEPS))
    assert review([small], num_steps=STEPS) == []


def test_what_may_clip_is_trusted():
    own = optax.stateless(lambda updates, params: updates)
    for member in (optax.chain(CLIP), own, optax.apply_if_finite(CLIP, 3)):
        assert review([member, made()], num_steps=STEPS) == []
    assert review(made(), num_steps=STEPS) == []  # the step itself may clip


def test_a_format_that_freezes_m2():
    (sentence,) = review(made(state_format=BFLOAT16), num_steps=STEPS)
    pattern = (
        r"`m2` is stored as bfloat16. At `b3=0.9999`, a typical step leaves (\d\d)% of "
        r"its entries unchanged, because rounding loses the change. Store it by "
        r"`ScaledFloat16\(\)`, as in `StateFormat.half\(\)`, or as float32."
    )
    match = re.fullmatch(pattern, sentence)
    assert match and 75 <= int(match[1]) <= 85  # docs/precision.md has 80%
    quick = made(b3_end=0.999, state_format=BFLOAT16)
    assert review(quick, num_steps=STEPS) == []
    scaled = StateFormat("float32", ScaledFloat16(), "float32")
    for fmt in (scaled, StateFormat.compact()):
        assert review(made(state_format=fmt), num_steps=STEPS) == []


@pytest.mark.parametrize("weight_decay", [0.1, lambda step: 0.1, jnp.asarray(0.1)])
def test_decay_of_everything(weight_decay: Any):
    everything = made(weight_decay=weight_decay)
    assert review(everything, num_steps=STEPS) == [
        "`weight_decay` is 0.1 and acts on every array, including biases and "
        "normalization layers. Pass `weight_decay_mask=decay_mask(model)`."
    ]
    mask = decay_mask(make_mlp())
    masked = made(weight_decay=weight_decay, weight_decay_mask=mask)
    assert review(masked, num_steps=STEPS) == []
    assert review(made(weight_decay_mask=True), num_steps=STEPS) == []


def test_adamw_is_not_about_the_slow_average():
    for alpha in (0.0, lambda step: 0.0, alpha_scheduler(0.0)):
        assert review([AdEMAMix(1e-3, alpha=alpha)], num_steps=10) == []
    adamw = AdEMAMix(1e-3, alpha=0.0, weight_decay=0.1)
    assert len(review(adamw, num_steps=10)) == 1


#
# What it accepts
#


def test_wrappers_and_lists():
    expected = review(AdEMAMix(1e-3), num_steps=STEPS)
    inner = AdEMAMix(1e-3)
    for optim in (Compensated(inner), Offloaded(inner), Compensated(Offloaded(inner))):
        assert review(optim, num_steps=STEPS) == expected
        assert review([CLIP, optim, optax.scale(0.5)], num_steps=STEPS) == expected
    multi = optax.MultiSteps(optax.adam(1e-3), 4)
    others = [multi, Compensated(optax.sgd(1.0))]
    assert review([CLIP, *others, inner], num_steps=STEPS) == expected
    assert review([CLIP, inner, inner], num_steps=STEPS) == 2 * expected


def test_simplified():
    optim = SimplifiedAdEMAMix(1e-3)
    assert review(optim, num_steps=10) == []
    assert review([optim], num_steps=10) == []
    b1 = beta3_scheduler(0.9999, 0.9, warmup=2000)
    optim = SimplifiedAdEMAMix(1e-3, b1=b1, weight_decay=0.1, state_format=BFLOAT16)
    sentences = review(optim, num_steps=1000)
    assert sentences[0] == (
        "The warm-up of `b1` to 0.9999 takes 2,000 steps, but the run has only 1,000. "
        "At its last step, `b1` is 0.9998. Pass "
        "`b1=beta3_scheduler(0.9999, 0.9, warmup=1000)`."
    )
    assert sentences[1].startswith("`m` is stored as bfloat16. At `b1=0.9999`, ")
    assert sentences[2].startswith("`weight_decay` is 0.1 and acts on every array")
    assert len(sentences) == 3


def test_functions_are_called_a_few_times():
    steps: list[int] = []

    def alpha(step: jax.Array) -> jax.Array:
        steps.append(int(step))
        return 8.0 * jnp.minimum(step.astype(float) / STEPS, 1.0)

    assert review(made(alpha=alpha), num_steps=STEPS) == []
    assert len(steps) <= 10
    far = [200 * STEPS, 100 * STEPS]
    assert sorted(set(steps), reverse=True) == [
        *far,
        STEPS,
        STEPS - 1,
        STEPS // 2,
        6931,
        0,
    ]


def test_functions_without_an_end_and_those_that_cool_down():
    endless = made(alpha=lambda step: (1.0 + step.astype(float)) ** 0.15)
    assert review(endless, num_steps=STEPS) == []
    triangle = lambda step: 8.0 - 8.0 * abs(step.astype(float) / STEPS * 2 - 1)
    falling = made(alpha=lambda step: jnp.maximum(triangle(step), 0.0))
    assert review(falling, num_steps=STEPS) == []
    (sentence,) = review([falling], num_steps=STEPS)
    assert sentence.startswith("`alpha` reaches 8, and nothing")


def test_schedules_without_an_end():
    """They grow with the run, so no run is too short or too long for them."""
    growing = AdEMAMix(
        1e-3, b3=log_time_beta_scheduler(), alpha=power_alpha_scheduler()
    )
    for steps in (1000, STEPS, 10**8):
        assert review([CLIP, growing], num_steps=steps) == []
    (sentence,) = review(made(alpha=power_alpha_scheduler(scale=2.0)), num_steps=STEPS)
    assert sentence.startswith("`alpha` is already 2 at step 0.")


def test_an_alpha_that_cools_down():
    cooling = lambda alpha: made(alpha=alpha_cooldown_scheduler(alpha, STEPS, 20_000))
    assert review(cooling(alpha_scheduler(8.0, warmup=STEPS)), num_steps=STEPS) == []
    (sentence,) = review(cooling(8.0), num_steps=STEPS)
    assert sentence.startswith("`alpha` is already 8 at step 0.")
    (sentence,) = review(
        cooling(alpha_scheduler(8.0, warmup=2 * STEPS)), num_steps=STEPS
    )
    assert sentence.startswith("The warm-up of `alpha` to 8 takes 512,000 steps, but")


def test_decays_over_the_steps():
    decay = log_time_weight_decay_scheduler(40.0, timescale=100)
    (sentence,) = review(made(weight_decay=decay), num_steps=STEPS)
    assert sentence.startswith("`weight_decay` is 0.4 and acts on every array")
    averages: Any = {"b1": log_time_beta_scheduler(), "b2": log_time_beta_scheduler()}
    assert review(made(**averages), num_steps=STEPS) == []


PRESETS = (
    (lambda **x: presets.paper("110m", 256_000, **x), 256_000),
    (lambda **x: presets.paper("330m", 400_000, **x), 400_000),
    (lambda **x: presets.paper("1.3b", 770_000, **x), 770_000),
    *((ft.partial(presets.benchmark, n), n) for n in (8000, 32_000, 48_000, 128_000)),
    (lambda **x: presets.apertus("8b", **x), 2_627_139),
    (lambda **x: presets.apertus("70b", **x), 1_155_828),
    (ft.partial(presets.short_run, 8000), 8000),
    (ft.partial(presets.finetune, 3000), 3000),
    (ft.partial(presets.from_adamw_recipe, 1e-3, 0.1, 20_000), 20_000),
)


@pytest.mark.parametrize(("preset", "num_steps"), PRESETS)
def test_the_presets_are_good(preset: Any, num_steps: int):
    mask = decay_mask(make_mlp())
    masked = preset(weight_decay_mask=mask)
    assert review([CLIP, masked], num_steps=num_steps) == []
    # Without your mask, the decay does act on everything.
    sentences = review(preset(), num_steps=num_steps)
    assert all(x.startswith("`weight_decay` is 0.1 and acts") for x in sentences)
    assert len(sentences) == int(preset().weight_decay > 0)


def test_under_jit_it_reads_what_is_not_traced():
    def reviewed(x: jax.Array) -> jax.Array:
        assert len(review(AdEMAMix(1e-3), num_steps=STEPS)) == 2
        assert review(made(), num_steps=STEPS) == []
        return x

    assert jax.jit(reviewed)(1.0) == 1.0


@pytest.mark.parametrize("name", ["b3", "alpha", "weight_decay"])
def test_traced_hyperparameters(name: str):
    def reviewed(value: jax.Array) -> list[str]:
        fields: Any = {name: value}
        return review(made(**fields), num_steps=STEPS)

    message = (
        f"`{name}` is traced, but `review` reads numbers. Call it outside of `jit`"
    )
    for transform, value in ((jax.jit, jnp.asarray(0.5)), (jax.vmap, jnp.ones(1) / 2)):
        with pytest.raises(TypeError, match=re.escape(message)):
            transform(reviewed)(value)


def test_traced_schedules():
    @eqx.filter_jit
    def reviewed(warmup: jax.Array) -> list[str]:
        alpha = alpha_scheduler(8.0, warmup=warmup)
        return review(made(alpha=alpha), num_steps=STEPS)

    with pytest.raises(TypeError, match="is traced, but `review` reads numbers"):
        reviewed(jnp.asarray(100.0))


def test_batched_hyperparameters():
    optims = eqx.filter_vmap(lambda alpha: made(alpha=alpha))(jnp.ones(3))
    with pytest.raises(ValueError, match=r"`alpha` has shape \(3,\), but a scalar"):
        review(optims, num_steps=STEPS)


@pytest.mark.parametrize("name", ["alpha", "weight_decay"])
def test_illegal_values_of_schedules(name: str):
    values: Any = {name: lambda step: -1.0}
    with pytest.raises(ValueError, match=rf"`{name}\(0\)` is -1.0, but a finite"):
        review(made(**values), num_steps=STEPS)
