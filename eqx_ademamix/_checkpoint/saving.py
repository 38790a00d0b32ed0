"""Saving a tree into one file, and loading it."""

import functools as ft
import os
import warnings
from pathlib import Path
from typing import Any, TypeVar

import jax
from jaxtyping import PyTree

from .._checks import check_alive, check_optimizer
from .._paths import Leaves, describe, full_path_text
from .._typing import no_type_check
from .arrays import ArrayLike, Raw, from_raw, is_array, raw_type, to_raw
from .contents import (
    Contents,
    all_leaves,
    contents_of,
    from_metadata,
    step_of,
    to_metadata,
)
from .fields import left_at_default
from .file import CheckpointError, Opened, Tensor, as_path, opened, raise_damaged, write
from .fit import (
    check_concrete,
    check_enabled,
    check_fit,
    check_has_devices,
    check_names,
    check_savable,
    moments_in,
)


Tree = TypeVar("Tree")


@no_type_check
def save(path: str | os.PathLike[str], tree: PyTree, *, optim: object = None) -> None:
    """Saves a tree into one file, in the format of
    [safetensors](https://huggingface.co/docs/safetensors). Needs the package
    safetensors: `pip install "eqx_ademamix[checkpoint]"`.

    The file is written next to its final place, flushed to disk, and then renamed. So
    there is always a complete file under that name, the old one or the new one, even if
    the process is killed.

    Each array is a tensor whose name is its path in the tree, such as
    `[1].m1.layers[0].weight`. The arrays are read one by one. See
    [Saving and resuming](../resuming.md#what-is-in-the-file) for the rest of the file.

    **Arguments:**

    - `path`: the path of the file. Missing folders are created.
    - `tree`: any tree, for example `(model, state, key)`. JAX and NumPy arrays are
        saved: numbers of every dtype that JAX has, booleans, and PRNG keys. Python
        numbers and strings are saved too, but only compared when the file is loaded.
        Everything else, such as functions and static fields, is not saved.
    - `optim`: the optimizer, if [`eqx_ademamix.load`][] is to compare its
        hyperparameters. They are readable text in the file.

    **Returns:**

    Nothing.

    **Raises:**

    - `ValueError`: if `tree` has an array that is traced, was donated, has a dtype that
        JAX does not have, or is spread over several processes (use Orbax for that), or
        if two leaves have the same path.
    - `OSError`: if the file cannot be written, for example because the disk is full. An
        older file stays as it was, and no temporary file is left behind.
    - `ImportError`: if safetensors is not installed.

    !!! Example

        ```python
        import tempfile
        from pathlib import Path

        import equinox as eqx
        import jax
        import eqx_ademamix

        model = eqx.nn.MLP(2, 1, width_size=8, depth=1, key=jax.random.key(0))
        optim = eqx_ademamix.AdEMAMix(1e-3)
        state = eqx_ademamix.init(optim, model)
        path = Path(tempfile.mkdtemp()) / "run.safetensors"
        eqx_ademamix.save(path, (model, state), optim=optim)
        model, state = eqx_ademamix.load(path, (model, state), optim=optim)
        ```
    """
    file, leaves = as_path(path), all_leaves(tree)
    check_names("tree", leaves)
    check_concrete("tree", leaves)
    check_savable(tree, leaves)
    _check_optim(optim)
    contents = contents_of(tree, leaves, optim)
    tensors = [
        Tensor(name, *raw_type(x), ft.partial(to_raw, x)) for name, x in _arrays(leaves)
    ]
    write(file, tensors, ft.partial(to_metadata, contents, step_of(tree)))


