"""Measures a step on a GPU and the bandwidth of its memory, in one call.

    python benchmarks/gpu.py    # under ten minutes; into runs/gpu

A step only moves memory, so its bound is the time that the device takes to move the
same bytes in place. All sides run in turn, as in the suite. The targets are 1.1 times
the bound for float32 and 1.15 times for `compact`.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import tyro
from suite import cases, machine, text
from suite.bounds import InPlaceScale
from suite.measure import InTurn, Run, ratios, sampler_of, seconds_of, spread, summary
from suite.sides import SIDES, JaxRun
from suite.trees import Tree, normal_tree


NAMES = (
    cases.BASELINE,
    cases.FLOAT32,
    cases.COMPACT,
    cases.HALF,
    cases.NO_M1,
    cases.ADAMW,
)
TARGETS = {cases.FLOAT32: 1.1, cases.COMPACT: 1.15}
MEASURE_SECONDS = 0.05  # of a measurement, so that the wait at its end is negligible


def compiled_runs(
    names: Sequence[str], grads: Tree, deadline: float
) -> tuple[dict[str, Run], list[str]]:
    """The runs of all sides that are compiled before the deadline, and the remaining
    sides.

    The baseline is always compiled.
    """
    runs: dict[str, Run] = {}
    for name in names:
        if not runs or time.perf_counter() < deadline:
            runs[name] = JaxRun(SIDES[name](), grads)
    return runs, [name for name in names if name not in runs]


def measure(
    parameters: int, leaves: int, rounds: int, budget: float, names: Sequence[str]
) -> dict[str, Any]:
    deadline = time.perf_counter() + budget / 2
    grads = normal_tree(parameters, leaves, jnp.float32)
    runs, left_out = compiled_runs(names, grads, deadline)
    scale = InPlaceScale(parameters)
    runs[cases.IN_PLACE] = scale
    turns = InTurn({name: sampler_of(run, calls(run)) for name, run in runs.items()})
    for _ in range(rounds):
        turns()
    times = {name: [x["step"] for x in xs] for name, xs in turns.samples.items()}
    moved = {name: run.facts["moved"] for name, run in runs.items()}
    sides = summary(turns.samples, names[0])
    for name, found in times.items():
        sides[name]["bound"] = spread(
            bound_ratios(
                found, times[cases.IN_PLACE], moved[name] / scale.facts["moved"]
            )
        )
    return {
        "machine": machine.facts(),
        "parameters": parameters,
        "leaves": leaves,
        "rounds": rounds,
        "bandwidth": scale.bytes / spread(times[cases.IN_PLACE])["median"],
        "sides": sides,
        "facts": {name: run.facts for name, run in runs.items()},
        "left_out": left_out,
    }


def calls(run: Run) -> int:
    """The number of steps in a measurement. The first calls of the run are not
    measured."""
    seconds_of(run, 2)
    return max(1, round(MEASURE_SECONDS / seconds_of(run, 2)))


def bound_ratios(
    times: Sequence[float], in_place: Sequence[float], share: float
) -> list[float]:
    """Times divided by bounds, round by round.

    `share` is the number of bytes that the step must move, divided by the number that
    the in-place scale moves.
    """
    return ratios(times, [share * each for each in in_place])


#
# The report
#


COLUMNS = (
    "",
    "step",
    "relative to optax",
    "bytes moved per parameter",
    "relative to its bound",
    "trace and lower",
    "compile",
    "state, bytes per parameter",
    "temporaries, bytes per parameter",
)


def report(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    rows = [row(name, found) for name in found["sides"]]
    title = f"# {found['machine']['device']}"
    size = (
        f"{text.parameters(found['parameters'])} parameters, "
        f"{text.leaves(found['leaves'])}, {found['rounds']} rounds. "
        f"Memory bandwidth in place: {found['bandwidth'] / 1e9:,.1f} GB/s."
    )
    lines = [f"- {name}: {target(name, found)}" for name in TARGETS]
    lines += [f"- {name}: out of the time budget." for name in found["left_out"]]
    facts = text.table(("measured on", ""), list(found["machine"].items()))
    return "\n\n".join(
        [title, size, text.table(COLUMNS, rows), "\n".join(lines), facts]
    )


def row(name: str, found: dict[str, Any]) -> list[str]:
    side, facts = found["sides"][name], found["facts"][name]
    return [
        name,
        text.seconds(side["step"]["median"]),
        text.ratio(side["step"]["ratio"]),
        f"{facts['moved']:.2f}",
        text.ratio(side["bound"]),
        *(text.seconds(facts[x]) if x in facts else "-" for x in PHASES),
        *(f"{facts[x]:.4f}" if x in facts else "-" for x in ("state", "temporaries")),
    ]


PHASES = ("trace + lower", "compile")


def target(name: str, found: dict[str, Any]) -> str:
    if name not in found["sides"]:
        return "not measured."
    ratio = found["sides"][name]["bound"]["median"]
    verdict = "met" if ratio <= TARGETS[name] else "not met"
    return f"{ratio:.2f} times its bound; the target of {TARGETS[name]} is {verdict}."


def main(
    parameters: int = 100_000_000,
    leaves: int = 512,
    rounds: int = 15,
    budget: float = 540.0,
    names: tuple[str, ...] = NAMES,
    out: Path = Path("runs/gpu"),
) -> None:
    """Measures, prints a report, and writes `gpu.json` and `gpu.md`.

    Args: parameters: the number of parameters in the model. leaves: the number of
        leaves of one shape that they are split into. rounds: how many times all sides
        are measured in turn. budget: seconds. After half of them, no more sides are
        compiled. names: the sides to measure. The first is the baseline. out: the
        folder for the results.
    """
    found = measure(parameters, leaves, rounds, budget, names)
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "gpu.md").write_text(report(found) + "\n")
    print(report(found))


if __name__ == "__main__":
    tyro.cli(main)
