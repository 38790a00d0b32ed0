"""Accumulates gradients on several devices and exchanges them once, with ZeRO-1.

To list the options, run `python examples/accumulate_sharded.py --help`.
"""

import dataclasses
import functools as ft
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from _digits import Batch, batch, mean_loss, read_digits
from _plot import save_figure, smooth
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree
from matplotlib.figure import Figure

import eqx_ademamix


@dataclasses.dataclass(frozen=True)
class Config:
    """Classifies handwritten digits on several devices that hold the same model and
    split the optimizer state."""

    steps: int = 400
    """The number of steps. Every schedule spans all of them."""
    devices: int = 8
    """The number of CPU devices, all on the cores of this machine."""
    accumulate: int = 4
    """The number of batches whose gradients are added up in a step."""
    batch_size: int = 64
    """The number of images in each of these batches, over all devices."""
    out: Path = Path("runs/accumulate")
    """The folder for the plot."""

    def __post_init__(self):
        if self.batch_size % self.devices:
            raise ValueError(
                f"batch_size is {self.batch_size}, but must be a multiple of devices "
                f"({self.devices})"
            )


Gradient: TypeAlias = Callable[[eqx.nn.MLP, Batch], tuple[Array, PyTree]]
value_and_grad = eqx.filter_value_and_grad(mean_loss)


#
# Three ways to add up gradients
#


def mean_over_batches(model: eqx.nn.MLP, batches: Batch) -> tuple[Array, PyTree]:
    """The mean loss and gradient, one batch at a time. If the batches are split over
    devices, XLA adds up the gradients of all devices for each batch."""

    def add(total: PyTree, batch: Batch) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, value_and_grad(model, batch)), None

    shapes = eqx.filter_eval_shape(value_and_grad, model, first(batches))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, batches)
    return jax.tree.map(lambda x: x / len(batches[1]), total)


def first(batches: Batch) -> Batch:
    images, labels = batches
    return images[0], labels[0]


def mean_once(mesh: Mesh) -> Gradient:
    """The same, but each device adds up its own gradients. They are exchanged once."""

    def mean(model: eqx.nn.MLP, batches: Batch) -> tuple[Array, PyTree]:
        arrays, static = eqx.partition(model, eqx.is_array)

        def on_device(arrays: PyTree, batches: Batch) -> tuple[Array, PyTree]:
            own = mean_over_batches(eqx.combine(arrays, static), batches)
            return jax.lax.pmean(own, "data")

        split = P(), P(None, "data")
        return shard_map(on_device, mesh=mesh, in_specs=split, out_specs=P())(
            arrays, batches
        )

    return mean


if hasattr(jax, "shard_map"):
    shard_map: Any = ft.partial(jax.shard_map, check_vma=False)
else:  # before JAX 0.6
    from jax.experimental import shard_map as old

    shard_map: Any = ft.partial(old.shard_map, check_rep=False)


#
# A run
#


def make_optimizer(config: Config, model: eqx.nn.MLP) -> eqx_ademamix.AdEMAMix:
    return eqx_ademamix.AdEMAMix(
        optax.cosine_decay_schedule(1e-3, config.steps),
        b3=eqx_ademamix.beta3_scheduler(0.999, 0.9, warmup=config.steps),
        alpha=eqx_ademamix.alpha_scheduler(5.0, warmup=config.steps),
        weight_decay=0.1,
        weight_decay_mask=eqx_ademamix.decay_mask(model),
        state_format=eqx_ademamix.StateFormat.compact(),
    )


def place(tree: PyTree, shardings: PyTree) -> PyTree:
    """Puts the arrays of a tree where the shardings say, even in compiled functions."""
    arrays, rest = eqx.partition(tree, eqx.is_array)
    return eqx.combine(jax.lax.with_sharding_constraint(arrays, shardings), rest)


def train(config: Config, mesh: Mesh, gradient: Gradient) -> tuple[list[float], str]:
    """Returns the loss of each step, and the compiled program as text."""
    everywhere = NamedSharding(mesh, P())
    model = eqx.nn.MLP(64, 10, width_size=256, depth=2, key=jax.random.key(0))
    optim = make_optimizer(config, model)
    model = place(model, everywhere)
    shardings = eqx_ademamix.state_sharding(optim, model, mesh, axis="data")
    state = jax.device_put(eqx_ademamix.init(optim, model), shardings)

    def update(batches: Batch, model: eqx.nn.MLP, state: PyTree):
        loss, grads = gradient(model, batches)
        updates, state = eqx_ademamix.update(optim, grads, state, model)
        model = place(eqx.apply_updates(model, updates), everywhere)
        return model, place(state, shardings), loss

    along_batch = NamedSharding(mesh, P(None, "data"))
    digits = read_digits()
    data = [
        jax.device_put(stacked(digits.train, config, i), along_batch)
        for i in range(config.steps)
    ]
    step: Any = eqx.filter_jit(update, donate="all-except-first")
    compiled = step.lower(data[0], model, state).compile()
    losses: list[float] = []
    for batches in data:
        model, state, loss = compiled(batches, model, state)
        losses.append(float(loss))
    return losses, compiled.compiled.as_text()


def stacked(data: Batch, config: Config, step: int) -> Batch:
    """The batches of one step."""
    steps = range(step * config.accumulate, (step + 1) * config.accumulate)
    batches = [batch(data, config.batch_size, 0, i) for i in steps]
    images, labels = zip(*batches, strict=True)
    return jnp.stack(images), jnp.stack(labels)


def count_exchanges(program: str) -> tuple[int, int]:
    """The arrays of more than one number that are summed over devices: inside and
    outside loops."""
    entry = re.search(r"^ENTRY .*?^}", program, re.MULTILINE | re.DOTALL)
    assert entry is not None
    outside = count_sums(entry.group())
    return count_sums(program) - outside, outside


def count_sums(text: str) -> int:
    results = re.findall(r"= (.*?) (?:all-reduce|reduce-scatter)[\w-]*\(", text)
    return sum(len(re.findall(r"\w+\[\d[\d,]*\]", result)) for result in results)


def main() -> None:
    config = tyro.cli(Config)
    # JAX looks for devices when it is first used.
    flag = f"--xla_force_host_platform_device_count={config.devices}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
    mesh = Mesh(np.array(jax.devices("cpu")[: config.devices]), ("data",))

    model = eqx.nn.MLP(64, 10, width_size=256, depth=2, key=jax.random.key(0))
    optim = make_optimizer(config, model)
    print(eqx_ademamix.sharding_report(optim, model, mesh, axis="data"), "\n")

    print("gradients are summed      inside the loop  after it  last loss")
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    ways = {"for each batch": mean_over_batches, "once": mean_once(mesh)}
    for (name, gradient), width in zip(ways.items(), (4, 1.2), strict=True):
        losses, program = train(config, mesh, gradient)
        inside, after = count_exchanges(program)
        print(f"{name:<24}  {inside:>15}  {after:>8}  {losses[-1]:>9.6f}")
        axes.semilogy(*smooth(losses), linewidth=width, label=f"summed {name}")
    axes.set(xlabel="step", ylabel="training loss (nats)")
    axes.legend(frameon=False)
    path = config.out / "accumulate.png"
    save_figure(figure, path)
    print(f"\nPlot saved to {path}")


if __name__ == "__main__":
    main()
