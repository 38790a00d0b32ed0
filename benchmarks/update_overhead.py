"""Measures the host cost of a jitted update, compared with `optax.contrib.ademamix`.

Both optimizers take turns in one process on one model, so that their ratio is reliable
on a noisy machine. The arrays are small, so the benchmark measures the cost of entering
and leaving the compiled program, not its arithmetic. The last line compares the
compiled programs with and without jaxtyping's checks, which run only at trace time.
"""

import argparse
import functools as ft
import statistics
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping
import optax

import eqx_ademamix


def make_runs() -> dict[str, Callable[[], Any]]:
    model = eqx.nn.MLP(8, 8, width_size=8, depth=8, key=jax.random.key(0))
    params = eqx.filter(model, eqx.is_inexact_array)
    grads = jax.tree.map(jnp.ones_like, params)
    ours = eqx_ademamix.AdEMAMix(1e-3, weight_decay=0.1)
    theirs = optax.contrib.ademamix(1e-3, weight_decay=0.1)
    as_argument = eqx.filter_jit(eqx_ademamix.update)
    our_closure = jax.jit(ft.partial(eqx_ademamix.update, ours))
    # The baseline is optax called directly, without this package's interface.
    their_closure, filtered = jax.jit(theirs.update), eqx.filter_jit(theirs.update)
    state, their_state = eqx_ademamix.init(ours, params), theirs.init(params)
    return {
        "optax, jax.jit": lambda: their_closure(grads, their_state, params),
        "ours, jax.jit": lambda: our_closure(grads, state, params),
        "optax, eqx.filter_jit": lambda: filtered(grads, their_state, params),
        "ours, eqx.filter_jit, optimizer as argument": lambda: as_argument(
            ours, grads, state, params
        ),
    }


def microseconds(run: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    outs = [run() for _ in range(calls)]
    jax.block_until_ready(outs)
    return (time.perf_counter() - start) / calls * 1e6


def compiled_text(disable: bool) -> str:
    jaxtyping.config.update("jaxtyping_disable", disable)
    optim, params = eqx_ademamix.AdEMAMix(1e-3), jnp.ones(8)
    fresh = lambda g, s: eqx_ademamix.update(optim, g, s)
    state = eqx_ademamix.init(optim, params)
    text = jax.jit(fresh).lower(params, state).as_text()
    jaxtyping.config.update("jaxtyping_disable", False)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=20, help="number of rounds")
    parser.add_argument(
        "--calls", type=int, default=300, help="calls per variant and round"
    )
    args = parser.parse_args()
    runs = make_runs()
    for run in runs.values():
        jax.block_until_ready(run())
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.repeats):
        for name, run in runs.items():
            times[name].append(microseconds(run, args.calls))
    for name, values in times.items():
        low, mid, high = min(values), statistics.median(values), max(values)
        print(f"{name:45} {mid:7.1f} us per call (from {low:.1f} to {high:.1f})")
    same = compiled_text(disable=False) == compiled_text(disable=True)
    print(f"program is identical with and without checks: {same}")


if __name__ == "__main__":
    main()
