"""Measures several sides in turn, and derives results from their times."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np


Sample = dict[str, float]
"""What one measurement of a side gives: quantities in seconds."""
Sampler = Callable[[], Sample]


class Run(Protocol):
    """Something that takes steps. A call may return before its step has ended."""

    facts: dict[str, float]

    def __call__(self) -> None: ...
    def wait(self) -> None: ...


class Absent(Exception):
    """A side that cannot be measured on this machine, and why."""


class InTurn:
    """Measures every side once per call, in an order that reverses from call to call.

    So a side that leaves the caches full or the processor hot does not always affect
    the same neighbor.
    """

    def __init__(self, samplers: Mapping[str, Sampler]):
        self.samples: dict[str, list[Sample]] = {name: [] for name in samplers}
        self._order = list(samplers.items())

    def __call__(self) -> None:
        for name, sampler in self._order:
            self.samples[name].append(sampler())
        self._order.reverse()


def seconds_of(run: Run, calls: int) -> float:
    """Seconds per step, for a few steps one after another."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    run.wait()
    return (time.perf_counter() - start) / calls


def sampler_of(run: Run, calls: int, quantity: str = "step") -> Sampler:
    return lambda: {quantity: seconds_of(run, calls)}


def rounds_that_fit(each: float, seconds: float, least: int, most: int) -> int:
    """The number of rounds of `each` seconds that fit, between `least` and `most`."""
    return min(max(int(seconds / each), least), most)


def calls_that_take(seconds: float, each: float) -> int:
    """The number of calls of `each` seconds that is long enough for the timer."""
    return max(1, round(seconds / each))


#
# Derived results
#


def spread(values: Sequence[float]) -> dict[str, float]:
    """The median and the quartiles."""
    low, median, high = np.percentile(values, (25, 50, 75))
    return {"median": float(median), "low": float(low), "high": float(high)}


def ratios(values: Sequence[float], baseline: Sequence[float]) -> list[float]:
    """The ratio in each round. Both numbers in a round come from the same state of the
    machine."""
    return [x / y for x, y in zip(values, baseline, strict=True)]


def summary(samples: Mapping[str, Sequence[Sample]], baseline: str) -> dict[str, Any]:
    """For each side and quantity: the spread of the times and that of the ratios."""
    base = _columns(samples[baseline])
    return {name: _summary(_columns(found), base) for name, found in samples.items()}


def _columns(samples: Sequence[Sample]) -> dict[str, list[float]]:
    return {key: [sample[key] for sample in samples] for key in samples[0]}


def _summary(
    columns: dict[str, list[float]], base: dict[str, list[float]]
) -> dict[str, Any]:
    return {
        key: {**spread(values), "ratio": spread(ratios(values, base[key]))}
        for key, values in columns.items()
    }


def growth(counts: Sequence[float], values: Sequence[float]) -> float:
    """The exponent k for which c n^k fits best: the slope in logarithms."""
    slope, _ = np.polyfit(np.log(counts), np.log(values), 1)
    return float(slope)
