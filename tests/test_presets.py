"""Presets: every number of every recipe, and that they train."""
# pyright: reportArgumentType=false, reportCallIssue=false

import inspect
import pathlib
import re
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eqx_ademamix
from eqx_ademamix import AdEMAMix, StateFormat, beta3_scheduler, decay_mask, presets

from .helpers import count_traces, make_mlp, tree_type


PAGE = (pathlib.Path(__file__).parents[1] / "docs/recipes.md").read_text()
INT32_MAX = 2**31 - 1

# A preset, its weight decay, and at some steps: the learning rate, b3, and alpha.
FACTS: Any = (
    (
        lambda: presets.paper("110m", 256_000),
        0.1,
        {
            0: (0.0, 0.9, 0.0),
            1500: (5e-4, None, 8 * 1500 / 256_000),
            3000: (1e-3, None, 8 * 3000 / 256_000),
            128_000: (5.142e-4, 0.9998001996254803, 4.0),
            # Halfway along the cosine.
            129_500: (5.05e-4, None, None),
            256_000: (1e-5, 0.9999, 8.0),
            INT32_MAX: (1e-5, 0.9999, 8.0),
        },
    ),
    (
        lambda: presets.paper("330m", 256_000),
        0.1,
        {3000: (5e-4, None, None), 256_000: (1e-5, 0.9999, 8.0)},
    ),
    (
        lambda: presets.paper("1.3b", 770_000),
        0.1,
        {3000: (3e-4, None, None), 770_000: (1e-5, 0.9999, 5.0)},
    ),
    (
        lambda: presets.benchmark(32_000),
        0.1,
        {
            0: (1e-5, 0.9, 0.0),
            1000: (5.05e-4, None, 0.25),
            2000: (1e-3, None, 0.5),
            17_000: (5.05e-4, None, 4.25),
            32_000: (1e-5, 0.999, 8.0),
        },
    ),
    (lambda: presets.benchmark(32_001), 0.1, {32_001: (1e-5, 0.9999, 8.0)}),
    (lambda: presets.benchmark(np.int64(128_000)), 0.1, {128_000: (1e-5, 0.9999, 8.0)}),
    (
        lambda: presets.apertus("8b"),
        0.1,
        {
            0: (0.0, 0.9, 0.0),
            4000: (1.1e-4, None, 0.32),
            50_000: (1.1e-4, None, 4.0),
            100_000: (1.1e-4, 0.9999, 8.0),
            2_627_139 - 197_219: (1.1e-4, 0.9999, 8.0),
            # A quarter of the cool-down is over, and its square root is a half.
            2_627_139 - 197_219 + 197_219 // 4: (1.1e-4 * 0.55, 0.9999, 8.0),
            2_627_139: (1.1e-5, 0.9999, 8.0),
        },
    ),
    (
        lambda: presets.apertus("70b"),
        0.1,
        {
            1000: (5e-6, None, 0.08),
            2000: (1e-5, None, 0.16),
            1_155_828 - 98_609: (1e-5, 0.9999, 8.0),
            1_155_828: (1e-6, 0.9999, 8.0),
        },
    ),
    (
        lambda: presets.short_run(8000),
        0.1,
        {
            0: (0.0, 0.9, 0.0),
            800: (1e-3, None, 0.5),
            8000: (1e-5, 0.5 ** (15 / 8000), 5.0),
        },
    ),
    (lambda: presets.short_run(20_000), 0.1, {20_000: (1e-5, 0.999, 5.0)}),
    (
        lambda: presets.finetune(1000),
        0.0,
        {
            0: (0.0, 0.9, 0.0),
            30: (5e-6, None, 0.24),
            515: (2.5e-6, None, 4.12),
            1000: (0.0, 0.99, 8.0),
        },
    ),
    (
        lambda: presets.from_adamw_recipe(2e-3, 0.05, 200_000),
        0.05,
        {0: (2e-3, 0.9, 0.0), 200_000: (2e-3, 0.9999, 5.0)},
    ),
    (
        lambda: presets.from_adamw_recipe(2e-3, 0.05, 20_000),
        0.05,
        {20_000: (2e-3, 0.5 ** (15 / 20_000), 5.0)},
    ),
)
PRESETS: tuple[Callable[..., AdEMAMix], ...] = (
    lambda steps, **kw: presets.paper("110m", steps, **kw),
    lambda steps, **kw: presets.paper("330m", steps, **kw),
    lambda steps, **kw: presets.paper("1.3b", steps, **kw),
    presets.benchmark,
    lambda steps, **kw: presets.apertus("8b", steps, **kw),
    lambda steps, **kw: presets.apertus("70b", steps, **kw),
    presets.short_run,
    presets.finetune,
    lambda steps, **kw: presets.from_adamw_recipe(1e-3, 0.1, steps, **kw),
)


