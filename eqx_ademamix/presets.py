"""Ready-made optimizers: published recipes, each with its source.

Each function returns an `AdEMAMix` with schedules for the learning rate, `b3`, and
`alpha`. Gradient clipping is part of the recipes: put `optax.clip_by_global_norm`
before the preset, with the number that `clip_norm` returns for it.

All functions also take the arguments of `AdEMAMix` by keyword. A number for
`learning_rate`, `b3` or `alpha` replaces the value that the preset's schedule reaches
(for the learning rate, the peak). A schedule replaces the preset's schedule. Every
other argument replaces the preset's value. `b3` starts at `b1`.

A warm-up or cool-down of the learning rate takes at most half of the run, and the
warm-ups of `b3` and `alpha` end no later than the run. So a run can be shorter than the
phases of the recipe.

Schedules count the steps 0, 1, 2, ..., as everywhere in this package.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypedDict, TypeVar, Unpack

import jax
import jax.numpy as jnp
import optax

from ._ademamix import AdEMAMix
from ._filters import FilterSpec
from ._hyperparams import (
    HyperParamLike,
    HyperParamLikeOrSchedule,
    finite,
    hyperparam,
    positive_int,
)
from ._learning_rate_scale import Scales
from ._schedules import (
    LearningRateSchedule,
    alpha_scheduler,
    b3_for_run,
    beta3_scheduler,
)
from ._storage.format import StateFormat
from ._typing import no_type_check


class OtherOverrides(TypedDict, total=False):
    """The arguments of `AdEMAMix` except the learning rate and the weight decay."""

    b1: HyperParamLikeOrSchedule
    b2: HyperParamLikeOrSchedule
    b3: HyperParamLikeOrSchedule
    alpha: HyperParamLikeOrSchedule
    eps: HyperParamLike
    eps_root: HyperParamLike
    weight_decay_mask: FilterSpec
    trainable: FilterSpec
    state_format: StateFormat
    bias_correct_m2: bool
    decoupled_weight_decay: bool
    learning_rate_scale: Scales
    max_slow_ratio: HyperParamLike | None
    clip_update_rms: HyperParamLike | None
    skip_nonfinite: bool


class Overrides(OtherOverrides, total=False):
    """The arguments of `AdEMAMix`, which replace those of a preset."""

    learning_rate: HyperParamLikeOrSchedule
    weight_decay: HyperParamLikeOrSchedule


class _Shape(NamedTuple):
    """A learning rate with a peak of 1."""

    schedule: optax.Schedule
    words: str


class _Recipe(NamedTuple):
    """The numbers of a preset. Without a shape, the learning rate is as given."""

    learning_rate: HyperParamLikeOrSchedule
    shape: _Shape | None
    b3: float
    alpha: float
    warmup: int  # of `b3` and `alpha`
    weight_decay: HyperParamLikeOrSchedule


#
# The paper
#


class _Paper(NamedTuple):
    peak: float
    alpha: float
    clip_norm: float


_PAPER = {
    "110m": _Paper(peak=1e-3, alpha=8.0, clip_norm=0.5),
    "330m": _Paper(peak=5e-4, alpha=8.0, clip_norm=0.1),
    "1.3b": _Paper(peak=3e-4, alpha=5.0, clip_norm=0.1),
}


@no_type_check
def paper(
    size: Literal["110m", "330m", "1.3b"],
    total_steps: int,
    **overrides: Unpack[Overrides],
) -> AdEMAMix:
    r"""The language models of the paper (arXiv:2409.03137, section B.1, Tables 2 to 4).

    | `size` | learning rate | `alpha` | clip gradients to | steps there |
    | --- | --- | --- | --- | --- |
    | `"110m"` | 1e-3 | 8 | 0.5 | 256,000 |
    | `"330m"` | 5e-4 | 8 | 0.1 | 256,000, 400,000, 500,000 |
    | `"1.3b"` | 3e-4 | 5 | 0.1 | 770,000 |

    All have $\beta_1 = 0.9$, $\beta_2 = 0.999$, $\beta_3 = 0.9999$, and a weight decay
    of 0.1. $\beta_3$ and $\alpha$ warm up over the whole run. The learning rate rises
    linearly over 3000 steps and falls along a cosine to 1e-5 at the end. For `"110m"`,
    the paper's Table 2 has both $\alpha = 8$ and $\alpha = 10$ in bold.

    **Arguments:**

    - `size`: the model in the paper that yours resembles.
    - `total_steps`: $T$, the number of steps of the run.
    - `overrides`: arguments of [`eqx_ademamix.AdEMAMix`][] that replace those of the
        preset, for example `weight_decay_mask`. A number for `learning_rate`, `b3` or
        `alpha` changes the value that the schedule reaches. The end of the cosine
        remains the same fraction of the peak.

    **Returns:**

    An [`eqx_ademamix.AdEMAMix`][].

    **Raises:**

    - `ValueError` or `TypeError`: for an unknown size, for a number of steps that is
        not a positive int, and as in `AdEMAMix`.

    !!! Example

        ```python
        import equinox as eqx
        import jax
        import jax.numpy as jnp
        import optax
        import eqx_ademamix
        from eqx_ademamix import presets

        model = eqx.nn.MLP(2, 1, width_size=8, depth=1, key=jax.random.key(0))
        mask = eqx_ademamix.decay_mask(model)
        optim = optax.chain(
            optax.clip_by_global_norm(presets.clip_norm("paper", "110m")),
            presets.paper("110m", total_steps=256_000, weight_decay_mask=mask),
        )
        state = eqx_ademamix.init(optim, model)


        @eqx.filter_jit
        def step(model, state, x):
            loss_fn = lambda model: jnp.mean(jax.vmap(model)(x) ** 2)
            loss, grads = eqx.filter_value_and_grad(loss_fn)(model)
            updates, state = eqx_ademamix.update(optim, grads, state, model)
            return eqx.apply_updates(model, updates), state, loss


        for _ in range(3):
            model, state, loss = step(model, state, jnp.ones((4, 2)))
        ```
    """
    row = _row("size", size, _PAPER)
    steps = positive_int("total_steps", total_steps)
    rate = _warmup_cosine(steps, warmup=3000, start=0.0, end=1e-5 / row.peak)
    return _made(_Recipe(row.peak, rate, 0.9999, row.alpha, steps, 0.1), overrides)


#
# The benchmark
#


_BENCHMARK_CLIP_NORMS = {"124m": 0.5, "210m": 0.5, "520m": 0.5, "720m": 0.1}


@no_type_check
def benchmark(total_steps: int, **overrides: Unpack[Overrides]) -> AdEMAMix:
    r"""The language models with 124 to 720 million parameters of an independent
    benchmark (Semenov, Pagliardini, Jaggi 2025, arXiv:2509.01440).

    $\alpha = 8$, $\beta_1 = 0.9$, $\beta_2 = 0.999$, weight decay 0.1, and a learning
    rate that rises from 1e-5 to 1e-3 over 2000 steps and falls along a cosine to 1e-5
    at the end. $\beta_3$ and $\alpha$ warm up over the whole run. $\beta_3$ is 0.999 in
    runs of up to 32,000 steps and 0.9999 in longer ones. (In section D.1, 0.999 is
    better only below 32,000.)

    The [launch scripts](https://github.com/epfml/llm-optimizer-benchmark) differ in two
    ways. They also have $\beta_3 = 0.999$ at 48,000, 128,000, and 336,000 steps. The
    warm-up of the learning rate is half a cosine there (PyTorch's `OneCycleLR`) and
    linear here.

    **Arguments:**

    - `total_steps`: the number of steps of the run.
    - `overrides`: as in [`eqx_ademamix.presets.paper`][].

    **Returns:** and **Raises:** as in [`eqx_ademamix.presets.paper`][]. Clip gradients
    to 0.5, and to 0.1 at 720 million parameters.

    !!! Example

        ```python
        from eqx_ademamix import presets

        assert presets.benchmark(32_000).b3.beta_end == 0.999
        assert presets.benchmark(128_000).b3.beta_end == 0.9999
        ```
    """
    steps = positive_int("total_steps", total_steps)
    rate = _warmup_cosine(steps, warmup=2000, start=0.01, end=0.01)
    b3 = 0.999 if steps <= 32_000 else 0.9999
    return _made(_Recipe(1e-3, rate, b3, 8.0, steps, 0.1), overrides)


#
# Apertus
#


class _Apertus(NamedTuple):
    peak: float
    warmup: int
    cooldown: int
    total_steps: int


# In samples, both scripts warm up for 4,096,000, cool down for 403,905,806 and end at
# 3,662,109,375. The batch doubles in the middle of the run: from 1024 to 2048 after
# 1,718,272,000 samples, and from 2048 to 4096 after 1,072,164,864.
_APERTUS = {
    "8b": _Apertus(peak=1.1e-4, warmup=4000, cooldown=197_219, total_steps=2_627_139),
    "70b": _Apertus(peak=1e-5, warmup=2000, cooldown=98_609, total_steps=1_155_828),
}


@no_type_check
def apertus(
    size: Literal["8b", "70b"],
    total_steps: int | None = None,
    **overrides: Unpack[Overrides],
) -> AdEMAMix:
    r"""The pretraining of the Apertus models (arXiv:2509.14233, Tables 2 and C.4, and
    its launch scripts in
    [swiss-ai/pretrain-code](https://github.com/swiss-ai/pretrain-code)).

    | `size` | learning rate | warm-up | cool-down | steps there |
    | --- | --- | --- | --- | --- |
    | `"8b"` | 1.1e-4 | 4000 | 197,219 | 2,627,139 |
    | `"70b"` | 1e-5 | 2000 | 98,609 | 1,155,828 |

    Both have $\beta_1 = 0.9$, $\beta_2 = 0.999$, $\beta_3 = 0.9999$, $\alpha = 8$, and
    weight decay 0.1. $\beta_3$ and $\alpha$ warm up over 100,000 steps. The learning
    rate rises linearly and stays at its peak. In the cool-down, it falls to 10% as
    $1 - 0.9 \sqrt{x}$, where $x$ is the fraction of the cool-down that has passed.
    Gradients are clipped to 0.1.

    The report and the scripts differ in two ways. In the report, the learning rate
    rises from 10% of its peak, and the cool-down begins after 13.5 trillion tokens. In
    the scripts, it rises from 0, and the cool-down begins after 13.35 trillion. This
    preset follows the scripts.

    **Arguments:**

    - `size`: the model that yours resembles.
    - `total_steps`: the number of steps of the run. By default, that of the model.
    - `overrides`: as in [`eqx_ademamix.presets.paper`][].

    **Returns:** and **Raises:** as in [`eqx_ademamix.presets.paper`][].

    !!! Example

        ```python
        from eqx_ademamix import presets

        optim = presets.apertus("8b", total_steps=500_000)
        assert optim.alpha(50_000) == 4.0
        ```
    """
    row = _row("size", size, _APERTUS)
    steps = positive_int(
        "total_steps", row.total_steps if total_steps is None else total_steps
    )
    rate = _warmup_stable_decay(steps, row.warmup, row.cooldown, end=0.1)
    warmup = min(100_000, steps)
    return _made(_Recipe(row.peak, rate, 0.9999, 8.0, warmup, 0.1), overrides)


#
# Other runs
#


@no_type_check
def short_run(total_steps: int, **overrides: Unpack[Overrides]) -> AdEMAMix:
    r"""A run of fewer than 10,000 steps from scratch.

    We know of no published recipe for such runs, and AdamW may be just as good. This
    one is close to the runs of 8000 steps in
    [Does it train better?](../reproductions.md#does-it-train-better): $\alpha = 5$,
    $\beta_1 = 0.9$, $\beta_2 = 0.999$, weight decay 0.1, and gradients clipped to 0.5.
    $\beta_3$ and $\alpha$ warm up over the whole run. $\beta_3$ is 0.999 or, in runs of
    fewer than 10,400 steps, the value with fifteen half-lives in the run, but at least
    0.9. The learning rate rises linearly to 1e-3 over a tenth of the run and falls
    along a cosine to 1e-5. Its peak depends on your model: pass the one that is best
    for AdamW, and also try half of it.

    **Arguments:**

    - `total_steps`: the number of steps of the run.
    - `overrides`: as in [`eqx_ademamix.presets.paper`][].

    **Returns:** and **Raises:** as in [`eqx_ademamix.presets.paper`][].

    !!! Example

        ```python
        from eqx_ademamix import presets

        optim = presets.short_run(5000, learning_rate=3e-3)
        assert abs(optim.learning_rate(500) - 3e-3) < 1e-9
        ```
    """
    steps = positive_int("total_steps", total_steps)
    rate = _warmup_cosine(steps, warmup=steps // 10, start=0.0, end=0.01)
    return _made(
        _Recipe(1e-3, rate, b3_for_run(steps, 0.999), 5.0, steps, 0.1), overrides
    )


@no_type_check
def finetune(total_steps: int, **overrides: Unpack[Overrides]) -> AdEMAMix:
    r"""The supervised fine-tuning of Apertus 8B (arXiv:2509.14233, section 4.2, and the
    settings in [swiss-ai/posttraining](https://github.com/swiss-ai/posttraining)).

    $\beta_1 = 0.9$, $\beta_2 = 0.999$, $\beta_3 = 0.99$, and $\alpha = 8$. The last two
    warm up over the whole run. The learning rate rises linearly to 5e-6 over 3% of the
    run and falls linearly to 0. There is no weight decay. Gradients are
    clipped to 1. For Apertus 70B, the learning rate is 2e-6. Smaller models need larger
    ones: start from the one that you would use for AdamW.

    **Arguments:**

    - `total_steps`: the number of steps of the fine-tuning.
    - `overrides`: as in [`eqx_ademamix.presets.paper`][].

    **Returns:** and **Raises:** as in [`eqx_ademamix.presets.paper`][].

    !!! Example

        ```python
        from eqx_ademamix import presets

        optim = presets.finetune(3000, learning_rate=2e-5)
        assert optim.learning_rate(3000) == 0.0
        ```
    """
    steps = positive_int("total_steps", total_steps)
    # As in transformers, which rounds a fraction of the steps up.
    rate = _warmup_linear(steps, warmup=math.ceil(0.03 * steps))
    return _made(_Recipe(5e-6, rate, 0.99, 8.0, steps, 0.0), overrides)


@no_type_check
def from_adamw_recipe(
    learning_rate: HyperParamLikeOrSchedule,
    weight_decay: HyperParamLikeOrSchedule,
    total_steps: int,
    **overrides: Unpack[OtherOverrides],
) -> AdEMAMix:
    r"""AdEMAMix for a model with a tuned AdamW. It keeps what AdamW has and adds the
    slow average.

    $\alpha = 5$ and $\beta_3$ warm up over the whole run. $\beta_3$ is 0.9999 or, in a
    run of fewer than 104,000 steps, the value with fifteen half-lives in the run, but
    at least 0.9.
    $\beta_1$ and $\beta_2$ are 0.9 and 0.999. In the paper, AdamW's learning rate was
    also right for AdEMAMix at 110 and 330 million parameters. At 1.3 billion it was too
    large, and 3e-4 instead of 5e-4 was stable (arXiv:2409.03137, section B.1). Keep the
    gradient clipping of AdamW.

    **Arguments:**

    - `learning_rate`: AdamW's, a number or a schedule, for example from optax.
    - `weight_decay`: AdamW's.
    - `total_steps`: the number of steps of the run.
    - `overrides`: arguments of [`eqx_ademamix.AdEMAMix`][] that replace those of the
        preset: `b2` if yours is tuned, `weight_decay_mask`, and so on. A number for
        `b3` or `alpha` changes the value that the schedule reaches.

    **Returns:** and **Raises:** as in [`eqx_ademamix.presets.paper`][]. To continue a
    run in progress, use [`eqx_ademamix.from_adamw`][]: pass the number of steps that
    are left as `total_steps`, and the schedule of the whole run as `learning_rate`.

    !!! Example

        ```python
        import optax
        from eqx_ademamix import presets

        schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-3, 500, 20_000)
        optim = presets.from_adamw_recipe(schedule, 0.1, total_steps=20_000)
        assert optim.learning_rate is schedule
        ```
    """
    steps = positive_int("total_steps", total_steps)
    b3 = b3_for_run(steps, 0.9999)
    recipe = _Recipe(learning_rate, None, b3, 5.0, steps, weight_decay)
    return _made(recipe, overrides)


#
# Gradient clipping
#


_CLIP_NORMS: Mapping[str, Mapping[str | None, float]] = {
    "paper": {size: row.clip_norm for size, row in _PAPER.items()},
    "benchmark": {None: 0.5, **_BENCHMARK_CLIP_NORMS},
    "apertus": {None: 0.1, **dict.fromkeys(_APERTUS, 0.1)},
    "short_run": {None: 0.5},
    "finetune": {None: 1.0},
}


@no_type_check
def clip_norm(preset: str, size: str | None = None) -> float:
    """The global norm to which a recipe clips its gradients.

    **Arguments:**

    - `preset`: the name of the preset's function.
    - `size`: the size of the model: that of [`eqx_ademamix.presets.paper`][] or
        [`eqx_ademamix.presets.apertus`][], and `"124m"`, `"210m"`, `"520m"` or `"720m"`
        for [`eqx_ademamix.presets.benchmark`][].

    **Returns:**

    The norm, for `optax.clip_by_global_norm`.

    **Raises:**

    - `ValueError`: for an unknown name or size.
      [`eqx_ademamix.presets.from_adamw_recipe`][] has none: it keeps yours.

    !!! Example

        ```python
        from eqx_ademamix import presets

        assert presets.clip_norm("paper", "1.3b") == 0.1
        ```
    """
    return _row("size", size, _row("preset", preset, _CLIP_NORMS))


#
# The parts of a recipe
#


T = TypeVar("T")


def _row(name: str, key: object, rows: Mapping[Any, T]) -> T:
    if not isinstance(key, str | None) or key not in rows:
        known = ", ".join(repr(key) for key in rows)
        raise ValueError(
            f"`{name}` is {key!r}, but one of these was expected: {known}. Pass the "
            "one that is closest to your run."
        )
    return rows[key]


def _made(recipe: _Recipe, overrides: OtherOverrides) -> AdEMAMix:
    given: dict[str, Any] = {
        "learning_rate": recipe.learning_rate,
        "b1": 0.9,
        "b2": 0.999,
        "b3": recipe.b3,
        "alpha": recipe.alpha,
        "weight_decay": recipe.weight_decay,
        **overrides,
    }
    if recipe.shape is not None and not callable(given["learning_rate"]):
        peak = hyperparam("learning_rate", given["learning_rate"], finite)
        given["learning_rate"] = LearningRateSchedule(peak, *recipe.shape)
    if not callable(given["b3"]):
        start = 0.9 if callable(given["b1"]) else given["b1"]
        given["b3"] = beta3_scheduler(given["b3"], start, warmup=recipe.warmup)
    if not callable(given["alpha"]):
        given["alpha"] = alpha_scheduler(given["alpha"], warmup=recipe.warmup)
    return AdEMAMix(**given)


#
# Shapes of the learning rate
#


def _warmup_cosine(steps: int, warmup: int, start: float, end: float) -> _Shape:
    warmup = _phase(warmup, steps)
    schedule = optax.warmup_cosine_decay_schedule(start, 1.0, warmup, steps, end)
    return _Shape(schedule, f"{_rise(start, warmup)}, cosine to {end:g} at {steps:,}")


def _warmup_linear(steps: int, warmup: int) -> _Shape:
    warmup = _phase(warmup, steps)
    fall = optax.linear_schedule(1.0, 0.0, steps - warmup)
    schedule = optax.join_schedules([_linear(warmup), fall], [warmup])
    return _Shape(schedule, f"{_rise(0.0, warmup)}, linear to 0 at {steps:,}")


def _warmup_stable_decay(steps: int, warmup: int, cooldown: int, end: float) -> _Shape:
    warmup, cooldown = _phase(warmup, steps), _phase(cooldown, steps)
    begin = steps - cooldown

    def decay(step: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
        left = jnp.clip((cooldown - jnp.asarray(step)) / max(cooldown, 1), 0.0, 1.0)
        return 1.0 - (1.0 - end) * jnp.sqrt(1.0 - left)

    parts = [_linear(warmup), optax.constant_schedule(1.0), decay]
    schedule = optax.join_schedules(parts, [warmup, begin])
    words = f"{_rise(0.0, warmup)}, 1 - sqrt from {begin:,} to {end:g} at {steps:,}"
    return _Shape(schedule, words)


def _linear(warmup: int) -> optax.Schedule:
    return optax.linear_schedule(0.0, 1.0, warmup)


def _rise(start: float, warmup: int) -> str:
    return f"linear from {start:g} to 1 at step {warmup:,}" if warmup else "from 1"


def _phase(length: int, steps: int) -> int:
    """A phase of the learning rate takes at most half of the run."""
    return min(length, steps // 2)
