"""The numbers behind the figures in the docs, and the comparison with AdamW."""

import math
import struct
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from .helpers import reference_init, reference_step, x64


ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


@pytest.fixture
def figures(module: Any) -> ModuleType:
    return module("figures")


@pytest.fixture
def toy(module: Any) -> ModuleType:
    return module("_figures_toy")


pytestmark = pytest.mark.usefixtures("standard_promotion")


def golden(figures: ModuleType, figure: str, quantity: str) -> float:
    """A number from `docs/figures.csv`."""
    rows = figures.read_rows(ROOT / "docs/figures.csv")
    (value,) = (float(v) for f, q, v in rows if (f, q) == (figure, quantity))
    return value


def distance(points: Any) -> float:
    return float(np.linalg.norm(np.asarray(points)[-1] - 1.0))


#
# Two dimensions
#


@pytest.mark.parametrize(
    ("momentum", "end"),
    (
        ((-3.0, 0.0), (1.0007989828844512, 4.0035923766373855)),
        ((-0.8, -3.0), (1.0002170203423129, 4.05623679773909)),
    ),
)
def test_figure_18(figures: ModuleType, toy: ModuleType, momentum: Any, end: Any):
    with x64():
        x, y = map(float, toy.figure_18_path(momentum)[-1])
    assert abs(x - end[0]) <= 1e-9 and abs(y - end[1]) <= 1e-9
    for name, value in (("x", x), ("y", y)):
        quantity = f"{name} after 2000 steps, start {momentum}"
        assert abs(golden(figures, "figure_18", quantity) - value) <= 1e-9


def rosenbrock_gradient(p: np.ndarray) -> np.ndarray:
    x, y = p
    return np.array([-2 * (1 - x) - 400 * x * (y - x**2), 200 * (y - x**2)])


@pytest.mark.parametrize(
    ("b1", "end"),
    ((0.9, 0.034071), (0.99, 0.197108), (0.999, 0.461617), (0.9999, 18.842827)),
)
def test_figure_2_adam(figures: ModuleType, toy: ModuleType, b1: float, end: float):
    with x64():
        found = distance(toy.figure_2_adam(b1))
    assert abs(found - end) <= 1e-6
    ref = reference_init([-3.0, 5.0])
    for t in range(1, 5001):
        ref = reference_step(
            ref, rosenbrock_gradient(ref.p), t, lr=0.06, b1=b1, b2=0.999, b3=0, alpha=0
        )
    assert distance([ref.p]) == pytest.approx(found, rel=1e-9)
    quantity = f"Adam, b1 = {b1}: distance after 5000 steps"
    assert golden(figures, "figure_2", quantity) == pytest.approx(found, rel=1e-3)


@pytest.mark.parametrize(
    ("b3", "corrected", "printed", "relative"),
    (
        (0.999, True, 1.301009, 1e-6),
        (0.9999, True, 5.715, 1e-2),
        (0.999, False, 0.3203, 2e-4),
        (0.9999, False, 1.412, 4e-4),
    ),
)
def test_figure_2_ademamix(
    figures: ModuleType,
    toy: ModuleType,
    b3: float,
    corrected: bool,
    printed: float,
    relative: float,
):
    with x64():
        found = distance(toy.figure_2_ademamix(b3, corrected))
    assert found == pytest.approx(printed, rel=relative)
    form = "corrected" if corrected else "as published"
    quantity = f"AdEMAMix, b3 = {b3}, m2 {form}: distance after 5000 steps"
    assert golden(figures, "figure_2", quantity) == pytest.approx(found, rel=1e-2)


@pytest.mark.parametrize(("b3", "step"), ((0.999, 3587), (0.9999, 2948)))
def test_both_curves_pass_the_minimum_and_leave_again(
    toy: ModuleType, b3: float, step: int
):
    with x64():
        points = np.asarray(toy.figure_2_ademamix(b3, True))
    distances = np.linalg.norm(points - 1.0, axis=1)
    found = toy.first_pass(distances)
    assert abs(found - step) <= 10
    assert distances[found - 1] == distances.min() < 0.005
    assert distances[-1] > 1


#
# The other figures
#


def test_weights_are_those_of_two_averages(figures: ModuleType, module: Any):
    weights = module("_figures_rule").past_weights(50, b1=0.9, b3=0.99, alpha=5.0)
    ages = np.arange(50)
    expected = 0.1 * 0.9**ages + 5.0 * 0.01 * 0.99**ages
    np.testing.assert_allclose(weights, expected, rtol=1e-12)


def test_gain_is_against_the_runs_that_never_saw_the_batch(module: Any):
    """Two times, three runs. A batch has loss 3 in the run that saw it, otherwise 5."""
    losses = np.full((2, 3, 3), 5.0)
    losses[:, range(3), range(3)] = 3.0
    gain, error = module("_figures_forgetting").gains(losses)
    np.testing.assert_array_equal(gain, [2.0, 2.0])
    np.testing.assert_array_equal(error, [0.0, 0.0])


