"""Checkpoints in a world of damaged files, full disks and killed processes."""

import contextlib
import json
import os
import pathlib
import random
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import save_file

from eqx_ademamix import AdEMAMix, CheckpointError, init, load, save
from eqx_ademamix._checkpoint import file as files

from .helpers import COMPACT
from .test_error_messages import is_on_page


ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "run.safetensors"


def refuses(
    path: pathlib.Path, like: Any, text: str = "damaged|is a safetensors file"
) -> None:
    with pytest.raises(CheckpointError, match=text) as error:
        load(path, like)
    assert str(path) in str(error.value) and is_on_page(str(error.value))


#
# Damaged files
#

OPTIM = AdEMAMix(1e-3, state_format=COMPACT)
PARAMS = {
    "w": jnp.arange(512.0).reshape(2, 256),
    "b": jnp.ones(3),
    "empty": jnp.ones(0),
}
TREE = PARAMS, init(OPTIM, PARAMS), jax.random.key(0), 3


def contents(path: pathlib.Path) -> bytes:
    save(path, TREE, optim=OPTIM)
    return path.read_bytes()


def test_flipped_bits(path: pathlib.Path):
    """500 random ones, and each bit of the first bytes and of the padding."""
    good, generator = contents(path), random.Random(0)
    header = 8 + int.from_bytes(good[:8], "little")
    bits = {*generator.sample(range(8 * len(good)), 500), *range(128)}
    bits |= set(range(8 * header - 64, 8 * header + 8))
    for bit in sorted(bits):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad)
        refuses(path, TREE)
    path.write_bytes(good)
    load(path, TREE, optim=OPTIM)


def test_truncations(path: pathlib.Path):
    good = contents(path)
    lengths = {*random.Random(1).sample(range(len(good)), 100), 0, 7, 8, len(good) - 1}
    for length in sorted(lengths):
        path.write_bytes(good[:length])
        refuses(path, TREE, "is damaged or not a checkpoint")


@pytest.mark.parametrize("more", (b"\0", b" " * 8, b"x" * 1000, None), ids=str)
def test_trailing_bytes(more: bytes | None, path: pathlib.Path):
    good = contents(path)
    path.write_bytes(good + (good if more is None else more))
    refuses(path, TREE, "is damaged or not a checkpoint")


def test_two_tensors_that_changed_places(path: pathlib.Path):
    """Both are whole, and the sum of all bytes is the same."""
    tree = [jnp.zeros(4), jnp.ones(4)]
    save(path, tree)
    good = path.read_bytes()
    path.write_bytes(good[:-32] + good[-16:] + good[-32:-16])
    refuses(path, tree, r"the checksum of \[0\] is wrong")


def edited(path: pathlib.Path, **metadata: Any) -> None:
    """Changes the metadata of a file, and the checksum of the header with them."""
    good = path.read_bytes()
    size = 8 + int.from_bytes(good[:8], "little")
    header = json.loads(good[8:size])
    header["__metadata__"].update(metadata, header_crc32="0" * 8)
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    sealed = files._sealed(len(head).to_bytes(8, "little") + head)
    path.write_bytes(sealed + good[size:])


@pytest.mark.parametrize(
    "metadata,text",
    (
        (
            {"format_version": "2"},
            "has version 2 of the format, but this package reads",
        ),
        ({"format_version": "none"}, "the version of the format is not a number"),
        ({"arrays": "[]"}, "the metadata cannot be read"),
        ({"arrays": "{"}, "the metadata cannot be read"),
        ({"arrays": "{}"}, "the metadata does not fit the tensors"),
        ({"scalars": "3"}, "the metadata cannot be read"),
        (
            {"format": "pt"},
            "is a safetensors file, but `eqx_ademamix.save` did not write",
        ),
    ),
)
def test_forged_metadata(metadata: dict[str, str], text: str, path: pathlib.Path):
    """With the right checksum."""
    contents(path)
    edited(path, **metadata)
    refuses(path, TREE, text)


def test_a_forged_dtype(path: pathlib.Path):
    save(path, jnp.ones(3))
    arrays = {
        "(the tree itself)": {"dtype": "int8", "shape": [12], "crc32": "e43cd4d9"}
    }
    edited(path, arrays=json.dumps(arrays))
    refuses(path, jnp.ones(12, jnp.int8), "is damaged: ")


def test_edits_of_this_kind_are_read(path: pathlib.Path):
    """So it was the edit that was refused, not how it was made."""
    contents(path)
    edited(path, note="hello")
    load(path, TREE, optim=OPTIM)


