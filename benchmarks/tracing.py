"""What tracing and lowering a step costs beside `optax.contrib.ademamix`.

Both sides run in one process, in turn, on the same parameters. The times are process
time, so they count the work of all threads.
"""

import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import eqx_ademamix


Step = Callable[[Any, Any, Any], Any]


def parameters(leaves: int, size: int) -> dict[str, jax.Array]:
    """Leaves of one shape, as the layers of a transformer have."""
    return {f"layer{i}": jnp.ones((size, size)) for i in range(leaves)}


def of_optax(kwargs: dict[str, Any]) -> tuple[Callable[[Any], Any], Step]:
    """The baseline: optax called directly, without this package's interface."""
    optim: Any = optax.contrib.ademamix(1e-3, **kwargs)

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = optim.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return optim.init, step


def ours(optim: eqx_ademamix.AbstractOptimizer[Any]) -> tuple[Any, Step]:
    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = eqx_ademamix.update(optim, grads, state, params)
        return eqx.apply_updates(params, updates), state

    return lambda params: eqx_ademamix.init(optim, params), step


def sides() -> dict[str, tuple[Any, Step]]:
    kwargs: dict[str, Any] = dict(b3=0.9999, alpha=5.0, weight_decay=0.1)
    compact = eqx_ademamix.StateFormat.compact()
    simplified = eqx_ademamix.SimplifiedAdEMAMix(1e-3, weight_decay=0.1)
    return {
        "optax": of_optax(kwargs),
        "AdEMAMix": ours(eqx_ademamix.AdEMAMix(1e-3, **kwargs)),
        "b1=0": ours(eqx_ademamix.AdEMAMix(1e-3, b1=0.0, **kwargs)),
        "compact": ours(eqx_ademamix.AdEMAMix(1e-3, **kwargs, state_format=compact)),
        "Simplified": ours(simplified),
    }


def trace_and_lower(step: Step, args: tuple[Any, ...]) -> tuple[float, float]:
    """Seconds of process time, with nothing left over from an earlier trace."""
    jax.clear_caches()
    jitted = jax.jit(step, donate_argnums=(0, 1))
    start = time.process_time()
    if hasattr(jitted, "trace"):
        traced = jitted.trace(*args)
        middle = time.process_time()
        traced.lower()
        return middle - start, time.process_time() - middle
    jitted.lower(*args)  # before JAX 0.4.33 both are one
    return time.process_time() - start, 0.0


def eager(step: Step, args: tuple[Any, ...]) -> float:
    """Seconds of an update outside of `jit`, after a first one."""
    jax.block_until_ready(step(*args))
    start = time.perf_counter()
    jax.block_until_ready(step(*args))
    return time.perf_counter() - start


def main(leaves: tuple[int, ...] = (64, 512), size: int = 64, repeats: int = 5) -> None:
    """Measures and prints a table.

    Args:
        leaves: how many leaves the parameters have, one table for each.
        size: rows and columns of a leaf.
        repeats: how often everything is measured. The medians are printed.
    """
    print(f"jax {jax.__version__}, optax {optax.__version__}")
    for count in leaves:
        params = parameters(count, size)
        cases = sides()
        args = {
            name: (params, init(params), params) for name, (init, _) in cases.items()
        }
        times: dict[str, list[tuple[float, float, float]]] = {
            name: [] for name in cases
        }
        for _ in range(repeats):
            for name, (_, step) in cases.items():
                both = trace_and_lower(step, args[name])
                is_last = len(times[name]) == repeats - 1
                seconds = eager(step, args[name]) if is_last else float("nan")
                times[name].append((*both, seconds))
        print(f"\n{count} leaves        trace  lower  sum/optax  eager  eager/optax")
        base = np.array(times["optax"])
        for name, rows in times.items():
            x = np.array(rows)
            trace, lower = np.median(x[:, :2], axis=0)
            ratio = np.median(x[:, :2].sum(1) / base[:, :2].sum(1))
            seconds, other = x[-1, 2], base[-1, 2]
            print(
                f"  {name:14s}  {trace:6.2f} {lower:6.2f}  {ratio:9.2f} {seconds:6.2f}"
                f"  {seconds / other:11.2f}"
            )


if __name__ == "__main__":
    tyro.cli(main)
