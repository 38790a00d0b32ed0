"""Lets pytest-benchmark measure several sides in turn, within a time budget."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from . import machine
from .cases import BASELINE, FULL, SHORT, Plan
from .measure import InTurn, Sampler, rounds_that_fit, summary


START, LEFT_OUT = pytest.StashKey[float](), pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--short", action="store_true", help="few and small cases")
    parser.addoption("--budget", type=float, default=600.0, help="seconds")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[START] = time.perf_counter()
    config.stash[LEFT_OUT] = []


def plan_of(config: pytest.Config) -> Plan:
    return SHORT if config.getoption("short") else FULL


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`bench_step` measures the cases in `Plan.step`."""
    kind = metafunc.function.__name__.removeprefix("bench_")
    metafunc.parametrize("case", getattr(plan_of(metafunc.config), kind), ids=_id)


def _id(case: Any) -> str:
    numbers = [f"{key}={x}" for key, x in case._asdict().items() if type(x) is int]
    return ",".join(numbers)


#
# The results: machine facts, and one entry of `extra_info` for each case
#


def pytest_benchmark_generate_machine_info(config: Any) -> dict[str, str]:
    return machine.facts()


def pytest_benchmark_generate_commit_info(config: Any) -> dict[str, str]:
    return {}  # a result belongs to the commit that adds it


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]
) -> None:
    output_json["left_out"] = config.stash[LEFT_OUT]
    output_json["seconds"] = time.perf_counter() - config.stash[START]


@pytest.fixture
def leave_out(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Ends a case without a result and gives the report the reason. A machine with less
    memory or a smaller time budget measures fewer cases. The page lists those left out,
    with the reasons. (These are not tests: nothing goes unchecked.)"""

    def end(reason: str) -> None:
        request.config.stash[LEFT_OUT].append(f"{request.node.name}: {reason}")
        pytest.skip(reason)

    return end


@pytest.fixture(autouse=True)
def within_budget(
    request: pytest.FixtureRequest, leave_out: Callable[[str], None]
) -> None:
    budget: Any = request.config.getoption("budget")
    if time.perf_counter() - request.config.stash[START] > budget:
        leave_out("out of the time budget")


@pytest.fixture
def in_turn(request: pytest.FixtureRequest, benchmark: Any, case: Any) -> Any:
    """A function that measures the samplers of all sides in turn, round by round.

    pytest-benchmark starts the rounds and measures each as a whole. The time of each
    side and its ratio to the baseline in the same round are in `extra_info`.
    """
    plan = plan_of(request.config)

    def measure(
        samplers: Mapping[str, Sampler],
        *,
        rounds: int | None = None,
        facts: Mapping[str, Mapping[str, float]] | None = None,
        absent: Mapping[str, str] | None = None,
    ) -> None:
        if rounds is None:
            each = _seconds(InTurn(samplers))
            limits = plan.least_rounds, plan.most_rounds
            rounds = rounds_that_fit(each, plan.seconds, *limits)
        turns = InTurn(samplers)
        benchmark.pedantic(turns, rounds=rounds)
        benchmark.extra_info.update(
            kind=request.function.__name__.removeprefix("bench_"),
            case={k: x for k, x in case._asdict().items() if type(x) is int},
            rounds=rounds,
            sides=summary(turns.samples, BASELINE),
            facts=dict(facts or {}),
            absent=dict(absent or {}),
        )

    return measure


def _seconds(turns: InTurn) -> float:
    start = time.perf_counter()
    turns()
    return time.perf_counter() - start