def test_other_files(path: pathlib.Path):
    refuses(path, TREE, "There is no checkpoint")
    refuses(path.parent / "missing" / "x", TREE, "There is no checkpoint")
    refuses(path.parent, TREE, "is not a file")
    np.savez(path.parent / "zip", x=np.ones(3))
    refuses(path.parent / "zip.npz", TREE, "is damaged or not a checkpoint")
    for content in (b"", b"hello", b"\0" * 100, b"\x80\x04" * 100, os.urandom(1000)):
        path.write_bytes(content)
        refuses(path, TREE, "is damaged or not a checkpoint")
    for metadata in (None, {"format": "pt"}):
        save_file({"x": np.ones(3)}, path, metadata=metadata)
        refuses(path, TREE, "is a safetensors file, but `eqx_ademamix.save` did not")


def test_nothing_in_the_file_is_executed(path: pathlib.Path):
    save(path, {"a": "__import__('os').abort()"}, optim=optax.sgd(1e-3))
    refuses(path, {"a": "x"}, r"the str \"__import__\('os'\)\.abort\(\)\"")


#
# Writing
#


def names(folder: pathlib.Path) -> list[str]:
    return sorted(x.name for x in folder.iterdir())


def test_order_of_writing(path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    """The file is flushed, then renamed, and then the folders are flushed."""
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def log_fsync(descriptor: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        size = os.fstat(descriptor).st_size
        events.append("folder" if is_folder else f"file of {size} bytes")
        fsync(descriptor)

    def log_replace(source: Any, target: Any) -> None:
        events.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", log_fsync)
    monkeypatch.setattr(os, "replace", log_replace)
    save(path, TREE)
    written = f"file of {path.stat().st_size} bytes"
    assert events == [written, "rename", "folder"]
    events.clear()
    save(path.parent / "a" / "b" / "run.safetensors", TREE)
    assert events == [written, "rename", "folder", "folder", "folder"]
    assert names(path.parent) == ["a", "run.safetensors"]


class Interruption(BaseException):
    pass


@pytest.mark.parametrize(
    "error", (Interruption, KeyboardInterrupt, RuntimeError, OSError)
)
@pytest.mark.parametrize("place", ("checksum", "flock", "fsync", "replace"))
def test_exceptions_leave_the_old_file(
    error: type[BaseException],
    place: str,
    path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
):
    save(path, jnp.zeros(3))

    def fail(*args: Any) -> Any:
        raise error("stop")

    module = {"checksum": files, "flock": files.fcntl}.get(place, os)
    with monkeypatch.context() as patch:
        patch.setattr(module, place, fail)
        is_harmless = place == "flock" and error is OSError  # not all disks have locks
        expected = contextlib.nullcontext() if is_harmless else pytest.raises(error)
        with expected:
            save(path, jnp.zeros(3) if is_harmless else jnp.ones(3))
    assert names(path.parent) == [path.name]
    assert (load(path, jnp.ones(3)) == 0).all()


def test_the_error_names_the_file_and_the_reason(path: pathlib.Path):
    path.write_text("")
    for bad in (path / "x.safetensors", path / "a" / "x.safetensors"):
        text = r"Could not write .*(File exists|Not a directory)"
        with pytest.raises(OSError, match=text) as error:
            save(bad, TREE)
        assert str(bad) in str(error.value) and is_on_page(str(error.value))
    folder = path.parent / "folder"
    folder.mkdir()
    with pytest.raises(OSError, match=r"Could not write .*Is a directory"):
        save(folder, TREE)
    assert names(path.parent) == ["folder", path.name]


def test_missing_folders_are_made(path: pathlib.Path):
    deep = path.parent / "a" / "b" / "c.safetensors"
    save(str(deep), TREE)
    load(str(deep), TREE)


def test_links_are_followed(path: pathlib.Path):
    """As if the file had been opened: the link stays a link."""
    other = path.parent / "disk"
    other.mkdir()
    path.symlink_to(other / "real.safetensors")
    for _ in range(2):
        save(path, TREE)
        assert path.is_symlink() and names(other) == ["real.safetensors"]
    load(path, TREE)


def test_permissions_are_those_of_a_new_file(path: pathlib.Path):
    (path.parent / "new").touch()
    save(path, TREE)
    assert path.stat().st_mode == (path.parent / "new").stat().st_mode


def test_relative_paths_and_odd_names(path: pathlib.Path, monkeypatch: Any):
    monkeypatch.chdir(path.parent)
    for name in ("x", "[a] *?.é", "-", ".hidden", "a.tmp"):
        save(name, TREE)
        load(pathlib.Path(name), TREE)
    assert len(names(path.parent)) == 5


def test_abandoned_files_are_removed(path: pathlib.Path):
    """Those of writers that were killed, but not those of living ones or of others."""
    folder = path.parent
    abandoned = folder / f".{path.name}.0123abcd.tmp"
    others = [f".{path.name}.tmp", f".{path.name}.0123abcg.tmp", ".other.0123abcd.tmp"]
    for name in (abandoned, *others):
        (folder / name).write_bytes(b"half of it")
    with files._temporary(path) as living:
        assert not abandoned.exists()
        save(path, TREE)
        assert os.path.exists(living.name)
    assert names(folder) == sorted([*others, path.name])


def test_a_new_file_that_is_taken_for_abandoned(
    path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    """Between making it and locking it."""
    flock, thefts = files.fcntl.flock, [0]

    def slow(file: Any, kind: int) -> None:
        if thefts[0] == 0:
            thefts[0] = 1
            os.unlink(file.name)
        elif thefts[0] == 1:
            thefts[0] = 2
            raise BlockingIOError
        flock(file, kind)

    monkeypatch.setattr(files.fcntl, "flock", slow)
    save(path, TREE)
    load(path, TREE)
    assert thefts == [2] and names(path.parent)[-1] == path.name


def test_writers_and_a_reader_at_once(path: pathlib.Path):
    """Two threads write, and every read sees one of the two whole files."""
    trees = [{"x": np.full(1000, i)} for i in range(2)]
    save(path, trees[0])
    errors: list[BaseException] = []

    def write(tree: Any) -> None:
        try:
            for _ in range(40):
                save(path, tree)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(tree,)) for tree in trees]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        x = load(path, trees[0])["x"]
        assert (x == x[0]).all()
    assert errors == [] and names(path.parent) == [path.name]


def test_a_file_that_is_replaced_while_it_is_opened(
    path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    """The header of one file is not read together with the tensors of another."""
    import safetensors

    save(path, jnp.zeros(3))
    safe_open, opens = safetensors.safe_open, [0]

    def replaced(*args: Any, **kwargs: Any) -> Any:
        opened = safe_open(*args, **kwargs)
        opens[0] += 1
        if opens[0] == 1:
            with monkeypatch.context() as patch:
                patch.setattr(safetensors, "safe_open", safe_open)
                save(path, jnp.ones(3))
        return opened

    monkeypatch.setattr(safetensors, "safe_open", replaced)
    assert (load(path, jnp.zeros(3)) == 1).all() and opens == [2]


def test_without_safetensors(path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    save(path, TREE)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for call in (lambda: save(path, TREE), lambda: load(path, TREE)):
        with pytest.raises(
            ImportError, match=r"pip install \"eqx_ademamix\[checkpoint\]\""
        ):
            call()
    assert names(path.parent) == [path.name]


#
# A process of its own, which forks before it starts a backend, and whose children die
#

DRIVER = '''
import json, os, pathlib, resource, signal, sys, tempfile
import numpy as np
import safetensors
import eqx_ademamix
from eqx_ademamix._checkpoint import file as files

OLD, NEW = [{"x": np.full(50_000, i), "y": np.full(50_000, i)} for i in range(2)]
folder = pathlib.Path(tempfile.mkdtemp(dir=sys.argv[1]))
folder.chmod(0o755)
path = folder / "run.safetensors"


def in_child(act):
    """Runs a function in a child. Returns how that ended and what it said."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            text = act()
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(writer, str(text).encode())
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as file:
        said = file.read().decode()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


def killed_at(module, name, call, after=False):
    """Saves, but is killed just before or after a call of a function."""
    original, calls = getattr(module, name), [0]

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def wrapper(*args, **kwargs):
        calls[0] += 1
        if calls[0] == call and not after:
            die()
        result = original(*args, **kwargs)
        if calls[0] == call and after:
            die()
        return result

    setattr(module, name, wrapper)
    eqx_ademamix.save(path, NEW)
    return "not killed"


def value():
    tree = eqx_ademamix.load(path, OLD)
    assert (tree["x"] == tree["x"][0]).all() and (tree["y"] == tree["x"]).all()
    return int(tree["x"][0])


def files_left():
    return len(list(folder.iterdir())) - 1


facts = {"killed": {}, "disk full": {}}
points = [
    *((files, "checksum", n) for n in range(1, 5)),
    *((files, "_head", 1), (files, "_head", 2), (os, "fsync", 1), (os, "replace", 1)),
    (os, "fsync", 2),
]
for module, name, call in points:
    for after in (False, True):
        eqx_ademamix.save(path, OLD)
        assert files_left() == 0  # the one that the last child has left is gone
        code, said = in_child(lambda: killed_at(module, name, call, after))
        key = f"{'after' if after else 'before'} {name} {call}"
        facts["killed"][key] = code, said, value(), files_left()

for limit in (1, 1000, 100_000, 400_000, 799_999):
    eqx_ademamix.save(path, OLD)

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        eqx_ademamix.save(path, NEW)

    facts["disk full"][limit] = *in_child(full), value(), files_left()

eqx_ademamix.save(path, OLD)
folder.chmod(0o555)


def read_only():
    if os.geteuid() == 0:
        os.setuid(65534)  # root may write everywhere
    try:
        eqx_ademamix.save(path, NEW)
    except OSError as error:
        return f"{error} Then it holds {value()}."


facts["read-only"] = *in_child(read_only), value(), files_left()
folder.chmod(0o755)
print(json.dumps(facts))
'''


@pytest.fixture(scope="module")
def facts() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", DRIVER, folder]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=300
        )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_killed_at_each_point(facts: Any):
    """The old file is there until the rename, and the new one from then on."""
    assert len(facts["killed"]) == 18
    for point, (code, said, value, left) in facts["killed"].items():
        is_renamed = point in ("after replace 1", "before fsync 2", "after fsync 2")
        assert (code, said) == (-9, ""), point
        assert value == (1 if is_renamed else 0), point
        assert left == (0 if is_renamed else 1), point


def test_a_full_disk(facts: Any):
    """The limit of a file's size stops the writer in the header and in each tensor."""
    assert len(facts["disk full"]) == 5
    for code, said, value, left in facts["disk full"].values():
        assert said.startswith("OSError: Could not write ") and "File too large" in said
        assert is_on_page(said.removeprefix("OSError: "))
        assert (code, value, left) == (0, 0, 0)


def test_a_read_only_folder(facts: Any):
    code, said, value, left = facts["read-only"]
    assert said.startswith("Could not write ") and "Permission denied" in said
    assert said.endswith("unchanged. Then it holds 0.")
    assert (code, value, left) == (0, 0, 0)


#
# Two processes
#

PROCESS = """
import sys
import jax

jax.distributed.initialize(f"127.0.0.1:{sys.argv[1]}", 2, int(sys.argv[2]))
import json
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import eqx_ademamix

path = sys.argv[3]
sharding = NamedSharding(Mesh(np.array(jax.devices()), ("a",)), PartitionSpec("a"))
x = jax.make_array_from_callback((4,), sharding, lambda i: np.zeros(4, np.float32)[i])
said = []
try:
    eqx_ademamix.save(path, {"x": x})
except ValueError as error:
    said.append(str(error))
said.append(eqx_ademamix.load(path, {"x": np.zeros(4, np.float32)})["x"].tolist())
if jax.__version_info__ >= (0, 4, 36):  # before that, CPUs do not compute together
    back = eqx_ademamix.load(path, {"x": x})["x"]
    assert back.sharding == x.sharding
    said.append([float(shard.data[0]) for shard in back.addressable_shards])
print(json.dumps(said))
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def in_two_processes(path: pathlib.Path) -> list[Any]:
    """What each process says. Both have ended then, whatever happens."""
    flags = "--xla_force_host_platform_device_count=2"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}
    port = str(free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, port, str(i), str(path)],
            env=environment,
            stdout=subprocess.PIPE,
        )
        for i in range(2)
    ]
    try:
        return [json.loads(x.communicate(timeout=120)[0]) for x in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_two_processes(path: pathlib.Path):
    """Arrays that both have are refused. Each loads its own shards."""
    save(path, {"x": np.arange(4, dtype=np.float32)})
    old = path.read_bytes()
    both = in_two_processes(path)
    for i, (refusal, whole, *shards) in enumerate(both):
        assert refusal.startswith("tree['x'] is spread over several processes")
        assert "orbax" in refusal and is_on_page(refusal)
        assert whole == [0, 1, 2, 3]
        assert shards in ([[2 * i, 2 * i + 1]], [])
    assert path.read_bytes() == old
