"""Results: what is stored about a run, and how to look things up in it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .measure import growth


Results = dict[str, Any]
Case = dict[str, Any]


def from_pytest_benchmark(found: dict[str, Any]) -> Results:
    """The part of pytest-benchmark's JSON that the page shows."""
    return {
        "machine": found["machine_info"],
        "seconds": round(found["seconds"]),
        "cases": [_rounded(x["extra_info"]) for x in found["benchmarks"]],
        "left_out": found["left_out"],
    }


def _rounded(value: Any) -> Any:
    """Five digits: more would only add noise to the diff between two commits."""
    if isinstance(value, dict):
        return {key: _rounded(x) for key, x in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value


def read(path: Path) -> Results:
    return json.loads(path.read_text())


def write(path: Path, results: Results) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


def cases_of(results: Results, kind: str) -> list[Case]:
    """All cases of a kind, sorted by leaves and then by parameters."""
    found = [case for case in results["cases"] if case["kind"] == kind]
    return sorted(found, key=size)


def size(case: Case) -> tuple[int, int]:
    return case["case"]["leaves"], case["case"].get("parameters", 0)


def sides_of(cases: Sequence[Case]) -> list[str]:
    """All sides, in the order in which they first occur."""
    return list(dict.fromkeys(name for case in cases for name in case["sides"]))


def absent(results: Results) -> dict[str, str]:
    """The sides that could not be measured, and why."""
    return {
        name: reason
        for case in results["cases"]
        for name, reason in case["absent"].items()
    }


def series(
    cases: Sequence[Case], side: str, quantity: str, key: str = "leaves"
) -> tuple[list[int], list[dict[str, Any]]]:
    """The measurements of a side, over the cases that have it."""
    found = [case for case in cases if side in case["sides"]]
    return (
        [case["case"][key] for case in found],
        [case["sides"][side][quantity] for case in found],
    )


def growth_of(cases: Sequence[Case], side: str, quantity: str) -> float | None:
    """The exponent of the number of leaves. It needs two numbers of leaves."""
    leaves, found = series(cases, side, quantity)
    return growth(leaves, [x["median"] for x in found]) if len(leaves) > 1 else None
