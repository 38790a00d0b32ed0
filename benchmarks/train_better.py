"""Compares AdEMAMix with AdamW, each at its own best learning rate.

Trains the transformer of `examples/train_language_model.py` on the same text. This
takes about an hour on two cores. With the first seed, each optimizer runs at four or
more learning rates. As long as the best rate is the lowest or highest one, the next
rate beyond it is tried too. Each optimizer then runs at its best rate with the other
seeds. With the first three, AdamW also runs for more steps, with schedules that span
the longer run, until it reaches AdEMAMix's final loss. This shows how many steps AdamW
needs.

The held-out text is split in half. The first half of the files selects the learning
rates. The other half gives the reported losses.

Each finished run is a line in OUT/runs.jsonl. If you stop the benchmark, the same
command continues after the last finished run. To list the options, run
`python benchmarks/train_better.py --help`.
"""

import dataclasses
import json
import os
import sys
import time
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro
from _comparison import (
    Comparison,
    Repeats,
    Result,
    Tuning,
    best,
    plot,
    reported,
    summary,
)
from _examples import (
    TITLES,
    Config,
    DataError,
    OptimizerName,
    Run,
    Text,
    Windows,
    read_text,
    validation_batches,
    validation_loss,
)
from tqdm import tqdm
from tyro.conf import Fixed, Suppress


NAMES: tuple[OptimizerName, ...] = ("adamw", "ademamix")
NUM_EVALUATIONS = 16