def at(value: Any, step: int) -> float:
    return float(value(step) if callable(value) else value)


@pytest.mark.parametrize("make,weight_decay,facts", FACTS)
def test_numbers(make: Any, weight_decay: float, facts: Any):
    optim = make()
    assert (optim.b1, optim.b2, optim.weight_decay) == (0.9, 0.999, weight_decay)
    assert (optim.eps, optim.decoupled_weight_decay) == (1e-8, False)
    for step, numbers in facts.items():
        values = (optim.learning_rate, optim.b3, optim.alpha)
        for value, number in zip(values, numbers, strict=True):
            if number is not None:
                np.testing.assert_allclose(at(value, step), number, 3e-4, 1e-12)
        if numbers[1] is not None:
            np.testing.assert_allclose(1 - at(optim.b3, step), 1 - numbers[1], 1e-3)


@pytest.mark.parametrize("make", PRESETS)
@pytest.mark.parametrize("steps", (1, 2, 3, 10, 1000, 5000, 10**6))
def test_any_length(make: Any, steps: int):
    """Also runs shorter than the phases of the recipe: finite numbers, a peak that is
    reached by the middle of the run, and the final values at its end."""
    optim = make(steps)
    points = np.append(np.linspace(0, steps, 101).astype(int), INT32_MAX)
    rate, b3, alpha = optim.learning_rate, optim.b3, optim.alpha
    rates = np.asarray(rate(points) if callable(rate) else np.full(102, rate))
    b3, alpha = np.asarray(b3(points)), np.asarray(alpha(points))
    assert np.isfinite(rates).all() and (rates >= 0).all()
    assert rates[:51].max() == rates.max() and rates[-2] == rates[-1]
    assert (b3 >= np.float32(0.9)).all() and (b3 < 1).all()
    assert (np.diff(b3) >= 0).all() and (np.diff(alpha) >= 0).all()
    assert alpha[-2] == alpha[-1] and b3[-2] == b3[-1]


@pytest.mark.parametrize("make", PRESETS)
def test_a_few_steps(make: Any):
    """With strict promotion, which the schedules of optax alone do not survive."""
    optim, params = make(10), {"w": jnp.ones((2, 3))}
    state = eqx_ademamix.init(optim, params)

    def run(params: Any, state: Any) -> Any:
        loss, grads = jax.value_and_grad(lambda p: jnp.sum(p["w"] ** 2))(params)
        updates, state = eqx_ademamix.update(optim, grads, state, params)
        return eqx.apply_updates(params, updates), state, loss

    counted, traces = count_traces(run)
    step, losses = jax.jit(counted), []
    for _ in range(10):
        types = tree_type((params, state))
        params, state, loss = step(params, state)
        assert tree_type((params, state)) == types
        losses.append(float(loss))
    assert len(traces) == 1
    assert np.isfinite(losses).all() and losses[-1] < losses[0]


