"""What schedules do: as text, and as a figure."""
# pyright: reportArgumentType=false, reportCallIssue=false

import importlib
import inspect
import textwrap
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from eqx_ademamix import (
    AdEMAMix,
    Compensated,
    SimplifiedAdEMAMix,
    alpha_scheduler,
    beta3_scheduler,
    log_time_beta_scheduler,
    plot_schedules,
    presets,
    schedule_report,
)


OPTIM = AdEMAMix(
    1e-3,
    b3=beta3_scheduler(0.9999, 0.9, warmup=256_000),
    alpha=alpha_scheduler(8.0, warmup=256_000),
)
TEXT = """\
Hyperparameters over 256,000 steps:

  learning_rate: 0.001
  b1: 0.9
  b2: 0.999
  b3: 0.9 to 0.9999, linear in half-life over 256,000 steps
  alpha: 0 to 8, linear over 256,000 steps
  weight_decay: 0

  step     b3        half-life of b3  alpha
  0        0.9       6.579            0
  64,000   0.999601  1738             2
  128,000  0.9998    3469             4
  192,000  0.999867  5200             6
  256,000  0.9999    6931             8"""


@pytest.mark.parametrize("optim", (OPTIM, Compensated(OPTIM)))
def test_text(optim: Any):
    assert schedule_report(optim, num_steps=256_000) == TEXT
    # `cleandoc`, because Python 3.13 removes the indentation of docstrings itself.
    text = inspect.cleandoc(schedule_report.__doc__ or "")
    assert textwrap.indent(TEXT, " " * 4) in text


def test_without_schedules_there_is_no_table():
    text = schedule_report(SimplifiedAdEMAMix(1e-3, alpha=10), num_steps=5)
    assert text.splitlines() == [
        "Hyperparameters over 5 steps:",
        "",
        "  learning_rate: 0.001",
        "  b1: 0.99",
        "  b2: 0.95",
        "  alpha: 10",
        "  weight_decay: 0",
    ]


def test_functions_that_are_not_ours(standard_promotion: None):
    optim = AdEMAMix(optax.linear_schedule(1.0, 0.0, 4), b3=lambda t: 0.5)
    lines = schedule_report(optim, num_steps=4).splitlines()
    assert "  learning_rate: the function `polynomial_schedule.<locals>" in lines[2]
    assert lines[5] == (
        "  b3: the function `test_functions_that_are_not_ours.<locals>.<lambda>`"
    )
    assert lines[9].split() == ["step", "learning_rate", "b3", "half-life", "of", "b3"]
    assert [line.split() for line in lines[10:]] == [
        [str(t), f"{1 - t / 4:g}", "0.5", "1"] for t in range(5)
    ]


def test_short_runs_and_half_lives_without_cancellation():
    optim = AdEMAMix(1e-3, b3=log_time_beta_scheduler(8.0))
    assert schedule_report(optim, num_steps=1).splitlines()[-2:] == [
        "  0     0         0",
        "  1     0.111111  0.3155",
    ]
    # b3 rounds to 1 in float32.
    last = schedule_report(optim, num_steps=2**31 - 1).splitlines()[-1].split()
    assert last[:2] == ["2,147,483,647", "1"]
    np.testing.assert_allclose(float(last[2]), 2**31 * np.log(2) / 8, rtol=1e-3)


def test_arrays_and_traced_values():
    optim = AdEMAMix(jnp.asarray(2e-3), alpha=alpha_scheduler(jnp.asarray(3.0)))
    text = schedule_report(optim, num_steps=10)
    assert "learning_rate: 0.002" in text and "alpha: 3.0 at every step" in text
    texts: list[str] = []

    @jax.jit
    def show(x: jax.Array) -> jax.Array:
        optim = AdEMAMix(x, alpha=alpha_scheduler(x, warmup=10))
        texts.append(schedule_report(optim, num_steps=10))
        return x

    show(jnp.asarray(1.0))
    assert "learning_rate: f32[]" in texts[0] and "10    f32[]" in texts[0]


def test_presets_in_words():
    text = schedule_report(presets.apertus("8b"), num_steps=2_627_139)
    assert (
        "  learning_rate: 0.00011 times (linear from 0 to 1 at step 4,000, "
        "1 - sqrt from 2,429,920 to 0.1 at 2,627,139)"
    ) in text
    assert "  2,627,139  1.1e-05        0.9999  6931             8" in text


@pytest.mark.parametrize(
    "optim",
    (
        presets.paper("110m", 1000),
        AdEMAMix(1e-3, b1=log_time_beta_scheduler(), b2=0.0, b3=lambda t: 0.0),
        SimplifiedAdEMAMix(jnp.asarray(1e-3), b1=log_time_beta_scheduler()),
    ),
)
@pytest.mark.parametrize("steps", (1, 1000))
def test_figure(optim: Any, steps: int, tmp_path: Any):
    plot_schedules(optim, steps, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    plot_schedules(optim, steps, str(tmp_path / "plot.svg"))
    text = (tmp_path / "plot.svg").read_text()
    assert "half-life in steps" in text and "learning rate" in text


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Any):
    def missing(name: str, *_: Any) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"pip install \"eqx_ademamix\[plot\]\""):
        plot_schedules(OPTIM, 10, tmp_path / "plot.png")
    assert not (tmp_path / "plot.png").exists()


@pytest.mark.parametrize(
    "make,text",
    (
        (
            lambda: schedule_report(optax.chain(OPTIM), num_steps=5),
            "`optim` is .*, but an `AdEMAMix` or a `SimplifiedAdEMAMix` was expected",
        ),
        (lambda: schedule_report(OPTIM, num_steps=0), "`num_steps` is the int 0, but"),
        (
            lambda: schedule_report(OPTIM, num_steps=2**31),
            "`num_steps` is the int 2147",
        ),
        (lambda: plot_schedules(OPTIM, 5.0, "x.png"), r"`num_steps` is the float 5\.0"),
        (
            lambda: plot_schedules(None, 5, "x.png"),
            "`optim` is None, but an `AdEMAMix`",
        ),
    ),
)
def test_bad_arguments(make: Any, text: str):
    with pytest.raises((ValueError, TypeError), match=text):
        make()
