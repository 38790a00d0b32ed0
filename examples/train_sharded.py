"""Trains the language model on several devices, in one process or in several.

To list the options, run `python examples/train_sharded.py --help`.
"""

import dataclasses
import json
import os
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from _config import Config as JobConfig
from _config import TextConfig
from _plot import Curve, plot_losses
from _text import DataError, Text, read_text, training_batch
from _text import validation_batches as held_out_batches
from _transformer import Transformer
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree
from tqdm import trange
from train_language_model import clip, make_optimizer, mean_loss, validation_loss

import eqx_ademamix


@dataclasses.dataclass(frozen=True)
class Config(TextConfig):
    """Trains a byte-level transformer on several devices."""

    shard: Literal["fsdp", "zero1"] = "fsdp"
    """What is split over the devices: the parameters and the optimizer state with
    `fsdp`, only the optimizer state with `zero1`."""
    compact: bool = False
    """Use four bytes of state per parameter instead of twelve. (Arrays with fewer than
    4096 entries keep twelve.)"""

    devices: int | None = None
    """Use this many CPU devices in each process, all on the cores of one machine.
    The default is every device that JAX finds."""
    coordinator: str | None = None
    """HOST:PORT of process 0, the same in every process."""
    processes: int | None = None
    """The number of processes."""
    process_id: int | None = None
    """The number of this process, from 0."""
    cluster: bool = False
    """Get the three options above from SLURM, Open MPI, or a TPU pod."""

    out: Path = Path("runs/sharded")
    """The folder for the losses and the plot."""
    steps: int = 400
    """The number of steps. Every schedule spans all of them."""
    learning_rate: float = 8e-3
    """The peak learning rate."""

    def __post_init__(self):
        super().__post_init__()
        address = (self.coordinator, self.processes, self.process_id)
        given = [option is not None for option in address]
        if any(given) and (self.cluster or not all(given)):
            raise ValueError(
                "coordinator, processes, and process_id must be given together, and "
                "without cluster"
            )
        if self.devices is not None and self.devices < 1:
            raise ValueError(f"devices is {self.devices}, but must be >= 1")
        self.job  # noqa: B018  (checks the other options)

    @property
    def job(self) -> JobConfig:
        """These options, converted to those of `train_language_model.py`."""
        names = {field.name for field in dataclasses.fields(JobConfig)}
        options = dataclasses.asdict(self).items()
        return JobConfig(**{name: value for name, value in options if name in names})


#
# Devices and processes
#


def start_jax(config: Config) -> None:
    """Chooses the devices and connects the processes.

    JAX looks for devices when it is first used, so this function must run first.
    """
    if config.devices is not None:
        flag = f"--xla_force_host_platform_device_count={config.devices}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
        jax.config.update("jax_platforms", "cpu")
    if config.cluster or config.coordinator is not None:
        # Old versions of JAX have no default for how CPUs communicate.
        gloo = os.environ.get("JAX_CPU_COLLECTIVES_IMPLEMENTATION", "gloo")
        jax.config.update("jax_cpu_collectives_implementation", gloo)
        jax.distributed.initialize(
            config.coordinator, config.processes, config.process_id
        )


def is_main_process() -> bool:
    return jax.process_index() == 0


class MeshError(Exception):
    """The devices cannot train this model together."""


def make_mesh(batch_size: int) -> Mesh:
    """One axis, with the devices of all processes."""
    devices = jax.devices()
    several = jax.process_count() > 1 and jax.local_device_count() > 1
    if several and jax.default_backend() == "cpu" and jax.__version_info__ < (0, 4, 33):
        raise MeshError(
            "Several CPU devices in each of several processes need JAX 0.4.33 or "
            f"newer, but this is {jax.__version__}. Use one device in each process."
        )
    if batch_size % len(devices):
        raise MeshError(
            f"batch_size is {batch_size}, but must be a multiple of {len(devices)}, "
            "the number of devices."
        )
    return Mesh(np.array(devices), ("data",))