@pytest.mark.parametrize("make", PRESETS)
def test_overrides(make: Any):
    fmt, mask = StateFormat.half(), decay_mask(make_mlp())
    optim = make(100, weight_decay_mask=mask, trainable=mask, state_format=fmt)
    assert optim.state_format is fmt
    assert eqx.tree_equal(optim.weight_decay_mask, mask)
    assert eqx.tree_equal(optim.trainable, mask)
    # Numbers replace where the schedules lead, and schedules replace schedules.
    optim = make(100, b3=0.995, alpha=3.0, b1=0.8, b2=0.95, eps=1e-6)
    assert (optim.b1, optim.b2, optim.eps) == (0.8, 0.95, 1e-6)
    assert at(optim.b3, 0) == np.float32(0.8) and at(optim.b3, 100) == np.float32(0.995)
    assert at(optim.alpha, 0) == 0.0 and at(optim.alpha, 100) == 3.0
    b3 = beta3_scheduler(0.99)
    assert make(100, b3=b3).b3 is b3
    assert make(100, alpha=np.ones_like).alpha is np.ones_like
    with pytest.raises(TypeError, match="unexpected keyword argument 'beta'"):
        make(100, beta=1.0)
    with pytest.raises(ValueError, match=r"`b2` is 1\.0, but"):
        make(100, b2=1.0)


@pytest.mark.parametrize("make", PRESETS[:-1])
def test_learning_rate_can_be_replaced(make: Any):
    optim, other = make(100), make(100, learning_rate=7.0)
    peak = optim.learning_rate.peak
    for t in (0, 1, 50, 99, 100):
        ratio = at(other.learning_rate, t) * peak, 7.0 * at(optim.learning_rate, t)
        np.testing.assert_allclose(*ratio, rtol=1e-5, atol=1e-9)
    schedule = optax.constant_schedule(1e-3)
    assert make(100, learning_rate=schedule).learning_rate is schedule


def test_a_sweep_of_peaks_is_one_program():
    def run(peak: jax.Array) -> jax.Array:
        optim, p = presets.short_run(100, learning_rate=peak), jnp.zeros(3)
        state = eqx_ademamix.init(optim, p)
        _, state = eqx_ademamix.update(optim, p + 1.0, state, p)
        return eqx_ademamix.update(optim, p + 1.0, state, p)[0]

    peaks = jnp.asarray([1e-3, 2e-3])
    small, large = jax.jit(jax.vmap(run))(peaks)
    np.testing.assert_allclose(2 * small, large, rtol=1e-6)
    assert np.all(np.asarray(small) < 0)


def test_adamw_recipe_keeps_what_adamw_has():
    rate = optax.warmup_cosine_decay_schedule(0.0, 1e-3, 10, 100)
    decay = optax.constant_schedule(0.1)
    optim = presets.from_adamw_recipe(rate, decay, 100)
    assert optim.learning_rate is rate and optim.weight_decay is decay
    assert presets.from_adamw_recipe(1e-3, 0.1, 100).learning_rate == 1e-3
    keywords = presets.from_adamw_recipe(
        learning_rate=1e-3, weight_decay=0.2, total_steps=100
    )
    assert keywords.weight_decay == 0.2
    # With alpha = 0, it is AdamW.
    optim = presets.from_adamw_recipe(1e-3, 0.1, 100, alpha=0.0)
    adamw = optax.adamw(1e-3, weight_decay=0.1)
    p, g = jnp.ones(3), jnp.asarray([1.0, -2.0, 3.0])
    ours, _ = eqx_ademamix.update(optim, g, eqx_ademamix.init(optim, p), p)
    with jax.numpy_dtype_promotion("standard"):
        theirs, _ = eqx_ademamix.update(adamw, g, eqx_ademamix.init(adamw, p), p)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


