"""Measures how storing the slow average `m2` in fewer bytes affects it and training.

    python benchmarks/precision.py            # the table and the plot: one minute
    python benchmarks/precision.py --memory   # peak memory of a step
    python benchmarks/precision.py --train    # three seeds per variant: two hours

The table uses the following protocol. There are 4096 elements, and their gradients have
log-normal scales sigma. The mean of each gradient is 0.05 sigma times a normal random
number. Its noise has standard deviation sigma. The run takes 40,000 steps at
b3 = 0.9999. Halfway, the mean is multiplied by -0.5. The results are compared with
float64, in units of sigma.
"""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from _storage import STORAGES, Storage
from jaxtyping import Array, Float
from matplotlib.figure import Figure

import eqx_ademamix
from eqx_ademamix import AdEMAMix, StateFormat


SIZE = 4096
B3 = 0.9999
NUM_POINTS = 80  # in each curve


class Outcome(NamedTuple):
    """The accuracy of `m2` in a storage format."""

    name: str
    bytes: float
    relative_error: float
    """The root mean square error, divided by the root mean square of `m2`."""
    cosine: float
    left: float
    """The fraction of `m2` left after 10,000 steps with zero gradients. Exact:
    0.3679."""
    errors: Float[np.ndarray, " points"]
    """The error over time, as a fraction of the largest norm of `m2`."""


def gradients(seed: int) -> tuple[Array, Array]:
    """The scales and the means of the gradients."""
    sigma_key, mean_key = jax.random.split(jax.random.key(seed))
    sigma = jnp.exp(jax.random.normal(sigma_key, (SIZE,), jnp.float32))
    return sigma, 0.05 * sigma * jax.random.normal(mean_key, (SIZE,), jnp.float32)


def average(m2: Array, gradient: Array) -> Array:
    return m2 + (1 - B3) * (gradient - m2)


