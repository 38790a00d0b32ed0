"""What the guards prevent, and what they do to a normal run.

First, measures how far AdEMAMix moves parameters whose gradients have stopped, or come
rarely, with and without guards. The result is OUT/guards_pushes.json.

Then trains the transformer of `examples/train_language_model.py` with several seeds,
without guards and with all of them. This takes about half an hour on two cores. The
guards must not change the validation loss by more than the seeds do. At a hundred steps
of each run, the benchmark also measures what the guards limit: |m2| / sqrt(nu_hat) of
each parameter, and the RMS of the direction of each leaf. Each finished run is a line
in OUT/guards_runs.jsonl. If you stop the benchmark, the same command continues after
the last finished run.

The files whose results docs/guards.md shows are in docs. To list the options, run
`python benchmarks/guards.py --help`.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import tyro
from _examples import (
    Config,
    DataError,
    OptimizerName,
    Run,
    Text,
    read_text,
    validation_batches,
)
from _pushes import Push, as_table, measured, rare_table, silence_table
from jaxtyping import Array, Float
from tqdm import tqdm
from tyro.conf import Fixed, Suppress

import eqx_ademamix
from eqx_ademamix import AdEMAMix, AdEMAMixState, Hyperparams


# The values that docs/guards.md recommends.
GUARDS: dict[str, dict[str, Any]] = {
    "off": {},
    "on": {"max_slow_ratio": 1.0, "clip_update_rms": 1.0, "skip_nonfinite": True},
}
QUANTILES = (0.5, 0.99, 0.999, 1.0)
NUM_MEASUREMENTS = 100


@dataclasses.dataclass(frozen=True)
class GuardsConfig(Config):
    """Measures what the guards prevent, and what they do to a normal run."""

    out: Path = Path("runs/guards")
    """The folder for the finished runs and the table."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """The seeds."""
    # Options of the example that differ from run to run, or that do not apply here.
    plot: Suppress[Fixed[Path | None]] = None
    resume: Suppress[Fixed[bool]] = False
    compare: Suppress[Fixed[bool]] = False
    optimizer: Suppress[Fixed[OptimizerName]] = "ademamix"
    seed: Suppress[Fixed[int]] = 0


@dataclasses.dataclass(frozen=True)
class Result:
    """A finished run."""

    guards: str
    seed: int
    steps: int
    validation_loss: float
    """In nats per byte."""
    measured: list[list[float]]
    """For a hundred steps: the step, quantiles of |m2| / sqrt(nu_hat), the fraction of
    the parameters where it is above 1, and the largest RMS of a leaf's direction."""


#
# What the guards limit
#


@eqx.filter_jit
def measure(h: Hyperparams, state: AdEMAMixState) -> Float[Array, " numbers"]:
    """`h` are the hyperparameters of the last step, at which `state` was reached."""
    leaves = zip(*map(jtu.tree_leaves, (state.m1, state.m2, state.nu)), strict=True)
    bias1, bias2 = (1.0 - b**state.count for b in (h.b1, h.b2))
    ratios, rms = list[Array](), list[Array]()
    for m1, m2, nu in leaves:
        root = jnp.sqrt(nu / bias2)
        ratios.append((jnp.abs(m2) / jnp.maximum(root, 1e-30)).ravel())
        direction = (m1 / bias1 + h.alpha * m2) / (root + 1e-8)
        rms.append(jnp.sqrt(jnp.mean(jnp.square(direction))))
    every = jnp.concatenate(ratios)
    quantiles = jnp.quantile(every, jnp.array(QUANTILES))
    others = jnp.stack([jnp.mean(every > 1), jnp.max(jnp.stack(rms))])
    return jnp.concatenate([quantiles, others])


#
# Pushes
#


def pushes(path: Path) -> dict[str, list[Push]]:
    """The pushes in a file, or newly measured ones if there is none."""
    if not path.exists():
        path.write_text(json.dumps(measured()) + "\n")
    found = json.loads(path.read_text())
    return {name: [Push(*x) for x in values] for name, values in found.items()}