def test_batches_that_are_seen_are_held_out_and_differ(module: Any):
    forgetting = module("_figures_forgetting")
    plan = forgetting.make_plan(short=False)
    held_out = np.arange(2**17, dtype=np.uint32)
    batches = plan.batches(forgetting.Text(held_out[:0], held_out))
    assert batches.shape == (plan.runs, 16, 65)
    assert len(np.unique(batches)) == batches.size


def test_page_leads_to_the_numbers_of_all_figures(figures: ModuleType):
    rows = figures.read_rows(ROOT / "docs/figures.csv")
    page = (ROOT / "docs/reproductions.md").read_text()
    assert "](figures.csv)" in page
    assert {figure for figure, _, _ in rows} == set(figures.FIGURES)
    for name in figures.FIGURES:
        assert f"](images/{name}.png)" in page
        assert (ROOT / f"docs/images/{name}.png").read_bytes().startswith(b"\x89PNG")


def test_one_figure_is_drawn_and_the_numbers_of_others_stay(
    figures: ModuleType, tmp_path: Path
):
    before = [
        ("figure_18", "x", "1"),
        ("schedules", "old", "2"),
        ("forgetting", "z", "3"),
    ]
    figures.write_rows(tmp_path / "figures.csv", before)
    rows = figures.draw(["schedules"], tmp_path, short=True)
    assert figures.read_rows(tmp_path / "figures.csv") == [before[0], *rows, before[2]]
    assert ("schedules", "b3 at step 1000 of 256000", "0.979599") in rows
    assert (tmp_path / "images/schedules.png").read_bytes().startswith(b"\x89PNG")


def test_social_card(module: Any, tmp_path: Path):
    """Other sites expect this size."""
    module("social_card").draw(tmp_path / "card.png")
    for path in (tmp_path / "card.png", DOCS / "images/social_card.png"):
        header = path.read_bytes()[:24]
        assert header.startswith(b"\x89PNG")
        assert struct.unpack(">II", header[16:]) == (1200, 630)


#
# The comparison with AdamW
#


@pytest.mark.parametrize(
    ("losses", "target", "steps"),
    (
        ((3.0, 2.0, 1.0), 3.5, 100.0),
        ((3.0, 2.0, 1.0), 3.0, 100.0),
        ((3.0, 2.0, 1.0), 2.5, 100 * math.sqrt(2)),
        ((3.0, 2.0, 1.0), 1.25, 200 * 2**0.75),
        ((3.0, 2.0, 1.0), 0.9, math.inf),
        ((3.0, 3.0, 1.0), 2.0, 200 * math.sqrt(2)),
    ),
)
def test_steps_needed(module: Any, losses: Any, target: float, steps: float):
    found = module("_comparison").steps_needed((100, 200, 400), losses, target)
    assert found == pytest.approx(steps, rel=1e-12)


@pytest.mark.parametrize(
    ("best", "next_rate"), ((1e-3, 5e-4), (2e-3, None), (4e-3, 8e-3))
)
def test_a_best_rate_at_the_edge_asks_for_one_more(
    module: Any, best: float, next_rate: float | None
):
    found = module("train_better").next_rate([1e-3, 2e-3, 4e-3], best)
    assert found == (next_rate and pytest.approx(next_rate, rel=1e-12))


