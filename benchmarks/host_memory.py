"""Compares a step with moments in host memory and one without.

    python benchmarks/host_memory.py    # on a GPU, a few minutes

Each side runs in its own process, since a device reports its peak memory only for the
whole process. A CPU does not report it: there, only the times are shown, and nothing is
copied between two memories.
"""

import argparse
import functools as ft
import json
import subprocess
import sys
import time
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from eqx_ademamix import AdEMAMix, Offloaded, StateFormat, init, update


MOMENTS = {"none": (), "m2": ("m2",), "all": ("m1", "m2", "nu")}
SIDES = [(fmt, which) for fmt in ("float32", "compact") for which in MOMENTS]
WIDTH = 1024


def measure(fmt: str, which: str, parameters: int, leaves: int, steps: int) -> Any:
    """The peak of the device's memory in bytes (or `None`), and the time of a step."""
    optim: Any = AdEMAMix(1e-3, state_format=getattr(StateFormat, fmt)())
    optim = Offloaded(optim, MOMENTS[which]) if MOMENTS[which] else optim
    device = jax.devices()[0]
    shape = (max(1, parameters // leaves // WIDTH), WIDTH)
    params = {str(i): jax.device_put(jnp.ones(shape), device) for i in range(leaves)}
    state = init(optim, params)

    @ft.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any) -> Any:
        grads = jax.tree.map(jnp.sin, params)
        updates, state = update(optim, grads, state, params)
        return eqx.apply_updates(params, updates), state

    params, state = jax.block_until_ready(step(params, state))
    start = time.perf_counter()
    for _ in range(steps):
        params, state = step(params, state)
    jax.block_until_ready((params, state))
    seconds = (time.perf_counter() - start) / steps
    stats = device.memory_stats() or {}
    count = sum(x.size for x in jtu.tree_leaves(params))
    return {
        "parameters": count,
        "peak": stats.get("peak_bytes_in_use"),
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=int, default=300_000_000)
    parser.add_argument("--leaves", type=int, default=100)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--side", nargs=2, help="one side, in this process")
    args = parser.parse_args()
    numbers = (args.parameters, args.leaves, args.steps)
    if args.side:
        name, where = args.side
        print(json.dumps(measure(name, where, *numbers)))
        return
    names = ("--parameters", "--leaves", "--steps")
    options = [str(x) for pair in zip(names, numbers, strict=True) for x in pair]
    print(f"{'state':>8} {'in the host':>12} {'peak, bytes/param':>18} {'ms':>9}")
    for side in SIDES:
        command = [sys.executable, __file__, *options, "--side", *side]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        peak = found["peak"] and f"{found['peak'] / found['parameters']:.2f}"
        print(f"{side[0]:>8} {side[1]:>12} {peak!s:>18} {1000 * found['seconds']:9.2f}")


if __name__ == "__main__":
    main()
