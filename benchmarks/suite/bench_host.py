"""The host's part of a training step: a model so small that the device has no work."""

from typing import Any

from .cases import HostCase
from .host_runs import runs_of
from .measure import sampler_of


CALLS = 64  # in a measurement; meanwhile, the host runs ahead of the device


def bench_host(case: HostCase, in_turn: Any) -> None:
    runs = runs_of(case.leaves, case.sides)
    for run in runs.values():
        for _ in range(3):
            run()
        run.wait()
    in_turn({name: sampler_of(x, CALLS, "call") for name, x in runs.items()})
