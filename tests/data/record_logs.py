"""Records the logs of small runs of the main example, for `tests/test_diagnose.py`."""

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


def record(seed: int) -> None:
    with tempfile.TemporaryDirectory() as out:
        options = [*SETTINGS.split(), "--seed", str(seed), "--out", out]
        subprocess.run([sys.executable, str(EXAMPLE), *options], check=True)
        shorten(pathlib.Path(out) / "ademamix.csv", seed)


def shorten(log: pathlib.Path, seed: int) -> None:
    """Writes the log with five digits of each number."""
    with log.open(newline="") as file:
        names, *rows = csv.reader(file)
    short = [[f"{float(x):.5g}" for x in row] for row in rows]
    with (HERE / f"train_language_model_{seed}.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([names, *short])


if __name__ == "__main__":
    for seed in range(3):
        record(seed)