#
# The runs
#


def optimizers(config: GuardsConfig, text: Text) -> dict[str, AdEMAMix]:
    """One for each set of guards. All seeds share it, so it compiles once."""
    plain = Run(config, text).optim
    assert isinstance(plain, AdEMAMix)
    return {name: dataclasses.replace(plain, **x) for name, x in GUARDS.items()}


def train(config: GuardsConfig, text: Text, guards: str, optim: AdEMAMix) -> Result:
    run = Run(config, text)
    run.optim, seed = optim, config.seed
    run.state = eqx_ademamix.init(run.optim, run.model)
    steps, measured = config.steps, list[list[float]]()
    for step in tqdm(range(1, steps + 1), desc=f"{guards}, {seed}", unit=" steps"):
        is_measured = step % max(1, steps // NUM_MEASUREMENTS) == 0
        h = eqx_ademamix.hyperparams(run.optim, run.state) if is_measured else None
        run.step(step)
        if h is not None:
            measured.append([step, *map(_rounded, measure(h, run.state))])
    loss = run.validate(validation_batches(text.validation, config.context))
    return Result(guards, seed, steps, loss, measured)


def _rounded(x: Array) -> float:
    return float(f"{float(x):.4g}")


def read(path: Path) -> list[Result]:
    lines = path.read_text().splitlines() if path.exists() else []
    return [Result(**json.loads(line)) for line in lines]


def run_missing(config: GuardsConfig, text: Text) -> list[Result]:
    path, steps = config.out / "guards_runs.jsonl", config.steps
    optims = optimizers(config, text)
    for seed in config.seeds:
        for guards, optim in optims.items():
            found = [(x.guards, x.seed, x.steps) for x in read(path)]
            if (guards, seed, steps) not in found:
                own = dataclasses.replace(config, seed=seed)
                result = train(own, text, guards, optim)
                with path.open("a") as file:
                    file.write(json.dumps(dataclasses.asdict(result)) + "\n")
    return [x for x in read(path) if x.steps == steps]


#
# The tables
#


def loss_table(results: list[Result]) -> str:
    """The validation losses as a table in Markdown."""
    seeds = sorted({x.seed for x in results})
    names = ["guards", *(f"seed {seed}" for seed in seeds), "mean"]
    losses = {(x.guards, x.seed): x.validation_loss for x in results}
    rows = [(name, [losses[name, seed] for seed in seeds]) for name in GUARDS]
    return as_table(
        names,
        [[name, *(f"{x:.4f}" for x in [*row, np.mean(row)])] for name, row in rows],
    )


def ratio_table(results: list[Result]) -> str:
    """What was measured without guards, the largest of all seeds, early and late."""
    quantiles = ["median", *(f"{100 * q:g}th percentile" for q in QUANTILES[1:-1])]
    names = ["step", *quantiles, "largest", "share above 1", "largest RMS of a leaf"]
    rows = early_and_late(results)
    return as_table(
        names, [[f"{step:.0f}", *(f"{x:.3g}" for x in row)] for step, *row in rows]
    )


def early_and_late(results: list[Result]) -> Float[np.ndarray, "rows numbers"]:
    """After 1%, 10%, 50%, and 100% of the steps."""
    off = np.array([x.measured for x in results if x.guards == "off"])
    largest = off.max(axis=0)
    indices = [max(0, int(len(largest) * share) - 1) for share in (0.01, 0.1, 0.5, 1.0)]
    return largest[indices]


def main() -> int:
    config = tyro.cli(GuardsConfig)
    config.out.mkdir(parents=True, exist_ok=True)
    found = pushes(config.out / "guards_pushes.json")
    print(silence_table(found), rare_table(found), sep="\n\n")
    try:
        results = run_missing(config, read_text(config.data, config.context))
    except DataError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped. Run the same command again to continue.")
        return 130
    print("", loss_table(results), "", ratio_table(results), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