@pytest.mark.parametrize(
    "args,norm",
    (
        (("paper", "110m"), 0.5),
        (("paper", "330m"), 0.1),
        (("paper", "1.3b"), 0.1),
        (("benchmark",), 0.5),
        (("benchmark", "124m"), 0.5),
        (("benchmark", "210m"), 0.5),
        (("benchmark", "520m"), 0.5),
        (("benchmark", "720m"), 0.1),
        (("apertus",), 0.1),
        (("apertus", "8b"), 0.1),
        (("apertus", "70b"), 0.1),
        (("short_run",), 0.5),
        (("finetune",), 1.0),
    ),
)
def test_clip_norm(args: Any, norm: float):
    assert presets.clip_norm(*args) == norm


@pytest.mark.parametrize(
    "make,error,text",
    (
        (
            lambda: presets.paper("7b", 100),
            ValueError,
            r"`size` is '7b', but one of these was expected: '110m', '330m', '1\.3b'",
        ),
        (lambda: presets.paper(110, 100), ValueError, "`size` is 110, but one of"),
        (lambda: presets.apertus("110m"), ValueError, "expected: '8b', '70b'"),
        (lambda: presets.clip_norm("paper"), ValueError, "`size` is None"),
        (lambda: presets.clip_norm("adamw"), ValueError, "`preset` is 'adamw', but"),
        (
            lambda: presets.short_run(0),
            ValueError,
            "`total_steps` is the int 0, but an int",
        ),
        (lambda: presets.finetune(-5), ValueError, "`total_steps` is the int -5, but"),
        (
            lambda: presets.benchmark(1e5),
            ValueError,
            r"`total_steps` is the float 1",
        ),
        (lambda: presets.benchmark(True), ValueError, "`total_steps` is the bool True"),
        (lambda: presets.benchmark("9"), ValueError, "`total_steps` is the str '9'"),
        (
            lambda: presets.short_run(9, learning_rate="1"),
            TypeError,
            "`learning_rate` is the str '1'",
        ),
        (
            lambda: presets.short_run(9, learning_rate=float("nan")),
            ValueError,
            "`learning_rate` is nan",
        ),
        (
            lambda: presets.short_run(9, b3=eqx_ademamix.alpha_scheduler(1.0)),
            TypeError,
            "`b3` is an `AlphaSchedule`, which is a schedule for another",
        ),
    ),
)
def test_bad_arguments(make: Any, error: type[Exception], text: str):
    with pytest.raises(error, match=text):
        make()


#
# The page
#


def table() -> list[list[str]]:
    """The rows of the page's table of presets."""
    lines = PAGE.split("| call |")[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


@pytest.mark.parametrize("row", table(), ids=lambda row: row[0].strip("`"))
def test_the_table_on_the_page(row: list[str]):
    call, rate, b3, alpha, warmup, decay, clip = row
    optim = eval(f"presets.{call.strip('`')}")
    first = re.match(r"`(\w+)\((?:\"([^\"]+)\", )?(\d*)", call)
    assert first is not None
    name, size, steps = first.groups()
    assert float(rate) == optim.learning_rate.peak
    assert float(b3) == round(optim.b3.beta_end, 4)
    assert float(alpha) == optim.alpha.alpha
    assert float(warmup.replace(",", "")) == optim.alpha.warmup == optim.b3.warmup
    assert float(decay) == optim.weight_decay
    assert float(clip) == presets.clip_norm(name, size)
    assert int(steps) > 0


def test_every_preset_is_in_the_table():
    names = {row[0].strip("`").split("(")[0] for row in table()}
    assert names | {"clip_norm", "from_adamw_recipe"} == {
        name
        for name, obj in vars(presets).items()
        if inspect.isfunction(obj)
        and obj.__module__ == presets.__name__
        and not name.startswith("_")
    }


def test_the_types_of_overrides_name_every_argument():
    names = set(inspect.signature(eqx_ademamix.AdEMAMix).parameters)
    assert set(presets.Overrides.__annotations__) == names
