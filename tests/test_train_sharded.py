"""`examples/train_sharded.py` gives the main job's losses, whatever the number of
devices and processes. The processes are real, and connect over the loopback interface.
"""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from .test_examples import EXAMPLES, example


STEPS = 50
SIZES = {"width": 16, "depth": 1, "heads": 2, "context": 16, "batch_size": 16}
OPTIONS = [
    word
    for name, value in {"steps": STEPS, **SIZES}.items()
    for word in (f"--{name.replace('_', '-')}", str(value))
]
TIMEOUT = 600  # seconds, far more than the processes take
ATTEMPTS = 5  # another process can take a port before ours does
TAKEN = ("Address already in use", "Failed to add port to server")


@pytest.fixture(scope="module", autouse=True)
def as_users_run_it() -> Iterator[None]:
    """Uses JAX's default promotion."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        yield example("train_sharded", patch)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.py"
    path.write_bytes((EXAMPLES / "_text.py").read_bytes())
    return path


@pytest.fixture(scope="module")
def main_losses(data: Path) -> np.ndarray:
    """The losses of `train_language_model.py`, which uses one device."""
    with pytest.MonkeyPatch.context() as patch:
        job = example("train_language_model", patch)
        config = job.Config(data=data, steps=STEPS, **SIZES)
        run = job.Run(config, job.read_text(data, config.context))
    for step in range(1, STEPS + 1):
        run.step(step)
    return np.array([float(loss) for loss in run.train_losses])


def make_run(script: ModuleType, data: Path, devices: int, **options: Any) -> Any:
    config = script.Config(**{"data": data, "steps": STEPS, **SIZES, **options})
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
    return script.Run(config, script.read_text(data, config.context), mesh)


#
# One process
#


def split_bytes(tree: Any, parts: int) -> int:
    """The bytes in each part if every array is split that has a divisible axis."""
    total = 0
    for x in jax.tree.leaves(tree):
        if isinstance(x, jax.Array):
            divisible = any(n and n % parts == 0 for n in x.shape)
            total += x.nbytes // parts if divisible else x.nbytes
    return total


@pytest.mark.parametrize("devices, shard", ((8, "fsdp"), (8, "zero1"), (1, "zero1")))
def test_devices_do_not_change_the_losses(script, data, main_losses, devices, shard):
    run = make_run(script, data, devices, shard=shard)
    before = [x.sharding for x in jax.tree.leaves(run.state)]
    curve = run.train()
    assert np.max(np.abs(curve.train - main_losses)) < 1e-4
    assert curve.validation[-1][0] == STEPS
    # After the steps, everything is still where it was.
    for x, sharding in zip(jax.tree.leaves(run.state), before, strict=True):
        assert x.sharding.is_equivalent_to(sharding, x.ndim)
    parts = devices if shard == "fsdp" else 1
    assert script.bytes_on_a_device(run.model) == split_bytes(run.model, parts)
    assert script.bytes_on_a_device(run.state) == split_bytes(run.state, devices)


@pytest.fixture(scope="module")
def compact_alone(script, data) -> tuple[int, np.ndarray]:
    """The bytes of state in the compact format, and the losses, of one device."""
    run = make_run(script, data, 1, compact=True, steps=8)
    return script.bytes_on_a_device(run.state), np.array(run.train().train)


@pytest.mark.parametrize("shard", ("fsdp", "zero1"))
def test_compact_state_is_split_too(script, data, compact_alone, shard):
    size, losses = compact_alone
    run = make_run(script, data, 8, shard=shard, compact=True, steps=8)
    assert size < 2 * script.eqx_ademamix.state_bytes(run.model)
    assert script.bytes_on_a_device(run.state) < 0.2 * size
    assert np.max(np.abs(run.train().train - losses)) < 1e-4


def test_a_process_reads_only_its_share(script, monkeypatch):
    """Of the windows, only those that its devices keep are read."""
    read: list[Any] = []

    def from_callback(shape: Any, sharding: Any, callback: Callable[[Any], Any]):
        """As in the second of four processes with two devices each."""
        indices = sharding.devices_indices_map(shape)
        mine = [indices[device] for device in jax.devices()[2:4]]
        read.extend(callback(index) for index in mine)

    monkeypatch.setattr(script.jax, "make_array_from_callback", from_callback)
    windows = np.arange(16 * 3, dtype=np.uint8).reshape(16, 3)
    script.put(windows, 0, Mesh(np.array(jax.devices()), ("data",)))
    assert np.concatenate(read).tolist() == windows[4:8].tolist()


def test_windows_that_cannot_be_split_are_everywhere(script):
    mesh = Mesh(np.array(jax.devices()), ("data",))
    windows = np.arange(7 * 3, dtype=np.uint8).reshape(7, 3)
    array = script.put(windows, 0, mesh)
    assert array.sharding.is_fully_replicated and len(array.sharding.device_set) == 8
    assert np.array_equal(array, windows)


def test_the_batch_must_be_divisible(script):
    message = "batch_size is 12, but must be a multiple of 8, the number of devices."
    with pytest.raises(script.MeshError, match=re.escape(message)):
        script.make_mesh(12)
    assert script.make_mesh(16).shape == {"data": 8}


def test_processes_must_agree(script, data, monkeypatch):
    text = script.read_text(data, 16)
    sent: list[Any] = []

    def put(numbers: Any, axis: int, mesh: Mesh) -> Any:
        """What eight processes send, of which the last has another text."""
        sent.append(numbers)
        return numbers + np.arange(8) // 7

    mesh = script.make_mesh(16)
    script.check_agreement(script.Config(), text, mesh)
    monkeypatch.setattr(script, "put", put)
    for config in (script.Config(), script.Config(seed=1), script.Config(compact=True)):
        with pytest.raises(script.MeshError, match="different options or different"):
            script.check_agreement(config, text, mesh)
    assert len({int(numbers[0]) for numbers in sent}) == 3


def test_old_versions_need_one_device_in_each_process(script, monkeypatch):
    monkeypatch.setattr(script.jax, "process_count", lambda: 2)
    monkeypatch.setattr(script.jax, "__version__", "0.4.32")
    monkeypatch.setattr(script.jax, "__version_info__", (0, 4, 32))
    message = (
        "Several CPU devices in each of several processes need JAX 0.4.33 or newer, "
        "but this is 0.4.32. Use one device in each process."
    )
    with pytest.raises(script.MeshError, match=re.escape(message)):
        script.make_mesh(16)


@pytest.mark.parametrize(
    "options, message",
    (
        ({"coordinator": "host:1"}, "must be given together"),
        ({"processes": 2, "process_id": 0}, "must be given together"),
        (
            {"coordinator": "h:1", "processes": 2, "process_id": 0, "cluster": True},
            "and without cluster",
        ),
        ({"devices": 0}, "devices is 0, but must be >= 1"),
        ({"steps": 0}, "steps is 0, but must be >= 1"),
        ({"heads": 3}, "width 64 is not a multiple of heads 3"),
    ),
)
def test_impossible_options(script, options, message):
    with pytest.raises(ValueError, match=message):
        script.Config(**options)


#
# Scripts, in processes of their own
#


def environment(flags: str = "", **extra: str) -> dict[str, str]:
    """The environment of a user: without the test suite's devices, and without proxies,
    through which processes would look for each other.

    On a busy machine, a device may wait for minutes for the others.
    """
    tools = ("XLA_", "JAX_", "SLURM_")
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(tools) and not name.lower().endswith("_proxy")
    }
    if jax.__version_info__ >= (0, 10):  # older versions may not know these flags
        for name in ("collective", "collective_call_terminate"):
            flags += f" --xla_cpu_{name}_timeout_seconds={TIMEOUT}"
    return {**kept, "XLA_FLAGS": flags, **extra}


def run_together(
    out: Path, *runs: tuple[list[str], dict[str, str]]
) -> list[SimpleNamespace]:
    """Runs the script once for each pair of options and environment, at the same time.

    If one of them fails, the others would wait for it, so all of them are ended.
    """
    out.mkdir(parents=True, exist_ok=True)
    files = [out / f"output{i}.txt" for i in range(len(runs))]
    processes: list[subprocess.Popen[bytes]] = []
    with ThreadPoolExecutor(len(runs)) as pool:
        try:
            for (options, env), file in zip(runs, files, strict=True):
                command = [sys.executable, str(EXAMPLES / "train_sharded.py"), *options]
                with file.open("wb") as output:
                    processes.append(
                        subprocess.Popen(
                            [*command, "--out", str(out)],
                            stdout=output,
                            stderr=subprocess.STDOUT,
                            env=env,
                            start_new_session=True,
                        )
                    )
            futures = [pool.submit(succeed, process) for process in processes]
            wait(futures, timeout=TIMEOUT, return_when=FIRST_EXCEPTION)
        finally:
            for process in processes:
                end(process)
    return [
        SimpleNamespace(code=process.returncode, output=file.read_text())
        for process, file in zip(processes, files, strict=True)
    ]


def succeed(process: subprocess.Popen[bytes]) -> None:
    if process.wait():
        raise subprocess.CalledProcessError(process.returncode, process.args)


def end(process: subprocess.Popen[bytes]) -> None:
    """Kills a process and its children, if it has not ended."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def free_port(candidates: Iterator[int]) -> int:
    for port in candidates:
        with socket.socket() as server:
            try:
                server.bind(("127.0.0.1", port))
            except OSError:
                continue
            return server.getsockname()[1]
    raise OSError("there is no free port")