def fake_training(module: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Replaces training by a formula. Returns the list of runs.

    The loss on the selection text is lowest at a rate of 8e-3. The reported loss always
    decreases with the rate.
    """
    train_better, runs = module("train_better"), []

    def train(config: Any, text: Any) -> Any:
        runs.append(config)
        rate = config.peak_learning_rate
        chosen_by = 1 + abs(math.log(rate / 8e-3)) if rate < 0.1 else math.nan
        reported = 2 - rate - 1e-4 * config.steps - 0.01 * config.seed
        reported -= 0.1 * (config.optimizer == "ademamix")
        settings = {**config.settings, "text": text.fingerprint}
        return module("_comparison").Result(settings, [(1, chosen_by, reported)], 0.0)

    monkeypatch.setattr(train_better, "train", train)
    return runs


def experiment(module: Any, out: Path, **options: Any) -> Any:
    train_better = module("train_better")
    options = {"rates": (1e-3, 2e-3), "steps": 1000, "seeds": (0, 1), **options}
    text = module("_examples").Text(np.zeros(9, np.uint8), np.zeros(9, np.uint8))
    return train_better.Experiment(train_better.BetterConfig(out=out, **options), text)


def test_experiment_tunes_repeats_and_trains_longer(
    module: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    runs = fake_training(module, monkeypatch)
    found = experiment(module, tmp_path, longer=(1.5, 2.5, 3.0)).run()
    for name in ("adamw", "ademamix"):
        rates = sorted(found.tuning[name])
        assert rates == pytest.approx([1e-3, 2e-3, 4e-3, 8e-3, 16e-3])
        assert [run.settings["seed"] for run in found.repeats[name]] == [0, 1]
        assert found.repeats[name][0].settings["learning_rate"] == pytest.approx(8e-3)
    # AdamW is as good at 2500 steps, so 3000 steps are not tried.
    assert list(found.adamw) == [1000, 1500, 2500]
    assert found.steps_needed == pytest.approx([math.sqrt(1500 * 2500)] * 2)
    # Five rates for each, one more seed for each, and two longer runs with two seeds.
    assert len(runs) == 10 + 2 + 4
    table = module("_comparison").summary(found)
    assert "| AdamW | 0.008 | 1.0000 | best |" in table
    assert "| AdamW | 2500 | 1.7420 | 1.7320 | 1.7370 |" in table
    assert "| 1 | 1.8820 | 1.7820 | 0.1000 |" in table
    assert "| standard deviation | 0.0071 | 0.0071 | 0.0000 |" in table
    assert "| 1936 | 1936 | 1936 |" in table


def test_only_the_first_seeds_run_for_longer(
    module: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    runs = fake_training(module, monkeypatch)
    options = {"longer": (2.5,), "seeds": (4, 5, 6), "longer_seeds": 2}
    found = experiment(module, tmp_path, **options).run()
    assert [run.seed for run in runs if run.steps == 2500] == [4, 5]
    assert len(found.differences) == 3 and len(found.steps_needed) == 2
    assert {steps: len(each) for steps, each in found.adamw.items()} == {
        1000: 2,
        2500: 2,
    }


def test_confidence_interval(module: Any):
    """The quantile of Student's t with 2 degrees of freedom is 4.302653 at 97.5%."""
    interval = module("_comparison").interval
    half = 4.302653 / math.sqrt(3)
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2 - half, 2 + half), rel=1e-6)
    assert interval([1.0]) == (-math.inf, math.inf)


def test_finished_runs_are_not_repeated(
    module: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    runs = fake_training(module, monkeypatch)
    first = experiment(module, tmp_path).run()
    done = len(runs)
    path = tmp_path / "runs.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == done
    path.write_text("".join(lines[:-2]))  # as if stopped during the second to last run
    again = experiment(module, tmp_path).run()
    assert len(runs) == done + 2
    assert path.read_text() == "".join(lines)
    assert again.steps_needed == first.steps_needed
    experiment(module, tmp_path, alpha=4.0).run()
    assert len(runs) == 2 * done + 2  # no run is reused for other settings


def test_the_page_says_what_the_experiment_found(
    module: Any, monkeypatch: pytest.MonkeyPatch
):
    """The tables match the runs in `docs/train_better.jsonl`."""
    train_better, comparison = module("train_better"), module("_comparison")
    monkeypatch.setattr(train_better, "train", None)  # nothing is left to train
    path, page = DOCS / "train_better.jsonl", (DOCS / "reproductions.md").read_text()
    tables = comparison.summary(train_better.recorded(path))
    rows = [line for line in tables.splitlines() if line.startswith("|")]
    assert len(rows) == 31
    tables = comparison.summary(train_better.recorded(path, train_better.LONG))
    paired = tables.split("Longer runs")[0].split("At the best rate")[1]
    rows += [line for line in paired.splitlines() if line.startswith("|")]
    assert len(rows) == 31 + 7
    for row in rows:
        assert row in page


def test_text_to_choose_by_and_text_to_report_do_not_meet(module: Any):
    train_better, examples = module("train_better"), module("_examples")
    held_out = np.arange(2**17, dtype=np.uint32)
    text = examples.Text(held_out[:0], held_out)
    choosing, reporting = train_better.halves(text, 63)
    assert choosing.shape == reporting.shape
    assert choosing.max() < reporting.min()
    short = examples.Text(held_out[:0], held_out[:1000])
    with pytest.raises(train_better.DataError, match="too short to split in half"):
        train_better.halves(short, 63)


@pytest.mark.parametrize(
    ("options", "error"),
    (
        ({"rates": (2e-3, 1e-3)}, "must be two or more increasing numbers"),
        ({"rates": (2e-3,)}, "must be two or more increasing numbers"),
        ({"rates": (), "most_rates": 1}, "must be two or more increasing numbers"),
        ({"seeds": ()}, "seeds is empty"),
        ({"longer_seeds": 0}, "longer_seeds is 0, but must be >= 1"),
        ({"longer": (0.5,)}, "must be increasing factors above 1"),
        ({"longer": (2.0, 1.5)}, "must be increasing factors above 1"),
    ),
)
def test_impossible_options(module: Any, options: Any, error: str):
    with pytest.raises(ValueError, match=error):
        module("train_better").BetterConfig(**options)
