"""Compares `save` and `load` with Equinox's functions and Orbax, in one run.

    python benchmarks/checkpoint.py    # ten minutes or less; into runs/checkpoint

All sides save and load the same state, in turn. Files are read soon after they are
written, so they come from the system's memory, not from the disk. Orbax is left out if
it is not installed:

    pip install orbax-checkpoint
"""

import importlib
import importlib.util
import json
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import tyro
from suite import machine, text
from suite.measure import InTurn, Sample, spread
from suite.trees import normal_tree, num_bytes

import eqx_ademamix


OURS = "`save` and `load`"
BYTES_PER_PARAMETER = 12  # of the state


class Side(NamedTuple):
    save: Callable[[Path, Any], None]
    load: Callable[[Path, Any], Any]


def save_with_equinox_and_flush(path: Path, tree: Any) -> None:
    with path.open("wb") as file:
        eqx.tree_serialise_leaves(file, tree)
        file.flush()
        os.fsync(file.fileno())


def save_with_orbax(path: Path, tree: Any) -> None:
    with importlib.import_module("orbax.checkpoint").StandardCheckpointer() as writer:
        writer.save(path, tree, force=True)


def load_with_orbax(path: Path, like: Any) -> Any:
    with importlib.import_module("orbax.checkpoint").StandardCheckpointer() as reader:
        return reader.restore(path, like)


SIDES = {
    OURS: Side(eqx_ademamix.save, eqx_ademamix.load),
    "Equinox": Side(eqx.tree_serialise_leaves, eqx.tree_deserialise_leaves),
    "Equinox, flushed": Side(save_with_equinox_and_flush, eqx.tree_deserialise_leaves),
    "Orbax": Side(save_with_orbax, load_with_orbax),
}


def sides() -> list[str]:
    is_there = importlib.util.find_spec("orbax.checkpoint") is not None
    return [name for name in SIDES if is_there or name != "Orbax"]


def make_state(parameters: int, leaves: int) -> Any:
    """A state whose moments have random bits, since Orbax compresses."""
    params = normal_tree(parameters, leaves, jnp.float32)
    state = eqx_ademamix.init(eqx_ademamix.AdEMAMix(1e-3), params)
    copies = [jax.tree.map(jnp.copy, params) for _ in range(3)]
    return eqx.tree_at(lambda state: (state.m1, state.m2, state.nu), state, copies)


def template(parameters: int, leaves: int) -> Any:
    """What to load, without allocating memory. Orbax needs the devices."""
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    structs = eqx.filter_eval_shape(make_state, parameters, leaves)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), structs
    )


#
# Time
#


def measure(folder: Path, parameters: int, leaves: int, rounds: int) -> dict[str, Any]:
    """The seconds of each side."""
    tree, like = make_state(parameters, leaves), template(parameters, leaves)

    def sampler(name: str) -> Callable[[], Sample]:
        def sample() -> Sample:
            times = [time.perf_counter()]
            SIDES[name].save(file_of(folder, name), tree)
            times.append(time.perf_counter())
            loaded = jax.block_until_ready(
                SIDES[name].load(file_of(folder, name), like)
            )
            times.append(time.perf_counter())
            assert eqx.tree_equal(loaded, tree)
            return {"save": times[1] - times[0], "load": times[2] - times[1]}

        return sample

    turns = InTurn({name: sampler(name) for name in sides()})
    for _ in range(rounds):
        turns()
    return {
        name: {key: spread([x[key] for x in found]) for key in ("save", "load")}
        for name, found in turns.samples.items()
    }


def file_of(folder: Path, name: str) -> Path:
    return folder / f"{list(SIDES).index(name)}.checkpoint"


#
# Memory
#


def memory_of(entry: str) -> int:
    """The bytes of this process. `RssAnon` is its private memory, without the files
    that it maps into memory, which the system can reclaim. `VmHWM` is the peak of
    both."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(x.split()[1]) for x in lines if x.startswith(entry)) * 1024


def peak_of_load(folder: Path, name: str, parameters: int, leaves: int) -> Sample:
    """The most bytes by which the memory of a process grows when it loads."""
    like = template(parameters, leaves)
    jax.block_until_ready(jnp.ones(1) + 1)  # starts the backend
    before, before_all = memory_of("RssAnon"), memory_of("VmHWM")
    found, is_done = [before], threading.Event()

    def watch() -> None:
        while not is_done.wait(0.001):
            found.append(memory_of("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    jax.block_until_ready(SIDES[name].load(file_of(folder, name), like))
    is_done.set()
    watcher.join()
    return {
        "own": max(found) - before,
        "with files": memory_of("VmHWM") - before_all,
    }


def measure_memory(folder: Path, name: str, *size: int) -> Sample:
    """In a new process, since the peak of a process never falls."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(peak_of_load, (folder, name, *size))


#
# The report
#


COLUMNS = (
    "",
    "save",
    "load",
    "memory to load, in copies of the state",
    "with mapped files",
)


def report(found: dict[str, Any]) -> str:
    rows = [row(name, found) for name in found["times"]]
    title = (
        f"{found['bytes'] / 1e9:.3g} GB of state in {text.leaves(found['leaves'])} for "
        f"each moment, medians of {found['rounds']} rounds, load average "
        f"{found['load']:.1f}."
    )
    facts = text.table(("measured on", ""), list(found["machine"].items()))
    return "\n\n".join([title, text.table(COLUMNS, rows), facts])


def row(name: str, found: dict[str, Any]) -> list[str]:
    times, memory = found["times"][name], found["memory"].get(name)
    copies = ["-", "-"]
    if memory is not None:
        copies = [f"{memory[x] / found['bytes']:.2f}" for x in ("own", "with files")]
    return [
        name,
        *(text.seconds(times[x]["median"]) for x in ("save", "load")),
        *copies,
    ]


def main(
    gigabytes: float = 1.0,
    leaves: int = 64,
    rounds: int = 5,
    folder: Path | None = None,
    out: Path = Path("runs/checkpoint"),
) -> None:
    """Measures, prints a report, and writes `checkpoint.json` and `checkpoint.md`.

    Args: gigabytes: the size of the state, of float32 numbers. leaves: the number of
        leaves that each moment is split into. rounds: how many times all sides are
        measured in turn. folder: a folder on the disk to measure. Default: where
        temporary files are. out: the folder for the results.
    """
    load = os.getloadavg()[0]
    size = int(gigabytes * 1e9) // BYTES_PER_PARAMETER, leaves
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as files:
        times = measure(Path(files), *size, rounds)
        memory = {}
        if Path("/proc/self/status").exists():
            memory = {name: measure_memory(Path(files), name, *size) for name in times}
    found = {
        "machine": machine.facts(),
        "bytes": num_bytes(template(*size)),
        "leaves": leaves,
        "rounds": rounds,
        "load": load,
        "times": times,
        "memory": memory,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "checkpoint.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "checkpoint.md").write_text(report(found) + "\n")
    print(report(found))


if __name__ == "__main__":
    tyro.cli(main)
