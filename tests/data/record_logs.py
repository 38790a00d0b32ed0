"""Records logs of the main example, for `tests/test_diagnose.py`: of small runs, and of
runs with the default settings."""

import csv
import pathlib
import subprocess
import sys
import tempfile


HERE = pathlib.Path(__file__).parent
EXAMPLE = HERE.parents[1] / "examples/train_language_model.py"
SETTINGS = (
    "--steps 2000 --b3 0.99 --log-every 20 --learning-rate 0.005 "
    "--width 32 --depth 2 --heads 2 --context 32 --batch-size 8"
)


def record(name: str, settings: str) -> None:
    with tempfile.TemporaryDirectory() as out:
        options = [*settings.split(), "--out", out]
        subprocess.run([sys.executable, str(EXAMPLE), *options], check=True)
        shorten(pathlib.Path(out) / "ademamix.csv", name)


def shorten(log: pathlib.Path, name: str) -> None:
    """Writes the log with five digits of each number."""
    with log.open(newline="") as file:
        names, *rows = csv.reader(file)
    short = [[f"{float(x):.5g}" for x in row] for row in rows]
    with (HERE / f"train_language_model_{name}.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([names, *short])


if __name__ == "__main__":
    for seed in range(3):
        record(str(seed), f"{SETTINGS} --seed {seed}")
        record(f"default_{seed}", f"--log-every 25 --seed {seed}")