@dataclasses.dataclass(frozen=True)
class BetterConfig(Config):
    """Compares AdamW and AdEMAMix, each at its best learning rate."""

    out: Path = Path("runs/train_better")
    """The folder for the finished runs, the tables, and the plot."""
    plot: Path | None = None
    """Path of the loss plot. The default is OUT/train_better.png."""
    rates: tuple[float, ...] = (2e-3, 4e-3, 8e-3, 16e-3)
    """The first peak learning rates to try, in steps of a constant factor.
    A single one is enough if `most_rates` is 1."""
    most_rates: int = 7
    """The maximum number of learning rates to try.
    The table shows whether the best one is still at the edge."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7)
    """The seeds. The first one selects the learning rates. All are reported."""
    longer_seeds: int = 3
    """The number of seeds, from the first, with which AdamW also trains for longer."""
    longer: tuple[float, ...] = (1.25, 1.5, 2.0)
    """Factors for longer AdamW runs. They are tried in order until AdamW is as good."""
    # Options of the example that differ from run to run, or that do not apply here.
    resume: Suppress[Fixed[bool]] = False
    compare: Suppress[Fixed[bool]] = False
    optimizer: Suppress[Fixed[OptimizerName]] = "ademamix"
    learning_rate: Suppress[Fixed[float | None]] = None
    seed: Suppress[Fixed[int]] = 0

    def __post_init__(self):
        super().__post_init__()
        enough = 1 if self.most_rates == 1 else 2
        if len(self.rates) < enough or list(self.rates) != sorted(set(self.rates)):
            raise ValueError(
                f"rates is {self.rates}, but must be two or more increasing numbers, "
                "or a single number with most_rates=1"
            )
        if not self.seeds:
            raise ValueError("seeds is empty, but at least one is needed")
        if self.longer_seeds < 1:
            raise ValueError(f"longer_seeds is {self.longer_seeds}, but must be >= 1")
        if [1.0, *self.longer] != sorted({1.0, *self.longer}):
            raise ValueError(
                f"longer is {self.longer}, but must be increasing factors above 1"
            )

    def one_run(self, name: OptimizerName, **changes: Any) -> Config:
        """The options of a single run of the example."""
        names = (field.name for field in dataclasses.fields(Config))
        options: dict[str, Any] = {i: getattr(self, i) for i in names}
        options["optimizer"] = name
        return Config(**(options | changes))


class Ledger:
    """The finished runs, in a file with one line per run."""

    def __init__(self, path: Path):
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.results = [Result(**json.loads(line)) for line in lines]

    def find(self, settings: Mapping[str, Any]) -> Result | None:
        found = [i for i in self.results if i.settings == settings]
        return found[0] if found else None

    def add(self, result: Result) -> None:
        """Adds a run and rewrites the file atomically."""
        self.results.append(result)
        lines = [json.dumps(dataclasses.asdict(i)) + "\n" for i in self.results]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_text("".join(lines))
        os.replace(temporary, self.path)


def halves(text: Text, context: int) -> tuple[Windows, Windows]:
    """Held-out text to select the learning rate, and other held-out text to report."""
    batches = validation_batches(text.validation, context)
    if len(batches) < 2:
        raise DataError("The held-out text is too short to split in half.")
    middle = len(batches) // 2
    return batches[:middle], batches[middle:]


def train(config: Config, text: Text) -> Result:
    """Trains one run from start to finish."""
    start, run = time.perf_counter(), Run(config, text)
    held_out = halves(text, config.context)
    every = max(1, config.steps // NUM_EVALUATIONS)
    losses: list[tuple[float, ...]] = []
    title = f"{TITLES[config.optimizer]}, {config.peak_learning_rate:g}, {config.seed}"
    for step in tqdm(range(1, config.steps + 1), desc=title, unit=" steps"):
        run.step(step)
        if step % every == 0 or step == config.steps:
            found = (float(validation_loss(run.model, half)) for half in held_out)
            losses.append((step, *found))
    settings = {**config.settings, "text": text.fingerprint}
    return Result(settings, losses, time.perf_counter() - start)


class Experiment:
    """The runs that the comparison needs. Finished runs are not trained again."""

    def __init__(self, config: BetterConfig, text: Text):
        self.config, self.text = config, text
        self.ledger = Ledger(config.out / "runs.jsonl")

    def result(self, name: OptimizerName, **changes: Any) -> Result:
        config = self.config.one_run(name, **changes)
        found = self.ledger.find({**config.settings, "text": self.text.fingerprint})
        if found is None:
            found = train(config, self.text)
            self.ledger.add(found)
        return found

    def tune(self, name: OptimizerName) -> dict[float, Result]:
        """Results by learning rate. Adds rates while the best one is at the edge."""
        seed, rates = self.config.seeds[0], self.config.rates
        results = self._at(name, rates, seed)
        while len(results) < self.config.most_rates:
            beyond = next_rate(sorted(results), best(results))
            if beyond is None:
                break
            results |= self._at(name, [beyond], seed)
        return results

    def _at(
        self, name: OptimizerName, rates: Iterable[float], seed: int
    ) -> dict[float, Result]:
        return {
            rate: self.result(name, learning_rate=rate, seed=seed) for rate in rates
        }

    def repeat(
        self, name: OptimizerName, rate: float, steps: int, seeds: Sequence[int]
    ) -> list[Result]:
        """One result per seed."""
        return [
            self.result(name, learning_rate=rate, seed=seed, steps=steps)
            for seed in seeds
        ]

    def run(self) -> Comparison:
        steps = self.config.steps
        tuning: Tuning = {name: self.tune(name) for name in NAMES}
        rates = {name: best(tuning[name]) for name in NAMES}
        repeats: Repeats = {
            name: self.repeat(name, rates[name], steps, self.config.seeds)
            for name in NAMES
        }
        return Comparison(tuning, repeats, self.longer(rates["adamw"], repeats))

    def longer(self, rate: float, repeats: Repeats) -> dict[int, list[Result]]:
        """Longer AdamW runs by length, until AdamW is as good with each of the first
        seeds."""
        results: dict[int, list[Result]] = {}
        seeds = self.config.seeds[: self.config.longer_seeds]
        last, targets = (repeats[name][: len(seeds)] for name in NAMES)
        for factor in self.config.longer:
            if is_as_good(last, targets):
                break
            steps = round(factor * self.config.steps)
            last = results[steps] = self.repeat("adamw", rate, steps, seeds)
        return results


def is_as_good(runs: Sequence[Result], others: Sequence[Result]) -> bool:
    """Whether each run ends at least as low as the other run with the same seed."""
    pairs = zip(reported(runs), reported(others), strict=True)
    return all(loss <= other for loss, other in pairs)


# Runs that are twice as long. Their learning rate is the best one of the shorter runs,
# for both optimizers.
LONG = BetterConfig(
    steps=16_000, seeds=(0, 1, 2), rates=(8e-3,), most_rates=1, longer=()
)


def recorded(path: Path, config: BetterConfig | None = None) -> Comparison:
    """The comparison of the finished runs in a file, whatever text they used."""
    ledger = Ledger(path)
    text: Any = types.SimpleNamespace(fingerprint=ledger.results[0].settings["text"])
    experiment = Experiment(config or BetterConfig(), text)
    experiment.ledger = ledger
    return experiment.run()


def next_rate(rates: Sequence[float], best: float) -> float | None:
    """The next rate to try if the best of the sorted rates is the first or the last."""
    if best == rates[0]:
        return rates[0] ** 2 / rates[1]
    if best == rates[-1]:
        return rates[-1] ** 2 / rates[-2]
    return None


def main() -> int:
    config = tyro.cli(BetterConfig)
    try:
        text = read_text(config.data, config.context)
        comparison = Experiment(config, text).run()
    except DataError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "Stopped. Run the same command again to continue after the finished runs."
        )
        return 130
    plot(comparison, config.plot or config.out / "train_better.png")
    tables = summary(comparison)
    (config.out / "summary.md").write_text(tables + "\n")
    print(tables)
    return 0


if __name__ == "__main__":
    sys.exit(main())
