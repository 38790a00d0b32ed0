"""The examples work as described, even if interrupted, resumed, or misused."""

import csv
import dataclasses
import importlib
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from safetensors.numpy import load_file


EXAMPLES = Path(__file__).parent.parent / "examples"
SWITCH = "switch_from_adamw.py"
TINY = "--steps 1000 --width 8 --depth 1 --heads 2 --context 8 --batch-size 2".split()


def command(*args: str | Path, script: str = "train_language_model.py") -> list[str]:
    return [sys.executable, str(EXAMPLES / script), *TINY, *map(str, args)]


def run(
    *args: str | Path, script: str = "train_language_model.py"
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*args, script=script), capture_output=True, text=True, timeout=900
    )


def checkpoints(out: Path, name: str = "ademamix") -> list[Path]:
    """The oldest first."""
    return sorted(out.glob(f"{name}-*.safetensors"))


def step_of(out: Path) -> int:
    """The number of steps in the newest checkpoint, or -1 if there is none yet."""
    return max([int(path.stem.split("-")[1]) for path in checkpoints(out)], default=-1)


def names(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir())


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
    assert names(out) == [
        "ademamix-00000992-of-00001000.safetensors",
        "ademamix-00001000-of-00001000.safetensors",
        "ademamix.csv",
        "loss.png",
        "run.png",
    ]
    for plot in ("loss.png", "run.png"):
        assert (out / plot).read_bytes().startswith(b"\x89PNG")
    assert "\ndef " in process.stdout
    *_, before, _, last_line = process.stdout.splitlines()
    assert before == "To compare this loss with that of AdamW, use --compare."
    assert re.fullmatch(r"validation loss: \d\.\d{4}", last_line)
    for figure in ("loss=", "lr=", "alpha=5.00", "b3=0.9990"):
        assert figure in process.stderr
    bars = re.findall(r"AdEMAMix \d+/1000 .*", process.stderr)
    assert len(bars) > 1 and max(map(len, bars)) <= 80


def test_run_learns_and_records_its_losses(finished):
    out, process = finished
    tensors = load_file(checkpoints(out)[-1])
    losses = tensors["['train_losses']"]
    assert losses.shape == (1000,) and (losses > 0).all()
    [steps] = np.nonzero(tensors["['validation_losses']"] != -1)
    assert steps.tolist() == [*range(61, 1000, 62), 999]
    losses = tensors["['validation_losses']"][steps]
    assert losses[-1] < losses[0] < np.log(256) + 1
    assert process.stdout.endswith(f"validation loss: {losses[-1]:.4f}\n")


def log_of(out: Path, name: str = "ademamix") -> list[dict[str, float]]:
    with (out / f"{name}.csv").open(newline="") as file:
        return [{k: float(x) for k, x in row.items()} for row in csv.DictReader(file)]


def test_run_logs_its_telemetry(finished):
    rows = log_of(finished[0])
    assert [row["step"] for row in rows] == list(range(10, 1001, 10))
    assert list(rows[0])[:2] == ["step", "loss"] and len(rows[0]) == 16
    losses = load_file(checkpoints(finished[0])[-1])["['train_losses']"]
    np.testing.assert_array_equal([np.float32(x["loss"]) for x in rows], losses[9::10])
    for row in rows:  # the values of the next step
        assert row["alpha"] == pytest.approx(5.0 * row["step"] / 1000, rel=1e-6)
        assert 0 < row["slow_fast_ratio"] < 5 and -1 <= row["slow_fast_cosine"] <= 1
        ratio = row["update_rms"] / row["param_rms"]
        assert row["update_param_ratio"] == pytest.approx(ratio, rel=1e-5)
        assert row["nonfinite_fraction"] == 0.0
    assert rows[-1]["b3"] == pytest.approx(0.999, rel=1e-6)


def event_scalars(folder: Path) -> dict[tuple[str, int], float]:
    """The scalars in a folder of event files, by name and step. As TensorBoard does,
    this drops what was written before about steps that a later process took again."""
    event_pb2 = importlib.import_module("tensorboardX.proto.event_pb2")
    found: dict[tuple[str, int], float] = {}
    for path in sorted(folder.glob("events.*")):
        data = path.read_bytes()
        while data:  # the length, its checksum, an event, its checksum
            (size,) = struct.unpack("<Q", data[:8])
            event = event_pb2.Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            if event.session_log.status == event_pb2.SessionLog.START:
                found = {k: x for k, x in found.items() if k[1] < event.step}
            for value in event.summary.value:
                found[value.tag, event.step] = value.simple_value
    return found


