"""Runs the benchmark suite and writes its results, a page, and its plots.

    python benchmarks/run.py               # ten minutes on an idle machine
    python benchmarks/run.py --short       # under a minute, into runs/benchmarks
    python benchmarks/run.py --draw-only   # the page and the plots, from the results

`suite/cases.py` lists what is measured. Peers that are not installed are left out:

    pip install torch pytorch_optimizer bitsandbytes
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal, get_args

import tyro
from suite import page, plots, results


ROOT = Path(__file__).parents[1]
SUITE = Path(__file__).parent / "suite"
Kind = Literal["step", "host", "compile", "eager"]
KINDS: tuple[Kind, ...] = get_args(Kind)


def measure(kinds: tuple[Kind, ...], short: bool, budget: float) -> results.Results:
    """Runs pytest-benchmark in its own process."""
    load = f"{os.getloadavg()[0]:.1f}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        options = ["-c", str(SUITE / "pytest.ini"), f"--budget={budget}", "-rs"]
        options += ["--benchmark-quiet", f"--benchmark-json={path}", "--verbose"]
        options += ["--short"] * short
        files = [str(SUITE / f"bench_{kind}.py") for kind in kinds]
        command = [sys.executable, "-m", "pytest", *options, *files]
        # The threads of the C loop and of torch must not spin while others run.
        environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
        subprocess.run(command, check=True, env=environment)
        if not path.exists():
            raise SystemExit("No case was measured. Give a larger --budget.")
        found = json.loads(path.read_text())
    found["machine_info"]["load before the run"] = load
    found["machine_info"]["cases"] = "the short form" if short else "all"
    return results.from_pytest_benchmark(found)


def draw(out: Path) -> None:
    """Writes the page and the plots from the results in a folder."""
    found = results.read(out / "benchmarks.json")
    plots.draw(found, out / "images")
    (out / "benchmarks.md").write_text(page.page(found))


def run(
    kinds: tuple[Kind, ...] = KINDS,
    short: bool = False,
    budget: float = 600.0,
    draw_only: bool = False,
    out: Path | None = None,
) -> None:
    """Measures and writes `benchmarks.json`, `benchmarks.md`, and `images`.

    Args: kinds: what to measure. short: few and small cases, for a check that
        everything runs. budget: no case starts after this many seconds. The page lists
        those left out. draw_only: measure nothing and draw what is in `out`. out:
        default: docs, or runs/benchmarks if not everything is measured.
    """
    is_partial = short or set(kinds) != set(KINDS)
    out = out or (ROOT / "runs/benchmarks" if is_partial else ROOT / "docs")
    if not draw_only:
        results.write(out / "benchmarks.json", measure(kinds, short, budget))
    draw(out)
    print(f"saved to {out / 'benchmarks.md'}")


if __name__ == "__main__":
    tyro.cli(run)
