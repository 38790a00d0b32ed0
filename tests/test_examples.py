"""The examples work as described, even if interrupted, resumed, or misused."""

import importlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import equinox as eqx
import numpy as np
import pytest


EXAMPLES = Path(__file__).parent.parent / "examples"
SWITCH = "switch_from_adamw.py"
TINY = "--steps 1000 --width 8 --depth 1 --heads 2 --context 8 --batch-size 2".split()


def command(*args: str | Path, script: str = "train_language_model.py") -> list[str]:
    return [sys.executable, str(EXAMPLES / script), *TINY, *map(str, args)]


@pytest.fixture(scope="module", autouse=True)
def compile_once(tmp_path_factory: pytest.TempPathFactory):
    """Shares compiled programs among processes, because compiling takes most time."""
    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("cache")
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
        yield


def run(
    *args: str | Path, script: str = "train_language_model.py"
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*args, script=script), capture_output=True, text=True, timeout=120
    )


def step_of(checkpoint: Path) -> int:
    """The number of steps in a checkpoint, or -1 if there is no checkpoint yet."""
    if not checkpoint.exists():
        return -1
    with checkpoint.open("rb") as file:
        return json.loads(file.readline())["step"]


def example(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.py"
    path.write_bytes(Path(__file__).read_bytes())
    return path


@pytest.fixture(scope="module")
def finished(
    text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The folder and the output of an uninterrupted run."""
    out = tmp_path_factory.mktemp("finished")
    return out, run("--data", text, "--out", out)


#
# Runs
#


def test_run_writes_checkpoint_plot_sample_and_validation_loss(finished):
    out, process = finished
    assert process.returncode == 0, process.stderr
    assert sorted(path.name for path in out.iterdir()) == ["ademamix.eqx", "loss.png"]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "\ndef " in process.stdout
    last_line = process.stdout.splitlines()[-1]
    assert re.fullmatch(r"validation loss: \d\.\d{4}", last_line)
    for figure in ("loss=", "lr=", "alpha=5.00", "b3=0.9990", "tokens/s="):
        assert figure in process.stderr


def test_run_learns_and_records_its_losses(finished):
    out, process = finished
    with (out / "ademamix.eqx").open("rb") as file:
        header = json.loads(file.readline())
    assert header["step"] == len(header["train_losses"]) == 1000
    steps, losses = zip(*header["validation_losses"], strict=True)
    assert len(steps) >= 16 and steps[-1] == 1000
    assert losses[-1] < losses[0] < np.log(256) + 1
    assert process.stdout.endswith(f"validation loss: {losses[-1]:.4f}\n")


def test_plot_goes_where_it_is_wanted(finished, text, tmp_path):
    out, process = finished
    plot = tmp_path / "new" / "plot.png"
    again = run("--data", text, "--out", out, "--resume", "--plot", plot)
    # A finished run has no steps left, so it only reports.
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[1:] == process.stdout.splitlines()[1:]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_interrupted_runs_resume_to_the_same_bits(finished, text, tmp_path):
    checkpoint = tmp_path / "ademamix.eqx"
    args = ("--data", text, "--out", tmp_path)
    interrupt(command(*args), signal.SIGINT, checkpoint, step=100)
    interrupt(command(*args, "--resume"), signal.SIGTERM, checkpoint, step=400)
    assert run(*args, "--resume").returncode == 0
    assert checkpoint.read_bytes() == (finished[0] / "ademamix.eqx").read_bytes()


def interrupt(
    command: list[str], number: signal.Signals, checkpoint: Path, step: int
) -> None:
    """Runs a command until its checkpoint reaches a step, then sends a signal."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 60
        while step_of(checkpoint) < step and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "--resume" in stdout and "Traceback" not in stderr
    assert step < step_of(checkpoint) < 1000


def test_compare_trains_both_and_ends_with_ademamix(tmp_path):
    """Uses the default text, which is Python's standard library."""
    process = run("--compare", "--steps", "4", "--out", tmp_path)
    assert process.returncode == 0, process.stderr
    names = ["adamw.eqx", "ademamix.eqx", "loss.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    rows = [line.split() for line in process.stdout.splitlines()]
    [adamw] = [row for row in rows if row[:1] == ["AdamW"]]
    [ademamix] = [row for row in rows if row[:1] == ["AdEMAMix"]]
    assert adamw[1] == ademamix[1] == "0.008"
    assert rows[-1] == ["validation", "loss:", ademamix[2]]


def losses_after_the_switch(
    process: subprocess.CompletedProcess[str],
) -> dict[int, tuple[float, float]]:
    """AdamW's and AdEMAMix's validation losses at each step of the table."""
    assert process.returncode == 0, process.stderr
    number = r"(\d\.\d{4})"
    rows = re.findall(rf"^ *(\d+) +{number} +{number} ", process.stdout, re.MULTILINE)
    return {int(step): (float(alone), float(loss)) for step, alone, loss in rows}


def test_switch_begins_at_adamw_and_ends_with_the_losses_of_both(text, tmp_path):
    args = ("--data", text, "--out", tmp_path, "--steps", "20")
    process = run(*args, script=SWITCH)
    losses = losses_after_the_switch(process)
    assert list(losses) == [*range(10, 21)]
    assert losses[10][0] == losses[10][1]
    alone, loss = losses[20]
    assert alone != loss
    assert process.stdout.endswith(
        f"validation loss after the switch: {loss:.4f} (AdamW alone: {alone:.4f})\n"
    )
    names = ["adamw.eqx", "switch.png", "switched.eqx"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert (tmp_path / "switch.png").read_bytes().startswith(b"\x89PNG")


def test_switch_without_a_slow_average_changes_nothing(text, tmp_path):
    args = ("--data", text, "--out", tmp_path, "--steps", "20", "--alpha", "0")
    losses = losses_after_the_switch(run(*args, script=SWITCH))
    alone, switched = zip(*losses.values(), strict=True)
    assert switched == pytest.approx(alone, abs=2e-4)


def test_quickstart_is_accurate():
    process = subprocess.run(
        [sys.executable, EXAMPLES / "quickstart.py"], capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    match = re.fullmatch(r"test accuracy: (0\.\d{4})\n", process.stdout)
    assert match and float(match[1]) >= 0.95


#
# Errors
#


def check_error(process: subprocess.CompletedProcess[str], message: str):
    assert process.returncode == 2
    assert process.stdout == ""
    assert len(process.stderr.splitlines()) == 1
    assert message in process.stderr


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "No such file or directory"),
        (b"", "There is no text in"),
        (b"short", "too short"),
    ],
    ids=["missing", "empty", "too short"],
)
def test_bad_text(content, message, tmp_path):
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    process = run("--data", path, "--out", tmp_path / "out")
    check_error(process, message)
    assert str(path) in process.stderr
    assert not (tmp_path / "out").exists()


def test_switch_with_bad_text(tmp_path):
    path = tmp_path / "missing"
    process = run("--data", path, "--out", tmp_path / "out", script=SWITCH)
    check_error(process, f"Cannot read {path}: No such file or directory.")
    assert not (tmp_path / "out").exists()


def test_resume_without_a_checkpoint(text, tmp_path):
    process = run("--data", text, "--out", tmp_path, "--resume")
    check_error(process, "There is no checkpoint")


def test_resume_with_other_settings_and_text(finished, text, tmp_path):
    checkpoint = finished[0] / "ademamix.eqx"
    before = checkpoint.read_bytes()
    other = tmp_path / "other.py"
    other.write_bytes(text.read_bytes() + b"\n")
    args = ("--data", other, "--out", finished[0], "--width", "16")
    process = run(*args, "--resume")
    check_error(process, "different settings: width=8 (now 16), text=")
    assert checkpoint.read_bytes() == before


def test_resume_from_a_damaged_checkpoint(finished, text, tmp_path):
    checkpoint = tmp_path / "ademamix.eqx"
    shutil.copy(finished[0] / "ademamix.eqx", checkpoint)
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    process = run("--data", text, "--out", tmp_path, "--resume")
    check_error(process, "is damaged")


def test_impossible_options():
    process = run("--heads", "3")
    assert process.returncode == 2
    assert "not a multiple of heads" in process.stderr


#
# Parts
#


def test_checkpoint_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    checkpoint = example("_checkpoint", monkeypatch)
    path = tmp_path / "run.eqx"
    header, tree = {"settings": {"seed": 0}}, (np.arange(3.0), np.ones(2))
    checkpoint.save(path, header, tree)

    def fail_halfway(file, tree):
        file.write(b"half a checkpoint")
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(eqx, "tree_serialise_leaves", fail_halfway)
        with pytest.raises(OSError, match="the disk is full"):
            checkpoint.save(path, {"settings": {"seed": 1}}, tree)

    assert [file.name for file in tmp_path.iterdir()] == ["run.eqx"]
    found = checkpoint.load(path, tree)
    assert eqx.tree_equal(found, (header, tree))


def test_switch_needs_two_halves(monkeypatch):
    config = example("switch_from_adamw", monkeypatch).SwitchConfig
    assert config(steps=2).steps == 2
    with pytest.raises(ValueError, match="steps is 1, but must be >= 2"):
        config(steps=1)


def test_every_tenth_file_of_a_folder_is_held_out(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    for i in range(20):
        folder = tmp_path / "sub" if i >= 10 else tmp_path
        (folder / f"{i:02}.txt").write_text(chr(ord("a") + i) * 10)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xfd" * 100)
    text = example("_text", monkeypatch).read_text(tmp_path, context=8)
    assert text.validation.tobytes() == b"a" * 10 + b"k" * 10
    assert len(text.train) == 180


def test_the_last_tenth_of_a_file_is_held_out(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(200)))
    text = example("_text", monkeypatch).read_text(path, context=8)
    assert text.train.tolist() == list(range(180))
    assert text.validation.tolist() == list(range(180, 200))


def test_batches_depend_on_seed_and_step_alone(monkeypatch):
    batch = example("_text", monkeypatch).training_batch
    text = np.arange(200, dtype=np.uint8)
    first = batch(text, 4, 8, seed=0, step=1)
    assert first.shape == (4, 9) and (np.diff(first) == 1).all()
    assert (first == batch(text, 4, 8, seed=0, step=1)).all()
    assert (first != batch(text, 4, 8, seed=0, step=2)).any()
    assert (first != batch(text, 4, 8, seed=1, step=1)).any()


def test_validation_batches_cover_the_text(monkeypatch):
    batches = example("_text", monkeypatch).validation_batches
    windows = batches(np.arange(200, dtype=np.uint8), 8)
    assert windows.min() == 0 and windows.max() == 199