def test_log_of_an_interrupted_run_has_each_step_once(finished, text, tmp_path):
    args = ("--data", text, "--out", tmp_path, "--tensorboard")
    interrupt(command(*args), signal.SIGINT, tmp_path, step=100)
    path = tmp_path / "ademamix.csv"
    # What a killed process leaves: rows of steps after the checkpoint, and half a row.
    line = path.read_text().splitlines()[-1].split(",", 1)[1]
    with path.open("a") as file:
        file.write(f"900,{line}\n910,{line}\n920,2.5")
    assert run(*args, "--resume").returncode == 0
    rows, expected = log_of(tmp_path), log_of(finished[0])
    assert rows == expected
    events = event_scalars(tmp_path / "tensorboard" / "ademamix")
    assert events == {
        (name, row["step"]): np.float32(x)
        for row in rows
        for name, x in row.items()
        if name != "step"
    }


def test_how_often_to_log(text, tmp_path):
    assert run("--data", text, "--out", tmp_path, "--log-every", "400").returncode == 0
    assert [row["step"] for row in log_of(tmp_path)] == [400, 800]
    wrong = run("--data", text, "--out", tmp_path, "--log-every", "0")
    assert "log_every is 0, but must be >= 1" in wrong.stderr


def test_plot_goes_where_it_is_wanted(finished, text, tmp_path):
    out, process = finished
    plot = tmp_path / "new" / "plot.png"
    again = run("--data", text, "--out", out, "--resume", "--plot", plot)
    # A finished run has no steps left, so it only reports.
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[1:] == process.stdout.splitlines()[1:]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_interrupted_runs_resume_to_the_same_bits(finished, text, tmp_path):
    args = ("--data", text, "--out", tmp_path)
    interrupt(command(*args), signal.SIGINT, tmp_path, step=100)
    interrupt(command(*args, "--resume"), signal.SIGTERM, tmp_path, step=400)
    assert run(*args, "--resume").returncode == 0
    assert names(tmp_path) == names(finished[0])
    for path, expected in zip(*map(checkpoints, (tmp_path, finished[0])), strict=True):
        assert path.read_bytes() == expected.read_bytes()


def test_a_run_can_become_longer_and_shorter(text, tmp_path):
    """It gets the same bits if it is interrupted after that, and the schedules do not
    jump."""
    out, args = tmp_path / "out", ("--data", text, "--resume")
    interrupt(command("--data", text, "--out", out), signal.SIGINT, out, step=200)
    shutil.copytree(out, tmp_path / "again")
    first = step_of(out)

    process = run(*args, "--out", out, "--steps", "1200")
    assert process.returncode == 0, process.stderr
    said = "This run now ends after 1200 steps instead of 1000."
    assert process.stdout.splitlines()[0] == said
    interrupt(
        command(*args, "--out", tmp_path / "again", "--steps", "1200"),
        signal.SIGINT,
        tmp_path / "again",
        step=700,
        steps=1200,
    )
    process = run(*args, "--out", tmp_path / "again", "--steps", "1200")
    assert process.returncode == 0 and said not in process.stdout
    newest, again = checkpoints(out)[-1], checkpoints(tmp_path / "again")[-1]
    assert newest.name == again.name == "ademamix-00001200-of-00001200.safetensors"
    assert newest.read_bytes() == again.read_bytes()

    tensors = load_file(newest)
    begin, _, begin_alpha, alpha = tensors["['warmup_starts']"]
    assert begin == begin_alpha == first
    assert alpha == pytest.approx(5.0 * first / 1000, rel=1e-12)
    assert (tensors["['train_losses']"] > 0).sum() == 1200

    # A finished run can go on, too, but not end before it has.
    process = run(*args, "--out", out, "--steps", "1250")
    assert process.returncode == 0 and step_of(out) == 1250
    process = run(*args, "--out", out, "--steps", "1100")
    check_error(process, "--steps is 1100, but ")
    assert "has already taken 1250 steps" in process.stderr


def test_a_run_of_adamw_can_become_longer(text, tmp_path):
    args = ("--data", text, "--out", tmp_path, "--optimizer", "adamw")
    assert run(*args, "--steps", "20").returncode == 0
    assert run(*args, "--steps", "30", "--resume").returncode == 0
    newest = checkpoints(tmp_path, "adamw")[-1]
    assert newest.name == "adamw-00000030-of-00000030.safetensors"