def check_agreement(config: Config, text: Text, mesh: Mesh) -> None:
    """Every process must have the same options and the same text.

    In the first exchange, a process on a CPU waits only 30 seconds for the others, so
    this exchange comes before the programs that take long to compile.
    """
    options = {**config.job.settings, "shard": config.shard, "compact": config.compact}
    number = zlib.crc32(f"{options} {text.fingerprint}".encode()) >> 1
    numbers = put(np.full(mesh.size, number, np.int32), 0, mesh)
    if jax.jit(jnp.ptp)(numbers):
        raise MeshError("The processes have different options or different texts.")


#
# What goes where
#


def split(x: jax.ShapeDtypeStruct, mesh: Mesh) -> NamedSharding:
    """Splits an array along its first axis that the number of devices divides."""
    axes = [i for i, size in enumerate(x.shape) if size and size % mesh.size == 0]
    return NamedSharding(mesh, P(*[None] * axes[0], "data") if axes else P())


def place(tree: PyTree, shardings: PyTree) -> PyTree:
    """Puts the arrays of a tree where the shardings say, in compiled functions."""
    arrays, rest = eqx.partition(tree, eqx.is_array)
    return eqx.combine(jax.lax.with_sharding_constraint(arrays, shardings), rest)


def make_model(config: JobConfig, shard: str, mesh: Mesh) -> tuple[Transformer, PyTree]:
    """Makes every weight on the devices that keep it. Also returns the shardings."""

    def make() -> Transformer:
        key = jax.random.key(config.seed)
        sizes = config.width, config.depth, config.heads, config.context
        return Transformer(*sizes, key=key)

    is_shape = lambda x: isinstance(x, jax.ShapeDtypeStruct)
    shapes, rest = eqx.partition(eqx.filter_eval_shape(make), is_shape)
    everywhere = NamedSharding(mesh, P())
    sharding = lambda x: split(x, mesh) if shard == "fsdp" else everywhere
    shardings = jax.tree.map(sharding, shapes)
    make_arrays = lambda: eqx.filter(make(), eqx.is_array)
    arrays = jax.jit(make_arrays, out_shardings=shardings)()
    return eqx.combine(arrays, rest), shardings


def make_state(
    optim: eqx_ademamix.AdEMAMix, model: Transformer, mesh: Mesh
) -> tuple[PyTree, PyTree]:
    """Makes every moment on the devices that keep it. Also returns the shardings.

    The state of a split parameter is split the same way. The state of a parameter that
    is on all devices is split.
    """
    shardings = eqx_ademamix.state_sharding(optim, model, mesh, axis="data")
    make = lambda model: place(eqx_ademamix.init(optim, model), shardings)
    return eqx.filter_jit(make)(model), shardings


def put(x: np.ndarray, axis: int, mesh: Mesh) -> Array:
    """Splits an array. Every process copies only its share to its devices."""
    divisible = x.shape[axis] % mesh.size == 0
    sharding = NamedSharding(mesh, P(*[None] * axis, "data") if divisible else P())
    return jax.make_array_from_callback(x.shape, sharding, x.__getitem__)


def bytes_on_a_device(tree: PyTree) -> int:
    """The bytes that the fullest device of this process holds."""
    used: dict[Any, int] = {}
    for x in jax.tree.leaves(eqx.filter(tree, eqx.is_array)):
        for shard in x.addressable_shards:
            used[shard.device] = used.get(shard.device, 0) + shard.data.nbytes
    return max(used.values())


#
# A run
#


def make_train_step(
    optim: eqx_ademamix.AdEMAMix, shardings: tuple[PyTree, PyTree]
) -> Callable[..., Any]:
    """The main job's step, with results that are sharded like the arguments."""

    @eqx.filter_jit(donate="all-except-first")
    def train_step(windows: Any, model: Transformer, state: PyTree):
        loss, grads = eqx.filter_value_and_grad(mean_loss)(model, windows)
        grads, _ = eqx_ademamix.update(clip, grads, optax.EmptyState())
        updates, state = eqx_ademamix.update(optim, grads, state, model)
        model = eqx.apply_updates(model, updates)
        return *place((model, state), shardings), loss

    return train_step


