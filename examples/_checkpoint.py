"""Checkpoint files: one line of JSON, followed by the arrays of a PyTree."""

import json
import os
from pathlib import Path
from typing import Any, TypeVar

import equinox as eqx
import jax


Tree = TypeVar("Tree")
Json = dict[str, Any]


class CheckpointError(Exception):
    """A checkpoint is missing, is damaged, or belongs to another run."""


def save(path: Path, header: Json, tree: Any) -> None:
    """Writes a checkpoint atomically: either the whole file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(json.dumps(header).encode() + b"\n")
            eqx.tree_serialise_leaves(file, tree)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_header(path: Path) -> Json:
    if not path.is_file():
        raise CheckpointError(f"There is no checkpoint {path} to resume from.")
    with path.open("rb") as file:
        try:
            return dict(json.loads(file.readline()))
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is not a checkpoint.") from error


def check_settings(path: Path, settings: Json) -> None:
    """Raises an error unless the checkpoint exists and has these settings."""
    found = read_header(path).get("settings", {})
    names = [name for name in settings if found.get(name) != settings[name]]
    if names:
        changes = ", ".join(f"{n}={found.get(n)} (now {settings[n]})" for n in names)
        raise CheckpointError(
            f"Cannot resume from {path}, which has different settings: {changes}."
        )


def load(path: Path, like: Tree) -> tuple[Json, Tree]:
    """Reads the header and the tree from a checkpoint."""
    header = read_header(path)
    with path.open("rb") as file:
        file.readline()
        try:
            tree = eqx.tree_deserialise_leaves(file, like)
        except (ValueError, RuntimeError, EOFError, OSError) as error:
            raise CheckpointError(f"{path} is damaged.") from error
    # NumPy may still own the memory of these arrays. It is safe to donate copies.
    return header, jax.tree.map(lambda x: x.copy() if eqx.is_array(x) else x, tree)