def interrupt(
    command: list[str], number: signal.Signals, out: Path, step: int, steps: int = 1000
) -> None:
    """Runs a command until its checkpoint reaches a step, then sends a signal."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 900
        while step_of(out) < step and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=900)
    assert process.returncode == 130, stderr
    assert "--resume" in stdout and "Traceback" not in stderr
    assert step < step_of(out) < steps
    assert len(checkpoints(out)) == 2


def test_a_new_run_replaces_an_older_one(finished, text, tmp_path):
    """Also the checkpoints of its later steps and what a killed process has left, but
    no other files."""
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / ".ademamix-00000470.safetensors.0123abcd.tmp").write_bytes(b"half")
    others = ["adamw-00000000.safetensors", "ademamix.txt", "loss.png", "run.png"]
    for name in others:
        (tmp_path / name).write_bytes(b"")
    process = run("--data", text, "--out", tmp_path, "--steps", "2")
    assert process.returncode == 0, process.stderr
    new = [f"ademamix-0000000{step}-of-00000002.safetensors" for step in (1, 2)]
    assert names(tmp_path) == sorted([*others, *new, "ademamix.csv"])
    assert (tmp_path / "ademamix.csv").read_text() == ""  # two steps, no row


def test_compare_trains_both_and_ends_with_ademamix(tmp_path):
    """Uses the default text, which is Python's standard library."""
    process = run("--compare", "--steps", "4", "--out", tmp_path)
    assert process.returncode == 0, process.stderr
    kept = [
        f"{i}-0000000{k}-of-00000004.safetensors"
        for i in ("adamw", "ademamix")
        for k in (3, 4)
    ]
    logs = ["adamw.csv", "ademamix.csv"]
    assert names(tmp_path) == sorted([*kept, *logs, "loss.png"])
    rows = [line.split() for line in process.stdout.splitlines()]
    [adamw] = [row for row in rows if row[:1] == ["AdamW"]]
    [ademamix] = [row for row in rows if row[:1] == ["AdEMAMix"]]
    assert adamw[1] == ademamix[1] == "0.008"
    assert rows[-1] == ["validation", "loss:", ademamix[2]]
    assert (
        "A run of 4 steps is too short to compare the two optimizers." in process.stdout
    )


def test_what_a_loss_means(monkeypatch):
    """The recorded losses are those of the file, on the same text and on another."""
    recorded = example("_recorded", monkeypatch)
    config = example("_config", monkeypatch).Config()
    [(text, loss)] = recorded.recorded_losses(
        {**config.settings, "optimizer": "adamw"}
    ).items()
    assert loss == pytest.approx((1.3752878904342651 + 1.3169965744018555) / 2)
    assert "AdamW ended at 1.3461." in recorded.meaning(config, text)
    assert "different" not in recorded.meaning(config, text)
    assert "slightly different" in recorded.meaning(config, "another")
    other = dataclasses.replace(config, steps=7)
    assert "use --compare" in recorded.meaning(other, text)


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
    steps = {name: (19, 20) for name in ("adamw", "switched")}
    kept = [
        f"{i}-{k:08}-of-00000020.safetensors" for i, pair in steps.items() for k in pair
    ]
    logs = ["adamw.csv", "switched.csv"]
    assert names(tmp_path) == sorted([*kept, *logs, "switch.png"])
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
    message = f"There is no checkpoint {tmp_path}/ademamix-*.safetensors to resume"
    check_error(process, message)


@pytest.mark.parametrize("name", ("width", "text"))
def test_resume_with_other_settings_and_text(name, finished, text, tmp_path):
    newest = checkpoints(finished[0])[-1]
    before = newest.read_bytes()
    other = tmp_path / "other.py"
    other.write_bytes(text.read_bytes() + b"\n")
    options = {"width": ("--width", "16"), "text": ("--data", other)}[name]
    process = run("--data", text, "--out", finished[0], *options, "--resume")
    found = {"width": "the int 8", "text": "the str '"}[name]
    check_error(process, f"['settings']['{name}'] is {found}")
    assert f"{newest}, but the {found[4:7]} " in process.stderr
    assert newest.read_bytes() == before


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def test_resume_from_a_damaged_checkpoint(finished, text, tmp_path):
    """The one before is whole, and leads to the same end."""
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    older, newest = checkpoints(tmp_path)
    damage(newest)
    process = run("--data", text, "--out", tmp_path, "--resume")
    assert process.returncode == 0
    first = process.stderr.splitlines()[0]
    assert first.startswith(f"{newest} is damaged")
    assert first.endswith(f"This run resumes from {older}.")
    said, expected = (x.stdout.splitlines() for x in (process, finished[1]))
    plots = [f"Loss plot saved to {tmp_path / 'loss.png'}"]
    plots += [f"Plot of the log saved to {tmp_path / 'run.png'}"]
    assert said[:2] == plots and said[2:] == expected[2:]
    assert newest.read_bytes() == checkpoints(finished[0])[-1].read_bytes()


def test_resume_from_two_damaged_checkpoints(finished, text, tmp_path):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    for path in checkpoints(tmp_path):
        damage(path)
    process = run("--data", text, "--out", tmp_path, "--resume")
    check_error(process, f"{checkpoints(tmp_path)[-1]} is damaged")


def test_impossible_options():
    process = run("--heads", "3")
    assert process.returncode == 2
    assert "not a multiple of heads" in process.stderr


#
# Parts
#


def test_losses_by_step_and_back(monkeypatch):
    """Also the loss of a run that has diverged."""
    script = example("train_language_model", monkeypatch)
    pairs = [(1, 2.5), (3, float("inf")), (4, float("nan"))]
    found = script.pairs_of(script.by_step(pairs, 5))
    assert repr(found) == repr(pairs)


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
