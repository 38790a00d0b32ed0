"""Files that older versions saved load for ever.

Each file in `tests/data` is what `save` wrote at the time of a format version. A change
that makes one of these tests fail would make the files of users unreadable. Never write
these files again. For a new format version, add new files:

    python -m tests.test_old_files
"""

import pathlib
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest

import eqx_ademamix
from eqx_ademamix import (
    AdEMAMix,
    CheckpointError,
    Compensated,
    SimplifiedAdEMAMix,
    SplitBfloat16,
    StateFormat,
    alpha_scheduler,
    beta3_scheduler,
)
from eqx_ademamix._checkpoint.file import FORMAT_VERSION

from .helpers import COMPACT, everywhere


DATA = pathlib.Path(__file__).parent / "data"
SCHEDULES: Any = dict(
    b3=beta3_scheduler(0.9999, 0.9, warmup=1000),
    alpha=alpha_scheduler(8.0, warmup=1000),
)
SPLIT = StateFormat(jnp.bfloat16, SplitBfloat16(), jnp.float32, min_size=0)
OPTIMS = {
    "ademamix": AdEMAMix(
        1e-3,
        weight_decay=0.1,
        weight_decay_mask={"w": True, "v": False, "c": False, "layer": True},
        **SCHEDULES,
    ),
    "compact": AdEMAMix(jnp.asarray(1e-3), b1=0, state_format=COMPACT),
    "corrected": AdEMAMix(1e-3, bias_correct_m2=True, state_format=SPLIT),
    "simplified": SimplifiedAdEMAMix(
        1e-5, alpha=10.0, normalize=True, state_format=everywhere(StateFormat.half())
    ),
    "compensated": Compensated(AdEMAMix(1e-3, **SCHEDULES), bits=8, check_params=True),
}


def params() -> dict[str, Any]:
    return {
        "w": jnp.zeros((3, 8)),
        "v": jnp.zeros(5, jnp.bfloat16),
        "c": jnp.zeros((), jnp.complex64),
        "layer": eqx.nn.Linear(2, 2, key=jax.random.key(0)),
    }


def blank(name: str) -> Any:
    """A tree with everything that a file can hold."""
    model = params()
    return {
        "model": model,
        "state": eqx_ademamix.init(OPTIMS[name], model),
        "key": jax.random.key(0),
        "batch": np.zeros((2, 3), np.int64),
        "done": jnp.zeros(4, bool),
        "epoch": 3,
        "name": "run",
    }


def filled(tree: Any) -> Any:
    """The tree with other numbers in its arrays: 0, 1, 2, ... from leaf to leaf."""
    leaves, treedef = jtu.tree_flatten(tree)
    return treedef.unflatten([_filled(x, i) for i, x in enumerate(leaves)])


def _filled(x: Any, start: int) -> Any:
    if not isinstance(x, (jax.Array, np.ndarray)):
        return x
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.key(7)
    values = (np.arange(x.size) + start).reshape(x.shape).astype(x.dtype)
    return values if isinstance(x, np.ndarray) else jnp.asarray(values)


def path_of(version: int, name: str) -> pathlib.Path:
    return DATA / f"format{version}-{name}.safetensors"


VERSIONS = range(1, FORMAT_VERSION + 1)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", OPTIMS)
def test_an_old_file_loads(name: str, version: int):
    like, path = blank(name), path_of(version, name)
    loaded = eqx_ademamix.load(path, like, optim=OPTIMS[name])
    assert eqx.tree_equal(loaded, filled(like), typematch=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_an_old_file_is_still_checked(version: int):
    """Other hyperparameters are refused, and so is another optimizer."""
    like, path = blank("ademamix"), path_of(version, "ademamix")
    other = AdEMAMix(2e-3, weight_decay=0.1, **SCHEDULES)
    with pytest.raises(CheckpointError, match=r"optim\.learning_rate is 0\.001 in"):
        eqx_ademamix.load(path, like, optim=other)
    with pytest.raises(CheckpointError):
        eqx_ademamix.load(path, blank("simplified"))


class Newer(eqx.Module):
    """An optimizer that got new fields after a file was saved."""

    optim: AdEMAMix
    flag: bool
    factor: float
    inner: Any

    def __init__(
        self, optim: Any, flag: bool = False, factor: float = 1.0, inner: Any = None
    ):
        self.optim, self.flag, self.factor, self.inner = optim, flag, factor, inner

    def init(self, params: Any) -> Any:
        return self.optim.init(params)

    update = init


class Older(eqx.Module):
    optim: AdEMAMix
    init = update = Newer.init


Older.__qualname__ = "Newer"


def test_a_new_hyperparameter(tmp_path: pathlib.Path):
    """A file from before it fits its default, and nothing else."""
    optim, path = AdEMAMix(1e-3), tmp_path / "run"
    eqx_ademamix.save(path, jnp.ones(3), optim=Older(optim))
    load = lambda newer: eqx_ademamix.load(path, jnp.zeros(3), optim=newer)
    assert np.all(load(Newer(optim)) == 1)
    changed: dict[str, Any] = {"flag": True, "factor": 2.0, "inner": optim}
    for field, value in changed.items():
        with pytest.raises(CheckpointError, match=rf"optim\.{field} is missing in"):
            load(Newer(optim, **{field: value}))
    with pytest.raises(CheckpointError, match=r"optim\.optim\.learning_rate is 0\.001"):
        load(Newer(AdEMAMix(2e-3)))
    # A newer file with an option that this version does not know does not fit.
    eqx_ademamix.save(path, jnp.ones(3), optim=Newer(optim))
    with pytest.raises(CheckpointError, match=r"optim\.flag is False in .* missing"):
        load(Older(optim))


def test_there_is_a_file_for_every_version():
    expected = {path_of(version, name) for version in VERSIONS for name in OPTIMS}
    assert set(DATA.glob("*.safetensors")) == expected


if __name__ == "__main__":
    for _name in OPTIMS:
        _path = path_of(FORMAT_VERSION, _name)
        assert not _path.exists(), f"{_path} must stay as it is"
        eqx_ademamix.save(_path, filled(blank(_name)), optim=OPTIMS[_name])
