"""A compiled step and its memory in bytes."""

from typing import Any

import jax.numpy as jnp

from . import bounds, cases, torch_runs
from .cases import StepCase
from .machine import free_memory
from .measure import Absent, Run, calls_that_take, sampler_of, seconds_of
from .sides import SIDES, JaxRun
from .trees import Tree, normal_tree


LEAST_SECONDS = 5e-3  # of a measurement, so that the timer and the call are negligible
# A side has its parameters, gradients, and moments; the in-place scale has 4.5 words.
BYTES_PER_PARAMETER = 20


def bench_step(case: StepCase, in_turn: Any, leave_out: Any) -> None:
    needed = BYTES_PER_PARAMETER * case.parameters * len(case.sides)
    if needed > free_memory():
        leave_out(f"needs {needed / 2**30:.0f} GiB of memory")
    runs, absent = runs_of(case)
    for run in runs.values():
        run()
        run.wait()
    calls = calls_that_take(LEAST_SECONDS, seconds_of(runs[cases.BASELINE], 1))
    in_turn(
        {name: sampler_of(run, calls) for name, run in runs.items()},
        facts={name: run.facts for name, run in runs.items()},
        absent=absent,
    )


def runs_of(case: StepCase) -> tuple[dict[str, Run], dict[str, str]]:
    """What can be run, and why the rest cannot."""
    runs: dict[str, Run] = {}
    absent: dict[str, str] = {}
    grads = {x: normal_tree(*case[:2], x) for x in (jnp.float32, jnp.bfloat16)}
    for name in case.sides:
        try:
            runs[name] = run_of(name, case, grads)
        except Absent as reason:
            absent[name] = str(reason)
    return runs, absent


def run_of(name: str, case: StepCase, grads: dict[Any, Tree]) -> Run:
    if name in SIDES:
        return JaxRun(side := SIDES[name](), grads[side.dtype])
    if name == cases.IN_PLACE:
        return bounds.InPlaceScale(case.parameters)
    if name == cases.C_LOOP:
        return bounds.CLoop.on(grads[jnp.float32])
    return torch_runs.TorchRun(name, grads[jnp.float32])