def follow(storage: Storage, steps: int, seed: int) -> tuple[Any, Any]:
    """`m2` in a storage format and in float64, in units of sigma, at several times."""
    sigma, mean = gradients(seed)

    def step(carry: tuple[Array, Array], t: Array) -> tuple[tuple[Array, Array], None]:
        m2, exact = carry
        noise_key, key = jax.random.split(jax.random.fold_in(jax.random.key(seed), t))
        signal = jnp.where(t < steps // 2, 1.0, -0.5) * mean
        noise = sigma * jax.random.normal(noise_key, (SIZE,), jnp.float32)
        gradient = (signal + noise).astype(jnp.float32)
        m2 = storage.round_trip(average(m2, gradient), key)
        return (m2, average(exact, gradient.astype(float))), None

    def stretch(carry: Any, times: Array) -> Any:
        carry, _ = jax.lax.scan(step, carry, times)
        return carry, carry

    start = jnp.zeros(SIZE, jnp.float32), jnp.zeros(SIZE, float)
    times = jnp.arange(steps).reshape(NUM_POINTS, -1)
    _, (m2, exact) = jax.jit(lambda: jax.lax.scan(stretch, start, times))()
    return np.float64(m2) / np.float64(sigma), np.float64(exact) / np.float64(sigma)


def forget(storage: Storage, steps: int, seed: int) -> float:
    """The fraction of `m2` that is left after steps with zero gradients."""
    start, _ = gradients(seed)

    def step(m2: Array, t: Array) -> tuple[Array, None]:
        key = jax.random.fold_in(jax.random.key(seed), t)
        return storage.round_trip(average(m2, jnp.zeros_like(m2)), key), None

    end, _ = jax.jit(lambda: jax.lax.scan(step, start, jnp.arange(steps)))()
    return float(np.mean(np.float64(end) / np.float64(start)))


def measure(storage: Storage, steps: int, seed: int) -> Outcome:
    m2, exact = follow(storage, steps, seed)
    error, size = _norm(m2 - exact), _norm(exact)
    cosine = np.sum(m2[-1] * exact[-1]) / (_norm(m2)[-1] * size[-1])
    return Outcome(
        storage.name,
        storage.bytes,
        float(error[-1] / size[-1]),
        float(cosine),
        forget(storage, steps // 4, seed),
        error / np.max(size),
    )


def _norm(x: Any) -> Any:
    return np.sqrt(np.sum(np.square(x), axis=-1))


#
# Output
#


def print_table(outcomes: Sequence[Outcome]) -> None:
    print(f"{'m2 stored as':<28} {'bytes':>6} {'error':>8} {'cosine':>9} {'left':>7}")
    for o in outcomes:
        print(
            f"{o.name:<28} {o.bytes:>6.3f} {o.relative_error:>8.2g} "
            f"{o.cosine:>9.5f} {o.left:>7.4f}"
        )


def write_csv(path: Path, outcomes: Sequence[Outcome]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Outcome._fields[:-1])
        for o in outcomes:
            numbers = o.bytes, o.relative_error, o.cosine, o.left
            writer.writerow([o.name, *(f"{x:.6g}" for x in numbers)])


def plot(path: Path, outcomes: Sequence[Outcome], steps: int) -> None:
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.subplots()
    times = (np.arange(NUM_POINTS) + 1) * (steps // NUM_POINTS)
    for o in sorted(outcomes, key=lambda o: -o.relative_error):
        is_ours = o.name.startswith(("Scaled", "Split"))
        label = f"{o.name} ({o.bytes:.1f} B)"
        axes.plot(times, o.errors, "-" if is_ours else "--", lw=1.6, label=label)
    axes.set_yscale("log")
    axes.axvline(steps / 2, color="gray", lw=0.8)
    axes.set(xlabel="step", ylabel="error of m2, over the largest m2")
    axes.set_title("The slow average against float64 (b3 = 0.9999)", fontsize="medium")
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    figure.savefig(path, dpi=150)


#
# Memory
#


def peak_memory(state_format: StateFormat, width: int) -> dict[str, float]:
    """The memory of a jitted step with donated arguments, in bytes per parameter.

    Counts the state and the temporary buffers that the compiler allocates.
    """
    params = {f"layer {i}": jnp.zeros((width, width)) for i in range(8)}
    optim = AdEMAMix(1e-3, state_format=state_format)
    state = eqx_ademamix.init(optim, params)

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = eqx_ademamix.update(optim, grads, state, params)
        return eqx.apply_updates(params, updates), state

    jitted = jax.jit(step, donate_argnums=(0, 1))
    memory: Any = jitted.lower(params, state, params).compile().memory_analysis()
    count = sum(x.size for x in params.values())
    state_bytes = eqx_ademamix.state_bytes(state)
    return {
        "parameters": count,
        "state": state_bytes / count,
        "temporaries": memory.temp_size_in_bytes / count,
        "state + temporaries": (state_bytes + memory.temp_size_in_bytes) / count,
        "donated": memory.alias_size_in_bytes / count,
    }


def print_memory(width: int) -> None:
    for name in ("float32", "half", "compact"):
        figures = peak_memory(getattr(StateFormat, name)(), width)
        cells = [f"{key} {value:,.2f}" for key, value in figures.items()]
        print(f"{name:<8} bytes per parameter: {', '.join(cells)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/precision"))
    parser.add_argument("--steps", type=int, default=40_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument(
        "--width", type=int, default=1936, help="--memory: width of the 8 layers"
    )
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--train-steps", type=int, default=8000)
    parser.add_argument(
        "--only", nargs="*", help="--train: only these variants, in order"
    )
    args = parser.parse_args()
    if args.memory:
        print_memory(args.width)
    elif args.train:
        from _precision_training import compare

        compare(args.out, args.train_steps, args.only)
    else:
        jax.config.update("jax_enable_x64", True)
        outcomes = [measure(s, args.steps, args.seed) for s in STORAGES]
        print_table(outcomes)
        write_csv(args.out / "precision.csv", outcomes)
        plot(args.out / "precision.png", outcomes, args.steps)
        print(f"Written to {args.out}")


if __name__ == "__main__":
    main()