def compiled(function: Any, *args: Any) -> Callable[..., Any]:
    return function.lower(*args).compile()


class Run:
    """A training run on the devices of a mesh."""

    def __init__(self, config: Config, text: Text, mesh: Mesh):
        self.config, self.text, self.mesh = config, text, mesh
        self.model, model_shardings = make_model(config.job, config.shard, mesh)
        optim = make_optimizer(config.job, self.model)
        assert isinstance(optim, eqx_ademamix.AdEMAMix)
        if config.compact:
            compact = eqx_ademamix.StateFormat.compact()
            optim = dataclasses.replace(optim, state_format=compact)
        self.state, state_shardings = make_state(optim, self.model, mesh)
        step = make_train_step(optim, (model_shardings, state_shardings))
        self.held_out = put(held_out_batches(text.validation, config.context), 1, mesh)
        # Everything is compiled before the first step.
        batch = self.batch(1)
        self.step = compiled(step, batch, self.model, self.state)
        self.validate = compiled(validation_loss, self.model, self.held_out)

    def batch(self, step: int) -> Array:
        """The same windows for any number of devices."""
        c = self.config
        windows = training_batch(self.text.train, c.batch_size, c.context, c.seed, step)
        return put(windows, 0, self.mesh)

    def train(self) -> Curve:
        steps = self.config.steps
        losses: list[float] = []
        validation: list[tuple[int, float]] = []
        name = f"AdEMAMix, {self.config.shard}"
        hide = not is_main_process()
        for step in trange(1, steps + 1, desc=name, disable=hide, mininterval=1):
            self.model, self.state, loss = self.step(
                self.batch(step), self.model, self.state
            )
            losses.append(float(loss))
            if step % max(1, steps // 8) == 0 or step == steps:
                loss = self.validate(self.model, self.held_out)
                validation.append((step, float(loss)))
        return Curve(name, losses, validation)


def describe(run: Run) -> str:
    """How many bytes each device holds."""
    rows = [f"devices: {run.mesh.size}, processes: {jax.process_count()}"]
    for name, tree in (("parameters", run.model), ("state", run.state)):
        here, total = bytes_on_a_device(tree), eqx_ademamix.state_bytes(tree)
        rows.append(f"{name:<10}  {here:,} of {total:,} bytes on each device")
    return "\n".join(rows)


def save(config: Config, run: Run, curve: Curve) -> None:
    """Writes the losses as numbers and as a plot."""
    config.out.mkdir(parents=True, exist_ok=True)
    result = {
        "devices": run.mesh.size,
        "processes": jax.process_count(),
        "bytes_on_a_device": {
            "parameters": bytes_on_a_device(run.model),
            "state": bytes_on_a_device(run.state),
        },
        "losses": curve.train,
        "validation_losses": curve.validation,
    }
    (config.out / "losses.json").write_text(json.dumps(result, indent=1))
    plot_losses(config.out / "loss.png", [curve])


def main() -> int:
    config = tyro.cli(Config, config=(tyro.conf.FlagCreatePairsOff,))
    try:
        text = read_text(config.data, config.context)
        start_jax(config)
        mesh = make_mesh(config.batch_size)
        check_agreement(config, text, mesh)
    except (DataError, MeshError) as error:
        print(error, file=sys.stderr)
        return 2
    run = Run(config, text, mesh)
    if is_main_process():
        print(f"{describe(run)}\n")
    curve = run.train()
    if is_main_process():
        save(config, run, curve)
        print(f"\nLosses and their plot saved to {config.out}")
        print(f"training loss:   {curve.train[-1]:.4f}")
        print(f"validation loss: {curve.validation[-1][1]:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
