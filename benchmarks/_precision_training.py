"""Trains the example language model with several state and parameter formats."""

import csv
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from _examples import (
    Config,
    Interrupt,
    Run,
    Windows,
    cast,
    read_text,
    training_batch,
    validation_loss,
)
from compact_state import train_step
from jaxtyping import Float

import eqx_ademamix
from eqx_ademamix import Compensated, StateFormat


SEEDS = (0, 1, 2)
SMOOTH = 20  # steps


class Variant(NamedTuple):
    """How the parameters and the state are stored."""

    parameters: Any
    state_format: StateFormat
    wrap: Callable[[Any], Any] = lambda optim: optim


_BF16 = jnp.bfloat16
_FLOAT32 = StateFormat.float32()
VARIANTS = {
    "float32": Variant(jnp.float32, _FLOAT32),
    "half": Variant(jnp.float32, StateFormat.half()),
    "compact": Variant(jnp.float32, StateFormat.compact()),
    "bfloat16 moments": Variant(jnp.float32, StateFormat(_BF16, _BF16, _BF16)),
    "bfloat16 parameters": Variant(_BF16, _FLOAT32),
    "Compensated(bits=16)": Variant(_BF16, _FLOAT32, lambda o: Compensated(o, 16)),
    "Compensated(bits=8)": Variant(_BF16, _FLOAT32, lambda o: Compensated(o, 8)),
}


class StoredRun(Run):
    """A run of the language model example with one of the variants."""

    def use(self, variant: Variant) -> None:
        optim = dataclasses.replace(self.optim, state_format=variant.state_format)
        self.optim = variant.wrap(optim)
        self.model = cast(self.model, variant.parameters)
        self.state = eqx_ademamix.init(self.optim, self.model)

    def step(self, step: int) -> None:
        size, context = self.config.batch_size, self.config.context
        windows = training_batch(self.text.train, size, context, self.config.seed, step)
        self.model, self.state, loss = train_step(
            (self.optim, windows), self.model, self.state
        )
        self.train_losses.append(loss)

    def validate(self, held_out: Windows) -> float:
        return float(validation_loss(cast(self.model, jnp.float32), held_out))


class Outcome(NamedTuple):
    """The outcome of a run."""

    variant: str
    seed: int
    steps: int
    validation_loss: float
    """In nats per byte."""
    largest_rise: float
    """The largest rise of the smoothed training loss above its lowest earlier value.
    The first sixteenth of the run does not count. A large rise is a spike."""


def train(name: str, seed: int, out: Path, steps: int) -> Outcome:
    folder = f"{name.replace('=', '').replace(' ', '_')}_{seed}"
    config = Config(out=out / folder, seed=seed, steps=steps)
    run = StoredRun(config, read_text(None, config.context))
    run.use(VARIANTS[name])
    run.train(Interrupt(), steps)
    losses = np.array([float(loss) for loss in run.train_losses])
    loss = run.validation_losses[-1][1]
    return Outcome(name, seed, steps, loss, largest_rise(losses[steps // 16 :]))


def largest_rise(losses: Float[np.ndarray, " steps"]) -> float:
    smooth = np.convolve(losses, np.ones(SMOOTH) / SMOOTH, "valid")
    return float(np.max(smooth - np.minimum.accumulate(smooth)))


def read_outcomes(path: Path) -> list[Outcome]:
    if not path.exists():
        return []
    with path.open() as file:
        rows = list(csv.reader(file))[1:]
    return [Outcome(a, int(b), int(c), float(d), float(e)) for a, b, c, d, e in rows]


def write_outcomes(path: Path, outcomes: list[Outcome]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Outcome._fields)
        for o in outcomes:
            row = (f"{o.validation_loss:.4f}", f"{o.largest_rise:.3f}")
            writer.writerow([o.variant, o.seed, o.steps, *row])


def compare(out: Path, steps: int, only: list[str] | None) -> None:
    """Trains all runs that are missing in the results file, and prints a table."""
    path = out / "training.csv"
    outcomes = read_outcomes(path)
    for name in only or VARIANTS:
        for seed in SEEDS:
            if not any(o[:3] == (name, seed, steps) for o in outcomes):
                outcomes.append(train(name, seed, out, steps))
                write_outcomes(path, outcomes)
    print_table([o for o in outcomes if o.steps == steps])


def print_table(outcomes: list[Outcome]) -> None:
    print(f"{'variant':<22} {'validation loss, each seed':<28} {'mean':>8} {'rise':>6}")
    for name in dict.fromkeys(o.variant for o in outcomes):
        found = sorted(o for o in outcomes if o.variant == name)
        losses = [o.validation_loss for o in found]
        cells = " ".join(f"{loss:>8.4f}" for loss in losses)
        rise = max(o.largest_rise for o in found)
        print(f"{name:<22} {cells:<28} {np.mean(losses):>8.4f} {rise:>6.3f}")
