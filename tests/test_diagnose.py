"""`diagnose`: runs that really have each problem, and runs that have none."""

import csv
import functools
import pathlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqx_ademamix
from eqx_ademamix import AdEMAMix, SimplifiedAdEMAMix, StateFormat, diagnose
from eqx_ademamix._diagnose import _CHECKS


ROOT = pathlib.Path(__file__).parents[1]

NONFINITE = "Gradients are not finite"
SKIPPED = "Steps were skipped"
DIVERGED = "The loss is no longer finite"
WARM_UP = "The warm-up of b3 is too short"
OUTWEIGHS = "The slow average outweighs the fast one"
OPPOSED = "The slow average points against the gradients"
GROWING = "The updates grow"
PRECISION = "The precision of the parameters loses updates"
FROZEN = "The format freezes a moment"


def findings(history: Any, **options: Any) -> list[str]:
    """How the findings begin."""
    return [text.split(": ")[0] for text in diagnose(history, **options)]


#
# Training: a network with one hidden layer learns another one, with noise
#


def weights(seed: int, dtype: Any = jnp.float32) -> dict[str, jax.Array]:
    first, second = jax.random.split(jax.random.key(seed))
    return {
        "w1": (0.25 * jax.random.normal(first, (16, 32), jnp.float32)).astype(dtype),
        "w2": (0.18 * jax.random.normal(second, (32, 4), jnp.float32)).astype(dtype),
    }


def predicted(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["w1"]) @ params["w2"]