def run_on_free_port(
    out: Path, make_runs: Callable[[int], list[Any]], candidates: range
) -> list[SimpleNamespace]:
    """Tries another port if a process has taken the one that was free."""
    ended: list[SimpleNamespace] = []
    for _ in range(ATTEMPTS):
        shuffled = random.sample(candidates, len(candidates))
        ended = run_together(out, *make_runs(free_port(iter(shuffled))))
        if not any(text in ended[0].output for text in TAKEN):
            break
    return ended


def losses(out: Path) -> dict[str, Any]:
    return json.loads((out / "losses.json").read_text())


def check(
    out: Path, ended: list[SimpleNamespace], main_losses: np.ndarray, **expected: int
) -> None:
    """The script has succeeded with the losses of the main job."""
    outputs = "\n\n".join(process.output for process in ended)
    assert [process.code for process in ended] == [0] * len(ended), outputs
    result = losses(out)
    assert {name: result[name] for name in expected} == expected
    assert len(result["losses"]) == STEPS
    assert np.max(np.abs(result["losses"] - main_losses)) < 1e-4
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    # Only the first process prints anything of its own.
    printed = ["validation loss: " in process.output for process in ended]
    assert printed == [True] + [False] * (len(ended) - 1)
    progress = ["50/50" in process.output for process in ended]
    assert progress == printed


