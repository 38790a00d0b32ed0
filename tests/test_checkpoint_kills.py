"""Processes killed at random moments: no checkpoint is lost, and no result changes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from .test_examples import EXAMPLES, TINY, checkpoints, names


ROOT = Path(__file__).parents[1]

# A process that forks children before it starts a backend, since only then may JAX's
# processes fork, and since importing takes longer than all else. It kills them.
FORKS = """
import json, os, random, signal, sys, time, traceback
from pathlib import Path

import numpy as np

import eqx_ademamix

folder = Path(sys.argv[1])
rng = random.Random(0)


def fork(act, timeout=120):
    '''Runs a function in a child, which can write to a pipe. Returns the child and the
    other end of that pipe. The child ends at the latest after the timeout.'''
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(reader)
            signal.alarm(timeout)
            code = act(writer)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writer)
    return child, open(reader, "rb")


def kill(child):
    '''Returns how the child has ended.'''
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
"""


def facts_of(script: str, *args: str | Path) -> Any:
    """What a script prints."""
    command = [sys.executable, "-c", FORKS + script, *map(str, args)]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


#
# A writer
#

WRITER = """
path = folder / "run.safetensors"


def tree(step):
    rng = np.random.default_rng(step)
    sizes = 10 ** rng.uniform(1, 5.5, 4)
    arrays = [np.full(int(size), step, np.int64) for size in sizes]
    return {"step": np.int64(step), "arrays": arrays}


def write(start, pipe):
    '''Saves in a loop, and says so after each time.'''
    for step in range(start, 10**9):
        eqx_ademamix.save(path, tree(step))
        os.write(pipe, b".")


def loaded(first, last):
    '''The one of some steps that the file holds, which must be whole.'''
    for step in range(first, last + 1):
        try:
            found = eqx_ademamix.load(path, tree(step))
        except eqx_ademamix.CheckpointError as error:
            assert "damaged" not in str(error), error
        else:
            assert all((x == found["step"]).all() for x in found["arrays"])
            return int(found["step"])
    raise AssertionError(f"{path} holds none of the steps {first} to {last}")


facts = []
step = -1
for _ in range(100):
    child, pipe = fork(lambda pipe: write(step + 1, pipe))
    said = pipe.read(1)  # so that no time is spent on starting
    time.sleep(rng.uniform(0, 0.03))
    code = kill(child)
    said += pipe.read()
    pipe.close()
    last = step + len(said)
    left = [x.name for x in folder.iterdir() if x != path]
    step = loaded(last, last + 1)
    facts.append([code, last, step, left])
eqx_ademamix.save(path, tree(step + 1))
print(json.dumps([facts, [x.name for x in folder.iterdir()]]))
"""


def test_a_writer_that_is_killed_at_100_random_moments(tmp_path: Path):
    """The file holds the last tree whose `save` has returned, or the next one. Of all
    unfinished files there is never more than one, and in the end there is none."""
    facts, files = facts_of(WRITER, tmp_path)
    codes, last, steps, left = zip(*facts, strict=True)
    assert codes == (-9,) * 100
    assert all(
        step in (known, known + 1) for known, step in zip(last, steps, strict=True)
    )
    assert list(steps) == sorted(set(steps))
    assert max(map(len, left)) == 1 and sum(map(len, left)) >= 10
    assert files == ["run.safetensors"]


#
# The main job
#

JOB = """
sys.path.insert(0, sys.argv[2])
import train_language_model

train_language_model.NUM_EVALUATIONS = 40
every = 50  # the number of steps between two checkpoints
args = sys.argv[3:]
take_step = train_language_model.Run.step


def job(pipe, out, notice=None):
    '''Runs the main job. After some steps, it says so. After 'every' more it waits to
    be killed, so it never comes to its end.'''
    taken = 0

    def counted(run, step):
        nonlocal taken
        if taken == notice:
            os.write(pipe, b".")
        if notice is not None and taken == notice + every:
            signal.pause()
        taken += 1
        take_step(run, step)

    train_language_model.Run.step = counted
    sys.argv[1:] = [*args, "--out", str(out)] + ["--resume"] * out.exists()
    with open(folder / f"{out.name}.txt", "a") as sys.stdout:
        sys.stderr = sys.stdout
        return train_language_model.main()


def ended(out):
    '''Runs the main job to its end.'''
    child, pipe = fork(lambda pipe: job(pipe, out))
    pipe.close()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


codes = [ended(folder / "peace")]
facts = []
for i in range(10):
    # The moment lies somewhere after the notice. Every other time, the second save of
    # the process comes next. The first one takes longer, since it has to compile.
    notice = 2 * every - 1 if i % 2 else rng.randrange(2 * every)
    child, pipe = fork(lambda pipe: job(pipe, folder / "killed", notice))
    said = pipe.read(1).decode()
    pipe.close()
    time.sleep(rng.uniform(0, 0.05))
    code = kill(child)
    files = sorted(x.name for x in (folder / "killed").iterdir())
    facts.append([said, code, files])
codes.append(ended(folder / "killed"))
print(json.dumps([codes, facts]))
"""


def test_the_main_job_killed_10_times(tmp_path: Path):
    """It ends with the same bits as an undisturbed one."""
    args = [*TINY, "--steps", "2000", "--data", str(Path(__file__))]
    codes, facts = facts_of(JOB, tmp_path, EXAMPLES, *args)
    peace, killed = tmp_path / "peace", tmp_path / "killed"
    logs = [path.with_suffix(".txt").read_text() for path in (peace, killed)]
    assert codes == [0, 0], logs
    said, signals, files = zip(*facts, strict=True)
    assert said == (".",) * 10 and signals == (-9,) * 10
    steps = [
        max(int(name[9:17]) for name in found if name.startswith("ademamix-"))
        for found in files
    ]
    assert steps == sorted(steps) and 0 < steps[-1] < 2000

    assert names(killed) == names(peace)
    for path, expected in zip(*map(checkpoints, (killed, peace)), strict=True):
        assert path.read_bytes() == expected.read_bytes()
    last = [log.splitlines()[-1] for log in logs]
    assert last[0] == last[1] and last[0].startswith("validation loss: ")