def batch(seed: int, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    key = jax.random.fold_in(jax.random.key(100 + seed), step)
    inputs, noise = jax.random.split(key)
    x = jax.random.normal(inputs, (16, 16), jnp.float32)
    y = 3 * predicted(weights(99), x)
    return x, y + 0.5 * jax.random.normal(noise, (16, 4), jnp.float32)


def loss_of(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean((predicted(params, x) - y) ** 2)


STEPS, EVERY = 3000, 30


class Setting(NamedTuple):
    """What distinguishes the runs. All of it is traced, so that one program trains all
    of those that have the same optimizer."""

    seed: int = 0
    learning_rate: float = 3e-3
    b2: float = 0.999
    half_life: float = 693.0  # of b3, at the end of its warm-up
    alpha: float = 5.0
    warmup: int = STEPS
    turn_at: int = STEPS  # from when on the targets have the opposite sign
    stop_at: int = STEPS  # from when on some inputs are zero, and the targets
    alive: int = 0  # how many inputs are not; if there are any, the targets stay
    infinite_at: int = STEPS  # when the inputs are infinite


def data(s: Setting, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, y = batch(s.seed, step)
    is_on = step < s.stop_at
    x = jnp.where(is_on | (jnp.arange(16) < s.alive), x, 0)
    y = jnp.where(is_on | (s.alive > 0), jnp.where(step < s.turn_at, y, -y), 0)
    return jnp.where(step == s.infinite_at, jnp.inf, x), y


def b3_of(s: Setting) -> Callable[[jax.Array], jax.Array]:
    """Linear in the half-life, from that of 0.9."""
    half_life = lambda done: 6.6 + (s.half_life - 6.6) * done
    return lambda count: 0.5 ** (1 / half_life(jnp.minimum(count / s.warmup, 1.0)))


def ademamix(s: Setting, **options: Any) -> AdEMAMix:
    return AdEMAMix(
        s.learning_rate,
        b2=s.b2,
        b3=b3_of(s),
        alpha=lambda count: s.alpha * jnp.minimum(count / s.warmup, 1.0),
        **options,
    )


def run(make: Callable[[Setting], Any], dtype: Any, s: Setting) -> Any:
    """Trains, and returns what is logged, of every step."""
    optim = make(s)

    def step(carry: Any, i: jax.Array) -> Any:
        params, state = carry
        x, y = (part.astype(dtype) for part in data(s, i))
        loss, grads = jax.value_and_grad(loss_of)(params, x, y)
        updates, state = eqx_ademamix.update(optim, grads, state, params)
        row = eqx_ademamix.telemetry(
            optim, state, updates=updates, params=params, grads=grads
        )
        params = jax.tree.map(jnp.add, params, updates)
        return (params, state), {"step": i + 1, "loss": loss, **row}

    params = weights(s.seed, dtype)
    start = params, eqx_ademamix.init(optim, params)
    return jax.lax.scan(step, start, jnp.arange(STEPS))[1]


def train(
    settings: list[Setting],
    make: Callable[[Setting], Any] = ademamix,
    dtype: Any = jnp.float32,
) -> list[list[dict[str, np.ndarray]]]:
    """The logs of several runs, with one row for each hundredth of a run."""
    kinds = [float if isinstance(x, float) else int for x in Setting()]
    columns = zip(*settings, strict=True)
    arrays: Any = [jnp.array(c, t) for c, t in zip(columns, kinds, strict=True)]
    logged = jax.jit(jax.vmap(functools.partial(run, make, dtype)))(Setting(*arrays))
    kept = {key: np.asarray(x)[:, EVERY - 1 :: EVERY] for key, x in logged.items()}
    return [
        [{key: x[n, i] for key, x in kept.items()} for i in range(STEPS // EVERY)]
        for n in range(len(settings))
    ]


def final_loss(history: Any) -> float:
    return float(np.mean([row["loss"] for row in history[-10:]]))


HEALTHY = {
    "seed 0": Setting(),
    "seed 1": Setting(seed=1),
    "seed 2": Setting(seed=2),
    "a high learning rate": Setting(learning_rate=1e-2),
    "AdamW": Setting(alpha=0.0),
    "a short memory": Setting(half_life=69.0, alpha=8.0),
    "fine-tuning": Setting(learning_rate=1e-5, half_life=69.0, alpha=2.0),
}
PROBLEMS = {
    "a short warm-up": Setting(half_life=6931.0, alpha=8.0, warmup=100),
    "a turn": Setting(learning_rate=1e-3, warmup=1000, turn_at=300),
    "no gradients": Setting(b2=0.99, warmup=1000, stop_at=1500),
    "dead inputs": Setting(b2=0.99, warmup=1000, stop_at=1500, alive=14),
    "an infinite input": Setting(infinite_at=1499),
}


@functools.cache
def logs() -> dict[str, list[dict[str, np.ndarray]]]:
    settings = HEALTHY | PROBLEMS
    return dict(zip(settings, train([*settings.values()]), strict=True))


#
# Each problem
#


def test_a_short_warm_up():
    """With a short warm-up, b3 keeps the gradients of the first steps, and the run ends
    far above a healthy one."""
    history = logs()["a short warm-up"]
    assert final_loss(history) > 3 * final_loss(logs()["seed 0"])
    (text,) = diagnose(history)
    assert text == (
        "The warm-up of b3 is too short: b3 has its final half-life of 6,930 steps at "
        "step 120, where alpha is 8. Let b3 and alpha warm up over the whole run, or "
        "at least over one half-life."
    )


def test_gradients_that_vanish():
    """The gradients of a dead unit are zero."""
    history = logs()["no gradients"]
    found = {text.split(": ")[0]: text for text in diagnose(history)}
    # The updates grow without a limit, although there is nothing to learn.
    assert float(history[-1]["update_rms"]) > 100 * float(history[49]["update_rms"])
    assert "slow_fast_ratio is inf" in found[OUTWEIGHS]
    assert "`max_slow_ratio`" in found[OUTWEIGHS]
    assert "times as much as in its first half" in found[GROWING]


def test_inputs_that_die():
    """Only a few weights get no gradients any more, so the averages of all of them look
    normal, but the updates grow."""
    found = findings(logs()["dead inputs"])
    assert GROWING in found and OUTWEIGHS not in found


def test_data_that_turn_around():
    history = logs()["a turn"]
    assert findings(history) == [OPPOSED]
    assert findings(history[:10]) == []


def test_gradients_that_are_not_finite():
    texts = diagnose(logs()["an infinite input"])
    assert len(texts) == 2
    assert texts[0].startswith(
        "Gradients are not finite: in 51 of 100 logged steps, the first of which is "
        "1,500, up to 1 of the entries are NaN or infinite."
    )
    assert texts[1].startswith("The loss is no longer finite: its last finite value is")
    assert "at step 1,470" in texts[1]


def test_a_loss_that_was_never_finite():
    rows = [{"step": step, "loss": np.nan} for step in range(10, 50)]
    (text,) = diagnose(rows)
    assert text.startswith(
        "The loss is no longer finite: it is not finite in any row, beginning at step "
        "10."
    )


def test_parameters_in_bfloat16():
    (history,) = train([Setting(learning_rate=1e-5)], dtype=jnp.bfloat16)
    assert final_loss(history) > 5 * final_loss(logs()["seed 0"])
    assert findings(history, param_dtype="bfloat16") == [PRECISION]
    assert findings(history) == []  # the same steps are right in float32
    (text,) = diagnose(history, param_dtype=jnp.bfloat16)
    assert "bfloat16 rounds away an update of less than 0.002 of its" in text


def test_a_moment_that_a_format_freezes():
    """The stall report of a state, in the last row of its log."""
    fmt = StateFormat("float32", "bfloat16", "bfloat16")
    optim = AdEMAMix(1e-3, b3=0.9999, alpha=0.0, state_format=fmt)
    params = weights(0)
    grads = jax.grad(loss_of)(params, *batch(0, jnp.asarray(0)))
    state = eqx_ademamix.init(optim, params)
    step = jax.jit(lambda state: eqx_ademamix.update(optim, grads, state)[1])
    for _ in range(500):
        state = step(state)
    row: dict[str, Any] = {"step": 500, **eqx_ademamix.telemetry(optim, state)}
    others = jax.grad(loss_of)(params, *batch(0, jnp.asarray(1)))
    smaller = jax.tree.map(lambda g: 0.5 * g, others)  # as they are later in a run
    report = eqx_ademamix.stall_report(optim, state, smaller)
    for path, fractions in report.items():
        row |= {f"stalled/{name}/{path}": x for name, x in fractions.items()}
    texts = diagnose([row])
    assert [text.split(": ")[0] for text in texts] == [FROZEN, FROZEN]
    for name, text in zip(("m2", "nu"), texts, strict=True):
        assert f"of the entries of {name} at ['w" in text and "in 2 of 2 arrays" in text


def test_a_slow_average_that_does_not_change():
    """Without gradients, a float32 average would decay."""
    fmt = StateFormat("float32", "bfloat16", "float32")
    make = functools.partial(ademamix, state_format=fmt)
    (history,) = train([Setting(half_life=6931.0, warmup=1000, stop_at=1500)], make)
    text = next(text for text in diagnose(history) if text.startswith(FROZEN))
    pattern = r"at every step from 1,5\d\d to 3,000, in which 14% of m2 should have"
    assert re.search(pattern, text)
    assert FROZEN not in findings(logs()["no gradients"])


#
# Healthy runs
#


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run(name: str):
    assert diagnose(logs()[name]) == []


def simplified(s: Setting, normalize: bool) -> SimplifiedAdEMAMix:
    rate = s.learning_rate if normalize else s.learning_rate / 100
    return SimplifiedAdEMAMix(rate, b1=b3_of(s), alpha=10.0, normalize=normalize)


@pytest.mark.parametrize("normalize", [False, True])
def test_a_healthy_run_of_the_simplified_optimizer(normalize: bool):
    make = functools.partial(simplified, normalize=normalize)
    (history,) = train([Setting(half_life=69.0)], make)
    assert diagnose(history) == []


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_recorded_runs_of_the_main_job(seed: int):
    """Small ones: `tests/data/record_logs.py` made the files."""
    path = ROOT / f"tests/data/train_language_model_{seed}.csv"
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 100 and rows[-1]["step"] == "2000"
    assert float(rows[-1]["loss"]) < 2.3 < 4.5 < float(rows[0]["loss"])
    assert diagnose(path) == diagnose(rows) == []


@pytest.mark.parametrize("seed", range(3))
def test_recorded_runs_of_the_main_job_with_its_default_settings(seed: int):
    path = ROOT / f"tests/data/train_language_model_default_{seed}.csv"
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 320 and rows[-1]["step"] == "8000"
    assert float(rows[-1]["b3"]) == 0.999 and float(rows[-1]["alpha"]) == 5.0
    assert diagnose(path) == diagnose(rows) == []


#
# Logs of every kind
#


def constant_b3(steps: Any = range(1, 101), **others: Any) -> list[dict[str, Any]]:
    """A log of a run without a warm-up, which has one finding."""
    return [{"step": i, "alpha": 8.0, "b3": 0.9999, **others} for i in steps]


def test_an_empty_log(tmp_path: pathlib.Path):
    (tmp_path / "log.csv").write_text("")
    (tmp_path / "head.csv").write_text("step,loss\n")
    for history in ([], (), tmp_path / "log.csv", str(tmp_path / "head.csv")):
        assert diagnose(history) == []


def test_a_log_with_a_loss_only():
    assert diagnose([{"loss": 1.0}] * 100) == []
    assert diagnose([{"step": 1, "loss": float("nan")}]) == []


def test_order_and_repetitions_do_not_matter():
    rows = logs()["seed 0"]
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(100)]
    assert diagnose(shuffled) == diagnose(rows) == []
    expected = diagnose(logs()["no gradients"])
    assert diagnose(logs()["no gradients"][::-1]) == expected
    assert (
        diagnose([*logs()["no gradients"][:80], *logs()["no gradients"][40:]])
        == expected
    )


def test_after_a_resume_the_later_row_counts():
    """A run that got bad gradients was resumed from before them."""
    bad = [{"step": i, "nonfinite_fraction": float(i > 5)} for i in range(1, 10)]
    good = [{"step": i, "nonfinite_fraction": 0.0} for i in range(4, 20)]
    assert findings(bad) == [NONFINITE]
    assert diagnose([*bad, *good]) == []


def test_values_of_every_kind(tmp_path: pathlib.Path):
    kinds = (float, np.float32, np.float64, np.asarray, jnp.asarray, str, jnp.bfloat16)
    for kind in kinds:
        (text,) = diagnose(constant_b3(alpha=kind(8.0)))
        assert text.startswith(WARM_UP) and "where alpha is 8." in text
    odd = {"note": "text", "nothing": None, "flag": True, "complex": 1j, 3: 4.0}
    assert findings(constant_b3(**{str(k): v for k, v in odd.items()})) == [WARM_UP]
    path = tmp_path / "log.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["step", "alpha", "b3", "note"])
        for _ in range(2):  # the first line again, as after an appended run
            writer.writeheader()
            writer.writerows(constant_b3(note="a, b"))
    assert findings(path) == findings(str(path)) == [WARM_UP]


def test_rows_without_a_step_are_ignored():
    rows = [*constant_b3(), {"nonfinite_fraction": 1.0}, {"step": float("nan")}]
    assert findings(rows) == [WARM_UP]


def test_gaps_and_nans_are_ignored():
    rows = logs()["no gradients"]
    gaps = [
        row if i % 3 else {**row, "update_rms": np.nan} for i, row in enumerate(rows)
    ]
    assert findings(gaps) == findings(rows)
    assert findings(
        [{"step": row["step"]} if i % 3 else row for i, row in enumerate(rows)]
    )


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        # A resumed run: the slow average was full before.
        (constant_b3(m1_rms=1.0, m2_rms=0.5), []),
        (constant_b3(m1_rms=1.0, m2_rms=1e-4), [WARM_UP]),
        (constant_b3(range(7000, 7100)), []),
        (constant_b3(alpha=0.0), []),
        (constant_b3(alpha=0.5), []),
        (constant_b3(b3=0.99), []),  # a half-life of 69 steps
        (constant_b3(b3=0.0), []),
        (constant_b3(b3=1.0), []),
        ([{"step": 1, "b3_half_life": 693.0}], [WARM_UP]),
        ([{"step": 1, "skipped": 0}, {"step": 9, "skipped": 3}], [SKIPPED]),
        ([{"step": 1, "skipped": 0}, {"step": 9, "skipped": 0}], []),
        ([{"step": 1, "loss": 1.0}, {"step": 2, "loss": np.inf}], [DIVERGED]),
        ([{"step": i, "loss": [1.0, np.nan][i % 2]} for i in range(9)], []),
        # Missing in most rows, as pandas fills in.
        (
            [
                {"step": i, "loss": 2.0, "nonfinite_fraction": [np.nan, 0.0][i % 2]}
                for i in range(1, 41)
            ],
            [],
        ),
        (
            [{"step": i, "nonfinite_fraction": x} for i, x in enumerate((np.nan, 0.5))],
            [NONFINITE],
        ),
        ([{"step": 1, "stalled/m2/w": 0.9}, {"step": 2, "stalled/m2/w": 0.1}], []),
        ([{"step": 1, "stalled/m/w": 0.9, "stalled/nu/w": 0.5}], [FROZEN]),
        # Converged: a large ratio, but small updates.
        (
            [
                {
                    "step": i,
                    "alpha": 5.0,
                    "learning_rate": 1e-3,
                    "slow_fast_ratio": 2.0**i,
                    "update_rms": 1e-3 / i,
                }
                for i in range(1, 50)
            ],
            [],
        ),
        # An update that only follows its schedules.
        (
            [
                {"step": i, "learning_rate": 1e-5 * i, "update_rms": 4e-6 * i}
                for i in range(1, 100)
            ],
            [],
        ),
        (
            [
                {
                    "step": i,
                    "alpha": i / 10,
                    "learning_rate": 1e-3,
                    "update_rms": 1e-4 * (1 + i / 10),
                }
                for i in range(1, 100)
            ],
            [],
        ),
    ],
)
def test_made_up_logs(rows: list[dict[str, Any]], found: list[str]):
    assert findings(rows) == found


#
# Sentences
#


def test_every_finding_is_tested():
    constants = {
        NONFINITE,
        SKIPPED,
        DIVERGED,
        WARM_UP,
        OUTWEIGHS,
        OPPOSED,
        GROWING,
        PRECISION,
        FROZEN,
    }
    assert {check.says for check in _CHECKS} == constants


def test_the_table_in_the_docs_has_the_same_words():
    page = (ROOT / "docs/watching.md").read_text()
    section = page.split("## Findings\n")[1].split("\n## ")[0]
    rows = [
        line.strip("| ").split(" | ") for line in section.splitlines() if "|" in line
    ]
    assert [(says, cure) for says, _, cure in rows[2:]] == [
        (check.says, check.cure) for check in _CHECKS
    ]
