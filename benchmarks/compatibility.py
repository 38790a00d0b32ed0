"""Measures what works with the versions of Python and JAX that run this script.

    python benchmarks/compatibility.py    # half a minute, once with each interpreter

It takes two steps on eight CPU devices and compares them with the same steps on one
device. It replaces the rows for these versions in `docs/compatibility.md`.
"""

import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from sharding import exchanged  # this import asks JAX for eight devices

import eqx_ademamix
from eqx_ademamix import AdEMAMix, SplitBfloat16, StateFormat


PAGE = pathlib.Path(__file__).parents[1] / "docs/compatibility.md"
COLUMNS = (
    "Python",
    "JAX",
    "format",
    "mesh axes",
    "same numbers as on one device",
    "traces of two steps",
    "collectives in a step",
)
HEAD = f"| {' | '.join(COLUMNS)} |\n"
FORMATS = {
    "`float32()`": StateFormat.float32(),
    "`half()`": StateFormat.half(),
    "`compact()`": StateFormat.compact(),
    "`SplitBfloat16`": StateFormat(jnp.bfloat16, SplitBfloat16(), jnp.float32),
}
AXES = ("Auto", "Explicit")


def params_on(axes: str) -> Any:
    """Two parameters, split over eight devices."""
    kinds = getattr(jax.sharding, "AxisType", None)
    types = {} if kinds is None else {"axis_types": (getattr(kinds, axes),)}
    mesh = Mesh(np.array(jax.devices()), ("a",), **types)
    put = lambda x: jax.device_put(x, NamedSharding(mesh, P("a")))
    return {name: put(x) for name, x in params().items()}


def params() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"weight": (64, 2048), "bias": (32768,)}
    return {k: rng.normal(size=x).astype(np.float32) for k, x in shapes.items()}


def trained(optim: Any, p: Any) -> tuple[Any, int, int]:
    """The parameters after two steps, the traces, and the collectives in a step."""
    traces = []

    def step(p: Any, state: Any) -> Any:
        traces.append(None)
        updates, state = eqx_ademamix.update(optim, p, state, p)
        return jtu.tree_map(jnp.add, p, updates), state

    compiled: Any = jax.jit(step)
    state: Any = jax.jit(lambda p: eqx_ademamix.init(optim, p))(p)
    p, state = compiled(p, state)
    p, state = compiled(p, state)
    found = len(traces)
    program = compiled.lower(p, state).compile().as_text()
    return jtu.tree_map(np.asarray, p), found, exchanged(program)[1]


def row(name: str, axes: str) -> str:
    python = ".".join(map(str, sys.version_info[:2]))
    cells = python, jax.__version__, name, axes, *measured(FORMATS[name], axes)
    return f"| {' | '.join(map(str, cells))} |"


def measured(fmt: StateFormat, axes: str) -> tuple[str, int | str, int | str]:
    if axes == "Explicit" and not hasattr(jax.sharding, "AxisType"):
        return "not in this JAX", "", ""
    optim = AdEMAMix(1e-2, state_format=fmt)
    alone, _, _ = trained(optim, jtu.tree_map(jnp.asarray, params()))
    p, traces, collectives = trained(optim, params_on(axes))
    is_same = all(np.array_equal(p[name], alone[name]) for name in p)
    return "yes" if is_same else "no", traces, collectives


def versions(row: str) -> tuple[int, ...]:
    """The versions of Python and JAX of a row, as numbers."""
    python, version = (cell.strip() for cell in row.split("|")[1:3])
    return tuple(int(x) for x in f"{python}.{version}".split(".") if x.isdecimal())


def with_rows(page: str, rows: list[str]) -> str:
    """A page with new rows in its table, in place of those for the same versions."""
    text, table = page.split(HEAD)
    line, *old = table.strip().splitlines()
    replaced = set(map(versions, rows))
    kept = [row for row in old if versions(row) not in replaced]
    lines = [line, *sorted([*kept, *rows], key=versions)]
    return text + HEAD + "".join(f"{line}\n" for line in lines)


def main() -> None:
    rows = [row(name, axes) for name in FORMATS for axes in AXES]
    print("\n".join(rows))
    PAGE.write_text(with_rows(PAGE.read_text(encoding="utf-8"), rows), encoding="utf-8")
    if any("| no |" in row for row in rows):
        sys.exit("The devices did not compute the same numbers.")


if __name__ == "__main__":
    main()
