"""What a whole training step of a small model costs, by hand and with `make_step`.

All variants run in one process, in turn, on the same model: square layers of width 8.
The host time is the processor time of the Python thread, which a busy machine changes
less than the wall time. Both are per training step, also with several in a call.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import tyro

import eqx_ademamix


KWARGS: dict[str, Any] = dict(b3=0.9999, alpha=5.0, weight_decay=0.1)
SEVERAL = 8
BATCH = jnp.ones((4, 8))
BATCHES = jnp.ones((SEVERAL, 4, 8))


class Net(eqx.Module):
    """Two leaves for each layer."""

    layers: list[eqx.nn.Linear]

    def __init__(self, leaves: int):
        keys = jax.random.split(jax.random.key(0), leaves // 2)
        self.layers = [eqx.nn.Linear(8, 8, key=key) for key in keys]

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return x


def mean_loss(model: Net, x: jax.Array) -> jax.Array:
    return jnp.mean(jax.vmap(model)(x) ** 2)


@dataclasses.dataclass
class Variant:
    """A way to take steps, where it is now, and what it has taken."""

    call: Callable[[Any], Any]
    carry: Any
    steps_per_call: int = 1
    first: float = 0.0
    wall: list[float] = dataclasses.field(default_factory=list)
    host: list[float] = dataclasses.field(default_factory=list)

    def compile(self) -> None:
        start = time.perf_counter()
        self.run(1)
        self.first = time.perf_counter() - start

    def measure(self, steps: int) -> None:
        calls = steps // self.steps_per_call
        wall, host = time.perf_counter(), time.thread_time()
        self.run(calls)
        self.host.append((time.thread_time() - host) / steps)
        self.wall.append((time.perf_counter() - wall) / steps)

    def run(self, calls: int) -> None:
        for _ in range(calls):
            self.carry = self.call(self.carry)
        jax.block_until_ready(jax.tree.leaves(self.carry))


def by_hand(optim: Any, leaves: int) -> Variant:
    """`eqx.filter_jit` with donation, and the optimizer called directly."""

    @eqx.filter_jit(donate="all-except-first")
    def step(x: jax.Array, model: Net, state: Any) -> Any:
        loss, grads = eqx.filter_value_and_grad(mean_loss)(model, x)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, state = optim.update(grads, state, params)
        return eqx.apply_updates(model, updates), state, loss

    model = Net(leaves)
    state = optim.init(eqx.filter(model, eqx.is_inexact_array))
    return Variant(lambda carry: step(BATCH, *carry)[:2], (model, state))


def compiled(optim: Any, leaves: int, steps: int = 1, pack_below: int = 0) -> Variant:
    step = eqx_ademamix.make_step(
        mean_loss, optim, steps_per_call=steps, pack_below=pack_below
    )
    batch = BATCH if steps == 1 else BATCHES
    return Variant(lambda carry: step(carry, batch)[0], step.init(Net(leaves)), steps)


def variants(leaves: int) -> dict[str, Variant]:
    theirs: Any = optax.contrib.ademamix(1e-3, **KWARGS)
    ours = eqx_ademamix.AdEMAMix(1e-3, **KWARGS)
    return {
        "by hand, `optax.contrib.ademamix`": by_hand(theirs, leaves),
        "by hand, `AdEMAMix`": by_hand(ours, leaves),
        "`make_step`, `optax.contrib.ademamix`": compiled(theirs, leaves),
        "`make_step`, `AdEMAMix`": compiled(ours, leaves),
        f"the same, `steps_per_call={SEVERAL}`": compiled(ours, leaves, SEVERAL),
        "the same, `pack_below=100`": compiled(ours, leaves, 1, 100),
        "the same, both": compiled(ours, leaves, SEVERAL, 100),
    }


def main(
    leaves: tuple[int, ...] = (4, 48, 200), repeats: int = 9, steps: int = 64
) -> None:
    """Measures and prints a table in Markdown.

    Args:
        leaves: how many leaves the model has, one table for each.
        repeats: how often each variant has its turn. The medians are printed.
        steps: the number of steps of a turn, a multiple of 8.
    """
    print(f"jax {jax.__version__}, optax {optax.__version__}, {jax.devices()[0]}")
    for count in leaves:
        cases = variants(count)
        for case in cases.values():
            case.compile()
        for _ in range(repeats):
            for case in cases.values():
                case.measure(steps)
        print(f"\n{count} leaves\n")
        print("| | host, us | ratio | wall, us | ratio | first call, s |")
        print("| --- | --: | --: | --: | --: | --: |")
        base = next(iter(cases.values()))
        for name, case in cases.items():
            print(row(name, case, base))


def row(name: str, case: Variant, base: Variant) -> str:
    cells = [name]
    for found, reference in ((case.host, base.host), (case.wall, base.wall)):
        seconds = statistics.median(found)
        ratio = seconds / statistics.median(reference)
        cells += [f"{1e6 * seconds:.0f}", f"{ratio:.2g}"]
    return f"| {' | '.join([*cells, f'{case.first:.1f}'])} |"


if __name__ == "__main__":
    tyro.cli(main)