def test_eight_devices_on_one_machine(data, tmp_path, main_losses):
    """`--devices` overrides a flag of the user and keeps the others."""
    dump = tmp_path / "dump"
    flags = (
        "--xla_force_host_platform_device_count=3 "
        f"--xla_dump_to={dump} --xla_dump_hlo_module_re=train_step"
    )
    options = ["--data", str(data), *OPTIONS, "--devices", "8"]
    out = tmp_path / "out"
    ended = run_together(out, (options, environment(flags)))
    check(out, ended, main_losses, devices=8, processes=1)
    assert list(dump.iterdir())
    printed = ended[0].output
    assert printed.startswith("devices: 8, processes: 1\n")
    row = r"^(\w+) +([\d,]+) of ([\d,]+) bytes on each device$"
    rows = re.findall(row, printed, re.MULTILINE)
    sizes = {name: int(size.replace(",", "")) for name, size, _ in rows}
    assert sizes == losses(out)["bytes_on_a_device"]
    for _, here, total in rows:
        assert 8 * int(here.replace(",", "")) <= 1.01 * int(total.replace(",", ""))


def test_two_processes(data, tmp_path, main_losses):
    """With two devices each, where JAX can do that."""
    devices = 2 if jax.__version_info__ >= (0, 4, 33) else 1

    def runs(port: int) -> list[Any]:
        options = ["--data", str(data), *OPTIONS, "--devices", str(devices)]
        address = ["--coordinator", f"127.0.0.1:{port}", "--processes", "2"]
        return [
            ([*options, *address, "--process-id", str(i)], environment())
            for i in range(2)
        ]

    ended = run_on_free_port(tmp_path, runs, range(20_000, 30_000))
    check(tmp_path, ended, main_losses, devices=2 * devices, processes=2)


def test_two_processes_that_slurm_starts(data, tmp_path, main_losses):
    """JAX reads SLURM's variables, and derives the port from the number of the job."""
    first = 2**16 - 2**12

    def runs(port: int) -> list[Any]:
        options = ["--data", str(data), *OPTIONS, "--shard", "zero1", "--cluster"]
        job = {
            "SLURM_JOB_ID": str(port - first),
            "SLURM_STEP_NODELIST": "127.0.0.1",
            "SLURM_STEP_NUM_NODES": "1",
            "SLURM_NTASKS": "2",
        }
        tasks = [{"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(2)]
        return [(options, environment(**job, **task)) for task in tasks]

    ended = run_on_free_port(tmp_path, runs, range(first, 2**16))
    check(tmp_path, ended, main_losses, devices=2, processes=2)
