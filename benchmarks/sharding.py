"""What a step exchanges between devices, and the bytes of state on each device.

    python benchmarks/sharding.py    # one minute

Eight CPU devices, one weight of (1024, 4096) and one vector of 4096. The state is made
by `jax.jit(init)`. The numbers are read from shardings and from compiled programs, so
they do not depend on the machine. The compiled program is the update alone: gradients
are sharded like the parameters.
"""

import math
import os
import re
from typing import Any, NamedTuple


# JAX reads this when it first uses a device.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import eqx_ademamix
from eqx_ademamix import AdEMAMix, StateFormat


SHAPES = {"weight": (1024, 4096), "bias": (4096,)}
SIZE = sum(math.prod(shape) for shape in SHAPES.values())


class Layout(NamedTuple):
    """How the parameters are split, and over which axis their state is spread."""

    mesh: tuple[int, ...]
    weight: P
    bias: P
    zero1: bool = False


LAYOUTS = {
    "FSDP, rows": Layout((8,), P("a"), P("a")),
    "tensor-parallel, columns": Layout((8,), P(None, "a"), P("a")),
    "FSDP and tensor-parallel": Layout((4, 2), P("a", "b"), P("b")),
    "three axes": Layout((2, 2, 2), P(("a", "c"), "b"), P("b")),
    "replicated": Layout((8,), P(), P()),
    "ZeRO-1": Layout((8,), P(), P(), zero1=True),
}
OPTIMIZERS: dict[str, Any] = {
    "optax": optax.contrib.ademamix(1e-3),
    "float32": AdEMAMix(1e-3),
    "half": AdEMAMix(1e-3, state_format=StateFormat.half()),
    "compact": AdEMAMix(1e-3, state_format=StateFormat.compact()),
}


def measure(layout: Layout, optim: Any) -> str:
    names = tuple("abc"[: len(layout.mesh)])
    mesh = Mesh(np.array(jax.devices()).reshape(layout.mesh), names)
    shardings = {k: NamedSharding(mesh, getattr(layout, k)) for k in SHAPES}
    params = {k: jax.device_put(jnp.ones(SHAPES[k]), s) for k, s in shardings.items()}
    init: Any = jax.jit(lambda p: eqx_ademamix.init(optim, p))
    state = init(params)
    if layout.zero1:
        spread = eqx_ademamix.state_sharding(optim, params, mesh, axis="a")
        state = jax.device_put(state, spread)
    program = compiled(optim, params, state, shardings)
    _, after = program(params, state, params)
    now, then = bytes_per_device(state), bytes_per_device(after)
    each = (
        f"{now / 1e6:.1f}" if now == then else f"{now / 1e6:.1f}, then {then / 1e6:.1f}"
    )
    moved, count = exchanged(program.as_text())
    return (
        f"{each} MB, {count} of {moved / SIZE:.1f} B" if count else f"{each} MB, none"
    )


def compiled(optim: Any, params: Any, state: Any, shardings: Any) -> Any:
    """The update, which returns updates that are sharded like the parameters, and a
    state where XLA puts it."""

    def update(grads: Any, state: Any, params: Any) -> Any:
        updates, state = eqx_ademamix.update(optim, grads, state, params)
        return jax.lax.with_sharding_constraint(updates, shardings), state

    step: Any = jax.jit(update)
    return step.lower(params, state, params).compile()


def bytes_per_device(tree: Any) -> int:
    leaves = jtu.tree_leaves(tree)
    return sum(x.addressable_shards[0].data.nbytes for x in leaves)


_KINDS = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"


def exchanged(program: str) -> tuple[int, int]:
    """The bytes of the results of all collectives, and their number, without those that
    have only scalars."""
    results = re.findall(rf"= (.*?) (?:{_KINDS})[\w-]*\(", program)
    sizes = [sum(map(_bytes, re.findall(r"(\w+)\[(\d[\d,]*)\]", x))) for x in results]
    return sum(sizes), sum(size > 0 for size in sizes)


def _bytes(array: tuple[str, str]) -> int:
    dtype, shape = array
    bits = re.search(r"\d+", dtype)
    width = int(bits.group()) // 8 if bits else 1
    return width * math.prod(map(int, shape.split(",")))


def main() -> None:
    print(f"| layout | {' | '.join(OPTIMIZERS)} |")
    print("| --- |" + " --- |" * len(OPTIMIZERS))
    for name, layout in LAYOUTS.items():
        cells = [measure(layout, optim) for optim in OPTIMIZERS.values()]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