@no_type_check
def load(
    path: str | os.PathLike[str],
    like: Tree,
    *,
    optim: object = None,
    strict: bool = True,
) -> Tree:
    """Loads a file that [`eqx_ademamix.save`][] has written.

    Every bit of the file is checked. Arrays are matched by their paths, so the order of
    fields may have changed. Nothing in the file is executed.

    **Arguments:**

    - `path`: the path of the file.
    - `like`: a tree like the one that was saved. Arrays may be `jax.ShapeDtypeStruct`s,
        so `eqx.filter_eval_shape(make)` needs no memory. Its arrays determine what to
        load and onto which devices, by their shapes, dtypes, weak types, and shardings.
        Its Python numbers and strings must equal those in the file. Everything else is
        taken from `like`.
    - `optim`: an optimizer whose hyperparameters must equal those in the file.
    - `strict`: whether different hyperparameters are an error. If `False`, they are a
        warning.

    **Returns:**

    A tree like `like`, with the arrays of the file: NumPy arrays where `like` has
    those, otherwise JAX arrays. They are read one by one, so there is never a second
    copy of the whole file in memory. They are safe to donate.

    **Raises:**

    - [`eqx_ademamix.CheckpointError`][]: if the file does not exist, is damaged, was
        not written by `save`, was written by a newer version of it, or does not fit
        `like` or `optim`. The message names the first path that differs and both
        values.
    - `ValueError`: if `like` has 64-bit arrays, but JAX has 64-bit types disabled; or
        if it has a sharding without devices, and no mesh is set.
    - `ImportError`: if safetensors is not installed.

    !!! Example

        ```python
        import tempfile
        from pathlib import Path

        import equinox as eqx
        import jax.numpy as jnp
        import eqx_ademamix

        optim = eqx_ademamix.AdEMAMix(1e-3)
        state = eqx_ademamix.init(optim, jnp.zeros(3))
        path = Path(tempfile.mkdtemp()) / "state.safetensors"
        eqx_ademamix.save(path, state)

        like = eqx.filter_eval_shape(eqx_ademamix.init, optim, jnp.zeros(3))
        assert eqx.tree_equal(eqx_ademamix.load(path, like), state)
        ```
    """
    file, leaves = as_path(path), all_leaves(like)
    check_names("like", leaves)
    check_concrete("like", leaves)
    check_enabled(leaves)
    check_has_devices(leaves)
    _check_optim(optim)
    expected = contents_of(like, leaves, optim)
    # A file may hold NaNs, which are copied, not computed.
    with opened(file) as source, jax.debug_nans(False), jax.debug_infs(False):
        found, checksums = _described(source)
        check_fit(file, found, expected, moments_in(like))
        text = _other_hyperparams(file, found.fields, expected.fields, optim)
        if text is not None and strict:
            raise CheckpointError(text)
        if text is not None:
            warnings.warn(text, stacklevel=2)
        arrays = {
            name: from_raw(_tensor(source, name, x, checksums), x)
            for name, x in _arrays(leaves)
        }
    names = map(full_path_text, leaves.paths)
    pairs = zip(names, leaves.values, strict=True)
    return leaves.rebuilt([arrays.get(name, x) for name, x in pairs])


def _arrays(leaves: Leaves) -> list[tuple[str, Any]]:
    pairs = zip(map(full_path_text, leaves.paths), leaves.values, strict=True)
    return [(name, x) for name, x in pairs if is_array(x)]


def _check_optim(optim: object) -> None:
    if optim is not None:
        check_optimizer(optim)
        check_alive("optim", optim)
        check_concrete("optim", all_leaves(optim))


def _described(source: Opened) -> tuple[Contents, dict[str, str]]:
    """What the header says. It has the right checksum, so it is wrong only if someone
    has forged it."""
    try:
        found, checksums = from_metadata(source.metadata)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise_damaged(source.path, f"the metadata cannot be read ({error!r})")
    if set(source.tensors.keys()) != set(found.arrays):
        raise_damaged(source.path, "the metadata does not fit the tensors")
    return found, checksums


def _other_hyperparams(
    path: Path,
    found: dict[str, str] | None,
    expected: dict[str, str] | None,
    optim: object,
) -> str | None:
    """What to say if the file was saved with other hyperparameters."""
    if expected is None:
        return None
    if found is None:
        return (
            f"{path} was saved without an optimizer, so its hyperparameters are not "
            "known. Leave out `optim`, or save with `save(path, tree, optim=optim)`."
        )
    unsaid = left_at_default(optim) - found.keys()
    names = [
        name
        for name in {**found, **expected}
        if name not in unsaid and not _is_same(found.get(name), expected.get(name))
    ]
    if not names:
        return None
    values = [x.get(names[0], "missing") for x in (found, expected)]
    return (
        f"optim{names[0]} is {values[0]} in {path}, but {values[1]} in `optim` (the "
        f"first of {len(names)} that differ). If that is intended, load with "
        "`strict=False`."
    )


def _is_same(text: str | None, other: str | None) -> bool:
    """Also true for 100 and 100.0: a call turns one into the other in the length of
    `optax.cosine_decay_schedule`."""
    try:
        return text == other or float(text or "") == float(other or "")
    except ValueError:
        return False


def _tensor(
    source: Opened, name: str, like: ArrayLike, checksums: dict[str, str]
) -> Raw:
    """A tensor as it is stored."""
    raw = source.tensor(name, checksums[name])
    if (raw.dtype, raw.shape) != raw_type(like):
        raise_damaged(source.path, f"{name} is stored as {describe(raw)}")
    return raw
