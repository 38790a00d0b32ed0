"""The examples that answer a single question work as described."""

import csv
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqx_ademamix

from .helpers import max_error, x64
from .test_examples import EXAMPLES, example


@pytest.fixture(autouse=True)
def as_users_run_it() -> Iterator[None]:
    """Uses JAX's default promotion."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def run(script: str, out: Path, *args: str | int) -> str:
    """Returns the output of a script. Checks that the script saved one plot."""
    command = [sys.executable, EXAMPLES / script, "--out", out, *map(str, args)]
    process = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=900
    )
    assert process.returncode == 0, process.stderr
    [plot] = out.glob("*.png")
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert plot.name in process.stdout
    return process.stdout


def test_sweep_is_one_program(tmp_path):
    args = ("--steps", 4, "--rates", 3, "--seeds", 2)
    printed = run("sweep_learning_rates.py", tmp_path, *args)
    assert "12 runs. JAX traced the training 1 time(s).\n" in printed
    assert len(re.findall(r"^\d\.\d\de-0\d  ", printed, re.MULTILINE)) == 6


def test_sweep_gives_what_single_runs_give(monkeypatch):
    sweep = example("sweep_learning_rates", monkeypatch)
    digits = sweep.read_digits()
    batches = sweep.stacked_batches(digits, 10)
    keys = jax.random.split(jax.random.key(0), 2)
    models = [eqx.nn.MLP(64, 10, width_size=8, depth=1, key=key) for key in keys]
    stacked = jax.tree.map(
        lambda *x: jnp.stack(x) if eqx.is_array(x[0]) else x[0], *models
    )
    rates = jnp.asarray([1e-3, 1e-2, 1e-1])
    losses = sweep.sweep(rates, stacked, batches, digits.held_out)

    @eqx.filter_jit
    def alone(rate: jax.Array, model: eqx.nn.MLP) -> jax.Array:
        trained = sweep.train(sweep.make_optimizer(rate, 10), model, batches)
        return sweep.mean_loss(trained, digits.held_out)

    single = [alone(rate, model) for rate in rates for model in models]
    assert max_error(losses.ravel(), jnp.stack(single)) < 1e-5
    assert len(set(losses.ravel().tolist())) == 6


def test_ensemble_disagrees_where_nothing_was_measured(tmp_path):
    printed = run("ensemble.py", tmp_path, "--steps", 600, "--members", 6)
    rows = {row[0]: row[1:] for row in map(str.split, printed.splitlines()) if row}
    (member, mean, spread), (_, gap_mean, gap_spread) = (
        map(float, rows[place]) for place in ("measured", "gap")
    )
    assert mean < member < 0.2 and mean < gap_mean
    assert gap_spread > 2 * spread


def test_member_of_an_ensemble_is_a_run_alone(monkeypatch):
    ensemble = example("ensemble", monkeypatch)
    models = eqx.filter_vmap(ensemble.make_model)(
        jax.random.split(jax.random.key(0), 3)
    )
    optim = eqx_ademamix.AdEMAMix(1e-3, alpha=2.0)
    states = eqx.filter_vmap(optim.init)(models)
    x, y = ensemble.measured()
    x, y = x.reshape(4, 25)[:3], y.reshape(4, 25)[:3]
    member = lambda tree: jax.tree.map(
        lambda leaf: leaf[1].copy() if eqx.is_array(leaf) else leaf, tree
    )
    model, state = member(models), member(states)
    for _ in range(5):
        models, states = ensemble.train_steps((optim, (x, y)), models, states)
        model, state = ensemble.train_step(optim, (x[1], y[1]), model, state)
    weights = [jax.tree.leaves(eqx.filter(m, eqx.is_array)) for m in (model, models)]
    for alone, together in zip(*weights, strict=True):
        assert max_error(together[1], alone) < 1e-5
    assert states.count.tolist() == [5, 5, 5] and state.count == 5


def test_frozen_layers_do_not_change(tmp_path):
    printed = run("finetune_frozen.py", tmp_path, "--steps", 60)
    assert "Weight decay acts on 3 of 8 arrays, 17,024 of 17,354 param" in printed
    assert "frozen layers identical bit for bit: True" in printed
    rows = re.findall(r"([\d,]+) parameters trained, accuracy (\S+)", printed)
    assert [row[0] for row in rows] == ["17,354", "16,834", "16,834", "130"]
    assert float(rows[3][1]) > float(rows[1][1])


def test_training_changes_what_is_not_frozen(monkeypatch):
    tune = example("finetune_frozen", monkeypatch)
    start = tune.Classifier(2, key=jax.random.key(0))
    nothing = jax.tree.map(lambda _: False, start)
    only_head = eqx.tree_at(lambda model: model.head, nothing, replace=True)
    images, labels = tune.read_digits().train
    data = images, labels % 2
    config = tune.Config(steps=3)
    for trainable, frozen in ((only_head, True), (True, False)):
        model, _ = tune.train(config, start, trainable, data, data)
        assert eqx.tree_equal(model.body, start.body) == frozen
        assert not jnp.array_equal(model.head.weight, start.head.weight)


def test_killed_run_resumes_to_the_same_bits(tmp_path):
    printed = run("resume.py", tmp_path, "--steps", 80, "--save-every", 20)
    assert printed.startswith(
        "killed by SIGKILL after step 50\n"
        "resumed from the last checkpoint, at step 40\n"
    )
    assert printed.count("identical bit for bit: True\n") == 2
    peace, killed = (tmp_path / f"{name}.safetensors" for name in ("peace", "killed"))
    assert peace.read_bytes() == killed.read_bytes()


def test_resumed_run_that_differs_is_seen(tmp_path, monkeypatch):
    resume = example("resume", monkeypatch)
    config = resume.Config(steps=4, save_every=2, out=tmp_path)

    def differently(_, path: Path, *args: str) -> int:
        """Saves a checkpoint of the initial model instead of training."""
        optim, run = resume.start(config.steps)
        run = run._replace(losses=np.ones(4, np.float32))
        eqx_ademamix.save(path, run, optim=optim)
        return -9 if args else 0

    printed: list[str] = []
    monkeypatch.setattr(resume, "train_elsewhere", differently)
    monkeypatch.setattr(resume, "print", printed.append, raising=False)
    resume.demonstrate(config)
    assert [text.endswith("bit for bit: False") for text in printed[4:6]] == [True] * 2


def test_log_holds_the_hyperparameters_that_steps_used(tmp_path):
    printed = run("log_hyperparameters.py", tmp_path, "--steps", 20)
    with (tmp_path / "log.csv").open() as file:
        rows = [{k: float(x) for k, x in row.items()} for row in csv.DictReader(file)]
    assert [row["step"] for row in rows] == list(range(20))
    alpha = eqx_ademamix.alpha_scheduler(5.0, warmup=20)
    b3 = eqx_ademamix.beta3_scheduler(0.999, 0.9, warmup=20)
    for step, row in enumerate(rows):
        assert row["alpha"] == pytest.approx(float(alpha(step)), rel=1e-6)
        assert row["b3"] == pytest.approx(float(b3(step)), rel=1e-6)
        assert (row["update_rms"] > 0) == (row["learning_rate"] > 0) == (step > 0)
        assert row["slow_fast_ratio"] > 0 and -1 <= row["slow_fast_cosine"] <= 1
    assert rows[2]["learning_rate"] == pytest.approx(1e-3)
    assert printed.splitlines()[-1].startswith("20 rows saved to ")


def test_pinn_comes_near_the_exact_solution(tmp_path):
    printed = run("pinn.py", tmp_path, "--steps", 200, "--seeds", 1)
    assert "computed in float64\n" in printed
    errors = re.findall(r"^(Ad\w+) +(\S+)", printed, re.MULTILINE)
    assert [name for name, _ in errors] == ["AdamW", "AdEMAMix"]
    assert all(0 < float(error) < 0.15 for _, error in errors)


def test_pinn_has_the_right_equation_and_boundary(monkeypatch):
    pinn = example("pinn", monkeypatch)
    with x64():
        x, t = jnp.linspace(0, 1, 9), jnp.linspace(0, 1, 9) ** 2
        u_t = jax.vmap(jax.grad(pinn.exact, argnums=1))(x, t)
        u_xx = jax.vmap(jax.grad(jax.grad(pinn.exact)))(x, t)
        assert max_error(u_t, 0.1 * u_xx) < 1e-14
        model = pinn.Solution(jax.random.key(0))
        for place in ((x, jnp.zeros(9)), (jnp.zeros(9), t), (jnp.ones(9), t)):
            found, wanted = (jax.vmap(f)(*place) for f in (model, pinn.exact))
            assert jnp.abs(found - wanted).max() < 1e-14
        inside = jnp.asarray(0.5), jnp.asarray(0.5)
        assert jnp.abs(model(*inside) - pinn.exact(*inside)) > 1e-4


def test_simplified_is_compared_at_one_learning_rate(tmp_path):
    printed = run("simplified.py", tmp_path, "--steps", 60, "--seeds", 2)
    number = r"(\d+\.\d+)"
    row = rf"^(\w+) +{number} +{number}  \({number} to {number}\)  {number}$"
    rows = re.findall(row, printed, re.MULTILINE)
    assert [row[:2] for row in rows] == [
        ("AdamW", "8.00"),
        ("AdEMAMix", "12.00"),
        ("SimplifiedAdEMAMix", "8.00"),
    ]
    for _, _, mean, lowest, highest, accuracy in rows:
        assert 0 < float(lowest) < float(mean) < float(highest) < 2.3
        assert 0.2 < float(accuracy) <= 1  # chance is 0.1


def test_simplified_can_be_adamw(monkeypatch):
    """Without a warm-up, and without an extra weight of the current gradient."""
    script = example("simplified", monkeypatch)
    digits = script.read_digits()
    keys = jax.random.split(jax.random.key(0), 2)
    make_model = lambda key: eqx.nn.MLP(64, 10, width_size=8, depth=1, key=key)
    models = eqx.filter_vmap(make_model)(keys)
    batches = script.random_batches(digits.train, 2, 10)
    mask = eqx_ademamix.decay_mask(eqx.filter(models, eqx.is_array))
    config = script.Config(steps=10, learning_rate=1e-2, alpha=0.0, b1=0.9)
    optims = script.make_optimizers(config, mask)
    adamw, _, simplified = (
        script.train_all(optim, models, batches) for optim in optims.values()
    )
    assert max_error(simplified[2], adamw[2]) < 1e-5
    assert adamw[2].shape == (2, 10)


@pytest.mark.parametrize(
    "script, settings, message",
    [
        ("pinn", {"steps": 120}, "steps is 120, but must be a multiple of 50"),
        ("resume", {"steps": 9, "save_every": 5}, "save_every is 5, but must lie in"),
    ],
)
def test_impossible_options(script, settings, message, monkeypatch):
    with pytest.raises(ValueError, match=message):
        example(script, monkeypatch).Config(**settings)


def test_compact_state_takes_less_and_learns_as_much(tmp_path):
    printed = run("compact_state.py", tmp_path, "--steps", 16)
    assert "  .head.weight  " in printed and "ScaledFloat16" in printed
    rows = re.findall(r"^(float32|small) +([\d,]+)  ([\d.]+)$", printed, re.MULTILINE)
    (_, wide, exact), (_, small, loss) = rows
    assert int(small.replace(",", "")) < 0.52 * int(wide.replace(",", ""))
    assert abs(float(loss) - float(exact)) < 0.02
